"""Does Gram anchoring do what it is for? Patches of a small `dinov3` run, with it and without, over training.

    python benchmarks/gram.py --data CAMVID --out DIR [--seeds 0,1,2] [--steps N] [any flag of dinov3]

Per seed one run until patches are held to the anchor; there its directory is copied, and both copies go on, with the
same stages, rates, pictures and views: only the weight of the Gram loss differs (0 in `without`). At every point a
linear layer on the teacher's frozen patches learns from a part of train and is examined on val; test is read once, at
the end. Interrupted, the same command goes on. A proxy: what takes the paper's 7B some 200,000 steps (the pictures'
loss outweighing the patches') is brought about by a small `--patch-weight`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from saccade import distributed
from saccade.distributed import Ranks
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import SHARE
from saccade.evaluate.masked import Masked, read_masked
from saccade.evaluate.segmentation import Seen, examine
from saccade.evaluate.splits import set_apart
from saccade.recipe import configure
from saccade.report.charts import ticks
from saccade.run import holding, stop_requests, write_json
from saccade.settings import PretrainArguments, checked
from saccade.train import Pretraining

ARMS = ("with", "without")
LIMIT = 2.0
"""Points of mIoU: a smaller decline without Gram is none to mend."""
PROXY: dict[str, Any] = {
    "arch": "vit-xs/8", "image_size": 32, "local_size": 16, "local_crops": 4, "batch": 16, "lr": 1e-3,
    "patch_weight": 0.1, "anchor": 0.25, "gram": 0.5, "refresh": 0.1, "high": 1.0,
}  # fmt: skip


class Probe:
    """The examination: pictures with masks, always the same, and a file of what came out so far."""

    def __init__(self, data: Path, place: Path, side: int, pictures: int, pixels: int):
        parts = read_masked(data)
        if "val" not in parts:
            sys.exit(f"{data} needs train, val and test")
        train = parts["train"]
        every = max(1, len(train.keys) // pictures)
        self.train, self.val, self.test = (
            train.some(list(range(0, len(train.keys), every))),
            parts["val"],
            parts["test"],
        )
        self.apart = set_apart(self.train.keys, SHARE, "hold-out")
        self.side, self.pixels, self.file = side, pixels, place / "points.json"
        self.points: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []

    def has(self, **which: Any) -> bool:
        return any(which.items() <= point.items() for point in self.points)

    def look(self, backbone: Any, **which: Any) -> None:
        """Examines and writes down, unless that was done."""
        if self.has(**which):
            return
        began = time.process_time()
        encoder = Encoder(backbone, {"family": "ours"}, self.side)
        seen = self._seen(encoder, self.test if which["part"] == "test" else self.val)
        self.points.append(
            {**which, "miou": seen.miou, "penalty": seen.penalty, "cpu_seconds": time.process_time() - began}
        )
        write_json(self.file, self.points)
        print(f"{which}: {seen.miou:.2f} mIoU", flush=True)

    def _seen(self, encoder: Encoder, part: Masked) -> Seen:
        return examine(encoder, self.train, part, self.apart, baselines=False, pixels=self.pixels).seen["pretrained"]


class Studied(Pretraining):
    """An ordinary run that is examined at every save, and whose directory is copied where the arms part."""

    def study(self, seed: int, arm: str, probe: Probe, requests: dict[str, bool]) -> None:
        self.seed, self.arm, self.probe = seed, arm, probe
        self.parting = self.stages[1][0]  # the end of the stage before patches are held
        if self.parting % int(self.arguments.save_every):
            raise SaccadeError(f"the arms part at step {self.parting}, where no point is", path="--points")
        self._look()
        self.train(requests)
        self._look(part="test")

    def _save(self) -> None:
        super()._save()
        self._look()

    def _look(self, part: str = "val") -> None:
        encoder = self.watch.gather(self.model)
        assert encoder is not None
        if part == "test" or self.step % int(self.arguments.save_every) == 0:
            self.probe.look(encoder.backbone, seed=self.seed, arm=self.arm, step=self.step, part=part)
        if self.arm == "with" and self.step == self.parting:
            self._part()

    def _part(self) -> None:
        """The other arm begins as a copy of this run, which asked for the same but for the weight."""
        other = self.run.path.parent / "without"
        if other.exists():
            return
        beside = other.with_name(".writing-without")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(self.run.path, beside)
        asked = self.run.config
        asked["settings"]["gram_weight"] = 0.0
        asked["machine"]["out"] = str(other)
        write_json(beside / "config.json", asked)
        os.rename(beside, other)


def run(data: Path, out: Path, seed: int, arm: str, settings: dict[str, Any], probe: Probe, every: int) -> None:
    """One arm, from wherever it stands."""
    values = {**settings, "seed": seed} | ({"gram_weight": 0.0} if arm == "without" else {})
    page, config = configure("dinov3:small_machine", values)
    place = out / f"seed-{seed}" / arm
    arguments = checked(PretrainArguments, {
        "data": (str(data / "train" / "images"),), "recipe": "dinov3:small_machine", "out": str(place), "threads": 1,
        "workers": 0, "save_every": str(every), "log_every": 20,
    }, owner="gram")  # fmt: skip
    ranks: Ranks
    with distributed.ranks() as ranks, holding():
        with stop_requests() as requests:
            pretraining = Studied(page, config, arguments, list(arguments.data), ranks)
            pretraining.study(seed, arm, probe, requests)
        pretraining.finish()


def curve(points: list[dict[str, Any]], seed: int, arm: str) -> dict[int, float]:
    """mIoU on val by step: what the arms share, then the arm's own."""
    val = [point for point in points if point["seed"] == seed and point["part"] == "val"]
    own = {point["step"]: point["miou"] for point in val if point["arm"] == arm}
    begins = min((point["step"] for point in val if point["arm"] == "without"), default=1 << 60)
    shared = {point["step"]: point["miou"] for point in val if point["arm"] == "with" and point["step"] < begins}
    return dict(sorted((shared | own).items()))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def judge(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The decline without Gram and what Gram gains at the end, over the seeds whose arms have both ended."""
    tests = {(p["seed"], p["arm"]): p["miou"] for p in points if p["part"] == "test"}
    seeds = sorted({seed for seed, _ in tests if all((seed, arm) in tests for arm in ARMS)})
    if not seeds:
        return {}
    curves = {(seed, arm): curve(points, seed, arm) for seed in seeds for arm in ARMS}
    last = {key: list(found.values())[-1] for key, found in curves.items()}
    values = {
        "decline without": [max(curves[seed, "without"].values()) - last[seed, "without"] for seed in seeds],
        "decline with": [max(curves[seed, "with"].values()) - last[seed, "with"] for seed in seeds],
        "with minus without, val": [last[seed, "with"] - last[seed, "without"] for seed in seeds],
        "with minus without, test": [tests[seed, "with"] - tests[seed, "without"] for seed in seeds],
    }
    found = {name: dict(zip(("mean", "error"), mean_and_error(each), strict=True)) for name, each in values.items()}
    decline = found["decline without"]["mean"]
    gain = found["with minus without, val"]
    verdict = (
        f"not reproduced at this scale: without Gram patches lose {decline:.1f} mIoU, less than {LIMIT:.0f}"
        if decline < LIMIT
        else f"reproduced: without Gram patches lose {decline:.1f} mIoU, with it {found['decline with']['mean']:.1f}"
        if gain["mean"] > 2 * gain["error"]
        else f"without Gram patches lose {decline:.1f} mIoU, but Gram does not keep them"
    )
    return {"seeds": seeds, **found, "verdict": verdict}


def tell(points: list[dict[str, Any]]) -> None:
    seeds = sorted({point["seed"] for point in points})
    curves = {(seed, arm): curve(points, seed, arm) for seed in seeds for arm in ARMS}
    steps = sorted({step for found in curves.values() for step in found})
    names = [f"{seed} {arm}" for seed, arm in curves]
    print(f"\n{'step':>7} " + " ".join(f"{name:>10}" for name in names))
    for step in steps:
        print(
            f"{step:>7} "
            + " ".join(f"{found[step]:>10.2f}" if step in found else " " * 10 for found in curves.values())
        )
    judged = judge(points)
    for name, value in judged.items():
        if isinstance(value, dict):
            print(f"{name}: {value['mean']:+.2f} ± {value['error']:.2f} (standard error, {len(judged['seeds'])} seeds)")
    print(judged.get("verdict", "no seed has both arms yet"))


def draw(points: list[dict[str, Any]], file: Path) -> None:
    """Both arms over steps: a thin line a seed, a thick one their mean."""
    seeds = sorted({point["seed"] for point in points})
    curves = {(seed, arm): curve(points, seed, arm) for seed in seeds for arm in ARMS}
    every = [pair for found in curves.values() for pair in found.items()]
    marks, last = ticks(min(y for _, y in every), max(y for _, y in every)), max(max(x for x, _ in every), 1)
    wide, high, left, base = 640, 360, 50, 320

    def at(x: float, y: float) -> str:
        return f"{left + x / last * (wide - left - 90):.1f} {base - (y - marks[0]) / (marks[-1] - marks[0]) * 290:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="{left}" y="18">mIoU on CamVid val, percent: linear layer on frozen patches</text>']  # fmt: skip
    for mark in marks:
        y = at(0, mark).split()[1]
        parts.append(f'<line x1="{left}" x2="{wide - 90}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{mark:g}</text>')
    for x in ticks(0, last, 5):
        if x <= last:
            parts.append(f'<text x="{at(x, marks[0]).split()[0]}" y="{base + 16}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<text x="{wide / 2 - 20}" y="{base + 34}" text-anchor="middle">step</text>')
    for arm, colour in zip(reversed(ARMS), ("#c0392b", "#1f5fa8"), strict=True):
        found = [curves[seed, arm] for seed in seeds]
        steps = sorted(set.intersection(*(set(one) for one in found)))
        mean = {step: statistics.fmean(one[step] for one in found) for step in steps}
        for one, width, opacity in [*((one, 1, 0.35) for one in found), (mean, 3, 1)]:
            path = "M" + "L".join(at(x, y) for x, y in one.items())
            parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>')
        if mean:
            x, y = at(steps[-1], mean[steps[-1]]).split()
            parts.append(f'<text x="{float(x) + 6:.0f}" y="{y}" fill="{colour}">{arm} Gram</text>')
    file.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="other flags are those of dinov3")
    parser.add_argument("--data", type=Path, required=True, help="the CamVid pack: train, val and test with masks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--points", type=int, default=8, help="examinations over training, beside the first")
    parser.add_argument("--side", type=int, default=64, help="short side at which patches are examined")
    parser.add_argument("--pictures", type=int, default=183, help="of train that the linear layer learns from")
    parser.add_argument("--pixels", type=int, default=16384, help="of them that it learns from")
    parser.add_argument("--only-tell", action="store_true", help="table and plot of what is there")
    options, rest = parser.parse_known_args()
    if len(rest) % 2 or any(not name.startswith("--") for name in rest[::2]):
        parser.error(f"settings are pairs: --name value, not {rest}")
    settings = {**PROXY, "steps": options.steps}
    settings |= {name[2:].replace("-", "_"): value for name, value in zip(rest[::2], rest[1::2], strict=True)}
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    probe = Probe(options.data, options.out, options.side, options.pictures, options.pixels)
    print(f"{platform.platform()}, {os.cpu_count()} cores, 1 thread; Python {platform.python_version()}, torch "
          f"{torch.__version__}\n{settings}", flush=True)  # fmt: skip
    for seed in () if options.only_tell else map(int, options.seeds.split(",")):
        for arm in ARMS:
            if not probe.has(seed=seed, arm=arm, part="test"):
                began = time.process_time()
                try:
                    run(options.data, options.out, seed, arm, settings, probe, options.steps // options.points)
                except SaccadeError as mistake:  # also a stop on request, after which the same command goes on
                    print(mistake, file=sys.stderr)
                    sys.exit(mistake.code)
                print(f"seed {seed}, {arm}: {time.process_time() - began:.0f} CPU s", flush=True)
    tell(probe.points)
    if probe.points:
        draw(probe.points, options.out / "gram.svg")
        write_json(options.out / "gram.json", {"settings": settings, **judge(probe.points), "points": probe.points})


if __name__ == "__main__":
    main()

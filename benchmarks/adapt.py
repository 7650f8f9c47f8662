"""What adapting buys, and what each of its parts does: real weights, real packs, equal steps; a cell at a time.

    python benchmarks/adapt.py WEIGHTS OUT --pack tomato=/data/tomato --pack 'malaria=/data/malp@(C\\d+)'
        [--seeds 0,1,2,3,4] [--ways naive,adapt,…] [--steps 60] [--batch 16] [--image-size 56] [--train 1200]
    python benchmarks/adapt.py --table OUT

A pack is a folder with train/CLASS and test/CLASS, and behind @ the pattern of its groups. Training, choosing and the
gate see nothing but the train side; of each cell the test side is read once, at its end. A cell is one JSON file in
OUT: what is there is not done again, and a run that was stopped goes on. `naive` is `pretrain --init`: fresh heads, the
whole network, the recipe's own rate and settings; `naive-short` the same with the settings that adapt gives a short
run; then `adapt`, whole and without one of its parts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import saccade
from saccade.adapt import natural, short
from saccade.anchor import architecture
from saccade.draws import hash64
from saccade.encoder import Preprocess
from saccade.evaluate.live import Live
from saccade.recipe import configure

WAYS: dict[str, dict[str, Any]] = {
    "naive": {},
    "naive-short": {},
    "adapt": {},
    "no-warm-heads": {"warm": 0.0},
    "no-anchor": {"anchor_patches": 0.0, "anchor_token": 0.0},
    "no-layer-decay": {"layer_decay": 1.0},
    "no-roll-back": {"roll_back": False},
}
SAME = ("steps", "batch", "image_size", "seed", "workers")
MEASURES = ("knn", "linear", "few_label_10")


def smaller(pack: Path, groups: str | None, counts: dict[str, int], place: Path) -> Path:
    """The pack with so many pictures of train and test, by hash, as links; the groups of a picture stay in its name."""
    for part, count in counts.items():
        files = sorted(path for path in (pack / part).glob("*/*") if path.is_file())
        named = [path for path in files if groups is None or re.search(groups, path.name)]
        for path in sorted(named, key=lambda path: hash64(f"adapt {path.name}"))[:count]:
            link = place / part / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(path.resolve())
    return place


def tested(backbone: Any, pack: Path, groups: str | None, prepared: Preprocess) -> dict[str, Any]:
    """The test side, as the start sees pictures: k-NN, linear, ten a class, and which pictures k-NN gets right."""
    encoder = saccade.load(backbone, image_size=prepared.crop)
    encoder.preprocess = prepared  # naive runs have the convention's own, which would be compared too
    found = saccade.evaluate(encoder, pack, tasks=("knn", "linear", "few-label"), labels=(10,), baselines=False,
                             group_by=groups)  # fmt: skip
    live = Live(pack, groups, encoder.preprocess, 10_000, divide=lambda data: (data.train, data.test))
    right, names = live.right(encoder)
    scores = {"knn": found["knn"], "linear": found["linear"], "few_label_10": found["few_label"]["10"]["mean"]}
    return {**scores, "right": "".join("01"[bit] for bit in right.astype(int)), "names": names}


def cell(weights: str, pack: Path, groups: str | None, way: str, seed: int, asked: Any, run: Path) -> dict[str, Any]:
    """One run and what became of it."""
    recipe = asked.recipe or natural(weights)
    config = configure(recipe, {})[0].config
    settings: dict[str, Any] = {
        "steps": asked.steps,
        "batch": asked.batch,
        "image_size": asked.image_size,
        "seed": seed,
    }
    start = saccade.load(weights, image_size=asked.image_size)
    settings = {**short(config, settings, start.backbone.stride), **settings, "workers": 0}
    settings |= {"local_crops": asked.local_crops} if "local_crops" in settings else {}
    began, data = time.process_time(), str(pack / "train")
    if way.startswith("naive"):
        if way == "naive":  # what must fit the batch and the patches stays
            fits = (*SAME, "local_size", "koleo_group", "local_crops")
            settings = {name: value for name, value in settings.items() if name in fits}
        done = saccade.pretrain(data, recipe=recipe, init=weights, out=run, arch=architecture(start), **settings)
        found = {"scores": tested(run, pack, groups, start.preprocess), "handed_over": "candidate"}
    else:
        more = {"eval": data, "group_by": groups, "looks": asked.looks, **WAYS[way]}
        done = saccade.adapt(data, start=weights, out=run, recipe=recipe, **{**settings, **more})
        gate, best = done.summary["gate"], done.record["best"]
        still = best is None or best["warming"]
        candidate = None if still else tested(run / "best", pack, groups, start.preprocess)
        found = {"scores": candidate, "handed_over": gate["handed_over"], "gate": gate, "best": best,
                 "rolled_back": done.summary["rolled_back"], "after": done.summary["after"],
                 "before": done.summary["before"]}  # fmt: skip
    shutil.rmtree(run / "checkpoints")  # half a gigabyte each, and nothing goes on from them
    return {**found, "steps": done.summary["steps"], "cpu_seconds": round(time.process_time() - began, 1)}


def study(asked: Any) -> None:
    """Every cell that is not there yet, seed by seed, so that what is there is balanced."""
    out = Path(asked.out)
    for seed in [int(seed) for seed in asked.seeds.split(",")]:
        for name, _, rest in (pack.partition("=") for pack in asked.pack):
            folder, _, groups = rest.partition("@")
            counts = {"train": asked.train, "test": asked.test}
            pack = smaller(Path(folder), groups or None, counts, out / "packs" / name)
            for way in ["start", *asked.ways.split(",")]:
                target = out / f"{name}-{way}{'' if way == 'start' else f'-{seed}'}.json"
                if target.exists():
                    continue
                if way == "start":
                    prepared = saccade.load(asked.weights, image_size=asked.image_size).preprocess
                    found = {"scores": tested(asked.weights, pack, groups or None, prepared)}
                else:
                    found = cell(asked.weights, pack, groups or None, way, seed, asked, out / "runs" / target.stem)
                named = {"pack": name, "way": way, "seed": seed, "weights": asked.weights}
                beside = target.with_suffix(".new")
                beside.write_text(json.dumps(named | found))
                beside.rename(target)
                print(target.name, {key: found["scores"][key] for key in MEASURES} if found["scores"] else "the start")


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds; nothing where there were too few labels."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    students = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    half = students.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def paired(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float, float]:
    """The difference of k-NN in points, and its 95 % interval by a bootstrap over groups."""
    difference = np.array([int(b) - int(a) for a, b in zip(before["right"], after["right"], strict=True)])
    _, member = np.unique(before["names"], return_inverse=True)
    sums, counts = np.bincount(member, weights=difference), np.bincount(member)
    drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    means = 100 * sums[drawn].sum(1) / counts[drawn].sum(1)
    return 100 * float(difference.mean()), *(float(np.quantile(means, part)) for part in (0.025, 0.975))


def table(out: Path) -> None:
    """For each pack and way: differences from the start on test, of candidates and of what was handed over."""
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    starts = {found["pack"]: found["scores"] for found in cells if found["way"] == "start"}
    print("| pack | way | seeds | k-NN | linear | 10 a class | handed over | k-NN of that, worst seed (its interval) |")
    print("|---|---|---|---|---|---|---|---|")
    for pack, start in starts.items():
        print(f"| {pack} | start | | {' | '.join(f'{start[name] or math.nan:.1f}' for name in MEASURES)} | | |")
        for way in WAYS:
            mine = [found for found in cells if (found["pack"], found["way"]) == (pack, way)]
            if not mine:
                continue
            scores = [found["scores"] or start for found in mine]
            gains = [
                interval([one[name] - start[name] for one in scores if one[name] is not None]) for name in MEASURES
            ]
            given = [one if found["handed_over"] == "candidate" else start
                     for found, one in zip(mine, scores, strict=True)]  # fmt: skip
            worst = min(paired(start, one) for one in given)
            count = sum(found["handed_over"] == "candidate" for found in mine)
            said = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*worst)
            print(f"| {pack} | {way} | {len(mine)} | {' | '.join(gains)} | {count}/{len(mine)} | {said} |")


def main() -> None:
    """The study, or its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--table")
    parser.add_argument("--pack", action="append", default=[])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--recipe")
    for name, default in (("steps", 60), ("batch", 16), ("image-size", 56), ("local-crops", 2), ("train", 1200),
                          ("test", 400), ("looks", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if asked.table:
        table(Path(asked.table))
    elif asked.weights and asked.out:
        study(asked)
    else:
        parser.error("WEIGHTS and OUT, or --table OUT")


if __name__ == "__main__":
    main()

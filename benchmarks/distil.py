"""A small student alone and taught by a bigger run, at equal student time: k-NN and a linear probe, beside baselines.

    python benchmarks/distil.py PACK [--minutes 5] [--teacher-minutes 20] [--seeds 3] [--out FOLDER]

PACK has train/CLASS and test/CLASS; train is learned from without its labels. A step of each contender is timed first,
turn by turn in one process on pictures that are decoded already, views and the teacher's pass included; the medians
and --minutes fix the number of steps of each, so what else the machine does afterwards changes nothing. The teacher is
trained once, from seed 0, for --teacher-minutes by its own step time: its time is not the student's. A run that
was stopped goes on; what is finished in FOLDER is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade import recipe
from saccade.data import collate
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.model import Model
from saccade.run import Run, environment
from saccade.settings import PretrainArguments
from saccade.sources import open_source

Contender = tuple[str, dict[str, Any]]
"""A recipe and its settings."""


def contenders(arguments: argparse.Namespace, teacher: Path) -> dict[str, Contender]:
    """The student alone, and taught in each way that is asked for."""
    shape = {"arch": arguments.student, "image_size": arguments.image_size, "batch": arguments.batch}
    found: dict[str, Contender] = {"alone": (arguments.recipe, dict(shape))}
    crops = {"local_crops": 2, "local_size": arguments.image_size // 2, "patch_weight": 0.5}
    for learn in arguments.learn.split(","):
        more = {"learn": learn, "teacher": str(teacher), **(crops if learn == "heads" else {})}
        found[learn] = ("distil:small_machine", {**shape, **more})
    return found


def step_times(data: Path, found: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Seconds a step of each, the median over rounds in which they take turns; the first warms up."""
    steps = {}
    for name, (asked, settings) in found.items():
        page, config = recipe.configure(asked, {**settings, "steps": 1000})
        source = open_source([data], short_side=config.canvas(), channels=config.channels)
        samples = [source[n % len(source)] for n in range(config.batch)]
        batch = collate(samples, [0] * config.batch, list(range(config.batch)))
        arguments = PretrainArguments(data=(str(data),), recipe=asked, out="unused")
        model = Model(page, config, arguments, Ranks(0, 1, torch.device("cpu")))

        def step(model: Model = model, batch: Any = batch, page: Any = page, config: Any = config) -> None:
            draws = Draws(config.seed, 0, batch["key"], batch["seen"], batch["place"])
            float(model.step(iter([page.views(config, batch, draws)]), 0.5)["loss"])

        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def trained(out: Path, data: Path, contender: Contender, steps: int, seed: int) -> Run:
    """A run of so many steps, now or formerly."""
    asked, settings = contender
    return saccade.pretrain(data, recipe=asked, out=out, steps=steps, seed=seed, workers=1, log_every=50, **settings)


def scores(backbone: Path, pack: Path, baselines: bool = False) -> dict[str, Any]:
    """k-NN and linear on the pack's test side; kept beside the run."""
    kept = backbone / "scores.json"
    if not kept.exists():
        found = saccade.evaluate(backbone, pack, tasks=("knn", "linear"), baselines=baselines)
        kept.write_text(json.dumps({name: found[name] for name in ("knn", "linear", "baselines") if name in found}))
    return json.loads(kept.read_text())


def times_of(out: Path, data: Path, found: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Measured once a folder."""
    kept = out / "times.json"
    if not kept.exists():
        kept.write_text(json.dumps(step_times(data, found, rounds)))
    known: dict[str, float] = json.loads(kept.read_text())
    if known.keys() != found.keys():
        raise SaccadeError(f"{kept} is of other contenders", path=kept, hint="name a new --out")
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--out", type=Path, default=Path("distil-benchmark"))
    parser.add_argument("--minutes", type=float, default=5, help="of a student")
    parser.add_argument("--teacher-minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9, help="in which steps are timed")
    parser.add_argument("--recipe", default="dino:small_machine", help="of the teacher, and of the student alone")
    parser.add_argument("--teacher", default="vit-ti/8", help="its architecture")
    parser.add_argument("--student", default="conv-3/8", help="its architecture")
    parser.add_argument("--learn", default="features,heads")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, help="so many for everyone, to try the script out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data, out, pack = arguments.pack / "train", arguments.out, arguments.pack

    size = {"arch": arguments.teacher, "image_size": arguments.image_size, "batch": arguments.batch}
    big: Contender = (arguments.recipe, size)
    (out / "big").mkdir(exist_ok=True)
    length = arguments.steps or int(
        60 * arguments.teacher_minutes / times_of(out / "big", data, {"teacher": big}, 5)["teacher"]
    )
    trained(out / "teacher", data, big, length, 0)
    best = scores(out / "teacher", pack, baselines=True)

    found = contenders(arguments, out / "teacher")
    times = times_of(out, data, found, arguments.rounds)
    lines = []
    for name, contender in found.items():
        steps = arguments.steps or int(60 * arguments.minutes / times[name])
        runs = []
        for seed in range(arguments.seeds):
            trained(out / f"{name}-{seed}", data, contender, steps, seed)
            runs.append(scores(out / f"{name}-{seed}", pack, baselines=name == "alone" and seed == 0))
        lines.append({"student": name, "steps": steps, "ms_a_step": 1000 * times[name], **summed(runs)})
    base = scores(out / "alone-0", pack)["baselines"]
    versions = {"torch": torch.__version__, "python": platform.python_version(), "saccade": saccade.__version__}
    machine = {"machine": platform.platform(), "cores": environment()["cores"], "threads": 1, **versions}
    said = {"pack": str(pack), "students": lines, "teacher": {"steps": length, **best}, "baselines": base, **machine}
    (out / "result.json").write_text(json.dumps(said, indent=2) + "\n")
    table(said)


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds."""
    columns = {name: [run[name] for run in runs] for name in ("knn", "linear")}
    return {
        name: {"mean": statistics.fmean(x), "std": statistics.stdev(x) if len(x) > 1 else 0.0, "each": x}
        for name, x in columns.items()
    }


def table(said: dict[str, Any]) -> None:
    """As a table, in percent."""
    versions = f"torch {said['torch']}, Python {said['python']}, saccade {said['saccade']}"
    print(f"{said['pack']}: {said['machine']}, {said['cores']} cores, 1 thread, {versions}")
    print("| student | ms a step | steps | k-NN | linear |\n|---|---|---|---|---|")
    for line in said["students"]:
        cells = [f"{line[name]['mean']:.1f} ± {line[name]['std']:.1f}" for name in ("knn", "linear")]
        print(f"| {line['student']} | {line['ms_a_step']:.0f} | {line['steps']} | {' | '.join(cells)} |")
    others = {"the teacher": said["teacher"], "raw pixels": said["baselines"]["pixels"],
              "the student untrained": said["baselines"]["untrained"]}  # fmt: skip
    for name, row in others.items():
        print(f"| {name} | | {row.get('steps', '')} | {row['knn']:.1f} | {row['linear']:.1f} |")


if __name__ == "__main__":
    main()

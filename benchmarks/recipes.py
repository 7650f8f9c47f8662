"""Recipes beside each other at equal time: curves while they learn, and the test side read once, seed by seed.

    python benchmarks/recipes.py PACK --out DIR [--recipes dino,ibot,dinov2,dinov3] [--minutes 5] [--seeds 3]
        [--threads 1] [--own "dino --lr 6e-3"]... [-- --arch vit-xs/8 --image-size 32 … flags of pretrain]

PACK is a folder with train/CLASS/… and test/CLASS/…. What a step of each recipe costs is measured first, all recipes
and their stages in turn in one process, as medians over rounds; from that the number of steps is fixed, so that what
else the machine does meanwhile changes no result. Every run is an ordinary run directory: stopped, the same command
goes on. A difference below two paired standard errors over seeds is called none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from saccade import distributed
from saccade.data import loader
from saccade.draws import Draws, Order
from saccade.evaluate import evaluate
from saccade.model import Model
from saccade.recipe import configure
from saccade.settings import PretrainArguments, checked
from saccade.sources import open_source


def settings_of(flags: list[str]) -> dict[str, str]:
    """`--arch vit-xs/4 --drop-path 0` as settings; values stay text, which pydantic reads."""
    return {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }


def cost(pack: str, recipes: dict[str, dict[str, str]], rounds: int) -> dict[str, float]:
    """Seconds a step of each recipe, its stages weighed by their share: medians over rounds of all in turn."""
    with distributed.ranks() as ranks:
        stages: list[tuple[str, float, Iterator[None]]] = []
        for name, settings in recipes.items():
            page, config = configure(name, {**settings, "steps": 1000})
            arguments = checked(PretrainArguments, {"data": (pack,), "recipe": name, "out": "-"}, owner="recipes")
            source = open_source([f"{pack}/train"], short_side=config.canvas(), channels=config.channels, weights=None)
            order, config = Order(*source.parts(), config.seed), config.fitted(len(source))
            bounds = [0.0, *(until for until, _ in page.stages(config))]
            for (since, until), (_, stage) in zip(pairwise(bounds), page.stages(config), strict=True):
                stages.append((name, until - since, one_stage(page, stage, arguments, source, order, ranks)))
        times: list[list[float]] = [[] for _ in stages]
        for number in range(rounds + 1):
            for (_, _, steps), found in zip(stages, times, strict=True):
                began = time.perf_counter()
                next(steps)
                if number:  # the first one warms up
                    found.append(time.perf_counter() - began)
        total = dict.fromkeys(recipes, 0.0)
        for (name, share, _), found in zip(stages, times, strict=True):
            total[name] += share * statistics.median(found)
        return total


def one_stage(page: Any, config: Any, arguments: Any, source: Any, order: Any, ranks: Any) -> Iterator[None]:
    """A training step at every `next`, views included, on one decoded batch."""
    model = Model(page, config, arguments, ranks)
    delivery = next(iter(loader(source, order, first_step=0, last_step=1, batch=config.batch,
                                accumulate=config.accumulate, rank=0, world=1, workers=0, pin=False)))  # fmt: skip
    batch = delivery.batch
    draws = Draws(config.seed, 0, batch["key"], batch["seen"], batch["place"])
    while True:
        model.step(iter([page.views(config, batch, draws)] * config.accumulate), 0.5)
        yield


def one_run(pack: str, recipe: str, seed: int, steps: int, flags: list[str], threads: int, out: Path) -> dict[str, Any]:
    """The scores on test and the curve, from a run that is finished now if it was not before."""
    answer = out / f"{recipe.replace(':', '-')}-{seed}.json"
    if not answer.exists():
        run = out / "runs" / answer.stem
        verb = [sys.executable, "-m", "saccade", "pretrain", f"{pack}/train", "--recipe", recipe, "--out", str(run)]
        length = ["--steps", str(steps), "--seed", str(seed), "--threads", str(threads), "--workers", "0"]
        done = subprocess.run([*verb, *length, "--eval", pack, "--json", *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:] + done.stdout[-500:])
        answer.write_text(done.stdout.strip().splitlines()[-1])
    return json.loads(answer.read_text())


def against(scores: dict[str, list[float]], best: str, other: str) -> str:
    """The mean difference over seeds with twice its paired standard error, in words."""
    apart = [a - b for a, b in zip(scores[best], scores[other], strict=True)]
    error = 2 * statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
    mean = statistics.mean(apart)
    word = "no difference" if abs(mean) <= error else "better" if mean > 0 else "worse"
    return f"{mean:+.1f} ± {error:.1f}: {word}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default="dino,ibot,dinov2,dinov3")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own", action="append", default=[], help="a recipe and flags that are its own alone")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, common = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]  # the rest is for all recipes alike
    torch.set_num_threads(asked.threads)
    recipes = [f"{name}:small_machine" for name in asked.recipes.split(",")]
    asked.out.mkdir(parents=True, exist_ok=True)
    plan = asked.out / "plan.json"
    if not plan.exists():
        own = {name: flags for name, *flags in (words.split() for words in asked.own)}
        flags = {name: [*common, *own.get(name.partition(":")[0], [])] for name in recipes}
        seconds = cost(asked.pack, {name: settings_of(flags[name]) for name in recipes}, asked.rounds)
        plan.write_text(json.dumps({"seconds": seconds, "minutes": asked.minutes, "flags": flags}))
    planned = json.loads(plan.read_text())
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}, {asked.threads} thread(s)")
    print(f"{asked.pack}: {planned['minutes']} minutes a run")
    for name in recipes:
        print(f"  {name} {' '.join(planned['flags'][name])}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for seed in range(asked.seeds):
        for name in recipes:
            steps = round(60 * planned["minutes"] / planned["seconds"][name])
            found[name].append(one_run(asked.pack, name, seed, steps, planned["flags"][name], asked.threads, asked.out))
            last = found[name][-1]
            print(
                f"  {name} seed {seed}: {steps} steps, k-NN {last['eval'][-1]['knn']:.1f}, {last['health']['verdict']}"
            )
    tell(found, planned)
    beside(asked.pack, asked.out / "runs" / f"{recipes[0].replace(':', '-')}-0")
    curves(found, planned["minutes"])


def tell(found: dict[str, list[dict[str, Any]]], planned: dict[str, Any]) -> None:
    """A row a recipe, and the first one by k-NN against the others."""
    print("| recipe | ms a step | steps | k-NN | linear |\n|---|---|---|---|---|")
    scores = {name: [run["eval"][-1]["knn"] for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        cells = []
        for task in ("knn", "linear"):
            values = [run["eval"][-1][task] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        ms = 1000 * planned["seconds"][name]
        print(f"| {name} | {ms:.0f} | {runs[0]['steps']} | {' | '.join(cells)} |")
    first = max(scores, key=lambda name: statistics.mean(scores[name]))
    for name in scores:
        if name != first:
            print(f"{first} against {name}, k-NN: {against(scores, first, name)}")


def beside(pack: str, run: Path) -> None:
    """What raw pixels and the same network untrained reach."""
    found = evaluate(str(run), pack, tasks=("knn", "linear"))["baselines"]
    for name in ("pixels", "untrained"):
        print(f"{name}: k-NN {found[name]['knn']:.1f}, linear {found[name]['linear']:.1f}")


def curves(found: dict[str, list[dict[str, Any]]], minutes: float) -> None:
    """k-NN on the held-out part of train while the runs learn, the mean over seeds."""
    first = next(iter(found.values()))[0]["eval"][:-1]
    times = [f"{minutes * row['step'] / first[-1]['step']:.1f}" for row in first]
    print(f"\n| k-NN held out of train, at minute | {' | '.join(times)} |\n|---|{'---|' * len(times)}")
    for name, runs in found.items():
        values = zip(*([row["knn"] for row in run["eval"][:-1]] for run in runs), strict=True)
        print(f"| {name} | {' | '.join(f'{statistics.mean(at):.1f}' for at in values)} |")


if __name__ == "__main__":
    main()

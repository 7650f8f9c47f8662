"""Classes of pixels: a linear layer, a decoder, LoRA, all weights and a start from scratch, beside raw colour.

    python benchmarks/segmentation.py CAMVID --out DIR --backbone NAME=PATH [--backbone …] [--image-size 112]
        [--arms linear,decoder,lora,full,scratch] [--seeds 1] [--train N] [--test N] [--epochs 30] [--threads 1]

CAMVID has train/ and test/ with images/ and masks/, and classes.txt. Each cell (backbone, arm, seed) is one run of
`saccade finetune`, whose score lies in DIR/cells; stopped, the same command goes on. The `linear` cell also learns what
must be beaten: colour and place of a pixel, and (in `decoder`) the same head on an untrained network. `--train` and
`--test` take so many pictures, evenly spread. Means over seeds, with two standard errors where there are several; the
seeds share pictures, and differ in the head's start, the pixels it learns from, and the views.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ARMS = {
    "linear": ["--head", "linear"],
    "decoder": ["--head", "decoder"],
    "lora": ["--head", "decoder", "--mode", "lora"],
    "full": ["--head", "decoder", "--mode", "full"],
    "scratch": ["--head", "decoder", "--mode", "full", "--from-scratch"],
}
MOVING = ("lora", "full", "scratch")


def chosen(data: Path, out: Path, counts: dict[str, int | None]) -> Path:
    """The data themselves, or a folder with so many pictures of each side."""
    if not any(counts.values()):
        return data
    place = out / ("data-" + "-".join(f"{part}{count or 'all'}" for part, count in counts.items()))
    if (place / "classes.txt").is_file():
        return place
    for part, count in counts.items():
        pictures = sorted((data / part / "images").iterdir())
        for picture in pictures[:: max(1, len(pictures) // (count or len(pictures)))][:count]:
            for inner, name in (("images", picture.name), ("masks", f"{picture.stem}.png")):
                (place / part / inner).mkdir(parents=True, exist_ok=True)
                shutil.copy(data / part / inner / name, place / part / inner / name)
    shutil.copy(data / "classes.txt", place)
    return place


def cell(data: Path, name: str, path: str, arm: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One run's scores and seconds, from its file where it is there already."""
    file = asked.out / "cells" / f"{name}-{arm}-{seed}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    run = asked.out / "runs" / file.stem
    words = [
        "finetune", path, str(data), "--task", "segmentation", "--out", str(run), "--seed", str(seed),
        "--image-size", str(asked.image_size), "--threads", str(asked.threads), *ARMS[arm],
    ]  # fmt: skip
    if arm in MOVING:
        epochs = asked.epochs * (2 if arm == "scratch" else 1)  # fresh weights have further to go
        words += ["--epochs", str(epochs), "--batch", str(asked.batch), "--no-baselines"]
    done = subprocess.run([sys.executable, "-m", "saccade", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:] + done.stdout[-500:])
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    found = {name: summary[name] for name in ("test", "seconds", "split", "chosen", "image_size")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{file.stem}: {found['test']['miou']:.2f} mIoU, {found['seconds']}", flush=True)
    return found


def spread(values: list[float]) -> str:
    """Their mean, and two standard errors where there are several."""
    if len(values) == 1:
        return f"{values[0]:5.1f}      "
    return f"{statistics.fmean(values):5.1f} ± {2 * statistics.stdev(values) / len(values) ** 0.5:3.1f}"


def tell(cells: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """A table of scores and seconds, and of the classes."""
    print(f"\n{'backbone':14} {'arm':10} {'mIoU':12} {'accuracy':12} seconds: features, head, tuning, all")
    for (name, arm), found in cells.items():
        miou, accuracy = ([one["test"][what] for one in found] for what in ("miou", "pixel_accuracy"))
        seconds = [
            statistics.fmean([one["seconds"].get(part) or 0.0 for one in found])
            for part in ("features", "head", "tuning", "total")
        ]
        told = " ".join(f"{second:8.1f}" for second in seconds)
        print(f"{name:14} {arm:10} {spread(miou):12} {spread(accuracy):12} {told}")
        for rival, scores in found[0]["test"]["baselines"].items():
            head = "" if rival == "pixels" else f", {arm}"
            print(f"{'':14} {rival}{head}: {scores['miou']:.1f} mIoU, {scores['pixel_accuracy']:.1f} % of pixels")
        gain = found[0]["test"].get("difference") or {}
        if gain:
            print(f"{'':14} to {gain['against']}: {gain['mean']:+.1f} ± {gain['two_standard_errors']:.1f} mIoU")
    for (name, arm), found in cells.items():
        each = found[0]["test"]["classes"]
        print(f"{name} {arm}: " + ", ".join(f"{part} {value:.0f}" for part, value in each.items() if value is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", action="append", required=True, help="NAME=PATH")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    data = chosen(asked.data, asked.out, {"train": asked.train, "test": asked.test})
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {asked.threads} threads; "
          f"torch {torch.__version__}; short side {asked.image_size}; {data}")  # fmt: skip
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for given in asked.backbone:
        name, _, path = given.partition("=")
        for arm in asked.arms.split(","):
            found = [cell(data, name, path, arm, seed, asked) for seed in range(asked.seeds)]
            cells[name, arm] = found
    tell(cells)


if __name__ == "__main__":
    main()

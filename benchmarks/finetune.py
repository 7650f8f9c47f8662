"""What a head and a moving backbone are worth on labelled pictures: frozen, LoRA, all weights, from scratch, pixels.

    python benchmarks/finetune.py OUT --backbone FILE --pack tomato=/data/tomato --pack malaria=/data/malp [--seeds 5]

A pack has train/CLASS and test/CLASS; `--pack NAME=PATH=PATTERN` groups by a pattern over keys. Each cell (pack, mode,
labels a class or all, seed) is one `saccade finetune`, examined once on test, and one JSON file in OUT: what is there
is not done again, and runs are removed when their cell is written. Features of one backbone and pack are computed once,
in OUT/features. The table has means over seeds with two standard errors, and the seconds that a head or tuning took.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade.run import environment

MODES = ("frozen", "lora", "full", "scratch")


def cell(arguments: argparse.Namespace, pack: str, mode: str, labels: int | None, seed: int) -> dict[str, Any]:
    """One run's scores, now or formerly."""
    name = f"{pack.partition('=')[0]}-{mode}-{labels or 'all'}-{seed}"
    kept = arguments.out / f"{name}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    _, path, *pattern = pack.split("=", 2)
    run = arguments.out / "runs" / name
    settings: dict[str, Any] = {"seed": seed, "labels": labels, "cache": str(arguments.out / "features")}
    settings |= {"group_by": pattern[0]} if pattern else {}
    if mode == "frozen":
        settings["views"] = arguments.views
    else:
        settings |= {"workers": 0} | ({"epochs": arguments.epochs} if arguments.epochs else {})
        settings |= {"lr": arguments.lr} if arguments.lr else {}
    if mode == "scratch":
        settings |= {"from_scratch": True} | ({"epochs": arguments.scratch_epochs} if arguments.scratch_epochs else {})
    summary = saccade.finetune(
        arguments.backbone, path, mode={"scratch": "full"}.get(mode, mode), out=run,
        image_size=arguments.image_size, **settings,
    ).summary  # fmt: skip
    test, spent = summary["test"], summary["seconds"]
    cell_ = {
        "pack": pack, "mode": mode, "labels": labels, "seed": seed,
        "accuracy": test["accuracy"], "macro_f1": test["macro_f1"], "ece": test["ece"]["after"],
        "pixels": test["baselines"]["pixels"]["accuracy"], "majority": test["baselines"]["majority"]["accuracy"],
        "seconds": spent["head"] if mode == "frozen" else spent["tuning"], "spent": spent,
        "learned_from": summary["split"]["train"] + summary["split"]["held"],
        "best": summary["chosen"].get("best"), "warnings": summary["warnings"],
    }  # fmt: skip
    kept.write_text(json.dumps(cell_, indent=1) + "\n")
    shutil.rmtree(run)
    return cell_


def said(values: list[float]) -> str:
    """The mean, and two standard errors of it."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {2 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(cells: list[dict[str, Any]], labels: int | None) -> None:
    """Modes by packs, percent right on test."""
    rows = [one for one in cells if one["labels"] == labels]
    packs = list(dict.fromkeys(one["pack"].partition("=")[0] for one in rows))
    modes = [mode for mode in MODES if any(one["mode"] == mode for one in rows)]
    print(f"\n{'all labels' if labels is None else f'{labels} labels a class'}\n")
    print(f"| percent right | {' | '.join(f'{pack} | macro F1 | seconds' for pack in packs)} |")
    print(f"|---|{'---|---|---|' * len(packs)}")
    for mode in modes:
        line = []
        for pack in packs:
            of = [one for one in rows if one["pack"].partition("=")[0] == pack and one["mode"] == mode]
            line += ["", "", ""] if not of else [
                said([one["accuracy"] for one in of]), said([one["macro_f1"] for one in of]),
                f"{statistics.fmean([one['seconds'] for one in of]):.0f}",
            ]  # fmt: skip
        print(f"| {mode} | {' | '.join(line)} |")
    for who in ("pixels", "majority"):
        line = []
        for pack in packs:
            of = {one["seed"]: one[who] for one in rows if one["pack"].partition("=")[0] == pack}
            line += [said(list(of.values())), "", ""]
        print(f"| {who} | {' | '.join(line)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--pack", action="append", required=True, help="NAME=PATH or NAME=PATH=PATTERN")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--labels", default="10,all", help="labels a class, or all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--views", type=int, default=0, help="augmented copies in frozen mode")
    parser.add_argument("--epochs", type=float, help="of lora and full; the default if not given")
    parser.add_argument("--scratch-epochs", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    counts = [None if one == "all" else int(one) for one in arguments.labels.split(",")]
    cells = []
    for labels in counts:
        for pack in arguments.pack:
            for mode in arguments.modes.split(","):
                for seed in range(arguments.seeds if mode != "frozen" or labels else 1):
                    cells.append(cell(arguments, pack, mode, labels, seed))
    machine = environment()
    print(f"{arguments.backbone} at {arguments.image_size} px; {machine['platform']}, {machine['cores']} cores, "
          f"{arguments.threads} thread(s), GPU {machine['gpu']}, Python {machine['python']}, "
          f"torch {torch.__version__}, saccade {saccade.__version__}")  # fmt: skip
    for labels in counts:
        table(cells, labels)


if __name__ == "__main__":
    main()

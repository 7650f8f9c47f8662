"""Does the forecast of the label curve hold the truth? From 50 labels at most to 200, on real packs and backbones.

    python benchmarks/label_curve.py OUT --pack tomato=/data/tomato --pack 'malaria=/data/malp@(C\\d+)'
        --backbone dinov2=dinov2s.pt@98 --backbone resnet=model.pth@64 [--seeds 0,1,2,3] [--train 3000] [--test 1000]
    python benchmarks/label_curve.py --table OUT [--drift 0.03,0.06,0.12]

Two questions, since 200 labels may be meant either way. `total`: 50 labels in all (5 each of 10 classes), forecast for
200 in all. `class`: 50 labels a class, forecast for 200 a class, where a pack has as many. The forecast sees the labels
of these 50 alone; means and spreads of features need no label and are those of all train pictures. The truth is `mean`,
what 200 labels score on average over draws, and `same`, what exactly these labels and 150 more score; the interval is
meant for both. Features are computed once (OUT/features), a cell is one JSON file in OUT, and what is there is not done
again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from label_next import Pack, asked_for, machine, packs

from saccade.evaluate import few_label, label_curve
from saccade.evaluate.label_curve import Point
from saccade.evaluate.splits import few

SEEN, WANTED, DRAWS = 50, 200, 8


def cell(pack: Pack, question: str, seed: int) -> dict[str, Any] | None:
    """The curve up to 50 labels as its points, and what 200 of them score; None where the pack has too few."""
    classes = len(pack.classes)
    seen, wanted = (SEEN, WANTED) if question == "class" else (SEEN // classes, WANTED // classes)
    vectors, labels = pack.vectors[pack.train], pack.labels[pack.train]
    test, answers = pack.vectors[~pack.train], pack.labels[~pack.train]
    if np.bincount(labels).min() < 1.15 * wanted:
        return None
    keys = [str(row) for row in range(len(labels))]

    def right(rows: np.ndarray) -> float:
        found = few_label.predict(vectors, torch.from_numpy(labels), test, classes, rows)
        return 100 * float((found.numpy() == answers).mean())

    mine = few(labels, keys, wanted, 1000 + seed, 0)  # of each class its first `seen` are the labels that there are
    parts = [mine[labels[mine] == number] for number in range(classes)]
    there = np.concatenate([part[:seen] for part in parts])
    measured = label_curve.measure(vectors, torch.from_numpy(labels), test, answers, keys, seen, seed, there)
    truths = [right(few(labels, keys, wanted, 2000 + seed, draw)) for draw in range(DRAWS)]
    return {
        "points": [[point.labels, point.mean, point.error] for point in measured],
        "wanted": wanted,
        "chance": 100 / classes,
        "mean": float(np.mean(truths)),
        "error": float(np.std(truths, ddof=1) / math.sqrt(DRAWS)),
        "same": right(mine),
    }


def study(asked: argparse.Namespace) -> None:
    """Every cell that is not there yet."""
    out = Path(asked.out)
    for pack in packs(asked):
        for question in ("total", "class"):
            for seed in [int(seed) for seed in asked.seeds.split(",")]:
                target = out / f"curve-{pack.name}-{question}-{seed}.json"
                if target.exists() or (found := cell(pack, question, seed)) is None:
                    continue
                target.with_suffix(".new").write_text(json.dumps({"pack": pack.name, "question": question, **found}))
                target.with_suffix(".new").rename(target)
                print(target.name, file=sys.stderr, flush=True)


def table(out: Path, drifts: list[float]) -> None:
    """Coverage and width for each question and pack."""
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("curve-*.json"))]
    print(machine())
    for drift in drifts:
        print(f"\ndrift {drift}: how many intervals hold the truth, and how wide they are (points of percent)")
        print(f"{'':28}{'n':>4}{'mean':>7}{'same':>7}{'width':>8}{'gain':>8}{'bias':>8}{'|error|':>9}")
        for question in ("total", "class"):
            some = [one for one in cells if one["question"] == question]
            for name in [*dict.fromkeys(one["pack"] for one in some), "all"]:
                mine = [one for one in some if name in ("all", one["pack"])]
                if mine:
                    print(f"{question + ' ' + name:28}{_line(mine, drift)}")


def _line(cells: list[dict[str, Any]], drift: float) -> str:
    told = [
        label_curve.forecast([Point(*p) for p in one["points"]], one["chance"], [one["wanted"]], drift)[0]
        for one in cells
    ]
    held = {truth: np.mean([t["low"] <= one[truth] <= t["high"] for t, one in zip(told, cells, strict=True)])
            for truth in ("mean", "same")}  # fmt: skip
    width = np.mean([t["high"] - t["low"] for t in told])
    gain = np.mean([one["mean"] - one["points"][-1][1] for one in cells])
    off = np.array([t["mean"] - one["mean"] for t, one in zip(told, cells, strict=True)])
    return (f"{len(cells):4}{held['mean']:7.2f}{held['same']:7.2f}{width:8.1f}{gain:8.1f}"
            f"{off.mean():+8.1f}{np.abs(off).mean():9.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked_for(parser)
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("--drift", default=str(label_curve.DRIFT))
    asked = parser.parse_args()
    if not asked.table:
        study(asked)
    table(Path(asked.out), [float(drift) for drift in asked.drift.split(",")])


if __name__ == "__main__":
    main()

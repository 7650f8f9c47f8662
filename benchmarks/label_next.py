"""What choosing labels saves over drawing them at random: real packs, real backbones, equal and unequal classes.

    python benchmarks/label_next.py OUT --pack tomato=/data/tomato --pack 'malaria=/data/malp@(C\\d+)'
        --backbone dinov2=dinov2s.pt@98 --backbone resnet=model.pth@64 [--seeds 0,…,9] [--train 3000] [--test 1000]
    python benchmarks/label_next.py --table OUT

A pack is a folder with train/CLASS and test/CLASS, and behind @ the pattern of its groups; a backbone is a file, and
behind @ the image size. Features are computed once (OUT/features). Every seed draws its own pool from the train side:
four fifths of each class at 1:1; at 50:1 the classes in an order of the seed's, from all of the first to a fiftieth of
it in the last, evenly on a logarithm (two classes: one has all, the other a fiftieth). Labels are asked for in rounds
of 50; a linear head as `evaluate`'s few-label task has it learns from each round and is examined on the test side, by
mean recall over classes. Random is the mean of five draws from the same pool. A cell is one JSON file in OUT.
`--inside` examines on a third of the train side instead, by group: for choosing among methods.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saccade.draws import hash64
from saccade.embed import encoder_of, examining, pooled, read_pictures
from saccade.evaluate import few_label
from saccade.evaluate.labelled import read_labelled
from saccade.label_next import Known, propose

ROUNDS, BATCH, RANDOM = 4, 50, 5
RATIOS = {"1:1": 1.0, "50:1": 50.0}


@dataclass(frozen=True)
class Pack:
    """Labelled pictures as vectors; `train` says which rows may be learned from."""

    name: str
    classes: list[str]
    vectors: torch.Tensor
    labels: np.ndarray
    groups: np.ndarray
    grouped: bool
    train: np.ndarray


def machine() -> str:
    """Where figures come from."""
    where = platform.processor() or platform.machine()
    return f"{where}, torch {metadata.version('torch')}, {torch.get_num_threads()} thread(s)"


def asked_for(parser: argparse.ArgumentParser) -> None:
    """What both studies of labels are asked."""
    parser.add_argument("out")
    parser.add_argument("--pack", action="append", default=[])
    parser.add_argument("--backbone", action="append", default=[])
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--table", action="store_true")


def packs(asked: argparse.Namespace) -> Iterator[Pack]:
    """Every pack through every backbone, from the disk where it has been there before."""
    for named in asked.pack:
        name, _, rest = named.partition("=")
        folder, _, groups = rest.partition("@")
        for backbone in asked.backbone:
            short, _, place = backbone.partition("=")
            path, _, size = place.rpartition("@")
            target = Path(asked.out) / "features" / f"{name}-{short}.npz"
            if not target.exists():
                features(folder, groups or None, path, int(size), {"train": asked.train, "test": asked.test}, target)
            kept = np.load(target)
            vectors = torch.from_numpy(kept["mean"]).float()
            yield Pack(f"{name}-{short}", kept["classes"].tolist(), vectors, kept["labels"], kept["groups"],
                       bool(groups), kept["train"])  # fmt: skip


def features(folder: str, groups: str | None, backbone: str, size: int, most: dict[str, int], target: Path) -> None:
    """The mean of the patches of so many pictures of each side, by hash."""
    encoder = encoder_of(backbone, image_size=size, channels=None, patch=None)
    data = read_labelled(folder, groups, encoder.preprocess.canvas, encoder.preprocess.channels)
    sides = [sorted(side.tolist(), key=lambda row: hash64(f"labels {data.keys[row]}"))[: most[part]]
             for part, side in (("train", data.train), ("test", data.test))]  # fmt: skip
    found, good = [], []
    with examining(encoder) as look:
        for read in read_pictures(data.source, [encoder.preprocess], rows=sides[0] + sides[1], batch=64):
            if read.rows:
                found.append(pooled(look(read.views[0], tokens="patches"), "mean").float().cpu().numpy())
                good += read.rows
    rows, learned = np.array(good), set(sides[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, mean=np.concatenate(found), labels=data.labels[rows], groups=np.array(data.names(rows)),
             classes=np.array(data.classes), train=np.array([row in learned for row in good]))  # fmt: skip


def drawn(pack: Pack, ratio: float, seed: int, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pool, and rows to examine on."""
    random = np.random.default_rng(seed)
    examined, side = np.flatnonzero(~pack.train), np.flatnonzero(pack.train)
    if inside:
        names = np.unique(pack.groups[side])
        apart = set(random.permutation(names)[: len(names) // 3].tolist())
        held = np.array([name in apart for name in pack.groups[side]])
        examined, side = side[held], side[~held]
    classes = len(pack.classes)
    members = [random.permutation(side[pack.labels[side] == number]) for number in range(classes)]
    most = math.floor(0.8 * min(map(len, members)))
    pool = []
    for place, number in enumerate(random.permutation(classes)):
        count = max(2, round(most * ratio ** (-place / (classes - 1))))
        pool.append(members[number][:count])
    return np.sort(np.concatenate(pool)), examined


def recall(pack: Pack, pool: np.ndarray, chosen: list[int], examined: np.ndarray) -> float:
    """Mean recall over classes in percent, learned from the chosen rows of the pool."""
    labels = torch.from_numpy(pack.labels[pool])
    rows = np.array(chosen)
    guess = few_label.predict(pack.vectors[pool], labels, pack.vectors[examined], len(pack.classes), rows).numpy()
    answers = pack.labels[examined]
    return 100 * float(np.mean([(guess[answers == number] == number).mean() for number in np.unique(answers)]))


def cell(pack: Pack, ratio: float, seed: int, inside: bool) -> dict[str, Any]:
    """Scores after each round, of what is proposed and of random draws; and how many classes had been found."""
    pool, examined = drawn(pack, ratio, seed, inside)
    vectors, labels = pack.vectors[pool], pack.labels[pool]
    groups = pack.groups[pool].tolist() if pack.grouped else None
    chosen: list[int] = []
    ours, found = [], []
    for _ in range(ROUNDS):
        known = Known(chosen, [pack.classes[labels[row]] for row in chosen])
        chosen += propose(vectors, known, BATCH, groups=groups, seed=seed).rows
        ours.append(recall(pack, pool, chosen, examined))
        found.append(len(np.unique(labels[chosen])))
    theirs, seen = [], []
    for draw in range(RANDOM):
        order = np.random.default_rng([seed, draw]).permutation(len(pool)).tolist()
        theirs.append([recall(pack, pool, order[: BATCH * (r + 1)], examined) for r in range(ROUNDS)])
        seen.append([len(np.unique(labels[order[: BATCH * (r + 1)]])) for r in range(ROUNDS)])
    return {"pool": len(pool), "ours": ours, "random": np.mean(theirs, axis=0).tolist(), "classes": found,
            "classes_random": np.mean(seen, axis=0).tolist()}  # fmt: skip


def study(asked: argparse.Namespace) -> None:
    """Every cell that is not there yet."""
    out = Path(asked.out)
    for pack in packs(asked):
        for words, ratio in RATIOS.items():
            for seed in [int(seed) for seed in asked.seeds.split(",")]:
                side = "inside" if asked.inside else "test"
                target = out / f"next-{pack.name}-{words.replace(':', 'to')}-{side}-{seed}.json"
                if not target.exists():
                    found = {"pack": pack.name, "ratio": words, "side": side, **cell(pack, ratio, seed, asked.inside)}
                    target.with_suffix(".new").write_text(json.dumps(found))
                    target.with_suffix(".new").rename(target)
                    print(target.name, file=sys.stderr, flush=True)


def table(out: Path) -> None:
    """Mean recall, the paired gain over random with two standard errors, and the verdict."""
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("next-*.json"))]
    print(machine())
    columns = f"{'ratio':>6}{'pool':>6}{'seeds':>6}{'labels':>7}{'random':>8}{'chosen':>8}{'gain':>14}"
    print(f"{'mean recall, percent':26}{columns}  {'verdict':10}{'classes found':>14}")
    for side in ("test", "inside"):
        for key in dict.fromkeys((one["pack"], one["ratio"]) for one in cells if one["side"] == side):
            mine = [one for one in cells if (one["pack"], one["ratio"], one["side"]) == (*key, side)]
            for number in (0, ROUNDS - 1):
                gains = np.array([one["ours"][number] - one["random"][number] for one in mine])
                bound = 2 * gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
                verdict = "better" if gains.mean() > bound else "worse" if gains.mean() < -bound else "equal"
                told = [np.mean([one[what][number] for one in mine]) for what in ("random", "ours")]
                seen = [np.mean([one[what][number] for one in mine]) for what in ("classes", "classes_random")]
                pool = round(np.mean([one["pool"] for one in mine]))
                print(f"{key[0] + (' inside' if side == 'inside' else ''):26}{key[1]:>6}{pool:6}{len(mine):6}"
                      f"{BATCH * (number + 1):7}{told[0]:8.1f}{told[1]:8.1f}{gains.mean():+8.1f} ± {bound:3.1f}"
                      f"  {verdict:10}{seen[0]:6.1f} /{seen[1]:5.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked_for(parser)
    parser.add_argument("--seeds", default=",".join(map(str, range(10))))
    parser.add_argument("--inside", action="store_true")
    asked = parser.parse_args()
    if not asked.table:
        study(asked)
    table(Path(asked.out))


if __name__ == "__main__":
    main()

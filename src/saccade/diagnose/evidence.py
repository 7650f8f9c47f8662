"""What culprits are told apart by: features, small copies of pixels and labels of both sides, and what the head said.

Everything is an array, so that a planted cause can be tried in seconds. Rows of one name (a patient, a scene, or the
picture's own key) never stand on both sides of a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from saccade.draws import hash64
from saccade.evaluate import linear
from saccade.evaluate.labelled import SHARE
from saccade.evaluate.splits import set_apart

FOLDS = 5
NEIGHBOURS = 10


@dataclass(frozen=True)
class Side:
    """Pictures that were learned from, or those that were examined, row by row.

    `features`: what the head reads; `start`: those of the backbone before it was tuned, the same where it was frozen;
    `untrained`: of the same network with fresh weights, where there is one; `pixels`: small copies; `names`: the group
    of each, or its key; `guesses`: the class that the head gives it;
    `keys`: what each is called, where that is known.
    """

    features: Float[Tensor, "n d"]
    start: Float[Tensor, "n e"]
    untrained: Float[Tensor, "n f"] | None
    pixels: Shaped[Tensor, "n c s s"]
    labels: np.ndarray
    names: Sequence[str]
    guesses: np.ndarray
    keys: Sequence[str] = ()

    def chosen(self, rows: np.ndarray) -> Side:
        """Some of the rows."""
        which = torch.from_numpy(rows)
        return Side(
            self.features[which],
            self.start[which],
            None if self.untrained is None else self.untrained[which],
            self.pixels[which],
            self.labels[rows],
            [self.names[row] for row in rows.tolist()],
            self.guesses[rows],
            [self.keys[row] for row in rows.tolist()] if self.keys else (),
        )

    @property
    def right(self) -> np.ndarray:
        """Which of them the head names as their labels do, Bool[n]."""
        return self.guesses == self.labels


@dataclass(frozen=True)
class Finding:
    """What one test says of one culprit.

    `strength` is the measure's value in its own unit, `interval` what the truth lies in with 95 % confidence, and
    `threshold` the value from which the culprit is named. `rows` are pictures of `side` that show it, the clearest
    first, each beside those of `beside` (rows of train).
    """

    culprit: str
    found: bool
    measure: str
    strength: float | None
    interval: tuple[float, float] | None
    threshold: float
    reason: str
    side: str = "test"
    rows: tuple[int, ...] = ()
    beside: tuple[tuple[int, ...], ...] = ()
    more: dict[str, Any] | None = None


def flat(pixels: Shaped[Tensor, "n c s s"], side: int = 16) -> Float[Tensor, "n d"]:
    """Small pictures as rows of numbers in [0, 1], for a probe: so many pixels a side suffice to be a rival."""
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    return F.adaptive_avg_pool2d(values, min(side, values.shape[-1])).flatten(1)


def folds(names: Sequence[str], count: int = FOLDS) -> np.ndarray:
    """Int[n]: the fold of each row, whole names at a time, about as many rows in each; every fold has some."""
    sizes: dict[str, int] = {}
    for name in names:
        sizes[name] = sizes.get(name, 0) + 1
    load, place = [0] * count, dict[str, int]()
    for name in sorted(sizes, key=lambda name: (-sizes[name], hash64(f"fold\0{name}"))):
        place[name] = min(range(count), key=lambda fold: load[fold])
        load[place[name]] += sizes[name]
    return np.array([place[name] for name in names])


def out_of_fold(
    features: Float[Tensor, "n d"], labels: np.ndarray, names: Sequence[str], classes: int
) -> Float[Tensor, "n c"]:
    """Probabilities of each row by a linear probe of rows of other names; its penalty is chosen once."""
    targets = torch.from_numpy(labels)
    penalty, _ = linear.choose_penalty(features, targets, classes, set_apart(names, SHARE, "hold-out"))
    fold = folds(names)
    found = torch.empty(len(features), classes)
    for number in np.unique(fold):
        apart = torch.from_numpy(fold == number)
        standard = linear.Standard.of(features[~apart])
        fitted = linear.fit(standard(features[~apart]), targets[~apart], classes, penalty)
        found[apart] = torch.softmax(standard(features[apart]) @ fitted.weight + fitted.bias, dim=1)
    return found


def nearest(
    rows: Float[Tensor, "m d"],
    among: Float[Tensor, "n d"],
    count: int,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and places of the `count` nearest of `among` for each row; with `names` (of both) never of its own."""
    ours, theirs = (F.normalize(part.float(), dim=1) for part in (rows, among))
    numbers = {name: place for place, name in enumerate(dict.fromkeys(names[1]))} if names else {}
    owner = torch.tensor([numbers[name] for name in names[1]]) if names else None
    mine = torch.tensor([numbers.get(name, -1) for name in names[0]]) if names else None
    cosines, places = [], []
    for start in range(0, len(ours), 2048):
        likeness = ours[start : start + 2048] @ theirs.T
        if owner is not None and mine is not None:
            likeness = likeness.masked_fill(mine[start : start + 2048, None] == owner, -torch.inf)
        best = likeness.topk(min(count, len(theirs)), dim=1)
        cosines.append(best.values)
        places.append(best.indices)
    return torch.cat(cosines), torch.cat(places)


def votes(places: Tensor, cosines: Tensor, labels: np.ndarray, classes: int) -> Float[Tensor, "m c"]:
    """What part of its neighbours has each class."""
    valid = torch.isfinite(cosines).float()
    ballot = torch.zeros(len(places), classes).scatter_add_(1, torch.from_numpy(labels)[places], valid)
    return ballot / valid.sum(1, keepdim=True).clamp_min(1)

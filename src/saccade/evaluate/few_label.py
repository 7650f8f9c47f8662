"""A linear classifier from 1, 5, 10, 100 labels a class, drawn several times, the same draws for every contestant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.evaluate.linear import Standard, fit
from saccade.evaluate.splits import few

COUNTS = (1, 5, 10, 100)
_STRENGTH = 0.03  # flat from 0.003 to 0.1 on train sets of leaves, for pixels and for features


@dataclass(frozen=True)
class Plan:
    """The rows of train that each draw learns from; `skipped` says why a count was not tried."""

    draws: dict[int, list[np.ndarray]]
    skipped: dict[int, str]
    short: dict[int, str]


def plan(
    labels: np.ndarray,
    keys: Sequence[str],
    classes: Sequence[str],
    test_size: int,
    seed: int,
    counts: Sequence[int] = COUNTS,
) -> Plan:
    """5 draws of each count, 20 where test has fewer than 1,000 samples. Classes with too few give all they have."""
    times = 20 if test_size < 1000 else 5
    sizes = {name: int((labels == number).sum()) for number, name in enumerate(classes)}
    largest, smallest = max(sizes.values()), min(sizes, key=lambda name: sizes[name])
    draws, skipped, short = {}, {}, {}
    for count in sorted(set(counts)):
        if largest < count:
            skipped[count] = f"no class has {count} training samples; the largest has {largest}"
            continue
        if sizes[smallest] < count:
            short[count] = f"{smallest!r} has only {sizes[smallest]} training samples: all of them are used"
        draws[count] = [few(labels, keys, count, seed, draw) for draw in range(times)]
    return Plan(draws, skipped, short)


def predict(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    classes: int,
    chosen: np.ndarray,
) -> Int[Tensor, " m"]:
    """The classes of the test rows, learned from the chosen train rows alone.

    Means and spreads are those of all train rows: they need no label. The penalty is fixed beforehand, because one
    label a class leaves nothing to choose it on: 0.03 of the features' squared length (their number) over the number of
    labels.
    """
    standard = Standard.of(train)
    rows = torch.from_numpy(chosen).to(train.device)
    penalty = _STRENGTH * train.shape[1] / len(chosen)
    classifier = fit(standard(train[rows]), labels[rows], classes, penalty)
    return classifier.predict(standard(test))

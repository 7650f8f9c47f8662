"""How many labels? The score over labels a class, and with an interval what the next labels would bring.

The error follows an inverse power law, c + a n^-b (arXiv 1712.00409, 2207.01725): every exponent and every floor on a
grid, each as likely as the measured points make it, and one law is never picked. What is measured at few labels is
often not on the law that holds later (arXiv 2303.01598), so the truth may drift away from the law, the farther from the
largest count the more: a random walk over doublings of labels. So the last points count most, and the interval grows.
How fast it drifts is one number, and `benchmarks/label_curve.py` asks whether nine intervals in ten hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.evaluate import few_label
from saccade.evaluate.splits import few

SURE = 0.9
"""How often the interval should hold the truth."""
LEAST = 4
"""Counts that a forecast needs."""
_STEPS = (1, 2, 5)  # times powers of ten: what is measured
_ROWS = 20_000  # labels that a probe learns from at most: seconds, not minutes
_DRAWS = 8
_EXPONENTS = np.geomspace(0.05, 1.5, 24)
_FLOORS = np.linspace(-1.0, 0.95, 27)  # parts of the last error that stay; below zero the law bends as a logarithm
DRIFT = 0.06  # of the last error, for each doubling


@dataclass(frozen=True)
class Point:
    """What a number of labels a class scores in percent, and how uncertain that is (a standard error)."""

    labels: float
    mean: float
    error: float


def counts(largest: int) -> list[int]:
    """The counts that are measured: 1, 2, 5, 10, … to the largest; all that there are where these would be few."""
    found = [step * 10**power for power in range(7) for step in _STEPS if step * 10**power < largest]
    if len(found) + 1 < LEAST + 1:
        found = list(range(1, largest))
    return [*found, largest]


def measure(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    answers: np.ndarray,
    keys: Sequence[str],
    largest: int,
    seed: int,
) -> list[Point]:
    """The curve of a linear classifier on frozen features, by draws that lie within each other.

    Draws of the largest count have the same few samples to choose from, so their spread says too little: what holds
    at smaller counts, falling as one over the root, says how lucky the labels were that there are.
    """
    known, classes = labels.cpu().numpy(), int(labels.max()) + 1
    found: list[tuple[int, np.ndarray]] = []
    for count in counts(largest):
        times = _DRAWS if count * classes <= _ROWS // _DRAWS else 3
        drawn = [few(known, keys, count, seed, draw) for draw in range(times if count < largest else 1)]
        right = [few_label.predict(train, labels, test, classes, rows).cpu().numpy() == answers for rows in drawn]
        found.append((count, np.array([100 * float(draw.mean()) for draw in right])))
    return points(found)


def points(found: Sequence[tuple[int, np.ndarray]]) -> list[Point]:
    """Scores of draws by count as points with errors."""
    spreads = [(n, draws.var(ddof=1)) for n, draws in found if len(draws) > 1]
    unit = float(np.mean([variance * n for n, variance in spreads])) if spreads else 0.0
    told = []
    for n, draws in found:
        share = max(1 / len(draws), n / found[-1][0])  # what the draws have in common does not average out
        told.append(Point(n, float(draws.mean()), math.sqrt(unit / n * share) + 1e-3))
    return told


def forecast(measured: Sequence[Point], ahead: Sequence[float], drift: float = DRIFT) -> list[dict[str, float]]:
    """Mean and interval (`SURE`) of the score at each count ahead. At least `LEAST` points, errors in percent."""
    labels = np.array([point.labels for point in measured], dtype=np.float64)
    errors = 100 - np.array([point.mean for point in measured])
    last = max(float(errors[-1]), 0.5)
    scale = drift * last
    spread = _walk(labels, labels, labels[-1]) * scale**2 + np.diag([point.error**2 for point in measured])
    inverse = np.linalg.inv(spread)
    exponents, floors = (grid.ravel() for grid in np.meshgrid(_EXPONENTS, _FLOORS))
    # each law is errors = floor + a * shape, with shape 1 at the last count; a is normal, given the points
    shape = (labels[:, None] / labels[-1]) ** -exponents  # [P G]
    rest = errors[:, None] - last * floors
    prior = 1 / (0.3 * last + 0.5) ** 2  # a is near what the last error leaves above the floor
    precision = np.einsum("pg,pq,qg->g", shape, inverse, shape) + prior
    expected = last * (1 - floors)
    a = (np.einsum("pg,pq,qg->g", shape, inverse, rest) + prior * expected) / precision
    misfit = np.einsum("pg,pq,qg->g", rest, inverse, rest) + prior * expected**2 - precision * a**2
    belief = -0.5 * misfit - 0.5 * np.log(precision)
    belief = np.exp(belief - belief.max())
    belief /= belief.sum()
    gap = rest - a * shape
    told = []
    for n in ahead:
        at = (n / labels[-1]) ** -exponents
        # points that lie off a law say nothing of the other side of the last one: the walk is anchored there
        middle = last * floors + a * at
        width = np.sqrt(at**2 / precision + scale**2 * abs(math.log2(n / labels[-1])))
        told.append(_interval(100 - middle, width, belief))
    assert np.isfinite(gap).all()
    return told


def _walk(one: np.ndarray, other: np.ndarray, anchor: float) -> np.ndarray:
    """Covariance of a random walk in doublings away from the anchor, of points that lie on one side of it."""
    return np.minimum(*np.meshgrid(np.log2(anchor / one), np.log2(anchor / other), indexing="ij"))


def _interval(middle: np.ndarray, width: np.ndarray, belief: np.ndarray) -> dict[str, float]:
    """Mean and quantiles of a mixture of normal beliefs, within 0 and 100."""
    ends = []
    for part in ((1 - SURE) / 2, (1 + SURE) / 2):
        low, high = float((middle - 6 * width).min()), float((middle + 6 * width).max())
        for _ in range(60):
            guess = (low + high) / 2
            below = float(belief @ torch.special.ndtr(torch.from_numpy((guess - middle) / width)).numpy())
            low, high = (guess, high) if below < part else (low, guess)
        ends.append(float(np.clip(low, 0, 100)))
    return {"mean": min(max(float(belief @ middle), ends[0]), ends[1]), "low": ends[0], "high": ends[1]}

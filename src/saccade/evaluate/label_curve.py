"""How many labels? The score over labels a class, and with an interval what the next labels would bring.

The error is held to be c + a (n + m)^-b: an inverse power law (arXiv 1712.00409, 2207.01725) that begins late, since
few-label curves are no straight line on logarithms yet (arXiv 2303.01598), and passes chance at no label. Every
exponent b, floor c and delay m of a grid is believed as far as the measured points make it likely; none is picked. And
the truth may leave any law, the farther from the largest count the more: a random walk over doublings of labels. So the
last points count most, and the interval grows ahead. `benchmarks/label_curve.py` asks whether it holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.evaluate.few_label import predict
from saccade.evaluate.splits import few

SURE = 0.9
"""How often the interval should hold the truth."""
_LEAST = 4  # counts that a forecast needs
_STEPS = (1, 2, 5)  # times powers of ten: what is measured
_ROWS = 20_000  # labels that a probe learns from at most: seconds, not minutes
_DRAWS = 8
_EXPONENTS = np.geomspace(0.1, 2.0, 16)
_USUAL = (0.5, 0.7)  # exponents before any point is seen: the middle, and the spread of its logarithm
_FLOORS = np.linspace(0.0, 1.0, 14)  # parts of the last error that stay
_DELAYS = 2.0 ** np.arange(-2, 6)
DRIFT = 0.02
"""How far the truth leaves a law over one doubling of labels, as a part of the last error."""
_LUCK = 2.0  # times the variance among draws: from the same few labels they differ less than from others
_CHANCE = 3.0  # points of percent: how near to chance a law is without a label


@dataclass(frozen=True)
class Point:
    """What a number of labels a class scores in percent, and how uncertain that is (a standard error)."""

    labels: float
    mean: float
    error: float


def counts(largest: int) -> list[int]:
    """The counts that are measured: 1, 2, 5, 10, … to the largest; all that there are where these would be few."""
    found = [step * 10**power for power in range(7) for step in _STEPS if step * 10**power < largest]
    if len(found) < _LEAST:
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
    labelled: np.ndarray | None = None,
) -> list[Point]:
    """The curve of a linear classifier on frozen features, by draws that lie within each other.

    `labelled` are the rows of train that labels are drawn from, all if not given; means and spreads are those of all.

    Draws of the largest count have the same few samples to choose from, so their spread says too little: what holds
    at smaller counts, falling as one over the root, says how lucky the labels were that there are.
    """
    rows = np.arange(len(train)) if labelled is None else labelled
    known, named, classes = labels.cpu().numpy()[rows], [keys[row] for row in rows.tolist()], int(labels.max()) + 1
    found: list[tuple[int, np.ndarray]] = []
    for count in counts(largest):
        times = _DRAWS if count * classes <= 500 else 3
        drawn = [rows[few(known, named, count, seed, draw)] for draw in range(times if count < largest else 1)]
        right = [predict(train, labels, test, classes, some).cpu().numpy() == answers for some in drawn]
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


def forecast(
    measured: Sequence[Point], chance: float, ahead: Sequence[float], drift: float = DRIFT
) -> list[dict[str, float]]:
    """Mean and interval (`SURE`) of the score in percent at each count ahead, from the points in their order.

    `chance` is the score of guessing, which is what no label brings.
    """
    labels = np.array([0.0, *(point.labels for point in measured)])
    errors = 100 - np.array([chance, *(point.mean for point in measured)])
    last, top = max(float(errors[-1]), 0.5), labels[-1]
    away = np.log2(top / labels[1:])
    away = np.array([away[0] + 2, *away])  # in doublings; no label is two before the first
    walk = (drift * last) ** 2 * np.minimum.outer(away, away)
    noise = np.array([_CHANCE**2, *(_LUCK * point.error**2 for point in measured)])
    precise = np.linalg.inv(walk + np.diag(noise))
    exponents, floors, delays = (grid.ravel() for grid in np.meshgrid(_EXPONENTS, _FLOORS, _DELAYS))
    # one law a column: errors = floor + height * shape, with shape 1 at the last count; its height is normal
    shape = ((labels[:, None] + delays) / (top + delays)) ** -exponents
    rest = errors[:, None] - last * floors
    guess, trust = last * (1 - floors), (0.3 * last + 0.5) ** -2
    precision = np.einsum("pg,pq,qg->g", shape, precise, shape) + trust
    height = (np.einsum("pg,pq,qg->g", shape, precise, rest) + trust * guess) / precision
    misfit = np.einsum("pg,pq,qg->g", rest, precise, rest) + trust * guess**2 - precision * height**2
    belief = -0.5 * (misfit + np.log(precision) + (np.log(exponents / _USUAL[0]) / _USUAL[1]) ** 2)
    belief = np.exp(belief - belief.max())
    told = []
    for count in ahead:
        at = ((count + delays) / (top + delays)) ** -exponents
        width = np.sqrt(at**2 / precision + (drift * last) ** 2 * math.log2(count / top))
        told.append(_interval(100 - last * floors - height * at, width, belief / belief.sum()))
    return told


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


def largest(labels: np.ndarray) -> int:
    """How many labels a class are measured at most: of the rarest class, or of the middle one where it has hardly any.

    Classes with fewer give all they have. No more than a probe learns from in seconds.
    """
    sizes = np.bincount(labels)
    sizes = sizes[sizes > 0]
    most = int(sizes.min()) if sizes.min() >= _LEAST else int(np.median(sizes))
    return max(1, min(most, _ROWS // len(sizes)))


def curve(measured: Sequence[Point], chance: float) -> dict[str, Any]:
    """What the report says: the points, the forecast for twice and four times the labels, and a sentence."""
    top = int(measured[-1].labels)
    told: dict[str, Any] = {
        "fitted": {str(int(p.labels)): {"mean": round(p.mean, 3), "error": round(p.error, 3)} for p in measured},
        "sure": SURE,
        "at": {},
        "says": f"{_a_class(top)} are too few to say what more would bring",
    }
    if len(measured) < _LEAST:
        return told
    ahead = [2 * top, 4 * top]
    found = forecast(measured, chance, ahead)
    told["at"] = {
        str(n): {name: round(value, 3) for name, value in one.items()} for n, one in zip(ahead, found, strict=True)
    }
    now, twice = measured[-1].mean, found[0]
    told["says"] = (
        f"{_a_class(top)} score {now:.1f}; {2 * top} would bring {twice['mean']:.1f} ({twice['low']:.1f} to "
        f"{twice['high']:.1f}), {4 * top} {found[1]['mean']:.1f} ({found[1]['low']:.1f} to {found[1]['high']:.1f})"
    )
    return told


def _a_class(count: int) -> str:
    return f"{count} label{'s' * (count != 1)} a class"

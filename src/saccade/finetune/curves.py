"""How well scores tell the anomalous from the normal, by picture and by pixel, and what can be said of false alarms.

All in percent. A measure that needs both kinds is None where one is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

BINS = 4096
"""Levels to which the scores of pixels are rounded."""
LIMIT = 0.3
"""Share of false positives up to which the overlap with regions is integrated, as MVTec's authors do."""
CONFIDENCE = 0.95
DRAWS = 400


def auroc(
    scores: Float[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "d n"] | None = None
) -> Float[np.ndarray, " d"]:
    """How often an anomalous one scores higher than a normal one, ties counting half: one number a row of weights."""
    normal, odd = _by_level(scores, anomalous, weights)
    return _area(normal, odd)


def average_precision(
    scores: Float[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "d n"] | None = None
) -> Float[np.ndarray, " d"]:
    """Precision at every threshold, averaged over what each newly finds; equal scores come together."""
    normal, odd = (part[:, ::-1] for part in _by_level(scores, anomalous, weights))
    found, wrong = odd.cumsum(axis=1), normal.cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(found > 0, found / np.maximum(found + wrong, 1e-300), 0.0)
        return 100 * (precision * odd).sum(axis=1) / np.where(found[:, -1] > 0, found[:, -1], np.nan)


def _by_level(scores: np.ndarray, anomalous: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the normal and of the anomalous at each score that occurs, lowest first: [D L] both."""
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    both = [np.add.reduceat((weights * kind)[:, order], starts, axis=1) for kind in (~anomalous, anomalous)]
    return both[0], both[1]


def _area(normal: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Area under the curve, of weights by level [D L]."""
    below = normal.cumsum(axis=1) - normal / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * (odd * below).sum(axis=1) / (odd.sum(axis=1) * normal.sum(axis=1))


def regions(mask: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """The number, from 1, of the region that a pixel belongs to, 0 outside; corners touch (8 neighbours)."""
    labels = np.zeros(mask.shape, dtype=np.int64)
    parent = [0]

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    above: list[tuple[int, int, int]] = []  # start, end, label of the runs of the row before
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        here = []
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            touching = [root(label) for first, last, label in above if first <= end and last >= start]
            if not touching:
                parent.append(len(parent))
            label = min(touching, default=len(parent) - 1)
            for other in touching:
                parent[other] = label
            labels[y, start:end] = label
            here.append((start, end, label))
        above = here
    _, numbers = np.unique([root(one) for one in range(len(parent))], return_inverse=True)
    return numbers[labels]


@dataclass
class Pixels:
    """Counts of pixels by score, picture by picture: enough for every measure of pixels, and little."""

    low: float
    high: float
    normal: list[Int[np.ndarray, " bins"]] = field(default_factory=list)
    odd: list[Int[np.ndarray, " bins"]] = field(default_factory=list)
    overlap: list[Float[np.ndarray, " bins"]] = field(default_factory=list)  # parts of a picture's regions, summed
    count: list[int] = field(default_factory=list)  # of a picture's regions

    def add(self, scores: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]) -> None:
        """A picture's scores, and which of its pixels are anomalous."""
        share = (scores - self.low) / max(self.high - self.low, 1e-12)
        level = np.clip((share * BINS).astype(np.int64), 0, BINS - 1)
        numbers = regions(mask) if mask.any() else np.zeros(mask.shape, dtype=np.int64)
        self.normal.append(np.bincount(level[~mask], minlength=BINS).astype(np.int32))
        self.odd.append(np.bincount(level[mask], minlength=BINS).astype(np.int32))
        sizes = np.bincount(numbers[mask])
        share_of = 1 / np.maximum(sizes, 1)
        overlap = np.bincount(level[mask], weights=share_of[numbers[mask]], minlength=BINS)
        self.overlap.append(overlap.astype(np.float32))
        self.count.append(int(numbers.max()))

    def auroc(self, weights: Float[np.ndarray, "d n"]) -> Float[np.ndarray, " d"]:
        """Over all pixels together; each picture as often as its weight says."""
        return _area(weights @ np.stack(self.normal), weights @ np.stack(self.odd))

    def pro(self, weights: Float[np.ndarray, "d n"]) -> Float[np.ndarray, " d"]:
        """Per-region overlap: the mean part of a region that is found, at thresholds up to `LIMIT` false positives.

        The area is divided by `LIMIT`, so that 100 is perfect. Small regions count as much as large ones.
        """
        wrong = (weights @ np.stack(self.normal))[:, ::-1].cumsum(axis=1)
        found = (weights @ np.stack(self.overlap))[:, ::-1].cumsum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            wrong, found = wrong / wrong[:, -1:], found / (weights @ np.array(self.count, dtype=np.float64))[:, None]
        return np.array([100 * _area_up_to(x, y, LIMIT) / LIMIT for x, y in zip(wrong, found, strict=True)])


def _area_up_to(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], limit: float) -> float:
    """Area under a rising line from the origin up to x = limit, by trapezoids; the last one is cut."""
    x, y = np.concatenate([[0.0], x]), np.concatenate([[0.0], y])
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    inside = x <= limit
    if not inside.all():
        first = int(np.flatnonzero(~inside)[0])
        part = (limit - x[first - 1]) / (x[first] - x[first - 1])
        x = np.append(x[:first], limit)
        y = np.append(y[:first], y[first - 1] + part * (y[first] - y[first - 1]))
    return float(np.trapezoid(y, x))


def resampled(names: Sequence[str], seed: int, draws: int = DRAWS) -> Float[np.ndarray, "d n"]:
    """How often each picture counts in each bootstrap draw over names (groups, or keys)."""
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    member = np.array([number[name] for name in names], dtype=np.int64)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(number), np.full(len(number), 1 / len(number)), size=draws)
    return drawn[:, member].astype(np.float64)


def bounded(
    measure: Callable[[Float[np.ndarray, "d n"]], Float[np.ndarray, " d"]], drawn: Float[np.ndarray, "d n"]
) -> tuple[float | None, list[float] | None]:
    """A measure of all pictures, and where 95 of 100 bootstrap draws lie; None where it is not defined."""
    value = float(measure(np.ones((1, drawn.shape[1])))[0])
    if not math.isfinite(value):
        return None, None
    spread = measure(drawn)
    spread = spread[np.isfinite(spread)]
    low, high = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return round(value, 3), [round(float(low), 3), round(float(high), 3)]


def rate_at(k: int, n: int, level: float) -> float:
    """The rate at which k or fewer of n happen with probability 1 - `level`: exact, by bisection of the binomial.

    With `level` 0.95 the upper bound of Clopper and Pearson; also a quantile of the false-alarm rate of a threshold
    with k of n held-out scores above it.
    """
    if k >= n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(k, n, middle) > 1 - level else (low, middle)
    return high


def _at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) of n with rate p."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 else 0.0
    each = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, sum(map(math.exp, each)))


def share(k: int, n: int) -> tuple[float | None, list[float] | None]:
    """k of n, and the exact interval of 95 in 100 (Clopper and Pearson); None of nothing."""
    if not n:
        return None, None
    tail = (1 + CONFIDENCE) / 2
    low, high = 1 - rate_at(n - k, n, tail), rate_at(k, n, tail)
    return round(100 * k / n, 3), [round(100 * low, 3), round(100 * high, 3)]


def needed(rate: float) -> int:
    """Held-out normal pictures, none of them above the threshold, that vouch for a false-alarm rate."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-rate))


@dataclass(frozen=True)
class Threshold:
    """Above `value` a picture is called anomalous; and what held-out normal pictures say of false alarms."""

    value: float
    asked: float
    held: int
    above: int
    groups: int | None

    @classmethod
    def of(cls, scores: Float[np.ndarray, " n"], rate: float, names: Sequence[str] | None = None) -> Threshold:
        """The lowest one whose expected rate of false alarms is at most `rate`, or the highest score there is.

        A new score, alike in kind, lies above the (k+1)-th highest of n with probability (k + 1) / (n + 1).
        """
        n = len(scores)
        above = max(0, math.floor(rate * (n + 1) + 1e-9) - 1)
        value = float(np.sort(scores)[n - 1 - above])
        return cls(value, rate, n, above, None if names is None else len(set(names)))

    def report(self) -> dict[str, object]:
        """For JSON. Where pictures come in groups, groups are counted as if all pictures of one were alike."""
        n, k = self.held, self.above
        if self.groups is not None and self.groups < n:
            n, k = self.groups, math.ceil(self.above * self.groups / self.held)
        expected = (self.above + 1) / (self.held + 1)
        between = [100 * rate_at(k, n, level) for level in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)]
        most, enough = 100 * rate_at(k, n, CONFIDENCE), needed(self.asked)
        what = "pictures" if self.groups is None or self.groups >= self.held else "groups of pictures"
        vouched = most <= 100 * self.asked * (1 + 1e-9)
        said = (
            f"{100 * self.asked:g} % false alarms are vouched for" if vouched
            else f"{100 * self.asked:g} % false alarms cannot be vouched for with {n} normal {what} held out: expected "
            f"are {100 * expected:.2g} %, and with 95 % confidence it is at most {most:.2g} %; {enough} would do"
        )  # fmt: skip
        return {
            "asked": 100 * self.asked, "held_out": self.held, "groups": self.groups, "above": self.above,
            "expected": round(100 * expected, 3), "between": [round(x, 3) for x in between],
            "at_most": round(most, 3), "vouched": vouched, "needed": enough, "said": said,
        }  # fmt: skip

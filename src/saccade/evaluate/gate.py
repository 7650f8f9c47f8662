"""Whether one encoder is better than another on pictures that took part in no choice: the test, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from saccade import hints
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import Labelled
from saccade.evaluate.splits import set_apart

GATE, WATCH = 0.3, 0.25
"""Of the labelled train side what the gate keeps to itself, and of the rest what checkpoints are chosen on."""
LEVEL = 0.05
DRAWS = 4000


def divide(data: Labelled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the train side in three parts that share no group: to learn from, to choose by, and the gate's.

    The test side stays untouched. Raises `SaccadeError` for fewer than three groups.
    """
    rows, names = data.train, data.names(data.train)
    if len(set(names)) < 3:
        raise SaccadeError(
            f"{len(set(names))} labelled groups cannot be divided in three",
            path="--eval",
            hint="one part is learned from, one chooses, one judges: label pictures of more groups",
        )
    apart = set_apart(names, GATE, "gate")
    rest = rows[~apart]
    watched = set_apart(data.names(rest), WATCH, "hold-out")
    return rest[~watched], rest[watched], rows[apart]


def judge(before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Whether `after` is better than `before`: Bool[n], which pictures each gets right. Differences in percent.

    Passed where the one-sided 95 % bound of the paired difference is above zero, by a bootstrap over whole groups
    (percentiles), and chance would seldom do the same: among all ways to swap the two within each group, at most
    5 % have so high a difference. The second is there because a bootstrap of few groups that differ is too sure of
    itself: three pictures more and none less pass it, and happen by chance one time in eight.
    A function of its arguments alone.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    member = [numbers[name] for name in names]
    sums = np.bincount(member, weights=after.astype(np.float64) - before)
    counts = np.bincount(member)
    random, groups = np.random.default_rng(0), len(sums)
    means, as_high = list[np.ndarray](), 0
    size = max(1, 4_000_000 // groups)
    for first in range(0, DRAWS, size):
        shape = (min(size, DRAWS - first), groups)
        drawn = random.integers(groups, size=shape)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
        swapped = random.integers(2, size=shape) * 2 - 1
        as_high += int(((swapped * sums).sum(1) >= sums.sum()).sum())
    bound, upper = (100 * float(np.quantile(np.concatenate(means), part)) for part in (LEVEL, 1 - LEVEL))
    chance = (1 + as_high) / (1 + DRAWS)
    mean = 100 * float(sums.sum() / counts.sum())
    passed = bound > 0 and chance <= LEVEL
    reason = (
        f"{'better' if passed else 'not shown to be better'} on {len(names)} pictures of {groups} groups that chose "
        f"nothing: {mean:+.2f} points, with 95 % confidence {bound:+.2f} or more; by chance as much {chance:.1%}"
    )
    return {"passed": passed, "measure": "knn", "difference": mean, "bound": bound, "upper": upper, "chance": chance,
            "pictures": len(names), "groups": groups, "reason": reason}  # fmt: skip


def held(verdict: dict[str, Any], before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The verdict with what became of zero-shot, Bool[n] each: it is not passed where the start is shown to be better.

    Shown as in `judge`, the two exchanged. A difference that chance may have made keeps nobody out.
    """
    lost = judge(after, before, names)
    said = {"before": 100 * float(before.mean()), "after": 100 * float(after.mean()), "difference": -lost["difference"]}
    found = verdict | {"zero_shot": said}
    if lost["passed"] and verdict["passed"]:
        found |= {"passed": False, "reason": f"{verdict['reason']}; but words fit worse than before: "
                                             f"{said['difference']:+.2f} points of zero-shot"}  # fmt: skip
    return found


def unverified(before: dict[str, Any], after: dict[str, Any], verdict: str) -> dict[str, Any]:
    """The gate without labels: whether features are lost; that they are better, nobody knows.

    `before` and `after` are hints, as `hints.measure` gives them; `verdict` is the health of the run. A higher rank
    counts for nothing.
    """
    wrong = hints.astray(before, after)
    if wrong is None and verdict in ("diverged", "constant_features", "low_rank"):
        wrong = f"the run's health is {verdict}"
    reason = (
        "unverified: without --eval nothing can say whether it is better; neither collapse nor drift was seen, and "
        "rank says little, for losses that spread features (KoLeo) raise it"
    )
    return {"passed": None if wrong is None else False, "measure": None, "bound": None, "reason": wrong or reason}

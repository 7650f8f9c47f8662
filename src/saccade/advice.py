"""Before a backbone is adapted: is that the sensible first try? Rules of thumb, each with its why."""

from __future__ import annotations

from typing import Any

FEW, MANY = 100, 50_000
"""Different pictures below which adapting learns them by heart, and from which training from nothing is worth a try."""
GOOD = 97.0
"""Percent right on frozen features from which there is little left to gain."""
TELLING = 5.0
"""Points above chance below which features hardly tell classes apart."""


def advise(pictures: int, distinct: int, looked: int, before: dict[str, Any]) -> dict[str, str]:
    """`first_try` (adapt, probe: a classifier on the frozen backbone, or pretrain: from nothing) and `why`.

    `distinct` of the `looked` at are different pictures; `before` is what was measured of the start: `watch`, where
    there are labels, with `knn` and `chance` in percent.
    """
    different = _different(pictures, distinct, looked)
    watch = before.get("watch")
    seen = f"{different:,} different pictures" + (f" of {pictures:,}" if different < 0.9 * pictures else "")
    if different < FEW:
        return _said("probe", f"{seen} are fewer than {FEW}: adapting would learn them by heart")
    if watch is None:
        return _said("adapt", f"{seen}; without labels (--eval) nothing can say whether it helps, and a probe is "
                     "the cheaper first try as soon as there are some")  # fmt: skip
    knn, chance = watch["knn"], watch["chance"]
    if knn >= GOOD:
        return _said("probe", f"k-NN on the frozen features is right for {knn:.1f} %: there is little left to gain")
    if knn - chance >= TELLING:
        return _said("adapt", f"{seen}, and features to build on: k-NN is right for {knn:.1f} %, chance {chance:.1f} %")
    weak = (
        f"k-NN on the frozen features is right for {knn:.1f} %, chance {chance:.1f} %: they hardly tell classes apart"
    )
    if different >= MANY:
        return _said("pretrain", f"{weak}, and {seen} are enough to begin from nothing")
    return _said("adapt", f"{weak}; but {seen} are too few to begin from nothing")


def _different(pictures: int, distinct: int, looked: int) -> int:
    """How many pictures differ, if all are there equally often: of so many copies `looked` would show `distinct`.

    Two copies of a picture are seldom among some hundred that are looked at, so the share of those says too much.
    """
    if distinct >= looked:
        return pictures
    missed = 1 - min(1.0, looked / pictures)
    few, many = 1.0, float(pictures)
    for _ in range(60):
        middle = (few + many) / 2
        shown = middle * (1 - missed ** (pictures / middle))
        few, many = (middle, many) if shown < distinct else (few, middle)
    return round(many)


def _said(first_try: str, why: str) -> dict[str, str]:
    return {"first_try": first_try, "why": why}

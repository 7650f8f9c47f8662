"""Who may be learned from, and who is examined: pure functions that never part a group.

A group is a patient, a slide, a scene: pictures of one group resemble each other for reasons that no other group
shares, so a group on both sides of a split makes every number too good.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from saccade.draws import Permutation, hash64
from saccade.errors import SaccadeError


def group_names(keys: Sequence[str], pattern: str) -> tuple[list[str | None], int]:
    """Each key's group: the first bracket of `pattern` (or all of its match) in the key; and how many keys have none.

    Raises `SaccadeError` for a pattern that cannot be compiled or fits no key.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SaccadeError(f"--group-by {pattern!r} is no regular expression: {error}", path="--group-by") from error
    matches = [compiled.search(key) for key in keys]
    groups = [None if match is None else (match.group(1) if compiled.groups else match.group(0)) for match in matches]
    missing = sum(group is None for group in groups)
    if missing == len(groups):
        hint = f"keys look like {keys[0]!r}" if keys else "there are no keys"
        raise SaccadeError(f"--group-by {pattern!r} fits no key", path="--group-by", hint=hint)
    return groups, missing


def set_apart(names: Sequence[str], share: float, address: str) -> np.ndarray:
    """Bool[n]: the samples to set apart, whole names (groups, or keys) at a time, about `share` of all samples.

    Names are walked in the order of their hash, so the choice depends on nothing but the names and `address`. A name
    that would overshoot the share by half is passed over. Neither side is ever empty; fewer than two names raise
    `SaccadeError`.
    """
    counts = Counter(names)
    if len(counts) < 2:
        raise SaccadeError(
            f"{len(counts)} group cannot be split in two", path="--group-by", hint="a split needs two groups or more"
        )
    wanted, taken, chosen = share * len(names), 0, set[str]()
    order = sorted(counts, key=lambda name: (hash64(f"{address}\0{name}"), name))
    for name in order:
        if taken < wanted and taken + counts[name] <= 1.5 * wanted:
            chosen.add(name)
            taken += counts[name]
    if not chosen:
        chosen.add(min(order, key=lambda name: (counts[name], name)))
    return np.array([name in chosen for name in names], dtype=bool)


def few(labels: np.ndarray, keys: Sequence[str], per_class: int, seed: int, draw: int) -> np.ndarray:
    """Int[m]: positions of `per_class` samples of each class, or of all it has where it has fewer.

    A function of (seed, draw, class, keys): every set of features gets the same samples, so that differences are
    paired; a smaller draw is part of the larger draw of the same number.
    """
    chosen: list[int] = []
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda position: keys[position])
        order = Permutation(len(members), "few-label", seed, draw, int(label))
        chosen += [members[order(place)] for place in range(min(per_class, len(members)))]
    return np.array(chosen, dtype=np.int64)

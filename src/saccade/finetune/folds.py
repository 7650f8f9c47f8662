"""Where a head's settings are chosen: the part held out of train, or in turn five parts where that one is small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from saccade.draws import hash64

ENOUGH = 300
"""Pictures held out that choose by themselves; with fewer a lucky one would."""
PARTS = 5


def folds(names: Sequence[str], held: np.ndarray) -> list[np.ndarray]:
    """Bool[n] each: rows that choose while the others are learned from. `names` are what must not be parted.

    One where `held` has enough rows; else every row is in one of five parts (fewer where there are fewer names).
    """
    if held.sum() >= ENOUGH or len(set(names)) < 2:
        return [held]
    counts = Counter(names)
    parts = min(PARTS, len(counts))
    sizes, part_of = [0] * parts, dict[str, int]()
    for name in sorted(counts, key=lambda name: (-counts[name], hash64(f"fold\0{name}"), name)):
        part_of[name] = min(range(parts), key=lambda part: sizes[part])
        sizes[part_of[name]] += counts[name]
    of = np.array([part_of[name] for name in names])
    return [of == part for part in range(parts)]

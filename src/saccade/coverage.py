"""Which rows of a set of vectors stand best for all of them: greedy, each one for what none before it stands for.

The value of a choice is the mean over all rows of how alike the row is to its nearest chosen one, by exp(-d / radius)
with d = 1 - cosine (generalised coverage, arXiv 2407.12212); rows may weigh more where a classifier is in doubt (arXiv
2412.20644). That value has diminishing returns, so the greedy choice is within 63 % of the best there is, and an old
gain bounds the new one from above: only a few are computed again. Memory is that of the vectors and of a few tiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from saccade.draws import Permutation

RADIUS = 0.25
"""At which distance (1 - cosine of centred vectors) a chosen row stands for another one by 1 / e."""
SAME = 0.02
"""Rows nearer than this are near duplicates: at most one of them is chosen."""
_SEEN = 8192  # rows that gains are summed over; more change the order of nothing that matters
_TILE, _BLOCK = 1024, 64


@dataclass(frozen=True)
class Chosen:
    """Rows in the order of the choice, and how many were passed over as near duplicates of these and of taken ones."""

    rows: list[int]
    duplicates: int


def centred(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Vectors of length 1 from their mean: what all rows share would make everything alike."""
    return F.normalize(vectors - vectors.mean(dim=0), dim=1)


def choose(
    unit: Float[Tensor, "n d"],
    taken: Sequence[int],
    count: int,
    *,
    free: Bool[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
    groups: Sequence[str] | None = None,
    radius: float = RADIUS,
    seed: int = 0,
) -> Chosen:
    """Up to `count` rows that stand best for all rows, beside those `taken` already; fewer where no more are `free`.

    `unit` has rows of length 1. `weight` is how much each row matters. With `groups` each gives as many as any other,
    as far as it has them. The same for the same `seed`, which decides where 8,192 of more rows are looked at.
    """
    order = Permutation(len(unit), "coverage", seed)
    seen = torch.tensor(sorted(order(place) for place in range(min(len(unit), _SEEN))), dtype=torch.long)
    search = _Greedy(unit, unit[seen], None if weight is None else weight[seen], radius)
    open_rows = torch.ones(len(unit), dtype=torch.bool) if free is None else free.clone()
    open_rows[torch.tensor(taken, dtype=torch.long)] = False
    for row in taken:
        search.stand(row)
        search.pass_over(row, open_rows)
    return search.run(open_rows, count, groups)


class _Greedy:
    """The rows seen, how well each is stood for, and an upper bound of what each row would add."""

    def __init__(self, unit: Tensor, seen: Tensor, weight: Tensor | None, radius: float):
        self.unit, self.seen, self.radius = unit, seen, radius
        self.weight = torch.ones(len(seen)) if weight is None else weight.float()
        self.best = torch.zeros(len(seen))
        self.duplicates = 0

    def alike(self, rows: Tensor) -> Float[Tensor, "m s"]:
        return ((rows @ self.seen.T - 1) / self.radius).exp_()

    def stand(self, row: int) -> None:
        self.best = torch.maximum(self.best, self.alike(self.unit[row : row + 1])[0])

    def pass_over(self, row: int, free: Tensor) -> None:
        """The near duplicates of this row are not free any more."""
        same = free & (self.unit @ self.unit[row] > 1 - SAME)
        self.duplicates += int(same.sum())
        free &= ~same

    def gains(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        return (self.alike(rows) - self.best).clamp_min_(0) @ self.weight

    def run(self, free: Tensor, count: int, groups: Sequence[str] | None) -> Chosen:
        bound = torch.cat([self.gains(part) for part in self.unit.split(_TILE)])
        fresh = torch.ones(len(bound), dtype=torch.bool)
        turns = _Turns(groups)
        rows: list[int] = []
        while len(rows) < count and bool(free.any()):
            allowed = free & turns.open(free)
            row = self._best(bound, fresh, allowed)
            rows.append(row)
            turns.take(row)
            self.stand(row)
            fresh[:] = False
            free[row] = False
            self.pass_over(row, free)
        return Chosen(rows, self.duplicates)

    def _best(self, bound: Tensor, fresh: Tensor, allowed: Tensor) -> int:
        """The allowed row that adds most; bounds are made exact until the best one is."""
        while True:
            top = bound.masked_fill(~allowed, -1.0).topk(min(_BLOCK, len(bound))).indices
            top = top[allowed[top]]
            if fresh[top[0]]:
                return int(top[0])
            stale = top[~fresh[top]]
            bound[stale] = self.gains(self.unit[stale])
            fresh[stale] = True


class _Turns:
    """Which groups may give the next row: those that have given fewest."""

    def __init__(self, groups: Sequence[str] | None):
        self.number: Int[Tensor, " n"] | None = None
        if groups is not None:
            names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
            self.number = torch.tensor([names[name] for name in groups], dtype=torch.long)
            self.given = torch.zeros(len(names), dtype=torch.long)

    def open(self, free: Tensor) -> Bool[Tensor, " n"]:
        if self.number is None:
            return torch.ones_like(free)
        there = torch.zeros(len(self.given), dtype=torch.bool)
        there[self.number[free]] = True
        least = self.given[there].min()
        return (self.given == least)[self.number]

    def take(self, row: int) -> None:
        if self.number is not None:
            self.given[self.number[row]] += 1


def stand_for(unit: Float[Tensor, "n d"], rows: Sequence[int], known: Sequence[int]) -> list[int]:
    """How many of all rows have each of `rows` as the nearest of these and the `known` ones, itself among them."""
    centres = unit[torch.tensor([*rows, *known], dtype=torch.long)]
    nearest: Counter[int] = Counter()
    for part in unit.split(8 * _TILE):
        nearest.update((part @ centres.T).argmax(dim=1).tolist())
    return [nearest[place] for place in range(len(rows))]

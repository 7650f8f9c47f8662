"""Data shift: test pictures that lie where train has none, by a two-sample test that never parts a group.

Kernel mean discrepancy (Gretton et al., JMLR 13, 2012) between the two sides, against the same of random divisions of
the same groups: patients differ from each other anyway, and so does any choice of them. Divisions keep the number of
pictures of each class on each side where groups allow it, so that other shares of the classes alone are no shift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saccade.diagnose.evidence import NEIGHBOURS, Finding, Side, nearest
from saccade.evaluate.baselines import resampled

DRAWS = 499
CHANCE = 0.01
EXCESS = 0.05
"""Named where test pictures have so many more test pictures among their neighbours than chance puts there, as a part of
all that could be more (95 %): two choices of the same kind of pictures may differ, and mislead no head."""
FAR = 0.05  # of train's own pictures lie beyond the limit from which a test picture is said to be far
MOST = 4000  # rows of each side: the kernel is a square


def examine(train: Side, test: Side) -> Finding:
    """Whether the pictures of test are others than those of train, as the untuned backbone sees them."""
    chance = discrepancy(train, test)
    own, _ = nearest(train.start, train.start, 5, (train.names, train.names))
    theirs, beside = nearest(test.start, train.start, 5)
    far = 1 - theirs.mean(1).numpy()
    outside = float((far > np.quantile(1 - own.mean(1).numpy(), 1 - FAR)).mean())
    values = _together(train, test)
    excess, interval = float(values.mean()), resampled(values, test.names)
    found = chance <= CHANCE and interval[0] > EXCESS
    rows = np.argsort(-far, kind="stable")[:24]
    reason = f"random divisions of the same groups differ as much in {chance:.1%} of cases"
    if found:
        reason = (
            f"test lies elsewhere than train: its pictures are neighbours of each other, {excess:.0%} of the way to "
            f"being all alone (95 %: {interval[0]:.0%} to {interval[1]:.0%}); {reason}; {outside:.0%} of test lie "
            f"farther from train than {1 - FAR:.0%} of train do"
        )
    return Finding(
        "shift", found, "how far test pictures keep to themselves", excess, interval, EXCESS, reason,
        rows=tuple(rows.tolist()), beside=tuple(map(tuple, beside[torch.from_numpy(rows), :3].tolist())),
        more={"chance": chance, "outside": outside},
    )  # fmt: skip


def _together(train: Side, test: Side) -> np.ndarray:
    """For each test picture how many of its neighbours, of other groups, are of test: 0 as by chance, 1 all."""
    names = [*train.names, *test.names]
    _, places = nearest(test.start, torch.cat([train.start, test.start]), NEIGHBOURS, (test.names, names))
    share = (places >= len(train.labels)).double().mean(1).numpy()
    sizes = Counter(test.names)
    others = np.array([len(test.labels) - sizes[name] for name in test.names])
    expected = others / np.maximum(others + len(train.labels), 1)
    found: np.ndarray = (share - expected) / (1 - expected)
    return found


def discrepancy(train: Side, test: Side) -> float:
    """How often a random division of the groups is as uneven as the given one: a p-value."""
    random = np.random.default_rng(0)
    ours, theirs = (_some(len(side.labels), random) for side in (train, test))
    features = torch.cat([train.start[ours], test.start[theirs]]).float()
    names = [*(train.names[row] for row in ours), *(test.names[row] for row in theirs)]
    labels = np.concatenate([train.labels[ours], test.labels[theirs]])
    numbers = {name: place for place, name in enumerate(dict.fromkeys(names))}
    member = torch.tensor([numbers[name] for name in names])
    kernel, sizes = _by_groups(_kernel(features), member, len(numbers))
    given = torch.zeros(len(numbers))
    given[member[len(ours) :]] = 1  # a group that is torn counts for test
    divisions = torch.stack([given, *_divisions(given, _stratum(member, labels), random)], dim=1)
    values = _uneven(kernel, sizes, divisions)
    return float((values >= values[0]).double().mean())


def _some(count: int, random: np.random.Generator) -> list[int]:
    rows: list[int] = np.sort(random.permutation(count)[:MOST]).tolist()
    return rows


def _kernel(features: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Gaussian, as wide as the median distance."""
    spread = features.std(dim=0)
    scaled = (features - features.mean(0)) / spread.clamp_min(1e-6 * float(spread.max().clamp_min(1e-30)))
    squares = torch.cdist(scaled, scaled).square()
    some = squares[:: max(1, len(squares) // 500)]
    return torch.exp(-squares / some.median().clamp_min(1e-12)).fill_diagonal_(0)


def _by_groups(kernel: Tensor, member: Tensor, count: int) -> tuple[Float[Tensor, "g g"], Float[Tensor, " g"]]:
    """Sums of the kernel between groups; and how many rows each has."""
    rows = torch.bincount(member, minlength=count).float()
    if count == len(member):
        order = torch.argsort(member)
        return kernel[order][:, order], rows
    sums = torch.zeros(count, len(member)).index_add_(0, member, kernel)
    return torch.zeros(count, count).index_add_(0, member, sums.T.contiguous()), rows


def _stratum(member: Tensor, labels: np.ndarray) -> np.ndarray:
    """The commonest class of each group."""
    ballot = np.zeros((int(member.max()) + 1, int(labels.max()) + 1))
    np.add.at(ballot, (member.numpy(), labels), 1)
    return ballot.argmax(1)


def _divisions(given: Tensor, stratum: np.ndarray, random: np.random.Generator) -> Sequence[Tensor]:
    """Other divisions: within each class as many groups go to test as did."""
    found, sides = [], given.numpy()
    members = [np.flatnonzero(stratum == label) for label in np.unique(stratum)]
    for _ in range(DRAWS):
        drawn = np.empty_like(sides)
        for places in members:
            drawn[places] = sides[random.permutation(places)]
        found.append(torch.from_numpy(drawn))
    return found


def _uneven(kernel: Float[Tensor, "g g"], sizes: Float[Tensor, " g"], divisions: Float[Tensor, "g p"]) -> Tensor:
    """The squared discrepancy of each division, unbiased: no row is compared with itself."""
    test, train = divisions, 1 - divisions
    to_test = kernel @ test
    both, inner = (train * to_test).sum(0), (test * to_test).sum(0)
    outer = kernel.sum() - 2 * both - inner
    m, n = sizes @ test, sizes @ train
    return inner / (m * (m - 1)) + outer / (n * (n - 1)) - 2 * both / (m * n)

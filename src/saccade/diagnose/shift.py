"""Data shift: test pictures that lie where train has none, by a two-sample test that never parts a group.

Kernel mean discrepancy (Gretton et al., JMLR 13, 2012) between the two sides, against the same of random divisions of
the same groups: patients differ from each other anyway, and so does any choice of them. Divisions keep the number of
pictures of each class on each side where groups allow it, so that other shares of the classes alone are no shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saccade.diagnose.evidence import Finding, Side, nearest
from saccade.evaluate.baselines import resampled

DRAWS = 499
CHANCE = 0.01
OUTSIDE = 0.05
"""So many of train's own pictures lie farther from the others than the limit; named where of test more do (95 %): what
is only statistically another choice of pictures misleads no head."""
MOST = 4000  # rows of each side: the kernel is a square


def examine(train: Side, test: Side) -> Finding:
    """Whether the pictures of test are others than those of train, as the untuned backbone sees them."""
    chance = discrepancy(train, test)
    own, _ = nearest(train.start, train.start, 5, (train.names, train.names))
    theirs, beside = nearest(test.start, train.start, 5)
    limit = float(np.quantile(1 - own.mean(1).numpy(), 1 - OUTSIDE))
    far = 1 - theirs.mean(1).numpy()
    outside = far > limit
    share, interval = float(outside.mean()), resampled(outside, test.names)
    found = chance <= CHANCE and interval[0] > OUTSIDE
    rows = np.argsort(-far, kind="stable")[:24]
    reason = (
        f"test is not drawn as train is: random divisions of the same groups differ as much in {chance:.1%} of cases; "
        f"{share:.1%} of test lie farther from train than {1 - OUTSIDE:.0%} of train do"
        if found
        else f"random divisions of the same groups differ as much in {chance:.1%} of cases"
    )
    return Finding(
        "shift", found, "how often a random division differs as much", chance, None, CHANCE, reason,
        rows=tuple(rows.tolist()), beside=tuple(map(tuple, beside[torch.from_numpy(rows), :3].tolist())),
        more={"outside": share, "outside_interval": interval, "outside_limit": OUTSIDE},
    )  # fmt: skip


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

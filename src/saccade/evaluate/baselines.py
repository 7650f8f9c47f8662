"""What a number must beat, and by how much before it counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


def majority(labels_train: np.ndarray, labels_test: np.ndarray) -> float:
    """Percent of test that the most frequent class of train gets right."""
    return 100 * float((labels_test == np.bincount(labels_train).argmax()).mean())


def group_majority(
    labels_train: np.ndarray, groups_train: Sequence[str], labels_test: np.ndarray, groups_test: Sequence[str]
) -> dict[str, float]:
    """What knowing the group alone scores, in percent.

    `from_train`: each test sample gets the commonest class of its group in train (of all train where the group is new):
    far above `majority` means that groups leak across the split. `known`: the commonest class of its own group in test:
    what a feature could score that recognises the patient and nothing else.
    """
    usual = int(np.bincount(labels_train).argmax())
    learned = _commonest(labels_train, groups_train)
    known = _commonest(labels_test, groups_test)
    answers = {
        "from_train": [learned.get(group, usual) for group in groups_test],
        "known": [known[group] for group in groups_test],
    }
    return {name: 100 * float((np.array(guess) == labels_test).mean()) for name, guess in answers.items()}


def _commonest(labels: np.ndarray, groups: Sequence[str]) -> dict[str, int]:
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for label, group in zip(labels.tolist(), groups, strict=True):
        votes[group][label] += 1
    return {group: min(count, key=lambda label: (-count[label], label)) for group, count in votes.items()}


def difference(ours: np.ndarray, theirs: np.ndarray, names: Sequence[Hashable]) -> dict[str, Any]:
    """The paired difference of two contestants in percent, and whether it counts.

    `ours` and `theirs` [draws N] say which test samples were right, with the same draws. The standard error has two
    parts: between draws, and between test samples, where samples of one name (group) are not independent. Below two
    standard errors there is no difference.
    """
    gain = 100 * (ours.astype(np.float64) - theirs)
    draws, n = gain.shape
    mean = gain.mean()
    between_draws = gain.mean(axis=1).var(ddof=1) / draws if draws > 1 else 0.0
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    sums = np.bincount([numbers[name] for name in names], weights=gain.mean(axis=0) - mean)
    clusters = len(sums)
    between_samples = (sums**2).sum() / n**2 * clusters / max(clusters - 1, 1)
    bound = 2 * float(np.sqrt(between_draws + between_samples))
    verdict = "no difference" if abs(mean) <= bound else "better" if mean > 0 else "worse"
    return {"mean": float(mean), "two_standard_errors": bound, "verdict": verdict}


def resampled(values: np.ndarray, names: Sequence[str], level: float = 0.05, draws: int = 2000) -> tuple[float, float]:
    """An interval of the mean of `values`, by a bootstrap over whole names (percentiles)."""
    numbers = {name: place for place, name in enumerate(dict.fromkeys(names))}
    member = [numbers[name] for name in names]
    sums, counts = np.bincount(member, weights=values.astype(np.float64)), np.bincount(member)
    random, means = np.random.default_rng(0), []
    size = max(1, 4_000_000 // len(sums))
    for first in range(0, draws, size):
        drawn = random.integers(len(sums), size=(min(size, draws - first), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [level / 2, 1 - level / 2])
    return float(low), float(high)

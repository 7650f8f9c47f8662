"""Wrong labels: where a probe that never saw a picture is surest, it can be wrong only about the label.

Confident learning (arXiv 1911.00068) counts pictures whose probabilities, learned from pictures of other names, reach
the mean of another class's own. Of hard classes it counts too many: a cat may look more like a dog than dogs do. So its
list is shown, and the share is measured where it cannot be mistaken for difficulty: among the surest tenth the error
falls to nothing as classes part, while labels at fault leave as many errors there as everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saccade.diagnose.evidence import NEIGHBOURS, Finding, Side, nearest, out_of_fold, resampled, votes

SUREST = 0.1
"""Part of the pictures on which the share is measured: the surest, and never fewer than `FEWEST`."""
FEWEST = 50
SHARE = 0.05
"""Named where 99 % confidence says that more labels than this are wrong."""
LEVEL = 0.02  # two-sided: one-sided 99 %


def opinion(train: Side, classes: int) -> Float[Tensor, "n c"]:
    """What others say of each picture of train: the mean of a linear probe and of its neighbours, of other names."""
    probed = out_of_fold(train.start, train.labels, train.names, classes)
    cosines, places = nearest(train.start, train.start, 2 * NEIGHBOURS, (train.names, train.names))
    return (probed + votes(places, cosines, train.labels, classes)) / 2


def examine(train: Side, said: Float[Tensor, "n c"], classes: Sequence[str]) -> Finding:
    """Whether labels of train are at fault, by what `opinion` says of them."""
    sure, guess = (part.numpy() for part in said.max(1))
    wrong = guess != train.labels
    top = np.argsort(-sure, kind="stable")[: max(min(FEWEST, len(sure)), round(SUREST * len(sure)))]
    share = float(wrong[top].mean())
    names = [train.names[row] for row in top.tolist()]
    low, _ = resampled(wrong[top], names, LEVEL)
    interval = resampled(wrong[top], names)
    suspects, joint = confident(said, train.labels)
    cosines, places = nearest(train.start, train.start, 3, (train.names, train.names))
    rows = suspects[:24]
    frequent = Counter((int(train.labels[row]), int(guess[row])) for row in suspects.tolist()).most_common(5)
    told = ", ".join(f"{classes[given]} for {classes[better]} ({count})" for (given, better), count in frequent[:3])
    found = low > SHARE
    reason = (
        f"of the {len(top)} pictures of train that others are surest of, {share:.1%} bear another label: that many of "
        f"all labels are wrong (95 %: {interval[0]:.1%} to {interval[1]:.1%})"
        if found
        else f"of the {len(top)} pictures of train that others are surest of, {share:.1%} bear another label"
    )
    reason += f"; the commonest doubts: {told}" if found and told else ""
    return Finding(
        "labels", found, "part of the surest pictures whose label others deny", share, interval, SHARE, reason,
        side="train", rows=tuple(rows.tolist()), beside=tuple(map(tuple, places[torch.from_numpy(rows)].tolist())),
        more={"confident_learning": joint, "suspects": len(suspects)},
    )  # fmt: skip


def confident(said: Float[Tensor, "n c"], labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows whose label confident learning denies, the clearest first, and the share of wrong labels that it estimates.

    A row counts for the likeliest class among those whose probability reaches the mean that their own rows have; counts
    are scaled to the number of rows of each label.
    """
    probabilities, count = said.numpy(), said.shape[1]
    own = [probabilities[labels == label, label] for label in range(count)]
    limits = np.array([part.mean() if len(part) else np.inf for part in own])
    reached = np.where(probabilities >= limits, probabilities, -1.0)
    decided, better = reached.max(1) >= 0, reached.argmax(1)
    joint = np.zeros((count, count))
    np.add.at(joint, (labels[decided], better[decided]), 1)
    sizes = np.bincount(labels, minlength=count)
    scaled = joint / np.maximum(joint.sum(1, keepdims=True), 1) * sizes[:, None]
    wrong = np.flatnonzero(decided & (better != labels))
    margin = probabilities[wrong, labels[wrong]] - probabilities[wrong].max(1)
    share = 1 - float(np.trace(scaled)) / max(float(scaled.sum()), 1.0)
    return wrong[np.argsort(margin, kind="stable")], share

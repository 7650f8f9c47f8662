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

from saccade.diagnose.evidence import NEIGHBOURS, Finding, Side, nearest, out_of_fold, votes
from saccade.evaluate.baselines import resampled

SUREST = 0.2
"""Part of the pictures, the surest, on which errors are counted; `SLOPE`: on which their trend is taken."""
SLOPE = 0.3
DENIED, SHARE = 0.10, 0.05
"""Named where more than a tenth of the surest bear another label (99 % confidence), and where more than a twentieth
still would at the sure end of the trend (95 %): hard classes alone give one or the other."""


def opinion(train: Side, classes: int) -> Float[Tensor, "n c"]:
    """What others say of each picture of train: the mean of a linear probe and of its neighbours, of other names."""
    probed = out_of_fold(train.start, train.labels, train.names, classes)
    cosines, places = nearest(train.start, train.start, 2 * NEIGHBOURS, (train.names, train.names))
    return (probed + votes(places, cosines, train.labels, classes)) / 2


def examine(train: Side, said: Float[Tensor, "n c"], classes: Sequence[str]) -> Finding:
    """Whether labels of train are at fault, by what `opinion` says of them."""
    sure, guess = (part.numpy() for part in said.max(1))
    order = np.argsort(-sure, kind="stable")
    wrong = (guess != train.labels)[order]
    top, trend = (max(2, round(part * len(order))) for part in (SUREST, SLOPE))
    names = [train.names[row] for row in order.tolist()]
    denied, (least, _) = float(wrong[:top].mean()), resampled(wrong[:top], names[:top], 0.02)
    share, draws = at_the_end(wrong[:trend], names[:trend])
    interval = (max(0.0, float(np.quantile(draws, 0.025))), float(np.quantile(draws, 0.975)))
    suspects, joint = confident(said, train.labels)
    _, places = nearest(train.start, train.start, 3, (train.names, train.names))
    rows = suspects[:24]
    frequent = Counter((int(train.labels[row]), int(guess[row])) for row in suspects.tolist()).most_common(5)
    told = ", ".join(f"{classes[given]} for {classes[better]} ({count})" for (given, better), count in frequent[:3])
    found = least > DENIED and float(np.quantile(draws, 0.05)) > SHARE
    reason = f"of the {top} pictures of train that others are surest of, {denied:.1%} bear another label"
    if found:
        reason += f": about {share:.0%} of all labels are wrong (95 %: {interval[0]:.0%} to {interval[1]:.0%})"
    reason += f"; the commonest doubts: {told}" if found and told else ""
    return Finding(
        "labels", found, "share of wrong labels", share, interval, SHARE, reason,
        side="train", rows=tuple(rows.tolist()), beside=tuple(map(tuple, places[torch.from_numpy(rows)].tolist())),
        more={"denied": denied, "denied_at_least": least, "confident_learning": joint, "suspects": len(suspects)},
    )  # fmt: skip


def at_the_end(wrong: np.ndarray, names: Sequence[str], draws: int = 2000) -> tuple[float, np.ndarray]:
    """What part is wrong at the sure end, by a line through all in their order, and the same of resampled names.

    The line never falls: nobody errs more where he is surer.
    """
    place = (np.arange(len(wrong)) + 0.5) / len(wrong)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    member = [numbers[name] for name in names]
    terms = [np.ones(len(wrong)), place, place**2, wrong.astype(np.float64), place * wrong]
    sums = np.stack([np.bincount(member, weights=term) for term in terms])  # [5 G]
    random = np.random.default_rng(0)
    times = random.multinomial(sums.shape[1], np.full(sums.shape[1], 1 / sums.shape[1]), size=draws)
    count, first, second, errors, moved = np.concatenate([sums.sum(1)[:, None], sums @ times.T], axis=1)
    ends = (second * errors - first * moved) / np.maximum(count * second - first**2, 1e-12)
    ends = np.clip(ends, 0, errors / count)
    return float(ends[0]), ends[1:]


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

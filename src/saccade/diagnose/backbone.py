"""A backbone that tells too little: on train its features are no better than raw pixels or than the same untrained.

Measured on pictures of train by probes that did not see them, so that neither a shifted test set nor a leak has a say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saccade.diagnose.evidence import Finding, Side, flat, nearest, out_of_fold, resampled, votes
from saccade.evaluate.gate import judge

GAIN = 5.0
"""Named where features are not shown to be better, and 95 % confidence excludes that they are so many points better."""
CEILING = 0.02  # errors of the rival below which there is nothing to be better at


def examine(train: Side, test: Side, said: Float[Tensor, "n c"], classes: Sequence[str]) -> Finding:
    """Whether the backbone's features say more than what costs nothing; `said`: a probe's probabilities of train."""
    ours = said.argmax(1).numpy() == train.labels
    rivals = {"raw pixels": flat(train.pixels, 8)}
    if train.untrained is not None:
        rivals["the same network untrained"] = train.untrained
    right = {
        name: out_of_fold(features, train.labels, train.names, len(classes)).argmax(1).numpy() == train.labels
        for name, features in rivals.items()
    }
    rival = max(right, key=lambda name: right[name].mean())
    verdict = judge(right[rival], ours, train.names)
    low, high = (100 * limit for limit in resampled(ours.astype(np.float64) - right[rival], train.names))
    idle = 1 - right[rival].mean() < CEILING
    found = not idle and not verdict["passed"] and verdict["upper"] < GAIN
    cosines, places = nearest(test.features, train.features, 10)
    near = votes(places, cosines, train.labels, len(classes)).argmax(1).numpy()
    wrong = np.flatnonzero(~test.right)
    alike = float((near[wrong] == test.guesses[wrong]).mean()) if len(wrong) else 0.0
    rows = wrong[near[wrong] == test.guesses[wrong]][:24]
    scores = f"{100 * ours.mean():.1f} percent of train by its features, {100 * right[rival].mean():.1f} by {rival}"
    reason = (
        f"a probe names {scores}: {verdict['difference']:+.1f} points (95 %: {low:+.1f} to {high:+.1f}); of the errors on "
        f"test {alike:.0%} lie among train pictures of the class they were taken for"
        if found
        else f"a probe names {scores} (95 % of the difference: {low:+.1f} to {high:+.1f} points)"
    )
    undecided = not (found or idle or verdict["passed"])
    return Finding(
        "backbone", found, "points that features gain over what costs nothing", verdict["difference"], (low, high), GAIN,
        reason + ("; too few pictures to decide" if undecided else ""),
        rows=tuple(rows.tolist()), beside=tuple(map(tuple, places[torch.from_numpy(rows), :3].tolist())),
        more={"against": rival, "errors_that_look_alike": alike, "undecided": undecided},
    )  # fmt: skip

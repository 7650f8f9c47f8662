"""A backbone that tells too little: on train its features are no better than raw pixels or than the same untrained.

Measured on pictures of train by probes that did not see them, so that neither a shifted test set nor a leak has a say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saccade.diagnose.evidence import Finding, Side, flat, nearest, out_of_fold, votes
from saccade.evaluate import linear
from saccade.evaluate.baselines import resampled
from saccade.evaluate.gate import judge
from saccade.evaluate.labelled import SHARE
from saccade.evaluate.splits import set_apart

GAIN = 5.0
"""Named where features are not shown to be better, and 95 % confidence excludes that they are so many points better."""
CEILING = 0.02  # errors of the rival below which there is nothing to be better at


def _rivals(side: Side) -> dict[str, Float[Tensor, "n d"]]:
    """What costs nothing."""
    found = {"raw pixels": flat(side.pixels, 8)}
    return found if side.untrained is None else found | {"the same network untrained": side.untrained}


def _right(train: Side, test: Side | None, features: tuple[Tensor, Tensor | None], classes: int) -> np.ndarray:
    """Which pictures a probe names rightly: of train by turns, or of test."""
    if test is None or features[1] is None:
        found = out_of_fold(features[0], train.labels, train.names, classes).argmax(1).numpy() == train.labels
    else:
        apart = set_apart(train.names, SHARE, "hold-out")
        probe = linear.probe(features[0], torch.from_numpy(train.labels), features[1], classes, apart)
        found = probe.predicted.numpy() == test.labels
    right: np.ndarray = found
    return right


def examine(train: Side, test: Side, said: Float[Tensor, "n c"], classes: Sequence[str], tuned: bool) -> Finding:
    """Whether the backbone's features say more than what costs nothing; `said`: a probe's probabilities of train.

    A backbone that was `tuned` learned the labels of train: what the head says of test is compared then.
    """
    asked, judged = (test, test) if tuned else (None, train)
    ours = test.right if tuned else said.argmax(1).numpy() == train.labels
    others = _rivals(test)
    right = {
        name: _right(train, asked, (features, others[name]), len(classes)) for name, features in _rivals(train).items()
    }
    rival = max(right, key=lambda name: right[name].mean())
    verdict = judge(right[rival], ours, judged.names)
    low, high = (100 * limit for limit in resampled(ours.astype(np.float64) - right[rival], judged.names))
    idle = 1 - right[rival].mean() < CEILING
    found = not idle and not verdict["passed"] and verdict["upper"] < GAIN
    cosines, places = nearest(test.features, train.features, 10)
    near = votes(places, cosines, train.labels, len(classes)).argmax(1).numpy()
    wrong = np.flatnonzero(~test.right)
    alike = float((near[wrong] == test.guesses[wrong]).mean()) if len(wrong) else 0.0
    rows = wrong[near[wrong] == test.guesses[wrong]][:24]
    where, own, other = ("test" if tuned else "train"), 100 * ours.mean(), 100 * right[rival].mean()
    scores = f"{own:.1f} percent of {where} by its features, {other:.1f} by {rival}"
    reason = (
        f"a probe names {scores}: {verdict['difference']:+.1f} points (95 %: {low:+.1f} to {high:+.1f}); "
        f"{alike:.0%} of the errors on test lie among train pictures of the class they were taken for"
        if found
        else f"a probe names {scores} (95 % of the difference: {low:+.1f} to {high:+.1f} points)"
    )
    undecided = not (found or idle or verdict["passed"])
    return Finding(
        "backbone", found, "points gained over what costs nothing", verdict["difference"], (low, high), GAIN,
        reason + ("; too few pictures to decide" if undecided else ""),
        rows=tuple(rows.tolist()), beside=tuple(map(tuple, places[torch.from_numpy(rows), :3].tolist())),
        more={"against": rival, "errors_that_look_alike": alike, "undecided": undecided},
    )  # fmt: skip

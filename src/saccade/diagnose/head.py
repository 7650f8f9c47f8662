"""Too weak a head: a stronger probe on the same features does better where nobody learned from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from saccade.diagnose.evidence import Finding, Side, nearest, votes
from saccade.evaluate import knn, linear
from saccade.evaluate.baselines import resampled
from saccade.evaluate.gate import judge
from saccade.evaluate.labelled import SHARE
from saccade.evaluate.splits import set_apart

GAIN = 2.0
"""Named where a probe is better by more points than this: a head of another kind is always a little other."""
CHANCE = 0.01


def probed(train: Side, test: Side, classes: int) -> tuple[str, np.ndarray]:
    """The stronger of two probes, as a part of train decides, and its classes of test."""
    targets = torch.from_numpy(train.labels)
    apart = set_apart(train.names, SHARE, "hold-out")
    held = torch.from_numpy(apart)
    probe = linear.probe(train.features, targets, test.features, classes, apart)
    guess = knn.predict(train.features[~held], targets[~held], train.features[held], classes)
    if 100 * (guess == targets[held]).double().mean() > probe.held_out:
        return "20 nearest neighbours", knn.predict(train.features, targets, test.features, classes).numpy()
    return f"a linear probe of penalty {probe.penalty:g}", probe.predicted.numpy()


def examine(train: Side, test: Side, own: np.ndarray, classes: Sequence[str], shifted: bool) -> Finding:
    """Whether a probe does better than the head on test, by a paired test over groups.

    `own`: what is said of train by a probe that did not see the picture. Where test is `shifted`, a head that is
    better suited to train may do worse there by chance of the shift: then the head must also do worse on the very
    pictures that it learned from than the probe does on pictures that it did not.
    """
    kind, guesses = probed(train, test, len(classes))
    better = guesses == test.labels
    verdict = judge(test.right, better, test.names)
    gain = better.astype(np.float64) - test.right
    low, high = (100 * limit for limit in resampled(gain, test.names))
    floor, _ = (100 * limit for limit in resampled(gain, test.names, 2 * CHANCE))
    underfits = judge(train.right, own, train.names)["bound"] > 0
    found = verdict["chance"] <= CHANCE and floor > 0 and verdict["difference"] > GAIN and (underfits or not shifted)
    cosines, places = nearest(test.features, train.features, 10)
    near = votes(places, cosines, train.labels, len(classes)).argmax(1).numpy()
    wrong = np.flatnonzero(~test.right)
    told = float((near[wrong] == test.labels[wrong]).mean()) if len(wrong) else 0.0
    rows = np.array([row for row in wrong.tolist() if better[row]], dtype=np.int64)[:24]
    reason = (
        f"{kind} on the same features names {verdict['difference']:+.1f} points more of test rightly than the head "
        f"(95 %: {low:+.1f} to {high:+.1f}); {told:.0%} of the head's errors lie among pictures of their own class"
        if found
        else f"{kind} on the same features gains {verdict['difference']:+.1f} points (95 %: {low:+.1f} to {high:+.1f})"
    )
    return Finding(
        "head", found, "points that a stronger probe gains on test", verdict["difference"], (low, high), GAIN, reason,
        rows=tuple(rows.tolist()), beside=tuple(map(tuple, places[torch.from_numpy(rows), :3].tolist())),
        more={"probe": kind, "errors_among_their_own": told, "chance": verdict["chance"], "underfits": underfits},
    )  # fmt: skip

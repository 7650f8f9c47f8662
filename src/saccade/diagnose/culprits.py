"""The five culprits one after the other, so that one does not answer for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from saccade.diagnose.backbone import examine as examine_backbone
from saccade.diagnose.evidence import Finding, Side, out_of_fold
from saccade.diagnose.head import examine as examine_head
from saccade.diagnose.labels import examine as examine_labels
from saccade.diagnose.labels import opinion
from saccade.diagnose.leakage import examine as examine_leakage
from saccade.diagnose.shift import examine as examine_shift

ADVICE = {
    "labels": "look through the listed pictures and correct what is wrong; the head learned from it, too",
    "leakage": "take the copies out of test, or name what they share with --group-by: the score is too good",
    "shift": "label some pictures like those of test and learn from them too, or adapt the backbone (saccade adapt)",
    "backbone": "take another backbone, larger pictures, or adapt this one (saccade adapt): no head can repair it",
    "head": "fit the head again: frozen mode chooses its penalty; let it learn longer where the backbone moves",
}
ORDER = ("labels", "leakage", "shift", "backbone", "head")


def told_apart(train: Side, test: Side, classes: Sequence[str], *, tuned: bool = False) -> dict[str, Finding]:
    """A finding for each culprit, named or not. A function of its arguments alone.

    Copies across the split are found first and take no further part. Features are judged on train, by probes that did
    not see the picture, which neither a shift nor a leak can move. Labels can be denied only by features that say
    something: where those say no more than raw pixels, whoever is sure is sure of nothing. `tuned`: the features
    learned from the labels of train, so that they are judged on test.
    """
    leaks, same = examine_leakage(train, test)
    clean = test.chosen(np.flatnonzero(~same)) if 0 < same.sum() < len(same) else test
    said = out_of_fold(train.features, train.labels, train.names, len(classes))
    tells = examine_backbone(train, clean, said, classes, tuned)
    moved = examine_shift(train, clean)
    doubted = examine_labels(train, opinion(train, len(classes)), classes)
    if tells.found and doubted.found:
        doubted = replace(
            doubted, found=False, reason=f"cannot be told with features that say so little: {doubted.reason}"
        )
    own = said.argmax(1).numpy() == train.labels
    weak = examine_head(train, clean, own, classes, moved.found)
    found = {one.culprit: one for one in (leaks, tells, moved, doubted, weak)}
    kept = np.flatnonzero(~same) if clean is not test else np.arange(len(test.labels))
    for name in ("backbone", "shift", "head"):  # rows of all of test again
        found[name] = replace(found[name], rows=tuple(int(kept[row]) for row in found[name].rows))
    return {name: found[name] for name in ORDER}

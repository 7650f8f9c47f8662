"""What is scored of classes: shares right, precision, recall, F1, average precision, and which is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Int[K K]: rows are what it is, columns what was said."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def report(right: np.ndarray, there: np.ndarray, said: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall and F1 of each class in percent, and how many there are. What has no sense is null."""
    found: dict[str, dict[str, Any]] = {}
    for name, hits, truth, claims in zip(names, right.tolist(), there.tolist(), said.tolist(), strict=True):
        found[name] = {
            "precision": share(hits, claims), "recall": share(hits, truth), "f1": share(2 * hits, truth + claims),
            "count": truth,
        }  # fmt: skip
    return found


def share(part: float, whole: float) -> float | None:
    """In percent; null of nothing."""
    return round(100 * part / whole, 3) if whole else None


def macro(each: dict[str, dict[str, Any]], measure: str) -> float | None:
    """The mean over the classes that are there; one that was never said counts as 0."""
    values = [one[measure] or 0.0 for one in each.values() if one["count"]]
    return round(float(np.mean(values)), 3) if values else None


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Percent: mean of the precision at each right answer, the ranking's ties kept together. Null without one.

    Between ties precision is that at their end, so that equal scores say what chance says.
    """
    total = labels.sum()
    if not total:
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, ordered = labels[order].astype(np.float64), scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    hits = ranked.cumsum()[ends]
    gained = np.diff(np.concatenate([[0.0], hits]))
    return round(100 * float((gained * hits / (ends + 1)).sum() / total), 3)

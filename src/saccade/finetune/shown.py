"""What the report shows of a task's examination: bars beside baselines, tables, and pictures it got wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.errors import Unreadable
from saccade.finetune.task import Examples
from saccade.report.page import Bar, Bars, Cards, Comparison, Prose, Section, Table
from saccade.report.pictures import SMALL, Card, Tile, uri, visible

_MOST = 30
"""Classes that fit into a table of who is taken for whom."""


def of_classes(examples: Examples, result: Mapping[str, Any]) -> list[Section]:
    """Scores beside baselines, each class, who is taken for whom, and the pictures it was most wrong of."""
    found = [_scores(result), _each(result)]
    if "confusion" in result:
        found += [_confusion(result), *_worst(examples, result)]
    return found


def _scores(result: Mapping[str, Any]) -> Section:
    name = next(name for name in ("accuracy", "map") if name in result)
    bars = [Bar("this model", result[name], result.get("two_standard_errors"), "c0")]
    for who, scores in result.get("baselines", {}).items():
        if scores.get(name) is not None:
            bars.append(Bar(who, scores[name], None, "plain"))
    title = {"accuracy": "Percent right on test", "map": "Mean average precision on test, percent"}[name]
    limit = min(100.0, 1.15 * max(bar.value + (bar.spread or 0.0) for bar in bars))
    ece, nll = result["ece"], result["nll"]
    worth = (
        f"Probabilities: cross-entropy {nll['before']:.3f}, and {nll['after']:.3f} with the temperature; expected "
        f"calibration error {ece['before']:.1f} and {ece['after']:.1f} percent. The temperature was chosen on pictures "
        "that are in no part of test."
    )
    lines = [worth]
    gain = result.get("difference")
    if gain:
        bound = f"{gain['mean']:+.1f} ± {gain['two_standard_errors']:.1f} points"
        lines.insert(0, f"Beside raw pixels: {bound}, {gain['verdict']}.")
    return Section("Scores", "On test, which nothing was chosen by.",
                   [Comparison([Bars(title, bars, limit)]), Prose(lines)])  # fmt: skip


def _each(result: Mapping[str, Any]) -> Section:
    measures = [
        m for m in ("precision", "recall", "f1", "average_precision") if m in next(iter(result["classes"].values()))
    ]
    rows = [[name, *("" if one[m] is None else f"{one[m]:.1f}" for m in measures), str(one["count"])]
            for name, one in result["classes"].items()]  # fmt: skip
    table = Table("Percent, and how many there are", ["class", *(m.replace("_", " ") for m in measures), "count"], rows,
                  numbers=True, folded=len(rows) > 60)  # fmt: skip
    return Section("Each class", "", [table])


def _confusion(result: Mapping[str, Any]) -> Section:
    names, table = list(result["classes"]), result["confusion"]
    lede = "Rows are what a picture is, columns what was said."
    if len(names) > _MOST:
        pairs = sorted(((table[i][j], names[i], names[j]) for i in range(len(names)) for j in range(len(names))
                        if i != j and table[i][j]), reverse=True)[:_MOST]  # fmt: skip
        rows = [[truth, said, str(count)] for count, truth, said in pairs]
        return Section("Taken for another", "The commonest.", [Table("", ["is", "said", "times"], rows, numbers=True)])
    rows = [[name, *(str(count) if count else "·" for count in line)] for name, line in zip(names, table, strict=True)]
    return Section("Taken for another", lede, [Table("Pictures", ["", *names], rows, numbers=True)])


def _worst(examples: Examples, result: Mapping[str, Any]) -> list[Section]:
    at = {examples.keys[row]: row for row in examples.test.tolist()}
    captions = [(one["key"], f"{one['predicted']} {100 * one['confidence']:.0f} %, is {one['label']}")
                for one in result["worst"]]  # fmt: skip
    cards = cards_of(examples, [(at[key], caption) for key, caption in captions])
    if not cards:
        return []
    lede = "Where it was surest of a wrong class: look for wrong labels, and for what it has not been shown."
    return [Section("Most wrong", lede, [Cards(cards, least=140)])]


def cards_of(examples: Examples, rows: Sequence[tuple[int, str]]) -> list[Card]:
    """A card for each row that can be read, its caption below."""
    cards = []
    for row, caption in rows:
        with contextlib.suppress(Unreadable):
            pixels = examples.source[row].pixels
            if pixels is not None:
                key = examples.keys[row]
                cards.append(Card([Tile(uri(visible(pixels), SMALL), f"{key}: {caption}", caption)], key))
    return cards

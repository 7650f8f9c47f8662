"""The diagnosis as a page: the verdict, each culprit with its figures, and the pictures that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.diagnose.culprits import ADVICE
from saccade.diagnose.evidence import Finding, Side
from saccade.report.page import Cards, Page, Prose, Section, Table, Verdict, write_page
from saccade.report.pictures import Card, Tile, uri, visible

REPORT = "diagnosis.html"
_SHOWN = 12
_TITLES = {
    "labels": "Labels", "leakage": "Leaks across the split", "shift": "Shift of the test set",
    "backbone": "Backbone", "head": "Head",
}  # fmt: skip
_BESIDE = {
    "labels": "On the left a picture of train whose label others deny, beside it those nearest to it.",
    "leakage": "On the left a test picture, on the right the picture of train that it copies.",
    "shift": "On the left the test pictures farthest from train, beside each what is nearest in train.",
    "backbone": "On the left a test picture that the head gets wrong, beside it what the backbone takes for alike.",
    "head": "On the left a test picture that a stronger probe gets right and the head does not, and its neighbours.",
}  # fmt: skip
_FOOTER = "Written by saccade. This page is one file: it loads nothing and runs no script."


def write(
    run: Path,
    result: Mapping[str, Any],
    findings: Mapping[str, Finding],
    train: Side,
    test: Side,
    classes: Sequence[str],
) -> Path:
    """Writes diagnosis.html into the run's directory."""
    rows = [
        [_TITLES[name], "named" if one.found else "not named", one.measure, _shown(one), f"{one.threshold:g}"]
        for name, one in findings.items()
    ]
    table = Table("What was measured", ["Culprit", "", "Measure", "Value (95 %)", "Named from"], rows)
    named = [_TITLES[name].lower() for name in result["named"]]
    verdict = Verdict(
        "bad" if named else "good", ", ".join(named).capitalize() or "Nothing found",
        " ".join(f"{ADVICE[name][:1].upper()}{ADVICE[name][1:]}." for name in result["named"])
        or "None of the usual culprits shows: more labels or a better backbone would be the next thing to try.",
    )  # fmt: skip
    parts = [Section("Verdict", "", [verdict, table, *([Prose(result["warnings"])] if result["warnings"] else [])])]
    parts += [_section(one, train, test, classes) for one in findings.values()]
    figures = [
        ("of test named rightly", f"{result['right']:.1f} %"),
        ("pictures of train", f"{result['train']:,}"),
        ("pictures of test", f"{result['test']:,}"),
    ]
    lede = "Each culprit is told apart by a measurement of its own; several may be at work together."
    return write_page(run / REPORT, Page(f"Diagnosis of {run.name}", lede, figures, parts, footer=_FOOTER))


def _shown(one: Finding) -> str:
    if one.strength is None:
        return "-"
    value = f"{one.strength:.3g}"
    return value if one.interval is None else f"{value} ({one.interval[0]:.3g} to {one.interval[1]:.3g})"


def _section(one: Finding, train: Side, test: Side, classes: Sequence[str]) -> Section:
    reason = f"{one.reason[:1].upper()}{one.reason[1:]}."
    if not one.found or not one.rows:
        return Section(_TITLES[one.culprit], "", [Prose([reason])])
    side = train if one.side == "train" else test
    cards = []
    for row, beside in list(zip(one.rows, one.beside, strict=True))[:_SHOWN]:
        first = _tile(side, row, classes, told=one.side == "test")
        cards.append(Card([first, *(_tile(train, place, classes, told=False) for place in beside)], _name(side, row)))
    return Section(_TITLES[one.culprit], reason, [Prose([_BESIDE[one.culprit]]), Cards(cards, least=300)])


def _tile(side: Side, row: int, classes: Sequence[str], told: bool) -> Tile:
    label, guess = classes[side.labels[row]], classes[side.guesses[row]]
    caption = f"{label}, taken for {guess}" if told and label != guess else label
    return Tile(uri(visible(side.pixels[row])), f"{_name(side, row)}: {caption}", caption)


def _name(side: Side, row: int) -> str:
    return side.keys[row] if side.keys else f"row {row}"

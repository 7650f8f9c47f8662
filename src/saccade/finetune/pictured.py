"""What the report shows of heads on maps: bars beside what must be beaten, each class, and the pictures told worst."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.errors import Unreadable
from saccade.finetune.task import Examples
from saccade.report.page import Bar, Bars, Cards, Comparison, Prose, Section, Table
from saccade.report.pictures import SMALL, Card, Tile, uri, visible

SHOWN = 9


def sections(
    examples: Examples,
    result: Mapping[str, Any],
    measure: str,
    words: str,
    worst: Sequence[tuple[Mapping[str, Any], str]],
) -> list[Section]:
    """`measure` names the score, in percent, and `words` say what it is; `worst` are lines of what was told."""
    bars = [Bar("this model", max(0.0, result[measure]), None, "c0")]
    bars += [Bar(name, max(0.0, one[measure]), None, "plain") for name, one in result["baselines"].items()]
    gain, lines = result.get("difference") or {}, list[str]()
    if gain:
        bound = f"{gain['mean']:+.1f} ± {gain['two_standard_errors']:.1f}"
        lines.append(f"Beside the best of them ({gain['against']}): {bound} points, {gain['verdict']}.")
    limit = max(1.0, min(100.0, 1.15 * max(bar.value for bar in bars)))
    found = [Section("Scores", "On test, which nothing was chosen by.",
                     [Comparison([Bars(words, bars, limit)]), Prose(lines)])]  # fmt: skip
    if "classes" in result:
        columns = [result["classes"], *(one["classes"] for one in result["baselines"].values())]
        rows = [[name, *_spoken([column[name] for column in columns])] for name in result["classes"]]
        rivals = list(result["baselines"])
        table = Table("IoU in percent", ["class", "this model", *rivals], rows, numbers=True, folded=len(rows) > 60)
        found.append(Section("Each class", "", [table]))
    return [*found, *_worst(examples, worst)]


def _worst(examples: Examples, worst: Sequence[tuple[Mapping[str, Any], str]]) -> list[Section]:
    """Each picture beside what was said of it."""
    at, cards = {examples.keys[row]: row for row in examples.test.tolist()}, list[Card]()
    for line, caption in worst[:SHOWN]:
        with contextlib.suppress(Unreadable):
            pixels, key, shown = examples.source[at[line["key"]]].pixels, str(line["key"]), line.get("_shown")
            if pixels is not None and shown is not None:
                tiles = [Tile(uri(visible(pixels), SMALL), key, "picture"), Tile(uri(shown, SMALL), "said", caption)]
                cards.append(Card(tiles, key))
    lede = "Told worst: look for masks that are wrong, and for what was not shown in train."
    return [Section("Pictures", lede, [Cards(cards, least=280)])] if cards else []


def _spoken(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.1f}" for value in values]

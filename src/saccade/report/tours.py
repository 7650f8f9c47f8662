"""What only a tour has to show: who was better, the pictures themselves, and searches with pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.data import Source
from saccade.errors import Unreadable
from saccade.report.page import Bar, Bars, Cards, Comparison, Section
from saccade.report.pictures import SMALL, Card, Tile, chosen, uri, visible
from saccade.report.sections import CONTESTANTS
from saccade.search import Hit

_SHEET = 36
_TONES = {"pixels": "plain", "untrained": "c1", "pretrained": "c0"}


def comparison(result: Mapping[str, Any], scores: Mapping[str, Any]) -> Section:
    """Bars for each contestant: few labels, and k-NN with all of them."""
    labels = result["labels_per_class"]
    few = [Bar(words, result["few_label"][name]["mean"], result["few_label"][name]["std"], _TONES[name])
           for name, words in CONTESTANTS.items()]  # fmt: skip
    knn = [Bar(words, result["knn"][name], None, _TONES[name]) for name, words in CONTESTANTS.items()]
    chance = scores.get("baselines", {}).get("majority")
    note = f"The upright line is the most frequent class alone: {chance:.1f}." if chance is not None else ""
    verdict = result.get("verdict", {})
    groups = [
        Bars(f"{labels} labels a class", few, _limit(few), chance, _sentence(verdict.get("few_label"))),
        Bars("k-NN, all labels", knn, _limit(knn), chance, _sentence(verdict.get("knn"))),
    ]
    lede = (
        "Percent of the test pictures that are named rightly. All three get the same pictures, labels and draws; "
        f"the whiskers are the spread over draws. {note}"
    )
    return Section("What was gained", lede, [Comparison(groups)])


def _limit(bars: Sequence[Bar]) -> float:
    """Where the scale ends: the next ten above all of them, 100 at most."""
    top = max(bar.value + (bar.spread or 0) for bar in bars)
    return float(min(100, max(10, 10 * (int(top / 10) + 1))))


def _sentence(verdict: str | None) -> str:
    return f"Pretraining: {verdict}, with two standard errors." if verdict and "±" in verdict else (
        f"Pretraining: {verdict}." if verdict else "")  # fmt: skip


def said(scores: Mapping[str, Any], labels: int) -> str:
    """What came out with few labels, honestly, as the end of a sentence."""
    few = scores["differences"]["few_label"][str(labels)]
    rival = CONTESTANTS.get(str(few["against"]).partition("/")[0], str(few["against"]))
    margin = f"{abs(few['mean']):.1f} ± {few['two_standard_errors']:.1f} points"
    if few["verdict"] == "no difference":
        return f"did no better than {rival}"
    return f"beat {rival}, by {margin}" if few["verdict"] == "better" else f"fell {margin} short of {rival}"


def contact_sheet(source: Source) -> Section | None:
    """Some of the pictures that were learned from."""
    tiles: list[Tile] = []
    for row in chosen(source, 2 * _SHEET):
        with contextlib.suppress(Unreadable):
            sample = source[row]
            if sample.pixels is not None and len(tiles) < _SHEET:
                tiles.append(Tile(uri(visible(sample.pixels), 96), sample.key))
    if not tiles:
        return None
    return Section("The pictures", f"{len(tiles)} of the {len(source):,} that were learned from, chosen at random. "
                   "Their labels were put aside.", [Cards([Card(tiles, columns=12)], least=720)])  # fmt: skip


def search(searches: Sequence[Sequence[Hit]], source: Source) -> Section | None:
    """Queries and their neighbours as pictures; those of the query's class are marked."""
    wanted = {hit.key for hits in searches for hit in hits}
    rows = {key: row for row in range(len(source)) if (key := source.key(row)) in wanted}
    cards = []
    for hits in searches:
        query, *rest = (hit for hit in hits if hit.key in rows)
        label = source.label(rows[query.key])
        tiles = [_tile(source, rows[query.key], "query", f"query: {query.key}", "query")]
        for hit in rest:
            theirs = source.label(rows[hit.key])
            same = label is not None and theirs == label
            words = f"{hit.key}, cosine {hit.score:.2f}, {'the same class' if same else f'class {theirs}'}"
            tiles.append(_tile(source, rows[hit.key], f"{hit.score:.3f}", words, "same" if same else ""))
        cards.append(
            Card([tile for tile in tiles if tile is not None], f"{query.key}" + (f", {label}" if label else ""))
        )
    if not cards:
        return None
    lede = ("A test picture on the left, and the test pictures whose embeddings are nearest, with their cosines. "
            "A green frame marks the query's own class, which the network was never told.")  # fmt: skip
    return Section("Search", lede, [Cards(cards, least=460)])


def _tile(source: Source, row: int, caption: str, alt: str, mark: str) -> Tile | None:
    with contextlib.suppress(Unreadable):
        pixels = source[row].pixels
        return None if pixels is None else Tile(uri(visible(pixels), SMALL), alt, caption, mark)
    return None

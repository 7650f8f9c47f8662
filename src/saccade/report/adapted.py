"""What only an adapted backbone has to show: the way it went, what the gate says, and neighbours before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade import weights
from saccade.embed import examining
from saccade.encoder import Encoder
from saccade.report.charts import Line, chart, interval
from saccade.report.page import Cards, Charts, Prose, Section, Table, Verdict
from saccade.report.pictures import EXAMPLES, SMALL, Card, Gallery, Tile, embeddings, uri, visible
from saccade.run import Run

_NEIGHBOURS = 5
_ROWS = {"knn": "k-NN, percent", "linear": "linear probe, percent"}
_HINTS = {
    "rank": "effective rank",
    "spread": "spread",
    "agreement": "neighbours that agree across views",
    "drift": "distance from the start (1 - cosine)",
    "kept": "neighbours that are the start's",
}


def way(run: Run) -> Section | None:
    """Score over time with the start's and the roll-backs; the gate's interval; numbers before and after."""
    record = run.record
    if "gate" not in record:
        return None
    before, after, gate = (record[name] for name in ("before", "after", "gate"))
    passed = {True: ("good", "Better"), False: ("bad", "Refused"), None: ("bad", "Unverified")}[gate["passed"]]
    said = f"Handed over: the {gate['handed_over']}. {gate['reason'][:1].upper()}{gate['reason'][1:]}."
    blocks: list[Any] = [Verdict(*passed, said)]
    drawn = [_score(run, before), _gap(gate)]
    if any(drawn):
        blocks.append(Charts([found for found in drawn if found is not None]))
    rows = _rows(before, after)
    if "zero_shot" in gate:
        rows.append(["zero-shot, percent (gate)", *(f"{gate['zero_shot'][when]:.1f}" for when in ("before", "after"))])
    blocks.append(Table("The start and the candidate", ["", "start", "candidate"], rows, numbers=True))
    if record.get("advice"):
        blocks.append(Prose([f"Advice before it began, by rules of thumb: {record['advice']['why']}."]))
    lede = (
        "Fresh heads learned on a still backbone; then it moved, slowly and held to the start. Hints need no "
        "labels and prove nothing: a higher rank is not better."
    )
    return Section("The way and the gate", lede, blocks)


def _score(run: Run, before: Mapping[str, Any]) -> Any:
    found = [(entry["step"], entry["eval"]) for entry in run.metrics() if "turn" in (entry.get("eval") or {})]
    name = "knn" if "watch" in before else "drift"
    line = Line([step for step, _ in found], [one[name] for _, one in found if one.get(name) is not None])
    if len(line.steps) != len(line.values):
        return None
    fallen = [step for step, one in found if one["turn"] == "fell"]
    title = "k-NN on the pictures that choose" if name == "knn" else "Distance from the start"
    level = ("the start", float(before["watch"]["knn"])) if name == "knn" else None
    return chart(title, line, unit="percent" if name == "knn" else "1 - cosine", level=level, marks=fallen)


def _gap(gate: Mapping[str, Any]) -> Any:
    if "upper" not in gate:
        return None
    return interval("Candidate minus start, pictures that chose nothing", gate["bound"], gate["difference"],
                    gate["upper"], unit="points of k-NN, 90 % interval")  # fmt: skip


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for part, words in (("watch", "chosen by"), ("test", "test")):
        for name, title in _ROWS.items():
            if name in before.get(part, {}):
                rows.append([f"{title} ({words})", *(f"{one[part][name]:.1f}" for one in (before, after))])
    for name, title in _HINTS.items():
        values = [one["hints"].get(name) for one in (before, after)]
        if any(value is not None for value in values):
            rows.append([f"{title} (hint)", *("" if value is None else f"{value:.3g}" for value in values)])
    return rows


def neighbours(run: Run, gallery: Gallery | None) -> Section | None:
    """For some pictures their nearest by the start, and below them by the candidate."""
    if gallery is None or len(gallery.keys) <= _NEIGHBOURS or not (run.path / "best").is_dir():
        return None
    side, channels = gallery.inputs.shape[-1], gallery.inputs.shape[1]
    origin = run.record["initial"].get("path") or run.config["init"]
    encoders = {
        "start": weights.load(origin, image_size=side, channels=channels),
        "candidate": weights.load(run.path / "best", image_size=side, channels=channels),
    }
    found = {name: _nearest(encoder, gallery) for name, encoder in encoders.items()}
    cards = []
    for place in range(min(EXAMPLES, len(gallery.keys))):
        tiles = []
        for name, rows in found.items():
            tiles.append(_tile(gallery, place, f"nearest by the {name}", "query"))
            tiles += [_tile(gallery, row, name) for row in rows[place]]
        cards.append(Card(tiles, gallery.keys[place], columns=_NEIGHBOURS + 1))
    lede = f"Above the {_NEIGHBOURS} nearest of some pictures by the start, below by the candidate."
    return Section("Neighbours before and after", lede, [Cards(cards, least=460)])


def _nearest(encoder: Encoder, gallery: Gallery) -> list[list[int]]:
    with examining(encoder):
        vectors = embeddings(encoder, gallery.inputs)
    likeness = (vectors @ vectors.T).fill_diagonal_(-1)
    return likeness[:EXAMPLES].topk(_NEIGHBOURS, dim=1).indices.tolist()


def _tile(gallery: Gallery, row: int, caption: str, mark: str = "") -> Tile:
    return Tile(uri(visible(gallery.inputs[row]), SMALL), f"{caption}: {gallery.keys[row]}", caption, mark)

"""The whole way in some minutes: pretrain, evaluate, embed and search on the pictures that come with the package."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saccade import report
from saccade.embed import embed
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate
from saccade.run import Run, memory_gb, write_json
from saccade.search import Hit
from saccade.sources import open_source
from saccade.train import pretrain

PICTURES = Path(__file__).parent / "pictures"
LABELS = 10
"""Labels a class in the few-label task."""
RECIPE = "simclr:small_machine"
MINUTES = 2.5
SETTINGS: dict[str, Any] = {"flip": 0.0, "min_scale": 0.4}
"""Mirrored letters are other letters, and a crop must show a whole one."""

SEARCHES = 6
"""How many test pictures the report looks for neighbours of."""

CONTESTANTS = {"pixels": "raw pixels", "untrained": "the same network, untrained", "pretrained": "pretrained"}


@dataclass(frozen=True)
class _Places:
    """What a tour leaves in its directory."""

    run: Path
    scores: Path
    index: Path
    result: Path
    report: Path

    @classmethod
    def of(cls, out: Path) -> _Places:
        return cls(out / "run", out / "evaluation.json", out / "index", out / "tour.json", out / "report.html")


def tour(*, out: str | Path = "saccade-tour") -> dict[str, Any]:
    """Pretrains, evaluates, embeds and searches in `out`; the keys are those of `saccade tour --json`.

    The same call goes on where it was stopped, and repeats what came out where it had ended. Raises `SaccadeError`,
    also for a directory that holds something else.
    """
    place = Path(out).expanduser()
    places = _Places.of(place)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    state = _begin(place, places)
    if state.get("done"):
        console.print(f"This tour has ended; nothing was done again. Its results are in {place}.", markup=False)
        _show(console, state["result"], places)
        return dict(state["result"])
    before, started = float(state.get("seconds", 0.0)), time.monotonic()

    def spent() -> float:
        return round(before + time.monotonic() - started, 1)

    def say(line: str) -> None:
        console.print(line, markup=False)
        write_json(places.result, {"tour": RECIPE, "seconds": spent()})

    try:
        run, scores, searches = _walk(places, say)
    except BaseException:
        write_json(places.result, {"tour": RECIPE, "seconds": spent()})
        raise
    result = _result(run, scores, places, spent())
    _report(places, result, scores, run, searches)
    write_json(places.result, {"tour": RECIPE, "done": True, "result": result})
    _show(console, result, places)
    return result


def _begin(place: Path, places: _Places) -> dict[str, Any]:
    """What is known of the tour in this directory. Raises `SaccadeError` where there is something else."""
    if places.result.is_file():
        try:
            state = json.loads(places.result.read_text(encoding="utf-8"))
            assert state["tour"] == RECIPE
        except (ValueError, KeyError, TypeError, AssertionError):
            raise SaccadeError(f"{places.result} is not of a tour", path="--out", hint="name a new directory") from None
        return dict(state)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SaccadeError(
            f"{place} exists and is not a tour's directory", path="--out", hint="name an empty or a new one"
        )
    place.mkdir(parents=True, exist_ok=True)
    return {}


def _walk(places: _Places, say: Callable[[str], None]) -> tuple[Run, dict[str, Any], list[list[Hit]]]:
    """The story, verb by verb, each of which goes on where it was stopped."""
    train, test = PICTURES / "train.tar", PICTURES / "test.tar"
    pictures = open_source(train)
    kinds = sorted({pictures.key(index).split("/")[-2] for index in range(len(pictures))})
    say(
        f"1 of 5  Look: {len(pictures):,} scraps of printed pages in {len(kinds)} scripts "
        f"({', '.join(kinds[:3])}, …), and {len(open_source(test)):,} more in other typefaces for the examination."
    )
    say(
        f"2 of 5  Hide the labels and learn for {MINUTES:g} minutes: two crops of each picture, coloured differently; "
        "which two belong together?"
    )
    run = pretrain(train, recipe=RECIPE, out=places.run, save_every="1m", minutes=MINUTES, **SETTINGS)
    say(f"3 of 5  Ask for {LABELS} labels a script, and compare with raw pixels and the same network untrained.")
    if not places.scores.exists():
        evaluate(places.run, PICTURES, tasks=("knn", "few-label"), labels=(LABELS,), out=places.scores)
    scores = json.loads(places.scores.read_text(encoding="utf-8"))
    say("4 of 5  Turn every picture of the examination into a vector.")
    index = embed(places.run, test, out=places.index, tokens=(scores["pooled"]["chosen"],))
    queries = index.keys[:: max(1, len(index) // SEARCHES)][:SEARCHES]
    say(f"5 of 5  Search: the nearest neighbours of {len(queries)} of them, and the report.")
    return run, scores, [index.search(key=query, k=6) for query in queries]


def _result(run: Run, scores: dict[str, Any], places: _Places, seconds: float) -> dict[str, Any]:
    """What `saccade tour --json` prints."""
    contestants = {**{name: scores["baselines"][name] for name in ("pixels", "untrained")}, "pretrained": scores}
    few = {name: found["few_label"][str(LABELS)] for name, found in contestants.items()}
    return {
        "seconds": seconds,
        "peak_memory_gb": round(max(memory_gb(), run.summary["memory_gb"]), 3),
        "images": scores["split"]["train"] + scores["split"]["test"],
        "labels_per_class": LABELS,
        "knn": {name: found["knn"] for name, found in contestants.items()},
        "few_label": {name: {"mean": found["mean"], "std": found["std"]} for name, found in few.items()},
        "verdict": {"knn": _verdict(scores["differences"]["knn"]),
                    "few_label": _verdict(scores["differences"]["few_label"][str(LABELS)])},
        "report": str(places.report),
    }  # fmt: skip


def _verdict(found: dict[str, Any]) -> str:
    """A paired difference in a sentence."""
    against = CONTESTANTS[found["against"].partition("/")[0]] if "border" not in found["against"] else "the border"
    if found["verdict"] == "no difference":
        return f"no difference from {against}"
    how = "gained" if found["verdict"] == "better" else "lost"
    return f"{how} {abs(found['mean']):.1f} ± {found['two_standard_errors']:.1f} points against {against}"


def _figures(result: dict[str, Any]) -> report.Table:
    """The scores as text."""
    rows = [
        (words, f"{result['knn'][name]:.1f}", "{mean:.1f} ± {std:.1f}".format(**result["few_label"][name]))
        for name, words in CONTESTANTS.items()
    ]
    rows.append(("verdict", result["verdict"]["knn"], result["verdict"]["few_label"]))
    return report.Table("Right, in percent", ("features", "k-NN, all labels", f"{LABELS} labels a class"), rows)


def _where(places: _Places) -> report.Table:
    """What lies where."""
    rows = [
        ("run and backbone", str(places.run)),
        ("evaluation", str(places.scores)),
        ("index of the test pictures", str(places.index)),
        ("report", str(places.report)),
    ]
    return report.Table("Where it is", ("what", "path"), rows)


def _story(result: dict[str, Any], scores: dict[str, Any], run: Run) -> list[str]:
    """The tour in the words of its report, a paragraph for each step."""
    split, minutes = scores["split"], run.summary["seconds"] / 60
    arch = run.summary["arch"]
    hidden = f"Hide the labels. A network ({arch}) learns by the recipe {RECIPE} for {minutes:.1f} minutes"
    asked = f"Ask for {LABELS} labels a class. The network stays as it is; a linear classifier on its features learns"
    gained = f"with {LABELS} labels a class: {result['verdict']['few_label']}"
    return [
        f"Look at the data: {split['train']:,} scraps of printed pages, in {split['classes']} scripts.",
        f"{hidden}, and sees nothing but the pictures.",
        f"{asked} from these few, and names {split['test']:,} pictures that neither has seen.",
        "Compare. Raw pixels, and the same network before it had learned anything, get the same labels.",
        "Search. Every test picture becomes a vector; the nearest vectors should be of pictures of one class.",
        f"In short, {gained}; by k-NN with all labels: {result['verdict']['knn']}.",
    ]


def _report(
    places: _Places, result: dict[str, Any], scores: dict[str, Any], run: Run, searches: list[list[Hit]]
) -> None:
    """The page: the story, the comparison, pictures, searches, and all that the run's own report shows."""
    report.write_tour(
        places.report,
        result=result,
        scores=scores,
        run=run,
        searches=searches,
        train=open_source(PICTURES / "train.tar"),
        test=open_source(PICTURES / "test.tar"),
        story=_story(result, scores, run),
    )


def _show(console: Console, result: dict[str, Any], places: _Places) -> None:
    """The figures and the places on the screen."""
    for table in (_figures(result), _where(places)):
        drawn = Table(*table.columns, title=table.title)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    console.print(
        f"{result['seconds']:.0f} seconds, {result['peak_memory_gb']:.1f} GB of memory at most. "
        f"Next: saccade pretrain YOUR_PICTURES --recipe {RECIPE} --minutes 30 --out RUN",
        markup=False,
    )

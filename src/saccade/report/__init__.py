"""What came out, as one HTML file that needs nothing beside it: no script, no network; light, dark, and on paper."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.data import Source, Tokenize
from saccade.embed import examining
from saccade.encoder import Encoder
from saccade.model import build
from saccade.reading import Reading
from saccade.recipe import Recipe, Training
from saccade.report import adapted, hidden, pictures, sections, tours
from saccade.report.charts import number
from saccade.report.hidden import Hidden
from saccade.report.page import Page, Prose, Section, Table, sections_of, write_page
from saccade.report.pictures import glimpse
from saccade.run import Run
from saccade.search import Hit

__all__ = ["Table", "shown_by", "write_run", "write_tour"]

REPORT = "report.html"
_FOOTER = "Written by saccade. This page is one file: it loads nothing and runs no script."


Shown = Mapping[str, Float[Tensor, "b c h w"]] | Hidden | None
"""Pictures in [0, 1] by caption, as `Method.show` gives them; of texts alone, hidden words and what is said of them."""


def shown_by(
    page: Recipe, config: Training, source: Source, tensors: Mapping[str, Tensor], tokenize: Tokenize | None = None
) -> Callable[[], Shown]:
    """What a method makes of a few samples, when it is called; `tensors` are the state of the trained method."""

    @torch.no_grad()
    def show() -> Shown:
        if config.pieces() is not None and isinstance(tokenize, Reading):
            return hidden.hidden(page, config, source, tensors, tokenize)
        method, _ = build(page, config, None)
        method.load_state_dict(dict(tensors))
        return method.eval().show(glimpse(page, config, source)[1])

    return show


def write_run(
    run: Run,
    *,
    shown: Shown | Callable[[], Shown],
    encoder: Encoder | None,
    source: Source,
    scores: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `report.html` into the run's directory, and returns where it is.

    `shown` is what `shown_by` gives, or what that makes; `encoder` is what was learned, or None
    where it takes no pictures; `source` the run's own data; `scores` the result of `evaluate`, if there is one. What
    the run cannot show is left out; what fails is named in its place, for a report never ends a run.
    """
    parts: list[tuple[str, Callable[[], Section | None]]] = [
        ("The way and the gate", lambda: adapted.way(run)),
        ("Health", lambda: sections.health(run)),
        ("Training", lambda: sections.training(run)),
        ("Texts", lambda: sections.texts(run)),
        ("What the features know", lambda: sections.live(run)),
        ("Evaluation", lambda: sections.evaluation(scores) if scores and "baselines" in scores else None),
        ("What the method makes of its data", lambda: _shown(shown() if callable(shown) else shown)),
        ("Views", lambda: sections.views(run, source)),
    ]
    if encoder is not None and len(encoder.grid) == 2:
        gallery = functools.cache(lambda: pictures.gather(source, encoder.preprocess, sections.pool(encoder)))
        parts += [
            ("What the features see", lambda: sections.maps(encoder, gallery())),
            ("Nearest neighbours", lambda: sections.neighbours(encoder, gallery())),
            ("Neighbours before and after", lambda: adapted.neighbours(run, gallery())),
        ]
    parts.append(("Record", lambda: sections.record(run)))
    with contextlib.nullcontext() if encoder is None else examining(encoder):
        page = Page(_title(run), _lede(run), _figures(run), _made(parts), of_run=True, footer=_FOOTER)
    return write_page(run.path / REPORT, page)


def _shown(found: Shown) -> Section | None:
    return sections.made(found) if isinstance(found, Mapping) else hidden.section(found)


def _made(parts: Sequence[tuple[str, Callable[[], Section | None]]]) -> list[Section]:
    """The sections that there are. One that fails says why in its place: the run itself went well."""
    found = []
    for title, make in parts:
        try:
            section = make()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            section = Section(title, "", [Prose([f"This could not be shown: {reason}"])])
        if section is not None:
            found.append(section)
    return found


def _title(run: Run) -> str:
    return f"{run.config['recipe']} on {run.config['settings']['arch']}"


def _lede(run: Run) -> str:
    config, known, summary = run.config, run.record, run.summary
    samples = known.get("data", {}).get("samples")
    steps, batch = known.get("steps"), config["settings"].get("batch")
    what = f"{samples:,} samples" if samples else "its data"
    length = f" in {sections.plural(steps, 'step')} of {batch}" if steps and batch else ""
    took = f", which took {sections.duration(summary['seconds'])}" if "seconds" in summary else ""
    return (
        f"{config['settings']['arch']} learned from {what}, without labels,{length}{took}. The run is {run.path.name}."
    )


def _figures(run: Run) -> list[tuple[str, str]]:
    """What one looks for first."""
    summary = run.summary
    tested = summary.get("eval") or [{}]
    health = summary.get("health") or {}
    figures = [
        ("loss at the end", summary.get("loss")),
        ("k-NN, percent", tested[-1].get("knn")),
        ("linear probe, percent", tested[-1].get("linear")),
        ("effective rank", health.get("rank")),
        ("samples a second", summary.get("images_per_second")),
    ]
    found = [(name, number(float(value))) for name, value in figures if isinstance(value, int | float)]
    if "data_wait" in summary:
        found.append(("of the time waiting for data", f"{100 * summary['data_wait']:.1f} %"))
    return found


def write_tour(
    path: Path,
    *,
    result: Mapping[str, Any],
    scores: Mapping[str, Any],
    run: Run,
    searches: Sequence[Sequence[Hit]],
    train: Source,
    test: Source,
    story: Sequence[str],
) -> Path:
    """Writes the page of a tour: the story, the comparison, pictures, searches, and all sections of the run's report.

    `result` is what `saccade tour --json` prints, `scores` that of `evaluate`; each of `searches` begins with its
    query, a key of `test`; `story` has a paragraph for each step.
    """
    parts: list[tuple[str, Callable[[], Section | None]]] = [
        ("The story", lambda: Section("The story", "", [Prose(list(story), numbered=True)])),
        ("What was gained", lambda: tours.comparison(result, scores)),
        ("The pictures", lambda: tours.contact_sheet(train)),
        ("Search", lambda: tours.search(searches, test)),
        ("Evaluation", lambda: sections.evaluation(scores)),
    ]
    few, labels = result["few_label"]["pretrained"], result["labels_per_class"]
    figures = [
        (f"percent right from {labels} labels a class", f"{few['mean']:.1f} ± {few['std']:.1f}"),
        ("percent right by k-NN", f"{result['knn']['pretrained']:.1f}"),
        ("pictures", f"{result['images']:,}"),
        ("in all", sections.duration(result["seconds"])),
        ("GB of memory at most", f"{result['peak_memory_gb']:.1f}"),
    ]
    lede = (
        f"A network that has never seen a label looked at {scores['split']['train']:,} pictures. "
        f"Asked with {labels} labels a class, it {tours.said(scores, labels)}. "
        "The labels served the examination alone."
    )
    page = Page(
        "A tour of saccade", lede, figures, _made(parts), appended=sections_of(run.path / REPORT), footer=_FOOTER
    )
    return write_page(path, page)

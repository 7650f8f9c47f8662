"""The report of a task: what the model scores beside what must be beaten, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade.finetune.task import Examples
from saccade.finetune.tuned import Tuned
from saccade.report import sections
from saccade.report.charts import Line, chart
from saccade.report.page import Charts, Facts, Page, Prose, Section, write_page
from saccade.run import Run

REPORT = "report.html"
_FOOTER = "Written by saccade. This page is one file: it loads nothing and runs no script."


def write(run: Run, model: Tuned, told: list[dict[str, Any]], examples: Examples, result: Mapping[str, Any]) -> Path:
    """Writes `report.html` into the run's directory. A section that fails says why: a report never ends a run."""
    summary = run.summary
    shown = model.task.part("sections")
    found: list[Section] = []
    try:
        found += shown(told, examples, result) if shown is not None else []
    except Exception as error:
        found.append(Section("Scores", "", [Prose([f"This could not be shown: {error}"])]))
    for make in (_tuning, _choice, _warnings):
        section = make(summary)
        found += [section] if section is not None else []
    found.append(sections.record(run))
    figures = [(name.replace("_", " "), f"{value:.1f}") for name, value in result.items() if isinstance(value, float)]
    split, config = summary["split"], run.config
    how = {"frozen": "a head on features that stand still", "lora": "a head, and thin additions to the backbone",
           "full": "head and backbone together"}[summary["mode"]]  # fmt: skip
    lede = (
        f"From {Path(str(config['backbone'])).name}: {how}. "
        f"Learned from {split.get('train', 0) + split.get('held', 0):,} pictures, examined on "
        f"{split.get('test', 0):,} others, in {sections.duration(summary['seconds']['total'])} in all."
    )
    page = Page(f"{summary['task']} on {Path(str(config['data'])).name}", lede, figures[:5], found, footer=_FOOTER)
    return write_page(run.path / REPORT, page)


def _tuning(summary: Mapping[str, Any]) -> Section | None:
    """Scores of the held-out part after each epoch."""
    lines = summary["chosen"].get("evaluations")
    if not lines:
        return None
    drawn = []
    for name in [name for name in lines[0] if name != "epoch"]:
        line = Line([one["epoch"] for one in lines], [one[name] for one in lines])
        made = chart(name.replace("_", " "), line, unit="held out of train")
        drawn += [made] if made is not None else []
    best = summary["chosen"]["best"]
    lede = f"The best was step {best.get('step')}: {best.get('value', 0):.1f} ({best.get('measure')})."
    return Section("Tuning", lede, [Charts(drawn)]) if drawn else None


def _choice(summary: Mapping[str, Any]) -> Section:
    """What the held-out part decided."""
    left_out = ("evaluations", "poolings", "best")
    rows = [(name, sections.text_of(value)) for name, value in _flat(summary["chosen"], left_out)]
    return Section("What was chosen", "On pictures of train that were not learned from; test decided nothing.",
                   [Facts("The head", rows)])  # fmt: skip


def _warnings(summary: Mapping[str, Any]) -> Section | None:
    named = [f"{one['key']}: {one['reason']}" for one in (*summary["unreadable"], *summary["set_aside"])]
    if not summary["warnings"] and not named:
        return None
    return Section("Worth knowing", "", [Prose([*summary["warnings"], *named])])


def _flat(content: Mapping[str, Any], without: tuple[str, ...], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        if name in without:
            continue
        rows += (
            _flat(value, without, f"{prefix}{name} ") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
        )
    return rows

"""The page: sections of blocks, and the one HTML file that they become."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from saccade.report.charts import Chart
from saccade.report.pictures import Card

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_MARKS = ("<!-- sections of a run begin -->", "<!-- sections of a run end -->")


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of text; numbers come formatted. Folded: only the title shows."""

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    title: str
    rows: Sequence[tuple[str, str]]
    folded: bool = False


@dataclass(frozen=True)
class Charts:
    """Curves side by side."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Cards:
    """Cards of pictures side by side; `least` is the width in pixels that one needs."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]
    least: int = 300


@dataclass(frozen=True)
class Bar:
    """A length in percent, its spread, and what stands beside it. `tone` is a colour class."""

    name: str
    value: float
    spread: float | None
    tone: str


@dataclass(frozen=True)
class Bars:
    """A group of bars on one scale from zero to `limit`; `level` is marked in each."""

    title: str
    bars: Sequence[Bar]
    limit: float
    level: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Groups of bars side by side."""

    kind: ClassVar[str] = "comparison"
    groups: Sequence[Bars]


@dataclass(frozen=True)
class Verdict:
    """A word that says how it is, and a sentence that says what to do."""

    kind: ClassVar[str] = "verdict"
    tone: str
    word: str
    text: str


@dataclass(frozen=True)
class Prose:
    """Paragraphs; numbered where they are steps."""

    kind: ClassVar[str] = "prose"
    lines: Sequence[str]
    numbered: bool = False


Block = Table | Facts | Charts | Cards | Comparison | Verdict | Prose


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two under it, and blocks."""

    title: str
    lede: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in the page's own links."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A title, what came out in a sentence, figures that stand out, and sections; then those of a `run`, if any."""

    title: str
    lede: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    of_run: bool = False
    appended: str = ""
    footer: str = ""


def write_page(path: Path, page: Page) -> Path:
    """Writes the page beside and renames it, so that a reader never sees half of it. All text is escaped."""
    contents = [(section.anchor, section.title) for section in page.sections]
    appended = page.appended
    for anchor, _ in contents:  # what the page shows itself is not shown twice
        appended = re.sub(rf'<section id="{anchor}">.*?</section>', "", appended, flags=re.DOTALL)
    contents += re.findall(r'<section id="([\w-]+)">\s*<h2>([^<]+)</h2>', appended)
    text = _ENVIRONMENT.get_template("page.html").render(page=page, appended=appended, contents=contents, marks=_MARKS)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path


def sections_of(path: Path) -> str:
    """The sections of a run's report as they stand in its file, for a page that holds more; "" where there are none."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    _, found, rest = text.partition(_MARKS[0])
    return rest.partition(_MARKS[1])[0] if found else ""

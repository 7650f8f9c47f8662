"""What came out, as one HTML file that needs nothing beside it: no script, no network, light and dark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of text; numbers come formatted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --quiet: #59636e; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14171a; --line: #363c43; --quiet: #9aa4ae; } }
  body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 46rem;
         margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
           overflow-wrap: anywhere; }
  th { color: var(--quiet); font-weight: 600; }
</style>
<h1>{{ title }}</h1>
{% for line in lines %}<p>{{ line }}</p>
{% endfor %}{% for table in tables %}<h2>{{ table.title }}</h2>
<table>
<tr>{% for column in table.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}</html>
"""


def write(path: Path, title: str, lines: Sequence[str], tables: Sequence[Table]) -> None:
    """Writes the page beside and renames it, so that a reader never sees half of it. All text is escaped."""
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(page.render(title=title, lines=lines, tables=tables), encoding="utf-8")
    os.replace(beside, path)

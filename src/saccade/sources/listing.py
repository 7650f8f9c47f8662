"""A text file with one path a line, or a CSV file with a `path` column; paths are relative to the file's folder."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from saccade.errors import SaccadeError, nearest
from saccade.sources.strings import Strings

EXTENSIONS = (".txt", ".lst", ".list", ".csv", ".tsv")


def read_list(path: Path) -> tuple[Strings, dict[str, Strings]]:
    """The paths, and by name the other columns. Raises `SaccadeError` when it is empty or names nothing that exists."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            if path.suffix.lower() in (".csv", ".tsv"):
                paths, columns = _table(
                    path, csv.reader(lines, "excel-tab" if path.suffix.lower() == ".tsv" else "excel")
                )
            else:
                paths, columns = [line for line in (line.rstrip("\r\n") for line in lines) if line.strip()], {}
    except (OSError, csv.Error) as error:
        raise SaccadeError(f"cannot read the list {path}: {error}", path=path) from None
    if not paths:
        raise SaccadeError(
            f"the list {path} names no pictures", path=path, hint="one path a line, relative to its folder"
        )
    if not any(os.path.exists(os.path.join(path.parent, name)) for name in paths[:100]):
        raise SaccadeError(
            f"the list {path} names files that do not exist, first {paths[0]!r}",
            path=path,
            hint=f"paths are relative to the list's folder, {path.parent.resolve()}",
        )
    return Strings(name.removeprefix("./") for name in paths), {
        name: Strings(column) for name, column in columns.items()
    }


def _table(path: Path, rows: Iterator[list[str]]) -> tuple[list[str], dict[str, list[str]]]:
    """The `path` column and the others of a table with a header."""
    header = [name.strip() for name in next(rows, [])]
    if not header:
        raise SaccadeError(
            f"the list {path} is empty", path=path, hint="its first line names the columns, one of them `path`"
        )
    if "path" not in header:
        raise SaccadeError(
            f"the list {path} has no column `path`, only {', '.join(header)}",
            path=path,
            hint=nearest("path", header) + " rename it in the first line",
        )
    columns: dict[str, list[str]] = {name: [] for name in header}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise SaccadeError(f"line {number} of {path} has {len(row)} cells, the header {len(header)}", path=path)
        for name, cell in zip(header, row, strict=True):
            columns[name].append(cell)
    return columns.pop("path"), columns

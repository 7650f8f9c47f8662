"""A text file with one path a line, or a table with a `path` column; paths are relative to its folder.

Tables are CSV, TSV, JSONL and Parquet, and may hold captions (`captions.chosen` says in which columns): one a row,
several in columns or in a JSON list, or rows of the same path.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from saccade.errors import SaccadeError, nearest
from saccade.sources.captions import Column, chosen, encoded
from saccade.sources.parquet import schema_of
from saccade.sources.strings import Strings

EXTENSIONS = (".txt", ".lst", ".list", ".csv", ".tsv", ".jsonl", ".parquet")
TABLES = (".csv", ".tsv", ".jsonl")
_PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "key")
"""Names of the column that says which picture a row is of."""


class Listed(NamedTuple):
    """Paths, the other columns by name, and the captions where they were asked for."""

    keys: Strings
    columns: dict[str, Strings]
    captions: Column | None


def read_list(path: Path, texts: bool = False) -> Listed:
    """What a list names; with `texts` also its captions, and then a path that comes again adds to its captions.

    Raises `SaccadeError` when it is empty, names nothing that exists, or has no captions where they are wanted.
    """
    paths, columns = read_columns(path)
    if not any(os.path.exists(os.path.join(path.parent, name)) for name in paths[:100]):
        raise SaccadeError(
            f"the list {path} names files that do not exist, first {paths[0]!r}",
            path=path,
            hint=f"paths are relative to the list's folder, {path.parent.resolve()}",
        )
    captions = None
    if texts:
        paths, columns, said = _merged(path, paths, columns)
        captions = Column.of(said)
    named = {name: Strings(map(cell_of, column)) for name, column in columns.items()}
    return Listed(Strings(name.removeprefix("./") for name in paths), named, captions)


def read_columns(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """The paths of a list as they stand there, and its other columns. Raises `SaccadeError` where it names nothing."""
    try:
        paths, columns = _columns(path)
    except (OSError, csv.Error) as error:
        raise SaccadeError(f"cannot read the list {path}: {error}", path=path) from None
    if not paths:
        raise SaccadeError(
            f"the list {path} names no pictures", path=path, hint="one path a line, relative to its folder"
        )
    return paths, columns


def _columns(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    if path.suffix.lower() == ".parquet":
        return _named(path, *_parquet(path))
    if path.suffix.lower() in TABLES:
        return _named(path, *table_of(path))
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        return [line for line in (line.rstrip("\r\n") for line in lines) if line.strip()], {}


def table_of(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns of CSV, TSV or JSONL, by name and in order. Raises `SaccadeError`, `OSError` and `csv.Error`."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        if path.suffix.lower() == ".jsonl":
            return _objects(path, lines)
        csv.field_size_limit(1 << 27)  # captions of any length; they are cut where they are read
        dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
        return _table(path, csv.reader(lines, dialect))


def _named(path: Path, header: list[str], columns: dict[str, list[Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """The column of paths, and the others."""
    named = next((name for name in _PATHS if name in header), None)
    if named is None:
        raise SaccadeError(
            f"the list {path} has no column `path`, only {', '.join(header)}",
            path=path,
            hint=nearest("path", header) + " rename it in the first line",
        )
    return [cell_of(value) for value in columns.pop(named)], columns


def _table(path: Path, rows: Iterator[list[str]]) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns of a table with a header."""
    header = [name.strip() for name in next(rows, [])]
    if not header:
        raise SaccadeError(
            f"the list {path} is empty", path=path, hint="its first line names the columns, such as `path`, `text`"
        )
    columns: dict[str, list[Any]] = {name: [] for name in header}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise SaccadeError(f"line {number} of {path} has {len(row)} cells, the header {len(header)}", path=path)
        for name, cell in zip(header, row, strict=True):
            columns[name].append(cell)
    return header, columns


def _objects(path: Path, lines: Iterator[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """The fields of JSON objects, one a line, as columns; None where an object has no such field."""
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SaccadeError(f"line {number} of {path} is no JSON: {error}", path=path) from None
        if not isinstance(record, dict):
            raise SaccadeError(f"line {number} of {path} holds no JSON object", path=path)
        records.append(record)
    header = list(dict.fromkeys(name for record in records for name in record))
    if not header:
        raise SaccadeError(f"the list {path} is empty", path=path, hint='a line: {"path": …, "caption": …}')
    return header, {name: [record.get(name) for record in records] for name in header}


def _parquet(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns of a Parquet file that names pictures. Raises `SaccadeError` for what is no such list."""
    schema_of(path)
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise SaccadeError(f"cannot read the list {path}: {error}", path=path) from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    inside = [name for name, values in columns.items() if any(isinstance(v, bytes | dict) for v in values[:100])]
    if inside:
        raise SaccadeError(
            f"{path} holds bytes or records in its column {inside[0]!r}, and a list names files",
            path=path,
            hint="pictures are a column of bytes, or of records {bytes, path}",
        )
    return list(columns), columns


def _merged(
    path: Path, paths: list[str], columns: dict[str, list[Any]]
) -> tuple[list[str], dict[str, list[Any]], list[list[str]]]:
    """Each path once, with its first row's other columns and the captions of all its rows."""
    names = chosen(columns)
    if not names:
        raise SaccadeError(
            f"the list {path} has no captions, only {', '.join(['paths', *columns])}",
            path=path,
            hint="name their column `caption` (or `caption1`, `caption2`, …)",
        )
    rows: dict[str, int] = {}
    said: list[list[str]] = []
    first: list[int] = []
    for number, name in enumerate(paths):
        place = rows.setdefault(name, len(rows))
        if place == len(said):
            said.append([])
            first.append(number)
        for column in names:
            value = columns[column][number]
            several = value if isinstance(value, list) else [value]
            said[place] += [encoded(item).decode("utf-8", "surrogateescape") for item in several if item is not None]
    others = {name: [column[row] for row in first] for name, column in columns.items() if name not in names}
    return list(rows), others, said


def cell_of(value: Any) -> str:
    """What a column's cell says; "" for nothing."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)

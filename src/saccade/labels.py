"""What is labelled already: a list that somebody filled in, or a folder with a folder for each class."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saccade.data import Source
from saccade.errors import SaccadeError, Unreadable, nearest
from saccade.sources import open_source
from saccade.sources.listing import EXTENSIONS, read_columns

_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class Labels:
    """Classes by row of the data, and by row of `outside`; None where only that it is labelled is known."""

    inside: dict[int, str | None] = field(default_factory=dict)
    outside: Source | None = None
    beside: dict[int, str | None] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # names in the list that the data do not have
    empty: int = 0  # rows of the list that wait for a label
    conflicts: list[str] = field(default_factory=list)  # keys with two labels; the last one counts


def read_labels(labels: str | Path, source: Source, keys: Sequence[str], root: Path | None) -> Labels:
    """What `labels` says of the pictures of `source`, whose folder is `root`.

    Raises `SaccadeError` where it is neither a list nor a folder, and where it names nothing of the data.
    """
    path = Path(labels).expanduser()
    if path.is_dir():
        return _of_folder(path, source, keys)
    if not path.is_file() or path.suffix.lower() not in EXTENSIONS:
        what = "is neither a folder nor a list" if path.exists() else "does not exist"
        hint = "a folder with a folder for each class, or a list (.csv, .jsonl) with the columns key and label"
        raise SaccadeError(f"{path} {what}", path="--labels", hint=hint)
    return _of_list(path, keys, root)


def _of_list(path: Path, keys: Sequence[str], root: Path | None) -> Labels:
    """Rows by key, or by the path that the list means."""
    names, columns = read_columns(path)
    column = next((columns[name] for name in _COLUMNS if name in columns), None)
    rows = {key: row for row, key in enumerate(keys)}
    inside: dict[int, str | None] = {}
    unknown, conflicts, empty = list[str](), list[str](), 0
    for place, name in enumerate(names):
        said = None if column is None else str("" if column[place] is None else column[place]).strip()
        if said == "":
            empty += 1
            continue
        row = rows.get(name.removeprefix("./"))
        if row is None and root is not None:
            row = rows.get(os.path.relpath(path.absolute().parent / name, root.absolute()).replace(os.sep, "/"))
        if row is None:
            unknown.append(name)
            continue
        if inside.get(row, said) != said:
            conflicts.append(name)
        inside[row] = said
    if unknown and not inside:
        hint = f"keys look like {keys[0]!r}" if len(keys) > 20_000 else nearest(unknown[0], keys[:20_000])[:200]
        raise SaccadeError(f"{path} names no picture of the data, first {unknown[0]!r}", path="--labels", hint=hint)
    return Labels(inside, None, {}, unknown, empty, conflicts)


def _of_folder(path: Path, source: Source, keys: Sequence[str]) -> Labels:
    """Pictures of the data that lie there too, by name and content, and those that lie there alone."""
    outside = open_source(path)
    named = defaultdict(list)
    for row, key in enumerate(keys):
        named[key.rsplit("/", 1)[-1]].append(row)
    found = Labels({}, outside)
    for row in range(len(outside)):
        name, label = outside.key(row), outside.label(row)
        if label is None:
            continue
        same = next((here for here in named[name.rsplit("/", 1)[-1]] if _equal(source, here, outside, row)), None)
        if same is None:
            found.beside[row] = label
        else:
            if found.inside.get(same, label) != label:
                found.conflicts.append(keys[same])
            found.inside[same] = label
    if not found.inside and not found.beside:
        raise SaccadeError(f"{path} has no folder for each class", path="--labels", hint="LABELLED/CLASS/picture.jpg")
    return found


def _equal(one: Source, row: int, other: Source, place: int) -> bool:
    try:
        return one.size(row) == other.size(place) and one.content(row) == other.content(place)
    except Unreadable:
        return False

"""Pictures whose bytes lie in Parquet files, as Hugging Face's `datasets` writes them; and columns of texts.

A picture is a column of bytes, or of records {bytes, path}. Row groups are read when a row of theirs is asked for, some
rows at a time, and what was read last is kept: never a whole file, never across a fork. Since a row cannot be read by
its position, a row out of order costs the row group up to it: groups of some hundred rows are best.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from saccade.data import Sample, Source
from saccade.decode import decode
from saccade.errors import SaccadeError, Unreadable, say
from saccade.sources.captions import CAPTIONS, READ, TEXTS, chosen, encoded, usable
from saccade.sources.files import group_of
from saccade.sources.row_groups import ROWS, Place, Recent, file_of, leaf
from saccade.sources.strings import Strings

_LARGE = 1 << 28
_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""Which column is the picture where several hold bytes."""
_LABELS = ("label", "labels", "class")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `classes` are the names that numbers of the label stand for."""

    picture: str | None
    path: str | None
    captions: tuple[str, ...]
    label: str | None
    classes: tuple[str, ...]
    every: tuple[str, ...]


@dataclass(frozen=True)
class Rows(Source):
    """The rows of Parquet files, one file after the other; keys are FILE/ROW, and /PATH where pictures have one.

    `starts` are the first rows of the files; `places` the file and the number of each row group, `ends` the first row
    that is no longer in it, `sizes` what a row of it takes. With `texts` a sample has captions, and one that has none
    cannot be read.
    """

    root: str
    files: tuple[str, ...]
    starts: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]
    sizes: tuple[int, ...]
    columns: Columns
    paths: Strings | None
    labels: Strings | None
    groups: Strings | None
    short_side: int | None = None
    channels: int = 3
    group_by: str | None = None
    texts: bool = False
    recent: Recent = field(default_factory=Recent, compare=False, repr=False)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        texts = usable(key, self.words(index)) if self.texts else ()
        pixels = None
        if self.columns.picture is not None:
            pixels = decode(self._picture(index), key=key, short_side=self.short_side, channels=self.channels)
        return Sample(key, pixels, texts, self.label(index), self.group(index), source=self.origin(index))

    def key(self, index: int) -> str:
        number = self._place(index)[0]
        path = "" if self.paths is None else self.paths[index].lstrip("/")
        return f"{self.files[number]}/{index - self.starts[number]}" + (path and f"/{path}")

    def label(self, index: int) -> str | None:
        return None if self.labels is None else self.labels[index] or None

    def group(self, index: int) -> str | None:
        if self.group_by is None or self.group_by in self.columns.every:
            return None if self.groups is None else self.groups[index] or None
        return group_of(self.key(index), self.group_by)

    def origin(self, index: int) -> str:
        return os.path.join(self.root, self.files[self._place(index)[0]])

    def words(self, index: int) -> tuple[bytes, ...]:
        if not self.texts:
            return ()
        found = [self._cell(index, column) for column in self.columns.captions]
        return tuple(text[: READ + 1] for scalar in found for text in _texts(scalar))

    def text(self, index: int) -> bytes:
        """All its texts in full, a line each."""
        found = [self._cell(index, column) for column in self.columns.captions]
        return b"\n".join(text for scalar in found for text in _texts(scalar))

    def lengths(self) -> Iterator[int]:
        """How many bytes `text` has of each row, in order. Raises `SaccadeError`."""
        for file in self.files:
            columns = [_lengths(Path(self.root, file), column) for column in self.columns.captions]
            for several in zip(*columns, strict=True):
                there = [length for length in several if length is not None]
                yield sum(there) + max(0, len(there) - 1)

    def content(self, index: int) -> bytes:
        pictures = () if self.columns.picture is None else (self._picture(index),)
        return b"\0".join([*pictures, *self.words(index)])

    def size(self, index: int) -> int:
        """A row's equal share of what its row group takes: single sizes would have to be read."""
        return self.sizes[self._place(index)[1]]

    def column(self, name: str) -> list[str] | None:
        """All cells of another column, "" for nothing; None where there is no such column. Raises `SaccadeError`."""
        if name not in self.columns.every:
            return None
        return [cell for file in self.files for cell in _cells(Path(self.root, file), name, ())]

    def _picture(self, index: int) -> bytes:
        assert self.columns.picture is not None
        found = self._cell(index, self.columns.picture)
        if not found.is_valid:
            raise Unreadable(self.key(index), "its row holds no bytes of a picture")
        return bytes(found.as_buffer())

    def _cell(self, index: int, column: str) -> Any:
        from pyarrow import ArrowException

        number, group, row = self._place(index)
        place = Place(os.path.join(self.root, self.files[number]), self.places[group][1], column)
        try:
            return self.recent.cell(place, row)
        except (ArrowException, OSError, ValueError, MemoryError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise Unreadable(self.key(index), f"row group {place.group} cannot be read: {said[:200]}") from None

    def _place(self, index: int) -> tuple[int, int, int]:
        """The file, the row group among all, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside {len(self)} rows")
        group = bisect_right(self.ends, index)
        return self.places[group][0], group, index - (self.ends[group - 1] if group else 0)


def _texts(scalar: Any) -> list[bytes]:
    """The captions of a cell: one, a list of several, or none."""
    import pyarrow

    if not scalar.is_valid:
        return []
    if _is_list(scalar.type):
        return [text for each in scalar.values for text in _texts(each)]
    kind = pyarrow.types
    if kind.is_dictionary(scalar.type):
        return _texts(scalar.value)
    return [bytes(scalar.as_buffer())] if _is_text(scalar.type) else [encoded(scalar.as_py())]


def _is_list(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def schema_of(path: Path) -> Any:
    """The columns of a Parquet file, and its metadata. Raises `SaccadeError`."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise SaccadeError("reading Parquet needs pyarrow", path=path, hint="pip install 'saccade[parquet]'") from None
    try:
        return file_of(str(path)).schema_arrow
    except (ArrowException, OSError, ValueError) as error:
        raise SaccadeError(f"cannot read {path}: {error}", path=path, hint="copy or make it again") from None


def pictured(path: Path) -> bool:
    """Whether a column holds the bytes of pictures. Raises `SaccadeError`."""
    return bool(_pictures(schema_of(path)))


def _pictures(schema: Any) -> dict[str, str]:
    """Columns that hold bytes of pictures, and where in the column these lie."""
    import pyarrow

    found = {}
    for one in schema:
        inner = {child.name: child.type for child in one.type} if pyarrow.types.is_struct(one.type) else {}
        if _is_bytes(one.type):
            found[one.name] = one.name
        elif "bytes" in inner and _is_bytes(inner["bytes"]):
            found[one.name] = f"{one.name}.bytes"
    return found


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's `datasets` wrote of the columns; nothing where that is not as it writes it."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _columns(path: Path, schema: Any, pictures: bool, texts: bool) -> Columns:
    """Which columns are read. Raises `SaccadeError` where the picture is not certain, or captions are missing."""
    import pyarrow

    names, found = list(schema.names), _pictures(schema) if pictures else {}
    named = next((name for name in _NAMES if name in found), None) or (next(iter(found)) if len(found) == 1 else None)
    if pictures and named is None:
        what = f"pictures in several columns: {', '.join(found)}" if found else f"no pictures, only {', '.join(names)}"
        raise SaccadeError(f"{path} has {what}", path=path, hint="call the column of pictures `image`")
    inner = schema.field(named).type if named else None
    beside = inner is not None and pyarrow.types.is_struct(inner) and inner.get_field_index("path") >= 0
    features = _features(schema)
    classed = [name for name, each in features.items() if each.get("_type") == "ClassLabel" and name in names]
    label = next((name for name in _LABELS if name in names), classed[0] if len(classed) == 1 else None)
    classes = features.get(label or "", {}).get("names", ())
    kinds = {one.name: one.type.value_type if _is_list(one.type) else one.type for one in schema}
    worded = [name for name, kind in kinds.items() if _is_text(kind) and name != label]
    captions = chosen(worded, CAPTIONS if pictures else TEXTS) if texts else []
    if texts and not captions:
        what, hint = ("captions", "`caption` (or `caption1`, `caption2`, …)") if pictures else ("texts", "`text`")
        raise SaccadeError(
            f"{path} has no {what}, only {', '.join(names)}", path=path, hint=f"name their column {hint}"
        )
    every = tuple(name for name in names if name not in {*found, *captions})
    is_list = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return Columns(
        found[named] if named else None, f"{named}.path" if beside else None, tuple(captions), label,
        tuple(classes) if is_list else (), every,
    )  # fmt: skip


def _scalars(path: Path, column: str, rows: int) -> Iterator[Any]:
    """All cells of a column, so many read at a time. Raises `SaccadeError`."""
    from pyarrow import ArrowException

    try:
        for batch in file_of(str(path)).iter_batches(batch_size=rows, columns=[column], use_threads=False):
            yield from leaf(batch.column(0))
    except (ArrowException, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise SaccadeError(f"cannot read the column {column!r} of {path}: {said[:200]}", path=path) from None


def _cells(path: Path, column: str, classes: Sequence[str]) -> Iterator[str]:
    """All cells of a column as strings, "" for nothing; a number of a class by its name. Raises `SaccadeError`."""
    return (_cell(scalar, classes) for scalar in _scalars(path, column, 4096))


def _lengths(path: Path, column: str) -> Iterator[int | None]:
    """Bytes of the texts of each cell, a line each; None where there is none. Raises `SaccadeError`."""
    for scalar in _scalars(path, column, ROWS):
        texts = _texts(scalar)
        yield sum(map(len, texts)) + len(texts) - 1 if texts else None


def _cell(scalar: Any, classes: Sequence[str]) -> str:
    if not scalar.is_valid:
        return ""
    if _is_text(scalar.type):
        return bytes(scalar.as_buffer()).decode("utf-8", "surrogateescape")
    value = scalar.as_py()
    if classes and isinstance(value, int):
        return "" if value < 0 else classes[value] if value < len(classes) else str(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def open_rows(
    root: Path, files: Sequence[Path], as_read: Mapping[str, Any], *, pictures: bool = True, texts: bool = False
) -> Rows:
    """The rows of Parquet files below `root`; `as_read`: short_side, channels, group_by of `Rows`.

    Raises `SaccadeError` for a file that is damaged, whose columns are others than the first's, or that has no rows.
    """
    columns = _columns(files[0], schema_of(files[0]), pictures, texts)
    places, rows, sizes, starts = list[tuple[int, int]](), list[int](), list[int](), list[int]()
    for number, path in enumerate(files):
        if number and _columns(path, schema_of(path), pictures, texts) != columns:
            raise SaccadeError(f"{path} has other columns than {files[0]}", path=path, hint="read them one by one")
        starts.append(sum(rows))
        metadata = file_of(str(path)).metadata
        for group in range(metadata.num_row_groups):
            facts = metadata.row_group(group)
            if facts.num_rows:
                places.append((number, group))
                rows.append(facts.num_rows)
                sizes.append(facts.total_byte_size // facts.num_rows)
    if not rows:
        raise SaccadeError(f"there are no rows in {files[0]}", path=files[0])
    if (largest := max(size * count for size, count in zip(sizes, rows, strict=True))) > _LARGE and pictures:
        say(
            f"{root}: a row group of {largest >> 20:,} MB. Read out of order each picture costs that much again: "
            "write the file anew with row_group_size=100"
        )
    group_by = as_read.get("group_by")
    group = group_by if group_by in columns.every else "group" if "group" in columns.every else None

    def whole(column: str | None, classes: Sequence[str] = ()) -> Strings | None:
        return None if column is None else Strings(cell for path in files for cell in _cells(path, column, classes))

    return Rows(
        str(root), tuple(path.relative_to(root).as_posix() for path in files), tuple(starts), tuple(places),
        tuple(accumulate(rows)), tuple(sizes), columns, whole(columns.path),
        whole(columns.label, columns.classes), whole(group), texts=texts, **as_read,
    )  # fmt: skip

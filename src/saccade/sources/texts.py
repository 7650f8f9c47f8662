"""Texts alone: files below a folder, or rows of a list or of Parquet, in pieces that begin every so many bytes."""

from __future__ import annotations

import csv
import glob
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from saccade.data import Sample, Source
from saccade.errors import SaccadeError, Unreadable
from saccade.sources.captions import TEXTS, chosen, encoded, usable
from saccade.sources.files import folder_above, group_of, read
from saccade.sources.folder import scan
from saccade.sources.listing import TABLES, cell_of, table_of
from saccade.sources.parquet import Rows, open_rows
from saccade.sources.strings import Strings

EXTENSIONS = frozenset({"txt", "md", "rst"})
_WORD, _INSIDE = re.compile(rb"\s"), bytes(range(0x80, 0xC0))
_REACH = 1.5
"""A piece is so much longer than the way to the next one: what fills up the tokens where words are long."""


class Documents(ABC):
    """Texts by number, each of which is cut into pieces."""

    root: str

    @abstractmethod
    def name(self, number: int) -> str:
        """What its keys begin with."""

    @abstractmethod
    def size(self, number: int) -> int:
        """Bytes. Raises `Unreadable`."""

    @abstractmethod
    def part(self, number: int, start: int, length: int) -> bytes:
        """Some of its bytes. Raises `Unreadable`."""

    @abstractmethod
    def label(self, number: int) -> str | None:
        """Its class."""

    def group(self, number: int, group_by: str | None) -> str | None:
        """What must not be split: all of it, or what the pattern finds in its name."""
        return self.name(number) if group_by is None else group_of(self.name(number), group_by)

    def column(self, name: str) -> list[str] | None:
        """What a list says of each; None where it has no such column."""
        return None


@dataclass(frozen=True)
class TextFiles(Documents):
    """Files below `root`; the label is the folder above. An UTF-16 file cannot be read."""

    root: str
    names: Strings

    def name(self, number: int) -> str:
        return self.names[number]

    def size(self, number: int) -> int:
        name = self.names[number]
        try:
            return os.stat(os.path.join(self.root, name)).st_size
        except OSError as error:
            raise Unreadable(name, error.strerror or str(error)) from None

    def part(self, number: int, start: int, length: int) -> bytes:
        name = self.names[number]
        path = os.path.join(self.root, name)
        if read(path, name, 0, min(2, start + length)) in (b"\xff\xfe", b"\xfe\xff"):
            raise Unreadable(name, "it is UTF-16, of which no pieces are cut: write it as UTF-8")
        return read(path, name, start, length)

    def label(self, number: int) -> str | None:
        return folder_above(self.names[number])


@dataclass(frozen=True)
class ListedTexts(Documents):
    """The rows of a CSV, TSV or JSONL; several texts of a row are a line each."""

    root: str
    file: str
    texts: Strings
    columns: dict[str, Strings]

    def name(self, number: int) -> str:
        return f"{self.file}/{number}"

    def size(self, number: int) -> int:
        return len(self._bytes(number))

    def part(self, number: int, start: int, length: int) -> bytes:
        return self._bytes(number)[start : start + length]

    def _bytes(self, number: int) -> bytes:
        return self.texts[number].encode("utf-8", "surrogateescape")

    def label(self, number: int) -> str | None:
        return self.columns["label"][number] or None if "label" in self.columns else None

    def group(self, number: int, group_by: str | None) -> str | None:
        column = self.columns.get("group" if group_by is None else group_by)
        return super().group(number, group_by) if column is None else column[number] or None

    def column(self, name: str) -> list[str] | None:
        return list(self.columns[name]) if name in self.columns else None


@dataclass(frozen=True)
class RowTexts(Documents):
    """The rows of Parquet files."""

    root: str
    rows: Rows
    sizes: tuple[int, ...]

    def name(self, number: int) -> str:
        return self.rows.key(number)

    def size(self, number: int) -> int:
        return self.sizes[number]

    def part(self, number: int, start: int, length: int) -> bytes:
        return self.rows.text(number)[start : start + length]

    def label(self, number: int) -> str | None:
        return self.rows.label(number)

    def group(self, number: int, group_by: str | None) -> str | None:
        return self.rows.group(number) if self.rows.groups is not None else super().group(number, group_by)

    def column(self, name: str) -> list[str] | None:
        return self.rows.column(name)


@dataclass(frozen=True)
class Texts(Source):
    """Pieces of `documents`; `ends` says which is the first that is no longer a document's, `piece` in bytes.

    The key is the document's name, with `#n` where it has several; the label and the group are the document's, and the
    document is the group where nothing else is. UTF-8, or Latin-1.
    """

    documents: Documents
    ends: tuple[int, ...]
    piece: int
    group_by: str | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        texts = usable(key, self.words(index))
        return Sample(key, None, texts, self.label(index), self.group(index), source=self.documents.root)

    def key(self, index: int) -> str:
        number, place, count = self._place(index)
        name = self.documents.name(number)
        return f"{name}#{place}" if count > 1 else name

    def label(self, index: int) -> str | None:
        return self.documents.label(self._place(index)[0])

    def group(self, index: int) -> str | None:
        return self.documents.group(self._place(index)[0], self.group_by)

    def origin(self, index: int) -> str:
        return self.documents.root

    def words(self, index: int) -> tuple[bytes, ...]:
        """The piece, from one word's beginning to another's end."""
        number, place, count = self._place(index)
        start = place * self.piece
        length = max(0, min(int(_REACH * self.piece), self.documents.size(number) - start))
        data = self.documents.part(number, start, length)
        if place and (found := _WORD.search(data[:64])):
            data = data[found.end() :]
        elif place:
            data = data.lstrip(_INSIDE)  # of a character that has begun before
        if place + 1 < count and (spaces := [found.start() for found in _WORD.finditer(data)]):
            data = data[: spaces[-1]]
        return (data,)

    def content(self, index: int) -> bytes:
        return self.words(index)[0]

    def _place(self, index: int) -> tuple[int, int, int]:
        """The document, which of its pieces, and how many it has."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside {len(self)} pieces")
        number = bisect_right(self.ends, index)
        first = self.ends[number - 1] if number else 0
        return number, index - first, self.ends[number] - first


def open_texts(path: Path, piece: int, group_by: str | None = None) -> Texts:
    """The pieces of a file or a list, or of all that are texts below a folder, or else of its Parquet.

    `path` may be a pattern of Parquet files. Raises `SaccadeError` where there are none.
    """
    documents, sizes = _documents(path, group_by)
    ends = tuple(accumulate(max(1, round(size / piece)) for size in sizes))
    if not ends:
        raise SaccadeError(f"there are no texts in {path}", path=path)
    return Texts(documents, ends, piece, group_by)


def _documents(path: Path, group_by: str | None) -> tuple[Documents, Iterable[int]]:
    suffix = path.suffix.lower()
    if path.is_file() and suffix in TABLES:
        listed = _listed(path)
        return listed, map(listed.size, range(len(listed.texts)))
    if path.is_file():
        root, names, rows = path.parent, Strings([path.name] if suffix[1:] in EXTENSIONS else []), [path]
    elif path.is_dir():
        root, names = path, scan(path, EXTENSIONS).keys
        rows = [] if len(names) else sorted(path.rglob("*.parquet"))
    else:
        rows = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        root, names = Path(os.path.commonpath([row.parent for row in rows])) if rows else path, Strings([])
    if rows and all(row.suffix.lower() == ".parquet" for row in rows):
        found = open_rows(root, rows, {"group_by": group_by}, pictures=False, texts=True)
        texts = RowTexts(str(root), found, tuple(found.lengths()))
        return texts, texts.sizes
    if not len(names):
        known = " ".join(f".{name}" for name in sorted(EXTENSIONS))
        raise SaccadeError(
            f"there are no texts in {path}", path=path,
            hint=f"read are {known}, in folders, and lists with a column `text`: {' '.join(TABLES)} .parquet",
        )  # fmt: skip
    files = TextFiles(str(root), names)
    return files, (_size(os.path.join(root, name)) for name in names)


def _size(path: str) -> int:
    """0 for a link to nothing, which is one piece that cannot be read."""
    return os.stat(path).st_size if os.path.exists(path) else 0


def _listed(path: Path) -> ListedTexts:
    """The rows of a list. Raises `SaccadeError` where it cannot be read, or has no texts."""
    try:
        header, columns = table_of(path)
    except (OSError, csv.Error) as error:
        raise SaccadeError(f"cannot read the list {path}: {error}", path=path) from None
    names = chosen((name for name in header if name != "label"), TEXTS)
    if not names:
        raise SaccadeError(
            f"the list {path} has no texts, only {', '.join(header)}", path=path, hint="name their column `text`"
        )
    rows = zip(*(columns.pop(name) for name in names), strict=True)
    others = {name: Strings(map(cell_of, column)) for name, column in columns.items()}
    return ListedTexts(str(path.parent), path.name, Strings(map(_lines, rows)), others)


def _lines(cells: Iterable[object]) -> str:
    several = [item for cell in cells for item in (cell if isinstance(cell, list) else [cell])]
    texts = [encoded(item).decode("utf-8", "surrogateescape") for item in several if item is not None]
    return "\n".join(text for text in texts if text)

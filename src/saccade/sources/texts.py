"""Texts alone: files below a folder, each cut into pieces that begin every so many bytes, at a word."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from saccade.data import Sample, Source
from saccade.errors import SaccadeError, Unreadable
from saccade.sources.captions import usable
from saccade.sources.files import folder_above, group_of, read
from saccade.sources.folder import scan
from saccade.sources.strings import Strings

EXTENSIONS = frozenset({"txt", "md", "rst"})
_WORD, _INSIDE = re.compile(rb"\s"), bytes(range(0x80, 0xC0))
_REACH = 1.5
"""A piece is so much longer than the way to the next one: what fills up the tokens where words are long."""


@dataclass(frozen=True)
class Texts(Source):
    """Pieces of the files below `root`; `ends` says which is the first that is no longer a file's, `piece` in bytes.

    The key is the path, with `#n` where a file has several; the label is the folder above, the group is the file, or
    what `group_by` finds in its path. UTF-8, or Latin-1; an UTF-16 file cannot be read.
    """

    root: str
    names: Strings
    ends: tuple[int, ...]
    piece: int
    group_by: str | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        texts = usable(key, self.words(index))
        return Sample(key, None, texts, self.label(index), self.group(index), source=self.root)

    def key(self, index: int) -> str:
        name, place, count = self._place(index)
        return f"{name}#{place}" if count > 1 else name

    def label(self, index: int) -> str | None:
        return folder_above(self._place(index)[0])

    def group(self, index: int) -> str | None:
        name = self._place(index)[0]
        return name if self.group_by is None else group_of(name, self.group_by)

    def origin(self, index: int) -> str:
        return self.root

    def words(self, index: int) -> tuple[bytes, ...]:
        """The piece, from one word's beginning to another's end."""
        name, place, count = self._place(index)
        path, start = os.path.join(self.root, name), place * self.piece
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise Unreadable(name, error.strerror or str(error)) from None
        if read(path, name, 0, min(2, size)) in (b"\xff\xfe", b"\xfe\xff"):
            raise Unreadable(name, "it is UTF-16, of which no pieces are cut: write it as UTF-8")
        data = read(path, name, start, max(0, min(int(_REACH * self.piece), size - start)))
        if place and (found := _WORD.search(data[:64])):
            data = data[found.end() :]
        elif place:
            data = data.lstrip(_INSIDE)  # of a character that has begun before
        if place + 1 < count and (spaces := [found.start() for found in _WORD.finditer(data)]):
            data = data[: spaces[-1]]
        return (data,)

    def content(self, index: int) -> bytes:
        return self.words(index)[0]

    def _place(self, index: int) -> tuple[str, int, int]:
        """The file, which of its pieces, and how many it has."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside {len(self)} pieces")
        number = bisect_right(self.ends, index)
        first = self.ends[number - 1] if number else 0
        return self.names[number], index - first, self.ends[number] - first


def open_texts(path: Path, piece: int, group_by: str | None = None) -> Texts:
    """The pieces of a file, or of all that are texts below a folder. Raises `SaccadeError` where there are none."""
    if path.is_file():
        root, names = path.parent, Strings([path.name] if path.suffix[1:].lower() in EXTENSIONS else [])
    else:
        root, names = path, scan(path, EXTENSIONS).keys if path.is_dir() else Strings([])
    if not len(names):
        known = " ".join(f".{name}" for name in sorted(EXTENSIONS))
        raise SaccadeError(f"there are no texts in {path}", path=path, hint=f"read are {known}, in folders")
    sizes = (os.stat(os.path.join(root, name)).st_size for name in names)
    return Texts(str(root), names, tuple(accumulate(max(1, round(size / piece)) for size in sizes)), piece, group_by)

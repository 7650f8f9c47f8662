"""Pictures that are files of their own: what a folder and a list have in common."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from saccade.data import Sample, Source
from saccade.decode import FILE_LIMIT, decode
from saccade.errors import Unreadable
from saccade.sources.captions import READ, Column, usable
from saccade.sources.strings import Strings


@dataclass(frozen=True)
class Files(Source):
    """Files below `root`, named by their relative path with forward slashes.

    The label is the column of that name, else the folder directly above the file; the group is the column, else what
    the first parenthesis (or the whole) of the pattern `group_by` finds in the key; `dataclasses.replace` sets it. With
    `captions` a sample has texts, and one that has none cannot be read.
    """

    root: str
    keys: Strings
    columns: Mapping[str, Strings] = field(default_factory=dict)
    short_side: int | None = None
    channels: int = 3
    group_by: str | None = None
    captions: Beside | Column | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.keys[index]
        texts = () if self.captions is None else usable(key, self.words(index))
        pixels = decode(self._picture(index), key=key, short_side=self.short_side, channels=self.channels)
        metadata = {name: column[index] for name, column in self.columns.items() if name not in ("label", "group")}
        return Sample(key, pixels, texts, self.label(index), self.group(index), metadata, self.root)

    def key(self, index: int) -> str:
        return self.keys[index]

    def label(self, index: int) -> str | None:
        if "label" in self.columns:
            return self.columns["label"][index] or None
        return folder_above(self.keys[index])

    def group(self, index: int) -> str | None:
        if self.group_by is None and "group" in self.columns:
            return self.columns["group"][index] or None
        return group_of(self.keys[index], self.group_by)

    def origin(self, index: int) -> str:
        return self.root

    def words(self, index: int) -> tuple[bytes, ...]:
        return () if self.captions is None else self.captions(index)

    def orphans(self) -> Iterator[str]:
        return iter(()) if self.captions is None else self.captions.orphans()

    def content(self, index: int) -> bytes:
        return b"\0".join([self._picture(index), *self.words(index)])

    def _picture(self, index: int) -> bytes:
        key = self.keys[index]
        return read(os.path.join(self.root, key), key)

    def size(self, index: int) -> int:
        key = self.keys[index]
        try:
            return os.stat(os.path.join(self.root, key)).st_size
        except OSError as error:
            raise Unreadable(key, error.strerror or str(error)) from None


@dataclass(frozen=True)
class Beside:
    """A picture's text in the file of its name that ends in .txt."""

    root: str
    keys: Strings

    def __call__(self, index: int) -> tuple[bytes, ...]:
        path = os.path.join(self.root, text_of(self.keys[index]))
        if not os.path.lexists(path):
            return ()
        size = min(os.stat(path).st_size, READ + 1) if os.path.isfile(path) else None
        return (read(path, self.keys[index], 0, size),)

    def orphans(self) -> Iterator[str]:
        """Texts without a picture, by their paths."""
        pictured = {text_of(key) for key in self.keys}
        for folder, inner, names in os.walk(self.root):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), self.root).replace(os.sep, "/")
                if name.endswith(".txt") and not name.startswith(".") and path not in pictured:
                    yield path


def text_of(key: str) -> str:
    """The path of the text that belongs to a picture."""
    return os.path.splitext(key)[0] + ".txt"


def folder_above(key: str) -> str | None:
    """The folder directly above a file, where there is one."""
    return key.split("/")[-2] if "/" in key.lstrip("/") else None


def group_of(key: str, pattern: str | None) -> str | None:
    """What the pattern finds in a key."""
    found = re.search(pattern, key) if pattern else None
    return (found[1] if found.re.groups else found[0]) if found else None


def read(path: str, key: str, offset: int = 0, length: int | None = None) -> bytes:
    """A file's bytes, or part of it, by position. Raises `Unreadable`; never waits for a pipe, never reads a device."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise Unreadable(key, (error.strerror if isinstance(error, OSError) else None) or str(error)) from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise Unreadable(key, "not a regular file")
        length = state.st_size - offset if length is None else length
        if length > FILE_LIMIT:
            raise Unreadable(key, f"file of {length} bytes, the limit is {FILE_LIMIT}")
        data = os.pread(handle, length, offset)
        if len(data) != length:
            raise Unreadable(key, f"only {len(data)} of {length} bytes could be read")
        return data
    except OSError as error:
        raise Unreadable(key, error.strerror or str(error)) from None
    finally:
        os.close(handle)

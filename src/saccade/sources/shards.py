"""Pictures in tar files, read by position: an index of offsets is made once, and kept beside the tar if that took long.

Members that share a stem are one sample: the picture, `.txt` its text, `.cls` its label, `.json` its metadata (with
`label`, `group` and, where there is no `.txt`, captions). The stem is the name without its last extension.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import tarfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saccade.data import Sample, Source
from saccade.decode import EXTENSIONS, decode
from saccade.errors import SaccadeError, Unreadable
from saccade.sources.captions import fields, usable
from saccade.sources.files import folder_above, group_of, read
from saccade.sources.strings import Strings

_PARTS = ("picture", "txt", "cls", "json")
_NAMES = ("keys", "alone")
_WORTH_KEEPING = 0.5
"""Seconds: an index that is made faster is not written anywhere."""


@dataclass(frozen=True)
class Shards(Source):
    """The samples of tar files one after the other; keys are `TAR/MEMBER`.

    `spans` [N 4 2] says where picture, text, label and metadata lie (offset and length; -1 where there is none), `ends`
    how many samples come up to and with each tar; `alone` names the texts without a picture. With `texts` a sample has
    texts, and one that has none cannot be read.
    """

    tars: tuple[str, ...]
    ends: tuple[int, ...]
    keys: Strings
    spans: Int[Tensor, "n 4 2"]
    short_side: int | None = None
    channels: int = 3
    group_by: str | None = None
    texts: bool = False
    alone: Strings | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key, metadata = self.keys[index], self._metadata(index)
        texts = usable(key, self.words(index)) if self.texts else ()
        pixels = decode(self._picture(index), key=key, short_side=self.short_side, channels=self.channels)
        return Sample(key, pixels, texts, self.label(index), self.group(index), metadata, self.origin(index))

    def key(self, index: int) -> str:
        return self.keys[index]

    def label(self, index: int) -> str | None:
        named = self._part(index, "cls")
        label = self._metadata(index).get("label") if named is None else named.decode("utf-8", "replace").strip()
        return folder_above(self.keys[index].partition("/")[2]) if label is None else str(label)

    def group(self, index: int) -> str | None:
        group = self._metadata(index).get("group") if self.group_by is None else None
        return group_of(self.keys[index], self.group_by) if group is None else str(group)

    def origin(self, index: int) -> str:
        return self.tars[bisect_right(self.ends, index)]

    def words(self, index: int) -> tuple[bytes, ...]:
        if not self.texts:
            return ()
        text = self._part(index, "txt")
        return fields(self._metadata(index)) if text is None else (text,)

    def orphans(self) -> Iterator[str]:
        return iter(self.alone if self.texts and self.alone is not None else ())

    def content(self, index: int) -> bytes:
        return b"\0".join([self._picture(index), *self.words(index)])

    def _picture(self, index: int) -> bytes:
        data = self._part(index, "picture")
        assert data is not None
        return data

    def size(self, index: int) -> int:
        return int(self.spans[index, 0, 1])

    def _part(self, index: int, name: str) -> bytes | None:
        offset, length = self.spans[index, _PARTS.index(name)].tolist()
        return None if offset < 0 else read(self.origin(index), self.keys[index], offset, length)

    def _metadata(self, index: int) -> dict[str, Any]:
        data = self._part(index, "json")
        try:
            metadata = {} if data is None else json.loads(data)
        except ValueError as error:
            raise Unreadable(self.keys[index], f"its .json is damaged: {error}") from None
        if not isinstance(metadata, dict):
            raise Unreadable(self.keys[index], "its .json holds no object")
        return metadata


def open_shards(
    tars: list[Path], short_side: int | None, channels: int, group_by: str | None, texts: bool = False
) -> Shards:
    """The samples of these tar files. Raises `SaccadeError` for a tar that is damaged or has no pictures."""
    names, spans, alone = zip(*map(_index, tars), strict=True)
    keys, lone = (some[0] if len(tars) == 1 else Strings(itertools.chain(*some)) for some in (names, alone))
    ends = tuple(itertools.accumulate(map(len, names)))
    return Shards(tuple(map(str, tars)), ends, keys, torch.cat(spans), short_side, channels, group_by, texts, lone)


def _index(tar: Path) -> tuple[Strings, Tensor, Strings]:
    """A tar's index: the one kept beside it or in the cache, if it still fits the tar; else made, and kept if slow."""
    state = os.stat(tar)
    stamp = f"2 {state.st_size} {state.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saccade"
    places = [tar.with_name(f".{tar.name}.index"), cache / f"{blake3(os.fsencode(tar.resolve())).hexdigest(16)}.index"]
    for place in places:
        try:
            with safe_open(place, "pt") as kept:
                if (kept.metadata() or {}).get("stamp") == stamp:
                    keys, alone = (Strings.of(kept.get_tensor(n), kept.get_tensor(f"{n}.starts")) for n in _NAMES)
                    return keys, kept.get_tensor("spans"), alone
        except (OSError, SafetensorError):
            continue
    start = time.perf_counter()
    keys, spans, alone = _make_index(tar)
    if time.perf_counter() - start < _WORTH_KEEPING:
        return keys, spans, alone
    found = {"spans": spans}
    for name, strings in zip(_NAMES, (keys, alone), strict=True):
        found[name], found[f"{name}.starts"] = strings.tensors()
    for place in places:
        if place.parent.exists() and not place.parent.stat().st_mode & stat.S_IWUSR:
            continue  # marked read-only: root could write there, and must not
        written = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file(found, written, {"stamp": stamp})
            os.replace(written, place)
            break
        except (OSError, SafetensorError):  # not writable: the next place, or no index is kept
            written.unlink(missing_ok=True)
    return keys, spans, alone


def _make_index(tar: Path) -> tuple[Strings, Tensor, Strings]:
    """Names of the pictures in the order they lie, the spans of each and of its companions, and texts without one."""
    companions: dict[str, dict[str, tuple[int, int]]] = {}
    pictures: list[tuple[str, str, tuple[int, int]]] = []
    try:
        with tarfile.open(tar, "r:") as members:
            while (member := members.next()) is not None:
                members.members.clear()  # type: ignore[attr-defined]  # tarfile would keep an object a member
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse() or name.rpartition("/")[2].startswith("."):
                    continue
                stem, _, extension = name.rpartition(".")
                span = (member.offset_data, member.size)
                if extension.lower() in EXTENSIONS:
                    pictures.append((name, stem, span))
                elif extension in _PARTS:
                    companions.setdefault(stem, {})[extension] = span
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SaccadeError(f"cannot read the tar {tar}: {error}", path=tar, hint=_tar_hint(tar)) from None
    if not pictures:
        raise SaccadeError(
            f"there are no pictures in the tar {tar}", path=tar, hint=f"members read: {', '.join(sorted(EXTENSIONS))}"
        )
    spans = torch.full((len(pictures), len(_PARTS), 2), -1, dtype=torch.int64)
    for row, (_, stem, span) in enumerate(pictures):
        spans[row, 0] = torch.tensor(span)
        for name, companion in companions.get(stem, {}).items():
            spans[row, _PARTS.index(name)] = torch.tensor(companion)
    lone = [stem for stem in companions.keys() - {stem for _, stem, _ in pictures} if "txt" in companions[stem]]
    names = [f"{tar.name}/{name}" for name, _, _ in pictures]
    return Strings(names), spans, Strings(f"{tar.name}/{stem}.txt" for stem in sorted(lone))


def _tar_hint(tar: Path) -> str:
    try:
        with open(tar, "rb") as file:
            head = file.read(4)
    except OSError:
        return "make it readable"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
        return "it is compressed: unpack it once, since members are read by position"
    return "it is damaged or cut: copy or make it again"

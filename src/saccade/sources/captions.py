"""Texts that belong to pictures: in a file beside each, in columns of a list, in shards; and what is wrong with them.

Texts are UTF-8, with or without a byte order mark; UTF-16 with one is read too. Bytes that are neither are taken for
Latin-1, sample by sample, and counted. A text of more than `LIMIT` characters is cut there.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saccade.errors import Unreadable
from saccade.sources.strings import Strings

LIMIT = 10_000
"""Characters of a text that are kept: far more than any text tower reads."""
READ = 4 * LIMIT + 4
"""Bytes that hold so many characters in any of the encodings."""
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
CAPTIONS = ("captions?", "texts?", "title", "name")
"""Names of columns and of JSON fields that hold captions: those of the first kind that occurs, all of them."""
TEXTS = ("texts?", "content", "body", "sentences?", "document", "abstract", "captions?", "title")
"""The same of texts that belong to no picture."""


def decoded(data: bytes) -> tuple[str, str]:
    """The text and its encoding; what a cut left of a last character is dropped."""
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data[len(mark) :]), encoding
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"


def cleaned(words: Iterable[bytes]) -> tuple[tuple[str, ...], list[str]]:
    """The texts that can be used, and the faults of all: `empty`, `over-long`, `latin-1`, or `missing`."""
    texts, faults, none = [], [], True
    for data in words:
        none = False
        text, encoding = decoded(data[:READ])
        text = text.replace("\0", " ").strip()
        faults += [fault for fault in (encoding,) if fault != "utf-8"]
        faults += ["over-long"] if len(text) > LIMIT or len(data) > READ else []
        if text:
            texts.append(text[:LIMIT])
        else:
            faults.append("empty")
    return tuple(texts), faults + (["missing"] if none else [])


def usable(key: str, words: Iterable[bytes]) -> tuple[str, ...]:
    """The texts of a sample. Raises `Unreadable` where none can be used."""
    texts, faults = cleaned(words)
    if not texts:
        raise Unreadable(key, "its caption is empty" if "empty" in faults else "it has no caption")
    return texts


def chosen(names: Iterable[str], kinds: Iterable[str] = CAPTIONS) -> list[str]:
    """Which of these columns or fields hold captions, or texts of other `kinds`."""
    names = list(names)
    found = ([name for name in names if re.fullmatch(rf"{kind}(?:[ _-]?\d+)?", name.lower())] for kind in kinds)
    return next((some for some in found if some), [])


def fields(record: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The captions that a JSON object holds, one or several a field."""
    values = [record[name] for name in chosen(record)]
    several = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return tuple(encoded(item) for item in several if item is not None)


def encoded(value: Any) -> bytes:
    """A caption as the bytes that it had, whatever its field holds."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return text.encode("utf-8", "replace")


@dataclass(frozen=True)
class Column:
    """Captions of a list: those of the n-th picture are `texts` from `starts[n]` up to `starts[n + 1]`."""

    texts: Strings
    starts: Int[Tensor, " n"]

    @classmethod
    def of(cls, captions: list[list[str]]) -> Column:
        """From the captions of each picture."""
        counts = torch.tensor([0, *map(len, captions)], dtype=torch.int64)
        return cls(Strings(text for some in captions for text in some), counts.cumsum(0))

    def __call__(self, index: int) -> tuple[bytes, ...]:
        first, end = self.starts[index : index + 2].tolist()
        return tuple(self.texts[place].encode("utf-8", "surrogateescape") for place in range(first, end))

    def orphans(self) -> Iterator[str]:
        """None: a row of a list names its picture, and where that is not there, it is unreadable."""
        return iter(())

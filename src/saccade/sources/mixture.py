"""Several sources as one, drawn by weight."""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saccade.data import Sample, Source
from saccade.errors import Unreadable


@dataclass(frozen=True)
class Mixture(Source):
    """Sources one after the other; keys begin with the name of their source.

    `weights` are shares of the samples drawn; None draws each source as often as it has samples.
    """

    sources: tuple[Source, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    @cached_property
    def ends(self) -> list[int]:
        """How many samples come up to and with each source."""
        return list(itertools.accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self._ask(index, lambda source, inner: source[inner]), key=self.key(index))

    def parts(self) -> tuple[list[int], list[float] | None]:
        return [len(source) for source in self.sources], None if self.weights is None else list(self.weights)

    def key(self, index: int) -> str:
        number, inner = self._place(index)
        return f"{self.names[number]}/{self.sources[number].key(inner)}"

    def label(self, index: int) -> str | None:
        return self._ask(index, lambda source, inner: source.label(inner))

    def group(self, index: int) -> str | None:
        return self._ask(index, lambda source, inner: source.group(inner))

    def origin(self, index: int) -> str:
        return self._ask(index, lambda source, inner: source.origin(inner))

    def content(self, index: int) -> bytes:
        return self._ask(index, lambda source, inner: source.content(inner))

    def words(self, index: int) -> tuple[bytes, ...]:
        return self._ask(index, lambda source, inner: source.words(inner))

    def orphans(self) -> Iterator[str]:
        for name, source in zip(self.names, self.sources, strict=True):
            yield from (f"{name}/{orphan}" for orphan in source.orphans())

    def size(self, index: int) -> int:
        return self._ask(index, lambda source, inner: source.size(inner))

    def _place(self, index: int) -> tuple[int, int]:
        """Which source, and which sample of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside {len(self)} samples")
        number = bisect_right(self.ends, index)
        return number, index - (self.ends[number - 1] if number else 0)

    def _ask(self, index: int, question: Callable[[Source, int], Any]) -> Any:
        """What the sample's own source answers; an unreadable sample is named as this mixture names it."""
        number, inner = self._place(index)
        try:
            return question(self.sources[number], inner)
        except Unreadable as error:
            raise Unreadable(self.key(index), error.reason) from None

"""Many strings in two arrays: a million paths take their bytes and 8 more each, and no Python object a path.

Forked workers share the pages, since nothing in them is counted by reference; spawned ones get torch's shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


class Strings:
    """An immutable sequence of strings; what the file system could not decode survives (surrogate escapes)."""

    def __init__(self, values: Iterable[str]):
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
        self._starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), out=self._starts[1:])
        self._blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._shared: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, blob: Tensor, starts: Tensor) -> Strings:
        """From the two arrays that `tensors` gives."""
        strings = cls.__new__(cls)
        strings._blob, strings._starts, strings._shared = blob.numpy(), starts.numpy(), None
        return strings

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Copies of the bytes (uint8) and of where each string starts (int64, one more than there are strings)."""
        return torch.from_numpy(self._blob.copy()), torch.from_numpy(self._starts.copy())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is outside {len(self)} strings")
        start, end = self._starts[index % len(self) : index % len(self) + 2].tolist()
        return self._blob[start:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Callable[[Tensor, Tensor], Strings], tuple[Tensor, Tensor]]:
        # One copy for all spawned workers: torch's pickler moves these tensors to shared memory at the first of them.
        if self._shared is None:
            self._shared = self.tensors()
        return Strings.of, self._shared

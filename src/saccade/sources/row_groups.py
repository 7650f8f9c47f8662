"""Cells of Parquet files: some rows of a row group are read together, and what was read last is kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

HELD = 1 << 26
"""Bytes of rows that were read last, and are kept in each process."""
ROWS = 64
"""Rows that are read together: of a dictionary page each may be as long as the longest."""
_OPEN = 8


class Place(NamedTuple):
    """A column of a row group of a file."""

    path: str
    group: int
    column: str


class Recent:
    """Cells of Parquet files, by way of the rows that were read last. A copy, or a forked process, begins anew."""

    def __init__(self) -> None:
        self._begin()

    def __reduce__(self) -> tuple[type[Recent], tuple[()]]:
        return Recent, ()

    def _begin(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._ahead: OrderedDict[Place, tuple[int, Iterator[Any]]] = OrderedDict()  # the next block, and what reads it
        self._blocks: OrderedDict[tuple[Place, int], Any] = OrderedDict()
        self._bytes = 0

    def cell(self, place: Place, row: int) -> Any:
        """What the row of the group holds, as a scalar of pyarrow. Raises its errors, and `ValueError`."""
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            number, inner = divmod(row, ROWS)
            block = self._blocks.get((place, number))
            if block is None:
                block = self._read(place, number)
            self._blocks.move_to_end((place, number))
            return block[inner]

    def _read(self, place: Place, number: int) -> Any:
        first, blocks = self._ahead.pop(place, (0, None))
        if blocks is None or first > number:
            first, blocks = 0, self._opened(place.path).iter_batches(
                batch_size=ROWS, row_groups=[place.group], columns=[place.column], use_threads=False
            )  # fmt: skip
        rows = self._opened(place.path).metadata.row_group(place.group).num_rows
        for at in range(first, number + 1):
            batch = next(blocks, None)
            if batch is None or batch.num_rows != min(ROWS, rows - at * ROWS):
                raise ValueError(f"row group {place.group} has fewer rows than it says")
            self._keep((place, at), leaf(batch.column(0)))
        self._ahead[place] = number + 1, blocks
        _fewer(self._ahead)
        return self._blocks[place, number]

    def _keep(self, key: tuple[Place, int], block: Any) -> None:
        self._bytes += block.nbytes - (self._blocks[key].nbytes if key in self._blocks else 0)
        self._blocks[key] = block
        while self._bytes > HELD and len(self._blocks) > 1:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes

    def _opened(self, path: str) -> Any:
        if path not in self._files:
            self._files[path] = file_of(path)
            _fewer(self._files)
        self._files.move_to_end(path)
        return self._files[path]


def _fewer(some: OrderedDict[Any, Any]) -> None:
    while len(some) > _OPEN:
        some.popitem(last=False)


def leaf(column: Any) -> Any:
    """The one field that was asked for of records; null where the record is."""
    import pyarrow

    return column.flatten()[0] if pyarrow.types.is_struct(column.type) else column


def file_of(path: str) -> Any:
    """A Parquet file whose pages are read as they are needed. Raises pyarrow's errors, and `OSError`."""
    from pyarrow import parquet

    if not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file")
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)

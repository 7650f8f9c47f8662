"""Every random number has an address: (seed, sample, visit, name) or (seed, step, name), and nothing else decides it.

The numbers are SplitMix64 (Steele, Lea, Flood 2014) over hashed addresses, in int64 tensor arithmetic, so that CPU and
GPU give the same bits. The order of an epoch is a Feistel permutation with cycle walking (Black, Rogaway 2002): O(1)
memory, so that a billion samples need no index array and resuming is one integer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """SplitMix64's finaliser on one Python integer."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64 shifts drag the sign along, the mask takes it away again."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` for int64 tensors; multiplication wraps as it must."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def hash64(text: str) -> int:
    """The address of a name or a sample key, as a signed 64-bit integer that fits an int64 tensor."""
    return _signed(
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
    )


class Stream:
    """Numbers under one name, one row for each sample of the batch."""

    def __init__(self, rows: Int[Tensor, " b"], shared: int):
        self._rows, self._shared = rows, shared

    def bits(self, n: int) -> Int[Tensor, "b n"]:
        """`n` hashed int64 words a row."""
        counter = torch.arange(1, n + 1, device=self._rows.device, dtype=torch.int64) * _signed(_GOLDEN)
        return _mix_tensor(self._rows[:, None] + counter[None])

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> Float[Tensor, "b n"]:
        """Uniform in [low, high): 24 bits, exact in float32, so the same on every device."""
        unit = _shift(self.bits(n), 40).to(torch.float32) * 2.0**-24
        return unit if (low, high) == (0.0, 1.0) else low + (high - low) * unit

    def chance(self, n: int, probability: float) -> Tensor:
        """Bool[b n], true with this probability."""
        return self.uniform(n) < probability

    def integers(self, n: int, high: int) -> Int[Tensor, "b n"]:
        """Integers in [0, high), high below 2**24."""
        return (_shift(self.bits(n), 40) * high) >> 24

    def order(self, n: int) -> Int[Tensor, "b n"]:
        """A random order of range(n) for each row. Ties of the 40-bit keys go to the lower index."""
        return torch.argsort(_shift(self.bits(n), 24), dim=1, stable=True)

    def shared(self, n: int) -> Float[Tensor, " n"]:
        """`n` uniform numbers in [0, 1) that every row, and so every rank, has in common. Only for `draws.step`."""
        values = [_mix(self._shared + i * _GOLDEN) >> 40 for i in range(1, n + 1)]
        return torch.tensor(values, dtype=torch.float32, device=self._rows.device) * 2.0**-24


class Draws:
    """The random numbers of one (micro-)batch.

    `keys` and `seen` are the samples' hashed keys and visit counts, `places` their positions in the global batch.
    """

    def __init__(
        self, seed: int, step: int, keys: Int[Tensor, " b"], seen: Int[Tensor, " b"], places: Int[Tensor, " b"]
    ):
        self._seed, self._step, self._keys, self._seen, self._places = seed, step, keys, seen, places

    def sample(self, name: str) -> Stream:
        """A function of (seed, sample key, how often it has been seen, name)."""
        base = _mix(_mix(2 * self._seed + 1) + hash64(name))
        rows = _mix_tensor(_mix_tensor(self._keys + _signed(base)) + self._seen * _signed(_GOLDEN))
        return Stream(rows, base)

    def step(self, name: str) -> Stream:
        """A function of (seed, step, name), laid out by position in the global batch."""
        base = _mix(_mix(_mix(2 * self._seed + 2) + hash64(name)) + self._step)
        return Stream(_mix_tensor(self._places * _signed(_GOLDEN) + _signed(base)), base)

    def strata(self, name: str, batch: int, views: int) -> Float[Tensor, " v"]:
        """Numbers in [0, 1) for each view, view-major: over all views of a global batch one in each of equal parts."""
        stream, total = self.step(name), views * batch
        place = torch.argsort(torch.argsort(stream.shared(total), stable=True))
        mine = place[torch.arange(views, device=place.device)[:, None] * batch + self._places]
        return ((mine.double() + stream.uniform(views).T) / total).flatten()


class Permutation:
    """A keyed permutation of range(n) in O(1) memory: `permutation(i)` for one i."""

    def __init__(self, n: int, *address: int | str):
        self.n = n
        self._half = max(1, ((max(n - 1, 1)).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        key = 0
        for part in address:
            key = _mix(key + (hash64(part) if isinstance(part, str) else part) + _GOLDEN)
        self._keys = [_mix(key + i * _GOLDEN) for i in range(6)]

    def __call__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is outside range({self.n})")
        while True:  # at most 4 rounds on average: the domain is below 4n
            left, right = i >> self._half, i & self._low
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key) & self._low)
            i = (left << self._half) | right
            if i < self.n:
                return i


@dataclass(frozen=True)
class Visit:
    """One place in the endless stream of samples: which sample, and how often it has been seen before."""

    index: int
    seen: int


class Order:
    """The endless order of samples from one source, or several mixed by weight; a function of the position alone.

    Every pass over a source is a permutation of its own. With weights a fixed table of about `_PERIOD` turns spreads
    the sources, so the position within a source is known without counting. Without weights all are one.
    """

    _PERIOD = 1 << 16

    def __init__(self, sizes: list[int], weights: list[float] | None = None, seed: int = 0):
        if any(size < 1 for size in sizes):
            raise ValueError("every source needs at least one sample")
        self.sizes, self.seed = list(sizes) if weights else [sum(sizes)], seed
        self._starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self._cache: dict[tuple[int, int], Permutation] = {}
        self._second = Permutation(sum(sizes), "instead", seed)
        self._turns, self._ranks, self._counts = self._table(weights or [1.0])

    def _table(self, weights: list[float]) -> tuple[list[int], list[int], list[int]]:
        """For each turn of a period: whose it is and which of its turns; and each source's turns a period."""
        if len(weights) == 1:
            return [0], [0], [1]
        total, period = sum(weights), self._PERIOD
        counts = [max(1, round(period * w / total)) for w in weights]
        turns = sorted((((j + 0.5) / c, k) for k, c in enumerate(counts) for j in range(c)))
        used, owners, ranks = [0] * len(counts), [], []
        for _, k in turns:
            owners.append(k)
            ranks.append(used[k])
            used[k] += 1
        return owners, ranks, counts

    def at(self, position: int) -> Visit:
        """The sample at a position of the stream."""
        block, turn = divmod(position, len(self._turns))
        source = self._turns[turn]
        seen, place = divmod(block * self._counts[source] + self._ranks[turn], self.sizes[source])
        if (source, seen) not in self._cache:
            self._cache = {k: v for k, v in self._cache.items() if k[0] != source or k[1] == seen - 1}
            self._cache[source, seen] = Permutation(self.sizes[source], "order", self.seed, source, seen)
        return Visit(self._starts[source] + self._cache[source, seen](place), seen)

    def instead(self, position: int, attempt: int) -> Visit:
        """The replacement for an unreadable sample: from a second permutation, so the others do not move.

        Its visit count is negative: a replacement never repeats the numbers of a regular visit.
        """
        place = _mix(position * 64 + attempt + self.seed) % self._second.n
        return Visit(self._second(place), -1 - position)

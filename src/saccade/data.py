"""Samples, sources and batches: what lies on disk, and what a step receives.

Axis letters, here and everywhere: B batch, T time, C channels, H height, W width, N patches, D width of features,
R registers, K kept or chosen tokens, S side of a crop.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from saccade.draws import Order, Permutation, hash64
from saccade.errors import SaccadeError, Unreadable

CANVAS_LIMIT = 1 << 33
"""The largest canvas in bytes that `collate` makes."""

Batch = dict[str, Tensor]
"""Tensors by name. `collate` makes: pixels [B T C H W], size [B 2] (height and width that are picture, not padding),
key [B] (hashed sample keys), seen [B], place [B] (position in the global batch); where samples carry text also
text_key [B] (hashed texts) and text [B L]: tokens, or UTF-8 bytes, zero padded, with text_length [B].
A recipe's `views` turns these into what its `forward` reads."""


Tokenize = Callable[[list[str]], Int[Tensor, "b l"]]
"""Texts to rows of tokens, all of one length."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One item as it lies on disk. `pixels` [T C H W] are uint8, uint16 or float32 (T = 1 for a picture), or None."""

    key: str
    pixels: Shaped[Tensor, "t c h w"] | None = None
    texts: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


class Source(ABC):
    """Anything with `len` and `[i] -> Sample`. A sample that cannot be read raises `errors.Unreadable`.

    The other methods answer without decoding where a source can; the defaults read the sample.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def key(self, index: int) -> str:
        """The sample's stable name."""
        return self[index].key

    def label(self, index: int) -> str | None:
        """Its class, where there is one."""
        return self[index].label

    def group(self, index: int) -> str | None:
        """What must not be split: a patient, a slide, a scene."""
        return self[index].group

    def content(self, index: int) -> bytes:
        """The bytes that are hashed into the data fingerprint."""
        sample = self[index]
        pixels = b"" if sample.pixels is None else sample.pixels.contiguous().numpy().tobytes()
        return pixels + "\0".join(sample.texts).encode()

    def size(self, index: int) -> int:
        """How many bytes `content` has."""
        return len(self.content(index))

    def origin(self, index: int) -> str:
        """The folder, list or shard it comes from."""
        return ""

    def words(self, index: int) -> tuple[bytes, ...]:
        """Its texts as they lie on disk, whatever is wrong with them."""
        return tuple(text.encode() for text in self[index].texts)

    def orphans(self) -> Iterator[str]:
        """Texts whose picture is not there, by name."""
        return iter(())

    def parts(self) -> tuple[list[int], list[float] | None]:
        """Sizes of the sources mixed here, in the order of their samples, and their weights: what `Order` takes."""
        return [len(self)], None


class Kind(NamedTuple):
    """What the samples of one batch have in common."""

    dtype: torch.dtype | None
    frames: int
    channels: int
    text: bool

    def __str__(self) -> str:
        picture = "no picture" if self.dtype is None else f"{self.frames} x {self.channels} channels of {self.dtype}"
        return picture.replace("1 x ", "", 1).replace("torch.", "") + (" with text" if self.text else "")


def kind_of(sample: Sample) -> Kind:
    """The kind of one sample."""
    if sample.pixels is None:
        return Kind(None, 0, 0, bool(sample.texts))
    frames, channels = sample.pixels.shape[:2]
    return Kind(sample.pixels.dtype, frames, channels, bool(sample.texts))


def common_kind(source: Source, probes: int = 9) -> Kind:
    """The kind that most of a few readable samples have, spread evenly over the source: what training expects.

    Raises `SaccadeError` when none of 64 samples can be read.
    """
    votes: Counter[Kind] = Counter()
    first = ""
    for number in range(64):
        place = Permutation(len(source), "probe")(number) if number < len(source) else None
        if place is None or votes.total() == probes:
            break
        try:
            votes[kind_of(source[place])] += 1
        except Unreadable as error:
            first = first or str(error)
    if not votes:
        raise SaccadeError(
            f"none of the samples that were tried can be read; the first: {first}", hint="look at the files"
        )
    return votes.most_common(1)[0][0]


def caption(sample: Sample, seen: int, seed: int = 0) -> str:
    """The text of a sample that a visit shows: n visits show each of n texts once, every n of them in another order."""
    count = len(sample.texts)
    if count == 1:
        return sample.texts[0]
    turn, place = divmod(seen, count)
    return sample.texts[Permutation(count, "caption", seed, sample.key, turn)(place)]


def same_text(text: str) -> str:
    """What two texts have in common that are the same: case and spaces aside."""
    return " ".join(text.split()).casefold()


def collate(
    samples: Sequence[Sample],
    seen: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
    tokenize: Tokenize | None = None,
    seed: int = 0,
) -> Batch:
    """Samples to a batch: pictures padded with zeros right and below to the largest, texts as tokens or UTF-8 bytes.

    `seen` are the visit counts (0 if None), which with the `seed` also choose among several texts of a sample; `places`
    are positions in the global batch. Pictures keep their HWC memory. Raises `SaccadeError` for samples of different
    kinds.
    """
    kinds = [kind_of(sample) for sample in samples]
    odd = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise SaccadeError(
            f"a batch cannot hold both {samples[0].key!r} ({kinds[0]}) and {samples[odd].key!r} ({kinds[odd]})",
            hint="keep pictures of different depth, channels or length in different folders",
        )
    if kinds[0].dtype is None and not kinds[0].text:
        raise SaccadeError(f"the sample {samples[0].key!r} has neither a picture nor a text")
    seen = [0] * len(samples) if seen is None else seen
    batch = {
        "key": torch.tensor([hash64(sample.key) for sample in samples], dtype=torch.int64),
        "seen": torch.tensor(seen, dtype=torch.int64),
        "place": torch.tensor(range(len(samples)) if places is None else places, dtype=torch.int64),
    }
    if kinds[0].dtype is not None:
        batch["pixels"], batch["size"] = _canvas([sample.pixels for sample in samples if sample.pixels is not None])
    if kinds[0].text:
        texts = [caption(sample, visit, seed) for sample, visit in zip(samples, seen, strict=True)]
        batch["text_key"] = torch.tensor([hash64(same_text(text)) for text in texts])
        batch |= _as_bytes(texts) if tokenize is None else {"text": tokenize(texts)}
    return batch


def _as_bytes(texts: list[str]) -> Batch:
    """Texts as rows of bytes, and how many each has."""
    rows = [torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8) for text in texts]
    length = torch.tensor([len(text.encode()) for text in texts], dtype=torch.int64)
    return {"text": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "text_length": length}


def _canvas(pictures: list[Shaped[Tensor, "t c _ _"]]) -> tuple[Shaped[Tensor, "b t c h w"], Shaped[Tensor, "b 2"]]:
    """Pictures on one zero canvas each, and their true sizes. The memory is [B T H W C], as decoders write it."""
    size = torch.tensor([picture.shape[-2:] for picture in pictures], dtype=torch.int64)
    height, width = size.amax(0).tolist()
    frames, channels = pictures[0].shape[:2]
    shape = (len(pictures), frames, height, width, channels)
    count = len(pictures) * frames * height * width * channels
    if count * pictures[0].element_size() > CANVAS_LIMIT:
        raise SaccadeError(
            f"{len(pictures)} pictures on a canvas of {height}x{width} take more than {CANVAS_LIMIT >> 30} GiB",
            hint="let pictures be shrunk at decoding (a short side), or make the batch smaller",
        )
    if get_worker_info() is None:
        buffer = torch.zeros(shape, dtype=pictures[0].dtype)
    else:  # written where the main process will read it; fresh shared memory is zero
        storage = torch.UntypedStorage._new_shared(count * pictures[0].element_size())
        buffer = torch.empty(0, dtype=pictures[0].dtype).set_(storage).view(shape)
    for slot, picture in zip(buffer, pictures, strict=True):
        slot[:, : picture.shape[2], : picture.shape[3]] = picture.permute(0, 2, 3, 1)
    return buffer.permute(0, 1, 4, 2, 3), size


class Failure(NamedTuple):
    """A sample that could not be read at a position of the stream."""

    key: str
    reason: str
    position: int
    source: str


@dataclass(frozen=True)
class Delivery:
    """A micro-batch: of which step, the how manieth of it, and what could not be read on the way."""

    batch: Batch
    unreadable: list[Failure]
    step: int
    micro: int

    def pin_memory(self) -> Delivery:
        """The same in page-locked memory; the DataLoader calls this."""
        return dataclasses.replace(self, batch={name: tensor.pin_memory() for name, tensor in self.batch.items()})


class Reader(Dataset[Any]):
    """Positions of the stream to samples. An unreadable sample, or one of another kind, is replaced and reported."""

    _ATTEMPTS = 32

    def __init__(
        self, source: Source, order: Order, kind: Kind, batch: int, share: int, tokenize: Tokenize | None = None
    ):
        self._source, self._order, self._kind, self._tokenize = source, order, kind, tokenize
        self._batch, self._share = batch, share  # of all ranks, and of one micro-batch over all ranks

    def read(self, position: int) -> tuple[Sample, int, list[Failure]]:
        """The sample at a position or its replacement, its visit count, and the failures before it.

        Raises `SaccadeError` when `_ATTEMPTS` replacements in a row fail as well.
        """
        failures: list[Failure] = []
        visit = self._order.at(position)
        for attempt in range(self._ATTEMPTS + 1):
            try:
                sample = self._source[visit.index]
                if kind_of(sample) != self._kind:
                    raise Unreadable(sample.key, f"{kind_of(sample)}, where most samples are {self._kind}")
                return sample, visit.seen, failures
            except Unreadable as error:
                failures.append(Failure(error.key, error.reason, position, self._source.origin(visit.index)))
                visit = self._order.instead(position, attempt)
        first = failures[0]
        raise SaccadeError(
            f"{len(failures)} samples in a row cannot be read; the first: {first.key}: {first.reason}",
            path=first.source,
            hint="most of the data seem unreadable",
        )

    def __getitem__(self, position: int) -> Sample:
        return self.read(position)[0]

    def __getitems__(self, positions: list[int]) -> Delivery | SaccadeError:
        """A micro-batch. An error is returned, not raised: the DataLoader would bury it in a worker's traceback."""
        try:
            samples, seen, failures = zip(*map(self.read, positions), strict=True)
            places = [position % self._batch for position in positions]
            batch = collate(samples, seen, places, self._tokenize, self._order.seed)
        except SaccadeError as error:
            return error
        step, place = divmod(positions[0], self._batch)
        return Delivery(batch, [failure for some in failures for failure in some], step, place // self._share)


class MicroBatches(Sampler[list[int]]):
    """The positions of each micro-batch of one rank, from `first_step` up to `last_step` (not included).

    Step s has the positions [s * batch, (s + 1) * batch); its micro-batch a takes the next `batch / accumulate` of
    them, of which rank r has the r-th of `world` equal parts. Raises `SaccadeError` when `batch` cannot be divided so.
    """

    def __init__(self, first_step: int, last_step: int, batch: int, accumulate: int, rank: int, world: int):
        parts = world * accumulate
        if batch % parts:
            below, above = batch // parts * parts, (batch // parts + 1) * parts
            fitting = ", ".join(str(n) for n in range(1, batch // world + 1) if batch % (world * n) == 0)
            raise SaccadeError(
                f"a batch of {batch} cannot be divided over {world} ranks x {accumulate} micro-batches",
                path="--batch",
                hint=f"use a batch of {f'{below} or {above}' if below else above}"
                + (f", or --accumulate {fitting}" if fitting else ""),
            )
        self._steps, self._batch, self._share = range(first_step, last_step), batch, batch // accumulate
        self._starts = range(rank * (batch // parts), batch, self._share)
        self._size = batch // parts

    def __len__(self) -> int:
        return len(self._steps) * len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for start in self._starts:
                first = step * self._batch + start
                yield list(range(first, first + self._size))


def keep_memory() -> None:
    """Let the C library keep up to 256 MB that was freed, for the next pictures.

    By default glibc returns what a picture took, and fresh pages cost up to a third of decoding. `loader` calls this.
    """
    with contextlib.suppress(OSError, AttributeError):  # only glibc can be told
        tell = ctypes.CDLL(None).mallopt
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            tell(setting, 1 << 28)


def _start_worker(_: int) -> None:
    """One thread a worker; a stop is the main process's to handle, at the next step."""
    keep_memory()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # SIGTERM often goes to a whole job; only the main process's own may end a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def loader(
    source: Source,
    order: Order,
    *,
    first_step: int,
    last_step: int,
    batch: int,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
    tokenize: Tokenize | None = None,
) -> Iterator[Delivery]:
    """This rank's micro-batches of the steps [first_step, last_step), in order; the same for any number of workers.

    The workers also `tokenize`; without, texts come as bytes.
    Raises `SaccadeError` for a batch that cannot be divided and for data that cannot be read.
    """
    keep_memory()
    positions = MicroBatches(first_step, last_step, batch, accumulate, rank, world)
    reader = Reader(source, order, common_kind(source), batch, batch // accumulate, tokenize)
    deliveries = DataLoader(
        reader,
        batch_sampler=positions,
        collate_fn=_as_it_is,  # a micro-batch comes as one delivery: there is nothing left to collate
        num_workers=workers,
        prefetch_factor=3 if workers else None,
        pin_memory=pin,
        worker_init_fn=_start_worker,
    )
    return _unwrap(deliveries)


def _as_it_is(delivery: Any) -> Any:
    return delivery


def _unwrap(deliveries: DataLoader[Any]) -> Iterator[Delivery]:
    born_with = {signal.SIGINT} | ({signal.SIGTERM} if sys.platform == "linux" else set())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, born_with)  # in workers too, from their first moment
    try:
        started = iter(deliveries)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for delivery in started:
        if isinstance(delivery, SaccadeError):
            raise delivery
        yield delivery


class Quarantine:
    """The file of what could not be read, one JSON object a line; each key once, also when a run goes on.

    `max_share` is the share of reads that may fail, judged after a pass over `samples` or 1,000 reads if that is less.
    """

    def __init__(self, path: Path, max_share: float, samples: int):
        self._path, self._max_share, self._enough = path, max_share, min(samples, 1000)
        self._keys: set[str] = set()
        self.reads = self.failures = 0
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a last line cut by a crash
                    self._keys.add(json.loads(line)["key"])

    def __len__(self) -> int:
        """How many samples have been set aside."""
        return len(self._keys)

    def note(self, delivery: Delivery) -> None:
        """Count a delivery and write down what is new. Raises `SaccadeError` when too many reads fail."""
        failures = delivery.unreadable
        self.reads += len(delivery.batch["key"]) + len(failures)
        self.failures += len(failures)
        lines = ""
        for failure in failures:
            if failure.key not in self._keys:
                self._keys.add(failure.key)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                record = {"key": failure.key, "reason": failure.reason, "source": failure.source, "time": now}
                lines += json.dumps(record) + "\n"
        if lines:
            self._append(lines)
        if self.reads >= self._enough and self.failures > self._max_share * self.reads:
            raise SaccadeError(
                f"{self.failures} of {self.reads} reads failed, more than the allowed share {self._max_share:g}",
                path=self._path,
                hint="the file names each with its reason; mend the data or allow a larger share",
                code=1,
            )

    def _append(self, lines: str) -> None:
        """One write to the end, on a line of its own, so that several processes may share the file."""
        cut = self._path.exists() and self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n")
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (("\n" if cut else "") + lines).encode())
        finally:
            os.close(handle)


def fingerprint(source: Source) -> dict[str, Any]:
    """What the data are: blake3 over every key, and over sizes and contents as far as that is quick.

    Sizes are covered for up to 100,000 samples and contents up to 20,000 samples of 256 MB together; beyond that, a
    fixed choice of 20,000 sizes and of 256 contents. `covered` says how many; `fingerprint` is the hash of all three.
    """
    count = len(source)
    keys = blake3()
    for start in range(0, count, 4096):
        names = "".join(f"{source.key(index)}\n" for index in range(start, min(start + 4096, count)))
        keys.update(names.encode("utf-8", "surrogateescape"))
    sized = range(count) if count <= 100_000 else _chosen(count, 20_000)
    sizes, total = blake3(), 0
    for index in sized:
        size = _or_none(source.size, index)
        total += size or 0
        sizes.update(f"{size}\n".encode())
    read = range(count) if count <= 20_000 and total <= 256 << 20 else _chosen(count, 256)
    contents = blake3()
    for index in read:
        contents.update(blake3(_or_none(source.content, index) or b"").digest())
    record = {
        "samples": count,
        "keys": {"blake3": keys.hexdigest(), "covered": count},
        "sizes": {"blake3": sizes.hexdigest(), "covered": len(sized), "bytes": total},
        "contents": {"blake3": contents.hexdigest(), "covered": len(read)},
    }
    return {"fingerprint": blake3(json.dumps(record, sort_keys=True).encode()).hexdigest(), **record}


def _chosen(count: int, wanted: int) -> list[int]:
    """A fixed choice of samples, in ascending order so that a disk reads forward."""
    permutation = Permutation(count, "fingerprint")
    return sorted(permutation(place) for place in range(min(count, wanted)))


def _or_none(question: Any, index: int) -> Any:
    try:
        return question(index)
    except Unreadable:
        return None

"""Ranks, wrappers and sharded tensors on disk, with torch's own DDP, FSDP2 and DCP.

DCP's `.metadata` is a pickle. It is read by an unpickler that knows the few names of a good one and refuses all
others, so nothing in a hostile one runs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from saccade.errors import SaccadeError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Who takes part: this process's rank, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def highest(self, value: int) -> int:
        """The largest value that any rank gives. On the CPU, so that no GPU has to wait."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def mean(self, values: list[float]) -> list[float]:
        """The mean over ranks, for each value."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return (tensor / self.world).tolist()

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first rank's `work` returns, on every rank. Its `SaccadeError` is raised on every rank too."""
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except SaccadeError as error:
                box[1] = error
            except Exception as error:  # a full disk, a fault of ours: the others must not wait for it
                dist.broadcast_object_list([None, SaccadeError(f"the first rank failed: {error!r}", code=1)])
                raise
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise self.shared(box[1])
        return box[0]

    def shared(self, error: SaccadeError) -> SaccadeError:
        """An error that is raised on every rank, and said by the first."""
        error.said_elsewhere = not self.first
        return error

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """What every rank does here succeeds on all of them, or ends all of them with one message."""
        found: SaccadeError | None = None
        try:
            yield
        except SaccadeError as error:
            found = error
        everyone = self.gather(found)
        speaker = next((rank for rank, error in enumerate(everyone) if error is not None), None)
        if speaker is not None:
            error = everyone[speaker]
            assert error is not None
            error.said_elsewhere = self.rank != speaker
            raise error

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks of what each of them has, without gradient; alone, what it has."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks of what each of them has, without gradient; alone, what it has."""
    return mean(tensor) * world()


def largest(tensor: Tensor) -> Tensor:
    """The largest over ranks of what each of them has, without gradient; alone, what it has."""
    found = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


class _Gather(torch.autograd.Function):
    """Every rank's rows; backward sums over ranks what their losses ask of each row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = list(rows.new_empty(dist.get_world_size(), *rows.shape))
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "n ..."]:
    """The rows of all ranks, in the order of ranks and with gradient; alone, what it is given.

    Every rank has equally many. Gradients are right where the loss is the mean over ranks of what each computes: they
    come out as those of the ranks' sum, and the wrappers (DDP, FSDP2) take the mean.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


class Passing:
    """Tensors on their way to the rank before, while those of the rank after come in; alone, they stay.

    After as many passings as there are ranks everything is where it was. Without gradient.
    """

    def __init__(self, *tensors: Tensor):
        self._arriving, self._works = [tensor.contiguous() for tensor in tensors], []
        if world() == 1:
            return
        self._leaving, self._arriving = self._arriving, [torch.empty_like(tensor) for tensor in self._arriving]
        before, after = (rank() - 1) % world(), (rank() + 1) % world()
        self._works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor, before) for tensor in self._leaving]
            + [dist.P2POp(dist.irecv, tensor, after) for tensor in self._arriving]
        )

    def arrived(self) -> list[Tensor]:
        """What the rank after has sent."""
        for work in self._works:
            work.wait()
        return self._arriving


def rank() -> int:
    """Which rank this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first_row(rows: Shaped[Tensor, "b ..."]) -> int:
    """Where this rank's rows begin among those of all ranks."""
    return len(rows) * rank()


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. An already initialised process group is used as it is."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ and not dist.is_initialized():
        yield Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if ours:
            _ended.append(dist.group.WORLD)
            dist.destroy_process_group()


_ended: list[Any] = []
"""Process groups that are through. One that dies with the DDP wrapper that uses it joins its threads under Python's
lock, which they wait for: the process would hang at its end. So the wrapper dies first, and the group at exit."""


@atexit.register
def _end() -> None:
    gc.collect()  # wrappers in reference cycles
    _ended.clear()


def wrap(method: nn.Module, ranks: Ranks, sharding: str, units: tuple[type[nn.Module], ...]) -> nn.Module:
    """The method as several ranks train it: `ddp` copies it, `fsdp` shards it by `units`. Alone it stays as it is."""
    if sharding == "fsdp":
        if ranks.world == 1:
            return method
        mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
        for module in method.modules():
            if isinstance(module, units):
                fully_shard(module, mesh=mesh)
        fully_shard(method, mesh=mesh)
        return method
    if ranks.world == 1:
        return method
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    with warnings.catch_warnings():  # its successor `forward_sync_buffers` is not in torch 2.11
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            method, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def sharded(method: nn.Module) -> bool:
    """Whether ranks hold parts of a method's weights, so that all must use them together."""
    return isinstance(method, FSDPModule)


def unshard(wrapped: nn.Module) -> None:
    """Gathers the parameters that a sharded method holds itself, outside its units, to be read before its forward."""
    if isinstance(wrapped, FSDPModule):
        wrapped.unshard()


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Puts into a tensor, of which this rank may hold a part, its part of one that every rank has whole."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
    tensor.copy_(whole)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors gathered on the CPU of every rank: the copy that evaluation and export see."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


_DTYPES = [kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)]
_ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {"Size", "device", "dtype"} | {str(kind)[6:] for kind in _DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip
"""All that the metadata of a good checkpoint names."""


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def metadata(directory: Path) -> Metadata:
    """The table of contents of a sharded checkpoint. Raises `SaccadeError` for one that is damaged or hostile."""
    path = directory / ".metadata"
    try:
        found = _Careful(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise SaccadeError(
            f"the checkpoint {directory} has no readable .metadata: {error.strerror}", path=path
        ) from None
    except Exception as error:  # whatever a broken pickle raises
        raise SaccadeError(
            f"the checkpoint {directory} is refused, nothing in it was run: its .metadata is no checkpoint's: {error}",
            path=path,
            hint="delete this checkpoint, and the one before it is used",
        ) from None
    if not isinstance(found, Metadata):
        raise SaccadeError(f"the checkpoint {directory} is refused: its .metadata is no checkpoint's", path=path)
    return found


class _Reader(filesystem.FileSystemReader):
    """DCP's reader, with the careful unpickler in the place of pickle's."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        found = metadata(Path(self.path))
        found.storage_meta = found.storage_meta or dcp.metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Writer(filesystem.FileSystemWriter):
    """DCP's writer. It stores no path in `.metadata`: runs move, and a Path is one class less to let in."""

    def storage_meta(self) -> None:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that a single process saves alone: it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def save_tensors(tensors: dict[str, Tensor], directory: Path, ranks: Ranks) -> None:
    """Writes tensors, sharded or not, one file a rank; the files are on the disk when this returns."""
    writer = _Writer(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    with _quiet():
        dcp.save(tensors, storage_writer=writer, no_dist=ranks.world == 1)


def load_tensors(tensors: dict[str, Tensor], directory: Path, ranks: Ranks, *, part: bool = False) -> None:
    """Reads a checkpoint of any number of ranks into these tensors, in place; `part`: what else it holds is left out.

    Raises `SaccadeError` when names or shapes differ: a checkpoint of another architecture.
    """
    stored = {name: entry.size for name, entry in metadata(directory).state_dict_metadata.items()}
    missing, unexpected = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    unexpected = [] if part else unexpected
    reshaped = [name for name in sorted(tensors.keys() & stored.keys()) if stored[name] != tensors[name].shape]
    differences = [
        f"{len(names)} {kind} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if differences:
        raise SaccadeError(
            f"the checkpoint {directory} is of another architecture: {'; '.join(differences)}",
            path=directory,
            hint="give the --recipe, --arch and --image-size of this run, or another --out",
        )
    with _quiet():
        dcp.load(tensors, storage_reader=_Reader(directory), no_dist=ranks.world == 1)

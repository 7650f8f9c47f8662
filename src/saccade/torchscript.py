"""Tensors of a TorchScript archive (OpenAI's CLIP) without running it: neither its code nor its pickle is executed.

Such a file is a zip: `data.pkl` is a tree of modules whose classes live in `code/`, storages lie beside it as bytes.
The modules become inert parts here, and of what a pickle may call only the building of a tensor is there, by our hand.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
_BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, NotImplementedError,
    RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError, MemoryError,
)  # fmt: skip


class _Part:
    """A module of the archive: its attributes and nothing that could act."""


class _Refused(Exception):
    """What a pickle asks for and does not get."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip as `torch.jit.save` writes it."""
    return _root(path) is not None


def _root(path: Path) -> str | None:
    """The folder inside the zip."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _BROKEN:
        return None
    return next((name.removesuffix("constants.pkl") for name in names if name.endswith("/constants.pkl")), None)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive by the names of its modules' attributes. Raises `SaccadeError`."""
    root = _root(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _flat(_Reader(archive, root or "").tree())
    except _Refused as refused:
        reason = f"holds {refused}, which no module of tensors needs"
    except _BROKEN as error:
        reason = f"cannot be read: {' '.join(f'{type(error).__name__} {error}'.split())}"
    raise SaccadeError(
        f"{path} is a TorchScript archive that {reason}: nothing of it was run or loaded",
        path=path,
        hint="ask for safetensors, or copy it again",
    )


class _Reader(pickle.Unpickler):
    """Reads `data.pkl`. Each class and function that it gets is made anew, so that none can be changed."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}
        self.content = self.member("data.pkl")
        super().__init__(io.BytesIO(self.content), encoding="utf-8")

    def member(self, name: str) -> bytes:
        """The bytes of one file in the zip, which are never packed: so none can be larger than the archive."""
        found = self.archive.getinfo(self.root + name)
        if found.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"{name} in packed form")
        return self.archive.read(found)

    def tree(self) -> Any:
        """The modules. Numbers of the pickle's memory that are no sensible ones would make it reserve that much."""
        if f"{self.root}byteorder" in self.archive.namelist() and self.member("byteorder") != b"little":
            raise _Refused("big-endian numbers")
        for code, argument, _ in pickletools.genops(self.content):
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(self.content):
                raise _Refused(f"memory for {argument} objects")
        return self.load()

    def find_class(self, module: str, name: str) -> Any:
        """Parts, plain containers, the dtype of a storage, our own making of a tensor; anything else is refused."""
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Part", (_Part,), {})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
            ("collections", "OrderedDict"): dict,
            **{("torch.jit._pickle", kind): lambda values: values for kind in _LISTS},
        }
        if (module, name) not in allowed:
            raise _Refused(f"{module}.{name}")
        found = allowed[module, name]
        return found if isinstance(found, type) else lambda *arguments: found(*arguments)

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage, as one row."""
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise _Refused(f"a {kind!r} beside its pickle")
        if key not in self.storages:
            content = bytearray(self.member(f"data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor on a storage; torch itself refuses sizes beyond its end."""
    return storage.as_strided(size, stride, offset)


def _flat(tree: Any) -> dict[str, Tensor]:
    """Tensors by the names of attributes and keys that lead to them. What stands in two places is looked at once."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", tree)], set()
    while waiting:
        before, here = waiting.pop()
        inside = vars(here) if isinstance(here, _Part) else here
        if id(here) in seen or not isinstance(inside, dict):
            continue
        seen.add(id(here))
        for key, value in inside.items():
            if isinstance(value, Tensor):
                found[f"{before}{key}"] = value
            else:
                waiting.append((f"{before}{key}.", value))
    return found

"""A file to its tensors. Nothing here runs what a file says: a pickle is read for tensors and plain containers."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.torchscript import is_torchscript, read_torchscript

ARRAYS = ".npz"
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")
_LARGEST_HEADER = 100_000_000


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, those in nested dictionaries by joined names. Raises `SaccadeError`."""
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _safe(path, start)
    if path.suffix == ARRAYS:
        return _arrays(path)
    if is_torchscript(path):
        return read_torchscript(path)
    if path.suffix == ".onnx":
        from saccade.onnx import files

        return files.tensors(path)
    try:
        # settings that some keep beside their tensors; and what torch warns of, the restricted reader refuses by itself
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start[:4] == b"PK\x03\x04")
    except Exception as error:  # what is damaged breaks the reader anywhere: struct.error, AttributeError, …
        raise _refused_pickle(path, start, f"{error}".strip()) from None
    if not isinstance(content, Mapping):
        raise SaccadeError(f"{path} holds a {type(content).__name__}, not tensors by name", path=path)
    return _flat(content)


def _flat(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors by joined names. A container that stands in several places, or in itself, is looked at once."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    seen = {id(content)}
    while waiting:
        before, inside = waiting.pop()
        for key, value in inside.items():
            if isinstance(value, Tensor) and value.layout == torch.strided:
                found[f"{before}{key}"] = value.detach()
            elif isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{before}{key}.", value))
    return found


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz (big_vision's files). Raises `SaccadeError` for objects and for damage."""
    found: dict[str, Tensor] = {}
    name = "its list"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if not isinstance(array, np.ndarray):
                    raise ValueError("it is no array")
                if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy keeps bfloat16
                    found[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
                elif array.dtype.kind in "biuf":
                    found[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (
        ValueError,
        TypeError,
        EOFError,
        OSError,
        KeyError,
        MemoryError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise SaccadeError(
            f"{path} cannot be read at {name!r}: {' '.join(str(error).split())}: nothing of it was run or loaded",
            path=path,
            hint="objects in an .npz are pickles, which are never opened; or the file is damaged: copy it again",
        ) from None
    return found


def _refused_pickle(path: Path, start: bytes, reason: str) -> SaccadeError:
    """Why torch's restricted reader stopped, in one line: the name of what is neither tensor nor plain container."""
    words = reason.split()
    named = next((words[i + 1] for i, word in enumerate(words[:-1]) if word in ("GLOBAL", "global")), None)
    what = "a pickle that the restricted reader cannot read" if _is_pickle(start) else "no readable file of tensors"
    if named:
        what = f"a pickle that holds {named}, neither tensor nor plain container"
    return SaccadeError(
        f"{path} is {what}: nothing of it was run or loaded",
        path=path,
        hint="ask for safetensors, or for a file that holds the state dict alone",
    )


def _is_pickle(start: bytes) -> bool:
    """Whether a file starts as a pickle does, or as the archive that torch puts one into."""
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05")


def _safe(path: Path, start: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `SaccadeError` for a pickle of that name and for a damaged file."""
    if _is_pickle(start):
        raise SaccadeError(
            f"{path} is named safetensors but is a pickle, which can run code when it is opened: it was not",
            path=path,
            hint="ask for real safetensors; an official .pth is read under its own name",
        )
    header, size = int.from_bytes(start[:8], "little"), path.stat().st_size
    if len(start) < 8 or header > min(_LARGEST_HEADER, size - 8):
        raise SaccadeError(
            f"{path} is no safetensors file: it has {size} bytes and says that its header has {header}",
            path=path,
            hint="copy it again",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SaccadeError(
            f"{path} is no readable safetensors file: {' '.join(str(error).split())}", path=path, hint="copy it again"
        ) from None


def hash_of(*files: Path) -> str:
    """Of one file; of several, of their hashes."""
    each = [blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest() for path in files]
    return each[0] if len(each) == 1 else blake3("".join(each).encode()).hexdigest()

"""ONNX files: opened without trusting them, run by onnxruntime's own operators, and read for their tensors."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.errors import SaccadeError

FORMAT, MODEL = "saccade-onnx-1", "model.onnx"
_OPERATORS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
"""Domains of operators that onnxruntime itself brings."""


def needed(*libraries: str) -> None:
    """Raises `SaccadeError` that names the extra where a library is not installed."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise SaccadeError(f"ONNX needs {' and '.join(missing)}", hint="pip install 'saccade[onnx]'")


def opened(path: Path, *, weights: bool = True) -> Any:
    """The ModelProto of a file. Raises `SaccadeError` for what is no ONNX and for what would leave its folder.

    Without `weights`, those that lie in other files stay there.
    """
    needed("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
        foreign = {node.domain for node in _nodes(model)} - set(_OPERATORS) - {f.domain for f in model.functions}
        beside = _files_beside(path, model)
        if weights and beside:
            onnx.load_external_data_for_model(model, str(path.parent))
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise SaccadeError(
            f"{path} is no readable ONNX file: {' '.join(str(error).split())}", path=path, hint="copy it again"
        ) from None
    if not model.graph.node:
        raise SaccadeError(f"{path} is no ONNX file: it has no operators", path=path, hint="copy it again")
    if foreign:
        raise SaccadeError(
            f"{path} needs operators that are not onnxruntime's own: {', '.join(sorted(foreign))}",
            path=path,
            hint="libraries of operators are never loaded; export it with standard ones",
        )
    return model


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _files_beside(path: Path, model: Any) -> list[Path]:
    """The files that hold its other weights. Raises `SaccadeError` for one that is not beside it."""
    tensors = [tensor for graph in _graphs(model.graph) for tensor in graph.initializer]
    for node in _nodes(model):
        tensors += [tensor for attribute in node.attribute for tensor in (attribute.t, *attribute.tensors)]
    named = {said.value for tensor in tensors for said in tensor.external_data if said.key == "location"}
    files = [path.parent / name for name in sorted(named)]
    for file in files:
        if file.name not in named or file.is_symlink() or not file.is_file():
            raise SaccadeError(
                f"{path} keeps weights in {file}, which is no file beside it",
                path=path,
                hint="weights are read from the file's own folder only: copy the whole folder",
            )
    return files


def beside(path: Path) -> list[Path]:
    """The file and those that hold its other weights. Raises `SaccadeError`."""
    return [path, *_files_beside(path, opened(path, weights=False))]


def session(path: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as torch has. Raises `SaccadeError`."""
    needed("onnxruntime")
    opened(path, weights=False)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise SaccadeError(
            f"onnxruntime cannot run {path}: {' '.join(str(error).split())}", path=path, hint="is it damaged?"
        ) from None


def said(model: Any, path: Path) -> dict[str, Any] | None:
    """What saccade wrote into a file of its own; None for another's. Raises `SaccadeError` for a newer one."""
    text = next((prop.value for prop in model.metadata_props if prop.key == "saccade"), None)
    if text is None:
        return None
    try:
        found = json.loads(text)
        form = found.get("format")
    except (ValueError, AttributeError, RecursionError):
        found, form = {}, "none"
    if form != FORMAT:
        raise SaccadeError(
            f"{path} has format {form!r}, which this version does not know",
            path=path,
            hint=f"it reads {FORMAT!r}; a newer saccade may have written it",
        )
    assert isinstance(found, dict)
    return found


_ANONYMOUS = re.compile(r"onnx::\w+_\d+|val_\d+|_val_\d+")


def tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a graph by the names that they had in the network.

    Exporters keep names but for matrices, which they transpose: such a one is named by the bias that is added to what
    it makes, else by the place of the node that uses it. A position table that they cut into the class token's row and
    the patches' is put together again. Raises `SaccadeError`.
    """
    from onnx import TensorProto, numpy_helper

    model = opened(path)
    graph = model.graph
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    found = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
        if tensor.data_type in kinds
    }
    biases = {
        out: name
        for node in graph.node
        if node.op_type == "Add"
        for name in node.input
        if name.endswith(".bias")
        for out in node.input
    }
    rows: dict[str, list[str]] = {}
    for node in graph.node:
        nameless = [name for name in node.input if name in found and _ANONYMOUS.fullmatch(name)]
        place = ".".join(node.name.strip("/").split("/")[:-1])
        if node.op_type == "MatMul" and nameless:
            bias = biases.get(node.output[0], f"{place}.bias")
            found[bias.removesuffix("bias") + "weight"] = found.pop(nameless[0]).T.contiguous()
        elif node.op_type in ("Concat", "Reshape") and place.endswith("embeddings"):
            rows.setdefault(f"{place}.position_embeddings", []).extend(nameless)
    for name, parts in rows.items():
        pieces = sorted((found[part] for part in parts), key=lambda piece: piece.shape[1])
        if len(pieces) == 2 and all(piece.ndim == 3 for piece in pieces) and pieces[0].shape[1] == 1:
            found[name] = torch.cat(pieces, 1)
            for part in parts:
                del found[part]
    return found

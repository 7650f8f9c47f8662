"""Int8 for CPUs, allowed only where the user's own pictures keep their neighbours."""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from saccade.data import Source
from saccade.draws import Permutation
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable
from saccade.onnx.files import MODEL, needed, opened
from saccade.onnx.reading import load
from saccade.sources import open_source
from saccade.vit import ViTConfig

INT8 = "model_int8.onnx"
LEAST = 0.9
"""Of ten neighbours nine stay: what changes places is then the tenth and the eleventh, whose distances are alike."""
_CALIBRATE, _FEWEST, _MOST, _BATCH = 64, 100, 2000, 16


def quantise(
    directory: str | Path, pictures: str | Path | Source | Sequence[str | Path | Source], *, least: float = LEAST
) -> dict[str, Any]:
    """Writes model_int8.onnx beside model.onnx, if it finds the neighbours among `pictures` that float32 finds.

    Returns `overlap` (share of the 10 nearest neighbours by cosine that are the same), `top1` (of the nearest),
    `images_per_second` {fp32, int8, ratio} measured in turns, `bytes`, and how many pictures were for what: those that
    calibrate never judge. A ViT's matrices are quantised by the values that it meets, which needs no calibration; a
    convnet's convolutions by those of 64 pictures. Raises `SaccadeError`, and writes nothing, where `overlap` is
    below `least`, where pictures are fewer than 100, and for a file that is not ours.
    """
    needed("onnx", "onnxruntime")
    place = Path(directory) / MODEL
    encoder = load(place, None)
    dynamic = isinstance(encoder.backbone.config, ViTConfig)
    source = open_source(pictures, short_side=encoder.preprocess.canvas, channels=encoder.preprocess.channels)
    order = list(map(Permutation(len(source), "int8"), range(min(len(source), _MOST + _CALIBRATE))))
    calibrating = 0 if dynamic else _CALIBRATE
    if len(order) - calibrating < _FEWEST:
        raise SaccadeError(
            f"{len(source)} pictures are too few to tell whether neighbours stay",
            path=str(pictures) if isinstance(pictures, str | Path) else None,
            hint=f"give {calibrating + _FEWEST} or more, of the kind that will be searched",
        )
    with _beside(place) as new:
        if dynamic:
            assert isinstance(encoder.backbone.config, ViTConfig)
            _dynamic(place, new, encoder.backbone.config)
        else:
            _static(place, new, _batches(encoder, source, order[:calibrating], "calibrating"))
        _sign(new, place, {})
        found = _gate(encoder, load(new, None), _batches(encoder, source, order[calibrating:], "comparing"))
        if not found["overlap"] >= least:
            raise SaccadeError(
                f"int8 keeps {found['overlap']:.1%} of the 10 nearest neighbours, and {least:.0%} are asked for",
                path=place,
                hint="nothing was written: serve the float32 file",
                code=1,
            )
        found |= {"least": least, "bytes": {"fp32": place.stat().st_size, "int8": new.stat().st_size}}
        found["pictures"]["calibration"] = calibrating
        _sign(new, place, found)
        os.replace(new, place.parent / INT8)
    return {"file": INT8, **found}


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A file that is gone unless it gets its name; onnxruntime's remarks on how it works are not shown."""
    level = logging.root.manager.disable
    with tempfile.TemporaryDirectory(prefix=".int8.", dir=place.parent) as folder:
        logging.disable(logging.WARNING)
        try:
            yield Path(folder) / INT8
        finally:
            logging.disable(level)


def _dynamic(place: Path, new: Path, config: ViTConfig) -> None:
    """Weights in int8 with a scale for each output, activations in uint8 by the range of each batch.

    The patch embedding stays, and every matrix that gives fewer values than it takes: what comes out of an MLP's
    activation has outliers, and their range leaves no steps for the rest (docs/log.md).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _prepared(place, new)
    graph = opened(prepared).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    matrices = [node for node in graph.node if node.op_type == "MatMul" and len(shapes.get(node.input[1], ())) == 2]
    embedding = (config.channels * config.patch**2, config.width)
    first = next(node.name for node in matrices if shapes[node.input[1]] == embedding)
    left = [node.name for node in matrices if shapes[node.input[1]][0] > shapes[node.input[1]][1]]
    quantize_dynamic(
        prepared, new, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[first, *left],
    )  # fmt: skip


def _static(place: Path, new: Path, batches: Iterable[Tensor]) -> None:
    """As `_dynamic`, with ranges of activations that were seen on the calibration pictures."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class _Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> Any:
            batch = next(self._batches, None)
            return (
                None
                if batch is None
                else {"images": (batch.float() / 255 if batch.dtype == torch.uint8 else batch).numpy()}
            )

    operators = ["Conv", "MatMul", "Gemm", "Add", "MaxPool"]
    quantize_static(
        _prepared(place, new), new, _Pictures(), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, op_types_to_quantize=operators,
    )  # fmt: skip


def _prepared(place: Path, new: Path) -> Path:
    """The graph with constants folded, so that every weight is one."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = new.with_name("prepared.onnx")
    quant_pre_process(str(place), str(prepared), skip_symbolic_shape=True)
    return prepared


def _sign(new: Path, place: Path, found: dict[str, Any]) -> None:
    """Says in the new file all that the old one says of itself, and how it was quantised."""
    import onnx

    model, before = opened(new), opened(place, weights=False)
    said = {prop.key: prop.value for prop in before.metadata_props}
    ours = json.loads(said["saccade"])
    ours["record"]["int8"] = found
    onnx.helper.set_model_props(model, {**said, "saccade": json.dumps(ours)})
    onnx.save(model, new)


def _batches(encoder: Encoder, source: Source, rows: Sequence[int], words: str) -> Iterator[Tensor]:
    """Pictures as the encoder is fed, in batches; what cannot be read is left out."""
    images: list[Tensor] = []
    for row in track(rows, words, console=Console(stderr=True), transient=True):
        try:
            pixels = source[row].pixels
        except Unreadable:
            continue
        if pixels is not None and len(pixels) == 1:
            images.append(encoder.preprocess(pixels[0]))
        if len(images) == _BATCH:
            yield torch.stack(images)
            images = []
    if images:
        yield torch.stack(images)


def _gate(exact: Encoder, quick: Encoder, batches: Iterable[Tensor]) -> dict[str, Any]:
    """How the neighbours of one agree with the other's, and how fast each is, batch by batch in turns."""
    vectors: dict[str, list[Tensor]] = {"fp32": [], "int8": []}
    seconds: dict[str, list[float]] = {"fp32": [], "int8": []}
    for images in batches:
        for name, encoder in (("fp32", exact), ("int8", quick)):
            began = time.perf_counter()
            vectors[name].append(encoder.backbone.pooled(images))
            seconds[name].append((time.perf_counter() - began) / len(images))
    count = sum(map(len, vectors["fp32"]))
    if count < _FEWEST:
        raise SaccadeError(f"only {count} of the pictures could be read", hint=f"give {_FEWEST} or more", code=1)
    overlap, top1 = agreement(torch.cat(vectors["fp32"]), torch.cat(vectors["int8"]))
    usual = {name: statistics.median(every) for name, every in seconds.items()}
    speed = {name: round(1 / second, 1) for name, second in usual.items()}
    return {
        "overlap": round(overlap, 4),
        "top1": round(top1, 4),
        "images_per_second": {**speed, "ratio": round(usual["fp32"] / usual["int8"], 2)},
        "pictures": {"gate": count},
    }


def agreement(exact: Float[Tensor, "n d"], quick: Float[Tensor, "n d"]) -> tuple[float, float]:
    """The share of each picture's 10 nearest others by cosine that both find, and of the nearest that are the same.

    Each looks among its own vectors, as an index does that was made by it.
    """
    found = []
    for vectors in (exact, quick):
        unit = F.normalize(vectors.float(), dim=1)
        near = unit @ unit.T
        found.append(near.fill_diagonal_(-torch.inf).topk(min(10, len(near) - 1)).indices)
    same = (found[0][:, :, None] == found[1][:, None]).any(2)
    return float(same.float().mean()), float((found[0][:, 0] == found[1][:, 0]).float().mean())

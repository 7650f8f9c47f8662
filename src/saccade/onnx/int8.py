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
from saccade.onnx.matrices import look, matrices, quantise_matrices, schemes
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
    `images_per_second` {fp32, int8, ratio} measured in turns, `bytes`, `kept` (what stayed float32 beside the patch
    embedding of a ViT), and how many pictures were for what: the 64 that calibrate never judge. Of a ViT as much is
    quantised as keeps the neighbours: every matrix, or fewer. Raises `SaccadeError`, and writes nothing, where
    `overlap` is below `least` whatever is kept, where pictures are fewer than 164, and for a file that is not ours.
    """
    needed("onnx", "onnxruntime")
    place = Path(directory) / MODEL
    encoder = load(place, None)
    source = open_source(pictures, short_side=encoder.preprocess.canvas, channels=encoder.preprocess.channels)
    order = list(map(Permutation(len(source), "int8"), range(min(len(source), _MOST + _CALIBRATE))))
    if len(order) - _CALIBRATE < _FEWEST:
        raise SaccadeError(
            f"{len(source)} pictures are too few to tell whether neighbours stay",
            path=str(pictures) if isinstance(pictures, str | Path) else None,
            hint=f"give {_CALIBRATE + _FEWEST} or more, of the kind that will be searched",
        )
    tried = []
    with _beside(place) as new:
        for kept in _written(place, new, encoder, _batches(encoder, source, order[:_CALIBRATE], "calibrating")):
            _sign(new, place, {})
            found = _gate(encoder, load(new, None), _batches(encoder, source, order[_CALIBRATE:], "comparing"))
            found["kept"] = kept
            tried.append(found["overlap"])
            if found["overlap"] >= least:
                break
        else:
            raise SaccadeError(
                f"int8 keeps {max(tried):.1%} of the 10 nearest neighbours, and {least:.0%} are asked for",
                path=place,
                hint="nothing was written: serve the float32 file",
                code=1,
            )
        found |= {"least": least, "bytes": {"fp32": place.stat().st_size, "int8": new.stat().st_size}}
        found["pictures"]["calibration"] = _CALIBRATE
        _sign(new, place, found)
        os.replace(new, place.parent / INT8)
    return {"file": INT8, **found}


def _written(place: Path, new: Path, encoder: Encoder, batches: Iterable[Tensor]) -> Iterator[str]:
    """Writes `new` in one way after the other, the fastest first, and says what stayed float32."""
    graph_file = prepared(place, new.parent)
    config = encoder.backbone.config
    if not isinstance(config, ViTConfig):
        _static(graph_file, new, batches)
        yield "nothing"
        return
    found = matrices(opened(graph_file).graph, config)
    seen = look(graph_file, found, batches)
    for kept, chosen in schemes(found).items():
        quantise_matrices(graph_file, new, chosen, seen)
        yield kept


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


def _static(graph_file: Path, new: Path, batches: Iterable[Tensor]) -> None:
    """A convnet's weights with a scale for each output, activations by the ranges that were seen on pictures."""
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
        graph_file, new, _Pictures(), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, op_types_to_quantize=operators,
    )  # fmt: skip


def prepared(place: Path, folder: Path) -> Path:
    """The graph with constants folded, so that every weight is one, as a file in the folder."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    graph_file = folder / "prepared.onnx"
    quant_pre_process(str(place), str(graph_file), skip_symbolic_shape=True)
    return graph_file


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

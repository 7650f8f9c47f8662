"""Encoders to ONNX: any batch, height and width, the same features."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbone import family_of
from saccade.convnet import Convnet
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.onnx.files import FORMAT, MODEL, needed, session
from saccade.provenance import travelling
from saccade.vit import Features, ViT, ViTConfig

OPSET = 18
"""The newest that every runtime of the last years reads, and all that is needed."""
_LARGEST_FILE = 1_800_000_000
"""Bytes of weights above which they lie beside the graph: protobuf ends at 2 GB."""


class _PortableViT(ViT):
    """A ViT whose position table is made by operators that ONNX has for every size: never `If`, never `Resize`.

    Resizing is one matrix product an axis, whose matrices follow from the sides. onnxruntime's own Resize knows no
    antialiasing as torch does it, nor a scale that is not that of the sides (DINO's n + 0.1).
    """

    def position_table(self, grid: tuple[int, ...]) -> Tensor | None:
        config = self.config
        if config.position in ("rope", "none"):
            return None
        if config.position != "learned":
            return self._sincos(grid, self.pos_embed.device).to(self.pos_embed.dtype)[None]
        table = self.pos_embed[0, self._table_prefix :].unflatten(0, config.grid)  # [R C D]
        native = (torch.tensor(grid) == torch.tensor(config.grid)).all()
        down, across = (_resizing(to, side, config, native) for to, side in zip(grid, config.grid, strict=True))
        table = (down @ table.flatten(1)).unflatten(1, (-1, config.width))  # [r C D]
        return (across @ table).flatten(0, 1)[None]


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic filter, 1 at 0 and 0 from 2 on."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _hat(distance: Tensor) -> Tensor:
    """The linear filter, 1 at 0 and 0 from 1 on."""
    return (1 - distance.abs()).clamp(min=0)


def _resizing(to: int, side: int, config: ViTConfig, native: Tensor) -> Float[Tensor, "to side"]:
    """What interpolation of one axis of a table multiplies with, from `side` to `to` values, as torch does it.

    A table of the native grid is not touched, though with an offset its scale is not 1.
    """
    smooth, linear = config.position_antialias, config.position_linear
    filter_ = _hat if linear else functools.partial(_cubic, a=-0.5 if smooth else -0.75)
    outputs = torch.arange(to)
    scale = side / (torch.scalar_tensor(to, dtype=torch.float32) + config.position_offset)
    centre = ((outputs + 0.5) * scale - 0.5)[:, None]
    if smooth:
        matrix = filter_((torch.arange(side) - centre) / scale.clamp(min=1))
        matrix = matrix / matrix.sum(1, keepdim=True)
    else:  # two values are looked at beyond each border, and are the border's
        values = torch.arange(-2, side + 2)
        matrix = filter_(values - centre) @ torch.eye(side)[values.clamp(0, side - 1)]
    if not config.position_offset:
        return matrix
    return torch.where(native, (outputs[:, None] == torch.arange(side)).to(matrix.dtype), matrix)


class _Outputs(nn.Module):
    """What the file gives: the embedding, the patches, and the class token where there is one."""

    def __init__(self, backbone: ViT | Convnet):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        features = of_convnet(self.backbone, images) if isinstance(self.backbone, Convnet) else self.backbone(images)
        cls = () if features.cls is None else (features.cls,)
        return (self.backbone.embedding(features), features.patches, *cls)


def of_convnet(network: Convnet, images: Tensor) -> Features:
    """Features without positions and grid, which a vector does not need and which would fix the sides."""
    cls, cells = network.finish(network.last_map(network.normalise(images), None))
    patches = cells.flatten(2).transpose(1, 2)
    return Features(cls, patches[:, :0], patches, torch.empty(0, 0, 2, dtype=torch.int64), (0, 0))


def names(encoder: Encoder) -> list[str]:
    """The outputs of an encoder's file."""
    return ["embedding", "patches", *(["cls"] if encoder.backbone.config.cls else [])]


def write(encoder: Encoder, directory: str | Path) -> list[Path]:
    """Writes model.onnx, and model.onnx.data beside it above 1.8 GB, and returns the files.

    Input `images` [batch, channels, height, width], float32 in [0, 1]: pictures of more than 8 bits fit in, and every
    runtime takes it; normalisation is inside. Outputs `embedding` [batch, width], `patches` [batch, count, width],
    and `cls` [batch, width] where there is one. Metadata says all that `saccade.load` needs to read it again. Raises
    `SaccadeError` for clips, for a file that is ONNX already, and where the export cannot keep every size.
    """
    needed("onnx", "onnxscript")
    width = encoder.backbone.config.width
    shapes: dict[str, list[str | int]] = {
        name: ["batch", *(["patches"] if name == "patches" else []), width] for name in names(encoder)
    }
    return write_network(_Outputs(portable(encoder)).eval(), shapes, _metadata(encoder), directory)


def write_network(
    network: nn.Module, shapes: Mapping[str, Sequence[str | int]], metadata: Mapping[str, str], directory: str | Path
) -> list[Path]:
    """The same of any network with a `backbone` that is `portable`: `shapes` are those of its outputs, by name."""
    needed("onnx", "onnxscript")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    program = _program(network, shapes)
    program.model.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    beside = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) > _LARGEST_FILE
    path = directory / MODEL
    new = directory / f"new-{MODEL}"
    program.save(new if not beside else path, external_data=beside)
    if beside:
        return [path, directory / f"{MODEL}.data"]
    os.replace(new, path)
    return [path]


def portable(encoder: Encoder) -> ViT | Convnet:
    """The backbone as it is written: a copy on the CPU in float32, each part in a form that ONNX has."""
    backbone = encoder.backbone
    if not isinstance(backbone, ViT | Convnet):
        raise SaccadeError(
            "this encoder is an ONNX file already",
            path=encoder.record.get("path"),
            hint="copy it, or export what it came from",
        )
    if isinstance(backbone, ViT) and backbone.config.patch_time is not None:
        raise SaccadeError("an encoder of clips cannot be exported to ONNX", path="--to", hint="use --to safetensors")
    network = copy.deepcopy(backbone).cpu().float().eval()
    if isinstance(network, ViT):
        network.__class__ = _PortableViT
    return network


def _program(network: nn.Module, shapes: Mapping[str, Sequence[str | int]]) -> torch.onnx.ONNXProgram:
    """The graph, of any batch and size. Raises `SaccadeError` where one of them would be fixed."""
    backbone: Any = network.backbone
    config, stride = backbone.config, backbone.stride
    images = torch.zeros(2, config.channels, 3 * stride, 5 * stride)  # no two sides are alike, and none is 1
    batch = torch.export.Dim("batch", min=1, max=2**16)
    if isinstance(backbone, Convnet):  # torch asks for two cells a side; the graph does with one (`check`)
        sides = [torch.export.Dim(name, min=2 * stride, max=2**15) for name in ("height", "width")]
    else:
        sides = [stride * torch.export.Dim(name, min=1, max=2**12) for name in ("rows", "columns")]
    with _quiet():
        try:
            free = ({0: batch, 2: sides[0], 3: sides[1]},)
            graph = torch.export.export(network, (images,), dynamic_shapes=free, strict=False)
        except torch._dynamo.exc.UserError as error:
            raise SaccadeError(
                f"torch cannot export this encoder at every size: {str(error).splitlines()[0]}", code=1
            ) from error
        program = torch.onnx.export(
            graph, dynamo=True, input_names=["images"], output_names=list(shapes), opset_version=OPSET, verbose=False
        )
    assert program is not None
    _name_axes(program, config, shapes)
    return program


def _name_axes(program: torch.onnx.ONNXProgram, config: Any, shapes: Mapping[str, Sequence[str | int]]) -> None:
    """The axes as `write` promises them, in place of torch's symbols, and nothing of the machine it was written on."""
    from onnx_ir import Shape

    graph = program.model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()  # where each line of ours lies
        for value in node.outputs:
            value.shape = None  # every runtime infers them again
            value.metadata_props.clear()
    graph.inputs[0].shape = Shape(["batch", config.channels, "height", "width"])
    graph.inputs[0].metadata_props.clear()
    for output in graph.outputs:
        output.shape = Shape(list(shapes[str(output.name)]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on torchvision, which is not needed, and without checks of shapes, which are symbols."""
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    loggers = {
        logging.getLogger(name): logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")
    }
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)
        for logger, level in loggers.items():
            logger.setLevel(level)


def _metadata(encoder: Encoder) -> dict[str, str]:
    """What the file says of itself: all of it for `saccade.load`, and in plain words what a reader looks for."""
    said = {
        "format": FORMAT,
        family_of(encoder.backbone): encoder.backbone.config.model_dump(mode="json"),
        "record": travelling(encoder.record),
        "preprocess": dataclasses.asdict(encoder.preprocess),
    }
    words = {name: encoder.record.get(name) for name in ("family", "arch", "licence", "licence_url", "terms")}
    return {"saccade": json.dumps(said), **{name: str(value) for name, value in words.items() if value is not None}}


def check(encoder: Encoder, directory: str | Path) -> float:
    """The largest absolute difference of any output of model.onnx in onnxruntime from the encoder's.

    Over several sizes (native, smaller, not square) and batches; pictures are noise, always the same.
    """
    backbone: Any = encoder.backbone
    path = Path(directory) / MODEL
    run = session(path)
    stride, native = backbone.stride, backbone.config.grid[0]
    odd = 3 if isinstance(backbone, Convnet) else 0  # they take sides that the stride does not divide
    drawn = torch.Generator().manual_seed(0)
    worst = 0.0
    exact = copy.deepcopy(backbone).cpu().float().eval()
    for batch, rows, columns in ((1, native, native), (2, 3, 5), (3, max(1, native // 2), native + 1), (1, 1, 1)):
        sides = (rows * stride + odd, columns * stride + odd)
        images = torch.rand(batch, backbone.config.channels, *sides, generator=drawn)
        with torch.inference_mode():
            features = exact(images)
            wanted = {"embedding": exact.embedding(features), "patches": features.patches, "cls": features.cls}
        for name, found in zip(names(encoder), run.run(names(encoder), {"images": images.numpy()}), strict=True):
            worst = max(worst, float((torch.from_numpy(found) - wanted[name]).abs().max()))
    return worst

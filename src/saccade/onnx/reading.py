"""ONNX files as encoders: ours by their metadata, others' by the inputs and outputs that they declare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from pydantic import Field, ValidationError
from torch import Tensor, nn

from saccade import published
from saccade.backbone import FAMILIES
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.onnx.files import beside, opened, said, session, tensors
from saccade.provenance import described
from saccade.settings import Settings
from saccade.tensors import hash_of
from saccade.vit import Features, grid_of, places

_VECTORS = ("embedding", "embeddings", "image_embeds", "image_embedding", "pooler_output")
"""Names of the one vector, where a file has several."""
_ANSWERS = "an ONNX file answers and does not learn"


class OnnxConfig(Settings):
    """What is known of a network that only its inputs and outputs describe. It gives one vector, and no patches."""

    width: int = Field(ge=1, description="width of the vector")
    image_size: int = Field(224, ge=1, description="side of a picture in pixels")
    channels: int = Field(3, ge=1, description="channels of a picture")
    mean: tuple[float, ...] = Field((0.0,) * 3, description="subtracted from each channel of a picture in [0, 1]")
    std: tuple[float, ...] = Field((1.0,) * 3, description="each channel is divided by it")

    @property
    def cls(self) -> bool:
        """The vector stands where others have the class token's."""
        return True

    @property
    def pooling(self) -> str:
        """The vector."""
        return "cls"

    @property
    def grid(self) -> tuple[int, int]:
        """No patches."""
        return (0, 0)


class Feed(NamedTuple):
    """How a graph wants its pictures: the input's name, whether channels come last, and whether it takes bytes."""

    name: str
    last: bool
    bytes: bool


class _Pooled(Features):
    """Features that know the family's vector, which the graph gave with them."""

    embedding: Tensor


class OnnxBackbone(nn.Module):
    """A graph that onnxruntime runs, behind the contract of the other backbones; training is refused.

    `config` is that of the network which the graph was written from, or an `OnnxConfig`.
    """

    def __init__(self, path: Path, config: Any, feed: Feed, outputs: list[str]):
        super().__init__()
        self.path, self.config, self.feed, self.outputs = path, config, feed, outputs
        self.mean: Tensor
        self.std: Tensor
        self._session = session(path)
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next; of a whole picture where there are no patches."""
        return self.config.image_size // max(1, self.config.grid[0])

    @property
    def branches(self) -> int:
        """None: nothing can be dropped."""
        return 0

    def drop_rates(self, rate: float) -> list[float]:
        """None."""
        return []

    def normalise(self, images: Shaped[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """Pictures in [0, 1] or uint8 with the family's mean and spread taken out; the graph of ours does it itself."""
        shape = (-1,) + (1,) * (images.ndim - 2)
        return (_unit(images) - self.mean.view(shape)) / self.std.view(shape)

    def forward(self, images: Shaped[Tensor, "b c h w"], *, drop: Tensor | None = None) -> Features:
        """Features; registers have no rows, and patches none where the graph does not give them."""
        if drop is not None:
            raise SaccadeError(_ANSWERS, path=self.path, hint="train what it was written from")
        if images.shape[1] != self.config.channels:
            raise SaccadeError(
                f"this file reads {self.config.channels} channels, not {images.shape[1]}", path=self.path
            )
        grid = (0, 0) if isinstance(self.config, OnnxConfig) else _grid(self.config, images)
        values = self._run(images)
        found = {
            name: torch.from_numpy(value).to(images.device) for name, value in zip(self.outputs, values, strict=True)
        }
        embedding = found["embedding"] if "embedding" in found else found[self.outputs[0]]
        patches = found.get("patches", embedding[:, None][:, :0])
        cls = found.get("cls") if "patches" in found else embedding
        positions = places(grid, images.device).expand(len(images), -1, -1)
        features = _Pooled(cls, patches[:, :0], patches, positions, grid)
        features.embedding = embedding
        return features

    def _run(self, images: Tensor) -> list[Any]:
        pictures = _unit(images).cpu()
        if self.feed.bytes:
            pictures = images.cpu() if images.dtype == torch.uint8 else (pictures * 255).round().clamp(0, 255).byte()
        elif isinstance(self.config, OnnxConfig):
            pictures = self.normalise(images).cpu()
        pictures = pictures.permute(0, 2, 3, 1) if self.feed.last else pictures
        try:
            return self._session.run(self.outputs, {self.feed.name: pictures.contiguous().numpy()})
        except Exception as error:  # onnxruntime's have no common class
            reason = " ".join(str(error).split())
            raise SaccadeError(
                f"{self.path} cannot run on pictures {list(images.shape)}: {reason}", path=self.path, code=1
            ) from None

    def pooled(self, images: Shaped[Tensor, "b c h w"], *, drop: Tensor | None = None) -> Float[Tensor, "b d"]:
        """The embedding of pictures."""
        return self.embedding(self(images, drop=drop))

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The one vector that this family pools."""
        if isinstance(features, _Pooled):
            return features.embedding
        if self.config.pooling == "map":
            raise SaccadeError("only features that this file gave can be pooled by attention", path=self.path)
        if self.config.pooling == "mean":
            return features.patches.mean(1)
        assert features.cls is not None
        return features.cls

    def reset_buffers(self) -> None:
        """Nothing: they came with the file."""

    def train(self, mode: bool = True) -> OnnxBackbone:
        """Raises `SaccadeError` unless it is to be left as it is."""
        if mode:
            raise SaccadeError(_ANSWERS, path=self.path, hint="train what it was written from")
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `SaccadeError`: its weights are the graph's."""
        raise SaccadeError(
            f"the weights of {self.path} cannot be taken out to go on from",
            path=self.path,
            hint="go on from what it was written from",
        )


def _unit(images: Tensor) -> Tensor:
    return images.float() if images.is_floating_point() else images.float() / 255


def _grid(config: Any, images: Tensor) -> tuple[int, ...]:
    """Patches along each axis. Raises `SaccadeError` for a size that the network cannot have."""
    size = (images.shape[2], images.shape[3])
    return grid_of(size, config.patch) if "patch" in type(config).model_fields else config.grid_of(*size)


def weights_of_a_family(path: Path) -> bool:
    """Whether a file of others holds a whole encoder of a family that saccade knows, which then runs in torch."""
    if said(opened(path, weights=False), path) is not None:
        return False
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(path).items()}
    try:
        published.recognise(shapes, {}, f"{path.absolute().parent.name} {path.name}")
    except SaccadeError:
        return False
    return True


def exact_resizing(path: Path) -> bool:
    """Whether a graph resizes a position table to exact sides, whatever its authors do."""
    nodes = [node for node in opened(path, weights=False).graph.node if node.op_type == "Resize"]
    modes = [(node, a.s) for node in nodes for a in node.attribute if a.name == "mode"]
    return any(mode == b"cubic" and len(node.input) == 4 and node.input[3] for node, mode in modes)


def load(path: Path, image_size: int | None) -> Encoder:
    """An encoder that onnxruntime runs, on the CPU.

    A file of ours says all of itself. Of another's the inputs and outputs are read: a picture [B 3 H W] or [B H W 3] in
    bytes, or in floats if a preprocessor_config.json beside it says how they are normalised; and one vector [B D].
    Raises `SaccadeError`.
    """
    model = opened(path, weights=False)
    found = said(model, path)
    digest = hash_of(*beside(path))
    if found is not None:
        return _ours(path, found, {"hash": digest, "matched": len(model.graph.initializer)}, image_size)
    feed, output, config = _declared(model, path, image_size)
    backbone = OnnxBackbone(path, config, feed, [output])
    record = described(
        config,
        family="onnx",
        pooling=output,
        licence="unknown",
        terms="the licence is that of whoever published the file",
        hash=digest,
        matched=len(model.graph.initializer),
        path=str(path.absolute()),
        runtime="onnxruntime",
    )
    return Encoder(backbone, record, config.image_size).eval()


def _ours(path: Path, found: dict[str, Any], file: dict[str, Any], image_size: int | None) -> Encoder:
    family = next((name for name in FAMILIES if name in found), None)
    try:
        if family is None:
            raise ValueError("it names no network")
        config: Any = FAMILIES[family].config(**found[family])
        prepared = {**found["preprocess"]}
        if image_size is not None:
            factor = prepared["resize"] / prepared["crop"]
            prepared |= {"crop": image_size, "resize": round(image_size * factor)}
        said = {**found["record"], **file, "path": str(path.absolute()), "runtime": "onnxruntime"}
        record = described(config, **said)
        preprocess = Preprocess(**prepared)
    except (ValidationError, TypeError, KeyError, ValueError) as error:
        raise SaccadeError(
            f"{path} says what no encoder of ours says: {str(error).splitlines()[0]}", path=path, hint="export it again"
        ) from None
    outputs = ["embedding", "patches", *(["cls"] if config.cls else [])]
    backbone = OnnxBackbone(path, config, Feed("images", False, False), outputs)
    return Encoder(backbone, record, preprocess.crop, preprocess).eval()


def _declared(model: Any, path: Path, image_size: int | None) -> tuple[Feed, str, OnnxConfig]:
    """How a file of others is fed and what it gives. Raises `SaccadeError` where its declarations do not tell."""
    from onnx import TensorProto

    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    shapes = {value.name: _axes(value) for value in [*inputs, *model.graph.output]}
    shown = "; ".join(f"{name} {axes}" for name, axes in shapes.items())
    pictures = [
        value
        for value in inputs
        if len(shapes[value.name]) == 4 and 3 in (shapes[value.name][1], shapes[value.name][3])
    ]
    if len(inputs) != 1 or len(pictures) != 1:
        raise SaccadeError(
            f"{path} has no single input of pictures with 3 channels: it declares {shown}", path=path,
            hint="export the image tower alone",
        )  # fmt: skip
    kind, axes = pictures[0].type.tensor_type.elem_type, shapes[pictures[0].name]
    feed = Feed(pictures[0].name, axes[1] != 3, kind == TensorProto.UINT8)
    if kind not in (TensorProto.UINT8, TensorProto.FLOAT):
        raise SaccadeError(f"{path} takes pictures neither in bytes nor in float32", path=path)
    vectors = [value.name for value in model.graph.output if len(shapes[value.name]) == 2]
    vectors = [name for name in vectors if name in _VECTORS][:1] or vectors
    if len(vectors) != 1:
        raise SaccadeError(
            f"{path} does not give one vector a picture: it declares {shown}", path=path,
            hint="export it with one output [batch, width]",
        )  # fmt: skip
    sides = {side for side in (axes[1:3] if feed.last else axes[2:4]) if isinstance(side, int)}
    size = image_size if image_size is not None else (min(sides) if sides else 224)
    if sides - {size}:
        raise SaccadeError(f"{path} reads pictures of {sorted(sides)} pixels only, not {size}", path="--image-size")
    numbers = {} if feed.bytes else _normalisation(path)
    width = shapes[vectors[0]][1]
    config = OnnxConfig(width=width if isinstance(width, int) else 1, image_size=size, **numbers)
    if not isinstance(width, int):  # only a run tells
        probe = OnnxBackbone(path, config, feed, vectors).eval()
        config = config.model_copy(update={"width": probe(torch.zeros(1, 3, size, size)).cls.shape[1]})
    return feed, vectors[0], config


def _axes(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value or "?" for axis in value.type.tensor_type.shape.dim]


def _normalisation(path: Path) -> dict[str, Any]:
    """Mean and spread of a preprocessor_config.json beside a file that takes floats. Raises `SaccadeError`."""
    place = path.parent / "preprocessor_config.json"
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return {"mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise SaccadeError(
            f"{path} takes pictures as floats, and nothing says how they are normalised",
            path=path,
            hint='put a preprocessor_config.json beside it, e.g. {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}',
        ) from None

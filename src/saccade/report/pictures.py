"""Pictures of the report: a choice from the source that the encoder can read, maps of what it says, and data URIs."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

from saccade.data import Batch, Sample, Source, collate, common_kind, kind_of
from saccade.draws import Draws, Permutation
from saccade.encoder import Encoder, Preprocess
from saccade.errors import Unreadable
from saccade.recipe import Recipe, Training
from saccade.vit import Features, ViT

EXAMPLES = 6
LARGE, SMALL = 192, 128
"""Longest side in pixels at which pictures go into the page."""

_HEAT = torch.tensor(
    [[10, 9, 28], [59, 15, 99], [130, 37, 118], [196, 62, 82], [239, 116, 53], [250, 187, 63], [250, 245, 190]]
)
"""Dark to bright at an even pace, so that it also reads in grey."""


@dataclass(frozen=True)
class Tile:
    """A picture in the page: where its bytes are, what it shows in words, and the line under it."""

    src: str
    alt: str
    caption: str = ""
    mark: str = ""
    coarse: bool = False  # one pixel a patch: enlarged without smoothing


@dataclass(frozen=True)
class Card:
    """Pictures that belong together, and whose they are. The `small` ones stand below, smaller."""

    tiles: Sequence[Tile]
    title: str = ""
    small: Sequence[Tile] = ()
    columns: int = 0  # as many as there are tiles


@dataclass(frozen=True)
class Gallery:
    """Pictures of a source as the encoder takes them, and as they are shown."""

    keys: list[str]
    inputs: Shaped[Tensor, "n c s s"]


def visible(pixels: Shaped[Tensor, "*t c h w"]) -> UInt8[Tensor, "c3 h w"]:
    """Any pixels as 8-bit grey or RGB: the first frame, the first three channels.

    More than three channels, and values outside [0, 1], are stretched from their 1st to their 99th percentile.
    """
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0].detach().cpu()
    bands = len(pixels)
    pixels = pixels[:3] if bands >= 3 else pixels[:1]
    if pixels.dtype == torch.uint8 and bands <= 3:
        return pixels
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float().nan_to_num()
    if bands > 3 or values.amin() < 0 or values.amax() > 1:
        edges = torch.quantile(values.flatten(1), torch.tensor([0.01, 0.99]), dim=1)[:, :, None, None]
        values = (values - edges[0]) / (edges[1] - edges[0]).clamp_min(1e-6)
    return values.clamp(0, 1).mul(255).round().to(torch.uint8)


def uri(pixels: UInt8[Tensor, "c3 h w"], longest: int = LARGE) -> str:
    """The picture as a data URI: WebP, or PNG where it is so small that every pixel counts."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array if array.shape[2] == 3 else array[..., 0])
    if max(image.size) > longest:
        scale = longest / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    kind = "PNG" if max(image.size) <= 40 else "WEBP"
    file = io.BytesIO()
    image.save(file, kind, **({"optimize": True} if kind == "PNG" else {"quality": 84, "method": 4}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def chosen(source: Source, count: int) -> list[int]:
    """Rows of a fixed choice of samples, at random and always the same."""
    permutation = Permutation(len(source), "report")
    return [permutation(place) for place in range(min(count, len(source)))]


def readable(source: Source, count: int) -> list[Sample]:
    """Some samples of the kind that most are of. What cannot be read is passed over."""
    kind = common_kind(source)
    samples: list[Sample] = []
    for row in chosen(source, 8 * count):
        with contextlib.suppress(Unreadable):
            if len(samples) < count and kind_of(sample := source[row]) == kind:
                samples.append(sample)
    return samples


def gather(source: Source, preprocess: Preprocess, count: int) -> Gallery | None:
    """A fixed choice of up to `count` pictures; None where there is none with the channels that the encoder takes."""
    keys, inputs = [], []
    for row in chosen(source, count):
        with contextlib.suppress(Unreadable):
            sample = source[row]
            if sample.pixels is not None and sample.pixels.shape[1] == preprocess.channels:
                inputs.append(preprocess(sample.pixels[:1]))
                keys.append(sample.key)
    kinds = {picture.dtype for picture in inputs}
    if len(kinds) > 1:  # 8 bits beside more
        inputs = [picture / 255.0 if picture.dtype == torch.uint8 else picture for picture in inputs]
    return Gallery(keys, torch.stack(inputs)) if inputs else None


@torch.inference_mode()
def embeddings(encoder: Encoder, images: Shaped[Tensor, "n c s s"], batch: int = 32) -> Float[Tensor, "n d"]:
    """Unit-length embeddings, on the CPU."""
    parts = [encoder.embedding(encoder(part.to(encoder.device))).float().cpu() for part in images.split(batch)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


@torch.inference_mode()
def features_of(encoder: Encoder, images: Shaped[Tensor, "n c s s"]) -> Features:
    """What the encoder says of a few pictures."""
    return encoder(images.to(encoder.device))


def principal(features: Features) -> UInt8[Tensor, "n 3 h w"] | None:
    """The first three principal components of all patches together as red, green and blue; None for too few patches."""
    if len(features.grid) != 2 or features.patches.shape[1] < 4 or features.patches.shape[2] < 3:
        return None
    flat = features.patches.flatten(0, 1).double().cpu()
    centred = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -3:].flip(1)
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))  # a sign is arbitrary: choose one
    parts = centred @ axes
    edges = torch.quantile(parts, torch.tensor([0.02, 0.98], dtype=parts.dtype), dim=0)
    parts = ((parts - edges[0]) / (edges[1] - edges[0]).clamp_min(1e-12)).clamp(0, 1)
    maps = parts.mul(255).round().to(torch.uint8).unflatten(0, (len(features.patches), *features.grid))
    return maps.permute(0, 3, 1, 2)


def heat(values: Float[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """A map of colours, dark where the values are lowest, bright where they are highest."""
    values = values.detach().float().cpu()
    place = (values - values.amin()) / (values.amax() - values.amin()).clamp_min(1e-12) * (len(_HEAT) - 1)
    below = place.floor().long().clamp(max=len(_HEAT) - 2)
    colours = _HEAT[below] + (place - below)[..., None] * (_HEAT[below + 1] - _HEAT[below])
    return colours.round().to(torch.uint8).permute(2, 0, 1)


@torch.inference_mode()
def attention(encoder: Encoder, images: Shaped[Tensor, "n c s s"]) -> Float[Tensor, "n heads h w"] | None:
    """How the class token attends to patches in the last block; None where the encoder has no such thing."""
    vits = [part for part in encoder.children() if isinstance(part, ViT)]
    if not vits or vits[0].cls_token is None or vits[0].config.patch_time is not None:
        return None
    found = vits[0].attention(images.to(encoder.device))
    side = vits[0].config.patch
    return found.unflatten(2, (images.shape[2] // side, images.shape[3] // side)).float().cpu()


def glimpse(page: Recipe, config: Training, source: Source, seen: int = 0) -> tuple[list[Sample], Batch]:
    """A few samples and what a recipe makes of them: the views of a batch that was never trained on.

    `seen` is how often each has been seen before: other views for another number.
    """
    samples = readable(source, EXAMPLES)
    batch = collate(samples, [seen] * len(samples))
    draws = Draws(config.seed, 0, batch["key"], batch["seen"], batch["place"])
    return samples, page.views(config, batch, draws)


def views_of(batch: Batch, samples: int, channels: int) -> list[list[Tensor]]:
    """For each sample the pictures among a batch's views, largest first; rows are in the order view, sample."""
    found: Mapping[str, Tensor] = {
        name: tensor
        for name, tensor in batch.items()
        if tensor.ndim in (4, 5)
        and (tensor.is_floating_point() or tensor.dtype == torch.uint8)
        and tensor.shape[-3] == channels
        and len(tensor) % samples == 0
    }
    ordered = sorted(found.values(), key=lambda tensor: -tensor.shape[-1])
    return [[view for tensor in ordered for view in tensor[place::samples]] for place in range(samples)]

"""Maps of several depths of a backbone, which is what a head that says something of every pixel looks at."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saccade.convnet import Convnet
from saccade.vit import ViT

TAPS = 4
"""Depths of a ViT that are looked at, evenly spaced, the last block among them."""


class Maps(NamedTuple):
    """Pictures of one size: what the backbone makes of them, shallow to deep, and they themselves in [0, 1]."""

    maps: tuple[Float[Tensor, "b _ _ _"], ...]
    images: Float[Tensor, "b c h w"]


def look(backbone: Any, images: Shaped[Tensor, "b c h w"], several: bool) -> Maps:
    """The last map of any backbone with patches; `several`: also those of earlier blocks, or stages of a convnet."""
    floats = images if images.is_floating_point() else images.float() / 255
    if several and isinstance(backbone, ViT):
        found = backbone.intermediate(images, taps(len(backbone.blocks)))
        return Maps(tuple(seen.patches.mT.unflatten(2, seen.grid) for seen in found), floats)
    if isinstance(backbone, Convnet):  # without positions, which would fix the sides of an exported graph
        inside = backbone.normalise(images).contiguous(memory_format=torch.channels_last)
        stages = list(backbone.maps(inside)) if several else [backbone.last_map(inside, None)]
        return Maps((*stages[:-1], backbone.finish(stages[-1])[1]), floats)
    seen = backbone(images, tokens="patches") if isinstance(backbone, ViT) else backbone(images)
    return Maps((seen.patches.mT.unflatten(2, seen.grid),), floats)


def taps(depth: int) -> list[int]:
    """The blocks of a ViT of this depth that are looked at."""
    return sorted({(place + 1) * depth // TAPS - 1 for place in range(TAPS)} - {-1})

"""Checkpoint tensors for another number of channels, another patch or another grid.

Channels: `mixing` says which new channels an old one sees, and mean and spread are folded in, so that pictures whose
channels the old network could see are the same to the new one (docs/decisions/015-other-channels.md). Patches: the
projection is resized by the pseudo-inverse of bilinear resizing (arXiv 2212.08013). Positions: each family's own way.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saccade.backbone import Backbone, Config, family_of
from saccade.errors import SaccadeError
from saccade.vit import ViT, ViTConfig, sincos

C = TypeVar("C", bound=Config)

_FIRST = {
    "vit": ("patch_embed.proj.weight", "patch_embed.proj.bias", 1),
    "resnet": ("conv1.weight", "bn1.running_mean", -1),
    "conv": ("stages.0.0.conv.weight", "stages.0.0.norm.running_mean", -1),
    "convnext": ("downsample_layers.0.0.weight", "downsample_layers.0.0.bias", 1),
}
"""The first weight of each family, and where a constant goes that is added to what comes out of it, with its sign."""


@dataclass(frozen=True)
class Other:
    """What an encoder shall be, where it differs; `load` explains the fields."""

    channels: int | None = None
    bands: tuple[int, ...] | None = None
    patch: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def asked(self) -> dict[str, Any]:
        """What is not left alone, as JSON has it."""
        return {
            name: list(value) if isinstance(value, tuple | list) else value
            for name, value in asdict(self).items()
            if value is not None
        }


def mixing(before: int, after: int, bands: tuple[int, ...] | None = None) -> Float[Tensor, "before after"]:
    """What each old channel sees of the new ones: the mean of every `before`-th, or of all where none is its own.

    `bands`: the one that each old channel sees instead. Rows add up to 1. Raises `SaccadeError`.
    """
    if bands is not None:
        if len(bands) != before or not all(0 <= band < after for band in bands):
            raise SaccadeError(
                f"bands {list(bands)} do not name {before} of {after} channels",
                path="bands",
                hint=f"one number from 0 to {after - 1} for each of the {before} channels that the encoder knows",
            )
        return torch.eye(after, dtype=torch.float64)[list(bands)]
    serves = torch.arange(after) % before == torch.arange(before)[:, None]
    serves |= ~serves.any(1, keepdim=True)
    return serves.double() / serves.sum(1, keepdim=True)


def _statistics(config: Config, mix: Float[Tensor, "before after"]) -> dict[str, tuple[float, ...]]:
    """Mean and spread of the new channels: those of the channel that it serves, or a mean of several.

    Weighted so that a filter which is the same for all these channels needs no constant when they become one.
    """
    serves = (mix > 0) | ~(mix > 0).any(0)
    sharpness = serves / torch.tensor(config.std, dtype=torch.float64)[:, None]
    mean = (sharpness * torch.tensor(config.mean, dtype=torch.float64)[:, None]).sum(0) / sharpness.sum(0)
    std = serves.sum(0) / sharpness.sum(0)
    return {"mean": tuple(round(n, 9) for n in mean.tolist()), "std": tuple(round(n, 9) for n in std.tolist())}


def wanted(config: C, other: Other, image_size: int | None = None) -> C:
    """The settings of the network that `other` describes, its mean and spread as the old ones say.

    With another patch, `image_size` is the new native size; if None, the multiple that is nearest to the old one.
    Raises `SaccadeError`.
    """
    update: dict[str, Any] = {}
    if other.bands is not None and other.channels is None:
        raise SaccadeError("bands are places among channels", path="bands", hint="say channels=N too")
    if other.channels is not None and (other.channels != config.channels or other.bands is not None):
        if other.channels < 1:
            raise SaccadeError(f"a picture has one channel or more, not {other.channels}", path="--channels")
        mix = mixing(config.channels, other.channels, other.bands)
        update |= {"channels": other.channels, **_statistics(config, mix)}
        if isinstance(config, ViTConfig) and _shift(config, update["mean"], mix).abs().max() > 1e-6:
            update["patch_bias"] = True
    if other.patch is not None:
        if not isinstance(config, ViTConfig):
            raise SaccadeError("a convnet has no patches", path="--patch", hint="its stride is part of its --arch")
        if other.patch < 1:
            raise SaccadeError(f"a patch has one pixel or more, not {other.patch}", path="--patch")
        if other.patch != config.patch:
            nearest = max(1, round(config.image_size / other.patch)) * other.patch
            update |= {"patch": other.patch, "image_size": nearest if image_size is None else image_size}
    return type(config)(**(config.model_dump(mode="python") | update)) if update else config


def _shift(before: Config, mean: tuple[float, ...], mix: Float[Tensor, "before after"]) -> Float[Tensor, " before"]:
    """What each old channel, normalised, is where every new one, normalised, is 0."""
    old, std, new = (torch.tensor(values, dtype=torch.float64) for values in (before.mean, before.std, mean))
    return (mix @ new - old) / std


def fitted(
    theirs: Backbone, network: Backbone, *, config: Config | None = None, bands: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    """The tensors of a backbone as another of its family takes them. What cannot be made to fit stays as it is.

    `config`: the one by whose mean and spread a pixel is what it was; the network's own if None.
    """
    tensors, config = dict(theirs.state_dict()), config or network.config
    family = family_of(theirs)
    if family_of(network) != family:
        return tensors
    if isinstance(theirs, ViT) and isinstance(network, ViT):
        _patch(tensors, theirs.config.patch, network.config.patch)
        _positions(tensors, theirs, network)
        if network.mask_token is None:
            tensors.pop("mask_token", None)
        elif theirs.mask_token is None:  # it has nothing to do with what was learned
            tensors["mask_token"] = network.mask_token.detach()
    before = theirs.config
    if (before.channels, before.mean, before.std, bands) != (config.channels, config.mean, config.std, None):
        _channels(tensors, before, config, mixing(before.channels, config.channels, bands), family)
    return tensors


def _channels(
    tensors: dict[str, Tensor], before: Config, after: Config, mix: Float[Tensor, "before after"], family: str
) -> None:
    """The first weight with new channels mixed into the old ones, and the constant that their mean brings with it."""
    name, constant, sign = _FIRST[family]
    weight = tensors[name].double()
    old, new = (torch.tensor(config.std, dtype=torch.float64) for config in (before, after))
    turned = torch.einsum("dc...,cn->dn...", weight, mix / old[:, None] * new)
    tensors[name] = turned.to(tensors[name].dtype).contiguous()
    shift = weight.flatten(2).sum(-1) @ _shift(before, after.mean, mix)
    if isinstance(after, ViTConfig) and not after.patch_bias:
        if shift.abs().max() > 1e-6:
            raise SaccadeError("another mean needs a bias of the patch embedding", path="patch_bias", hint="set it")
        return
    constants = tensors.get(constant, torch.zeros_like(shift, dtype=tensors[name].dtype))
    tensors[constant] = (constants.double() + sign * shift).to(constants.dtype)


def _patch(tensors: dict[str, Tensor], before: int, after: int) -> None:
    """The projection whose answers to patches are those of the old one to the same patches before they were resized."""
    if before != after:
        weight = tensors["patch_embed.proj.weight"]
        inverse = torch.linalg.pinv(_resizing(before, after))
        tensors["patch_embed.proj.weight"] = (inverse.T @ weight.double() @ inverse).to(weight.dtype).contiguous()


def _resizing(before: int, after: int) -> Float[Tensor, "after before"]:
    """Bilinear resizing along one axis, antialiased where it shrinks; that of a picture is one after the other."""
    units = torch.eye(before, dtype=torch.float64)[None, None]
    return F.interpolate(units, size=(after, before), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def table_for(theirs: ViT, vit: ViT) -> Float[Tensor, "1 n d"] | None:
    """The learned positions of a ViT on another's grid; None where they are not learned, or the grid is the same."""
    if not theirs.config.position == vit.config.position == "learned" or theirs.config.grid == vit.config.grid:
        return None
    patches = theirs.position_table(vit.config.grid)
    assert patches is not None
    prefix = theirs.pos_embed[:, : -math.prod(theirs.config.grid)]
    return torch.cat([prefix, patches], dim=1).detach()


def _positions(tensors: dict[str, Tensor], theirs: ViT, vit: ViT) -> None:
    """The learned table resized as its family does it, or left to the formula where it holds just its numbers."""
    if (table := table_for(theirs, vit)) is not None:
        tensors["pos_embed"] = table
    if vit.config.position.startswith("sincos") and theirs.config.position == "learned":
        table = sincos(theirs.config.grid, theirs.config.width, vit.config.position == "sincos").float()
        stored = tensors["pos_embed"][0]
        if torch.allclose(stored[-len(table) :], table, atol=1e-4) and not stored[: -len(table)].any():
            del tensors["pos_embed"]


def said(before: Config, after: Config, other: Other | None = None, image_size: int | None = None) -> dict[str, Any]:
    """What became of channels, patch and size, for the record: {from, to, how} of each that is another."""
    found: dict[str, Any] = {}
    bands = other.bands if other else None
    if bands is not None or before.channels != after.channels:
        found["channels"] = {"from": before.channels, "to": after.channels, "how": _how_mixed(before, after, bands)}
    if isinstance(before, ViTConfig) and isinstance(after, ViTConfig) and before.patch != after.patch:
        how = "projection resized by the pseudo-inverse of bilinear resizing (arXiv 2212.08013)"
        found["patch"] = {"from": before.patch, "to": after.patch, "how": how}
    size = after.image_size if image_size is None else image_size
    if size != before.image_size:
        how = _how_placed(before) if isinstance(before, ViTConfig) else "convolutions take any size"
        found["image_size"] = {"from": before.image_size, "to": size, "how": how}
    return found


def _how_mixed(before: Config, after: Config, bands: tuple[int, ...] | None) -> str:
    if bands is not None:
        return f"the former channels see the bands {', '.join(map(str, bands))}; the others' filters are zero"
    if after.channels == 1:
        return "one filter, the sum of the former; mean and std folded in: a grey picture is what its copies were"
    return f"former channel c sees the mean of the bands c, c+{before.channels}, …; of all where there is none"


def _how_placed(config: ViTConfig) -> str:
    if config.position == "learned":
        offset = f", by the factor (n + {config.position_offset}) / N" if config.position_offset else ""
        way = "linear" if config.position_linear else "bicubic"
        return f"positions {way}{', antialiased' if config.position_antialias else ''}{offset}"
    return {"rope": "rotations by relative place in the picture", "none": "no positions"}.get(
        config.position, "positions by their formula"
    )

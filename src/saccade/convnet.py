"""Convnets behind the same contract as the ViT: the cells of the last map are the patches, their mean the embedding.

ResNet (arXiv 1512.03385) as torchvision has it, parameter names too: bottlenecks stride in their 3x3 convolution, and
the last norm of each branch starts at zero. Conv-4: plain blocks. ConvNeXt (arXiv 2201.03545) under its official names:
downsample_layers.i.j, stages.i.j.{dwconv, norm, pwconv1, pwconv2, gamma}, norm; the norm is applied to every cell.
The number in a name is the total stride, and the stem follows from it: small pictures want 8.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn

from saccade.errors import SaccadeError, nearest
from saccade.linear import Linear
from saccade.norm import BatchNorm, Normalised
from saccade.settings import Settings
from saccade.vit import IMAGENET_MEAN, IMAGENET_STD, Features, places

RESNETS: dict[str, dict[str, Any]] = {
    "8": {"kind": "basic", "blocks": (1, 1, 1), "widths": (64, 128, 256)},
    "10": {"kind": "basic", "blocks": (1, 1, 1, 1), "widths": (64, 128, 256, 512)},
    "10-half": {"kind": "basic", "blocks": (1, 1, 1, 1), "widths": (32, 64, 128, 256)},
    "18": {"kind": "basic", "blocks": (2, 2, 2, 2), "widths": (64, 128, 256, 512)},
    "34": {"kind": "basic", "blocks": (3, 4, 6, 3), "widths": (64, 128, 256, 512)},
    "50": {"kind": "bottleneck", "blocks": (3, 4, 6, 3), "widths": (64, 128, 256, 512)},
}
PLAIN: dict[str, dict[str, Any]] = {
    "3": {"blocks": (1, 1, 1), "widths": (64, 128, 256)},
    "4": {"blocks": (1, 1, 1, 1), "widths": (32, 64, 128, 256)},
    "4-wide": {"blocks": (1, 1, 1, 1), "widths": (64, 128, 256, 512)},
}
CONVNEXTS: dict[str, dict[str, Any]] = {
    "a": {"blocks": (2, 2, 6, 2), "widths": (40, 80, 160, 320)},
    "t": {"blocks": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "s": {"blocks": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "b": {"blocks": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "l": {"blocks": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
}


class _Config(Settings, ABC):
    """What the families share. Raises `SaccadeError` when the numbers do not fit."""

    blocks: tuple[int, ...] = Field(min_length=1, description="blocks of each stage")
    widths: tuple[int, ...] = Field(min_length=1, description="width of each stage")
    stride: int = Field(32, ge=1, description="pixels from one cell of the last map to the next")
    image_size: int = Field(224, ge=1, description="native side in pixels; other sizes work too")
    channels: int = Field(3, ge=1, description="channels of a picture")
    mean: tuple[float, ...] = Field(IMAGENET_MEAN, description="subtracted from each channel of a picture in [0, 1]")
    std: tuple[float, ...] = Field(IMAGENET_STD, description="each channel is divided by it")

    @model_validator(mode="after")
    def _fits(self) -> _Config:
        halvings = len(self.blocks) - 1
        if len(self.widths) != len(self.blocks) or min(self.blocks) < 1:
            raise SaccadeError(f"{len(self.blocks)} stages need as many widths, and blocks each", path="widths")
        if self.stride not in [stem << halvings for stem in (1, 2, 4)]:
            raise SaccadeError(
                f"{halvings + 1} stages cannot have a stride of {self.stride}",
                path="--arch",
                hint="use one of " + ", ".join(str(stem << halvings) for stem in (1, 2, 4)),
            )
        if not len(self.mean) == len(self.std) == self.channels:
            raise SaccadeError(f"{self.channels} channels need as many means and spreads", path="mean")
        return self

    @property
    def stem(self) -> int:
        """Stride of the stem; each later stage halves once."""
        return self.stride >> (len(self.blocks) - 1)

    @property
    def cls(self) -> bool:
        """Whether there is a class token."""
        return False

    @property
    def pooling(self) -> str:
        """The one vector is the class token, or the mean of the patches where there is none."""
        return "cls" if self.cls else "mean"

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the last map at the native size."""
        return self.grid_of(self.image_size, self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Cells of the last map. Raises `SaccadeError` where a picture is smaller than one."""
        if min(height, width) < self.stride:
            raise SaccadeError(
                f"size {min(height, width)} leaves no cell at stride {self.stride}",
                path="--image-size",
                hint=f"use {self.stride} or more, or an --arch with a smaller number",
            )
        return self._cells(height), self._cells(width)

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of a patch."""

    @abstractmethod
    def _cells(self, side: int) -> int:
        """Cells along a side."""


class ResNetConfig(_Config):
    """Every number of a ResNet."""

    kind: Literal["basic", "bottleneck"] = Field("basic", description="two 3x3 convolutions a block, or 1x1, 3x3, 1x1")

    @property
    def width(self) -> int:
        """Width of a patch."""
        return self.widths[-1] * (BasicBlock if self.kind == "basic" else Bottleneck).expansion

    def _cells(self, side: int) -> int:
        return math.ceil(side / self.stride)  # every convolution is padded


class ConvConfig(_Config):
    """Every number of a plain convnet."""

    @property
    def width(self) -> int:
        """Width of a patch."""
        return self.widths[-1]

    def _cells(self, side: int) -> int:
        return side // self.stride  # pooling leaves out what is over at the end


class ConvNeXtConfig(_Config):
    """Every number of a ConvNeXt."""

    pooled_cls: bool = Field(False, description="the mean cell, normed after pooling, is the class token: as published")

    @property
    def cls(self) -> bool:
        """Whether there is a class token."""
        return self.pooled_cls

    @property
    def width(self) -> int:
        """Width of a patch."""
        return self.widths[-1]

    def _cells(self, side: int) -> int:
        return side // self.stride  # what is left over at the end is not looked at


class Convnet(Normalised, ABC):
    """Pictures in [0, 1] or uint8 to `Features`; `config` says all about it."""

    def __init__(self, config: ResNetConfig | ConvConfig | ConvNeXtConfig):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.empty(config.channels), persistent=False)
        self.register_buffer("std", torch.empty(config.channels), persistent=False)

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.config.stride

    @property
    @abstractmethod
    def branches(self) -> int:
        """How many residual branches stochastic depth may drop."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fresh weights from torch's generator, and the buffers: also what a model made on the meta device needs."""

    @abstractmethod
    def maps(
        self, images: Float[Tensor, "b c h w"], drop: Float[Tensor, "b branches"] | None = None
    ) -> Iterator[Float[Tensor, "b _ _ _"]]:
        """What each stage makes of pictures that are normalised, fine to coarse."""

    def last_map(
        self, images: Float[Tensor, "b c h w"], drop: Float[Tensor, "b branches"] | None
    ) -> Float[Tensor, "b d _ _"]:
        """What the last stage makes of pictures that are normalised."""
        x = images
        for x in self.maps(images, drop):  # noqa: B007 - no earlier one is kept
            pass
        return x

    def finish(self, x: Float[Tensor, "b d h w"]) -> tuple[Float[Tensor, "b d"] | None, Float[Tensor, "b d h w"]]:
        """The class token, where there is one, and the map whose cells are the patches, of the last stage's output."""
        return None, x

    def forward(
        self, images: Shaped[Tensor, "b c h w"], *, drop: Float[Tensor, "b branches"] | None = None
    ) -> Features:
        """Features of pictures of any size that leaves a cell. `drop`: factors of each sample's residual branches."""
        if images.shape[1] != self.config.channels:
            raise SaccadeError(
                f"this backbone reads {self.config.channels} channels, not {images.shape[1]}",
                path="--channels",
                hint=f"--channels {images.shape[1]} makes it read them",
            )
        grid = self.config.grid_of(*images.shape[2:])
        # quicker on CPUs (docs/decisions/007-backbones.md), and what tensor cores read; convolutions keep the layout
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        cls, cells = self.finish(self.last_map(x, drop))
        patches = cells.flatten(2).transpose(1, 2)
        positions = places(grid, images.device).expand(len(images), -1, -1)
        return Features(cls, patches[:, :0], patches, positions, grid)

    def drop_rates(self, rate: float) -> list[float]:
        """How often each branch is dropped: from 0 for the first to `rate` for the last, in equal steps."""
        return [rate * branch / max(1, self.branches - 1) for branch in range(self.branches)]

    def pooled(
        self, images: Shaped[Tensor, "b c h w"], *, drop: Float[Tensor, "b branches"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The embedding of pictures."""
        return self.embedding(self(images, drop=drop))

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The class token, or the mean patch where there is none."""
        return features.patches.mean(1) if features.cls is None else features.cls


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and what came in."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(width)
        self.downsample = _shortcut(inputs, width, stride)

    @property
    def last_norm(self) -> BatchNorm:
        """The norm that ends the branch."""
        return self.bn2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _ _"]:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(branch + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and what came in; the last is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = BatchNorm(4 * width)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    @property
    def last_norm(self) -> BatchNorm:
        """The norm that ends the branch."""
        return self.bn3

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _ _"]:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return F.relu(branch + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm(outputs))


def _initialise(network: nn.Module) -> None:
    """Normal convolutions by what goes out (arXiv 1502.01852), and norms that have seen nothing."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, BatchNorm):
            part.reset_parameters()


class ResNet(Convnet):
    """A residual network with batch norm; it has no stochastic depth."""

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        block = BasicBlock if config.kind == "basic" else Bottleneck
        inputs, side = config.widths[0], 7 if config.stem == 4 else 3
        self.conv1 = nn.Conv2d(config.channels, inputs, side, min(2, config.stem), side // 2, bias=False)
        self.bn1 = BatchNorm(inputs)
        for stage, (count, width) in enumerate(zip(config.blocks, config.widths, strict=True), 1):
            blocks = []
            for number in range(count):
                blocks.append(block(inputs, width, 2 if stage > 1 and number == 0 else 1))
                inputs = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.reset_parameters()

    @property
    def branches(self) -> int:
        """None."""
        return 0

    def reset_parameters(self) -> None:
        """He's normal convolutions; the last norm of each branch starts at zero."""
        _initialise(self)
        for part in self.modules():
            if isinstance(part, BasicBlock | Bottleneck):
                nn.init.zeros_(part.last_norm.weight)
        self.reset_buffers()

    def maps(
        self, images: Float[Tensor, "b c h w"], drop: Float[Tensor, "b branches"] | None = None
    ) -> Iterator[Float[Tensor, "b _ _ _"]]:
        """Each stage's output, after its ReLU."""
        x = F.relu(self.bn1(self.conv1(images)))
        if self.config.stem == 4:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, len(self.config.blocks) + 1):
            x = getattr(self, f"layer{stage}")(x)
            yield x


class ConvBlock(nn.Module):
    """A 3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.norm = BatchNorm(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Conv(Convnet):
    """Plain blocks with max-pooling after each stage: Conv-4 of the few-shot literature (arXiv 1606.04080), growing.

    Of what we tried it learns most in five minutes on two cores: docs/log.md.
    """

    def __init__(self, config: ConvConfig):
        super().__init__(config)
        inputs, stages = config.channels, []
        for count, width in zip(config.blocks, config.widths, strict=True):
            stages.append(nn.Sequential(*(ConvBlock(width if n else inputs, width) for n in range(count))))
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.reset_parameters()

    @property
    def branches(self) -> int:
        """None."""
        return 0

    def reset_parameters(self) -> None:
        """He's normal convolutions."""
        _initialise(self)
        self.reset_buffers()

    def maps(
        self, images: Float[Tensor, "b c h w"], drop: Float[Tensor, "b branches"] | None = None
    ) -> Iterator[Float[Tensor, "b _ _ _"]]:
        """Each stage's output, pooled."""
        x = images
        for number, stage in enumerate(self.stages):
            x = stage(x)
            side = 2 if number else self.config.stem
            x = F.max_pool2d(x, side) if side > 1 else x
            yield x


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each cell."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A 7x7 convolution of each channel, then an MLP on each cell, scaled and added to what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.pwconv1, self.pwconv2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "b c h w"], drop: Float[Tensor, " b"] | None = None) -> Tensor:
        """`drop`: the factor of each sample's branch."""
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(self.pwconv1(branch, "gelu")) * self.gamma
        branch = branch.permute(0, 3, 1, 2)
        return x + branch if drop is None else torch.addcmul(x, branch, drop[:, None, None, None].to(branch))


class ConvNeXt(Convnet):
    """A convnet with the manners of a transformer: layer norm, GELU, layer scale, stochastic depth."""

    def __init__(self, config: ConvNeXtConfig):
        super().__init__(config)
        widths, stem = config.widths, config.stem
        # cells that do not overlap, as published; at the full size those would be single pixels, so they overlap
        kernel, padding = (3, 1) if stem == 1 else (stem, 0)
        first = nn.Conv2d(config.channels, widths[0], kernel, stem, padding)
        self.downsample_layers = nn.ModuleList([nn.Sequential(first, ChannelNorm(widths[0], 1e-6))])
        for before, after in itertools.pairwise(widths):
            halving = nn.Conv2d(before, after, 2, 2)
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before, 1e-6), halving))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width) for _ in range(count)))
            for count, width in zip(config.blocks, widths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], 1e-6)
        self.reset_parameters()

    @property
    def branches(self) -> int:
        """One a block."""
        return sum(self.config.blocks)

    def reset_parameters(self) -> None:
        """Truncated normal matrices of 0.02, branches scaled by 1e-6."""
        for part in self.modules():
            if isinstance(part, nn.LayerNorm):
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
            elif isinstance(part, ConvNeXtBlock):
                nn.init.constant_(part.gamma, 1e-6)
        self.reset_buffers()

    def maps(
        self, images: Float[Tensor, "b c h w"], drop: Float[Tensor, "b branches"] | None = None
    ) -> Iterator[Float[Tensor, "b _ _ _"]]:
        """Each stage's output, not yet normed."""
        x, factors = images, iter([None] * self.branches if drop is None else drop.unbind(1))
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            for block in stage:
                x = block(x, next(factors))
            yield x

    def finish(self, x: Float[Tensor, "b d h w"]) -> tuple[Float[Tensor, "b d"] | None, Float[Tensor, "b d h w"]]:
        """Every cell normed; the class token is the mean of the cells before that, normed by the same norm."""
        cls = self.norm(x.mean((2, 3))) if self.config.cls else None
        return cls, self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_FAMILIES: dict[str, tuple[type[Convnet], type[_Config], dict[str, dict[str, Any]]]] = {
    "resnet": (ResNet, ResNetConfig, RESNETS),
    "conv": (Conv, ConvConfig, PLAIN),
    "convnext": (ConvNeXt, ConvNeXtConfig, CONVNEXTS),
}


def parse(arch: str) -> tuple[str, str, int]:
    """Family, size and stride of `FAMILY-SIZE/STRIDE`. Raises `SaccadeError` with the nearest right name."""
    name, _, stride = arch.lower().partition("/")
    family, _, size = name.partition("-")
    sizes = _FAMILIES[family][2] if family in _FAMILIES else {}
    if size not in sizes or not stride.isdigit():
        usual = stride if stride.isdigit() else "32"
        names = [f"{known}-{size}/{usual}" for known, (_, _, sizes) in _FAMILIES.items() for size in sizes]
        raise SaccadeError(f"there is no architecture {arch!r}", path="--arch", hint=nearest(arch.lower(), names))
    return family, size, int(stride)


def build(arch: str, *, image_size: int, channels: int = 3, **switches: Any) -> Convnet:
    """A fresh convnet by name, e.g. `build("resnet-18/8", image_size=32)`; `switches` are fields of its config.

    Raises `SaccadeError` for an unknown name or switch and for a size that leaves no cell.
    """
    family, size, stride = parse(arch)
    network, settings, sizes = _FAMILIES[family]
    for name in switches:
        if name not in settings.model_fields:
            raise SaccadeError(
                f"a {family} has no switch {name!r}", path=name, hint=nearest(name, settings.model_fields)
            )
    numbers: dict[str, Any] = sizes[size] | {"stride": stride, "image_size": image_size, "channels": channels}
    if channels != 3:  # no family's numbers apply
        numbers |= {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    config = settings(**(numbers | switches))
    config.grid_of(image_size, image_size)
    return network(config)

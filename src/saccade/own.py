"""A network of the user's own behind the contract of the families: any module that makes a map, tokens or a vector."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from blake3 import blake3
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.norm import Normalised
from saccade.settings import Settings, Training, flag
from saccade.vit import IMAGENET_MEAN, IMAGENET_STD, Features, places

_MAKES = "its forward takes normalised pictures [B C H W] and makes a map [B D h w], tokens [B N D] or a vector [B D]"


class OwnConfig(Settings):
    """What one look through a network of the user's own told, and which one it is. A vector alone has no patches."""

    network: str = Field(description="its class")
    shapes: str = Field(description="hash of the names and shapes of its tensors")
    kind: Literal["map", "tokens", "vector"] = Field(description="what it makes of a picture")
    leading: int = Field(0, ge=0, description="tokens before those of the patches; the first is the class token")
    width: int = Field(ge=1, description="width of a patch, or of the vector")
    cells: tuple[int, int] = Field(description="patches down and across a picture with a side of `looked_at`")
    looked_at: int = Field(ge=1, description="side in pixels of the picture that it was tried with")
    image_size: int = Field(224, ge=1, description="native side in pixels")
    channels: int = Field(3, ge=1, description="channels of a picture")
    mean: tuple[float, ...] = Field(IMAGENET_MEAN, description="subtracted from each channel of a picture in [0, 1]")
    std: tuple[float, ...] = Field(IMAGENET_STD, description="each channel is divided by it")

    @property
    def cls(self) -> bool:
        """Whether there is a class token; a vector alone stands where others have it."""
        return self.kind == "vector" or self.leading > 0

    @property
    def pooling(self) -> str:
        """The one vector is the class token, or the mean of the patches where there is none."""
        return "cls" if self.cls else "mean"

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches at the native size: counted where it was tried at that size, and in proportion at any other."""
        return tuple(count and max(1, round(count * self.image_size / self.looked_at)) for count in self.cells)


@dataclass(frozen=True)
class Own:
    """A module of the user's own, for `pretrain(…, network=)` and `load(…, network=)`; a copy of it is used.

    Its forward takes pictures [B C H W], normalised by `mean` and `std` (ImageNet's, or 0.5 and 0.25 where there are
    other than 3 channels, if not given), and makes a map [B D h w], tokens [B N D] of which `leading` ones come before
    those of a square grid (0 or 1, whichever fits, if not given), or a vector [B D]. What it draws at random itself, as
    dropout does, is not drawn the same again when a run goes on; its batch norm has the statistics of each rank.
    """

    module: nn.Module
    leading: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, network: object) -> Own:
        """A module as it is given. Raises `SaccadeError` for anything else."""
        if isinstance(network, Own):
            return network
        if not isinstance(network, nn.Module):
            what = f"the class {network.__name__}" if isinstance(network, type) else f"{network!r}"
            raise SaccadeError(f"{what} is not a network", path="network", hint="a torch module: network=MyModule()")
        return cls(network)

    @property
    def name(self) -> str:
        """The class of the module."""
        return type(self.module).__name__

    @property
    def arch(self) -> str:
        """What stands for --arch in the records of a run."""
        return f"own/{self.name}"

    def build(self, image_size: int, channels: int) -> OwnNetwork:
        """The network, tried with black pictures of this size. Raises `SaccadeError` where it cannot look at them."""
        module = self._copied()
        look = _tried(module, self.name, image_size, channels, self.leading)
        tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
        config = OwnConfig(
            network=self.name, shapes=_shapes(tensors), image_size=image_size, looked_at=image_size, channels=channels,
            mean=self.mean or (IMAGENET_MEAN if channels == 3 else (0.5,) * channels),
            std=self.std or (IMAGENET_STD if channels == 3 else (0.25,) * channels), **look,
        )  # fmt: skip
        if not len(config.mean) == len(config.std) == channels:
            raise SaccadeError(f"{channels} channels need as many means and spreads", path="network")
        return OwnNetwork(module.train(), config)

    def build_for(self, config: Training) -> OwnNetwork:
        """The network for a run. Raises `SaccadeError` where a recipe wants what only a family has."""
        if switches := config.backbone():
            raise SaccadeError(
                f"this recipe needs a ViT (it sets {next(iter(switches))!r}), not {self.name}", path="network",
                hint="simclr, dino and distil train a network of your own",
            )  # fmt: skip
        if config.layer_decay != 1:
            raise SaccadeError(f"which layers {self.name} has is not known", path="--layer-decay", hint="leave it out")
        network = self.build(config.image_size, config.channels)
        for name, side in config.sides().items():
            if side != config.image_size:
                _tried(network.module, self.name, side, config.channels, network.config.leading, setting=flag(name))
        network.train()
        return network

    def again(self, config: OwnConfig, image_size: int | None = None) -> OwnNetwork:
        """The network that a file describes, its weights not yet there; tried at this size where it is another one."""
        module = self._copied()
        if image_size not in (None, config.looked_at):
            leading = config.leading if config.kind == "tokens" else None
            look = _tried(module, self.name, image_size, config.channels, leading)
            config = config.model_copy(update={"looked_at": image_size, "cells": look["cells"]})
        return OwnNetwork(module, config)

    def _copied(self) -> nn.Module:
        """Raises `SaccadeError` for a module that cannot be copied or that safetensors could not hold."""
        try:
            module = copy.deepcopy(self.module).cpu()
        except Exception as error:  # whatever the user's module makes of it
            raise SaccadeError(f"{self.name} cannot be copied: {error}", path="network") from None
        names: dict[int, str] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise SaccadeError(f"the state of {self.name} holds more than tensors: {name}", path="network")
            if (other := names.setdefault(tensor.data_ptr() or id(tensor), name)) != name:
                raise SaccadeError(f"{other} and {name} of {self.name} are one tensor", path="network",
                                   hint="name it once in the module: tied weights are not kept")  # fmt: skip
        return module


class OwnNetwork(Normalised):
    """A module of the user's own as a backbone: normalised pictures go in, and its tensors are called `module.…`."""

    def __init__(self, module: nn.Module, config: OwnConfig):
        super().__init__()
        self.module, self.config = module, config
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next, to the nearest; of a whole picture where there are no patches."""
        return max(1, round(self.config.looked_at / max(1, self.config.cells[0])))

    @property
    def branches(self) -> int:
        """None that are known."""
        return 0

    def drop_rates(self, rate: float) -> list[float]:
        """None."""
        return []

    def forward(
        self, images: Shaped[Tensor, "b c h w"], *, drop: Float[Tensor, "b branches"] | None = None
    ) -> Features:
        """Features of pictures of any size that the module takes; `drop` has no branches."""
        config = self.config
        if images.shape[1] != config.channels:
            raise SaccadeError(
                f"this network reads {config.channels} channels, not {images.shape[1]}", path="--channels"
            )
        made = self.module(self.normalise(images))
        if config.kind == "vector":
            cls, tokens, patches, grid = made, made[:, None][:, :0], made[:, None][:, :0], (0, 0)
        elif config.kind == "map":
            cls, patches, grid = None, made.flatten(2).mT, (made.shape[2], made.shape[3])
            tokens = patches[:, :0]
        else:
            tokens, patches = made[:, : config.leading], made[:, config.leading :]
            cls, tokens = (tokens[:, 0], tokens[:, 1:]) if config.leading else (None, tokens)
            grid = _grid(patches.shape[1], images.shape[2], images.shape[3], config.network)
        return Features(cls, tokens, patches, places(grid, images.device).expand(len(images), -1, -1), grid)

    def pooled(
        self, images: Shaped[Tensor, "b c h w"], *, drop: Float[Tensor, "b branches"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The embedding of pictures."""
        return self.embedding(self(images, drop=drop))

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The class token or the vector, or the mean patch where there is neither."""
        return features.patches.mean(1) if features.cls is None else features.cls

    def given(self) -> dict[str, Any]:
        """What a run records of the network that it was given: its class, and hashes of shapes and of weights."""
        weights = blake3()
        for name, tensor in self.state_dict().items():
            weights.update(name.encode() + tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return {"weights": "given", "family": "own", "arch": f"own/{self.config.network}",
                "shapes": self.config.shapes, "hash": weights.hexdigest()}  # fmt: skip


def _shapes(tensors: dict[str, Tensor]) -> str:
    """A hash of names and shapes: what a network of the same architecture has in common."""
    return blake3(
        json.dumps(sorted((name, list(tensor.shape)) for name, tensor in tensors.items())).encode()
    ).hexdigest()


@torch.no_grad()
def _tried(
    module: nn.Module, name: str, side: int, channels: int, leading: int | None, setting: str = "network"
) -> dict[str, Any]:
    """Kind, width, leading tokens and cells, of what two black pictures become; the module is then in evaluation."""
    try:
        made = module.eval()(torch.zeros(2, channels, side, side))
    except Exception as error:  # whatever the user's module makes of it
        said = " ".join(str(error).split())
        raise SaccadeError(
            f"{name} cannot look at pictures [2 {channels} {side} {side}]: {said}", path=setting, hint=_MAKES
        ) from error
    if not isinstance(made, Tensor) or made.ndim not in (2, 3, 4) or len(made) != 2 or not made.is_floating_point():
        what = f"{list(made.shape)} of {made.dtype}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise SaccadeError(f"{name} makes {what} of pictures [2 {channels} {side} {side}]", path=setting, hint=_MAKES)
    if made.ndim == 2:
        return {"kind": "vector", "width": made.shape[1], "cells": (0, 0)}
    if made.ndim == 4:
        return {"kind": "map", "width": made.shape[1], "cells": (made.shape[2], made.shape[3])}
    count = made.shape[1]
    if leading is None:
        leading = int(math.isqrt(count) ** 2 != count)
    cells = _grid(count - leading, side, side, name)
    return {"kind": "tokens", "leading": leading, "width": made.shape[2], "cells": cells}


def _grid(count: int, height: int, width: int, name: str) -> tuple[int, int]:
    """Down and across a picture of this height and width. Raises `SaccadeError` where so many fill no such grid."""
    down = max(1, round(math.sqrt(max(count, 0) * height / width)))
    if count < 1 or count % down or abs(count // down - math.sqrt(count * width / height)) >= 1:
        raise SaccadeError(
            f"{count} patch tokens of {name} fill no grid over a picture of {height} x {width}", path="network",
            hint="Own(module, leading=…) says how many tokens come before those of the patches",
        )  # fmt: skip
    return down, count // down

"""What every family of backbones offers, and the one way to build one by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from saccade import caption, convnet, vit
from saccade.errors import SaccadeError, nearest
from saccade.own import OwnConfig
from saccade.settings import Settings, Training, flag
from saccade.vit import Features


@runtime_checkable
class Config(Protocol):
    """What can be read of any backbone's frozen settings; `width` is that of a patch, `grid` that at `image_size`.

    `cls` says whether there is a class token; `pooling` names the one vector: `cls`, `mean` (of the patches), or a
    family's own.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def cls(self) -> bool: ...
    @property
    def pooling(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def grid(self) -> tuple[int, ...]: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_copy(self, *, update: Mapping[str, Any]) -> Config: ...


@runtime_checkable
class Backbone(Protocol):
    """Pictures in [0, 1] or uint8 to `Features`: a module of any family."""

    config: Config

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""

    @property
    def branches(self) -> int:
        """How many residual branches stochastic depth may drop."""

    def __call__(self, images: Shaped[Tensor, "b ..."], *, drop: Float[Tensor, "b branches"] | None = None) -> Features:
        """Features; `drop` are factors of each sample's residual branches, 0 or 1 / (1 - p)."""

    def pooled(
        self, images: Shaped[Tensor, "b ..."], *, drop: Float[Tensor, "b branches"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The embedding of pictures, and nothing that it does not need."""

    def drop_rates(self, rate: float) -> list[float]:
        """How often each branch is dropped, rising from 0 to `rate`."""

    def normalise(self, images: Shaped[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """Pictures with the family's mean and spread taken out."""

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The one vector that this family pools."""

    def reset_buffers(self) -> None:
        """Fill what follows from the config and is in no checkpoint."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...


class Family(NamedTuple):
    """A network, its settings, the names of its sizes with a usual stride, and how one is built by name."""

    network: Callable[[Any], Any]
    config: type[Settings]
    names: tuple[str, ...]
    build: Callable[..., Any]


FAMILIES = {
    "vit": Family(vit.ViT, vit.ViTConfig, tuple(f"vit-{size}/16" for size in vit.SIZES), vit.build),
    "resnet": Family(
        convnet.ResNet, convnet.ResNetConfig, tuple(f"resnet-{size}/32" for size in convnet.RESNETS), convnet.build
    ),
    "conv": Family(convnet.Conv, convnet.ConvConfig, tuple(f"conv-{size}/16" for size in convnet.PLAIN), convnet.build),
    "convnext": Family(
        convnet.ConvNeXt,
        convnet.ConvNeXtConfig,
        tuple(f"convnext-{size}/32" for size in convnet.CONVNEXTS),
        convnet.build,
    ),
}


UNITS = (
    vit.Block,
    caption.CaptionBlock,
    convnet.BasicBlock,
    convnet.Bottleneck,
    convnet.ConvBlock,
    convnet.ConvNeXtBlock,
)
"""What is sharded as one piece: the blocks."""


def family_of(network: Backbone) -> str:
    """The name of a backbone's family; `own` is a network of the user's."""
    if isinstance(network.config, OwnConfig):
        return "own"
    return next(name for name, family in FAMILIES.items() if isinstance(network.config, family.config))


def known(network: Backbone) -> bool:
    """Whether a backbone is of a family here, so that one like it can be built."""
    return isinstance(network.config, tuple(family.config for family in FAMILIES.values()))


def build(arch: str, *, image_size: int, channels: int = 3, **switches: Any) -> Any:
    """A fresh backbone by name, e.g. `build("resnet-18/8", image_size=32)`; `switches` are fields of its config.

    Raises `SaccadeError` for an unknown name or switch and for a size that does not fit.
    """
    family = FAMILIES.get(arch.lower().partition("-")[0])
    if family is None:
        names = [name for known in FAMILIES.values() for name in known.names]
        hint = "in Python: pretrain(…, network=…)" if arch.startswith("own/") else nearest(arch.lower(), names)
        raise SaccadeError(f"there is no architecture {arch!r}", path="--arch", hint=hint)
    for name in switches:
        if name in vit.ViTConfig.model_fields and name not in family.config.model_fields:
            raise SaccadeError(
                f"this recipe needs a ViT (it sets {name!r}), not {arch}", path="--arch", hint="e.g. --arch vit-s/16"
            )
    return family.build(arch, image_size=image_size, channels=channels, **switches)


def build_for(config: Training, switches: Mapping[str, Any] | None = None) -> Any:
    """A fresh backbone as a recipe wants it, or with these switches.

    Raises `SaccadeError` also where a side of what the recipe looks at does not fit.
    """
    switches = config.backbone() if switches is None else switches
    network = build(config.arch, image_size=config.image_size, channels=config.channels, **switches)
    for name, side in config.sides().items():
        try:
            _ = network.config.model_copy(update={"image_size": side}).grid
        except SaccadeError as error:
            raise SaccadeError(error.error, path=flag(name), hint=error.hint) from None
    return network

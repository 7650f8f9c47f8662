"""What comes out of every checkpoint: an encoder, and the way its family prepares a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.augment import resized_for
from saccade.backbone import FAMILIES, Backbone, family_of
from saccade.decode import decode, pixels_of
from saccade.errors import SaccadeError
from saccade.naflex import natural_size
from saccade.published import Prepared
from saccade.sources.files import read
from saccade.text import Pairing
from saccade.vit import Features, ViT


@dataclass(frozen=True)
class Preprocess:
    """A picture to what an encoder reads: short side to `resize` (antialiased), then the centre `crop`².

    `square`: both sides to `crop` instead, whatever the aspect.
    """

    resize: int
    crop: int
    channels: int = 3
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    square: bool = False

    @classmethod
    def at(cls, size: int, channels: int = 3) -> Preprocess:
        """The convention for a native size (`augment.resized_for`)."""
        return cls(resized_for(size), size, channels)

    @classmethod
    def said(cls, record: Mapping[str, Any], size: int, channels: int = 3) -> Preprocess:
        """As the published family does it that a record's weights began as, where it names one; else by convention."""
        facts = record.get("preprocess")
        return cls.at(size, channels) if facts is None else cls.of(Prepared(**facts), size, channels)

    @classmethod
    def of(cls, facts: Prepared, size: int, channels: int = 3) -> Preprocess:
        """As a published family does it, at any size."""
        resize = size if facts.square else round(size * facts.resize / facts.crop)
        return cls(resize, size, channels, facts.interpolation, facts.square)

    @property
    def canvas(self) -> int:
        """Short side to which decoding may shrink a picture: twice what is needed, so that antialiasing stays ours."""
        return 2 * self.resize

    def __call__(self, picture: Image.Image | str | Path | Shaped[Tensor, "*t c h w"]) -> Shaped[Tensor, "c s s"]:
        """The picture as uint8, or as float in [0, 1] where it has more than 8 bits.

        Takes a Pillow picture, a file, or pixels [C H W] (or [1 C H W], as a `Sample` has them). Raises `Unreadable`
        for a file that cannot be decoded.
        """
        pixels = self._pixels(picture)
        if self.square:
            return _interpolated(pixels, [self.crop, self.crop], self.interpolation)
        whole = _centre(pixels, 4 * min(pixels.shape[1:]))
        return _centre(resized(whole, self.resize, self.interpolation), self.crop)

    def sized(
        self, picture: Image.Image | str | Path | Shaped[Tensor, "*t c h w"], size: list[int]
    ) -> Shaped[Tensor, "c _ _"]:
        """The whole picture, as high and as wide as `size` says."""
        return _interpolated(self._pixels(picture), size, self.interpolation)

    def natural(
        self, picture: Image.Image | str | Path | Shaped[Tensor, "*t c h w"], patch: int, patches: int
    ) -> Shaped[Tensor, "c _ _"]:
        """The whole picture near its own aspect, in at most so many patches of this side; as above otherwise."""
        pixels = self._pixels(picture)
        return self.sized(pixels, natural_size(pixels.shape[1], pixels.shape[2], patch, patches))

    def _pixels(self, picture: Image.Image | str | Path | Shaped[Tensor, "*t c h w"]) -> Shaped[Tensor, "c h w"]:
        if isinstance(picture, str | Path):
            pixels = decode(
                read(str(picture), str(picture)), key=str(picture), short_side=self.canvas, channels=self.channels
            )
        elif isinstance(picture, Image.Image):
            array = pixels_of(ImageOps.exif_transpose(picture), None, self.channels)
            pixels = torch.from_numpy(array).permute(2, 0, 1)
        else:
            pixels = picture
        pixels = pixels[0] if pixels.ndim == 4 else pixels
        if pixels.dtype == torch.uint16:
            pixels = pixels.to(torch.float32) / 65535
        return pixels


def _centre(pixels: Shaped[Tensor, "c h w"], side: int) -> Shaped[Tensor, "c _ _"]:
    """At most `side` pixels each way, from the middle."""
    height, width = pixels.shape[1:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def resized(pixels: Shaped[Tensor, "c h w"], short: int, interpolation: str = "bicubic") -> Shaped[Tensor, "c _ _"]:
    """The picture with this short side; the same memory where it has it already."""
    height, width = pixels.shape[1:]
    size = [max(short, round(side * short / min(height, width))) for side in (height, width)]
    return pixels if min(height, width) == short else _interpolated(pixels, size, interpolation)


def _interpolated(pixels: Shaped[Tensor, "c h w"], size: list[int], interpolation: str) -> Shaped[Tensor, "c _ _"]:
    out = F.interpolate(pixels[None], size=size, mode=interpolation, antialias=True, align_corners=False)[0]
    return out.clamp(0, 1) if pixels.is_floating_point() and pixels.amin() >= 0 and pixels.amax() <= 1 else out


class Encoder(nn.Module):
    """Pictures to `Features`: `Float[B C H W]` in [0, 1] or `UInt8[B C H W]`; normalisation happens inside.

    `preprocess` turns any one picture into what goes in; `record` says where the weights come from: family, size, mean,
    std, hash, licence, and which tensors matched, were missing or unexpected; `grid` how many patches there are along
    each axis of what `preprocess` makes. `text` is the text tower that belongs to it (CLIP, SigLIP), or None:
    `encoder.text(["a leaf"])` and `encoder.pair(images)` are vectors of length 1 in one space, and `logits` compares.
    """

    def __init__(
        self,
        backbone: Backbone,
        record: dict[str, Any],
        image_size: int | None = None,
        preprocess: Preprocess | None = None,
    ):
        super().__init__()
        self.backbone, self.record = backbone, record
        size = backbone.config.image_size if image_size is None else image_size
        self.grid: tuple[int, ...] = backbone.config.model_copy(update={"image_size": size}).grid
        self.preprocess = preprocess or Preprocess.said(record, size, backbone.config.channels)
        self.text: Pairing | None = None

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def forward(self, images: Shaped[Tensor, "b ..."], *, tokens: Literal["all", "cls", "patches"] = "all") -> Features:
        """Features; a ViT's last block computes no other `tokens` than those asked for.

        Raises `SaccadeError` for one picture without a batch axis.
        """
        if images.ndim == 3:
            raise SaccadeError(
                "an encoder reads batches [B C H W]", path="images", hint="one picture: encoder(picture[None])"
            )
        return self.backbone(images, tokens=tokens) if isinstance(self.backbone, ViT) else self.backbone(images)

    def natural(self, picture: Image.Image | str | Path | Shaped[Tensor, "*t c h w"]) -> Shaped[Tensor, "c _ _"]:
        """A picture near its own aspect, with as many patches as fit into those of `preprocess`.

        For one call a picture, where shape matters or a family was trained so (NaFlex). Raises `Unreadable`.
        """
        return self.preprocess.natural(picture, self.backbone.stride, math.prod(self.grid))

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The one vector that this family pools."""
        return self.backbone.embedding(features)

    def pair(self, images: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b e"]:
        """Pictures as vectors of length 1 in the space of its texts. Raises `SaccadeError` without a text tower."""
        return self.pairing().images(self.backbone.pooled(images))

    def paired(self, features: Features) -> Float[Tensor, "b e"]:
        """As `pair`, of features that are there already."""
        return self.pairing().images(self.embedding(features))

    def logits(
        self, images: Shaped[Tensor, "b ..."], texts: Sequence[str] | Int[Tensor, "c l"]
    ) -> Float[Tensor, "b c"]:
        """How well each picture fits each text, or its tokens: for softmax (CLIP) or sigmoid (SigLIP).

        Raises `SaccadeError` without a text tower.
        """
        pairing = self.pairing()
        return pairing.logits(self.pair(images), pairing(texts))

    def pairing(self) -> Pairing:
        """Its text tower, and how texts and pictures are compared. Raises `SaccadeError` where there is none."""
        if self.text is None:
            refused = (self.record.get("text") or {}).get("refused")
            why = f": what is there was refused, as {refused}" if refused else ""
            raise SaccadeError(
                f"{self.record.get('path') or 'this encoder'} has no text tower{why}",
                path="text",
                hint="CLIP's and SigLIP's have one, and runs of pictures with words",
            )
        return self.text


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same network with fresh weights, which depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = FAMILIES[family_of(encoder.backbone)].network(encoder.backbone.config)
    record = {"family": "untrained", "seed": seed}
    return Encoder(fresh, record, encoder.preprocess.crop, encoder.preprocess).eval()

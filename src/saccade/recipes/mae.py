"""MAE: hide three quarters of the patches, rebuild their pixels from the rest.  arXiv 2111.06377"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws
from saccade.errors import SaccadeError


class Config(recipe.Training):
    """The paper's pre-training (its appendix A.1), with the patch-normalised target."""

    batch: int = Field(4096, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    epochs: float | None = Field(800, gt=0, description="length in passes over the data")
    mask: float = Field(0.75, gt=0, lt=1, description="part of the patches that is hidden")
    min_scale: float = Field(0.2, gt=0, le=1, description="smallest crop, as a part of the picture's area")
    normalise_target: bool = Field(True, description="each patch of the target has mean 0 and spread 1")
    decoder_width: int = Field(512, ge=1, description="width of a decoder token")
    decoder_depth: int = Field(8, ge=1, description="number of decoder blocks")
    decoder_heads: int = Field(16, ge=1, description="attention heads of a decoder block")

    def canvas(self) -> int:
        """The smallest crop of a square picture still has a pixel for each of its own."""
        return math.ceil(self.image_size / math.sqrt(self.min_scale))

    def backbone(self) -> dict[str, Any]:
        """Fixed positions, Xavier matrices."""
        return {"position": "sincos", "init": "xavier"}


def small_pictures() -> Config:
    """Pictures of 32 to 64 pixels: patches of 4, a narrow decoder."""
    decoder = {"decoder_width": 192, "decoder_depth": 4, "decoder_heads": 6}
    return Config(arch="vit-ti/4", image_size=32, batch=256, lr=1e-3, min_scale=0.4, **decoder)


def small_machine() -> Config:
    """A few CPU cores: a tiny encoder, 64 tokens, a narrow decoder, batches that fit."""
    return Config(
        arch="vit-ti/8",
        image_size=64,
        batch=128,
        lr=1e-3,
        decoder_width=192,
        decoder_depth=2,
        decoder_heads=6,
        min_scale=0.4,
    )


def _split(config: Config) -> tuple[int, int]:
    """How many patches there are, and how many of them are kept."""
    side = vit.grid_of((config.image_size, config.image_size), vit.parse(config.arch)[1])
    kept = int(math.prod(side) * (1 - config.mask))
    if not 0 < kept < math.prod(side):
        raise SaccadeError(
            f"mask {config.mask} leaves {kept} of {math.prod(side)} patches", path="mask", hint="move it to 0.5"
        )
    return math.prod(side), kept


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """One crop, flipped or not, and a random order of its patches: the first of them are kept."""
    crops = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(config.min_scale, 1.0))
    crops = augment.flip(crops, draws.sample("flip"))
    images = augment.render(batch["pixels"], crops, config.image_size)
    return {"images": images, "order": draws.sample("mask").order(_split(config)[0]).to(images.device)}


class Method(recipe.Method):
    """Encoder of what is seen, decoder of all, loss on what was hidden."""

    def __init__(self, config: Config, backbone: vit.ViT, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone
        patches, self.kept = _split(config)
        width = config.decoder_width
        self.decoder_embed = vit.Linear(backbone.config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_blocks = nn.ModuleList(
            vit.Block(width, config.decoder_heads, 4 * width) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, 1e-6)
        self.decoder_pred = vit.Linear(width, backbone.config.channels * backbone.config.patch**2)
        self.register_buffer("decoder_pos_embed", torch.empty(patches, width), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh decoder weights; the backbone comes with its own."""
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            vit.initialise(part, "xavier")
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed.copy_(vit.sincos(self.backbone.config.grid, self.config.decoder_width))

    def encoder(self) -> vit.ViT:
        """The backbone."""
        return self.backbone

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean squared error over the hidden patches of `images` [B C S S], whose `order` [B N] says which are kept."""
        keep, hidden = batch["order"].tensor_split([self.kept], 1)
        return F.mse_loss(self.predict(batch["images"], keep, hidden), self.target(batch["images"], hidden)), {}

    def predict(self, images: Tensor, keep: Tensor, hidden: Tensor) -> Float[Tensor, "b k p"]:
        """The content of the hidden patches, pixels in the order row, column, channel."""
        features = self.backbone(images, keep=keep)
        cls = [] if features.cls is None else [features.cls[:, None]]
        seen = self.decoder_embed(torch.cat([*cls, features.registers, features.patches], 1))
        placed = self.decoder_pos_embed[torch.cat([keep, hidden], 1)]  # positions tell the order, so none is restored
        x = torch.cat([seen, self.mask_token.to(seen.dtype).expand(*hidden.shape, -1)], 1)
        x = x + F.pad(placed, (0, 0, self.backbone.prefix, 0))
        *body, last = self.decoder_blocks
        for block in body:
            x = block(x)
        x = last(x, rows=slice(seen.shape[1], None))  # nobody reads what it would say about the rest
        return self.decoder_pred(self.decoder_norm(x))

    def patches(self, images: Tensor, chosen: Tensor) -> Float[Tensor, "b k p"]:
        """The pixels of these patches."""
        patches = vit.patchify(self.backbone.normalise(images), self.backbone.config.patch)  # [B h w C p p]
        return vit.take(patches.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2), chosen)

    def target(self, images: Tensor, hidden: Tensor) -> Float[Tensor, "b k p"]:
        """The pixels of the hidden patches, each patch by its own mean and (unbiased) variance if so configured."""
        patches = self.patches(images, hidden)
        if not self.config.normalise_target:
            return patches
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        return (patches - mean) * (variance + 1e-6).rsqrt()

    def show(self, batch: Batch) -> dict[str, Float[Tensor, "b c h w"]]:
        """What was seen, the same with the rest rebuilt, and the truth."""
        keep, hidden = batch["order"].tensor_split([self.kept], 1)
        truth, rebuilt, note = self.patches(batch["images"], hidden), self.predict(batch["images"], keep, hidden), ""
        if self.config.normalise_target:  # a prediction without brightness and contrast: it is lent the true ones
            variance, mean = torch.var_mean(truth, -1, keepdim=True)
            rebuilt, note = rebuilt * (variance + 1e-6).sqrt() + mean, " (each patch with its true mean and spread)"
        seen, back = self.patches(batch["images"], keep), batch["order"].argsort(1)
        parts = {"seen": truth * 0, f"rebuilt{note}": rebuilt, "original": truth}
        return {name: self.backbone.picture(vit.take(torch.cat([seen, part], 1), back)) for name, part in parts.items()}

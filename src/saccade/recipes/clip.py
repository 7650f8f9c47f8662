"""CLIP: of all texts in the batch, find a picture's own, and of all pictures a text's.  arXiv 2103.00020

The paper's settings, with AdamW. Two samples with the same text, or with the same picture, are no negatives of each
other; the paper does not look. The shared space is as wide as the text tower, as in the published models.
"""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saccade import augment, pair_losses, recipe
from saccade.data import Batch
from saccade.draws import Draws
from saccade.words import Words


class Config(recipe.Captioned):
    """The paper's training (its tables 18 and 20)."""

    batch: int = Field(32768, ge=2, description="samples an optimizer step, over all ranks and accumulation together")
    epochs: float | None = Field(32, gt=0, description="length in passes over the data")
    lr: float = Field(
        5e-4 * 256 / 32768, gt=0, description="learning rate at batch 256; scaled linearly with the batch"
    )
    warmup: float = Field(0.005, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(0.2, ge=0, description="AdamW's decay, on matrices only")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's second decay rate")
    vocabulary: int = Field(49408, ge=516, description="words of a tokenizer that is trained; a given one has its own")
    length: int = Field(77, ge=3, description="tokens of a text: longer ones are cut, shorter ones filled up")
    temperature: float = Field(0.07, gt=0, description="of the softmax over cosines at the start; it is learned")
    min_scale: float = Field(0.9, gt=0, le=1, description="smallest crop, as a part of the picture's area")


def small_machine() -> Config:
    """A few CPU cores: pictures of 64 pixels, a small convnet, short texts, batches that fit."""
    text: dict[str, Any] = {"vocabulary": 4096, "length": 32, "text_width": 192, "text_depth": 3, "text_heads": 3}
    size: dict[str, Any] = {"arch": "conv-4/16", "image_size": 64, "batch": 128, "min_scale": 0.5}
    return Config(**size, **text, lr=2e-3, warmup=0.05, weight_decay=0.1, flip=0.5)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """A random crop of each picture, its text's tokens, and what tells which samples are the same."""
    rows, made = augment.captioned(config, batch, draws)
    return made | {"images": augment.render(batch["pixels"], rows, config.image_size)}


class Method(recipe.TwoTowers):
    """Two towers; the loss is between the pairs of the whole batch."""

    def __init__(self, config: Config, backbone: Any, teachers: dict[str, Any]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone
        scale = -math.log(config.temperature)
        self.pairing = Words(config, backbone.config.width, clip=True, scale=scale)

    def chance(self) -> dict[str, float]:
        """The loss when every text fits every picture alike."""
        return {"loss": math.log(self.config.batch)}

    def couple(
        self, embeddings: Float[Tensor, "b 2 d"], t: Float[Tensor, ""], **beside: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, the factor of cosines, and how many pairs were left out because they are no negatives."""
        scale = self.pairing.scale.exp()
        loss, left_out = pair_losses.contrast(embeddings, scale, beside["same"])
        return loss, {"scale": scale.detach().sum(), "left_out": left_out}

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The temperature stays above a hundredth, or training would end in spikes."""
        self.pairing.limit()

"""SigLIP: of every picture and every text in the batch, say whether they belong together.  arXiv 2303.15343

The paper's settings, with AdamW. Two samples with the same text, or with the same picture, are no negatives of each
other; the paper does not look.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saccade import augment, pair_losses, recipe
from saccade.data import Batch
from saccade.draws import Draws
from saccade.words import Words


class Config(recipe.Captioned):
    """The paper's training from scratch (its section 4.2)."""

    batch: int = Field(32768, ge=2, description="samples an optimizer step, over all ranks and accumulation together")
    steps: int | None = Field(1_220_000, ge=1, description="length in optimizer steps: 40 billion pairs")
    lr: float = Field(
        1e-3 * 256 / 32768, gt=0, description="learning rate at batch 256; scaled linearly with the batch"
    )
    warmup: float = Field(0.016, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decay, on matrices only")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
    vocabulary: int = Field(32000, ge=516, description="words of a tokenizer that is trained; a given one has its own")
    text_width: int = Field(768, ge=1, description="width of a text's token")
    text_heads: int = Field(12, ge=1, description="attention heads of the text tower")
    scale: float = Field(10.0, gt=0, description="factor of cosines at the start; it is learned")
    bias: float = Field(-10.0, description="added to every logit at the start; it is learned")

    def backbone(self) -> dict[str, Any]:
        """A ViT pools by attention, without a class token; pictures come to [-1, 1]."""
        if not self.arch.startswith("vit"):
            return {}
        half = (0.5,) * self.channels
        return {"cls": False, "pooling": "map", "activation": "gelu_tanh", "mean": half, "std": half}


def small_machine() -> Config:
    """A few CPU cores: pictures of 64 pixels, a small convnet, short texts, batches that fit."""
    text: dict[str, Any] = {"vocabulary": 4096, "length": 32, "text_width": 192, "text_depth": 3, "text_heads": 3}
    size: dict[str, Any] = {"arch": "conv-4/16", "image_size": 64, "batch": 128, "min_scale": 0.5}
    return Config(**size, **text, steps=None, epochs=100, lr=2e-3, warmup=0.05, weight_decay=0.1, flip=0.5)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Each picture squeezed to a square, its text's tokens, and what tells which samples are the same."""
    rows = augment.whole(batch["size"])
    if config.min_scale < 1:
        rows = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(config.min_scale, 1.0))
    rows = augment.flip(rows, draws.sample("flip"), config.flip)
    images = augment.render(batch["pixels"], rows, config.image_size, interpolation="bilinear")
    same = torch.stack([batch["key"], batch["text_key"]], 1).to(images.device)
    return {"images": images, "tokens": batch["text"].long(), "same": same}


class Method(recipe.TwoTowers):
    """Two towers; the loss is between the pairs of the whole batch."""

    def __init__(self, config: Config, backbone: Any, teachers: dict[str, Any]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone
        self.pairing = Words(config, backbone.config.width, scale=math.log(config.scale), bias=config.bias)

    def chance(self) -> dict[str, float]:
        """The loss when every text fits every picture alike: each is taken for a pair once in so many times."""
        n = self.config.batch
        return {"loss": math.log(n) + (n - 1) * math.log(n / (n - 1))}

    def couple(
        self, embeddings: Float[Tensor, "b 2 d"], t: Float[Tensor, ""], **beside: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, the factor and offset of logits, and how many pairs were left out because they are no negatives."""
        scale, bias = self.pairing.scale.exp(), self.pairing.bias
        loss, left_out = pair_losses.sigmoid(embeddings, scale, bias, beside["same"])
        return loss, {"scale": scale.detach().sum(), "bias": bias.detach().sum(), "left_out": left_out}

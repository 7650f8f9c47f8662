"""SigLIP: of every picture and every text in the batch, say whether they belong together.  arXiv 2303.15343

The paper's settings, with AdamW. Two samples with the same text, or with the same picture, are no negatives of each
other; the paper does not look.
"""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saccade import augment, pair_losses, recipe
from saccade.data import Batch
from saccade.draws import Draws
from saccade.words import Words


class Config(recipe.SigmoidPaired):
    """The paper's training from scratch (its section 4.2)."""

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
    rows, made = augment.captioned(config, batch, draws)
    return made | {"images": augment.render(batch["pixels"], rows, config.image_size, interpolation="bilinear")}


class Method(recipe.TwoTowers):
    """Two towers; the loss is between the pairs of the whole batch."""

    def __init__(self, config: Config, backbone: Any, teachers: dict[str, Any]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone
        self.pairing = Words(config, backbone.config.width, scale=math.log(config.scale), bias=config.bias)

    def chance(self) -> dict[str, float]:
        """The loss when every text fits every picture alike."""
        return {"loss": pair_losses.sigmoid_by_chance(self.config.batch)}

    def couple(
        self, embeddings: Float[Tensor, "b 2 d"], t: Float[Tensor, ""], **beside: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, the factor and offset of logits, and how many pairs were left out because they are no negatives."""
        scale, bias = self.pairing.scale.exp(), self.pairing.bias
        loss, left_out = pair_losses.sigmoid(embeddings, scale, bias, beside["same"])
        return loss, {"scale": scale.detach().sum(), "bias": bias.detach().sum(), "left_out": left_out}

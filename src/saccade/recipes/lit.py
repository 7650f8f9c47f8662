"""LiT: a text tower learns to say what a locked image tower sees.  arXiv 2111.07991; the loss is SigLiT's, 2303.15343

The image tower is `--init`'s (or a network of your own) and stays as it is, bit for bit. Texts come to its pictures,
which are not projected: search by picture stays what it was. Pictures that are the same at every visit, as they are
without crops and flips, are looked at once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saccade import augment, pair_losses, recipe
from saccade.data import Batch
from saccade.draws import Draws
from saccade.frozen import Memory
from saccade.words import Words


class Config(recipe.Captioned):
    """The rates of LiT (AdamW in Adafactor's place), the loss, batch and length of texts of SigLiT."""

    arch: str = Field("as --init", description="what --init is; it says size and channels of pictures too")
    batch: int = Field(20480, ge=2, description="samples an optimizer step, over all ranks and accumulation together")
    steps: int | None = Field(107_000, ge=1, description="length in optimizer steps")
    lr: float = Field(
        1e-3 * 256 / 20480, gt=0, description="learning rate at batch 256; scaled linearly with the batch"
    )
    warmup: float = Field(0.1, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decay, on matrices only")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
    vocabulary: int = Field(32000, ge=516, description="words of a tokenizer that is trained; a given one has its own")
    length: int = Field(16, ge=3, description="tokens of a text: longer ones are cut, shorter ones filled up")
    text_width: int = Field(768, ge=1, description="width of a text's token")
    text_heads: int = Field(12, ge=1, description="attention heads of the text tower")
    loss: Literal["sigmoid", "softmax"] = Field("sigmoid", description="between pairs: SigLiT's or LiT's own")
    scale: float = Field(10.0, gt=0, description="factor of cosines at the start; it is learned")
    bias: float = Field(-10.0, description="added to every logit at the start (sigmoid); it is learned")
    memory: float = Field(2.0, ge=0, description="GB for what was seen of pictures that do not change; 0: none")

    def keeps_start(self) -> bool:
        """It does."""
        return True

    def steady(self) -> bool:
        """Whether a picture is the same at every visit."""
        return self.min_scale == 1 and self.flip == 0

    def canvas(self) -> int:
        """As in use, twice what is needed: antialiasing stays ours."""
        return 2 * augment.resized_for(self.image_size) if self.min_scale == 1 else super().canvas()


def small_machine() -> Config:
    """A few CPU cores: short texts, a small tower, batches that fit, and a bias for them."""
    text: dict[str, Any] = {"vocabulary": 4096, "length": 32, "text_width": 192, "text_depth": 3, "text_heads": 3}
    return Config(**text, batch=128, steps=None, epochs=40, lr=2e-3, weight_decay=0.1, bias=-math.log(128))


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Each picture as evaluation sees it, or a random crop, its text's tokens, and what tells which are the same."""
    side = config.image_size
    rows = augment.centre_crop(batch["size"], side, augment.resized_for(side))
    if config.min_scale < 1:
        rows = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(config.min_scale, 1.0))
    rows = augment.flip(rows, draws.sample("flip"), config.flip)
    images = augment.render(batch["pixels"], rows, side)
    same = torch.stack([batch["key"], batch["text_key"]], 1).to(images.device)
    return {"images": images, "tokens": batch["text"].long(), "same": same}


class Method(recipe.TwoTowers):
    """A locked image tower and a text tower; the loss is between the pairs of the whole batch."""

    def __init__(self, config: Config, backbone: Any, teachers: dict[str, Any]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone.requires_grad_(False).eval()
        bias = config.bias if config.loss == "sigmoid" else None
        self.pairing = Words(config, backbone.config.width, scale=math.log(config.scale), bias=bias)
        self.seen = Memory(self.backbone, config.memory if config.steady() else 0)

    def chance(self) -> dict[str, float]:
        """The loss when every text fits every picture alike."""
        n = self.config.batch
        return {"loss": math.log(n) + (self.config.loss == "sigmoid") * (n - 1) * math.log(n / (n - 1))}

    def embed(self, batch: Batch, t: Float[Tensor, ""]) -> Float[Tensor, "b 2 d"]:
        """What the locked tower sees, and texts beside it."""
        return self.pairing(self.seen(batch["images"], batch["same"][:, 0], self), batch["tokens"])

    def couple(
        self, embeddings: Float[Tensor, "b 2 d"], t: Float[Tensor, ""], **beside: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, the factor (and offset) of logits, and how many pairs were left out as they are no negatives."""
        scale, bias, same = self.pairing.scale.exp(), self.pairing.bias, beside["same"]
        told = {"scale": scale.detach().sum()}
        if bias is None:
            loss, left_out = pair_losses.contrast(embeddings, scale, same)
        else:
            loss, left_out = pair_losses.sigmoid(embeddings, scale, bias, same)
            told["bias"] = bias.detach().sum()
        return loss, told | {"left_out": left_out}

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The factor of cosines stays below 100."""
        self.pairing.limit()

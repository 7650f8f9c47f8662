"""SimCLR: of all views in the batch, find the one that was made of the same picture.  arXiv 2002.05709

The paper's settings, but for the optimizer: AdamW, as everywhere here, where the paper has LARS at a rate of 0.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, losses, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws
from saccade.norm import BatchNorm


class Config(recipe.Training):
    """The paper's ImageNet training (its section 2 and appendices A and B)."""

    arch: str = Field("resnet-50/32", description="backbone: size and stride or patch")
    batch: int = Field(4096, ge=2, description="samples an optimizer step, over all ranks and accumulation together")
    epochs: float | None = Field(100, gt=0, description="length in passes over the data")
    lr: float = Field(1.5e-4, gt=0, description="learning rate at batch 256; scaled linearly with the batch")
    warmup: float = Field(0.1, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    temperature: float = Field(0.1, gt=0, description="of the softmax over cosines; the paper has 0.5 for CIFAR-10")
    view_size: int | None = Field(
        None, ge=1, description="side of a view in pixels, if not image_size: crops enlarge what is to be recognised"
    )
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layer")
    projection: int = Field(128, ge=1, description="width of what is compared")
    min_scale: float = Field(0.08, gt=0, le=1, description="smallest crop, as a part of the picture's area")
    flip: float = Field(0.5, ge=0, le=1, description="how often a view is mirrored; 0 where left and right differ")
    colour: float = Field(1.0, ge=0, description="strength of the colour jitter")
    grey: float = Field(0.2, ge=0, le=1, description="how often a view loses its colour")
    blur: float = Field(0.5, ge=0, le=1, description="how often a view is blurred")

    def canvas(self) -> int:
        """The smallest crop of a square picture still has a pixel for each of its own."""
        return math.ceil(self.side() / math.sqrt(self.min_scale))

    def side(self) -> int:
        """Of a view, in pixels. Things look larger in crops than in whole pictures, which makes up for a smaller one
        (FixRes, arXiv 1906.06423)."""
        return self.image_size if self.view_size is None else self.view_size


def small_pictures() -> Config:
    """Pictures of about 32 pixels, as the paper's appendix B.9 trains on CIFAR-10: weaker colour and no blur."""
    return Config(arch="resnet-18/8", image_size=32, batch=512, lr=5e-4, temperature=0.5, colour=0.5, blur=0)


def small_machine() -> Config:
    """A few CPU cores: views of 32 pixels, a small convnet, batches that fit its cache. Tuned in docs/log.md."""
    size = {"arch": "conv-4/16", "image_size": 48, "view_size": 32, "batch": 128, "hidden": 512}
    return Config(**size, lr=4e-3, temperature=0.2, min_scale=0.2, colour=0.5, blur=0, warmup=0.05)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Two views of each picture, drawn alike: all first ones, then all second ones."""
    rows = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(config.min_scale, 1.0), count=2)
    rows = augment.flip(rows, draws.sample("flip"), config.flip)
    rows = augment.jitter(
        rows,
        draws.sample("jitter"),
        brightness=0.8 * config.colour,
        contrast=0.8 * config.colour,
        saturation=0.8 * config.colour,
        hue=0.2 * config.colour,
        probability=0.8,
    )
    rows = augment.grey(rows, draws.sample("grey"), config.grey)
    rows = augment.blur(rows, draws.sample("blur"), probability=config.blur)
    return {"images": augment.render(batch["pixels"], rows, config.side())}


class Method(recipe.Coupled):
    """Backbone and projector; the loss is between the views of the whole batch."""

    def __init__(self, config: Config, backbone: Any, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone
        width = backbone.config.width
        self.projector = nn.Sequential(
            vit.Linear(width, config.hidden, bias=False),
            BatchNorm(config.hidden),
            nn.ReLU(inplace=True),
            vit.Linear(config.hidden, config.projection, bias=False),
            BatchNorm(config.projection),
        )

    def encoder(self) -> Any:
        """The backbone."""
        return self.backbone

    def chance(self) -> dict[str, float]:
        """The loss when every view is as near as every other."""
        return {"loss": math.log(2 * self.config.batch - 1)}

    def embed(self, batch: Batch, t: Float[Tensor, ""]) -> Float[Tensor, "b 2 d"]:
        """The projections of both views, which go through the network together: batch norm sees them as one batch."""
        return self.projector(self.backbone.pooled(batch["images"])).unflatten(0, (2, -1)).transpose(0, 1)

    def couple(self, embeddings: Float[Tensor, "b 2 d"], t: Float[Tensor, ""]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and how near the two views of a picture are: 1 is the same direction."""
        loss = losses.info_nce(embeddings, self.config.temperature)
        with torch.no_grad():
            alignment = F.cosine_similarity(embeddings[:, 0].float(), embeddings[:, 1].float()).mean()
        return loss, {"alignment": alignment}

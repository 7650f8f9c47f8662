"""DINO: a student tells from any crop which prototypes its own slow average sees in the whole.  arXiv 2104.14294"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, depth, distributed, heads, optim, recipe
from saccade.data import Batch
from saccade.draws import Draws


class Config(recipe.SelfDistillation):
    """The paper's ViT-S/16 in 100 epochs."""

    arch: str = Field("vit-s/16", description="backbone: size and patch or stride, e.g. vit-s/16, resnet-50/32")
    batch: int = Field(1024, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    epochs: float | None = Field(100, gt=0, description="length in passes over the data")
    lr: float = Field(5e-4, gt=0, description="learning rate at batch 256; scaled linearly with the batch")
    warmup: float = Field(0.1, ge=0, le=1, description="part of training in which the learning rate rises from 0")

    def backbone(self) -> dict[str, float]:
        """A ViT's positions are resized for small crops as the released ones were."""
        return {"position_offset": 0.1} if self.arch.lower().startswith("vit-") else {}


def small_pictures() -> Config:
    """Pictures of 32 to 64 pixels: patches of 4, no blur, fewer prototypes."""
    return Config(arch="vit-ti/4", image_size=32, local_size=16, batch=256, blur=0.0, prototypes=4096, head_norm=True)


def small_machine() -> Config:
    """A few CPU cores: a tiny encoder, few small crops, a narrow head with batch norm, a sharp teacher."""
    size = {"arch": "vit-ti/8", "image_size": 48, "local_size": 24, "local_crops": 2, "batch": 64, "drop_path": 0.0}
    head = {"prototypes": 1024, "hidden": 512, "head_norm": True}
    return Config(**size, **head, lr=2e-3, first_temperature=0.02, teacher_temperature=0.02, colour=0.5, blur=0.0)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Two large crops [2B C S S], small ones, and a random word for the stochastic depth of each."""
    return augment.multi_crop(config, batch, draws, blurred=(1.0, 0.1, 0.5))


class Method(recipe.Taught):
    """Student and teacher, each a backbone with a head."""

    def __init__(self, config: Config, backbone: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, count = config, config.prototypes
        head = heads.DINOHead(backbone.config.width, count, hidden=config.hidden, norm=config.head_norm)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(count))
        self.register_buffer("mean_logits", torch.zeros(count), persistent=False)

    def groups(self, t: float) -> list[optim.Group]:
        """Each tensor is clipped by itself, decay rises, and the prototypes stand still at first."""
        return optim.student_groups(self.student, t, self.config, clip="tensor")

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of every view's prototypes to the teacher's, of each large crop but its own."""
        crops = [batch[name] for name in ("globals", "locals") if name in batch]
        backbone, samples, target = self.student["backbone"], len(crops[0]) // 2, self.target(crops[0], t)
        rates, rows = backbone.drop_rates(self.config.drop_path), batch["drop"].split([len(crop) for crop in crops])
        pooled = [backbone.pooled(x, drop=depth.stochastic_depth(r, rates)) for x, r in zip(crops, rows, strict=True)]
        logits = self.student["head"](torch.cat(pooled)).unflatten(0, (-1, samples))
        loss = heads.cross_view(logits, target.unflatten(0, (-1, samples)), self.config.student_temperature)
        return loss, heads.concentration(target)

    @torch.no_grad()
    def target(self, images: Tensor, t: Float[Tensor, ""]) -> Float[Tensor, "b k"]:
        """What the teacher sees, centred and sharpened."""
        config = self.config
        logits = self.teacher["head"](self.teacher["backbone"].pooled(images)).to(self.centre.dtype)
        self.mean_logits += logits.mean(0) / config.accumulate
        temperature = optim.linear(t, config.first_temperature, config.teacher_temperature, config.temperature_warmup)
        return ((logits - self.centre) / temperature).softmax(-1)

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The teacher follows its student, ever slower; the centre follows the teacher's mean logits of this step."""
        optim.follow(self.teacher, self.student, optim.cosine(t, 1 - self.config.momentum, 0.0))
        self.centre.lerp_(distributed.mean(self.mean_logits), 1 - self.config.centre_momentum)
        self.mean_logits.zero_()

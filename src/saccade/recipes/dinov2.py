"""DINOv2: iBOT whose answers are evened out, and whose embeddings keep apart (KoLeo).  arXiv 2304.07193"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, heads, masking, optim, recipe
from saccade.data import Batch
from saccade.draws import Draws


class Config(recipe.SpreadDistillation):
    """The released short recipe: ViT-L/16, shared head, centring; `large` is that of the released giant."""

    arch: str = Field("vit-l/16", description="backbone: size and patch, e.g. vit-s/14")
    batch: int = Field(2048, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    steps: int | None = Field(125_000, ge=1, description="length in optimizer steps")
    lr: float = Field(4e-3, gt=0, description="learning rate at batch 1024; scaled with the batch's square root")
    warmup: float = Field(0.1, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    layer_decay: float = Field(0.9, gt=0, le=1, description="learning rate falls by this factor a layer, last to first")
    clip: float | None = Field(3.0, gt=0, description="largest gradient norm of the backbone and of each head")
    assignment: Literal["centre", "sinkhorn"] = Field("centre", description="how the teacher's answers are evened out")
    separate_heads: bool = Field(False, description="patches have a head of their own")
    momentum: float = Field(0.992, ge=0, le=1, description="what the teacher keeps a step at the start; 1 at the end")

    def peak(self) -> float:
        """The square-root rule."""
        return self.lr * math.sqrt(self.batch / 1024)

    def backbone(self) -> dict[str, Any]:
        """Layer scale, a mask token, and the positions' rule of the released models."""
        smooth = self.registers > 0
        table = {"position_offset": 0.0 if smooth else 0.1, "position_antialias": smooth}
        return {"layer_scale": self.layer_scale, "mask_token": True, "registers": self.registers, **table}


def small_machine() -> Config:
    """A few CPU cores: a tiny encoder, few small crops, narrow heads with batch norm, a sharp teacher."""
    size = {"arch": "vit-ti/8", "image_size": 48, "local_size": 24, "local_crops": 2, "batch": 64, "drop_path": 0.0}
    head = {"prototypes": 1024, "hidden": 512, "head_norm": True, "layer_decay": 1.0, "lr": 2e-3, "layer_scale": 0.1}
    return Config(**size, **head, first_temperature=0.02, teacher_temperature=0.02, colour=0.5, blur=0.0)


def large() -> Config:
    """What the released giant was trained with: heads apart, Sinkhorn-Knopp, 131,072 prototypes."""
    head = {"separate_heads": True, "assignment": "sinkhorn", "prototypes": 131072, "bottleneck": 384}
    times = {"steps": 625_000, "warmup": 0.16, "temperature_warmup": 0.06, "freeze": 0.002, "momentum": 0.994}
    rates = {"lr": 2e-4, "weight_decay_end": 0.2, "layer_decay": 1.0, "drop_path": 0.4, "batch": 3072}
    return Config(arch="vit-g/14", local_size=98, **head, **times, **rates)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Two large crops [2B C S S] with what is hidden of them [2B N], small ones, and words for stochastic depth.

    The rates of blur are those with which the released models were trained, not the paper's: 0, 0.9 and 0.5.
    """
    made = augment.multi_crop(config, batch, draws, blurred=(0.0, 0.9, 0.5))
    return made | {"hide": masking.block_masks(config, draws, made["globals"], spread=True, fill=False)}


class Method(recipe.Evened):
    """Student and teacher, each a backbone with one head or two."""

    def __init__(self, config: Config, backbone: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config = config
        widths = {"head": config.prototypes}
        if config.separate_heads:
            widths["patch_head"] = config.patch_prototypes or config.prototypes
        self.student, self.teacher = heads.student_and_teacher(config, backbone, widths, "learned")
        self.assign = heads.Assignments(config, config.assignment, widths)

    def groups(self, t: float) -> list[optim.Group]:
        """Backbone and heads are clipped apart, decay rises, and the prototypes stand still at first."""
        return optim.student_groups(self.student, t, self.config, clip="part", patch_embed=self.config.patch_embed_rate)

    def learn(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of every view's prototypes to the teacher's, of every hidden patch's in its view, and KoLeo."""
        config, hide = self.config, batch["hide"]
        sharp = optim.linear(t, config.first_temperature, config.teacher_temperature, config.temperature_warmup)
        targets = self.assign.answers(self.teacher, batch["globals"], hide, sharp)
        seen, logits = heads.student_answers(self.student, config, batch)
        return heads.spread_losses(config, seen, logits, self.student[self.assign.last], hide, targets)

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The teacher follows its student, ever slower; centres or queues take this step in."""
        optim.follow(self.teacher, self.student, optim.cosine(t, 1 - self.config.momentum, 0.0))
        self.assign.after_step()

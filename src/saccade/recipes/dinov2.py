"""DINOv2: iBOT whose answers are evened out, and whose embeddings keep apart (KoLeo).  arXiv 2304.07193"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, distributed, heads, losses, masking, optim, recipe, vit
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
    koleo_group: int = Field(16, ge=2, description="samples among which the nearest is sought; divides a micro-batch")
        0,
        ge=0,
        description="former large crops beside this step's in Sinkhorn-Knopp, of whole steps: for small batches",
    )
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
    strata = draws.strata("masked", config.batch, 2)
    return made | {"hide": masking.block_masks(config, draws, strata, made["globals"], fill=False)}


class Method(recipe.Method):
    """Student and teacher, each a backbone with one head or two."""

    def __init__(self, config: Config, backbone: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config = config
        widths = {"head": config.prototypes}
        if config.separate_heads:
            widths["patch_head"] = config.patch_prototypes or config.prototypes
        self.student, self.teacher = heads.student_and_teacher(config, backbone, widths, "learned")
        self.assign = heads.Assignments(config, config.assignment, widths)
        if config.koleo_weight:
            losses.check_groups(config.batch // config.accumulate // distributed.world(), config.koleo_group)

    def encoder(self) -> nn.Module:
        """The teacher's backbone: it is ahead of the student's."""
        return self.teacher["backbone"]

    def chance(self) -> float:
        """Where the student tells nothing apart: ln K."""
        return math.log(self.config.prototypes)

    def groups(self, t: float) -> list[optim.Group]:
        """Backbone and heads are clipped apart, decay rises, and the prototypes stand still at first."""
        return optim.student_groups(self.student, t, self.config, clip="part", patch_embed=self.config.patch_embed_rate)

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of every view's prototypes to the teacher's, of every hidden patch's in its view, and KoLeo."""
        config, backbone, whole, hide = self.config, self.student["backbone"], batch["globals"], batch["hide"]
        target, patch_target = self.target(whole, hide, t)
        rates, rows = [config.drop_path] * backbone.branches, batch["drop"]
        seen = backbone(whole, hide=hide, drop=vit.stochastic_depth(rows[: len(whole)], rates))
        pooled = [seen.cls]
        if config.local_crops:
            pooled.append(backbone.pooled(batch["locals"], drop=vit.stochastic_depth(rows[len(whole) :], rates)))
        samples, temperature = len(whole) // 2, config.student_temperature
        logits = self.student["head"](torch.cat(pooled)).unflatten(0, (-1, samples))
        loss = heads.cross_view(logits, target.unflatten(0, (-1, samples)), temperature)
        patch_logits = self.student[self.last](seen.patches[hide])
        patch_loss = losses.hidden_patches(patch_logits, patch_target, hide, temperature)
        # of both large crops, as released; the paper's text says of the first
        koleo = sum(losses.koleo(x, config.koleo_group) for x in seen.cls.chunk(2)) if config.koleo_weight else 0 * loss
        metrics = {"cls_loss": loss.detach(), "patch_loss": patch_loss.detach(), "koleo": koleo.detach()}
        total = loss + config.patch_weight * patch_loss + config.koleo_weight * koleo
        return total, metrics | heads.concentration(target)

    @torch.no_grad()
    def target(self, images: Tensor, hide: Tensor, t: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
        """What the teacher sees in whole pictures and where patches are hidden, evened out and sharpened."""
        config, teacher = self.config, self.teacher
        temperature = optim.linear(t, config.first_temperature, config.teacher_temperature, config.temperature_warmup)
        seen = teacher["backbone"](images)
        found = (("cls", "head", seen.cls), ("patch", self.last, seen.patches[hide]))
        return tuple(
            self.assign[kind](teacher[head], teacher[head].bottleneck(x), temperature) for kind, head, x in found
        )

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The teacher follows its student, ever slower; centres or queues take this step in."""
        optim.follow(self.teacher, self.student, optim.cosine(t, 1 - self.config.momentum, 0.0))
        for assignment in self.assign.values():
            assignment.after_step()

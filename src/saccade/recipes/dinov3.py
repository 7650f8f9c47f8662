"""DINOv3: DINOv2 at constant rates, whose patches stay what an early teacher saw (Gram anchoring).  arXiv 2508.10104"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, heads, losses, masking, optim, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws

MIXED = ((2, 1, 3, 0.3), (3, 1, 4.5, 0.3), (3, 1.5, 4.5, 0.3), (3, 2, 4.5, 0.05), (3, 3, 4.5, 0.05))


class Config(recipe.SpreadDistillation):
    """The paper's three stages in one run, with the heads and the ViT-L of its small recipe; `giant` is the 7B's."""

    arch: str = Field("vit-l/16", description="backbone: size and patch, e.g. vit-s/16")
    batch: int = Field(2048, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    steps: int | None = Field(125_000, ge=1, description="length in optimizer steps, all stages together")
    lr: float = Field(5e-5, gt=0, description="a quarter of the learning rate at batch 1024; scaled by its square root")
    warmup: float = Field(0.08, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay_end: float = Field(0.04, ge=0, description="AdamW's decay at the end: as at the start")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's second decay rate")
    layer_decay: float = Field(0.98, gt=0, le=1, description="learning rate falls by this factor a layer, down")
    registers: int = Field(4, ge=0, description="register tokens")
    stretch: float = Field(2.0, ge=1, description="RoPE's coordinates are scaled by up to this in each block, or down")
    local_norm: bool = Field(False, description="small crops have a last norm of their own (the released 7B)")
    momentum: float = Field(0.994, ge=0, le=1, description="what the teacher keeps a step")
    late_momentum: float = Field(0.999, ge=0, le=1, description="what it keeps from `gram` on")
    anchor: float = Field(0.15, gt=0, lt=1, description="part of training after which the teacher is kept: the anchor")
    gram: float = Field(0.82, gt=0, le=1, description="part of training from which patches are held to the anchor")
    refresh: float = Field(0.008, gt=0, lt=1, description="part of training after which it is the teacher again")
    high: float = Field(0.99, gt=0, le=1, description="part of training from which crops are large; 1: never")
    gram_weight: float = Field(2.0, ge=0, description="weight of the loss that holds them; 3/4 of it from `high` on")
    stage: Literal["first", "kept", "held", "renewed", "high"] = Field("first", description="set by the stages")

    def peak(self) -> float:
        """Four times the square-root rule, as released."""
        return 4 * self.lr * math.sqrt(self.batch / 1024)

    def rate(self, t: float) -> float:
        """Constant after the warm-up, then lower for good, and down along a cosine at high resolution."""
        if t >= self.high:
            return 0.09 * (1 + math.cos(math.pi * (t - self.high) / (1 - self.high)))
        return 0.6 if t >= self.gram else min(1.0, t / max(self.warmup, 1e-12))

    def backbone(self) -> dict[str, Any]:
        """As released: rotated positions, registers, keys without bias (the 7B: nor queries and values)."""
        bias = "none" if self.arch.lower().startswith("vit-7b/") else "k_masked"
        rope = {"position": "rope", "eps": 1e-5, "qkv_bias": bias, "mask_token": True}
        return {"layer_scale": self.layer_scale, "registers": self.registers, **rope}

    def canvas(self) -> int:
        """At high resolution crops are three times as large."""
        return super().canvas() * (3 if self.high < 1 else 1)


def small_machine() -> Config:
    """A few CPU cores: a tiny encoder, few small crops, narrow heads with batch norm, a sharp teacher."""
    size = {"arch": "vit-ti/8", "image_size": 48, "local_size": 24, "local_crops": 2, "batch": 64, "drop_path": 0.0}
    head = {"prototypes": 1024, "hidden": 512, "head_norm": True, "layer_decay": 1.0, "layer_scale": 0.1, "queue": 1024}
    short = {"lr": 5e-4, "first_temperature": 0.02, "teacher_temperature": 0.02, "colour": 0.5, "blur": 0.0}
    return Config(**size, **head, **short, high=1.0, refresh=0.05)


def giant() -> Config:
    """The released 7B."""
    heads_of = {"prototypes": 262144, "patch_prototypes": 98304, "hidden": 8192, "bottleneck": 512}
    heads_of |= {"patch_hidden": 4096, "patch_bottleneck": 384}  # as released; the paper's table says 8192
    rates = {"steps": 1_210_000, "batch": 4096, "drop_path": 0.4, "clip": 30.0, "flip": 0.0, "local_size": 112}
    return Config(arch="vit-7b/16", image_size=256, local_norm=True, **heads_of, **rates)


def stages(config: Config) -> list[tuple[float, Config]]:
    """Until the teacher is kept, until patches are held to it, until it is renewed (three times), until crops grow."""
    names = ("first", "kept", "held", *["renewed"] * 3, "high")
    times = (config.anchor, config.gram, *(config.gram + n * config.refresh for n in (1, 2, 3)), config.high, 1.0)
    later = {"momentum": config.late_momentum}
    changes = {"first": {}, "kept": {}, "high": later | {"gram_weight": 0.75 * config.gram_weight}}
    made = zip(times, ({"stage": name, **changes.get(name, later)} for name in names), strict=True)
    return [(until, config.model_copy(update=new)) for until, new in made][: 7 if config.high < 1 else 6]


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Large crops [2B C S S], what is hidden of them [2B N], small ones, the anchor's; at last in `MIXED` multiples."""
    side, small, plain = config.image_size, config.local_size, 2 * config.image_size
    if config.stage == "high":
        patch, u = vit.parse(config.arch)[1], float(draws.step("sizes").shared(1))
        many = next(row for n, row in enumerate(MIXED, 1) if u < sum(row[3] for row in MIXED[:n]) or n == len(MIXED))
        side, small, plain = (round(n * k / patch) * patch for n, k in zip((side, small, side), many[:3], strict=True))
    sized = config.model_copy(update={"image_size": side, "local_size": small})
    finer = plain if config.stage in ("held", "renewed", "high") else None
    made = augment.multi_crop(sized, batch, draws, blurred=(0.0, 0.9, 0.5), plain=finer, stretch=True)
    return made | {"hide": masking.block_masks(sized, draws, made["globals"], spread=True, fill=True)}


class Method(recipe.Evened):
    """Student and teacher, each a backbone with two heads, and the anchor: the backbone of an earlier teacher."""

    def __init__(self, config: Config, backbone: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config = config
        widths = {"head": config.prototypes, "patch_head": config.patch_prototypes or config.prototypes}
        more = {"local_norm": copy.deepcopy(backbone.norm)} if config.local_norm else {}
        self.student, self.teacher = heads.student_and_teacher(config, backbone, widths, "free", **more)
        self.anchor = copy.deepcopy(self.teacher["backbone"]) if config.stage != "first" else None
        self.assign = heads.Assignments(config, "sinkhorn", widths)

    def begin(self) -> None:
        """The anchor becomes what the teacher is now, but where it is to stay an earlier one."""
        if self.anchor is not None and self.config.stage != "held":
            optim.follow(self.anchor, self.teacher["backbone"], torch.ones(()))

    def groups(self, t: float) -> list[optim.Group]:
        """Backbone and heads are clipped apart, and the prototypes stand still at first."""
        return optim.student_groups(self.student, t, self.config, clip="part", patch_embed=self.config.patch_embed_rate)

    def learn(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """DINOv2's loss, and how far the likeness of a picture's patches to each other is from the anchor's."""
        config, hide = self.config, batch["hide"]
        sharp = optim.linear(t, config.first_temperature, config.teacher_temperature, config.temperature_warmup)
        targets = self.assign.answers(self.teacher, batch["globals"], hide, sharp)
        seen, logits = heads.student_answers(self.student, config, batch, stretch=config.stretch)
        risen = torch.clamp((t - config.gram) / (0.1 * config.refresh), 0.0, 1.0)
        half = optim.cosine(risen, 1.0, 0.5)  # small crops count half once there is an anchor
        loss, metrics = heads.spread_losses(config, seen, logits, self.student["patch_head"], hide, targets, half)
        if "plain" not in batch:
            return loss, metrics
        gram = losses.gram(seen.patches, self.anchored(batch["plain"], seen.grid))
        return loss + optim.cosine(risen, 0.0, config.gram_weight) * gram, metrics | {"gram": gram.detach()}

    @torch.no_grad()
    def anchored(self, images: Tensor, grid: tuple[int, ...]) -> Float[Tensor, "b n d"]:
        """The anchor's patches of crops in their own colours and finer, on the student's grid."""
        seen = self.anchor(images, tokens="patches")
        plane = seen.patches.mT.unflatten(2, seen.grid)
        return F.interpolate(plane, size=grid, mode="bicubic", align_corners=False).flatten(2).mT

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The teacher follows its student at a constant pace; the queue takes this step in."""
        optim.follow(self.teacher, self.student, torch.full_like(t, 1 - self.config.momentum))
        self.assign.after_step()

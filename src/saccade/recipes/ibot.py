"""iBOT: DINO, and for every hidden patch the prototypes that the teacher sees there.  arXiv 2111.07832"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, depth, distributed, heads, losses, masking, optim, recipe
from saccade.data import Batch
from saccade.draws import Draws


class Config(recipe.MaskedDistillation):
    """The paper's ViT-S/16, with the released masks: half of the large crops whole, 10 to 50 % hidden in the others."""

    arch: str = Field("vit-s/16", description="backbone: size and patch, e.g. vit-s/16")
    batch: int = Field(1024, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    epochs: float | None = Field(800, gt=0, description="length in passes over the data")
    lr: float = Field(5e-4, gt=0, description="learning rate at batch 256; scaled linearly with the batch")
    warmup: float = Field(0.0125, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    global_scale: tuple[float, float] = Field((0.25, 1.0), description="area of a large crop, as parts of the picture")
    local_scale: tuple[float, float] = Field((0.05, 0.25), description="area of a small crop")
    local_crops: int = Field(10, ge=0, description="small crops, which only the student sees")
    temperature_warmup: float = Field(0.0375, gt=0, le=1, description="part of training between these two")
    most_prototypes: ClassVar[int] = 8192
    freeze: float = Field(0.00125, ge=0, le=1, description="part of training in which the prototypes stand still")

    def backbone(self) -> dict[str, float | bool]:
        """A mask token; positions are resized for small crops as the released ones were."""
        return {"mask_token": True, "position_offset": 0.1}


def small_pictures() -> Config:
    """Pictures of 32 to 64 pixels: patches of 4, no blur, fewer prototypes."""
    return Config(arch="vit-ti/4", image_size=32, local_size=16, batch=256, blur=0.0, prototypes=4096, head_norm=True)


def small_machine() -> Config:
    """A few CPU cores: a tiny encoder, few small crops, a narrow head with batch norm, a sharp teacher."""
    size = {"arch": "vit-ti/8", "image_size": 48, "local_size": 24, "local_crops": 2, "batch": 64, "drop_path": 0.0}
    head = {"prototypes": 1024, "hidden": 512, "head_norm": True}
    return Config(**size, **head, lr=2e-3, first_temperature=0.02, teacher_temperature=0.02, colour=0.5, blur=0.0)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Two large crops [2B C S S] with what is hidden of them [2B N], small ones, and words for stochastic depth."""
    made = augment.multi_crop(config, batch, draws, blurred=(1.0, 0.1, 0.5))
    hide = masking.block_masks(config, draws, made["globals"], spread=False, fill=False, smallest="ninth")
    return made | {"hide": hide}


class Method(recipe.Taught):
    """Student and teacher, each a backbone with a head."""

    def __init__(self, config: Config, backbone: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, count = config, config.prototypes
        head = heads.DINOHead(backbone.config.width, count, hidden=config.hidden, norm=config.head_norm)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centres", torch.zeros(2, count))  # of class tokens, of patches
        self.register_buffer("mean_logits", torch.zeros(2, count), persistent=False)

    def groups(self, t: float) -> list[optim.Group]:
        """Each tensor is clipped by itself, decay rises, and the prototypes stand still at first."""
        return optim.student_groups(self.student, t, self.config, clip="tensor")

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of every view's prototypes to the teacher's, and of every hidden patch's in the same view."""
        config, backbone, head = self.config, self.student["backbone"], self.student["head"]
        whole, hide, few = batch["globals"], batch["hide"], config.local_crops
        target, patch_target = self.target(whole, hide, t)
        drop = [depth.stochastic_depth(rows, backbone.drop_rates(config.drop_path)) for rows in batch["drop"].split(
            [len(whole), len(batch["drop"]) - len(whole)])]  # fmt: skip
        seen = backbone(whole, hide=hide, drop=drop[0])
        pooled = [seen.cls] + ([backbone.pooled(batch["locals"], drop=drop[1])] if few else [])
        logits, patch_logits = head(torch.cat(pooled)), head(seen.patches[hide])
        samples, temperature = len(whole) // 2, config.student_temperature
        views_of = [rows.unflatten(0, (-1, samples)) for rows in (logits, target)]
        loss = heads.cross_view(*views_of, temperature)
        patch_loss = losses.hidden_patches(patch_logits, patch_target, hide, temperature)
        concentration = heads.concentration(target, patch_target)
        metrics = {"cls_loss": loss.detach(), "patch_loss": patch_loss.detach(), **concentration}
        return loss + config.patch_weight * patch_loss, metrics

    @torch.no_grad()
    def target(self, images: Tensor, hide: Tensor, t: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
        """What the teacher sees in whole pictures and where patches are hidden, centred and sharpened."""
        config, head, dtype = self.config, self.teacher["head"], self.centres.dtype
        seen = self.teacher["backbone"](images)
        patches = head.bottleneck(seen.patches.flatten(0, 1))
        logits, hidden = head(seen.cls).to(dtype), head.score(patches[hide.flatten()]).to(dtype)
        means = torch.cat([logits.mean(0, keepdim=True), head.score(patches.mean(0, keepdim=True)).to(dtype)])
        self.mean_logits += means / config.accumulate
        temperature = optim.linear(t, config.first_temperature, config.teacher_temperature, config.temperature_warmup)
        return tuple(((x - c) / temperature).softmax(-1) for x, c in zip((logits, hidden), self.centres, strict=True))

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The teacher follows its student, ever slower; the centres follow the teacher's mean logits of this step."""
        optim.follow(self.teacher, self.student, optim.cosine(t, 1 - self.config.momentum, 0.0))
        self.centres.lerp_(distributed.mean(self.mean_logits), 1 - self.config.centre_momentum)
        self.mean_logits.zero_()

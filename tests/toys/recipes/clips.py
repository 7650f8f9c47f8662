"""Toy: from a few tubes of a clip, say what a slowly moving teacher sees in all of it; a regulariser joins halfway."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws
from saccade.optim import linear


class Config(recipe.Training):
    image_size: int = Field(16, ge=1, description="side in pixels")
    arch: str = Field("vit-ti/8", description="backbone")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the teacher at the start; 1 at the end")
    spread: float = Field(0.0, ge=0, description="weight of the term that keeps features apart")

    def backbone(self) -> dict[str, object]:
        return {"depth": 2, "width": 48, "heads": 3, "hidden": 96, "patch_time": 2, "frames": 4}


def stages(config: Config) -> list[tuple[float, Config]]:
    return [(0.5, config), (1.0, config.model_copy(update={"spread": config.spread + 0.1}))]


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    crops = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(0.5, 1.0))
    clips = augment.render(batch["pixels"], crops, config.image_size)
    count = 2 * (config.image_size // vit.parse(config.arch)[1]) ** 2
    return {"clips": clips, "keep": draws.sample("keep").order(count)[:, : count // 2].to(clips.device)}


class Method(recipe.Method):
    def __init__(self, config: Config, backbone: vit.ViT, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone = config, backbone
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.predictor = nn.Linear(backbone.config.width, backbone.config.width)

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        said = self.predictor(self.backbone(batch["clips"], keep=batch["keep"]).cls)
        with torch.no_grad():
            target = self.teacher(batch["clips"], tokens="cls").cls
        apart = F.relu(1 - said.std(1)).mean()
        return F.smooth_l1_loss(said, target) + self.config.spread * apart, {"apart": apart.detach()}

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        momentum = linear(t, self.config.momentum, 1.0)
        for mine, theirs in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)

    def encoder(self) -> vit.ViT:
        return self.teacher

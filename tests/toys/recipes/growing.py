"""Toy: pictures grow in the middle of training; a student guesses the features of its own slow average."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, optim, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws


class Config(recipe.Training):
    image_size: int = Field(16, ge=1, description="side in pixels of the first half")
    arch: str = Field("vit-ti/8", description="backbone")
    batch: int = Field(12, ge=1, description="samples a step")
    steps: int | None = Field(12, ge=1, description="length")
    lr: float = Field(0.02, gt=0, description="learning rate")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")

    def backbone(self) -> dict[str, object]:
        return {"depth": 2, "width": 48, "heads": 3, "hidden": 96, "mask_token": True, "position": "rope"}


def stages(config: Config) -> list[tuple[float, Config]]:
    return [(0.5, config), (1.0, config.model_copy(update={"image_size": config.image_size + 8}))]


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    crops = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(0.3, 1.0))
    crops = augment.flip(crops, draws.sample("flip"))
    images = augment.render(batch["pixels"], crops, config.image_size)
    count = (config.image_size // vit.parse(config.arch)[1]) ** 2
    return {"images": images, "hide": draws.step("hide").order(count).to(images.device) < count // 2}


class Method(recipe.Method):
    def __init__(self, config: Config, backbone: vit.ViT, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.backbone = backbone
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.head = nn.Linear(backbone.config.width, backbone.config.width)
        self.pixels = nn.Linear(backbone.config.width, 3)
        self.places = nn.Parameter(torch.zeros((config.image_size // backbone.config.patch) ** 2, 3))  # a stage's own

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        with torch.no_grad():
            target = self.teacher(batch["images"]).patches
        patches = self.backbone(batch["images"], hide=batch["hide"]).patches
        mean = F.avg_pool2d(batch["images"], self.backbone.config.patch).flatten(2).transpose(1, 2)
        guess = F.mse_loss(self.head(patches), target)
        return guess + F.mse_loss(self.pixels(patches) + self.places, mean), {"guess": guess}

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        momentum = optim.cosine(t, 0.1, 0.0)
        for slow, fast in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            slow.lerp_(fast, momentum)

    def encoder(self) -> vit.ViT:
        return self.backbone

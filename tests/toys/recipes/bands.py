"""Toy: hide half of the patches of 13-band pictures and guess their mean value in each band, as SimMIM does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws


class Config(recipe.Training):
    channels: int = Field(13, ge=1, description="bands")
    image_size: int = Field(16, ge=1, description="side in pixels")
    arch: str = Field("vit-ti/4", description="backbone")
    hidden: float = Field(0.5, gt=0, lt=1, description="part of the patches that is hidden")

    def backbone(self) -> dict[str, object]:
        return {
            "depth": 2,
            "width": 48,
            "heads": 3,
            "hidden": 96,
            "mask_token": True,
            "position": "rope",
            "registers": 2,
        }


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    crops = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(0.3, 1.0))
    crops = augment.flip(crops, draws.sample("flip"))
    images = augment.render(batch["pixels"], crops, config.image_size)
    count = (config.image_size // vit.parse(config.arch)[1]) ** 2
    return {"images": images, "hide": draws.step("mask").uniform(count).to(images.device) < config.hidden}


class Method(recipe.Method):
    def __init__(self, config: Config, backbone: vit.ViT, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.backbone = backbone
        self.guess = nn.Linear(3 * backbone.config.width, config.channels)

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        features = self.backbone(batch["images"], hide=batch["hide"])
        whole = torch.cat([features.cls, features.registers.mean(1)], 1)
        guess = self.guess(torch.cat([features.patches, whole[:, None].expand(-1, features.patches.shape[1], -1)], 2))
        target = F.avg_pool2d(batch["images"], self.backbone.config.patch).flatten(2).transpose(1, 2)
        error = (guess - target).square().mean(2)
        return (error * batch["hide"]).sum() / batch["hide"].numel(), {"hidden": batch["hide"].float().mean()}

    def encoder(self) -> vit.ViT:
        return self.backbone

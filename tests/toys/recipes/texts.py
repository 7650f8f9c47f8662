"""Toy: hide some bytes of a text and guess them from the rest. No picture is anywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from saccade import recipe, vit
from saccade.data import Batch
from saccade.draws import Draws
from saccade.optim import Group

HIDDEN, END = 256, 257


class Config(recipe.Training):
    arch: str = Field("vit-ti/16", description="its width, heads and blocks make the text tower")
    length: int = Field(24, ge=1, description="bytes of a text that are read")
    hidden: float = Field(0.3, gt=0, lt=1, description="part of the bytes that is hidden")
    head_lr: float = Field(2.0, gt=0, description="learning rate of the head, as a factor")

    def backbone(self) -> dict[str, object]:
        return {"depth": 2, "width": 48, "heads": 3, "hidden": 96}


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    text = F.pad(batch["text"].long(), (0, config.length), value=END)[:, : config.length]
    place = torch.arange(config.length, device=text.device)
    text = text.where(place < batch["text_length"][:, None], END)
    hide = draws.sample("hide").uniform(config.length).to(text.device) < config.hidden
    return {"text": text, "hide": hide}


class TextEncoder(nn.Module):
    """Texts, as UTF-8 bytes, to `Features`: the class token is the mean, the patches are the bytes."""

    def __init__(self, width: int, heads: int, depth: int, length: int):
        super().__init__()
        self.embed = nn.Embedding(258, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(vit.Block(width, heads, 2 * width) for _ in range(depth))

    def forward(self, text: UInt8[Tensor, "b l"] | Tensor) -> vit.Features:
        x = self.embed(text.long()) + self.place[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        place = torch.arange(x.shape[1])
        positions = torch.stack([torch.zeros_like(place), place], 1).expand(len(x), -1, -1)
        return vit.Features(x.mean(1), x[:, :0], x, positions, (1, x.shape[1]))

    def embedding(self, features: vit.Features) -> Float[Tensor, "b d"]:
        assert features.cls is not None
        return features.cls


class Method(recipe.Method):
    def __init__(self, config: Config, backbone: vit.ViT, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, shape = config, backbone.config
        self.tower = TextEncoder(shape.width, shape.heads, shape.depth, config.length)
        self.head = nn.Linear(shape.width, 258)

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        guess = self.head(self.tower(batch["text"].where(~batch["hide"], HIDDEN)).patches)
        losses = F.cross_entropy(guess.transpose(1, 2), batch["text"], reduction="none")
        return (losses * batch["hide"]).sum() / batch["hide"].numel(), {}

    def encoder(self) -> TextEncoder:
        return self.tower

    def groups(self, t: float) -> list[Group]:
        body = {f"tower.{name}": parameter for name, parameter in self.tower.named_parameters()}
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return [Group(body), Group(head, lr_scale=self.config.head_lr)]

"""DINO: a student tells from any crop which prototypes its own slow average sees in the whole.  arXiv 2104.14294"""

from __future__ import annotations

import copy
import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, distributed, heads, optim, recipe, vit
from saccade.data import Batch
from saccade.draws import Draws


class Config(recipe.Training):
    """The paper's ViT-S/16 in 100 epochs."""

    arch: str = Field("vit-s/16", description="backbone: size and patch or stride, e.g. vit-s/16, resnet-50/32")
    batch: int = Field(1024, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    epochs: float | None = Field(100, gt=0, description="length in passes over the data")
    lr: float = Field(5e-4, gt=0, description="learning rate at batch 256; scaled linearly with the batch")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end; not scaled")
    warmup: float = Field(0.1, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(0.04, ge=0, description="AdamW's decay at the start, on matrices only")
    weight_decay_end: float = Field(0.4, ge=0, description="AdamW's decay at the end")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    clip: float | None = Field(3.0, gt=0, description="largest gradient norm of each tensor by itself")
    drop_path: float = Field(0.1, ge=0, lt=1, description="how often the student's last block is left out")
    global_scale: tuple[float, float] = Field((0.4, 1.0), description="area of a large crop, as parts of the picture")
    local_scale: tuple[float, float] = Field((0.05, 0.4), description="area of a small crop")
    local_crops: int = Field(8, ge=0, description="small crops, which only the student sees")
    local_size: int = Field(96, ge=1, description="side of a small crop in pixels")
    flip: float = Field(0.5, ge=0, le=1, description="how often a view is mirrored; 0 where that is another thing")
    colour: float = Field(1.0, ge=0, description="strength of the colour jitter")
    grey: float = Field(0.2, ge=0, le=1, description="how often a view loses its colour")
    blur: float = Field(1.0, ge=0, le=1, description="how often views are blurred, as a part of the paper's rates")
    solarise: float = Field(0.2, ge=0, le=1, description="how often the second large crop is solarised")
    prototypes: int = Field(65536, ge=2, description="width of the head's output")
    hidden: int = Field(2048, ge=1, description="width inside the head")
    head_norm: bool = Field(False, description="batch norm inside the head: for short runs")
    student_temperature: float = Field(0.1, gt=0, description="of the student's softmax")
    teacher_temperature: float = Field(0.07, gt=0, description="of the teacher's softmax; lower is sharper")
    first_temperature: float = Field(0.04, gt=0, description="of the teacher's softmax at the start")
    temperature_warmup: float = Field(0.3, gt=0, le=1, description="part of training between these two")
    momentum: float = Field(0.996, ge=0, le=1, description="what the teacher keeps a step at the start; 1 at the end")
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="what the centre of the teacher's logits keeps a step")
    freeze: float = Field(0.01, ge=0, le=1, description="part of training in which the prototypes stand still")

    def canvas(self) -> int:
        """The smallest crop of a square picture still has a pixel for each of its own."""
        small = self.local_size / math.sqrt(self.local_scale[0]) if self.local_crops else 0
        return math.ceil(max(self.image_size / math.sqrt(self.global_scale[0]), small))

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
    size, few = batch["size"], config.local_crops
    large = augment.random_resized_crop(draws.sample("globals"), size, scale=config.global_scale, count=2)
    small = augment.random_resized_crop(draws.sample("locals"), size, scale=config.local_scale, count=max(1, few))
    seen = augment.flip(augment.concatenate([large, small]), draws.sample("flip"), config.flip)
    largest = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    change = {name: config.colour * value for name, value in largest.items()}
    seen = augment.jitter(seen, draws.sample("jitter"), **change, probability=0.8)
    seen = augment.grey(seen, draws.sample("grey"), config.grey)
    first, second, small = seen[: len(size)], seen[len(size) : 2 * len(size)], seen[2 * len(size) :]
    first = augment.blur(first, draws.sample("blur 1"), probability=config.blur)
    second = augment.blur(second, draws.sample("blur 2"), probability=0.1 * config.blur)
    second = augment.solarise(second, draws.sample("solarise"), probability=config.solarise)
    small = augment.blur(small, draws.sample("blur"), probability=0.5 * config.blur)
    made = {"globals": augment.render(batch["pixels"], augment.concatenate([first, second]), config.image_size)}
    if few:
        made["locals"] = augment.render(batch["pixels"], small, config.local_size)
    return made | {"drop": draws.step("drop").bits(2 + few).T.flatten().to(batch["pixels"].device)}


class Method(recipe.Method):
    """Student and teacher, each a backbone with a head."""

    def __init__(self, config: Config, backbone: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.config, count = config, config.prototypes
        head = heads.DINOHead(backbone.config.width, count, hidden=config.hidden, norm=config.head_norm)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(count))
        self.register_buffer("mean_logits", torch.zeros(count), persistent=False)

    def encoder(self) -> nn.Module:
        """The teacher's backbone: it is ahead of the student's."""
        return self.teacher["backbone"]

    def chance(self) -> float:
        """Where the student tells nothing apart: ln K."""
        return math.log(self.config.prototypes)

    def groups(self, t: float) -> list[optim.Group]:
        """Each tensor is clipped by itself, decay rises, and the prototypes stand still at first."""
        now = torch.tensor(t, dtype=torch.float64)
        decay = float(optim.cosine(now, self.config.weight_decay, self.config.weight_decay_end))
        last = {name: p for name, p in self.named_parameters() if name.startswith("student.head.last_layer.")}
        groups = [optim.Group(last, 1.0, decay, clip_group=None, frozen=t < self.config.freeze)]
        for group in optim.default_groups(self, self.student["backbone"], 1.0, self.config.layer_decay):
            others = {name: p for name, p in group.parameters.items() if name not in last}
            groups.append(optim.Group(others, group.lr_scale, decay * group.weight_decay, clip_group=None))
        return groups

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of every view's prototypes to the teacher's, of each large crop but its own."""
        crops = [batch[name] for name in ("globals", "locals") if name in batch]
        backbone, samples, target = self.student["backbone"], len(crops[0]) // 2, self.target(crops[0], t)
        rates, rows = backbone.drop_rates(self.config.drop_path), batch["drop"].split([len(crop) for crop in crops])
        pooled = [backbone.pooled(x, drop=vit.stochastic_depth(r, rates)) for x, r in zip(crops, rows, strict=True)]
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

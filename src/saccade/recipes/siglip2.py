"""SigLIP 2: SigLIP that also says the texts, and at last learns from its own average.  arXiv 2502.14786

Its last part has DINO's heads and momentum, which the paper does not name. There are no boxes here: captions alone.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saccade import augment, heads, masking, naflex, pair_losses, recipe, vit
from saccade.caption import Captioner
from saccade.data import Batch
from saccade.draws import Draws
from saccade.words import Words

FACTORS = {"l": 0.5, "so400m": 1.0, "g": 0.5}
"""Of both losses of self-distillation, by size; 0.25 for ViT-B, and here for smaller ones."""


class Config(recipe.SigmoidPaired, recipe.Prototyped):
    """The paper's ViT-B/16 (its section 2)."""

    image_size: int = Field(256, ge=1, description="side of the pictures and large crops in pixels, before the tail")
    caption_weight: float = Field(1.0, ge=0, description="weight of the captions' loss beside the pairs'")
    at_once: float = Field(0.5, ge=0, le=1, description="how often all words of a text are predicted in parallel")
    distil: float = Field(0.8, gt=0, lt=1, description="part of training from which it also learns from its average")
    local_weight: float = Field(1.0, ge=0, description="weight of the small crops' loss, before the size's factor")
    patch_weight: float = Field(0.25, ge=0, description="weight of the hidden patches' loss, before the size's factor")
    factor: float | None = Field(None, ge=0, description="the size's factor of these two; the paper's if not given")
    masked: float = Field(0.5, gt=0, le=1, description="part of the large crop's patches that is hidden")
    local_crops: int = Field(8, ge=1, description="small crops, which only the student sees")
    crop_flip: float = Field(0.5, ge=0, le=1, description="how often a crop is mirrored, of which no text is read")
    momentum: float = Field(0.996, ge=0, le=1, description="what the teacher keeps a step, to the end")
    teacher_temperature: float = Field(0.04, gt=0, description="of the teacher's softmax; lower is sharper")
    tail: Literal["none", "fixed", "naflex"] = Field("fixed", description="the end: larger squares, or each own aspect")
    fixed: float = Field(0.95, gt=0, lt=1, description="part of training from which squares are larger")
    tail_size: int = Field(384, ge=1, description="their side in pixels")
    naflex: float = Field(0.9, gt=0, lt=1, description="part of training from which pictures keep their aspect")
    lengths: tuple[int, ...] = Field((128, 256, 576, 784, 1024), description="patches a picture then, at most; by step")
    stage: Literal["pairs", "distil", "fixed", "naflex"] = Field("pairs", description="set by the stages")

    def backbone(self) -> dict[str, Any]:
        """Attention pools, without a class token; pictures come to [-1, 1]; positions are resized as in NaFlex."""
        half, place = (0.5,) * self.channels, {"position_linear": True, "position_antialias": True}
        look = {"mean": half, "std": half, "mask_token": self.stage in ("distil", "fixed"), **place}
        return {"cls": False, "pooling": "map", "activation": "gelu_tanh", **look}

    def sides(self) -> dict[str, int]:
        """Also the tail's."""
        return super().sides() | ({"tail_size": self.tail_size} if self.tail == "fixed" else {})

    def canvas(self) -> int:
        """The largest that pictures, crops or the longest tail ask for."""
        side = vit.parse(self.arch)[1] if self.stage == "naflex" else 0
        longest = math.ceil(side * math.sqrt(max(self.lengths) / self.min_scale))
        return max(recipe.Captioned.canvas(self), recipe.MultiCrop.canvas(self), longest)


def small_machine() -> Config:
    """A few CPU cores: pictures of 64 pixels, small towers, short texts, few crops, a bias for batches that fit."""
    text: dict[str, Any] = {"vocabulary": 4096, "length": 32, "text_width": 192, "text_depth": 3, "text_heads": 3}
    size: dict[str, Any] = {"arch": "vit-xs/8", "image_size": 64, "batch": 128, "min_scale": 0.5, "tail_size": 96}
    crops: Any = {"local_size": 32, "local_crops": 2, "hidden": 512, "head_norm": True, "blur": 0.0, "colour": 0.5}
    rates: Any = {"steps": None, "epochs": 100, "lr": 5e-4, "warmup": 0.1, "weight_decay": 0.1, "bias": -math.log(128)}
    return Config(**size, **text, **crops, **rates, flip=0.5, lengths=(32, 64, 100, 144), teacher_temperature=0.02)


def stages(config: Config) -> list[tuple[float, Config]]:
    """Pairs and captions; with them the own average; squares that are larger, or each picture's own aspect."""
    tails = {"fixed": (config.fixed, {"image_size": config.tail_size}), "naflex": (config.naflex, {})}
    began, new = tails.get(config.tail, (1.0, {}))
    made = [(config.distil, {"stage": "pairs"}), (began, {"stage": "distil"}), (1.0, {"stage": config.tail, **new})]
    return [(until, config.model_copy(update=new)) for until, new in made[: 2 if config.tail == "none" else 3]]


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Each picture whole, its text's tokens, whether they are said at once; crops of it, and what is hidden of one."""
    rows, made = augment.captioned(config, batch, draws)
    made["at_once"] = draws.sample("at once").chance(1, config.at_once)[:, 0].to(batch["pixels"].device)
    if config.stage == "naflex":
        length = config.lengths[int(draws.step("length").shared(1) * len(config.lengths))]
        made["patches"], made["grid"] = naflex.render(batch["pixels"], rows, vit.parse(config.arch)[1], length)
        return made
    made["images"] = augment.render(batch["pixels"], rows, config.image_size, interpolation="bilinear")
    if config.stage == "pairs":
        return made
    free = config.model_copy(update={"flip": config.crop_flip})
    crops = augment.multi_crop(free, batch, draws, blurred=(1.0, 0.1, 0.5), large=1)
    hide = masking.scattered(config, draws, crops["globals"], config.masked)
    return made | {"globals": crops["globals"], "locals": crops["locals"], "hide": hide}


class Method(recipe.TwoTowers):
    """Two towers, a decoder of texts, and in the end a teacher; the pairs' loss is of the whole batch."""

    def __init__(self, config: Config, backbone: Any, teachers: dict[str, Any]):
        super().__init__(config, backbone, teachers)
        self.config, self.backbone, width = config, backbone, backbone.config.width
        self.pairing = Words(config, width, scale=math.log(config.scale), bias=config.bias)
        self.captioner = Captioner(config, width)
        self.prototypes, self.average = config.prototypes or config.most_prototypes, None
        if config.stage in ("distil", "fixed"):
            self.average = heads.LocalToGlobal(config, backbone, self.prototypes)

    def begin(self) -> None:
        """The teacher is at first what the student has become."""
        if self.config.stage == "distil":
            self.average.follow(self.backbone, torch.ones(()))

    def chance(self) -> dict[str, float]:
        """The pairs' loss when every text fits every picture alike; ln of how many words, and prototypes, there are."""
        pairs, kinds = pair_losses.sigmoid_by_chance(self.config.batch), math.log(self.prototypes)
        words = math.log(self.config.vocabulary)
        return {"cls_loss": pairs, "caption_loss": words, "teacher_entropy": kinds, "patch_entropy": kinds}

    def embed(self, batch: Batch, t: Float[Tensor, ""]) -> Float[Tensor, "b 2 d"]:
        """Pictures and texts in the shared space."""
        return self.pairing(naflex.look(self.backbone, batch)[1], batch["tokens"])

    def see(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """These; and of each sample alone what its text is, what its crops show, and what is hidden of one."""
        config, (patches, pooled, seen) = self.config, naflex.look(self.backbone, batch)
        caption = self.captioner.loss(batch["tokens"], patches, batch["at_once"], seen)
        loss, said = config.caption_weight * caption, {"caption_loss": caption.detach()}
        if self.average is not None:
            local, patch, more = self.average(self.backbone, batch)
            factor = FACTORS.get(vit.parse(config.arch)[0], 0.25) if config.factor is None else config.factor
            loss = loss + factor * (config.local_weight * local + config.patch_weight * patch)
            said |= {"local_loss": local.detach(), "patch_loss": patch.detach(), **more}
        return self.pairing(pooled, batch["tokens"]), loss, said

    def couple(
        self, embeddings: Float[Tensor, "b 2 d"], t: Float[Tensor, ""], **beside: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The pairs' loss, the factor and offset of logits, and how many pairs were left out: they are no negatives."""
        scale, bias = self.pairing.scale.exp(), self.pairing.bias
        loss, left_out = pair_losses.sigmoid(embeddings, scale, bias, beside["same"])
        learned = {"scale": scale.detach().sum(), "bias": bias.detach().sum()}
        return loss, {"cls_loss": loss.detach(), "left_out": left_out, **learned}

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The teacher follows its student, always at the same pace."""
        if self.average is not None:
            self.average.after_step(self.backbone)

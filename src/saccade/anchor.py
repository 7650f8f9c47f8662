"""Any recipe, its backbone held to what it was: still while fresh heads get warm, then slow and never far."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saccade import augment, distributed, initial, lora, losses, optim
from saccade.data import Batch
from saccade.draws import Draws
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.norm import BatchNorm
from saccade.optim import Group
from saccade.recipe import Coupled, Method, Recipe, Training
from saccade.settings import AdaptArguments
from saccade.text import Pairing
from saccade.vit import ViTConfig

RISE = 0.1
"""Part of the steps after the heads are warm in which the backbone's learning rate rises from 0."""
AREA = (0.5, 1.0)
"""Of the crops, in their own colours, on which the backbone is held to the start."""
WINDOW, LEAST, SETTLED = 0.04, 8, 0.01
"""Part of the run, and steps at least, over which the heads' loss is averaged; settled is what falls by less than this
part of it."""
BRAKE = 0.5
"""What is left of the backbone's learning rate after a roll-back."""


@dataclass(frozen=True)
class Told:
    """Words that a start with a text tower has learned: their vectors, of length 1, and how pictures come to them."""

    words: Float[Tensor, "c d"]
    pairing: Pairing


_SHAPE = ("width", "depth", "hidden", "kind", "blocks", "widths")
"""What the name of an architecture says otherwise; published ones may differ from those that go by the name here."""


def architecture(encoder: Encoder) -> str | None:
    """The name of the architecture that a network like the encoder's is built by: vit-s/14 of vit-s/14-registers."""
    name = encoder.record.get("arch")
    return None if name is None else re.sub(r"(/\d+)-.*", r"\1", re.sub(r"-w\d+/", "/", name))


def anchored(page: Recipe, asked: AdaptArguments, encoder: Encoder, told: Told | None = None) -> Recipe:
    """The recipe with a backbone like the encoder's, and held to it. The recipe does not know."""
    settings = encoder.backbone.config
    shape = {name: getattr(settings, name) for name in _SHAPE if name in type(settings).model_fields}
    switches = initial.switches(encoder) | shape
    if isinstance(encoder.backbone.config, ViTConfig):
        switches |= {"pooling": encoder.backbone.config.pooling}

    def views(config: Any, batch: Batch, draws: Draws) -> Batch:
        made = page.views(config, batch, draws)
        if not (asked.anchor_patches or asked.anchor_token or (told and asked.anchor_text)):
            return made
        crops = augment.random_resized_crop(draws.sample("anchor"), batch["size"], scale=AREA)
        return made | {"anchored": augment.render(batch["pixels"], crops, config.image_size)}

    method = functools.partial(Anchored, page=page, asked=asked, told=told)
    return replace(page, views=views, method=method, switches=switches)


class Anchored(Method):
    """Any method, its backbone standing still until the heads are warm, then slow and held to what it was at first.

    Batch norms of the backbone keep the statistics of the start: ten batches would replace them. `course` says, where
    checkpoints keep it, at which `t` the heads were warm (2: not yet), how the backbone is braked, and of their loss
    where the window began, its sum, its count and the mean of the window before.
    """

    course: Tensor
    _words: Tensor | None
    _way: Tensor | None

    def __init__(
        self, config: Training, network: Any, teachers: dict[str, nn.Module], *, page: Recipe, asked: AdaptArguments,
        told: Told | None = None,
    ):  # fmt: skip
        super().__init__(config, network, teachers)
        self.config, self.asked = config, asked
        self.anchor = copy.deepcopy(network).requires_grad_(False)
        if asked.lora:
            lora.add(network, asked.lora, config.seed)
        self.inner = page.method(config, network, teachers)
        self._trained = (network,)  # it is a part of the method inside, and in its state
        if isinstance(self.inner, Coupled) and config.accumulate > 1:
            raise SaccadeError(
                f"{page.name} compares a whole batch, which adapt cannot accumulate", path="--accumulate", hint="use 1"
            )
        layers, last = optim.layers_of(name for name, _ in network.named_parameters())
        if asked.freeze_blocks > last - 2:
            raise SaccadeError(
                f"--freeze-blocks {asked.freeze_blocks} leaves nothing of {last - 1} blocks",
                path="--freeze-blocks",
                hint=f"use {last - 2} at most",
            )
        if asked.freeze_blocks:
            for name, parameter in network.named_parameters():
                if layers[name] <= asked.freeze_blocks:
                    parameter.requires_grad_(False)
        self._moving = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.register_buffer("course", torch.tensor([2.0 if asked.warm else 0.0, 1.0, config.warmup, 0.0, 0.0, 1e30]))
        self._now, self._loss = 0.0, list[Tensor]()
        self._hear(told if asked.anchor_text else None)
        self.recall()
        self.train()

    def _hear(self, told: Told | None) -> None:
        """Keeps what words are, which never moves and is in no checkpoint."""
        way = None if told is None else told.pairing.projection
        self._factor = 0.0 if told is None else told.pairing.logit_scale.exp().item()
        self.register_buffer("_words", None if told is None else told.words, persistent=False)
        self.register_buffer("_way", None if way is None else way.weight.detach().clone(), persistent=False)

    def recall(self) -> None:
        """Takes what decides between steps from `course`, so that no step waits for the device."""
        self._warm, self._brake, self._began = self.course[:3].tolist()

    @property
    def still(self) -> bool:
        """Whether the backbone stands still."""
        return self._warm > 1

    @property
    def moving(self) -> tuple[int, int]:
        """How many numbers of the backbone learn, and how many it has."""
        learned = sum(parameter.numel() for parameter in self._moving)
        return learned, sum(parameter.numel() for parameter in self.anchor.parameters())

    @property
    def warmed_at(self) -> float:
        """At which `t` the heads were warm."""
        return self._warm

    def move(self) -> None:
        """The backbone moves from now on, warm or not."""
        self.course[0] = 0.0
        self.recall()

    def slow_down(self) -> None:
        """After a roll-back: the same way again would lead to the same place."""
        self.course[1] *= BRAKE
        self.recall()

    @property
    def brake(self) -> float:
        """What roll-backs have left of the backbone's learning rate."""
        return self._brake

    def train(self, mode: bool = True) -> Anchored:
        """Sets the mode of all but what keeps its statistics."""
        super().train(mode)
        self.anchor.eval()
        for network in (*self._trained, self.inner.encoder()):
            for part in network.modules():
                if isinstance(part, BatchNorm):
                    part.eval()
        return self

    def forward(
        self, batch: Batch, t: Float[Tensor, ""], ahead: bool = False
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The method's loss, and how far pooled vector, likeness of patches and the fit of words are from the start's.

        `ahead` of it a method whose teacher looks at all micro-batches first (`Evened`) does nothing else.
        """
        if ahead:
            looked: tuple[Tensor, dict[str, Tensor]] = self.inner(batch, t, True)
            return looked
        with self._resting():
            loss, metrics = self.inner(batch, t)
        if self.still:
            self._loss.append(loss.detach())
        metrics = {"cls_loss": loss.detach(), **metrics, "warming": torch.full_like(loss.detach(), float(self.still))}
        if "anchored" not in batch:
            return loss, metrics
        if self.still:
            nothing = torch.zeros_like(loss.detach())
            return loss, metrics | dict.fromkeys(self._anchors(), nothing)
        (network,), images = self._trained, batch["anchored"]
        seen = network(images)
        with torch.no_grad():
            kept = self.anchor(images)
        ours, theirs = network.embedding(seen).float(), self.anchor.embedding(kept).float()
        token = 1 - F.cosine_similarity(ours, theirs).mean()
        patches = losses.gram(seen.patches, kept.patches) if seen.patches.shape[1] > 1 else torch.zeros_like(token)
        far = [token, patches] if self._words is None else [token, patches, self._mishearing(ours, theirs)]
        weights = (self.asked.anchor_token, self.asked.anchor_patches, self.asked.anchor_text)
        for weight, distance in zip(weights, far, strict=False):
            loss = loss + weight * distance
        told = {name: distance.detach() for name, distance in zip(self._anchors(), far, strict=True)}
        return loss, metrics | told

    def _anchors(self) -> list[str]:
        return ["anchor_token", "anchor_patches"] + ([] if self._words is None else ["anchor_text"])

    def _mishearing(self, ours: Float[Tensor, "b d"], theirs: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        """The Kullback-Leibler divergence of how well words fit a picture from how well they did, over all words."""
        assert self._words is not None
        words, way = self._words, self._way
        fits = (
            F.normalize(x if way is None else F.linear(x, way), dim=-1) @ words.mT * self._factor
            for x in (ours, theirs)
        )
        now, before = (fit.log_softmax(-1) for fit in fits)
        return F.kl_div(now, before, log_target=True, reduction="batchmean")

    @contextlib.contextmanager
    def _resting(self) -> Iterator[None]:
        """While the backbone stands still nothing is derived through it; among ranks every gradient is waited for."""
        rests = self.still and distributed.world() == 1
        for parameter in self._moving if rests else ():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._moving if rests else ():
                parameter.requires_grad_(True)

    def groups(self, t: float) -> list[Group]:
        """The method's own, those of the backbone apart: still, then at a lower rate that rises from 0."""
        self._now = t
        (network,), config, asked = self._trained, self.config, self.asked
        groups = self.inner.groups(t)
        if groups is None:
            groups = optim.default_groups(self.inner, network, config.weight_decay, config.layer_decay)
        inside = {id(parameter) for parameter in network.parameters()}
        risen = min(1.0, max(0.0, (t - self._warm) / (RISE * (1 - self._warm))))
        found = []
        for group in groups:
            slow = {name: parameter for name, parameter in group.parameters.items() if id(parameter) in inside}
            rest = {name: parameter for name, parameter in group.parameters.items() if name not in slow}
            scale = group.lr_scale * asked.backbone_rate * risen * self.brake
            still = group.frozen or self.still
            found += [replace(group, parameters=rest)] if rest else []
            found += [replace(group, parameters=slow, lr_scale=scale, frozen=still)] if slow else []
        return found

    def begin(self) -> None:
        """As the method."""
        self.recall()
        self.inner.begin()

    @torch.no_grad()
    def after_step(self, t: Float[Tensor, ""]) -> None:
        """As the method; and whether the heads are warm: their loss has settled, or the time for it is over."""
        self.inner.after_step(t)
        if not self.still:
            return
        self.course[3] += distributed.mean(torch.stack(self._loss).mean())
        self.course[4] += 1
        self._loss.clear()
        if self._now >= self.asked.warm:
            self.course[0] = self._now
            self.recall()
        elif self._now < self.config.warmup:  # the heads' own rate still rises
            self.course[3:5] = 0
        elif self._now >= self._began + WINDOW:
            self._settle()

    def _settle(self) -> None:
        """A window ends."""
        total, count, before = self.course[3:].tolist()
        if count < LEAST:  # a mean of two steps is noise
            return
        mean = total / count
        if before - mean < SETTLED * abs(mean):
            self.course[0] = self._now
        self.course[2:] = torch.tensor([self._now, 0.0, 0.0, mean])
        self.recall()

    def encoder(self) -> nn.Module:
        """The method's."""
        return self.inner.encoder()

    def bare(self) -> Method:
        """The method's: what is published beside a backbone is for it."""
        return self.inner.bare()

    def chance(self) -> dict[str, float]:
        """The method's; its loss is what is logged as `cls_loss`, without the distances."""
        return {"cls_loss" if name == "loss" else name: value for name, value in self.inner.chance().items()}

    def show(self, batch: Batch) -> dict[str, Float[Tensor, "b c h w"]]:
        """The method's."""
        return self.inner.show(batch)

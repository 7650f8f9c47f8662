"""Going on from a backbone on one's own pictures, so that what it knew is not lost.

Fresh heads learn on a backbone that stands still; then it moves, slowly and held to what it was. The best checkpoint by
labelled pictures meets the start on others: it is handed over where it is better there, and otherwise the start is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from saccade import augment, backbone, distributed, health, initial, losses, optim, published, recipe, weights
from saccade.data import Batch, Source
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate, gate
from saccade.evaluate.live import Live
from saccade.model import build
from saccade.norm import BatchNorm
from saccade.optim import Group
from saccade.recipe import Coupled, Method, Recipe, Training
from saccade.run import Run, holding, stop_requests
from saccade.settings import LENGTHS, AdaptArguments, PretrainArguments, RunArguments, checked
from saccade.train import Pretraining
from saccade.vit import ViTConfig
from saccade.watch import Watch

STEPS, BATCH, LAYER_DECAY = 1000, 64, 0.75
"""What is not asked for: a length, and at most so large a batch and a layer decay."""
RISE = 0.1
"""Part of the steps after the heads are warm in which the backbone's learning rate rises from 0."""
AREA = (0.5, 1.0)
"""Of the crops, in their own colours, on which the backbone is held to the start."""
FARTHEST = 0.5
"""Without labels: the mean distance (1 - cosine) from the start's features above which nothing is handed over."""
_GENTLE = ("warm", "backbone_rate", "anchor_patches", "anchor_token", "freeze_blocks")


def adapt(
    data: str | Path | Source | Sequence[str | Path | Source], *, start: str | Path, out: str | Path, **settings: Any
) -> Run:
    """Goes on from the backbone `start` on unlabelled data, or goes on with the run that was begun in `out`.

    `out/backbone` then holds what the gate let through: the best checkpoint, or the start. `settings` are the flags of
    `saccade adapt` by their own names: the verb's (eval, warm, anchor_patches, …) and the recipe's (lr, batch, …).
    Raises `SaccadeError`; with `code` 75 when it was stopped on request.
    """
    parts = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    own = {name: settings.pop(name) for name in list(settings) if name in AdaptArguments.model_fields}
    names = tuple(part.__class__.__name__ if isinstance(part, Source) else str(part) for part in parts)
    said = {**own, "data": names, "start": str(start), "out": str(out)}
    arguments = checked(AdaptArguments, said, owner="adapt")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    encoder = _start(arguments)
    name = arguments.recipe or natural(encoder)
    page, config = recipe.configure(name, _gently(name, encoder, settings), also=AdaptArguments.model_fields)
    for_the_loop = {field: getattr(arguments, field) for field in RunArguments.model_fields}
    whole = PretrainArguments(**for_the_loop, recipe=name, init=arguments.start)
    with distributed.ranks() as ranks, holding():
        with stop_requests() as requests:
            adapting = Adapting(anchored(page, arguments, encoder), config, whole, parts, ranks, arguments)
            adapting.train(requests)
        return adapting.finish()


def natural(start: Encoder | str | Path) -> str:
    """The recipe nearest to how a backbone was made. Raises `SaccadeError` where none is."""
    encoder = start if isinstance(start, Encoder) else weights.load(start)
    family = encoder.record["family"]
    known = published.families().get(family)
    found = encoder.record.get("recipe") if known is None else known.recipe
    if found is None:
        raise SaccadeError(
            f"no recipe here goes on with {family} as it was made",
            path="--recipe",
            hint=f"name one that learns in another way: {', '.join(recipe.names())}",
        )
    return found


def _start(arguments: AdaptArguments) -> Encoder:
    """The encoder to go on from; a published name is of the commit that the run began with."""
    began = Run(Path(arguments.out).expanduser()).record.get("initial", {})
    encoder = weights.load(began["path"] if "revision" in began else arguments.start)
    if not backbone.known(encoder.backbone):
        raise SaccadeError(
            f"{arguments.start} runs as it is and cannot be trained", path="--from", hint="take the weights themselves"
        )
    return encoder


def _gently(name: str, encoder: Encoder, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, and what follows from the start and from being gentle where they say nothing."""
    usual = recipe.configure(name, {})[1]
    size, arch = encoder.backbone.config.image_size, encoder.record.get("arch")
    found = {"image_size": size, "channels": encoder.backbone.config.channels, "batch": min(usual.batch, BATCH)}
    found |= {"layer_decay": min(usual.layer_decay, LAYER_DECAY)}
    if not any(settings.get(length) is not None for length in LENGTHS):
        found |= {"steps": STEPS}
    if arch is None and "arch" not in settings:
        raise SaccadeError("the backbone's size has no name", path="--arch", hint="say it, e.g. --arch vit-s/16")
    return found | ({"arch": arch} if arch else {}) | settings


def anchored(page: Recipe, asked: AdaptArguments, encoder: Encoder) -> Recipe:
    """The recipe with a backbone like the encoder's, and held to it. The recipe does not know."""
    switches = initial.switches(encoder)
    if isinstance(encoder.backbone.config, ViTConfig):
        switches |= {"pooling": encoder.backbone.config.pooling}

    def views(config: Any, batch: Batch, draws: Draws) -> Batch:
        crops = augment.random_resized_crop(draws.sample("anchor"), batch["size"], scale=AREA)
        return page.views(config, batch, draws) | {
            "anchored": augment.render(batch["pixels"], crops, config.image_size)
        }

    method = functools.partial(Anchored, page=page, asked=asked)
    return replace(page, views=views, method=method, switches=switches)


class Anchored(Method):
    """Any method, its backbone standing still until the heads are warm, then slow and held to what it was at first.

    Batch norms of the backbone keep the statistics of the start: ten batches would replace them.
    """

    def __init__(
        self, config: Training, network: Any, teachers: dict[str, nn.Module], *, page: Recipe, asked: AdaptArguments
    ):
        super().__init__(config, network, teachers)
        self.config, self.asked = config, asked
        self.anchor = copy.deepcopy(network).requires_grad_(False)
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
                parameter.requires_grad_(layers[name] > asked.freeze_blocks)
        self.train()

    def train(self, mode: bool = True) -> Anchored:
        """Sets the mode of all but what keeps its statistics."""
        super().train(mode)
        self.anchor.eval()
        for network in (*self._trained, self.inner.encoder()):
            for part in network.modules():
                if isinstance(part, BatchNorm):
                    part.eval()
        return self

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The method's loss, and how far pooled vector and likeness of patches are from the start's."""
        loss, metrics = self.inner(batch, t)
        (network,), images = self._trained, batch["anchored"]
        seen = network(images)
        with torch.no_grad():
            kept = self.anchor(images)
        ours, theirs = network.embedding(seen).float(), self.anchor.embedding(kept).float()
        token = 1 - F.cosine_similarity(ours, theirs).mean()
        patches = losses.gram(seen.patches, kept.patches) if seen.patches.shape[1] > 1 else torch.zeros_like(token)
        far = {"anchor_token": token.detach(), "anchor_patches": patches.detach()}
        whole = loss + self.asked.anchor_token * token + self.asked.anchor_patches * patches
        return whole, {"cls_loss": loss.detach(), **metrics, **far}

    def groups(self, t: float) -> list[Group]:
        """The method's own, those of the backbone apart: still, then at a lower rate that rises from 0."""
        (network,), config, asked = self._trained, self.config, self.asked
        groups = self.inner.groups(t)
        if groups is None:
            groups = optim.default_groups(self.inner, network, config.weight_decay, config.layer_decay)
        inside = {id(parameter) for parameter in network.parameters()}
        risen = min(1.0, max(0.0, (t - asked.warm) / (RISE * (1 - asked.warm))))
        found = []
        for group in groups:
            slow = {name: parameter for name, parameter in group.parameters.items() if id(parameter) in inside}
            rest = {name: parameter for name, parameter in group.parameters.items() if name not in slow}
            scale = group.lr_scale * asked.backbone_rate * risen
            still = group.frozen or t < asked.warm
            found += [replace(group, parameters=rest)] if rest else []
            found += [replace(group, parameters=slow, lr_scale=scale, frozen=still)] if slow else []
        return found

    def begin(self) -> None:
        """As the method."""
        self.inner.begin()

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """As the method."""
        self.inner.after_step(t)

    def encoder(self) -> nn.Module:
        """The method's."""
        return self.inner.encoder()

    def chance(self) -> float | None:
        """The method's, of what is logged as `cls_loss`."""
        return self.inner.chance()

    def show(self, batch: Batch) -> dict[str, Float[Tensor, "b c h w"]]:
        """The method's."""
        return self.inner.show(batch)


class Watching(Watch):
    """Chooses by k-NN, which the gate asks for too, on a part of the labelled pictures that is not the gate's."""

    measure = "knn"

    def labelled(self, preprocess: Preprocess) -> Live:
        """Those to learn from and those to choose by."""
        assert self.arguments.eval is not None
        parts = (self.arguments.eval, self.arguments.group_by, preprocess, self._rows)
        return Live(*parts, divide=lambda data: gate.divide(data)[:2])

    def pictures(self) -> Shaped[Tensor, "b c s s"]:
        """Some of those that are trained on. Raises `SaccadeError` where none can be read."""
        if self._pictures is None:
            raise SaccadeError("no picture of the data could be read", path="DATA", code=1)
        return self._pictures

    def measured(self, encoder: Encoder) -> dict[str, Any]:
        """`hints` that need no labels, and `watch`, in percent of the pictures to choose by, where there are any."""
        seen = health.look(encoder, self.pictures())
        hints = {name: seen[name] for name in ("rank", "spread")}
        return {"hints": hints} | ({"watch": self._live.measure(encoder)} if self._evaluations else {})

    def judged(self, start: Encoder, candidate: Encoder) -> dict[str, Any]:
        """The gate, on pictures that nothing was chosen by."""
        assert self.arguments.eval is not None

        def divide(data: Any) -> Any:
            reference, _, judges = gate.divide(data)
            return reference, judges

        live = Live(self.arguments.eval, self.arguments.group_by, start.preprocess, 10_000, divide=divide)
        before, names = live.right(start)
        return gate.judge(before, live.right(candidate)[0], names)


class Adapting(Pretraining):
    """A run whose start is measured first, and whose end has to pass the gate."""

    watching = Watching
    watch: Watching

    def __init__(
        self, page: Recipe, config: Training, arguments: PretrainArguments, data: list[Any], ranks: Ranks,
        asked: AdaptArguments,
    ):  # fmt: skip
        self.asked = asked
        super().__init__(page, config, arguments, data, ranks)
        if self.watch.encoder is None:
            raise ranks.shared(
                SaccadeError(f"{page.name} has no encoder of pictures", path="--recipe", hint="use another")
            )

    def _asked(self) -> dict[str, Any]:
        gently = {name: getattr(self.asked, name) for name in _GENTLE}
        return {**super()._asked(), "verb": "adapt", "gently": gently}

    def train(self, requests: dict[str, bool]) -> None:
        """Measures the start, once, then trains."""
        self.ranks.from_first(self._measure_start)
        super().train(requests)

    def _measure_start(self) -> None:
        if "before" not in self.run.record:
            before = self.watch.measured(self._started())
            self.run.note(before=before)
            self.progress.say(f"the start: {_spoken(before)}")

    def _started(self) -> Encoder:
        """The start as the run's own network has it, prepared as the candidate is."""
        method, _ = build(self.page, self.model.config, self.arguments.init)
        assert isinstance(method, Anchored) and self.watch.encoder is not None
        record = {**self.watch.encoder.record, "steps": 0}
        return Encoder(method.anchor, record).eval().to(self.ranks.device)

    def _hand_over(self, encoder: Encoder) -> dict[str, Any] | None:
        """Writes what passed the gate, or the start; `encoder` becomes it."""
        start, best = self._started(), self.watch.best
        risen = best is not None and best["step"] > self.asked.warm * self.steps
        if best is not None and risen:
            encoder.backbone.load_state_dict(weights.load(self.run.path / "best").backbone.state_dict())
        encoder.record["steps"] = best["step"] if best is not None and risen else self.steps
        after = self.watch.measured(encoder)
        after["hints"]["drift"] = drift(start, encoder, self.watch.pictures())
        before = self.run.record["before"]
        if self.arguments.eval is None:
            verdict = unverified(before["hints"], after["hints"], self.watch.monitor.finding.verdict)
        elif risen:
            verdict = self.watch.judged(start, encoder)
        else:
            reason = "no checkpoint was better than the start on the pictures that choose"
            verdict = {"passed": False, "measure": "knn", "bound": None, "reason": reason}
        refused = verdict["handed_over"] == "start" if "handed_over" in verdict else not verdict["passed"]
        verdict["handed_over"] = "start" if refused else "candidate"
        kept, other = (start, encoder) if refused else (encoder, start)
        weights.save_backbone(self.run.path / "backbone", kept.backbone, kept.record)
        scores = self.watch.examine(kept)
        if scores is not None:
            examined = self._examined(other), {name: scores[name] for name in ("knn", "linear")}
            before["test"], after["test"] = reversed(examined) if refused else examined
        encoder.backbone.load_state_dict(kept.backbone.state_dict())
        encoder.record["steps"] = kept.record["steps"]
        self.run.note(before=before, after=after, gate=verdict)
        self.progress.say(f"the gate: {verdict['handed_over']} handed over; {verdict['reason']}")
        return scores

    def _examined(self, encoder: Encoder) -> dict[str, float]:
        """k-NN and linear on the test side, which nothing else has read."""
        assert self.arguments.eval is not None
        tasks, group_by = ("knn", "linear"), self.arguments.group_by
        found = evaluate(encoder, self.arguments.eval, tasks=tasks, group_by=group_by, baselines=False)
        return {name: found[name] for name in tasks}

    def _summary(self, scores: dict[str, Any] | None) -> dict[str, Any]:
        record = self.run.record
        return {**super()._summary(scores), **{name: record[name] for name in ("before", "after", "gate")}}


@torch.inference_mode()
def drift(start: Encoder, encoder: Encoder, pictures: Shaped[Tensor, "b c s s"]) -> float:
    """How far the pooled vectors of pictures have moved: 1 - cosine, the mean."""
    apart = []
    for part in pictures.split(64):
        ours, theirs = (one.backbone.pooled(part.to(one.device)).float() for one in (encoder, start))
        apart.append(1 - F.cosine_similarity(ours, theirs))
    return torch.cat(apart).mean().item()


def unverified(before: dict[str, Any], after: dict[str, Any], verdict: str) -> dict[str, Any]:
    """The gate without labels: whether features collapsed or drifted away; that they are better, nobody knows.

    `before` and `after` are `rank` and `spread`, and of `after` the `drift`; `verdict` is the health of the run.
    """
    wrong = None
    if verdict in ("diverged", "constant_features", "low_rank"):
        wrong = f"the run's health is {verdict}"
    elif after["rank"] is None or after["rank"] < 0.5 * before["rank"] or after["spread"] < 0.01 * before["spread"]:
        wrong = f"features collapsed: rank {before['rank']:.3g} to {after['rank'] or 0:.3g}"
    elif after["drift"] > FARTHEST:
        wrong = f"features drifted {after['drift']:.2f} from the start, more than {FARTHEST}"
    reason = "unverified: without --eval nothing can say whether it is better; neither collapse nor drift was seen"
    return {"passed": None if wrong is None else False, "measure": None, "bound": None, "reason": wrong or reason,
            "handed_over": "candidate" if wrong is None else "start"}  # fmt: skip


def _spoken(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    watch = [f"{name} {value:.1f} %" for name, value in measured.get("watch", {}).items()]
    hints = [f"{name} {value:.3g}" for name, value in measured["hints"].items() if value is not None]
    return ", ".join([*watch, f"hints without labels: {' and '.join(hints)}"])

"""Going on from a backbone on one's own pictures, so that what it knew is not lost.

Fresh heads learn on a backbone that stands still; then it moves, slowly and held to what it was. The best checkpoint by
labelled pictures meets the start on others: it is handed over where it is better there, and otherwise the start is.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saccade import backbone, distributed, health, hints, published, recipe, report, weights
from saccade.advice import advise
from saccade.anchor import Anchored, Told, anchored, architecture
from saccade.data import Delivery, Source
from saccade.distributed import Ranks
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate, gate, zero_shot
from saccade.evaluate.labelled import read_labelled
from saccade.evaluate.live import Live
from saccade.model import Model, build
from saccade.recipe import Recipe, Training
from saccade.run import Run, holding, memory_gb, stop_requests
from saccade.settings import LENGTHS, AdaptArguments, PretrainArguments, RunArguments, checked
from saccade.train import Pretraining
from saccade.watch import Watch

STEPS, BATCH, LAYER_DECAY, RATE = 1000, 64, 0.75, 1e-3
"""What is not asked for: a length; at most so large a batch and a layer decay; the heads' learning rate."""
SMALL = {
    "prototypes": 256, "assignment": "sinkhorn", "hidden": 512, "head_norm": True, "first_temperature": 0.02,
    "teacher_temperature": 0.02, "drop_path": 0.0, "local_crops": 4, "colour": 0.5, "weight_decay_end": 0.04,
}  # fmt: skip
"""What short runs on few pictures want of a method that has these settings: heads that get warm, a sharp teacher.

A centre takes longer to find its place than the heads have to get warm: of 1,024 prototypes four were in use, and
nothing was learned (docs/log.md).
"""
QUEUE = 512
"""Former large crops, about, among which Sinkhorn-Knopp shares the prototypes out."""
WORDS = (
    "person", "animal", "bird", "insect", "plant", "leaf", "flower", "tree", "food", "building", "street", "vehicle",
    "machine", "tool", "furniture", "clothing", "text", "drawing", "map", "sky", "water", "ground", "rock", "metal",
    "wood", "cloth", "skin", "cell", "red", "green", "blue", "yellow", "white", "black", "round", "striped", "spotted",
    "broken", "empty", "many",
)  # fmt: skip
"""What a start with a text tower is held to where no class has a name."""
PATIENCE, FALLS = 5, 3
"""Evaluations without a better one, and roll-backs, after which a run ends."""
_GENTLE = (
    "warm",
    "backbone_rate",
    "anchor_patches",
    "anchor_token",
    "anchor_text",
    "freeze_blocks",
    "lora",
    "roll_back",
    "looks",
)


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
    encoder = _start(arguments, settings.get("channels"))
    name = arguments.recipe or natural(encoder)
    page, config = recipe.configure(name, _gently(name, encoder, settings), also=AdaptArguments.model_fields)
    if config.keeps_start():
        raise SaccadeError(
            f"{name} leaves the backbone as it is", path="--recipe", hint="that is saccade pretrain --init"
        )
    for_the_loop = {field: getattr(arguments, field) for field in RunArguments.model_fields}
    whole = PretrainArguments(**for_the_loop, recipe=name, init=arguments.start)
    with distributed.ranks() as ranks, holding():
        with stop_requests() as requests:
            told = None if config.texts() else _told(encoder, arguments)
            held = anchored(page, arguments, encoder, told)
            adapting = Adapting(held, config, whole, parts, ranks, arguments, encoder, told)
            adapting.train(requests)
        return adapting.finish()


def natural(start: Encoder | str | Path) -> str:
    """The recipe nearest to how a backbone was made. Raises `SaccadeError` where none is."""
    encoder = start if isinstance(start, Encoder) else _trainable(weights.load(start), start)
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


def _start(arguments: AdaptArguments, channels: int | None) -> Encoder:
    """The encoder to go on from, for these channels; a published name is of the commit that the run began with."""
    began = Run(Path(arguments.out).expanduser()).record.get("initial", {})
    path = began["path"] if "revision" in began else arguments.start
    encoder = _trainable(weights.load(path), arguments.start)  # said first: a graph takes no other channels either
    return encoder if channels in (None, encoder.backbone.config.channels) else weights.load(path, channels=channels)


def _told(encoder: Encoder, arguments: AdaptArguments) -> Told | None:
    """The words that a start with a text tower is held to: of the labelled classes, else `WORDS`."""
    if encoder.text is None or encoder.text.tokenizer is None:
        return None
    names, canvas = list(WORDS), encoder.preprocess.canvas
    if arguments.eval is not None:
        labelled = read_labelled(arguments.eval, arguments.group_by, canvas, encoder.preprocess.channels)
        names = [zero_shot.readable(name) for name in labelled.classes]
    words, _ = zero_shot.class_vectors(encoder, names, zero_shot.TEMPLATES)
    return Told(words.clone(), encoder.text)


def _trainable(encoder: Encoder, start: str | Path) -> Encoder:
    if not backbone.known(encoder.backbone):
        raise SaccadeError(
            f"{start} runs as it is and cannot be trained", path="--from", hint="take the weights themselves"
        )
    return encoder


def short(config: type[Training], settings: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """What a short run wants of a method with this config: `SMALL`, and what follows from length, batch and sides.

    A teacher forgets its start in a tenth of the run; small crops are whole patches; KoLeo's groups divide the batch,
    and the queue is of whole steps.
    """
    steps, batch = settings.get("steps") or STEPS, settings["batch"] // settings.get("accumulate", 1)
    step = 2 * settings["batch"]
    queue = 0 if settings.get("assignment") == "centre" else math.ceil(QUEUE / step) * step
    momentum = min(0.996, max(0.9, 1 - 10 / steps))
    side = max(2, round(0.43 * settings["image_size"] / patch)) * patch
    found = {**SMALL, "momentum": momentum, "local_size": side, "koleo_group": _group(batch), "queue": queue}
    return {name: value for name, value in found.items() if name in config.model_fields}


def _group(batch: int) -> int:
    """The largest group of 2 to 16 samples that divides a batch; all of a batch that none divides."""
    return next((group for group in range(16, 1, -1) if batch % group == 0), max(2, batch))


def _gently(name: str, encoder: Encoder, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, and what follows from the start and from being gentle where they say nothing."""
    arch, side = architecture(encoder), settings.get("image_size", encoder.preprocess.crop)
    if arch is None and "arch" not in settings:
        raise SaccadeError("the backbone's size has no name", path="--arch", hint="say it, e.g. --arch vit-s/16")
    usual = recipe.configure(name, {})[1]
    found = {"image_size": side, "channels": encoder.backbone.config.channels, "batch": min(usual.batch, BATCH)}
    found |= {"layer_decay": min(usual.layer_decay, LAYER_DECAY)} | ({"arch": arch} if arch else {})
    if not any(settings.get(length) is not None for length in LENGTHS):
        found |= {"steps": STEPS}
    if ":" not in name:
        found |= short(type(usual), found | settings, encoder.backbone.stride)
    made = recipe.configure(name, found | settings, also=AdaptArguments.model_fields)[1]
    rate = {"lr": made.lr * RATE / made.peak()}  # whatever the rule by which it grows with the batch
    return found | rate | settings


class Watching(Watch):
    """Chooses by k-NN, which the gate asks for too, on a part of the labelled pictures that is not the gate's.

    Without labels every checkpoint whose features are not lost is as good as the one before. What it decides stands in
    the lines of metrics.jsonl, so that a run that goes on has decided the same.
    """

    measure = "knn"

    def __init__(
        self, arguments: PretrainArguments, source: Source, run: Run, ranks: Ranks, *, asked: AdaptArguments,
        prepared: dict[str, Any] | None, told: Told | None,
    ):  # fmt: skip
        super().__init__(arguments, source, run, ranks)
        self.asked, self._prepared, self._told = asked, prepared, told

    def begin(self, model: Model, steps: int, say: Any) -> None:
        """As `Watch`; and the model takes from its checkpoint how far it was."""
        assert isinstance(model.method, Anchored)
        model.method.recall()
        self.turn, self._falls, self._idle = (0, ""), 0, 0
        self._seen_of_start: Tensor | None = None
        super().begin(model, steps, say)
        way = (self.turn, self._falls, self._idle)  # which the first rank has read from the lines
        self.turn, self._falls, self._idle = self.ranks.from_first(lambda: way)

    def _record(self, config: Training) -> dict[str, Any]:
        """As `Watch`; and pictures are prepared as the start's family does it, before and after."""
        return super()._record(config) | ({"preprocess": self._prepared} if self._prepared else {})

    def schedule(self) -> set[int]:
        """Also without labels: hints tell when features are lost."""
        looks = self.asked.looks
        return {max(1, round(n * self.steps / looks)) for n in range(looks + 1)}

    @property
    def ended(self) -> bool:
        """Whether nothing is to be hoped for any more."""
        return self.arguments.eval is not None and (self._idle >= PATIENCE or self._falls >= FALLS)

    def labelled(self, preprocess: Preprocess) -> Live:
        """All but the gate's: k-NN chooses by all of them, each left out in its turn."""
        assert self.arguments.eval is not None
        parts = (self.arguments.eval, self.arguments.group_by, preprocess, self._rows)
        return Live(*parts, divide=lambda data: gate.divide(data)[:2], leave_out=True)

    def pictures(self) -> Shaped[Tensor, "b c s s"]:
        """Some of those that are trained on. Raises `SaccadeError` where none can be read."""
        if self._pictures is None:
            raise SaccadeError("no picture of the data could be read", path="DATA", code=1)
        return self._pictures

    def started(self) -> Encoder:
        """The start as the run's own network has it, prepared as the candidate is."""
        assert self.encoder is not None
        method, _ = build(self.page, self.config, self.arguments.init)
        assert isinstance(method, Anchored)
        return Encoder(method.anchor, {**self.encoder.record, "steps": 0}).eval().to(self.ranks.device)

    def enter(self, config: Training) -> None:
        """As `Watch`."""
        self.config, self._seen_of_start = config, None
        super().enter(config)

    def measured(self, encoder: Encoder, *, first: bool = False) -> dict[str, Any]:
        """`hints` that need no labels, and `watch`, in percent of the pictures to choose by, where there are any.

        But for the `first`, the start itself, hints say how far features are from the start's.
        """
        if self._seen_of_start is None and not first:
            self._seen_of_start = hints.vectors(self.started(), self.pictures())
        found = {"hints": hints.measure(encoder, self.pictures(), self._seen_of_start)}
        if self.arguments.eval is None:
            return found
        scores = self._live.measure(encoder)
        return found | {"watch": {**scores, "chance": 100 / self._live.classes, "pictures": self._live.examined}}

    def evaluated(self, encoder: Encoder) -> dict[str, Any]:
        """Scores and hints, flat."""
        found = self.measured(encoder)
        return {**found.get("watch", {}), **found["hints"]}

    def see(self, model: Model, step: int, delivered: Tensor | None) -> dict[str, Any]:
        """As `Watch`, and in `eval` which `turn` the run takes: best, worse, fell."""
        seen = super().see(model, step, delivered)
        if "eval" in seen:
            assert isinstance(model.method, Anchored)
            seen["eval"] |= {"warming": self._stood(model.method, step), "rate": model.method.brake}
            seen["eval"]["turn"] = self.ranks.from_first(lambda: self._judged(seen["eval"]))
        return seen

    def _stood(self, method: Anchored, step: int) -> bool:
        """Whether the backbone is still the start's, bit for bit."""
        return method.still or method.warmed_at * self.steps > step - 1.5

    def _judged(self, found: dict[str, Any]) -> str:
        if self.best is None or found["warming"]:
            return "best"
        lost = hints.astray(self.run.record["before"]["hints"], found)
        if self.arguments.eval is None:
            return "fell" if lost and self.asked.roll_back else "worse" if lost else "best"
        value, best = found[self.measure], self.best["value"]
        if value > best and not lost:
            return "best"
        doubt = (best * (100 - best) / max(found["pictures"], 1)) ** 0.5  # one standard error of the best
        return "fell" if self.asked.roll_back and (lost or value < best - doubt) else "worse"

    def improves(self, entry: dict[str, Any]) -> bool:
        """Takes in what a line says of the run's way; whether its checkpoint is the one to keep."""
        found = entry.get("eval")
        if found is None:
            return False
        self.turn = (entry["step"], found["turn"])
        if found["turn"] == "best":
            self._idle = 0
            measure = (
                "no labels: the newest whose features are not lost"
                if self.arguments.eval is None
                else f"{self.measure} of the train side but for the gate's part, each picture by those of other groups"
            )
            value = found.get(self.measure, 0.0)
            self.best = {"step": entry["step"], "measure": measure, "value": value, "warming": found["warming"]}
            return True
        self._idle += self.asked.roll_back
        self._falls += found["turn"] == "fell"
        return False

    def examine(self, encoder: Encoder) -> dict[str, Any] | None:
        """The test side, which nothing else has read; it is the start that one is compared with, not raw pixels."""
        if self.arguments.eval is None:
            return None
        tasks, group_by = ("knn", "linear"), self.arguments.group_by
        return evaluate(encoder, self.arguments.eval, tasks=tasks, group_by=group_by, baselines=False)

    def judged(self, start: Encoder, candidate: Encoder) -> dict[str, Any]:
        """The gate, on pictures that nothing was chosen by."""
        assert self.arguments.eval is not None

        def divide(data: Any) -> Any:
            reference, _, judges = gate.divide(data)
            return reference, judges

        live = Live(self.arguments.eval, self.arguments.group_by, start.preprocess, 10_000, divide=divide)
        before, names = live.right(start)
        verdict = gate.judge(before, live.right(candidate)[0], names)
        if self._told is None:
            return verdict
        told = self._told
        heard = (live.told(encoder, told.words, told.pairing) for encoder in (start, candidate))
        return gate.held(verdict, *heard, names)


class Adapting(Pretraining):
    """A run whose start is measured first, that goes back when it gets worse, and whose end has to pass the gate."""

    watch: Watching

    def __init__(
        self, page: Recipe, config: Training, arguments: PretrainArguments, data: list[Any], ranks: Ranks,
        asked: AdaptArguments, start: Encoder, told: Told | None,
    ):  # fmt: skip
        self.asked, self._text, prepared = asked, start.text, start.record.get("preprocess")
        self.watching = functools.partial(Watching, asked=asked, prepared=prepared, told=told)
        super().__init__(page, config, arguments, data, ranks)
        if self.watch.encoder is None:
            raise ranks.shared(
                SaccadeError(f"{page.name} has no encoder of pictures", path="--recipe", hint="use another")
            )

    def _asked(self) -> dict[str, Any]:
        gently = {name: getattr(self.asked, name) for name in _GENTLE}
        return {**super()._asked(), "verb": "adapt", "gently": gently}

    def train(self, requests: dict[str, bool]) -> None:
        """Measures the start and says what is to be expected, once, then trains."""
        self.ranks.from_first(self._measure_start)
        if "estimate" not in self.ranks.from_first(lambda: self.run.record):
            self._foretell()
        super().train(requests)

    def _measure_start(self) -> None:
        if "before" in self.run.record:
            return
        began, pictures = time.monotonic(), self.watch.pictures()
        before = self.watch.measured(self.watch.started(), first=True)
        advice = advise(len(self.source), health.distinct(pictures), len(pictures), before)
        self.run.note(before=before, advice=advice, look_seconds=time.monotonic() - began)
        self.progress.say(f"the start: {_spoken(before)}")
        instead = {
            "probe": "a linear probe on the frozen backbone first (saccade evaluate)",
            "pretrain": "saccade pretrain, without --init",
            "adapt": "to adapt is a sensible first try",
        }
        self.progress.say(f"advice, by rules of thumb: {instead[advice['first_try']]}; {advice['why']}")

    def _time(self, config: Training, deliveries: Iterator[Delivery], patience: float) -> float:
        """Of steps in which the backbone moves, as in most."""
        page = self.page

        def moving(*given: Any) -> Anchored:
            made: Anchored = page.method(*given)
            made.move()
            return made

        self.page = replace(page, method=moving)
        try:
            return super()._time(config, deliveries, patience)
        finally:
            self.page = page

    @property
    def _method(self) -> Anchored:
        assert isinstance(self.model.method, Anchored)
        return self.model.method

    def _foretell(self) -> None:
        """Times three steps of a model that is thrown away, and says how long it will take and what it needs."""
        kept, times = self.model, list[float]()
        self.model = Model(self.page, kept.config, self.arguments, self.ranks)
        self._method.move()
        batches = self._batches(self._deliveries(self.step, self.step + 3))
        for _ in range(3):
            began = time.monotonic()
            float(self.model.step(batches, 0.5)["loss"])
            times.append(time.monotonic() - began)
        del batches
        self.model = kept
        looks = len(self.watch.schedule()) * self.ranks.from_first(lambda: self.run.record["look_seconds"])
        seconds = min(times[1:]) * self.steps + looks
        learned, numbers = self._method.moving
        found = {"seconds": round(seconds, 1), "memory_gb": round(memory_gb(), 2), "learned": learned}
        self.ranks.from_first(lambda: self.run.note(estimate=found))
        self.progress.say(
            f"{self.steps} steps and {self.asked.looks} looks will take about {seconds / 60:.1f} minutes at most and "
            f"{found['memory_gb']:.1f} GB; a run that gets no better ends before; "
            f"{learned / 1e6:.2f} of the backbone's {numbers / 1e6:.2f} million numbers learn"
        )

    def _turn(self) -> bool:
        """Back to the best checkpoint where the score fell; whether the state is now another or the last one."""
        fell = self.watch.turn == (self.step, "fell")
        best = self.watch.best
        if fell and best is not None:
            directory = self.run.checkpoints / str(best["step"])
            self._return_to(directory)
            said = f"step {self.step}: fell below the best, of step {best['step']}: back to it, at half the rate"
            self.progress.say(said)
        if self.watch.turn[0] == self.step and self.watch.ended:
            self.progress.say(f"step {self.step}: nothing gets better any more, so the run ends here")
        return fell or self.watch.ended

    def _return_to(self, directory: Path) -> None:
        """The weights and moments of a checkpoint; of one of an earlier stage those that are still there."""
        method = self._method
        stored: dict[str, Any] = dict(distributed.metadata(directory).state_dict_metadata)
        course = method.course.clone()
        ours = {
            name: tensor
            for name, tensor in self.model.tensors().items()
            if name in stored and stored[name].size == tensor.shape
        }
        rest = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name not in ours
        }
        distributed.load_tensors(ours | rest, directory, self.ranks)
        method.course.copy_(course)
        method.slow_down()

    def _conclude(self, encoder: Encoder | None, tensors: dict[str, Tensor]) -> None:
        """As `Pretraining`; a report that a kill left to be written shows what was handed over."""
        if self.run.summary and encoder is not None and not (self.run.path / report.REPORT).exists():
            kept = weights.load(self.run.path / "backbone")
            encoder.backbone.load_state_dict(kept.backbone.state_dict())
            encoder.record["steps"] = kept.record["steps"]
        super()._conclude(encoder, tensors)

    def _hand_over(self, encoder: Encoder, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Writes what passed the gate, or the start; `encoder` becomes it."""
        start, best = self.watch.started(), self.watch.best
        moved = best is not None and not best["warming"]
        if best is not None and moved:
            encoder.backbone.load_state_dict(weights.load(self.run.path / "best").backbone.state_dict())
        encoder.record["steps"] = best["step"] if best is not None and moved else self.step
        before, after = self.run.record["before"], self.watch.measured(encoder)
        if not moved:
            reason = "no checkpoint was better than the start on the pictures that choose"
            verdict = {"passed": False, "measure": None, "bound": None, "reason": reason}
        elif self.arguments.eval is None:
            verdict = gate.unverified(before["hints"], after["hints"], self.watch.monitor.finding.verdict)
        else:
            verdict = self.watch.judged(start, encoder)
        refused = verdict["passed"] is False
        verdict["handed_over"] = "start" if refused else "candidate"
        kept, other = (start, encoder) if refused else (encoder, start)
        learned = encoder.text is not None and kept is encoder and moved  # a recipe of pairs, which moves both towers
        text = weights.load(self.run.path / "best").text if learned else self._text
        weights.save_backbone(self.run.path / "backbone", kept.backbone, kept.record, text)
        scores = self.watch.examine(kept)
        rest = self.watch.examine(other)
        if scores is not None and rest is not None:
            examined = [{name: found[name] for name in ("knn", "linear")} for found in (rest, scores)]
            before["test"], after["test"] = reversed(examined) if refused else examined
        encoder.backbone.load_state_dict(kept.backbone.state_dict())
        encoder.record["steps"] = kept.record["steps"]
        self.run.note(before=before, after=after, gate=verdict, rolled_back=self._rolled_back())
        self.progress.say(f"the gate: {verdict['handed_over']} handed over; {verdict['reason']}")
        return scores

    def _rolled_back(self) -> list[int]:
        """The steps at which the run went back."""
        return [entry["step"] for entry in self.run.metrics() if entry.get("eval", {}).get("turn") == "fell"]

    def _summary(self, scores: dict[str, Any] | None) -> dict[str, Any]:
        record = self.run.record
        names = ("before", "after", "gate", "rolled_back", "advice", "estimate")
        return {**super()._summary(scores), **{name: record[name] for name in names}}


def _spoken(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    scores = measured.get("watch", {})
    watch = [f"{name} {scores[name]:.1f} %" for name in ("knn", "linear", "chance") if name in scores]
    told = [f"{name} {value:.3g}" for name, value in measured["hints"].items() if value is not None]
    return ", ".join([*watch, f"hints without labels: {', '.join(told)}"])

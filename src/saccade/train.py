"""The one loop. It knows no method: what a recipe needs differently it says through `recipe.py`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade import distributed, initial, reading, report, teachers
from saccade.data import Batch, Delivery, MicroBatches, Quarantine, Source, fingerprint, loader
from saccade.distributed import Ranks
from saccade.draws import Draws, Order
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.model import Model
from saccade.progress import Progress, waited
from saccade.recipe import Recipe, Training
from saccade.run import Run, environment, holding, stop_requests
from saccade.settings import PretrainArguments, checked
from saccade.sources import open_source
from saccade.watch import Watch

ON_DEVICE = ("pixels", "text")
"""What of a decoded batch goes to the device; keys, sizes and counts stay: random rows are drawn on the CPU."""


def pretrain(
    data: str | Path | Source | Sequence[str | Path | Source], *, recipe: str, out: str | Path, **settings: Any
) -> Run:
    """Learns a representation from unlabelled data, or goes on with the run that was begun in `out`.

    `settings` are the flags of `saccade pretrain` by their own names: the verb's (workers, init, eval, …) and the
    recipe's (arch, batch, lr, …). Raises `SaccadeError`; with `code` 75 when it was stopped on request.
    """
    parts = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    own = {name: settings.pop(name) for name in list(settings) if name in PretrainArguments.model_fields}
    names = tuple(part.__class__.__name__ if isinstance(part, Source) else str(part) for part in parts)
    arguments = checked(PretrainArguments, {**own, "data": names, "recipe": recipe, "out": str(out)}, owner="pretrain")
    page, config = initial.configured(recipe, settings, arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with distributed.ranks() as ranks, holding():
        with stop_requests() as requests:
            pretraining = Pretraining(page, config, arguments, parts, ranks)
            pretraining.train(requests)
        return pretraining.finish()


class Pretraining:
    """One run: data, stages, the loop over steps, checkpoints, and what is written down at the end."""

    watching: Callable[..., Watch] = Watch

    def __init__(self, page: Recipe, config: Training, arguments: PretrainArguments, data: list[Any], ranks: Ranks):
        self.page, self.config, self.arguments, self.ranks = page, config, arguments, ranks
        self.progress = Progress(config.batch, speak=ranks.first)
        canvases = [stage.canvas() for _, stage in page.stages(config)]
        short = None if None in canvases else max(side for side in canvases if side is not None)
        with ranks.agreed():
            as_read = {"short_side": short, **config.read_as()}
            self.source = open_source(data, weights=arguments.weights, **as_read)
            MicroBatches(0, 0, config.batch, config.accumulate, ranks.rank, ranks.world)  # can it be divided?
        self.config = config.fitted(len(self.source))
        self.order = Order(*self.source.parts(), config.seed)
        self.run = ranks.from_first(lambda: Run.claim(arguments.out, self._asked()))
        began = ranks.from_first(lambda: self.run.record.get("initial", {}))
        if "revision" in began:  # a published name may mean another commit by now
            self.arguments = arguments.model_copy(update={"init": began["path"]})
        ranks.from_first(self._check_data)
        self.config, self.tokenize = reading.prepare(self.source, self.config, self.run, ranks)
        self.watch = self.watching(arguments, self.source, self.run, ranks)
        self.stage = -1
        self.delivered: Tensor | None = None
        self.model: Model
        self._load(self._measure_steps() if config.minutes else self._count_steps())

    def _asked(self) -> dict[str, Any]:
        arguments = self.arguments.model_dump(mode="json")
        what = {name: arguments.pop(name) for name in ("data", "recipe", "weights", "init", "eval", "group_by")}
        return {"verb": "pretrain", **what, "settings": self.config.model_dump(mode="json"), "machine": arguments}

    def _check_data(self) -> None:
        before, now = self.run.record.get("data"), fingerprint(self.source)
        if before is not None and before != now:
            raise SaccadeError(
                f"the data changed since this run began: {before['samples']} samples then, {now['samples']} now"
                + (", with other contents" if before["samples"] == now["samples"] else ""),
                path=", ".join(self.arguments.data),
                hint="restore the data, or begin a new run in another --out",
            )
        self.run.note(data=now, sessions=[*self.run.record.get("sessions", []), environment()])

    def _count_steps(self) -> int:
        steps, epochs = self.config.steps, self.config.epochs
        if steps is None and epochs is None:
            raise self.ranks.shared(SaccadeError("how long?", path="--steps", hint="or --epochs, or --minutes"))
        return steps or max(1, round((epochs or 0) * len(self.source) / self.config.batch))

    def _measure_steps(self) -> int:
        """Times some steps of every stage, each weighing its share; the record remembers, so a run has one length."""
        if "steps" in self.run.record:
            return int(self.run.record["steps"])
        budget, start = 60 * (self.config.minutes or 0), time.monotonic()
        deliveries, stages = self._deliveries(0, 1_000_000), self.page.stages(self.config)
        kinds = [config for n, (_, config) in enumerate(stages) if config not in [before for _, before in stages[:n]]]
        seconds = [self._time(config, deliveries, min(15, budget / 12) / len(kinds)) for config in kinds]
        parts = zip((0.0, *(until for until, _ in stages)), stages, strict=False)
        typical = sum((until - begin) * seconds[kinds.index(config)] for begin, (until, config) in parts)
        return self.ranks.from_first(lambda: max(1, int((budget - (time.monotonic() - start)) / typical)))

    def _time(self, config: Training, deliveries: Iterator[Delivery], patience: float) -> float:
        """Seconds that a step of a stage typically takes, on a model that is then thrown away."""
        self.model = Model(self.page, config, self.arguments, self.ranks)
        batches, times, start = self._batches(deliveries), list[float](), time.monotonic()
        while not self.ranks.highest(len(times) >= 3 and time.monotonic() - start > patience):
            began = time.monotonic()
            float(self.model.step(batches, 0.5)["loss"])  # nothing is frozen half way; waits for the device
            times.append(time.monotonic() - began)
        return statistics.median(times[1:])  # the first one warms up

    def _load(self, steps: int) -> None:
        """The model at the newest good checkpoint, or at the start."""
        self.steps = steps
        ends = [round(until * steps) for until, _ in self.page.stages(self.config)]
        if sorted({0, *ends})[1:] != ends:
            said = f"{steps} steps leave a stage of {self.page.name} without one"
            raise self.ranks.shared(SaccadeError(said, path="--steps", hint="give more"))
        self.stages = list(zip(ends, (config for _, config in self.page.stages(self.config)), strict=True))
        found = self.ranks.from_first(lambda: self.run.newest(self.progress.say))
        self.step = found[1]["step"] if found else 0
        self._enter(next(n for n, end in enumerate(ends) if max(self.step, 1) <= end))
        if found:
            distributed.load_tensors(self.model.tensors(), found[0], self.ranks)
            if self.model.scaler.is_enabled():
                self.model.scaler.load_state_dict(found[1]["scaler"])
            self.progress.say(f"going on at step {self.step} of {steps}")
        place, share = self.run.path / "quarantine.jsonl", self.arguments.max_unreadable
        self.quarantine = Quarantine(place, share, len(self.source))
        self._before = self.ranks.from_first(self._begin)
        self.watch.begin(self.model, steps, self.progress.say)

    def _begin(self) -> float:
        """Puts the directory in order; the seconds of the sessions before."""
        self.run.tidy()
        self.run.rewind(self.step)
        began = teachers.unchanged(self.run.record.get("initial", {}), self.model.initial)
        self.run.note(steps=self.steps, initial=began)
        logged = self.run.metrics()
        return logged[-1]["seconds"] if logged else 0.0

    def _enter(self, stage: int) -> None:
        """Builds views, graph and wrappers of a stage; the weights come from the stage before, if there was one."""
        if stage == self.stage:
            return
        before = self.model if self.stage >= 0 else None
        self.stage = stage
        self.model = Model(self.page, self.stages[stage][1], self.arguments, self.ranks)
        if before is not None:
            self.model.adopt(before)
            self.model.method.begin()
            self.watch.enter(self.model.config)

    def _deliveries(self, first: int, last: int) -> Iterator[Delivery]:
        workers = self.arguments.workers
        if workers is None:  # enough to feed a GPU; beside a CPU's own training one is all that helps
            workers = min(8, torch.get_num_threads()) if self.ranks.device.type == "cuda" else 1
        return loader(
            self.source, self.order, first_step=first, last_step=last, batch=self.config.batch,
            accumulate=self.config.accumulate, rank=self.ranks.rank, world=self.ranks.world, workers=workers,
            pin=self.ranks.device.type == "cuda", tokenize=self.tokenize,
        )  # fmt: skip

    def _batches(self, deliveries: Iterator[Delivery], note: bool = False) -> Iterator[Batch]:
        """Views on the device, in order; the time spent waiting for data is counted on the way."""
        config = self.model.config
        while True:
            began = time.monotonic()
            delivery = next(deliveries, None)
            self.progress.waited += time.monotonic() - began
            if delivery is None:
                return
            if note:
                self.quarantine.note(delivery)
                self.delivered = delivery.batch.get("pixels") if self.watch.due(delivery.step + 1) else None
            yield self._views(config, delivery.batch, delivery.step)

    def _views(self, config: Training, batch: Batch, step: int) -> Batch:
        batch = {
            name: value.to(self.ranks.device, non_blocking=True) if name in ON_DEVICE else value
            for name, value in batch.items()
        }
        return self.page.views(config, batch, Draws(config.seed, step, batch["key"], batch["seen"], batch["place"]))

    def train(self, requests: dict[str, bool]) -> None:
        """Steps to the end, stage by stage; saves now and then, at the end, and when asked to stop."""
        self.progress.begin(self.step, self._before)
        self._saved = time.monotonic()
        for stage, (end, _) in enumerate(self.stages):
            if self.step >= end or self.watch.ended:
                continue
            self._enter(stage)
            batches = self._batches(self._deliveries(self.step, end), note=True)
            while self.step < end and not self.watch.ended:
                metrics = self.model.step(batches, self.step / self.steps)
                self.step += 1
                better = self._log(metrics)
                stop, due = divmod(self.ranks.highest(2 * requests["stop"] + self._due()), 2)
                if self._turn() or stop or due or better or self.step == self.steps:
                    self._values(metrics)  # never save a model that is no longer finite
                    self._save()
                if better:
                    self.ranks.from_first(self.watch.keep)
                if stop and self.step < self.steps:
                    raise self.ranks.shared(
                        SaccadeError(f"stopped on request at step {self.step} of {self.steps}, and saved",
                                     hint="the same command goes on", code=75))  # fmt: skip

    def _turn(self) -> bool:
        """After what was seen of a step: whether it was answered by going another way, which is then saved."""
        return False

    def _due(self) -> bool:
        every = self.arguments.save_every
        if every.endswith("m"):
            return self.ranks.first and time.monotonic() - self._saved > 60 * float(every[:-1])
        return self.step % int(every) == 0

    def _save(self) -> None:
        facts = {"scaler": self.model.scaler.state_dict(), "fingerprint": self.run.record["data"]["fingerprint"]}
        self.run.save(
            self.step, facts, lambda path: distributed.save_tensors(self.model.tensors(), path, self.ranks),
            self.ranks, best=self.watch.best["step"] if self.watch.best else None)  # fmt: skip
        self._saved = time.monotonic()

    def _values(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means over ranks; raises `SaccadeError` when the loss is no number."""
        values = dict(zip(metrics, self.ranks.mean([float(value) for value in metrics.values()]), strict=True))
        if not math.isfinite(values["loss"]):
            self.ranks.from_first(lambda: self.watch.diverged(self.step, values["loss"]))
        return values

    def _log(self, metrics: dict[str, Tensor]) -> bool:
        """The line of a step that has one, on the screen and in metrics.jsonl; whether its evaluation is the best."""
        watched = self.watch.due(self.step)
        if not (watched or self.step % self.arguments.log_every == 0 or self.step in (1, self.steps)):
            return False
        values = self._values(metrics)
        seen = self.watch.see(self.model, self.step, self.delivered) if watched else {}
        if self.ranks.first:
            entry = {"step": self.step, **values, **self.progress.figures(self.step),
                     "unreadable": len(self.quarantine), **seen}  # fmt: skip
            self.run.log(entry)
            self.progress.tell(entry, self.steps)
            self.watch.judge(entry)
        return self.watch.improves({"step": self.step, **values, **seen})

    def finish(self) -> Run:
        """Writes the backbone, what came out, and the report; every rank gets the finished run."""
        tensors = distributed.whole(self.model.method.state_dict())
        encoder = self.watch.gather(self.model)
        self.ranks.from_first(lambda: self._conclude(encoder, tensors))
        return self.run

    def _conclude(self, encoder: Encoder | None, tensors: dict[str, Tensor]) -> None:
        scores = None
        if not self.run.summary:
            scores = self._hand_over(encoder, tensors)
            self.run.note(summary=self._summary(scores))
        if not (self.run.path / report.REPORT).exists():
            shown = report.shown_by(self.model.page, self.model.config, self.source, tensors, self.tokenize)
            report.write_run(self.run, shown=shown, encoder=encoder, source=self.source, scores=scores)

    def _hand_over(self, encoder: Encoder | None, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Writes what comes out; the scores on labelled pictures, if there are any."""
        self.watch.save(tensors)
        return self.watch.examine(encoder) if encoder is not None else None

    def _summary(self, scores: dict[str, Any] | None) -> dict[str, Any]:
        logged = self.run.metrics()
        tail, last = [entry["loss"] for entry in logged[-max(1, len(logged) // 10) :]], logged[-1]
        evaluations = [{"step": entry["step"], **entry["eval"], "part": "held out of train"}
                       for entry in logged if "eval" in entry]  # fmt: skip
        if scores is not None:
            evaluations.append({"step": self.step, "knn": scores["knn"], "linear": scores["linear"], "part": "test"})
        return {
            "run": str(self.run.path), "recipe": self.arguments.recipe, "arch": self.config.arch, "steps": self.step,
            "seconds": last["seconds"], "images_per_second": last["images_per_second"],
            "data_wait": waited(logged), "loss": sum(tail) / len(tail), "eval": evaluations, "best": self.watch.best,
            "health": self.watch.monitor.summary(), "checkpoint": str(self.run.checkpoints / str(self.step)),
            "report": str(self.run.path / report.REPORT),
            "data_fingerprint": self.run.record["data"]["fingerprint"], "quarantined": len(self.quarantine),
            "memory_gb": last["memory_gb"],
        }  # fmt: skip

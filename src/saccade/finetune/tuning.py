"""Backbone and head moved together, through the one loop: low-rank additions (LoRA) or all weights.

The head begins as it was fitted to frozen features, so that the first gradients do not tear those down (LP-FT, arXiv
2202.10054). Each epoch is examined on what is held out of train, and the best one is handed over.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import augment, distributed, lora, optim
from saccade.data import Batch, Sample, Source
from saccade.distributed import Ranks
from saccade.draws import Draws, hash64
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.finetune.frozen import crops
from saccade.finetune.predicting import outputs as outputs_of
from saccade.finetune.task import Examples, Head, Task
from saccade.finetune.tuned import Tuned, load, prepared
from saccade.frozen import Kept
from saccade.norm import BatchNorm
from saccade.optim import Group
from saccade.recipe import Method, Recipe, Training
from saccade.run import Run, holding, stop_requests
from saccade.settings import FinetuneArguments, Looking, PretrainArguments, TuningSettings
from saccade.train import Pretraining
from saccade.watch import Watch

LOOKS = 30
"""Evaluations, at most."""


@dataclass(frozen=True)
class Chosen(Source):
    """Some rows of a source: those that are learned from."""

    source: Source
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.rows[index]]

    def key(self, index: int) -> str:
        return self.source.key(self.rows[index])

    def label(self, index: int) -> str | None:
        return self.source.label(self.rows[index])

    def group(self, index: int) -> str | None:
        return self.source.group(self.rows[index])

    def content(self, index: int) -> bytes:
        return self.source.content(self.rows[index])

    def size(self, index: int) -> int:
        return self.source.size(self.rows[index])

    def origin(self, index: int) -> str:
        return self.source.origin(self.rows[index])


class Joint(Method):
    """A backbone and the head on it; the loss is the task's. `mean` is their slow average, where one is wanted."""

    mean: nn.ModuleDict | None

    def __init__(
        self, config: TuningSettings, backbone: Any, teachers: dict[str, nn.Module], *, page: Task, head: Head,
        settings: Any, facts: Mapping[str, Any], rank: int | None, fresh: bool,
    ):  # fmt: skip
        super().__init__(config, backbone, teachers)
        self.config, self.settings, self.facts, self.fresh = config, settings, facts, fresh
        found = page.part("loss")
        assert found is not None
        self._loss, self._chance = found, page.part("chance")
        if rank:
            lora.add(backbone, rank, config.seed)
        self.live = nn.ModuleDict({"backbone": backbone, "head": copy.deepcopy(head).requires_grad_(True)})
        self.mean = copy.deepcopy(self.live).requires_grad_(False) if config.average else None
        self.train()

    def train(self, mode: bool = True) -> Joint:
        """Sets the mode of all but batch norms that have learned their statistics from more than a few pictures."""
        super().train(mode)
        for part in self.live["backbone"].modules() if not self.fresh else ():
            if isinstance(part, BatchNorm):
                part.eval()
        return self

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The task's loss."""
        head: Any = self.live["head"]
        outputs = head(head.features(self.live["backbone"], batch["images"]))
        return self._loss(outputs.float(), batch["targets"], self.settings, self.facts), {}

    def chance(self) -> dict[str, float]:
        """The loss of who tells nothing apart: only beyond it is a fitted head's first loss one to rise from."""
        return {} if self._chance is None else {"loss": self._chance(self.facts)}

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """The average follows; at first it keeps less, so that it forgets where it began."""
        if self.mean is not None:
            kept = torch.minimum(torch.full_like(t, self.config.average), t * 10)
            optim.average(self.mean, self.live, 1 - kept)

    def groups(self, t: float) -> list[Group]:
        """Layer decay on the backbone; the head at its own rate."""
        found = []
        decay, layers = self.config.weight_decay, self.config.layer_decay
        for group in optim.default_groups(self, self.live["backbone"], decay, layers):
            own = {name: x for name, x in group.parameters.items() if name.startswith("live.head.")}
            rest = {name: x for name, x in group.parameters.items() if name not in own}
            found += [Group(rest, group.lr_scale, group.weight_decay)] if rest else []
            found += [Group(own, self.config.head_rate, group.weight_decay)] if own else []
        return found

    @property
    def handed(self) -> nn.ModuleDict:
        """What comes out."""
        return self.live if self.mean is None else self.mean

    def encoder(self) -> nn.Module:
        """The backbone, or its average."""
        return self.handed["backbone"]


class Watching(Watch):
    """Examines what is held out of train, with the head; the best evaluation is the one to keep."""

    def __init__(
        self, arguments: PretrainArguments, source: Source, run: Run, ranks: Ranks, *, start: Tuned,
        examples: Examples, settings: Any, config: TuningSettings,
    ):  # fmt: skip
        super().__init__(arguments, source, run, ranks)
        self.start, self.examples, self.settings, self.tuning = start, examples, settings, config
        self._idle = 0

    def _add_words(self, method: Method) -> None:
        """The head goes with the encoder: it is gathered, restored and written beside it."""
        assert isinstance(method, Joint) and self.encoder is not None
        self.encoder.preprocess = self.start.encoder.preprocess
        self.head = cast(Head, copy.deepcopy(method.handed["head"]).eval())
        self.encoder.add_module("head", self.head)
        inner = {id(tensor): name for name, tensor in method.handed["head"].state_dict(keep_vars=True).items()}
        held = method.state_dict(keep_vars=True).items()
        self._names |= {f"head.{inner[id(tensor)]}": name for name, tensor in held if id(tensor) in inner}

    def _record(self, config: Training) -> dict[str, Any]:
        known = self.run.record
        return {"arch": config.arch or None, "licence": known["initial"].get("licence"), "data": known["data"],
                "preprocess": prepared(self.start.encoder.preprocess), "initial": known["initial"]}  # fmt: skip

    def schedule(self) -> set[int]:
        """The end of every epoch, or some ends spread evenly; and the start."""
        epoch = max(1, round(len(self.source) / self.tuning.batch))
        count = max(1, min(LOOKS, round(self.steps / epoch)))
        return {1} | {max(1, round(n * self.steps / count)) for n in range(1, count + 1)}

    @property
    def ended(self) -> bool:
        """Whether nothing better is to be hoped for."""
        return self._idle >= self.tuning.patience

    def evaluated(self, encoder: Encoder) -> dict[str, Any]:
        """The task's score of what is held out."""
        outputs, targets = looked_at(encoder, self.head, self.start.task, self.examples)
        score = self.start.task.part("score")
        assert score is not None
        found: dict[str, float] = score(outputs, targets, self.settings)
        return found

    def improves(self, entry: dict[str, Any]) -> bool:
        """Whether this line holds the best evaluation; of equal ones the first with the lower loss."""
        found = entry.get("eval")
        if not found:
            return False
        name = next(iter(found))
        value = (found[name], -found.get("loss", 0.0))
        if self.best is not None and value <= (self.best["value"], -self.best["loss"]):
            self._idle += 1
            return False
        self._idle = 0
        self.best = {"step": entry["step"], "measure": f"{name} of what is held out of train", "value": value[0],
                     "loss": -value[1]}  # fmt: skip
        return True

    def keep(self) -> None:
        """Writes `best/`, backbone and head."""
        super().keep()
        assert self.encoder is not None
        Tuned(self.encoder, self.head, self.start.task, self.examples.facts).save_head(self.run.path / "best")


def looked_at(encoder: Encoder, head: Head, page: Task, examples: Examples) -> tuple[Tensor, Tensor]:
    """Outputs and targets of what is held out."""
    rows, found, tally = list[int](), list[Tensor](), page.part("tally")
    for said in outputs_of(encoder, head, examples.source, examples.held.tolist(), []):
        rows += said.rows
        outputs = zip(said.rows, said.outputs, strict=True)
        found += [
            one.float().cpu() if tally is None else tally(one, examples.targets[row], examples.facts)
            for row, one in outputs
        ]
    if not rows:
        raise SaccadeError("no picture that is held out of train can be read", hint="look at the files", code=1)
    if tally is not None:
        return torch.stack(found), torch.tensor(rows)
    stack = page.part("stack")
    assert stack is not None
    return torch.stack(found), stack([examples.targets[row] for row in rows], examples.facts)


class Tuning(Pretraining):
    """A run of the one loop whose method is a backbone with a head on it."""

    watch: Watching

    def __init__(
        self, asked: FinetuneArguments, config: TuningSettings, start: Tuned, examples: Examples, settings: Any,
        said: dict[str, Any], record: dict[str, Any], ranks: Ranks,
    ):  # fmt: skip
        self._said, self._start, self._examples, self._initial = said, start, examples, record
        self.watching = functools.partial(
            Watching, start=start, examples=examples, settings=settings, config=config
        )  # fmt: skip
        page = _page(asked, start, examples, settings, record)
        source = Chosen(examples.source, examples.train.tolist())
        arguments = PretrainArguments(
            data=(asked.data,), recipe="finetune", out=asked.out, workers=asked.workers, threads=asked.threads,
            save_every=config.save_every, log_every=config.log_every, precision=config.precision,
        )  # fmt: skip
        super().__init__(page, config, arguments, [source], ranks)

    def _asked(self) -> dict[str, Any]:
        return self._said

    def finish(self) -> Run:
        """The run, at its end; what comes out lies in `best/`."""
        return self.run


def _page(asked: FinetuneArguments, start: Tuned, examples: Examples, settings: Any, record: dict[str, Any]) -> Recipe:
    """A recipe that no file holds: views with targets, and the joint method."""
    rows = {hash64(examples.keys[row]): row for row in examples.train.tolist()}
    own, stack = start.task.part("views"), start.task.part("stack")
    assert stack is not None

    def views(config: TuningSettings, batch: Batch, draws: Draws) -> Batch:
        targets = [examples.targets[rows[key]] for key in batch["key"].tolist()]
        if own is not None:
            made: Batch = own(settings, config, batch, draws, targets)
            return made
        drawn = crops(settings if isinstance(settings, Looking) else Looking(), batch["size"], draws)
        images = augment.render(batch["pixels"], drawn, config.image_size)
        made = {"images": images, "targets": stack(targets, examples.facts).to(images.device)}
        return mixed(made, config.mixup, draws, len(examples.facts.get("classes", ()))) if config.mixup else made

    network = copy.deepcopy(cast(nn.Module, start.encoder.backbone)).cpu()
    method = functools.partial(
        Joint, page=start.task, head=start.head.cpu(), settings=settings, facts=examples.facts,
        rank=None, fresh=asked.from_scratch,
    )  # fmt: skip

    def made(config: TuningSettings, backbone: Any, teachers: dict[str, nn.Module]) -> Joint:
        return method(config, backbone, teachers, rank=config.rank if asked.mode == "lora" else None)

    return Recipe("finetune", TuningSettings, views, made, lambda config: [(1.0, config)], {},
                  network=Kept(network, record))  # fmt: skip


def mixed(batch: Batch, strength: float, draws: Draws, classes: int) -> Batch:
    """Each picture with a part of its neighbour in the batch, and their targets in the same parts.  arXiv 1710.09412"""
    address = int(draws.step("mixup").shared(1)[0] * 2**24)
    part = float(np.random.default_rng(address).beta(strength, strength))
    targets = batch["targets"]
    if not targets.is_floating_point():
        targets = F.one_hot(targets, classes).to(batch["images"].dtype)
    return {
        name: part * x + (1 - part) * x.roll(1, 0) for name, x in (("images", batch["images"]), ("targets", targets))
    }


def tune(
    start: Tuned, examples: Examples, settings: Any, asked: FinetuneArguments, config: TuningSettings,
    said: dict[str, Any], record: dict[str, Any],
) -> tuple[Run, Tuned, dict[str, Any]]:  # fmt: skip
    """Trains to the end, or to where it stopped getting better; the best model, and what was chosen on the way.

    Raises `SaccadeError`; with `code` 75 when it was stopped on request.
    """
    whole = config.model_copy(update={
        "arch": str(start.encoder.record.get("arch") or ""), "image_size": start.encoder.preprocess.crop,
        "channels": start.encoder.backbone.config.channels, "seed": asked.seed,
        "batch": config.fewer(len(examples.train)),
    })  # fmt: skip
    with distributed.ranks() as ranks, holding(), stop_requests() as requests:
        run = Tuning(asked, whole, start, examples, settings, said, record, ranks)
        run.train(requests)
        found = run.finish()
    model = load(found.path / "best")
    model = Tuned(
        model.encoder.to(start.encoder.device), model.head.to(start.encoder.device), model.task, examples.facts
    )
    calibrate = model.task.part("calibrate")
    chosen: dict[str, Any] = {}
    if calibrate is not None:
        outputs, targets = looked_at(model.encoder, model.head, model.task, examples)
        chosen = calibrate(model.head, outputs, targets, settings)
    return found, model, {**chosen, **_way(found, examples, whole)}


def _way(run: Run, examples: Examples, config: TuningSettings) -> dict[str, Any]:
    """How training went."""
    lines = run.metrics()
    best = run.record.get("best") or {}
    epoch = len(examples.train) / config.batch
    evaluated = [{"epoch": round(one["step"] / epoch, 2), **one["eval"]} for one in lines if one.get("eval")]
    return {
        "steps": lines[-1]["step"], "epochs": round(lines[-1]["step"] / epoch, 2), "batch": config.batch, "best": best,
        "images_per_second": lines[-1].get("images_per_second"), "evaluations": evaluated,
    }  # fmt: skip

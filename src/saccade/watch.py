"""What is looked at while a run trains: health and live evaluation, on a gathered copy of the encoder.

Nothing here draws a random number or touches the model that is trained: a run that is watched has the same weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from saccade import distributed, health, lora, pairing, reading, weights
from saccade.backbone import Backbone
from saccade.data import Source
from saccade.distributed import Ranks
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate
from saccade.evaluate.live import Live
from saccade.model import Model, build
from saccade.recipe import Method, Training
from saccade.run import Run, verify
from saccade.settings import PretrainArguments
from saccade.text import Pairing
from saccade.tokenizer import Tokenizer
from saccade.words import NAMES

EVALUATIONS = 10
"""How often a run is evaluated on labelled pictures, the last time at its end; before that once, when the rate of its
first step was 0: the untrained network, without which the others say little."""


class Watch:
    """Looks at a run: every so many steps at its health, ten times at labelled pictures if there are any.

    A look sees a hundredth of the pictures that are trained on until the next one. All ranks look together, because a
    sharded encoder is gathered; the first one measures.
    """

    measure = "linear"
    """The number that says which checkpoint is best: the linear probe on the pictures that are held out of train."""

    def __init__(self, arguments: PretrainArguments, source: Source, run: Run, ranks: Ranks):
        self.arguments, self.source, self.run, self.ranks = arguments, source, run, ranks
        self.best: dict[str, Any] | None = None
        self.encoder: Encoder | None = None

    def begin(self, model: Model, steps: int, say: Callable[[str], None]) -> None:
        """A session begins; what was seen before is read from the run. Raises `SaccadeError` for bad labelled data."""
        config, self.page = model.config, model.page
        self._say, self.steps = say, steps
        self._count = min(256, max(64, config.batch // 2))
        self._every = max(50, -(-75 * self._count // config.batch))
        self._rows = min(10_000, max(1_000, steps * config.batch // 100))
        self._evaluations = self.schedule()
        warmup = round(config.warmup * steps)
        self._special = {1, warmup, steps}  # the untrained network, the highest rate, the end
        self.monitor = health.Monitor(model.method.chance(), warmup, len(self.source))
        self.enter(config)
        self.best = self.ranks.from_first(self._recall)

    @property
    def ended(self) -> bool:
        """Whether the run ends before its last step."""
        return False

    def schedule(self) -> set[int]:
        """The steps that are evaluated."""
        count = EVALUATIONS if self.arguments.eval is not None else -1
        return {max(1, round(n * self.steps / EVALUATIONS)) for n in range(count + 1)}

    def enter(self, config: Training) -> None:
        """A stage begins: a copy of its encoder, and pictures at its size."""
        method, _ = build(self.page, config, None)
        network = method.encoder()
        self._names = {f"backbone.{inner}": name for inner, name in _held(method, network).items()}
        self._more = {name: (other, _held(method, other)) for name, other in method.encoders().items()}
        self.encoder, self._pictures = None, None
        if isinstance(network, Backbone):
            lora.merge(network)
            self.encoder = Encoder(network, self._record(config)).eval()
            self._add_words(method)
            self.ranks.from_first(self._open)
        self._texts = None if self.encoder is not None else self._alone(method)

    def _add_words(self, method: Method) -> None:
        """What is learned of texts is a part of the encoder."""
        words = method.words()
        if words is not None and self.encoder is not None:
            self.encoder.text = words.pairing(Tokenizer.load(self.run.path / reading.FOLDER)).eval()
            self._names |= {f"text.{NAMES.get(inner, inner)}": name for inner, name in _held(method, words).items()}

    def _alone(self, method: Method) -> tuple[Pairing, dict[str, str]] | None:
        """What is learned of texts where there is no encoder of pictures, and the names it has in the method."""
        words = method.words()
        if words is None:
            return None
        if self.arguments.eval is not None:
            raise SaccadeError(
                "texts are examined when the run has ended", path="--eval", hint="saccade evaluate RUN LABELLED"
            )
        return words.pairing(Tokenizer.load(self.run.path / reading.FOLDER)).eval(), _held(method, words)

    def _record(self, config: Training) -> dict[str, Any]:
        known = self.run.record
        return {"recipe": self.arguments.recipe, "arch": config.arch, "licence": known["initial"].get("licence"),
                "derived_from": known["initial"].get("derived_from", []),
                "data": known["data"], "initial": known["initial"]}  # fmt: skip

    def _open(self) -> None:
        """The pictures to look at, and the labelled ones."""
        assert self.encoder is not None
        self.encoder.to(self.ranks.device)
        self._pictures = health.choose(self.source, self.encoder.preprocess, self._count)
        self._distinct = 0 if self._pictures is None else health.distinct(self._pictures)
        if self._evaluations and self.arguments.eval is not None:
            self._live = self.labelled(self.encoder.preprocess)

    def labelled(self, preprocess: Preprocess) -> Live:
        """The labelled pictures to look at."""
        assert self.arguments.eval is not None
        return Live(self.arguments.eval, self.arguments.group_by, preprocess, self._rows)

    def due(self, step: int) -> bool:
        """Whether this step is looked at."""
        return step % self._every == 0 or step in self._special or step in self._evaluations

    def see(self, model: Model, step: int, delivered: Shaped[Tensor, "b t c h w"] | None) -> dict[str, Any]:
        """`health` and `eval` of a step that is due; `delivered` are the pictures of its batch."""
        if self.encoder is not None:
            self.gather(model)
        return self.ranks.from_first(lambda: self._measure(step, delivered))

    def gather(self, model: Model) -> Encoder | None:
        """The encoder of the method that is trained, a copy, on every rank; None where it takes no pictures."""
        if self.encoder is None:
            return None
        live = model.method.state_dict()
        tensors = distributed.whole({inner: live[name] for inner, name in self._names.items()})
        self._fill(tensors)
        return self.encoder

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        """Puts tensors into the copy of the encoder; what compares texts has one element there, and no axis."""
        assert self.encoder is not None
        own, found = self.encoder.state_dict(), lora.merged(tensors)
        self.encoder.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in found.items()})

    def _measure(self, step: int, delivered: Tensor | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if delivered is not None:
            some = delivered[:256, 0]
            found |= {"batch": min(len(some), len(self.source)), "batch_distinct": health.distinct(some)}
        if self.encoder is None:
            return {"health": found}
        if self._pictures is not None:
            found |= health.look(self.encoder, self._pictures)
            found |= {"pictures": len(self._pictures), "distinct": self._distinct}
        if step not in self._evaluations:
            return {"health": found}
        return {"health": found, "eval": self.evaluated(self.encoder)}

    def evaluated(self, encoder: Encoder) -> dict[str, Any]:
        """The `eval` of a line."""
        return self._live.measure(encoder)

    def examine(self, encoder: Encoder) -> dict[str, Any] | None:
        """The result of `evaluate` on the labelled data, which reads test; None where there are none."""
        if self.arguments.eval is None:
            return None
        tasks, group_by = ("knn", "linear"), self.arguments.group_by
        return evaluate(encoder, self.arguments.eval, tasks=tasks, group_by=group_by)

    def judge(self, entry: dict[str, Any]) -> None:
        """Takes in a line of metrics.jsonl; a new verdict is said and recorded."""
        if self.monitor.add(entry):
            finding = self.monitor.finding
            self._say(f"health at step {entry['step']}: {finding}")
            self.run.note(health=self.monitor.summary())

    def diverged(self, step: int, loss: float) -> None:
        """Records the end of a run whose loss is no number, and raises it as a `SaccadeError`."""
        self.monitor.add({"step": step, "loss": loss})
        self.run.note(health=self.monitor.summary())
        raise SaccadeError(
            f"the loss is {loss} at step {step}: the run diverged",
            path=self.run.path,
            hint="lower --lr or lengthen --warmup; the last checkpoint is from before",
            code=1,
        )

    def improves(self, entry: dict[str, Any]) -> bool:
        """Whether this line holds the best evaluation so far; then `best` says so."""
        value = entry.get("eval", {}).get(self.measure)
        if value is None or (self.best is not None and value <= self.best["value"]):
            return False
        self.best = {"step": entry["step"], "measure": f"{self.measure}, on a part held out of train", "value": value}
        return True

    def keep(self) -> None:
        """Writes `best/`, what `load` reads, and marks the best checkpoint in the record."""
        assert self.encoder is not None and self.best is not None
        record = {**self.encoder.record, "steps": self.best["step"]}
        weights.save_backbone(self.run.path / "best", self.encoder.backbone, record, self.encoder.text)
        self.run.note(best=self.best)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Writes `backbone/` at the end, and what else comes out as `backbones/NAME/`; `tensors` are the method's."""
        folder, encoder = self.run.path / "backbone", self.encoder
        if self._texts is not None:
            texts, names = self._texts
            texts.load_state_dict({inner: tensors[held] for inner, held in names.items()}, strict=False)
            pairing.save(folder / pairing.FOLDER, texts)
        if encoder is None:
            return
        encoder.record["steps"] = self.steps
        weights.save_backbone(folder, encoder.backbone, encoder.record, encoder.text)
        for name, (network, names) in self._more.items():
            network.load_state_dict({inner: tensors[held] for inner, held in names.items()})
            folder = self.run.path / "backbones" / name.replace("/", "-")
            weights.save_backbone(folder, network, encoder.record | {"arch": name})

    def _recall(self) -> dict[str, Any] | None:
        """What the lines say of health and of the best checkpoint. A `best/` of another step is written anew."""
        for entry in self.run.metrics():
            self.monitor.add(entry)
            self.improves(entry)
        kept = self.run.path / "best"
        if self.best is not None and _steps_of(kept) != self.best["step"]:
            try:
                self._restore(self.run.checkpoints / str(self.best["step"]))
                self.keep()
            except SaccadeError:  # it was damaged, and training went back to before it
                self.best = None
        if self.best is None:
            shutil.rmtree(kept, ignore_errors=True)
        if self.run.record.get("best") != self.best:
            self.run.note(best=self.best)
        if "health" in self.run.record:
            self.run.note(health=self.monitor.summary())
        return self.best

    def _restore(self, checkpoint: Path) -> None:
        """The copy of the encoder as a checkpoint has it."""
        verify(checkpoint)
        entries = distributed.metadata(checkpoint).state_dict_metadata.items()
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
        distributed.load_tensors(tensors, checkpoint, Ranks(0, 1, torch.device("cpu")))
        self._fill({inner: tensors[f"method/{name}"] for inner, name in self._names.items()})


def _steps_of(backbone: Path) -> int | None:
    """Of how many steps a saved backbone is."""
    try:
        return int(json.loads((backbone / weights.CONFIG).read_text(encoding="utf-8"))["record"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _held(method: Method, network: nn.Module) -> dict[str, str]:
    """By the names of a network's tensors those that they have in the method that holds it."""
    inner = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
    held = method.state_dict(keep_vars=True).items()
    return {inner[id(tensor)]: name for name, tensor in held if id(tensor) in inner}

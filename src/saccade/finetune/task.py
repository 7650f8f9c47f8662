"""What a task is: a page under `tasks/` whose file name is the registry, `--task classification`.

A page has, by these names (pages import `saccade.finetune.task`, never `saccade.finetune` nor each other):

    class Settings(TaskSettings)                      its own flags: frozen, every one with a description
    def read(data, encoder, asked, settings)          -> Examples: rows to learn from, to choose by, to be examined on
    def see(encoder, examples, settings, asked)       -> Seen: what is computed once of all pictures
    def fit(seen, examples, settings)                 -> Fitted: the head on frozen features, where tuning begins too
    class Head(task.Head)                             features to outputs, outputs to answers, to words and files
    def measure(told, seen, examples, settings)       -> dict of scores of test in percent, beside `baselines`

and where the backbone may move too (`--mode lora` and `full`; a page without `loss` refuses them, `FROZEN` says why):

    def loss(outputs, targets, settings, facts)       -> Tensor: the mean loss of a batch
    def stack(targets, facts)                         -> Tensor: the targets of a batch, from `Examples.targets`
    def score(outputs, targets, settings)             -> dict: of the held-out part; the first number chooses, high wins
    def views(settings, config, batch, draws, targets) -> Batch with `images` and `targets`; random crops if absent

and, if it likes,

    def chance(facts)                                 -> float: the loss of who tells nothing apart
    def sections(told, examples, result) -> list[Section]   for the report
    def known(source, facts) -> (targets, unknown)    what `predict` finds of labels in DATA: None where there is none,
                                                      and how often each class came that was never learned
    def scores(told, facts) -> dict                   of what was told of pictures with a target, for `predict`
    def again(head, seen, rows) -> (rows, outputs)    frozen mode: outputs of rows of which `seen` holds enough
    def fresh(encoder, examples, settings) -> Fitted  a head that has learned nothing, for weights that have not either
    def tally(output, target, facts) -> Tensor        of a picture held out, what `score` reads in place of its outputs
    def opened(data, encoder, facts) -> (source, targets, unknown) | None   what `predict` reads where `known` cannot
    def calibrate(head, outputs, targets, settings) -> dict    after tuning, by the held-out part: a temperature
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from saccade.data import Source
from saccade.embed import Look, Tokens
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, nearest
from saccade.settings import FinetuneArguments, Settings
from saccade.vit import Features, ViT


class TaskSettings(Settings):
    """The flags of a task: each page extends it with its own."""


class Aside(tuple[str, str]):
    """A sample that takes no part, and why: key, reason."""

    __slots__ = ()

    def __new__(cls, key: str, reason: str) -> Aside:
        return super().__new__(cls, (key, reason))


@dataclass(frozen=True)
class Examples:
    """Labelled samples of a source. Rows are those of the source; no group is in two of `train`, `held`, `test`.

    `targets[row]` is what is to be learned of a row, None where nothing is known; `facts` say what targets are, for the
    head's config.json (`classes`, …). Whatever is odd is in `warnings`, and each sample that takes no part in `aside`.
    """

    source: Source
    keys: Sequence[str]
    targets: Sequence[Any]
    train: np.ndarray  # learned from
    held: np.ndarray  # held out of the train side: here penalties, temperatures and epochs are chosen
    test: np.ndarray  # examined once, at the end
    facts: Mapping[str, Any]
    groups: Sequence[str] | None = None
    split: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    aside: list[Aside] = field(default_factory=list)

    @property
    def learned(self) -> np.ndarray:
        """The whole train side."""
        return np.sort(np.concatenate([self.train, self.held]))

    def names(self, rows: np.ndarray) -> list[str]:
        """What must not be split, for each row: its group, or its own key."""
        named = self.keys if self.groups is None else self.groups
        return [named[row] for row in rows.tolist()]


@dataclass(frozen=True)
class Picture:
    """A picture that is told of. `size`: height and width as it was decoded (`Head.whole`: as it lies on disk)."""

    key: str
    size: tuple[int, int]
    target: Any = None
    group: str | None = None
    pixels: Shaped[Tensor, "c h w"] | None = None


class Head(nn.Module, ABC):
    """What stands on a backbone. Built again as `Head(**config)`; its state is saved as safetensors beside it."""

    tokens: Tokens = "all"
    """Which features it reads: `cls`, `patches` or `all`."""
    whole: ClassVar[bool] = False
    """Pictures are decoded as they lie on disk, not shrunk to twice what the encoder's own crop needs."""
    answers: ClassVar[tuple[str, ...]] = ("outputs",)
    """What leaves the model, by name: the outputs of its ONNX file."""

    def features(self, backbone: Any, images: Shaped[Tensor, "b c h w"]) -> Any:
        """What `forward` reads of pictures: features, or what else a `whole` head wants of a backbone."""
        plain = backbone(images, tokens=self.tokens) if isinstance(backbone, ViT) else backbone(images)
        return presented(backbone, plain)

    @abstractmethod
    def forward(self, features: Any, size: tuple[int, int] | None = None) -> Shaped[Tensor, "b ..."]:
        """Outputs, one row a picture: what `loss` reads. `size`: height and width of a map, where it makes one."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What builds one like it, as JSON; `state_dict` is loaded into that."""

    def answer(self, outputs: Shaped[Tensor, "b ..."]) -> tuple[Tensor, ...]:
        """What leaves the model, as `answers` names it: probabilities of logits, degrees of a scaled number."""
        return (outputs,)

    def look(self, look: Look, pixels: Sequence[Shaped[Tensor, "c h w"]]) -> Sequence[Tensor]:
        """Outputs of some pictures, as they were decoded. A head of maps slides windows here; others take this."""
        images = [look.encoder.preprocess(picture) for picture in pixels]
        if len({image.dtype for image in images}) > 1:
            images = [image if image.is_floating_point() else image.float() / 255 for image in images]
        return list(self(presented(look.encoder.backbone, look(torch.stack(images), tokens=self.tokens))))

    @abstractmethod
    def told(self, outputs: Sequence[Tensor], pictures: Sequence[Picture], folder: Path | None) -> list[dict[str, Any]]:
        """One JSON object a picture for predictions.jsonl, beside its key and group; files go into `folder`.

        Where a picture has a target, it is told too. Keys that begin with `_` are for `measure` alone and are not
        written: logits, counts of a mask.
        """


def presented(backbone: Any, features: Features) -> Features:
    """Features as heads read them: where a family pools in a way of its own, that vector is the class token."""
    if backbone.config.pooling in ("cls", "mean"):
        return features
    return features._replace(cls=backbone.embedding(features))


@dataclass(frozen=True)
class Fitted:
    """A head, and what the held-out part decided for it (pooling, penalty, temperature, scores): JSON."""

    head: Head
    chosen: Mapping[str, Any]


class Seen(Protocol):
    """What a page computes once of all pictures. `failures`: row of the source, key, reason."""

    @property
    def failures(self) -> list[tuple[int, str, str]]: ...


@dataclass(frozen=True)
class Task:
    """A page of `tasks/`, found by its file name."""

    name: str
    settings: type[TaskSettings]
    read: Callable[[Any, Encoder, FinetuneArguments, Any], Examples]
    see: Callable[[Encoder, Examples, Any, FinetuneArguments], Any]
    fit: Callable[[Any, Examples, Any], Fitted]
    head: Callable[..., Head]
    measure: Callable[[list[dict[str, Any]], Any, Examples, Any], dict[str, Any]]
    page: ModuleType

    def part(self, name: str) -> Callable[..., Any] | None:
        """What a page may have: `loss`, `chance`, `stack`, `score`, `views`, `sections`, `known`, `scores`, `again`,
        `fresh`, `tally`, `opened`, `calibrate`."""
        found: Callable[..., Any] | None = vars(self.page).get(name)
        return found

    @property
    def frozen_only(self) -> str | None:
        """Why the backbone cannot move, where it cannot."""
        reason: str | None = vars(self.page).get("FROZEN")
        return None if self.part("loss") else reason or "it learns on features that stand still"


def names() -> list[str]:
    """Every task there is."""
    from saccade.finetune import tasks

    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def find(name: str) -> Task:
    """The task of this name. Raises `SaccadeError` with the nearest name when there is none."""
    if name not in names():
        raise SaccadeError(f"there is no task {name!r}", path="--task", hint=nearest(name, names()))
    page = importlib.import_module(f"saccade.finetune.tasks.{name}")
    return Task(name, page.Settings, page.read, page.see, page.fit, page.Head, page.measure, page)

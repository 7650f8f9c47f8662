"""What a recipe is: a page under `recipes/` with `Config`, `views`, `Method` and, if wanted, `stages` and variants.

The file name is the registry. A variant is a public function of the page that returns a `Config`:
`--recipe mae:small_pictures` calls `small_pictures()` of `recipes/mae.py`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade import heads
from saccade.data import Batch
from saccade.errors import SaccadeError, nearest
from saccade.frozen import Kept
from saccade.optim import Group
from saccade.own import Own
from saccade.settings import (
    LENGTHS,
    Captioned,
    MaskedDistillation,
    MultiCrop,
    Prototyped,
    SelfDistillation,
    SigmoidPaired,
    SpreadDistillation,
    Training,
    Worded,
    checked,
    flag,
)  # fmt: skip
from saccade.text import Reader
from saccade.words import Words

__all__ = [
    "Captioned", "Coupled", "Evened", "Group", "MaskedDistillation", "Method", "MultiCrop", "Prototyped", "Recipe",
    "SelfDistillation", "SigmoidPaired", "SpreadDistillation", "Taught", "Training", "TwoTowers", "Worded", "configure",
    "find", "names",
]  # fmt: skip


class Method(nn.Module, ABC):
    """A training method: the loss is `forward`."""

    @abstractmethod
    def __init__(self, config: Any, backbone: nn.Module | None, teachers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.teachers = dict(teachers)  # in no module's place: neither trained, nor wrapped, nor in a checkpoint

    @abstractmethod
    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch at `t`, the part of training done, and what is worth logging."""

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """What follows an optimizer step: a teacher follows its student, centres move."""

    def begin(self) -> None:
        """What a stage begins with, after it has taken over the weights of the stage before."""

    @abstractmethod
    def encoder(self) -> nn.Module:
        """What evaluation, fine-tuning, search and export see: images to `Features`."""

    def words(self) -> Words | Reader | None:
        """What is learned of texts, which comes out beside the encoder, or is it; None where nothing is."""
        return None

    def bare(self) -> Method:
        """The recipe's own method: this one, or the one inside it."""
        return self

    def encoders(self) -> dict[str, nn.Module]:
        """What else comes out, by name: each is kept as `backbones/NAME` beside the encoder's `backbone`."""
        return {}

    def groups(self, t: float) -> list[Group] | None:
        """Parameters with their own learning rate, decay or clip group; None for the default grouping."""
        return None

    def chance(self) -> dict[str, float]:
        """What metrics are, by name, where nothing is told apart, such as a loss of ln K over K prototypes.

        It is the same in all stages. Where a loss has several parts, `cls_loss` stands for it.
        """
        return {}

    def show(self, batch: Batch) -> dict[str, Float[Tensor, "b c h w"]]:
        """Pictures in [0, 1] that the report shows beside the views, by caption: what this method makes of a batch."""
        return {}


class Taught(Method):
    """A method whose student learns the prototypes that a teacher sees: each a `backbone` with one head or more."""

    config: SelfDistillation
    teacher: nn.ModuleDict

    def encoder(self) -> nn.Module:
        """The teacher's backbone: it is ahead of the student's."""
        return self.teacher["backbone"]

    def chance(self) -> dict[str, float]:
        """ln K, of class tokens' answers and, where patches are hidden, of theirs; whole crops count as zero there."""
        whole, patches = (
            math.log(
                cast(heads.DINOHead, self.teacher[name if name in self.teacher else "head"]).last_layer.out_features
            )
            for name in ("head", "patch_head")
        )
        if not isinstance(self.config, MaskedDistillation):
            return {"loss": whole, "teacher_entropy": whole}
        found = {"cls_loss": whole, "teacher_entropy": whole}
        if self.config.masked and self.config.patch_weight:
            found |= {"patch_loss": self.config.masked * patches, "patch_entropy": patches}
        return found

    @property
    def assignment(self) -> Literal["centre", "sinkhorn"]:
        """How the teacher's answers are evened out."""
        kinds = [part.kind for part in self.modules() if isinstance(part, heads.Assignment)]
        return kinds[0] if kinds else "centre"


class Evened(Taught):
    """A method whose teacher's answers depend on all samples of a step together (Sinkhorn-Knopp).

    Under gradient accumulation the loop lets the teacher look at all micro-batches before the student learns of the
    first: the same answers as of one batch.
    """

    assign: heads.Assignments

    @abstractmethod
    def learn(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch at `t`, and what is worth logging."""

    def forward(
        self, batch: Batch, t: Float[Tensor, ""], ahead: bool = False
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss; or, `ahead` of it, nothing but the teacher's look at a micro-batch."""
        if not ahead:
            return self.learn(batch, t)
        self.assign.look(self.teacher, batch["globals"], batch["hide"])
        return torch.zeros_like(t), {}


class Coupled(Method):
    """A method whose loss compares the samples of a whole batch with each other.

    Under gradient accumulation the loop keeps the embeddings of all micro-batches, takes the loss of them together, and
    replays each micro-batch with the gradient that its embeddings got (GradCache, arXiv 2101.06983): the same loss.
    """

    beside: ClassVar[tuple[str, ...]] = ()
    """What of a batch `couple` reads beside the embeddings, one row a sample."""

    @abstractmethod
    def embed(self, batch: Batch, t: Float[Tensor, ""]) -> Float[Tensor, "b ..."]:
        """What the loss compares, one row a sample."""

    def see(
        self, batch: Batch, t: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, ""] | None, dict[str, Tensor]]:
        """Embeddings; the mean of what else each sample has to learn alone, if anything; what is worth logging of it.

        Under accumulation what is learned alone is meant over micro-batches, and computed in their replay only.
        """
        return self.embed(batch, t), None, {}

    @abstractmethod
    def couple(
        self, embeddings: Float[Tensor, "b ..."], t: Float[Tensor, ""], **beside: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of these embeddings and those of the other ranks, and what is worth logging."""

    def forward(
        self, batch: Batch, t: Float[Tensor, ""], gradient: Tensor | None = None, own: dict[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss; with a `gradient`, what has that gradient at the embeddings, and the loss of `alone` to be added.

        A `gradient` without axes asks for the `embeddings` only. `own` are gradients that the loss has at parameters
        themselves, by name, such as a temperature: what is returned has those too. They pass through here because only
        so they are averaged over ranks like all others.
        """
        if gradient is not None and not gradient.ndim:
            return gradient, {"embeddings": self.embed(batch, t).detach()}
        embeddings, alone, said = self.see(batch, t)
        if gradient is None:
            loss, metrics = self.couple(embeddings, t, **{name: batch[name] for name in self.beside})
            return loss if alone is None else loss + alone, metrics | said
        parameters = dict(self.named_parameters()) if own else {}
        terms = [(parameters[name] * direct).sum() for name, direct in (own or {}).items()]
        return sum(terms, (embeddings * gradient).sum()), said | ({} if alone is None else {"alone": alone})


class TwoTowers(Coupled):
    """A method that compares pictures with texts: a backbone, and beside it what it learns of words (`pairing`)."""

    beside = ("same",)
    backbone: Any
    pairing: Words

    def encoder(self) -> nn.Module:
        """The image tower."""
        return cast(nn.Module, self.backbone)

    def words(self) -> Words:
        """The text tower, and the ways into the space that both share."""
        return self.pairing

    def embed(self, batch: Batch, t: Float[Tensor, ""]) -> Float[Tensor, "b 2 d"]:
        """Pictures and texts in the shared space."""
        return cast(Tensor, self.pairing(self.backbone.pooled(batch["images"]), batch["tokens"]))


@dataclass(frozen=True)
class Recipe:
    """A page of `recipes/`, found by its file name.

    `switches` are fields of the backbone's config that stand before the recipe's own: where it goes on from another.
    `teachers` are loaded ones, for all that is built of this run; `network` is the user's own, where one was given,
    or what the run leaves as it is.
    """

    name: str
    config: type[Training]
    views: Callable[..., Batch]
    method: Callable[..., Method]
    stages: Callable[[Any], list[tuple[float, Any]]]
    variants: dict[str, Callable[[], Training]]
    switches: Mapping[str, Any] = field(default_factory=dict)
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    network: Own | Kept | None = None

    def configure(self, variant: str | None = None) -> Training:
        """The default settings, or a named variant's."""
        if variant is None:
            return self.config()
        if variant not in self.variants:
            hint = nearest(variant, self.variants) if self.variants else "it has no variants"
            raise SaccadeError(f"recipe {self.name!r} has no variant {variant!r}", hint=hint)
        return self.variants[variant]()


def names() -> list[str]:
    """Every recipe there is."""
    import saccade.recipes

    return sorted(module.name for module in pkgutil.iter_modules(saccade.recipes.__path__))


def _one_stage(config: Training) -> list[tuple[float, Training]]:
    return [(1.0, config)]


def _variants(page: ModuleType) -> dict[str, Callable[[], Training]]:
    found = inspect.getmembers(page, inspect.isfunction)
    return {
        name: function
        for name, function in found
        if function.__module__ == page.__name__
        and inspect.signature(function).return_annotation in ("Config", page.Config)
    }


def find(name: str) -> Recipe:
    """The recipe of this name. Raises `SaccadeError` with the nearest name when there is none."""
    if name not in names():
        raise SaccadeError(f"there is no recipe {name!r}", path="--recipe", hint=nearest(name, names()))
    page = importlib.import_module(f"saccade.recipes.{name}")
    stages = vars(page).get("stages", _one_stage)
    return Recipe(name, page.Config, page.views, page.Method, stages, _variants(page))


def configure(name: str, settings: Mapping[str, Any], *, also: Iterable[str] = ()) -> tuple[Recipe, Any]:
    """The recipe `NAME` or `NAME:VARIANT` and its config with these settings; the same for the command line and Python.

    A length that is given (steps, epochs or minutes) replaces the recipe's own. `also` are more right names, for the
    hint of a misspelt one. A `network` of the user's own stands in the place of `arch`. Raises `SaccadeError`.
    """
    name, _, variant = name.partition(":")
    recipe, settings = find(name), dict(settings)
    if (network := settings.pop("network", None)) is not None:
        own = Own.of(network)
        recipe, settings = replace(recipe, network=own), _named(own, settings)
    base = recipe.configure(variant or None)
    lengths = [flag(length) for length in LENGTHS if settings.get(length) is not None]
    if len(lengths) > 1:
        raise SaccadeError(f"{' and '.join(lengths)} exclude each other", path=lengths[0], hint="give one length")
    values = {field: getattr(base, field) for field in type(base).model_fields}
    if lengths:
        values.update(dict.fromkeys(LENGTHS))
    return recipe, checked(recipe.config, {**values, **settings}, also=also, owner=f"recipe {name}")


def _named(network: Own, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a network of the user's own as their `arch`."""
    if settings.get("arch", network.arch) != network.arch:
        raise SaccadeError("a network of your own is the architecture", path="arch", hint="leave it out")
    return {**settings, "arch": network.arch}

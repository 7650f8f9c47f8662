"""Frozen networks: one that students learn from, and one that a run leaves as it is, with a memory of what it saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saccade import distributed, heads
from saccade.errors import SaccadeError
from saccade.norm import Standard
from saccade.settings import MaskedDistillation, SelfDistillation, Training


class Teacher(nn.Module):
    """A frozen network that students learn from, which the verb loads and hands over; always in evaluation.

    `heads` are those that it was trained with, by name, `config` the settings of that run and `assignment` how its
    answers were evened out, where it is a run that has them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module] | None = None,
        config: SelfDistillation | None = None,
        assignment: Literal["centre", "sinkhorn"] = "centre",
    ):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(dict(heads or {}))
        self.config, self.assignment = config, assignment
        self.requires_grad_(False).eval()
        size, channels = backbone.config.image_size, backbone.config.channels
        vector, patches = self(torch.zeros(1, channels, size, size))
        self.widths = {"head": vector.shape[1], "patch_head": patches.shape[1]}

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c s s"]) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b d h w"]]:
        """The one vector and the map of patches; pictures are resized to the nearest multiple of its own patch."""
        side, stride = images.shape[-1], self.backbone.stride
        fitting = max(1, round(side / stride)) * stride
        if fitting != side:
            images = F.interpolate(images, size=fitting, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 1)
        seen = self.backbone(images)
        return self.backbone.embedding(seen), seen.patches.mT.unflatten(2, seen.grid)

    def _scored(self) -> dict[str, Any]:
        """The head for the one vector (`cls`) and, where one was trained, that for patches (`patch`)."""
        found = list(self.heads.values())
        return {"cls": found[0]} | ({"patch": found[-1]} if isinstance(self.config, MaskedDistillation) else {})

    def pupil(self, width: int, learn: Literal["features", "heads"], patches: bool = True) -> dict[str, nn.Module]:
        """What a student of this width answers with: fresh heads like its own, or lines to its features.

        Nothing for patches where the student has no `patches`, since no gradient would reach it. Raises `SaccadeError`
        where the teacher has no heads.
        """
        if learn == "features":
            return {name: nn.Linear(width, wide) for name, wide in self.widths.items() if patches or name == "head"}
        if not self.heads:
            raise SaccadeError(
                "this teacher has no heads", path="--learn",
                hint="use --learn features; finished runs of dino and its kind have some",
            )  # fmt: skip
        return {
            name: heads.DINOHead.like(head, width) for name, head in self.heads.items() if patches or name == "head"
        }

    def even(self, learn: Literal["features", "heads"], queue: int, crops: int, accumulate: int = 1) -> nn.ModuleDict:
        """What evens out its answers about the one vector and about patches; it sees so many large crops a step.

        Raises `SaccadeError` for a queue that is not of whole steps, and where Sinkhorn-Knopp would see parts of one.
        """
        if learn == "features":
            wide = zip(("cls", "patch"), self.widths.values(), strict=True)
            return nn.ModuleDict({kind: Standard(width) for kind, width in wide})
        heads.check_queue(queue, crops)
        assert self.config is not None
        if accumulate > 1 and self.assignment == "sinkhorn":
            raise SaccadeError(
                "this teacher's answers are evened out over whole batches", path="--accumulate",
                hint="give --accumulate 1, a smaller --batch and --queue; or --learn features",
            )  # fmt: skip
        keeps = self.config.centre_momentum
        return nn.ModuleDict(
            {
                kind: heads.Assignment(
                    self.assignment, *head.last_layer.weight.shape, momentum=keeps, queue=queue if kind == "cls" else 0
                )
                for kind, head in self._scored().items()
            }
        )

    def answers(self, assignments: nn.ModuleDict, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prototypes that its heads see in tokens, evened out, as probabilities."""
        assert self.config is not None
        sharp = torch.tensor(self.config.teacher_temperature, device=tokens["cls"].device)
        scored = self._scored()
        return {
            kind: even(scored[kind], scored[kind].bottleneck(tokens[kind]), sharp) for kind, even in assignments.items()
        }

    def chance(self) -> dict[str, float]:
        """Metrics of one who tells no prototypes apart: ln K."""
        whole = math.log(len(self._scored()["cls"].last_layer.weight))
        return {"cls_loss": whole, "teacher_entropy": whole}


@dataclass(frozen=True)
class Kept:
    """A backbone that a run begins with and leaves as it is, and what is known of it: hash, licence, …"""

    network: Any
    record: dict[str, Any]

    def build_for(self, config: Training) -> Any:
        """A copy."""
        return copy.deepcopy(self.network)


class Memory:
    """What a frozen backbone said of pictures, by their keys, where they are the same at every visit.

    Up to so many GB; what comes later is looked at each time. On a CPU every picture is looked at alone, so that its
    vector does not depend on who shares the batch, and a run that goes on with an empty memory has the same numbers.
    A backbone that is sharded needs all ranks at every look, and is not remembered. No checkpoint holds any of it.
    """

    def __init__(self, backbone: Any, gigabytes: float):
        self.backbone, self.room = backbone, int(gigabytes * 1e9 / (4 * backbone.config.width))
        self.rows: dict[int, int] = {}
        self.table: Tensor | None = None

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "b c s s"], keys: Int[Tensor, " b"], method: nn.Module
    ) -> Float[Tensor, "b d"]:
        """The one vector of each picture; `method` holds the backbone."""
        if not self.room or distributed.sharded(method):
            return self.backbone.pooled(images)
        names = keys.tolist()
        new = {name: place for place, name in enumerate(names) if name not in self.rows}
        seen = self._look(images[list(new.values())]) if new else images.new_empty(0, 1)
        known = dict(zip(new, seen, strict=True))
        vectors = [known[name] if name in known else self._recall(name) for name in names]
        self._add(list(new), seen)
        return torch.stack(vectors)

    def _look(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, "n d"]:
        if images.device.type != "cpu":
            return self.backbone.pooled(images).float()
        return torch.cat([self.backbone.pooled(image[None]).float() for image in images])

    def _recall(self, name: int) -> Float[Tensor, " d"]:
        assert self.table is not None
        return self.table[self.rows[name]]

    def _add(self, names: list[int], seen: Float[Tensor, "n d"]) -> None:
        """Takes in as many as there is room for; the table doubles when it is full."""
        count = len(self.rows)
        names = names[: self.room - count]
        if not names:
            return
        if self.table is None or len(self.table) < count + len(names):
            wider = seen.new_empty(min(self.room, max(2 * count, count + len(names))), seen.shape[1])
            wider[:count] = wider[:0] if self.table is None else self.table[:count]
            self.table = wider
        self.table[count : count + len(names)] = seen[: len(names)]
        self.rows |= {name: count + place for place, name in enumerate(names)}

"""Distil: students learn a frozen teacher's prototypes (DINOv3, arXiv 2508.10104) or features (UNIC, 2408.05088)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade import augment, backbone, heads, losses, optim, recipe
from saccade.data import Batch
from saccade.draws import Draws
from saccade.errors import SaccadeError


class Config(recipe.MultiCrop):
    """Any teacher's features, of two large crops; `with_heads` has the prototypes of a run and small crops."""

    arch: str = Field("vit-s/16", description="student: size and patch or stride, e.g. vit-s/16, convnext-t/32")
    students: tuple[str, ...] = Field((), description="more students, which share the teacher's pass, e.g. vit-b/16")
    teacher: str | None = Field(None, description="run, folder, file or published name of what is learned from")
    learn: Literal["features", "heads"] = Field("features", description="heads: those that the teacher's run trained")
    teacher_scale: float = Field(1.0, gt=0, description="side of the teacher's crops, in sides of the students'")
    steps: int | None = Field(125_000, ge=1, description="length in optimizer steps")
    lr: float = Field(1e-3, gt=0, description="learning rate at batch 1024; scaled with the batch's square root")
    warmup: float = Field(0.08, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(0.04, ge=0, description="AdamW's decay, on matrices only")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    clip: float | None = Field(3.0, gt=0, description="largest gradient norm of each student")
    global_scale: tuple[float, float] = Field((0.32, 1.0), description="area of a large crop, as parts of the picture")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="area of a small crop")
    local_crops: int = Field(0, ge=0, description="small crops, from which students tell the teacher's prototypes")
    patch_weight: float = Field(1.0, ge=0, description="weight of the patches' loss beside that of the one vector")
    asked: float = Field(0.25, gt=0, le=1, description="part of a large crop's patches that heads are asked about")
    queue: int = Field(0, ge=0, description="former large crops beside a step's in Sinkhorn-Knopp, of whole steps")
    momentum: float = Field(0.994, ge=0, lt=1, description="what a student's average, which comes out, keeps a step")
    registers: int = Field(4, ge=0, description="register tokens of a ViT")
    layer_scale: float = Field(1e-5, gt=0, description="factor of a ViT's residual branches at the start")

    def peak(self) -> float:
        """The square-root rule."""
        return self.lr * (self.batch / 1024) ** 0.5

    def backbone(self) -> dict[str, Any]:
        """ViTs as DINOv3's, without a mask token: nothing is hidden from a student."""
        rope = {"position": "rope", "eps": 1e-5, "qkv_bias": "k_masked", "registers": self.registers}
        return rope | {"layer_scale": self.layer_scale} if self.arch.lower().startswith("vit-") else {}

    def teachers(self) -> dict[str, str | None]:
        return {"teacher": self.teacher}

    def canvas(self) -> int:
        return round(max(1.0, self.teacher_scale) * super().canvas())  # a pixel for each of its crops' own, too


def with_heads() -> Config:
    """As DINOv3's family was distilled. Patches weigh half: released, only half of the crops are asked about any."""
    return Config(learn="heads", local_crops=8, patch_weight=0.5)


def small_machine() -> Config:
    """A few CPU cores: a tiny student on small crops."""
    return Config(arch="vit-ti/8", image_size=48, batch=64, layer_scale=0.1, registers=0, colour=0.5, blur=0.0, lr=4e-3)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Two large crops [2B C S S], the teacher's of the same if it wants another size, small ones, and random words."""
    side = round(config.image_size * config.teacher_scale)
    made = augment.multi_crop(config, batch, draws, blurred=(0.0, 0.9, 0.5), again=side)
    return made | {"words": draws.step("asked").bits(2).T.flatten().to(made["globals"].device)}


class Method(recipe.Method):
    """Students, each a backbone and what it answers the teacher with, and their slow averages, which come out."""

    def __init__(self, config: Config, network: nn.Module, teachers: dict[str, nn.Module]):
        super().__init__(config, network, teachers)
        self.config, teacher = config, teachers["teacher"]
        if config.learn == "features" and config.local_crops + config.queue:
            raise SaccadeError("--local-crops and --queue need heads", path="--learn", hint="give --learn heads")
        if len({config.arch, *config.students}) <= len(config.students):
            raise SaccadeError("a student is named twice", path="--students", hint="each once; --arch is the first")
        self.students, self.averages = nn.ModuleDict(), nn.ModuleDict()
        others = {arch: backbone.build_for(config.model_copy(update={"arch": arch})) for arch in config.students}
        for arch, made in {config.arch: network, **others}.items():
            answers = teacher.pupil(made.config.width, config.learn, all(made.config.grid))
            self.students[arch] = nn.ModuleDict({"backbone": made, **answers})
            self.averages[arch] = copy.deepcopy(made).requires_grad_(False)
        self.even = teacher.even(config.learn, config.queue, 2 * config.batch, config.accumulate)
        self.steps = nn.Buffer(torch.zeros(()))

    def encoder(self) -> nn.Module:
        return self.averages[self.config.arch]

    def encoders(self) -> dict[str, nn.Module]:
        return {arch: self.averages[arch] for arch in self.config.students}

    def chance(self) -> dict[str, float]:
        return self.teachers["teacher"].chance() if self.config.learn == "heads" else {}

    def groups(self, t: float) -> list[optim.Group]:
        """Every student is clipped for itself: none is moved by who learns beside it."""
        return optim.groups_apart("students", self.students, self.config.weight_decay, self.config.layer_decay)

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The sum of the students' losses; their means are logged, and where there are several each one's own."""
        lesson, weights = self.lesson(batch), {"cls": 1.0, "patch": self.config.patch_weight}
        found = {arch: self.compare(student, batch, *lesson) for arch, student in self.students.items()}
        each = {arch: sum(weights[kind] * part for kind, part in parts.items()) for arch, parts in found.items()}
        metrics = heads.told_of_students(found, each)
        return sum(each.values()), metrics | (heads.concentration(lesson[0]["cls"]) if len(lesson) > 2 else {})

    @torch.no_grad()
    def lesson(self, batch: Batch) -> tuple[dict[str, Tensor], tuple[int, int], *tuple[Tensor, ...]]:
        """The teacher's features or prototypes of crops and patches, its grid, and of which patches it was asked."""
        teacher = self.teachers["teacher"]
        vectors, patches = teacher(batch.get("again", batch["globals"]))
        grid, tokens = tuple(patches.shape[2:]), {"cls": vectors, "patch": patches.flatten(2).mT}
        if self.config.learn == "features":
            return {kind: even(tokens[kind]) for kind, even in self.even.items()}, grid
        asked = heads.some_patches(batch["words"], tokens["patch"].shape[1], self.config.asked)
        return teacher.answers(self.even, tokens | {"patch": tokens["patch"][asked]}), grid, asked

    def compare(self, student: nn.ModuleDict, batch: Batch, targets: dict[str, Tensor], *where: Any) -> dict[str, Any]:
        """How far a student's answers are from the targets, its patches being brought to the teacher's grid."""
        backbone, head, patch_head = student["backbone"], student["head"], [*student.values()][-1]
        seen, (grid, *asked) = backbone(batch["globals"]), where
        vectors, patches = backbone.embedding(seen), heads.regrid(seen.patches, seen.grid, grid)
        targets = targets if patches.shape[1] else {"cls": targets["cls"]}  # some give one vector alone
        if not asked:
            answers = {"cls": head(vectors), "patch": patch_head(patches)}
            return {kind: losses.feature_distance(answers[kind], target) for kind, target in targets.items()}
        small, sharp = "locals" in batch, self.teachers["teacher"].config.student_temperature
        logits = head(torch.cat([vectors, backbone.pooled(batch["locals"])]) if small else vectors)
        pair = [rows.unflatten(0, (-1, len(vectors) // 2)) for rows in (logits, targets["cls"])]
        found = {"cls": heads.cross_view(*pair, sharp)}
        if "patch" in targets:
            found["patch"] = losses.hidden_patches(patch_head(patches[asked[0]]), targets["patch"], asked[0], sharp)
        return found

    def after_step(self, t: Float[Tensor, ""]) -> None:
        """Averages are of the last ninth of the steps, in the long run at a constant pace; what evens out moves on."""
        part = torch.clamp(9 / (9 + self.steps.add_(1)), min=1 - self.config.momentum)
        for arch, student in self.students.items():
            optim.average(self.averages[arch], student["backbone"], part)
        for even in self.even.values():
            even.after_step()

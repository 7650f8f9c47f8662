"""Prototypes: the head that scores them while an encoder is trained, and what is asked of a student's scores.

The loss stands beside its head so that DINO is followed from disk to loss in seven files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saccade import depth, distributed, losses, optim, vit
from saccade.data import Batch
from saccade.draws import Stream
from saccade.errors import SaccadeError
from saccade.linear import Linear, linear
from saccade.norm import BatchNorm
from saccade.settings import Prototyped, SpreadDistillation
from saccade.vit import Features


class DINOHead(nn.Module):
    """How near an embedding is to each of K prototypes, as cosines (arXiv 2104.14294, appendix C).

    Three linear layers with GELU between them end in a narrow bottleneck, which is scaled to length 1. `lengths` are
    the prototypes': `one` (DINO, iBOT: weight norm with its gain held at 1), `learned` (DINOv2: a gain each) or `free`
    (DINOv3: no weight norm). `norm`: batch norm before each GELU. It takes away what all pictures have in common, which
    in a short run nothing else does.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: bool = False,
        lengths: Literal["one", "learned", "free"] = "one",
    ):
        super().__init__()
        self.lengths = lengths
        self.mlp = nn.Sequential()
        for wide in (width, hidden):
            between = [BatchNorm(hidden), nn.GELU()] if norm else [nn.GELU()]
            self.mlp.extend([Linear(wide, hidden), *between])
        self.mlp.append(Linear(hidden, bottleneck))
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        self.gain = nn.Parameter(torch.empty(prototypes)) if lengths == "learned" else None
        self.reset_parameters()

    @classmethod
    def like(cls, head: DINOHead, width: int) -> DINOHead:
        """A fresh head of the same shape, for embeddings of another width."""
        (bottleneck, hidden), prototypes = head.mlp[-1].weight.shape, len(head.last_layer.weight)
        norm = any(isinstance(part, BatchNorm) for part in head.mlp)
        shape = {"hidden": hidden, "bottleneck": bottleneck, "norm": norm, "lengths": head.lengths}
        return cls(width, prototypes, **shape)

    def reset_parameters(self) -> None:
        """Fresh weights from torch's generator."""
        vit.initialise(self, "trunc_normal")
        for part in self.mlp:
            if isinstance(part, BatchNorm):
                part.reset_parameters()
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Products with each prototype (cosines where its length is one): a temperature makes logits of them."""
        return self.score(self.bottleneck(x))

    def bottleneck(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """What is compared with the prototypes, of length 1."""
        return F.normalize(self.mlp(x), dim=-1)

    def score(self, x: Float[Tensor, "b e"]) -> Float[Tensor, "b k"]:
        """Products of bottlenecks with each prototype; linear, so the mean's score is the scores' mean."""
        weight = self.last_layer.weight
        products = linear(x, weight, None)
        if self.lengths == "free":
            return products
        products = products / torch.linalg.vector_norm(weight, dim=-1)  # cheaper than K prototypes by their lengths
        return products if self.gain is None else products * self.gain


def check_queue(queue: int, crops: int) -> None:
    """Raises `SaccadeError` where a queue is not of whole steps of so many teacher's crops over all ranks.

    Which crops of the oldest step it kept would depend on ranks and accumulation.
    """
    if queue % crops:
        raise SaccadeError(
            f"--queue {queue} is not of whole steps: the teacher sees {crops} large crops a step",
            path="--queue",
            hint=f"use {max(1, round(queue / crops)) * crops}, or another multiple of {crops}",
        )


class Assignment(nn.Module):
    """A teacher's answers, evened out so that the samples together use many prototypes.

    `centre`: the mean logits of former steps are taken out (DINO), the mean of all samples of all ranks, where DINOv2's
    code takes the mean of the ranks' means for patches, of which one may hide more than another; `sinkhorn`: every
    prototype gets its share within the batch (SwAV, DINOv2's giant, DINOv3). Few samples cannot share many prototypes:
    `queue` bottlenecks of former steps, scored anew, stand beside them. Zeros are places of the queue that are still
    empty, and are left out: as samples, alike to all prototypes, they would take up all that is unused and leave the
    batch a plain softmax.
    """

    def __init__(
        self, kind: Literal["centre", "sinkhorn"], prototypes: int, bottleneck: int, *, momentum: float, queue: int = 0
    ):
        super().__init__()
        if queue and kind == "centre":
            raise SaccadeError("a centre needs no queue", path="--queue", hint="it is for Sinkhorn-Knopp: give 0")
        self.kind, self.momentum, self.queue = kind, momentum, queue
        self._fresh: list[Tensor] = []
        if kind == "centre":
            self.register_buffer("centre", torch.zeros(prototypes))
            self.register_buffer("sums", torch.zeros(prototypes), persistent=False)
            self.register_buffer("count", torch.zeros(()), persistent=False)
        elif queue:
            self.register_buffer("past", torch.zeros(queue, bottleneck))

    @torch.no_grad()
    def forward(
        self,
        head: DINOHead,
        bottlenecks: Float[Tensor, "b e"],
        temperature: Float[Tensor, ""],
        added: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Probabilities, of what the teacher's head has made so far.

        `added` is what `evening` says of more samples than these; without it these are evened out by themselves.
        """
        logits = head.score(bottlenecks)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.kind == "sinkhorn":
            if self.queue:
                self._fresh.append(bottlenecks)
            if added is None:
                added = self.evening(head, [lambda: logits], temperature)
            return losses.even(logits, temperature, added)
        self.sums += logits.sum(0)
        self.count += len(logits)
        return ((logits - self.centre) / temperature).softmax(-1)

    def evening(
        self, head: DINOHead, parts: list[Callable[[], Float[Tensor, "b k"]]], temperature: Float[Tensor, ""]
    ) -> Float[Tensor, " k"]:
        """What evens out the logits of these parts of a step, beside the queue's."""
        if self.queue:
            past = self.past[distributed.rank() :: distributed.world()]
            scored = head.score(past).masked_fill(~past.any(1, keepdim=True), -torch.inf)
            parts = [*parts, lambda: scored]
        return losses.evening(parts, temperature)

    @torch.no_grad()
    def after_step(self) -> None:
        """The centre follows the mean logits of this step; the queue takes its bottlenecks in."""
        if self.kind == "centre":
            mean = distributed.total(self.sums) / distributed.total(self.count).clamp(min=1)
            self.centre.lerp_(mean, 1 - self.momentum)
            self.sums.zero_()
            self.count.zero_()
        elif self.queue:
            fresh = distributed.gather(torch.cat(self._fresh)).to(self.past.dtype)
            self.past.copy_(torch.cat([fresh, self.past])[: self.queue])
            self._fresh.clear()


class Assignments(nn.ModuleDict):
    """Answers for class tokens (`head`) and hidden patches (`patch_head`, or the same one), each evened out apart.

    Where a step has several micro-batches and is evened out by Sinkhorn-Knopp (`ahead`), the teacher looks at all of
    them before the first answer, so that the answers are those of one batch.
    """

    def __init__(self, config: SpreadDistillation, kind: Literal["centre", "sinkhorn"], widths: dict[str, int]):
        check_queue(config.queue, 2 * config.batch)
        self.last = list(widths)[-1]
        queues = {"cls": ("head", config.queue), "patch": (self.last, 0)}  # there are hidden patches enough
        super().__init__({
            name: Assignment(kind, widths[head], config.bottleneck, momentum=config.centre_momentum, queue=queue)
            for name, (head, queue) in queues.items()
        })  # fmt: skip
        self.ahead = kind == "sinkhorn" and config.accumulate > 1
        self._seen: list[dict[str, Tensor]] = []
        self._added: dict[str, Tensor] = {}

    def _heads(self, teacher: nn.ModuleDict) -> dict[str, DINOHead]:
        return {"cls": teacher["head"], "patch": teacher[self.last]}

    @torch.no_grad()
    def look(self, teacher: nn.ModuleDict, images: Tensor, hide: Bool[Tensor, "b n"]) -> None:
        """The teacher, of `backbone` and heads, sees a micro-batch: whole pictures, and where patches are hidden."""
        seen = teacher["backbone"](images)
        tokens = {"cls": seen.cls, "patch": seen.patches[hide]}
        self._seen.append({name: head.bottleneck(tokens[name]) for name, head in self._heads(teacher).items()})

    def answers(
        self, teacher: nn.ModuleDict, images: Tensor, hide: Bool[Tensor, "b n"], temperature: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "m l"]]:
        """What it answers to the next micro-batch that it saw; it sees this one now if there is none."""
        if not self._seen:
            self.look(teacher, images, hide)
        if self.ahead and not self._added:
            for name, head in self._heads(teacher).items():
                parts = [partial(head.score, seen[name]) for seen in self._seen]
                self._added[name] = self[name].evening(head, parts, temperature)
        seen = self._seen.pop(0)
        cls, patches = (
            self[name](head, seen[name], temperature, self._added.get(name))
            for name, head in self._heads(teacher).items()
        )
        if not self._seen:
            self._added.clear()
        return cls, patches

    def after_step(self) -> None:
        """Centres and queues take a step in."""
        for assignment in self.values():
            assignment.after_step()


def student_and_teacher(
    config: SpreadDistillation,
    backbone: nn.Module,
    widths: dict[str, int],
    lengths: Literal["learned", "free"],
    **more: nn.Module,
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """A backbone with a head of each of these widths, and a copy of them all that no gradient moves.

    Raises `SaccadeError` where KoLeo's groups do not divide what this rank sees at a time, and for sizes of a
    head that is not there.
    """
    if config.koleo_weight:
        losses.check_groups(config.batch // config.accumulate // distributed.world(), config.koleo_group)
    shape = {"hidden": config.hidden, "bottleneck": config.bottleneck}
    own = {"hidden": config.patch_hidden, "bottleneck": config.patch_bottleneck}
    if "patch_head" not in widths and any((config.patch_prototypes, *own.values())):
        raise SaccadeError("patches have no head of their own", path="--patch-prototypes", hint="give --separate-heads")
    shapes = {"head": shape, "patch_head": shape | {name: width for name, width in own.items() if width is not None}}
    how = {"norm": config.head_norm, "lengths": lengths}
    made = {name: DINOHead(backbone.config.width, count, **shapes[name], **how) for name, count in widths.items()}
    student = nn.ModuleDict({"backbone": backbone, **made, **more})
    return student, copy.deepcopy(student).requires_grad_(False)


def cross_view(
    student: Float[Tensor, "v b k"],
    teacher: Float[Tensor, "u b k"],
    temperature: float,
    local_weight: float | Float[Tensor, ""] = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of a student's views to a teacher's, over all pairs but those of one view (DINO, arXiv 2104.14294).

    `student` are logits before the temperature, `teacher` probabilities of its first U <= V views; the mean is over
    samples and the U V - U pairs, of which those of views that no teacher sees count `local_weight` (DINOv3). Raises
    `ValueError` where no pair is left.
    A pair's loss is logsumexp(s) - q.s, and the sums over pairs go inside: no pair is ever formed.
    """
    views, samples, _ = student.shape
    seen = len(teacher)
    if not 0 < seen <= views or views == 1:
        raise ValueError(f"{views} views of a student and {seen} of a teacher make no pair")
    student = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    spread = student.logsumexp(-1)
    spread = (seen - 1) * spread[:seen].sum() + seen * local_weight * spread[seen:].sum()
    both = student[:seen].sum(0) + local_weight * student[seen:].sum(0)
    agreement = (teacher.sum(0) * both).sum() - (teacher * student[:seen]).sum()
    return (spread - agreement) / (samples * seen * (views - 1))


def regrid(patches: Float[Tensor, "b n d"], grid: tuple[int, ...], to: tuple[int, ...]) -> Float[Tensor, "b m d"]:
    """A map of patches on another grid, bilinear and antialiased; as it is on the same one, and where it is empty."""
    if grid == to or not patches.shape[1]:
        return patches
    with torch.autocast(patches.device.type, enabled=False):
        rows = patches.to(torch.promote_types(patches.dtype, torch.float32)).mT.unflatten(2, grid)
        return F.interpolate(rows, size=to, mode="bilinear", antialias=True, align_corners=False).flatten(2).mT


def told_of_students(found: Mapping[str, Mapping[str, Tensor]], each: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of students: means of each kind of loss over those that have it, and, of several, their sums."""
    kinds = {kind: [parts[kind].detach() for parts in found.values() if kind in parts] for kind in ("cls", "patch")}
    means = {f"{kind}_loss": torch.stack(parts).mean() for kind, parts in kinds.items() if parts}
    return means | ({f"loss_{arch}": loss.detach() for arch, loss in each.items()} if len(each) > 1 else {})


def seen_by_another(
    student: Float[Tensor, "v b k"], teacher: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of a student's views to a teacher's one, which is none of them (SILC, arXiv 2310.13355).

    `student` are logits before the temperature, `teacher` probabilities; the mean is over samples and views.
    """
    student = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    return (student.logsumexp(-1) - (teacher * student).sum(-1)).mean()


class LocalToGlobal(nn.Module):
    """A student tells from small crops, and where patches of a large one are hidden, what its own slow average sees.

    SILC's and TIPS's losses (arXiv 2310.13355, 2410.16512) as SigLIP 2 has them: a head for pooled vectors and one for
    patches, centred answers, one temperature. The student's backbone is not held here: it comes with each call.
    """

    def __init__(self, config: Prototyped, backbone: nn.Module, prototypes: int):
        super().__init__()
        self.config = config
        shape = {"hidden": config.hidden, "norm": config.head_norm}
        made = {name: DINOHead(backbone.config.width, prototypes, **shape) for name in ("head", "patch_head")}
        self.student = nn.ModuleDict(made)
        self.teacher = copy.deepcopy(nn.ModuleDict({"backbone": backbone, **made})).requires_grad_(False)
        bottleneck = made["head"].last_layer.in_features
        self.assign = nn.ModuleDict({
            name: Assignment("centre", prototypes, bottleneck, momentum=config.centre_momentum) for name in made
        })  # fmt: skip

    def follow(self, backbone: nn.Module, part: Float[Tensor, ""]) -> None:
        """The teacher goes this part of the way to its student."""
        optim.follow(self.teacher["backbone"], backbone, part)
        for name, head in self.student.items():
            optim.follow(self.teacher[name], head, part)

    def forward(
        self, backbone: nn.Module, batch: Batch
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of small crops `locals` and of the patches that `hide` shows of `globals`; what is worth logging."""
        whole, hide, heat = batch["globals"], batch["hide"], torch.as_tensor(self.config.teacher_temperature)
        with torch.no_grad():
            seen = self.teacher["backbone"](whole, tokens="patches")
            tokens = {"head": self.teacher["backbone"].embedding(seen), "patch_head": seen.patches[hide]}
            target, patch_target = (
                assign(self.teacher[name], self.teacher[name].bottleneck(tokens[name]), heat)
                for name, assign in self.assign.items()
            )
        logits = self.student["head"](backbone.pooled(batch["locals"])).unflatten(0, (-1, len(whole)))
        loss = seen_by_another(logits, target, self.config.student_temperature)
        guess = self.student["patch_head"](backbone(whole, hide=hide, tokens="patches").patches[hide])
        patch = losses.hidden_patches(guess, patch_target, hide, self.config.student_temperature)
        return loss, patch, concentration(target, patch_target)

    def after_step(self, backbone: nn.Module) -> None:
        """The teacher follows at a pace that never changes; the centres take the step in."""
        self.follow(backbone, torch.full((), 1 - self.config.momentum, device=next(self.parameters()).device))
        for assign in self.assign.values():
            assign.after_step()


def some_patches(words: Int[Tensor, " b"], patches: int, part: float) -> Bool[Tensor, "b n"]:
    """True for this part of each picture's patches, at least one, chosen by its random word."""
    chosen = Stream(words, 0).order(patches)[:, : max(1, round(part * patches))]
    return torch.zeros(len(words), patches, dtype=torch.bool, device=words.device).scatter(1, chosen, True)


def concentration(
    probabilities: Float[Tensor, "b k"], patches: Float[Tensor, "m l"] | None = None
) -> dict[str, Float[Tensor, ""]]:
    """How sharp a teacher's answers are, as their mean entropy in nats, and which part of the K prototypes they use.

    The part is exp(entropy of the mean answer) / K: 1 where all are used alike, 1/K where every answer is the same one.
    The same of hidden `patches`, of about as many as there are class tokens.
    """
    used = torch.special.entr(probabilities.mean(0)).sum().exp() / probabilities.shape[1]
    found = {"teacher_entropy": torch.special.entr(probabilities).sum(1).mean(), "prototype_use": used}
    if patches is not None:
        some = patches[:: max(1, len(patches) // len(probabilities))]
        count = max(1, len(some))  # there may be none
        used = torch.special.entr(some.sum(0) / count).sum().exp() / some.shape[1]
        found |= {"patch_entropy": torch.special.entr(some).sum() / count, "patch_use": used}
    return found


def student_answers(
    student: nn.ModuleDict, config: SpreadDistillation, batch: Batch, *, stretch: float = 1.0
) -> tuple[Features, Float[Tensor, "v b k"]]:
    """Features of the large crops, in which patches are hidden, and the class tokens' logits of all crops.

    `stretch`: RoPE's coordinates are scaled by up to this, and down, by chance in each block, the same for all large
    crops of a step and for all small ones (DINOv3). A student's `local_norm` stands for its last norm in small crops.
    """
    backbone, whole = student["backbone"], batch["globals"]
    norm = dict(student.items()).get("local_norm")
    sizes = [len(whole), len(batch["drop"]) - len(whole)]
    rates = [config.drop_path] * backbone.branches
    how = []
    for first, rows in zip((0, sizes[0]), batch["drop"].split(sizes), strict=True):
        by = None
        if stretch > 1 and len(rows):
            u = Stream(batch["stretch"][first : first + 1], 0).uniform(backbone.config.depth)
            by = torch.exp((2 * u[0] - 1) * math.log(stretch))
        how.append({"drop": depth.stochastic_depth(rows, rates), "stretch": by})
    seen = backbone(whole, hide=batch["hide"], **how[0])
    tokens = [seen.cls]
    if sizes[1]:
        tokens.append(backbone(batch["locals"], tokens="cls", norm=norm, **how[1]).cls)
    return seen, student["head"](torch.cat(tokens)).unflatten(0, (-1, len(whole) // 2))


def spread_losses(
    config: SpreadDistillation,
    seen: Features,
    logits: Float[Tensor, "v b k"],
    patch_head: DINOHead,
    hide: Bool[Tensor, "c n"],
    targets: tuple[Float[Tensor, "c k"], Float[Tensor, "m l"]],
    local_weight: float | Float[Tensor, ""] = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """DINOv2's loss: every view's prototypes, every hidden patch's in its view, and KoLeo; with what is worth logging.

    KoLeo is of both large crops, as released; the paper's text says of the first.
    """
    target, patch_target = targets
    cls = cross_view(logits, target.unflatten(0, (-1, logits.shape[1])), config.student_temperature, local_weight)
    patch = losses.hidden_patches(patch_head(seen.patches[hide]), patch_target, hide, config.student_temperature)
    share = (1 + local_weight * (len(logits) - 2)) / (len(logits) - 1)  # ln K stays what chance gives
    total, found = cls + config.patch_weight * patch, {"cls_loss": cls / share, "patch_loss": patch}
    if config.koleo_weight:
        found["koleo"] = sum(losses.koleo(crop, config.koleo_group) for crop in seen.cls.chunk(2))
        total = total + config.koleo_weight * found["koleo"]
    return total, {name: value.detach() for name, value in found.items()} | concentration(target, patch_target)

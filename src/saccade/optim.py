"""AdamW, its groups, and schedules as functions of `t`, the part of training done."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from saccade.settings import SelfDistillation


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that are optimised alike.

    `weight_decay` None takes the configured one; parameters of one `clip_group` are clipped by one common norm, and
    each by its own where it is None; `frozen` parameters keep their values and their moments this step.
    """

    parameters: dict[str, nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    clip_group: str | None = "all"
    frozen: bool = False


def cosine(t: Float[Tensor, ""], start: float, end: float) -> Float[Tensor, ""]:
    """From `start` at t = 0 to `end` at t = 1 along half a cosine."""
    return end + (start - end) * 0.5 * (1 + torch.cos(math.pi * t))


def linear(t: Float[Tensor, ""], start: float, end: float, until: float = 1.0) -> Float[Tensor, ""]:
    """From `start` at t = 0 to `end` at t = `until`, and constant after it."""
    return start + (end - start) * torch.clamp(t / until, 0.0, 1.0)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, part: Float[Tensor, ""]) -> None:
    """Moves the teacher's parameters by this part of the way to the student's, each rank its own shards."""
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    local = [[p.to_local() if isinstance(p, DTensor) else p.data for p in pair] for pair in pairs]
    old, new = [list(side) for side in zip(*local, strict=True)]
    if part.device.type == "cpu":
        torch._foreach_lerp_(old, new, float(part))
    else:  # as a number it would make the host wait for the device
        torch._foreach_mul_(old, 1 - part)
        torch._foreach_add_(old, torch._foreach_mul(new, part))


@torch.no_grad()
def average(kept: nn.Module, live: nn.Module, part: Float[Tensor, ""]) -> None:
    """`follow` for a copy that is never run: running statistics go the same part of the way, counts are copied."""
    follow(kept, live, part)
    for old, new in zip(kept.buffers(), live.buffers(), strict=True):
        old.copy_(torch.lerp(old, new, part.to(old.dtype)) if old.is_floating_point() else new)


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Layer-wise learning-rate decay for an encoder's parameter names (BEiT, arXiv 2106.08254, appendix).

    Embeddings and stems are layer 0, the i-th block is layer i (downsampling belongs to the block after it), what
    follows is layer L + 1; the factor is decay ** (L + 1 - layer).
    """
    layers, last = layers_of(names)
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def layers_of(names: Iterable[str]) -> tuple[dict[str, int], int]:
    """The layer of each of an encoder's parameters, as above, and the number of the last one."""
    blocks = {name: _block(name) for name in names}
    places = {block: n for n, block in enumerate(sorted({block for block in blocks.values() if block}), 1)}
    last = len(places) + 1
    return {name: places.get(block, 0 if name.startswith(_FIRST) else last) for name, block in blocks.items()}, last


_FIRST = (
    *("cls_token", "pos_embed", "patch_embed", "register_tokens", "mask_token", "norm_pre"),
    *("conv1", "bn1", "downsample_layers.0"),
)


def _block(name: str) -> tuple[int, ...]:
    """The stage (where there are several) and the number of the block that a parameter belongs to; () for none."""
    if found := re.match(r"(?:blocks|layer|stages)\.?(\d+)\.(?:(\d+)\.)?", name):
        return tuple(int(number) for number in found.groups() if number is not None)
    found = re.match(r"downsample_layers\.([1-9]\d*)\.", name)
    return (int(found[1]), 0) if found else ()


def default_groups(method: nn.Module, encoder: nn.Module, weight_decay: float, layer_decay: float) -> list[Group]:
    """Decay on matrices only (the 1-D rule: ndim > 1, and the name ends not in bias); layer decay on the encoder."""
    inside = {id(parameter): name for name, parameter in encoder.named_parameters()}
    scales = layer_scales(inside.values(), layer_decay)
    grouped: dict[tuple[float, float], dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name.endswith("bias") else weight_decay
        scale = scales[inside[id(parameter)]] if id(parameter) in inside else 1.0
        grouped[scale, decay][name] = parameter
    return [Group(parameters, scale, decay) for (scale, decay), parameters in grouped.items()]


def groups_apart(prefix: str, students: nn.ModuleDict, weight_decay: float, layer_decay: float) -> list[Group]:
    """`default_groups` of several students, each a `backbone` with more, and each clipped for itself."""
    found = []
    for name, student in students.items():
        for group in default_groups(student, student["backbone"], weight_decay, layer_decay):
            named = {f"{prefix}.{name}.{inner}": parameter for inner, parameter in group.parameters.items()}
            found.append(replace(group, parameters=named, clip_group=name))
    return found


def student_groups(
    student: nn.ModuleDict,
    t: float,
    config: SelfDistillation,
    *,
    clip: Literal["tensor", "part"],
    patch_embed: float = 1.0,
) -> list[Group]:
    """Of a `backbone` and its heads: decay rises along a cosine, and prototypes stand still at first.

    Clipped is each tensor by itself (DINO) or each part of the student (DINOv2). `patch_embed` scales the learning rate
    of the patch embedding.
    """
    decay = float(cosine(torch.tensor(t, dtype=torch.float64), config.weight_decay, config.weight_decay_end))
    grouped: dict[tuple[Any, ...], dict[str, nn.Parameter]] = defaultdict(dict)
    for group in default_groups(student, student["backbone"], 1.0, config.layer_decay):
        for name, parameter in group.parameters.items():
            rate = group.lr_scale * (patch_embed if ".patch_embed." in name else 1.0)
            together = name.partition(".")[0] if clip == "part" else None
            grouped[rate, group.weight_decay, together, ".last_layer." in f".{name}"][f"student.{name}"] = parameter
    return [
        Group(parameters, rate, decay * decays, together, still and t < config.freeze)
        for (rate, decays, together, still), parameters in grouped.items()
    ]


class AdamW:
    """Fused `torch.optim.AdamW` over groups, with its state as plain tensors by parameter name.

    The state exists from the start, so that a checkpoint has one shape and is read in place, on any number of ranks.
    """

    def __init__(self, groups: list[Group], lr: float, betas: tuple[float, float], clip: float | None):
        self.lr, self.clip, self.groups = lr, clip, groups
        self._names = [list(group.parameters) for group in groups]
        params = [{"params": list(group.parameters.values())} for group in groups]
        self.optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, eps=1e-8, weight_decay=0.0, fused=True)
        for group in groups:
            for parameter in group.parameters.values():
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    def state(self) -> dict[str, Tensor]:
        """The moments and step counts, by `parameter name/kind`; the live tensors, to be written or read in place."""
        named = [(name, p) for group in self.groups for name, p in group.parameters.items()]
        return {f"{name}/{kind}": value for name, p in named for kind, value in self.optimizer.state[p].items()}

    def set(self, groups: list[Group], factor: float, weight_decay: float) -> None:
        """This step's learning rates, decays and frozen groups. The groups' members must not change."""
        if [list(group.parameters) for group in groups] != self._names:
            raise ValueError("the groups' members changed: what changes in kind is a stage")
        self.groups = groups
        for group, target in zip(groups, self.optimizer.param_groups, strict=True):
            target["lr"] = self.lr * factor * group.lr_scale
            target["weight_decay"] = weight_decay if group.weight_decay is None else group.weight_decay

    def clip_gradients(self) -> Float[Tensor, ""]:
        """Clips each clip group to the configured norm; returns the norm of all gradients before it."""
        members: dict[str, list[Tensor]] = defaultdict(list)
        for group in self.groups:
            for name, parameter in group.parameters.items():
                if parameter.grad is not None and not group.frozen:
                    members[group.clip_group or f"only {name}"].append(parameter.grad)
        norms = []
        for gradients in members.values():
            norm = torch.nn.utils.get_total_norm(gradients, foreach=False)
            norm = norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
            norms.append(norm)
            if self.clip is not None:
                scale = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
                for gradient in gradients:
                    gradient.mul_(scale)
        return torch.linalg.vector_norm(torch.stack(norms))

    def drop_frozen(self) -> None:
        """Frozen parameters take no step."""
        for group in self.groups:
            if group.frozen:
                for parameter in group.parameters.values():
                    parameter.grad = None

"""A method with its optimizer: built, put on a device, wrapped for the ranks, and moved by one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade import backbone as backbones
from saccade import distributed, initial, resize, teachers, weights
from saccade.data import Batch
from saccade.distributed import Ranks
from saccade.errors import SaccadeError
from saccade.frozen import Kept
from saccade.optim import AdamW, Group, default_groups
from saccade.own import Own
from saccade.provenance import origins
from saccade.recipe import Coupled, Evened, Method, Recipe, Training
from saccade.settings import PretrainArguments
from saccade.vit import ViT


def build(page: Recipe, config: Training, init: str | None) -> tuple[Method, dict[str, Any]]:
    """The method on the CPU, every weight a function of the seed, and where the backbone's weights come from.

    `switches` there are what a network like it must be built with; a `Model` keeps them on its `page`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        given = page.network
        if isinstance(given, Own) and init:
            raise SaccadeError(
                "a network of your own begins with the weights it has", path="--init", hint="leave it out"
            )
        if config.pieces() is not None and init:
            raise SaccadeError("a text tower begins afresh", path="--init", hint="leave it out")
        start = weights.load(init, channels=config.channels) if init and given is None else None
        kept = (initial.switches(start) if start else {}) | dict(page.switches)
        switches = config.backbone() | kept
        fresh = given is None and config.pieces() is None  # texts have no use for one
        backbone = given.build_for(config) if given else backbones.build_for(config, switches) if fresh else None
        record: dict[str, Any] = {"weights": "random", "seed": config.seed}
        if given:
            record = given.record if isinstance(given, Kept) else backbone.given()
        elif start:
            record = {**initial.load_state(backbone, start), "derived_from": origins(start.record)}
        method = page.method(config, backbone, dict(page.teachers))
        record |= initial.load_decoder(method.bare(), backbone, start) if start else {}
        return method, record | {"switches": kept}


def precision_of(asked: str, device: torch.device) -> torch.dtype:
    """What matrix products run in: bf16 on a GPU that has it, fp16 on another, fp32 on a CPU, or as asked."""
    if asked == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if asked == "fp16" and device.type != "cuda":
        raise SaccadeError("fp16 needs a GPU", path="--precision", hint="use auto, fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]


class Model:
    """A method with its optimizer, on the device and wrapped for the ranks."""

    def __init__(self, page: Recipe, config: Training, arguments: PretrainArguments, ranks: Ranks):
        self.config, self.ranks = config, ranks
        taught, said = teachers.load(config)
        self.method, self.initial = build(replace(page, teachers=taught), config, arguments.init)
        self.page = replace(page, switches=self.initial.pop("switches", {}), teachers=taught)
        if said:
            self.initial |= said | {"derived_from": self.initial.get("derived_from", []) + said["derived_from"]}
        teachers.compare(taught, self.method.encoder(), said)
        for teacher in taught.values():
            teacher.to(ranks.device)
        self.method.to(ranks.device)
        if arguments.compile:
            self.method.compile()
        self.wrapped = distributed.wrap(self.method, ranks, arguments.sharding, backbones.UNITS)
        self.precision = precision_of(arguments.precision, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == torch.float16)
        self.optimizer = AdamW(self._groups(0.0), config.peak(), (config.beta1, config.beta2), config.clip)

    def _groups(self, t: float) -> list[Group]:
        groups = self.method.groups(t)
        if groups is not None:
            return groups
        return default_groups(self.method, self.method.encoder(), self.config.weight_decay, self.config.layer_decay)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, live: weights, buffers and moments."""
        weights = {f"method/{name}": tensor for name, tensor in self.method.state_dict().items()}
        return weights | {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state().items()}

    def step(self, batches: Iterator[Batch], t: float) -> dict[str, Tensor]:
        """One optimizer step over `accumulate` batches; returns what is worth logging, as tensors not waited for."""
        now = torch.tensor(t, dtype=torch.float32, device=self.ranks.device)
        parts = self.config.accumulate
        if isinstance(self.method, Coupled) and parts > 1:
            sums = self._replay([next(batches) for _ in range(parts)], now)
        else:
            sums = {}
            method = self.method.bare()
            if isinstance(method, Evened) and method.assign.ahead:
                batches = iter(self._looked_at([next(batches) for _ in range(parts)], now))
            for part in range(parts):
                loss, metrics = self._forward(next(batches), now, last=part == parts - 1)
                self.scaler.scale(loss / parts).backward()
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name] = sums.get(name, 0) + value.detach() / parts
        groups = self.method.groups(t)
        self.optimizer.set(
            groups or self.optimizer.groups,
            self.config.rate(t),
            self.config.weight_decay,
        )
        self.scaler.unscale_(self.optimizer.optimizer)
        sums["gradient_norm"] = self.optimizer.clip_gradients()
        self.optimizer.drop_frozen()
        self.scaler.step(self.optimizer.optimizer)
        self.scaler.update()
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(now)
        return sums

    @torch.no_grad()
    def _looked_at(self, parts: list[Batch], now: Tensor) -> list[Batch]:
        """The micro-batches of a step, of which the teacher has seen each."""
        for views in parts:
            self._forward(views, now, True)
        return parts

    def _forward(self, views: Batch, now: Tensor, *more: Any, last: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss; ranks exchange gradients behind the last of a step."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = last
        with self._autocast():
            return self.wrapped(views, now, *more)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def _replay(self, parts: list[Batch], now: Tensor) -> dict[str, Tensor]:
        """Gradients of one loss over several batches: embeddings first, then each batch again with its gradient.

        Those of parameters that the loss itself reads (a temperature) go with the last batch, behind which ranks meet.
        What each sample learns alone beside that loss is meant over the batches.
        Batch norm inside the network takes the statistics of each part, both times the same.
        """
        method = cast(Coupled, self.method)
        buffers = [(buffer, buffer.clone()) for buffer in method.buffers()]
        with torch.no_grad():
            nothing = torch.zeros_like(now)
            found = [self._forward(views, now, nothing)[1]["embeddings"] for views in parts]
            for buffer, before in buffers:  # running statistics follow the second pass alone
                buffer.copy_(before)
        embeddings = torch.cat(found).requires_grad_()
        distributed.unshard(self.wrapped)
        trained = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
        with self._autocast():
            beside = {name: torch.cat([views[name] for views in parts]) for name in method.beside}
            loss, metrics = method.couple(embeddings, now, **beside)
        whole, *direct = torch.autograd.grad(
            self.scaler.scale(loss), [embeddings, *trained.values()], allow_unused=True
        )
        own = {name: gradient for name, gradient in zip(trained, direct, strict=True) if gradient is not None}
        sums = {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
        for number, (views, gradient) in enumerate(zip(parts, whole.split([len(p) for p in found]), strict=True), 1):
            last = number == len(parts)
            replayed, said = self._forward(views, now, gradient, own if last else None, last=last)
            if "alone" in said:
                said["loss"] = said.pop("alone")
                replayed = replayed + self.scaler.scale(said["loss"] / len(parts))
            replayed.backward()
            for name, value in said.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        return sums

    def adopt(self, before: Model) -> None:
        """Takes over a former stage's weights and moments, by name; what is new in this stage stays as it was built.

        Learned positions of a ViT that has another grid now are resized.
        """
        old, new = before.tensors(), self.tensors()
        for name, tensor in new.items():
            count = name.startswith("optimizer/") and name.endswith("/step")  # it says how old the moments are
            shaped = name.removesuffix("step") + "exp_avg" if count else name
            if shaped in old and old[shaped].shape == new[shaped].shape:
                tensor.detach().copy_(old[name].detach())
        distributed.unshard(before.wrapped)
        towers = dict(before.method.named_modules())
        for name, tower in self.method.named_modules():
            theirs = towers.get(name)
            if isinstance(tower, ViT) and isinstance(theirs, ViT):
                table = resize.table_for(theirs, tower)
                if table is not None:
                    distributed.fill(new[f"method/{name}.pos_embed"].detach(), table)

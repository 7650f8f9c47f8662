"""Frozen teachers: a published backbone or a run of ours, with the heads it was trained with where it has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saccade import distributed, weights
from saccade.distributed import Ranks
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, say
from saccade.frozen import Teacher
from saccade.provenance import origins
from saccade.recipe import Taught, Training, configure
from saccade.run import Run, verify
from saccade.settings import BACKBONE, SpreadDistillation, flag


def load(config: Training) -> tuple[dict[str, Teacher], dict[str, Any]]:
    """The teachers that a config names, on the CPU, and what to record of them: path, hash, whence they derive.

    Raises `SaccadeError` for one that is not named, not there, or looks at other channels.
    """
    found: dict[str, Teacher] = {}
    record: dict[str, Any] = {}
    derived: list[dict[str, Any]] = []
    for name, path in config.teachers().items():
        if not path:
            raise SaccadeError(f"this recipe needs {flag(name)}", path=flag(name), hint=BACKBONE)
        encoder = weights.load(path)
        channels = encoder.backbone.config.channels
        if channels != config.channels:
            raise SaccadeError(
                f"the teacher {path} looks at {channels} channels, not at {config.channels}",
                path=flag(name),
                hint=f"give --channels {channels}, or another teacher",
            )
        found[name], more = _with_heads(path, encoder)
        kept = ("family", "arch", "hash", "path", "licence", "terms")
        record[name] = {key: encoder.record.get(key) for key in kept} | more
        derived += origins(encoder.record)
    return found, ({"teachers": record, "derived_from": derived} if record else {})


def _with_heads(path: str, encoder: Encoder) -> tuple[Teacher, dict[str, Any]]:
    """A teacher, and of which step its heads are, where it is a run that has some."""
    place = Path(path).expanduser()
    if not (place / "config.json").is_file() or not (place / "checkpoints").is_dir():
        return Teacher(encoder.backbone), {}
    run = Run.open(place)
    if run.config["verb"] != "pretrain":  # what adapt hands over may be the start, and its heads were never warm on it
        return Teacher(encoder.backbone), {}
    page, config = configure(run.config["recipe"], run.config["settings"])
    checkpoint = next(run.steps(), None)
    if not issubclass(page.method, Taught) or checkpoint is None:
        return Teacher(encoder.backbone), {}
    step = verify(checkpoint)["step"]
    if step != encoder.record.get("steps", step):
        raise SaccadeError(
            f"the newest checkpoint of {path} is of step {step}, its backbone of {encoder.record['steps']}", path=path,
            hint="let the run finish: its own command goes on",
        )  # fmt: skip
    config = page.stages(config)[-1][1]
    if isinstance(config, SpreadDistillation):  # how that run shared its batches among ranks is no matter here
        config = config.model_copy(update={"koleo_weight": 0.0})
    with torch.device("meta"):
        method = page.method(config, copy.deepcopy(encoder.backbone).to("meta"), {})
    heads = nn.ModuleDict({name: part for name, part in method.teacher.items() if name.endswith("head")})
    heads.to_empty(device="cpu")
    live = {f"method/teacher.{name}": tensor for name, tensor in heads.state_dict().items()}
    distributed.load_tensors(live, checkpoint, Ranks(0, 1, torch.device("cpu")), part=True)
    return Teacher(encoder.backbone, dict(heads.items()), config, method.assignment), {"heads_of_step": step}


def compare(teachers: Mapping[str, Teacher], student: nn.Module, record: Mapping[str, Any]) -> None:
    """Says on stderr that a teacher is smaller than its student: it is allowed, and seldom meant."""
    size = sum(parameter.numel() for parameter in student.parameters())
    for name, teacher in teachers.items():
        own = sum(parameter.numel() for parameter in teacher.backbone.parameters())
        if own < size:
            which = record["teachers"][name]["path"]
            say(f"saccade: the teacher {which} ({own / 1e6:.1f} M) is smaller than its student ({size / 1e6:.1f} M)")


def unchanged(before: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What a run begins with, `now`; with a network of the user's, what it began with: of then are its weights.

    Raises `SaccadeError` where a teacher is not the one that the run began with.
    """
    for name, teacher in now.get("teachers", {}).items():
        known = before.get("teachers", {}).get(name, teacher)
        if known["hash"] != teacher["hash"]:
            raise SaccadeError(
                f"the teacher {teacher['path']} is not the one that this run began with: it has other weights",
                path=flag(name),
                hint="put it back, or begin a new run in another --out",
            )
    given = before.get("weights") == "given" and before["shapes"] == now.get("shapes")
    return dict(before) if given else now

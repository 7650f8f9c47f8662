"""An encoder with the head that stands on it, as a run holds them: `backbone/` and `head/`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade import weights
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.finetune.task import Head, Task, find
from saccade.run import write_json
from saccade.settings import json_object
from saccade.tensors import hash_of, read_tensors

FORMAT = "saccade-head-1"
HEAD, CONFIG, STATE = "head", "config.json", "head.safetensors"


@dataclass(frozen=True)
class Tuned:
    """A model that does a task: pictures through `encoder` and `head` to answers. `facts` say what they mean."""

    encoder: Encoder
    head: Head
    task: Task
    facts: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Writes `backbone/` and `head/` into a run directory: what `load` reads; what was there is replaced."""
        record = {**self.encoder.record, "preprocess": prepared(self.encoder.preprocess)}
        weights.save_backbone(Path(path) / "backbone", self.encoder.backbone, record, self.encoder.text)
        self.save_head(path)

    def save_head(self, path: str | Path) -> None:
        """Writes `head/` alone."""
        folder = Path(path) / HEAD
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{STATE}.new"
        save_file({name: x.detach().cpu().contiguous() for name, x in self.head.state_dict().items()}, new)
        said = {
            "format": FORMAT, "task": self.task.name, "config": self.head.config(), "facts": dict(self.facts),
            "preprocess": dataclasses.asdict(self.encoder.preprocess), "weights": {"blake3": hash_of(new)},
        }  # fmt: skip
        os.replace(new, folder / STATE)
        write_json(folder / CONFIG, said)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Answers of pictures [B C H W] in [0, 1] or uint8, as the encoder's `preprocess` makes them."""
        return self.head.answer(self.head(self.head.features(self.encoder.backbone, images)))


def prepared(preprocess: Preprocess) -> dict[str, Any]:
    """As a record says how a family prepares pictures."""
    return {name: value for name, value in dataclasses.asdict(preprocess).items() if name != "channels"}


def load(run: str | Path) -> Tuned:
    """The model of a run of `saccade finetune`, on the CPU. Raises `SaccadeError` for anything else."""
    place = Path(run).expanduser()
    folder = place / HEAD
    if not (folder / CONFIG).is_file():
        verb = json_object(place / "config.json").get("verb") if (place / "config.json").is_file() else None
        hints = {"finetune": "let it finish: the same command goes on", None: "name the --out of a saccade finetune"}
        backbone = f"it is a run of saccade {verb}: saccade finetune {run} LABELLED --out RUN gives it one"
        raise SaccadeError(
            f"{run} has no head{' yet' if verb == 'finetune' else ''}", path=run, hint=hints.get(verb, backbone)
        )
    said = json_object(folder / CONFIG)
    if said.get("format") != FORMAT:
        raise SaccadeError(
            f"{folder / CONFIG} has format {said.get('format')!r}, which this version does not know",
            path=folder / CONFIG,
            hint=f"it reads {FORMAT!r}; a newer saccade may have written it",
        )
    if hash_of(folder / STATE) != said["weights"]["blake3"]:
        raise SaccadeError(
            f"{folder / STATE} is not the file that was saved", path=folder / STATE, hint="copy it again"
        )
    page = find(said["task"])
    head = page.head(**said["config"])
    head.load_state_dict(read_tensors(folder / STATE))
    preprocess = Preprocess(**said["preprocess"])
    encoder = weights.load(place, image_size=preprocess.crop)
    encoder.preprocess = preprocess
    return Tuned(encoder, head.eval(), page, said["facts"])

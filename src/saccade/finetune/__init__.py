"""From a backbone to a model that does a task: a head on frozen features, or backbone and head tuned together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saccade.data import Source
from saccade.encoder import Encoder
from saccade.run import Run

__all__ = ["finetune"]


def finetune(
    backbone: str | Path | Encoder,
    data: str | Path | Source,
    *,
    task: str = "classification",
    mode: str = "frozen",
    out: str | Path,
    **settings: Any,
) -> Run:
    """Learns a task from labelled pictures on top of a backbone, examines it once on test, and writes the model.

    `settings` are the flags of `saccade finetune` by their own names: the verb's, the task's, and those of tuning.
    """
    raise NotImplementedError

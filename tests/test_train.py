"""How long a run is that is asked for in minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toys import RECIPES
from toys.sources import Pictures

import saccade.recipes
from saccade import recipe, train
from saccade.data import Batch
from saccade.distributed import Ranks
from saccade.model import Model
from saccade.run import holding
from saccade.settings import PretrainArguments


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_minutes_weigh_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second in the first half and three in the second: of 600 seconds 17 go to timing."""
    clock, steps = Clock(), []

    def step(self: Model, batches: Iterator[Batch], t: float) -> dict[str, torch.Tensor]:
        steps.append(next(batches)["images"].shape[-1])
        clock.now += 1.0 if steps[-1] == 16 else 3.0
        return {"loss": torch.ones(())}

    monkeypatch.setattr(saccade.recipes, "__path__", [*saccade.recipes.__path__, RECIPES])
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(Model, "step", step)
    page, config = recipe.configure("growing", {"minutes": 10})
    arguments = PretrainArguments(data=("toy",), recipe="growing", out=str(tmp_path / "run"), workers=0)
    ranks = Ranks(0, 1, torch.device("cpu"))
    with holding():
        made = train.Pretraining(page, config, arguments, [Pictures(24)], ranks)
    assert steps == [16] * 8 + [24] * 3
    assert made.steps == (600 - 17) // 2 == 291 and made.step == 0
    assert made.run.record["steps"] == made._measure_steps() == 291 and len(steps) == 11, "the record remembers"

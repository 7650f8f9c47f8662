"""A network of the user's own; under torchrun, trained on all ranks: OUT, TEACHER, SHARDING."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from toys.sources import Pictures


class Plain(nn.Module):
    """One vector, without batch norm, whose statistics are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x).relu().mean((2, 3)))


def settings() -> dict[str, Any]:
    """A run of three steps."""
    return {
        "recipe": "distil",
        "network": Plain(),
        "image_size": 32,
        "batch": 4,
        "steps": 3,
        "workers": 0,
        "log_every": 1,
    }


def main(out: str, teacher: str, sharding: str) -> None:
    """Trains; a wrapper that lies in a cycle must not live until the interpreter ends."""
    saccade.pretrain(Pictures(8), out=out, teacher=teacher, sharding=sharding, **settings())
    gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Under torchrun: trains each recipe that is named on all ranks, once with DDP and once with FSDP2."""

from __future__ import annotations

import sys

import torch.distributed

import saccade.recipes
from toys import RECIPES, small, source


def main(out: str, *recipes: str) -> None:
    saccade.recipes.__path__.append(RECIPES)
    torch.distributed.init_process_group("gloo")
    for sharding in ("ddp", "fsdp"):
        for name in recipes:
            place = f"{out}/{sharding}/{name}"
            settings = {**small(name), "sharding": sharding, "workers": 0, "log_every": 1}
            saccade.pretrain(source(name), recipe=name, out=place, **settings)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

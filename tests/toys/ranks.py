"""Under torchrun: trains each recipe that is named on all ranks, once with DDP and once with FSDP2."""

from __future__ import annotations

import gc
import sys

import saccade.recipes
from saccade import distributed
from toys import RECIPES, small, source


def main(out: str, *recipes: str) -> None:
    saccade.recipes.__path__.append(RECIPES)
    with distributed.ranks():
        for sharding in ("ddp", "fsdp"):
            for name in recipes:
                settings = {**small(name), "sharding": sharding, "workers": 0, "log_every": 1}
                saccade.pretrain(source(name), recipe=name, out=f"{out}/{sharding}/{name}", **settings)
                gc.collect()  # a wrapper that lies in a cycle must not live until the interpreter ends


if __name__ == "__main__":
    main(*sys.argv[1:])

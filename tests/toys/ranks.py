"""Under torchrun: trains each case that is named on all ranks, once with DDP and once with FSDP2."""

from __future__ import annotations

import gc
import sys

import saccade.recipes
from saccade import distributed
from toys import RECIPES, small, source


def main(out: str, *cases: str) -> None:
    saccade.recipes.__path__.append(RECIPES)
    with distributed.ranks():
        for sharding in ("ddp", "fsdp"):
            for case in cases:
                recipe = case.partition("-")[0]
                settings = {**small(case), "sharding": sharding, "workers": 0, "log_every": 1}
                saccade.pretrain(source(case), recipe=recipe, out=f"{out}/{sharding}/{case}", **settings)
                gc.collect()  # a wrapper that lies in a cycle must not live until the interpreter ends


if __name__ == "__main__":
    main(*sys.argv[1:])

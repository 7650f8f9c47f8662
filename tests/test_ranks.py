"""Any number of ranks and workers, from any checkpoint: the same samples, the same views, the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from toys import forge
from toys.sources import Pictures

from saccade import recipe
from saccade.data import MicroBatches, loader
from saccade.draws import Draws, Order
from saccade.errors import SaccadeError
from saccade.run import Run

BATCH, STEPS = 24, 7
SAVES = [(1, 4), (3, 5), (4, 6)]
"""Where a run is interrupted: at its first save, and again at a second one."""


def views(world: int, workers: int, stops: tuple[int, ...], accumulate: int = 1) -> dict[int, tuple[int, str]]:
    """What every position of the stream becomes: its sample's key, and a hash of its view's bytes."""
    source, found = Pictures(40, broken=frozenset({3, 17})), {}
    page, config = recipe.configure(
        "mae",
        {"arch": "vit-ti/8", "image_size": 32, "batch": BATCH, "steps": STEPS, "accumulate": accumulate, "seed": 5},
    )
    for first, last in pairwise([0, *stops, STEPS]):
        for rank in range(world):
            order = Order(*source.parts(), config.seed)  # every session and every rank begins with nothing
            for delivery in loader(source, order, first_step=first, last_step=last, batch=BATCH, accumulate=accumulate,
                                   rank=rank, world=world, workers=workers):  # fmt: skip
                batch = delivery.batch
                draws = Draws(config.seed, delivery.step, batch["key"], batch["seen"], batch["place"])
                made = page.views(config, batch, draws)
                numbers = draws.step("any").uniform(3)
                for row, place in enumerate(batch["place"].tolist()):
                    content = b"".join(tensor[row].numpy().tobytes() for tensor in (*made.values(), numbers))
                    position = delivery.step * BATCH + place
                    assert position not in found, "a position was delivered twice"
                    found[position] = (int(batch["key"][row]), blake3(content).hexdigest())
    return found


@cache
def expected() -> dict[int, tuple[int, str]]:
    found = views(world=1, workers=0, stops=())
    assert sorted(found) == list(range(BATCH * STEPS)) and len(set(found.values())) == BATCH * STEPS
    return found


@pytest.mark.parametrize("stops", SAVES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_samples_and_views_do_not_depend_on_ranks_and_saves(world: int, stops: tuple[int, ...]) -> None:
    assert views(world, 0, stops) == expected()


@pytest.mark.parametrize(
    ("world", "stops"),
    [
        # two worker processes for each rank of each session: half a minute for all of them
        pytest.param(world, stops, marks=[] if (world, stops) == (2, SAVES[1]) else pytest.mark.slow)
        for world in (1, 2, 3, 4)
        for stops in SAVES
    ],
)
def test_nor_on_workers(world: int, stops: tuple[int, ...]) -> None:
    assert views(world, 2, stops) == expected()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_nor_on_accumulation(accumulate: int) -> None:
    assert views(3, 0, SAVES[0], accumulate) == expected()


def test_an_indivisible_batch_is_refused_with_what_would_do() -> None:
    with pytest.raises(SaccadeError, match=r"batch of 16 cannot be divided over 3 ranks x 1 .*15 or 18") as error:
        MicroBatches(0, 1, 16, 1, 0, 3)
    assert error.value.path == "--batch"
    with pytest.raises(SaccadeError, match=r"12 or 24, or --accumulate 1, 2, 3, 6\)"):
        MicroBatches(0, 1, 18, 4, 0, 3)
    with pytest.raises(SaccadeError, match=r"use a batch of 3\)"):
        MicroBatches(0, 1, 2, 1, 0, 3)


def losses(out: Path) -> torch.Tensor:
    logged = Run.open(out).metrics()
    assert [entry["step"] for entry in logged] == list(range(1, 13))
    return torch.tensor([[entry["loss"], entry["gradient_norm"]] for entry in logged], dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(workshop: forge.Forge, data: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Losses and gradient norms of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert workshop.session(out, data)["codes"] == [0]
    return losses(out)


def close(out: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(losses(out), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("world", "sharding", "later"),
    [
        (2, "ddp", 1),
        (2, "fsdp", 3),
        *(
            # up to four processes on two cores: ten seconds each
            pytest.param(world, sharding, later, marks=pytest.mark.slow)
            for world, sharding, later in [
                (2, "fsdp", 1),
                (2, "fsdp", 2),
                (2, "fsdp", 4),
                (1, "fsdp", 2),
                (4, "fsdp", 2),
                (1, "ddp", 4),
                (3, "ddp", 2),
            ]
        ),
    ],
)
def test_saved_on_some_ranks_and_resumed_on_others(
    workshop: forge.Forge, data: Path, alone: torch.Tensor, tmp_path: Path, world: int, sharding: str, later: int
) -> None:
    """Killed in the first stage, then stopped in the second, the last session on `later` ranks again."""
    out = tmp_path / "run"
    told = workshop.session(out, data, world=world, sharding=sharding, stop={"step": 3})
    assert told["codes"] == [-9] * world, told["said"]
    told = workshop.session(out, data, world=later, sharding=sharding, stop={"step": 9, "signal": "SIGTERM"})
    assert told["codes"] == [75] * later and "going on at step" in told["said"], told["said"]
    told = workshop.session(out, data, world=later, sharding=sharding)
    assert told["codes"] == [0] * later and "Warning" not in told["said"], told["said"]
    close(out, alone)


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])  # slow: a dozen seconds
def test_uninterrupted_ranks_learn_as_one(
    workshop: forge.Forge, data: Path, alone: torch.Tensor, tmp_path: Path, sharding: str
) -> None:
    told = workshop.session(tmp_path / "run", data, world=2, sharding=sharding, workers=2, accumulate=2)
    assert told["codes"] == [0, 0] and "Warning" not in told["said"], told["said"]
    close(tmp_path / "run", alone)


@pytest.mark.slow  # a dozen seconds
def test_sharding_may_change_between_sessions(
    workshop: forge.Forge, data: Path, alone: torch.Tensor, tmp_path: Path
) -> None:
    told = workshop.session(tmp_path / "run", data, world=2, sharding="fsdp", stop={"saving": 0.0})
    assert told["codes"] == [-9, -9], told["said"]
    told = workshop.session(tmp_path / "run", data, world=3, sharding="fsdp", stop={"step": 6})
    assert told["codes"] == [-9] * 3, told["said"]
    told = workshop.session(tmp_path / "run", data, world=2, sharding="ddp")
    assert told["codes"] == [0, 0] and not list((tmp_path / "run" / "checkpoints").glob(".*")), told["said"]
    close(tmp_path / "run", alone)


def test_ranks_refuse_together(workshop: forge.Forge, data: Path, tmp_path: Path) -> None:
    """Every rank ends, with the code of a wrong use; none waits for another."""
    out = tmp_path / "run"
    told = workshop.session(out, data, world=3, batch=16)
    assert told["codes"] == [2] * 3 and "use a batch of 15 or 18" in told["said"], told["said"]
    assert told["said"].count("\n") == 1 and not out.exists()
    told = workshop.session(out, data, world=2, stop={"step": 3, "signal": "SIGTERM"})
    assert told["codes"] == [75] * 2 and told["said"].count("stopped on request") == 1, told["said"]
    told = workshop.session(out, data, world=2, lr=0.5)
    assert told["codes"] == [2] * 2 and "holds another run" in told["said"], told["said"]
    assert told["said"].count("\n") == 1 and told["seconds"] < 60


@pytest.mark.slow  # half a minute: processes that import everything
def test_torchrun_and_one_process_end_alike(data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, "-m", "saccade", "pretrain", data, "--recipe", "mae:small_machine", "--arch",
                   "vit-ti/8", "--image-size", "16", "--batch", "8", "--steps", "3", "--out", tmp_path / name,
                   "--log-every", "1", "--workers", "0", "--json"]  # fmt: skip
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["steps"] == 3, "only the first rank answers"
    one, two = ([entry["loss"] for entry in Run.open(tmp_path / name).metrics()] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)

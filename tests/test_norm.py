"""Batch norm over ranks is torch's over the whole batch, and alone it is torch's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from saccade.norm import BatchNorm

SHAPES = [(12, 5), (12, 5, 4, 3), (6, 64, 8, 8)]
CASES = [(shape, affine, last) for shape in SHAPES for affine in (True, False) for last in (False, True)]
"""Shape, with weight and bias or not, channels last or not."""


def batches(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Two batches far from mean 0 and spread 1, and what is asked of the outputs."""
    torch.manual_seed(len(shape))
    return [(10 + 3 * torch.randn(shape), torch.randn(shape)) for _ in range(2)]


def run(module: nn.Module, shape: tuple[int, ...], part: int = 0, parts: int = 1, last: bool = False) -> list[Tensor]:
    """Outputs and gradients of a part of the batches; then the state, and the gradients of weight and bias."""
    torch.manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    found = []
    for x, gradient in batches(shape):
        x, gradient = x.chunk(parts)[part], gradient.chunk(parts)[part]
        x = (x.to(memory_format=torch.channels_last) if last and x.ndim == 4 else x.clone()).requires_grad_()
        y = module(x)
        y.backward(gradient)
        assert x.grad is not None and x.stride() == y.stride() == x.grad.stride()
        found += [y.detach(), x.grad]
    return [*found, *module.state_dict().values(), *(p.grad for p in module.parameters())]


def whole(shape: tuple[int, ...], affine: bool) -> list[Tensor]:
    """What torch's own module gives for the whole batch."""
    return run((nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], affine=affine), shape)


def close(value: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest number; a sum over many numbers is no better in float32."""
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("shape", "affine", "last"), CASES)
def test_alone_it_is_torch_s(shape, affine, last):
    ours, theirs = BatchNorm(shape[1], affine=affine), nn.BatchNorm2d(shape[1], affine=affine)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for value, expected in zip(run(ours, shape, last=last), whole(shape, affine), strict=True):
        close(value, expected)
    theirs.load_state_dict(ours.state_dict())
    x = batches((2, shape[1], 3, 3))[0][0]
    assert torch.equal(ours.eval()(x), theirs.eval()(x)), "evaluation reads the running statistics"
    half = ours.train()(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and ours.running_var.dtype == torch.float32
    ours.reset_parameters()
    assert all(
        torch.equal(value, fresh)
        for value, fresh in zip(
            ours.state_dict().values(), nn.BatchNorm2d(shape[1], affine=affine).state_dict().values(), strict=True
        )
    )


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in range(max(2, rank + 1), 4):
        dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
        found = [run(BatchNorm(shape[1], affine=affine), shape, rank, world, last) for shape, affine, last in CASES]
        low = BatchNorm(5)(batches((12, 5))[0][0].chunk(world)[rank].to(torch.bfloat16))
        torch.save((found, low), f"{folder}/{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    """All cases on two ranks and on three."""
    folder = tmp_path_factory.mktemp("norm")
    mp.spawn(_rank, (str(folder),), nprocs=3)
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_ranks_equal_one(ranked, world, case):
    shape, affine, _ = CASES[case]
    parts = [found[case] for found, _ in ranked[world]]
    for place, expected in enumerate(whole(shape, affine)):
        values = [part[place] for part in parts]
        if place < 4:  # outputs and their gradients: each rank has its own
            value = torch.cat(values)
        elif place < 4 + 3 + 2 * affine:  # the state is that of the whole batch, bit for bit on every rank
            assert all(torch.equal(value, values[0]) for value in values)
            value = values[0]
        else:  # gradients of weight and bias, which the wrappers average
            value = torch.stack(values).sum(0)
        close(value, expected)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_keep_low_precision(ranked, world):
    low = torch.cat([low for _, low in ranked[world]])
    assert low.dtype == torch.bfloat16
    expected = BatchNorm(5)(batches((12, 5))[0][0].to(torch.bfloat16))
    torch.testing.assert_close(low, expected, rtol=1e-2, atol=1e-2)

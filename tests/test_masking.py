"""What is hidden from a student: as much, where and in such pieces as the references hide, whoever computes it.

tests/parity/make_distillation.py made the references' numbers: mean and squared standard error of each statistic.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade import masking
from saccade.draws import Draws
from saccade.recipes import dinov2, ibot
from saccade.settings import MaskedDistillation

PARITY = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("make_distillation", PARITY / "make_distillation.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
STORED = load_file(PARITY / "distillation.safetensors")
VIEWS = 2000
UNLIKELY = 5.0
"""Standard errors: by chance one comparison in two million is so far off."""


def draws(samples: int, step: int = 0, first: int = 0) -> Draws:
    rows = torch.arange(first, first + samples)
    return Draws(0, step, rows + 100, torch.zeros_like(rows), rows)


def words(views: int, name: str = "words") -> Tensor:
    return draws(views).step(name).bits(1)[:, 0]


def hidden(grid: tuple[int, int], count: int, *, who: str = "dinov2", fill: bool = False, views: int = VIEWS) -> Tensor:
    """Masks [V H W] of one target."""
    smallest = 4 if who == "dinov2" else (min(grid) // 3) ** 2
    found = masking.blocks(words(views), torch.full((views,), count), grid, fill=fill, smallest=smallest)
    return found.unflatten(1, grid)


def unlike(who: str, grid: tuple[int, int], ratio: float) -> dict[str, float]:
    """How many standard errors each statistic is from the reference's."""
    values = reference.shape_of(hidden(grid, int(math.prod(grid) * ratio), who=who))
    ours, theirs = reference.moments(values), STORED[f"masks/{who} {grid[0]}x{grid[1]} {ratio}"]
    apart = (ours[:, 0] - theirs[:, 0]).abs() / (ours[:, 1] + theirs[:, 1]).sqrt().clamp(min=1e-9)
    return dict(zip(values, apart.tolist(), strict=True))


@pytest.mark.parametrize("ratio", reference.RATIOS)
@pytest.mark.parametrize("grid", reference.GRIDS, ids=str)
@pytest.mark.parametrize("who", ["dinov2", "ibot"])
def test_masks_look_like_the_reference_s(who: str, grid: tuple[int, int], ratio: float) -> None:
    """How many are hidden and how that varies, how ragged and how flat the pieces are, and how often from each ring."""
    found = unlike(who, grid, ratio)
    assert max(found.values()) < UNLIKELY, found


def larger_pieces(patch: pytest.MonkeyPatch) -> None:
    right = masking._rectangle
    patch.setattr(masking, "_rectangle", lambda u, m, c, g, s: right(u, m, c, g, 4 * s))


def squarer_pieces(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masking, "_ASPECT", 0.6)


def only_upright_pieces(patch: pytest.MonkeyPatch) -> None:
    right = masking._rectangle

    def wrong(u: Tensor, m: Tensor, c: Tensor, g: tuple[int, int], s: int) -> Tensor:
        u = torch.stack([u[..., 0], 0.5 + u[..., 1] / 2, u[..., 2], u[..., 3]], -1)
        return right(u, m, c, g, s)

    patch.setattr(masking, "_rectangle", wrong)


def towards_the_corner(patch: pytest.MonkeyPatch) -> None:
    right = masking._rectangle

    def wrong(u: Tensor, m: Tensor, c: Tensor, g: tuple[int, int], s: int) -> Tensor:
        return right(torch.cat([u[..., :2], u[..., 2:].square()], -1), m, c, g, s)

    patch.setattr(masking, "_rectangle", wrong)


def one_attempt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masking, "_ATTEMPTS", 1)


def few_rounds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masking, "_ROUNDS", 5)


@pytest.mark.parametrize(
    ("mutate", "told_by"),
    [
        (larger_pieces, "edges"),
        (squarer_pieces, "uneven"),
        (only_upright_pieces, "uneven"),
        (towards_the_corner, "ring 0"),
        (one_attempt, "count"),
        (few_rounds, "count"),
    ],
)
def test_other_masks_do_not(monkeypatch, mutate: Callable[[pytest.MonkeyPatch], None], told_by: str) -> None:
    mutate(monkeypatch)
    assert unlike("dinov2", (16, 16), 0.25)[told_by] > 2 * UNLIKELY


def test_ibot_s_pieces_are_not_dinov2_s() -> None:
    values = reference.shape_of(hidden((14, 14), 49, who="dinov2"))
    ours, theirs = reference.moments(values), STORED["masks/ibot 14x14 0.25"]
    assert ((ours - theirs)[:, 0].abs() / (ours + theirs)[:, 1].sqrt()).max() > 6 * UNLIKELY


@pytest.mark.parametrize("grid", [*reference.GRIDS, (5, 9)], ids=str)
def test_what_is_filled_is_exact(grid: tuple[int, int]) -> None:
    patches = math.prod(grid)
    counts = torch.arange(200) * patches // 199  # nothing to everything
    blocks, filled = (masking.blocks(words(200), counts, grid, fill=fill) for fill in (False, True))
    assert torch.equal(filled.sum(1), counts)
    assert (blocks <= filled).all() and (blocks.sum(1) <= counts).all() and (blocks.sum(1) < counts).any()
    alone = masking.blocks(words(800), torch.full((800,), patches // 3), grid, fill=True, smallest=9 * patches)
    assert (alone.sum(1) == patches // 3).all(), "no rectangle fits, and single patches are anywhere"
    share, part = alone.double().mean(0), patches // 3 / patches
    assert (share - part).abs().max() < UNLIKELY * math.sqrt(part * (1 - part) / 800)


def test_a_view_s_mask_is_its_own() -> None:
    """Whatever other views there are."""
    counts = torch.tensor([0, 9, 40, 98]).repeat(10)
    rows = words(40)
    whole = masking.blocks(rows, counts, (14, 14), fill=True)
    assert torch.equal(whole[7:19], masking.blocks(rows[7:19], counts[7:19], (14, 14), fill=True))
    assert len(whole.unique(dim=0)) == 31, "nothing hidden is the only mask that comes twice"


# How much


@pytest.mark.parametrize(("batch", "views"), [(32, 2), (7, 2), (5, 3), (1, 1)])
def test_strata_are_one_in_each_part(batch: int, views: int) -> None:
    strata = draws(batch).strata("masked", batch, views)
    parts = (strata * batch * views).long()
    assert torch.equal(parts.sort().values, torch.arange(batch * views))
    if batch > 1:
        assert not torch.equal(parts, draws(batch, step=1).strata("masked", batch, views).mul(batch * views).long())


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_strata_do_not_depend_on_who_computes_them(pieces: int) -> None:
    """Ranks and micro-batches see their own samples of the same global batch."""
    whole, size = draws(32).strata("masked", 32, 2).unflatten(0, (2, 32)), 32 // pieces
    parts = [draws(size, first=n * size).strata("masked", 32, 2).unflatten(0, (2, size)) for n in range(pieces)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_strata_are_uniform_for_each_place() -> None:
    found = torch.stack([draws(4, step).strata("masked", 4, 2) for step in range(1500)])
    torch.testing.assert_close(found.mean(0), torch.full((8,), 0.5).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((8,), 12**-0.5).double(), atol=0.02, rtol=0)


def test_half_of_the_views_are_masked_and_ratios_are_even() -> None:
    """As DINOv2's collation: one target from each of as many equal bins of the ratios as views are masked."""
    patches, batch = 10_000, 64
    counts = masking.masked_counts(draws(batch).strata("masked", batch, 2), patches, 0.5, (0.1, 0.5))
    masked = counts[counts > 0].sort().values
    assert len(masked) == batch
    bins = torch.linspace(0.1, 0.5, batch + 1) * patches
    assert (masked >= bins[:-1].floor()).all() and (masked <= bins[1:].ceil()).all()
    assert not masking.masked_counts(torch.rand(50), patches, 0.0, (0.1, 0.5)).any()
    everything = masking.masked_counts(torch.linspace(0, 0.999, 50), patches, 1.0, (0.2, 0.3))
    assert everything.min() == 2000 and 2980 < everything.max() < 3000


def shown(page: object, config: MaskedDistillation, samples: int, step: int, first: int = 0) -> Tensor:
    pixels = torch.zeros(samples, 1, 3, 16, 16, dtype=torch.uint8)
    batch = {"pixels": pixels, "size": torch.tensor([[16, 16]]).repeat(samples, 1)}
    return page.views(config, batch, draws(samples, step, first))["hide"]


SMALL = {"arch": "vit-ti/2", "image_size": 16, "local_size": 8, "local_crops": 0, "batch": 16}


@pytest.mark.parametrize("page", [ibot, dinov2], ids=lambda page: page.__name__)
def test_a_recipe_s_masks_are_those_of_its_place(page: object) -> None:
    config = page.Config(**SMALL)
    whole = shown(page, config, 16, 3).unflatten(0, (2, 16))
    parts = [shown(page, config, 4, 3, first).unflatten(0, (2, 4)) for first in range(0, 16, 4)]
    assert torch.equal(torch.cat(parts, 1), whole) and whole.shape[2] == 64


def test_dinov2_masks_exactly_half_of_a_batch_and_ibot_each_view_by_itself() -> None:
    steps = [
        [shown(page, page.Config(**SMALL), 16, step).any(1).sum() for step in range(25)] for page in (dinov2, ibot)
    ]
    even, free = torch.tensor(steps).double()
    assert (even == 16).all()
    assert free.mean() == pytest.approx(16, abs=4 * math.sqrt(8 / 25)) and free.std() == pytest.approx(8**0.5, rel=0.5)


@pytest.mark.parametrize(("page", "smallest"), [(ibot, 16), (dinov2, 4)], ids=["ibot", "dinov2"])
def test_each_recipe_has_its_smallest_rectangle(monkeypatch, page: object, smallest: int) -> None:
    asked, right = [], masking.blocks

    def blocks(*arguments: Tensor, fill: bool, smallest: int) -> Tensor:
        asked.append((fill, smallest))
        return right(*arguments, fill=fill, smallest=smallest)

    monkeypatch.setattr(masking, "blocks", blocks)
    shown(page, page.Config(**{**SMALL, "arch": "vit-ti/1", "image_size": 14}), 4, 0)
    assert asked == [(False, smallest)]

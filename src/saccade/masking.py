"""Which patches a student does not see: blocks as BEiT hides them (arXiv 2106.08254), for iBOT, DINOv2 and DINOv3."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saccade import vit
from saccade.draws import Draws, Stream
from saccade.settings import MaskedDistillation

_ROUNDS, _ATTEMPTS = 12, 10
_SMALLEST = 4
_ASPECT = 0.3


def masked_counts(
    strata: Float[Tensor, " v"], patches: int, share: float, ratios: tuple[float, float]
) -> Int[Tensor, " v"]:
    """How many patches of each view are hidden: none, or for this share of the views a part between two ratios.

    `strata` in [0, 1) decide both, so that those of `Draws.strata` spread the ratios evenly over a batch.
    """
    low, high = ratios
    ratio = low + (high - low) * strata / share if share else strata
    return torch.where(strata < share, (patches * ratio).long(), 0)


def block_masks(
    config: MaskedDistillation,
    draws: Draws,
    strata: Float[Tensor, " v"],
    crops: Shaped[Tensor, "v c s s"],
    *,
    fill: bool,
) -> Bool[Tensor, "v n"]:
    """True for the patches of large crops that the student does not see, on the crops' device; view-major like them."""
    grid = vit.grid_of(tuple(crops.shape[-2:]), vit.parse(config.arch)[1])
    counts = masked_counts(strata, math.prod(grid), config.masked, config.mask_ratio)
    rows = draws.step("blocks").bits(2).T.flatten()
    return blocks(rows, counts, grid, fill=fill).to(crops.device)


def blocks(
    rows: Int[Tensor, " v"], counts: Int[Tensor, " v"], grid: tuple[int, int], *, fill: bool
) -> Bool[Tensor, "v n"]:
    """Rectangles, drawn until as many patches are hidden as `counts` says. `rows` are random, one a view.

    A rectangle has at least 4 patches' area, at most half of the picture's or what is still to hide, and an aspect
    between 0.3 and 1 / 0.3; of ten that are drawn the first that fits is taken. Where no more fit, single patches make
    the count exact (DINOv3) if `fill`; otherwise somewhat fewer are hidden (iBOT, DINOv2).
    """
    height, width = grid
    numbers = Stream(rows, 0).uniform(_ROUNDS * _ATTEMPTS * 4 + height * width)
    attempts = numbers[:, : _ROUNDS * _ATTEMPTS * 4].unflatten(1, (_ROUNDS, _ATTEMPTS, 4))
    mask = torch.zeros(len(counts), height * width, dtype=torch.bool, device=counts.device)
    for number in range(_ROUNDS):
        mask |= _rectangle(attempts[:, number], mask, counts, grid)
    if not fill:
        return mask
    order = numbers[:, -height * width :].masked_fill(mask, -1.0).argsort(1, stable=True)
    return order.argsort(1) < counts[:, None]


def _rectangle(
    u: Float[Tensor, "v a 4"], mask: Bool[Tensor, "v n"], counts: Int[Tensor, " v"], grid: tuple[int, int]
) -> Bool[Tensor, "v n"]:
    """The first of each view's rectangles that hides something new, and not too much; nothing where none does."""
    height, width = grid
    most = torch.clamp(counts - mask.sum(1), max=height * width // 2)[:, None]
    area = _SMALLEST + u[..., 0] * (most - _SMALLEST)
    aspect = torch.exp((2 * u[..., 1] - 1) * -math.log(_ASPECT))
    rows, columns = (area.clamp(min=0) * aspect).sqrt().round(), (area.clamp(min=0) / aspect).sqrt().round()
    top, left = ((u[..., 2] * (height - rows + 1)).floor(), (u[..., 3] * (width - columns + 1)).floor())
    down, across = (torch.arange(side, device=u.device) for side in grid)
    tall = (down >= top[..., None]) & (down < (top + rows)[..., None])  # [V A H]
    wide = (across >= left[..., None]) & (across < (left + columns)[..., None])
    blocks = (tall[..., None] & wide[..., None, :]).flatten(2)  # [V A N]
    new = (blocks & ~mask[:, None]).sum(2)
    fits = (rows < height) & (columns < width) & (new > 0) & (new <= most)
    chosen = blocks[torch.arange(len(u), device=u.device), fits.int().argmax(1)]
    return chosen & fits.any(1, keepdim=True)

"""Which patches a student does not see: blocks as BEiT hides them (arXiv 2106.08254), for iBOT, DINOv2 and DINOv3."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saccade import vit
from saccade.draws import Draws, Stream
from saccade.settings import MaskedDistillation, Training

_ROUNDS, _ATTEMPTS = 48, 10
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


def scattered(config: Training, draws: Draws, crops: Shaped[Tensor, "v c s s"], part: float) -> Bool[Tensor, "v n"]:
    """True for this part of each crop's patches, one by one; one crop a sample, on the crops' device."""
    count = math.prod(vit.grid_of(tuple(crops.shape[-2:]), vit.parse(config.arch)[1]))
    chosen = draws.sample("hide").order(count)[:, : max(1, round(part * count))]
    return torch.zeros(len(chosen), count, dtype=torch.bool).scatter(1, chosen, True).to(crops.device)


def block_masks(
    config: MaskedDistillation,
    draws: Draws,
    crops: Shaped[Tensor, "v c s s"],
    *,
    spread: bool,
    fill: bool,
    smallest: Literal["4", "ninth"] = "4",
) -> Bool[Tensor, "v n"]:
    """True for the patches of large crops that the student does not see, on the crops' device; view-major like them.

    `spread`: parts to hide are spread evenly over the crops of a batch, and just as many crops have any (DINOv2);
    otherwise each crop draws for itself (iBOT).
    `smallest`: the area from which a rectangle's is drawn, 4 patches or (a third of the side) squared (iBOT).
    """
    grid = vit.grid_of(tuple(crops.shape[-2:]), vit.parse(config.arch)[1])
    alone = draws.step("masked").uniform(2).T.flatten()
    strata = draws.strata("masked", config.batch, 2) if spread else alone
    counts = masked_counts(strata, math.prod(grid), config.masked, config.mask_ratio)
    rows = draws.step("blocks").bits(2).T.flatten()
    area = 4 if smallest == "4" else (min(grid) // 3) ** 2
    return blocks(rows, counts, grid, fill=fill, smallest=area).to(crops.device)


def blocks(
    rows: Int[Tensor, " v"], counts: Int[Tensor, " v"], grid: tuple[int, int], *, fill: bool, smallest: int = 4
) -> Bool[Tensor, "v n"]:
    """Rectangles, drawn until as many patches are hidden as `counts` says. `rows` are random, one a view.

    A rectangle's area is between `smallest` patches and half of the picture's (the released code says half of its rows
    rounded down, which is less on an odd grid), or what is still to hide where that is less, and its aspect between 0.3
    and 1 / 0.3; of ten that are drawn the first that fits is taken. Where none of them fits a view is left as it is,
    with somewhat fewer hidden (iBOT, DINOv2), or with `fill` single patches make the count exact (DINOv3).
    """
    seeds = Stream(rows, 0).bits(_ROUNDS + 1)
    mask = torch.zeros(len(counts), math.prod(grid), dtype=torch.bool, device=counts.device)
    left = (counts > 0).nonzero()[:, 0]  # views that are not done
    for number in range(_ROUNDS):
        if not len(left):
            break
        u = Stream(seeds[left, number], 0).uniform(4 * _ATTEMPTS).unflatten(1, (_ATTEMPTS, 4))
        new = _rectangle(u, mask[left], counts[left], grid, smallest)
        mask[left] |= new
        left = left[new.any(1) & (mask[left].sum(1) < counts[left])]
    if not fill:
        return mask
    numbers = Stream(seeds[:, -1], 0).uniform(math.prod(grid)).masked_fill(mask, -1.0)
    return torch.argsort(numbers, dim=1, stable=True).argsort(1) < counts[:, None]


def _rectangle(
    u: Float[Tensor, "v a 4"],
    mask: Bool[Tensor, "v n"],
    counts: Int[Tensor, " v"],
    grid: tuple[int, int],
    smallest: int,
) -> Bool[Tensor, "v n"]:
    """The first of each view's rectangles that hides something new, and not too much; nothing where none does."""
    height, width = grid
    most = torch.clamp(counts - mask.sum(1), max=height * width // 2)[:, None]
    area = smallest + u[..., 0] * (most - smallest)
    aspect = torch.exp((2 * u[..., 1] - 1) * -math.log(_ASPECT))
    rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    top, left = ((u[..., 2] * (height - rows + 1)).floor(), (u[..., 3] * (width - columns + 1)).floor())
    inside = (rows < height) & (columns < width)
    edges = [torch.where(inside, edge, 0).long() for edge in (top, left, top + rows, left + columns)]
    sums = F.pad(mask.unflatten(1, grid).int().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)  # of all above and left
    corners = [sums.gather(1, y * (width + 1) + x) for y in edges[::2] for x in edges[1::2]]
    new = rows * columns - (corners[3] - corners[2] - corners[1] + corners[0])
    fits = inside & (new > 0) & (new <= most)
    top, left, bottom, right = (edge.gather(1, fits.int().argmax(1, keepdim=True)) for edge in edges)
    down, across = (torch.arange(side, device=u.device) for side in grid)
    tall = (down >= top) & (down < bottom) & fits.any(1, keepdim=True)
    return (tall[..., None] & ((across >= left) & (across < right))[:, None]).flatten(1)

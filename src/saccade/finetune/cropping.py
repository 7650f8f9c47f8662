"""The same crop of a picture and of what is known of its pixels: places, sizes and mirror images are drawn once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from saccade import augment
from saccade.augment import Views
from saccade.data import Batch
from saccade.draws import Draws
from saccade.finetune.pixelwise import MapSettings

_STRETCH = 0.15
"""Log of the largest change of aspect."""
_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.05}


def views(
    settings: MapSettings, batch: Batch, draws: Draws, side: int, targets: Sequence[Shaped[Tensor, "_ _"]]
) -> Batch:
    """A square view of each picture, `images` [B C S S], and the `targets` [B S S] of its pixels."""
    rows = boxes(settings, batch["size"], draws, side)
    images = augment.render(batch["pixels"], rows, side)
    shown = [target_of(target, rows, n, batch["size"][n], side) for n, target in enumerate(targets)]
    return {"images": images, "targets": torch.stack(shown).to(images.device)}


def boxes(settings: MapSettings, size: Int[Tensor, "b 2"], draws: Draws, side: int) -> Views:
    """Windows as large as pictures are looked at, up to `zoom` times smaller, and larger where there is more to see."""
    drawn = draws.sample("crop").uniform(4).double().to(size.device)
    full = size.double()
    base = full.amin(dim=1) if settings.scale is None else torch.full_like(full[:, 0], side / settings.scale)
    base = base * torch.exp((2 * drawn[:, 0] - 1) * math.log(settings.zoom))
    stretch = torch.exp((2 * drawn[:, 1] - 1) * _STRETCH)
    sides = torch.stack([base * stretch, base / stretch], dim=1).round().clamp(min=1)
    sides = torch.minimum(sides, full)
    corner = (drawn[:, 2:] * (full - sides + 1)).floor()
    found = dataclasses.replace(augment.whole(size), box=torch.cat([corner, sides], dim=1).long())
    found = augment.flip(found, draws.sample("flip"), settings.flip)
    if settings.colour:
        change = {name: settings.colour * value for name, value in _JITTER.items()}
        found = augment.jitter(found, draws.sample("jitter"), **change, probability=0.8)
    return found


def target_of(
    target: Shaped[Tensor, "h w"], rows: Views, number: int, size: Int[Tensor, " 2"], side: int
) -> Shaped[Tensor, "s s"]:
    """What is known of the pixels of a view: of each the nearest one, for classes have no mean."""
    top, left, high, wide = rows.box[number].tolist()
    place = torch.arange(side) + 0.5
    across = place.flip(0) if bool(rows.flip[number]) else place
    down, across = (
        ((start + at * length / side) * target.shape[axis] / int(size[axis])).long().clamp(max=target.shape[axis] - 1)
        for axis, (start, at, length) in enumerate(((top, place, high), (left, across, wide)))
    )
    return target[down][:, across]

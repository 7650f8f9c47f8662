"""Scores of patches as a map of a picture's size, and as a PNG."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

BLUR = 0.3
"""Spread of the Gaussian that smooths a map, as a part of a patch: about PatchCore's 4 pixels at patches of 14."""
MIDDLE = 32768
"""Value in a PNG of a patch that is as far from normal as `unit` says: mid-grey."""


def enlarged(scores: Float[Tensor, "y x"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Bilinearly to a picture's height and width, then smoothed a little; within the range of the scores."""
    whole = F.interpolate(scores[None, None].float(), size=list(size), mode="bilinear", align_corners=False)
    for axis in (2, 3):
        whole = _smooth(whole, axis, BLUR * size[axis - 2] / scores.shape[axis - 2])
    return whole[0, 0]


def _smooth(whole: Float[Tensor, "1 1 h w"], axis: int, spread: float) -> Float[Tensor, "1 1 h w"]:
    reach = round(3 * spread)
    if reach < 1:
        return whole
    reach = min(reach, whole.shape[axis])
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=whole.device) / spread) ** 2)
    kernel = kernel / kernel.sum()
    pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return F.conv2d(F.pad(whole, pad, mode="replicate"), kernel.view(shape))


def write(path: Path, scores: Float[Tensor, "h w"], unit: float) -> None:
    """A 16-bit grey PNG: 0 is normal, `MIDDLE` is `unit`, and 65535 twice that or more."""
    values = (scores / max(unit, 1e-12) * MIDDLE).round().clamp(0, 65535).cpu().numpy().astype(np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def name_of(key: str) -> str:
    """A path for the heatmap of a picture, below the folder of heatmaps whatever the key is."""
    parts = [part for part in PurePosixPath(key.replace("\\", "/")).parts if part not in ("..", "/", ".")]
    return "/".join([*parts[:-1], f"{parts[-1] if parts else 'picture'}.png"])

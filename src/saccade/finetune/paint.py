"""Maps as files: numbers of classes as PNG with a palette, and laid over the picture."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

_GOLDEN = 0.6180339887498949
"""Turns of the hue by this part of a circle never meet: neighbours in number differ in colour."""
_LARGEST, _SMALL = 1024, 160


def palette() -> UInt8[np.ndarray, "256 3"]:
    """A colour for every value of a mask, the same in every run; 255 is black."""
    found = np.zeros((256, 3), dtype=np.uint8)
    for value in range(255):
        strength, light = ((0.75, 0.9), (0.55, 1.0), (0.9, 0.6))[value // 5 % 3]
        colour = colorsys.hsv_to_rgb(0.58 + value * _GOLDEN % 1, strength, light)
        found[value] = [round(255 * part) for part in colour]
    return found


def mask(values: UInt8[np.ndarray, "h w"], path: Path) -> None:
    """Writes a PNG whose pixels are these values; a palette paints them."""
    image = Image.fromarray(values)
    image.putpalette(palette().tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def overlay(
    picture: Shaped[Tensor, "c h w"], colours: UInt8[np.ndarray, "h w 3"], path: Path
) -> UInt8[Tensor, "3 _ _"]:
    """Writes a small JPEG of a picture, half covered by colours, and returns a smaller one."""
    highest = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(picture.dtype, 1.0)
    below = picture.float() / highest
    below = below[:3] if below.shape[0] >= 3 else below[:1].expand(3, -1, -1)
    pixels = below.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray((127.5 * pixels + 0.5 * colours).round().astype(np.uint8))
    image.thumbnail((_LARGEST, _LARGEST))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)
    image.thumbnail((_SMALL, _SMALL))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def heat(values: Float[Tensor, "h w"], low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    """Numbers as colours, dark blue to yellow; what is outside of the range has its end's colour."""
    t = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1).cpu().numpy()
    stops = np.array([[30, 20, 90], [20, 110, 160], [60, 180, 110], [250, 230, 40]], dtype=np.float64)
    channels = [np.interp(t, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)

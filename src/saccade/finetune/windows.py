"""How large a picture is looked at, and in which windows: any size, one answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_LONGEST = 2
"""Short sides that a window is long at most, where the short side is what counts."""


@dataclass(frozen=True)
class Frame:
    """Pictures are resized to whole patches, and cut into windows that lap over by this part of their side.

    `scale` None: the short side becomes `side`, and windows are up to twice as long. Else both sides are multiplied by
    it, and windows are squares of `side`: for what has a size of its own, such as cells or roofs. `square`: both sides
    become `side`, for a graph that takes nothing else; where there is a scale, no side is less.
    """

    side: int
    stride: int
    scale: float | None = None
    overlap: float = 0.25
    square: bool = False

    def sized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which a picture is looked at."""
        if self.square and self.scale is None:
            return self.side, self.side
        factor = self.side / min(height, width) if self.scale is None else self.scale
        least = self.side if self.square else self.stride
        high, wide = (max(least, round(length * factor / self.stride) * self.stride) for length in (height, width))
        return high, wide

    def window(self, sized: tuple[int, int]) -> tuple[int, int]:
        """Height and width of every window."""
        longest = self.side * (_LONGEST if self.scale is None else 1)
        longest = max(longest // self.stride, 1) * self.stride
        return min(sized[0], longest), min(sized[1], longest)

    def corners(self, sized: tuple[int, int], overlap: float | None = None) -> list[tuple[int, int]]:
        """Top and left of every window, in whole patches, evenly spaced, so that nothing is left out."""
        share = self.overlap if overlap is None else overlap
        rows, columns = (
            self._places(length, part, share) for length, part in zip(sized, self.window(sized), strict=True)
        )
        return [(top, left) for top in rows for left in columns]

    def _places(self, length: int, window: int, overlap: float) -> list[int]:
        step = max(self.stride, int(window * (1 - overlap)) // self.stride * self.stride)
        count = math.ceil((length - window) / step)
        return [round(n * (length - window) / count / self.stride) * self.stride for n in range(count)] + [
            length - window
        ]


def slide(
    images: Shaped[Tensor, "b c h w"],
    frame: Frame,
    outputs: Callable[[Shaped[Tensor, "b c _ _"], tuple[int, int]], Float[Tensor, "b k _ _"]],
    size: tuple[int, int],
) -> Float[Tensor, "b k _ _"]:
    """What `outputs` makes of pictures, window by window, the mean where windows lap, enlarged to `size`.

    `outputs` takes a window and the size of what it is to return. A picture that fits in one window is one call of it.
    """
    sized = (images.shape[2], images.shape[3])
    corners, (high, wide) = frame.corners(sized), frame.window(sized)
    if len(corners) == 1:
        return outputs(images, size)
    total, times = None, torch.zeros(sized, device=images.device)
    for top, left in corners:
        found = outputs(images[:, :, top : top + high, left : left + wide], (high, wide))
        if total is None:
            total = found.new_zeros(*found.shape[:2], *sized)
        total[:, :, top : top + high, left : left + wide] += found
        times[top : top + high, left : left + wide] += 1
    assert total is not None
    mean = total.div_(times.to(total))
    return torch.nn.functional.interpolate(mean, size=size, mode="bilinear", align_corners=False)

"""What can be said of features without labels. Hints, no proof: higher rank is not better, and KoLeo raises it.

Whether they are better for a task, only labels of that task can say.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from saccade.encoder import Encoder, resized
from saccade.health import effective_rank, spread

NEIGHBOURS = 5
FARTHEST = 0.5
"""The mean distance (1 - cosine) from the start's features above which they count as drifted away."""


@torch.inference_mode()
def vectors(encoder: Encoder, pictures: Shaped[Tensor, "b c s s"]) -> Float[Tensor, "b d"]:
    """The pooled features, on the CPU."""
    parts = pictures.split(64)
    return torch.cat([encoder.backbone.pooled(part.to(encoder.device)).float().cpu() for part in parts])


def second_view(pictures: Shaped[Tensor, "b c s s"]) -> Shaped[Tensor, "b c s s"]:
    """The same pictures, mirrored, their outermost tenth on each side cut off."""
    side = pictures.shape[-1]
    margin = max(1, side // 10)
    inner = pictures.flip(-1)[..., margin : side - margin, margin : side - margin]
    return torch.stack([resized(picture, side) for picture in inner])


def nearest(found: Float[Tensor, "b d"], count: int = NEIGHBOURS) -> Shaped[Tensor, "b k"]:
    """The rows that are nearest to each row by cosine, itself aside."""
    unit = F.normalize(found, dim=1)
    alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return alike.topk(min(count, len(found) - 1), dim=1).indices


def shared(one: Float[Tensor, "b d"], other: Float[Tensor, "b e"]) -> float:
    """The part of their nearest neighbours that two sets of features of the same pictures agree on."""
    mine, theirs = nearest(one), nearest(other)
    return (mine[:, :, None] == theirs[:, None, :]).any(2).float().mean().item()


def measure(
    encoder: Encoder, pictures: Shaped[Tensor, "b c s s"], start: Float[Tensor, "b d"] | None = None
) -> dict[str, Any]:
    """`rank`, `spread`, and `agreement`: how much of a picture's neighbours stays where it is seen mirrored and cut.

    With the features of a `start`: `drift`, the mean of 1 - cosine from it, and `kept`, how much of the neighbours is
    its. All None where features are no numbers.
    """
    found = vectors(encoder, pictures)
    names = ("rank", "spread", "agreement") + (() if start is None else ("drift", "kept"))
    if not torch.isfinite(found).all():
        return dict.fromkeys(names)
    again = vectors(encoder, second_view(pictures))
    values: dict[str, Any] = {"rank": effective_rank(found), "spread": spread(found)}
    values["agreement"] = shared(found, again) if len(found) > 2 else None
    if start is not None:
        values["drift"] = 1 - F.cosine_similarity(found, start).mean().item()
        values["kept"] = shared(found, start) if len(found) > 2 else None
    return values


def astray(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why features count as lost: collapsed, or drifted from the start; None where neither is seen."""
    if after["rank"] is None or after["rank"] < 0.5 * before["rank"] or after["spread"] < 0.01 * before["spread"]:
        return f"features collapsed: rank {before['rank']:.3g} to {after['rank'] or 0:.3g}"
    if after["drift"] > FARTHEST:
        return f"features drifted {after['drift']:.2f} from the start, more than {FARTHEST}"
    return None

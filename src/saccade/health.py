"""Is the representation alive: effective rank and spread of features, and a verdict."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.data import Source
from saccade.draws import Permutation
from saccade.errors import Unreadable
from saccade.weights import Encoder


def effective_rank(features: Float[Tensor, "b d"]) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the centred features' singular values, 1 to min(b, d)."""
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    shares = values / values.sum().clamp_min(1e-12) + 1e-12
    return math.exp(-(shares * shares.log()).sum().item())


def spread(features: Float[Tensor, "b d"]) -> float:
    """How far unit-length features are from being all the same: 0 the same, 1 in all directions."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return 1 - unit.mean(0).norm().item() ** 2


@torch.inference_mode()
def look(encoder: Encoder, source: Source, count: int = 512) -> Float[Tensor, "b d"] | None:
    """Embeddings of a fixed choice of the source's pictures; None where it has none that the encoder takes."""
    chosen = Permutation(len(source), "health")
    pictures = []
    for place in range(min(count, len(source))):
        with contextlib.suppress(Unreadable):
            pixels = source[chosen(place)].pixels
            if pixels is not None and pixels.shape[:2] == (1, encoder.preprocess.channels):
                pictures.append(encoder.preprocess(pixels))
    parts = [torch.stack(pictures[n : n + 32]).to(encoder.device) for n in range(0, len(pictures), 32)]
    return torch.cat([encoder.embedding(encoder(part)).cpu() for part in parts]) if parts else None


def judge(losses: list[float], data_wait: float, features: Float[Tensor, "b d"] | None) -> dict[str, Any]:
    """Figures and a verdict: healthy, diverged, starved, constant_features or low_rank, with `advice` if there is any.

    `losses` are those logged, in order; `data_wait` the part of the time spent waiting for data.
    """
    figures: dict[str, Any] = {"rank": None, "spread": None}
    if features is not None:
        figures = {"rank": effective_rank(features), "spread": spread(features)}
    verdict, advice = "healthy", None
    if losses and (not math.isfinite(losses[-1]) or losses[-1] > 2 * losses[0] > 0):
        verdict, advice = "diverged", "the loss rose: lower --lr or lengthen --warmup"
    elif features is not None and figures["spread"] < 1e-4:
        verdict, advice = "constant_features", "every picture gets the same features: lower --lr, or train longer"
    elif features is not None and figures["rank"] < min(4.0, 0.05 * min(features.shape)):
        verdict, advice = "low_rank", "features fill few directions: train longer, or raise the batch"
    elif data_wait > 0.5:
        verdict, advice = "starved", "the model waits for data: raise --workers, or store smaller pictures"
    return {"verdict": verdict, **figures, "advice": advice}

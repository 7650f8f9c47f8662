"""What probabilities are worth: cross-entropy, expected calibration error, and the temperature that mends them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

BINS = 15
_COLDEST, _HOTTEST = 0.02, 50.0


def probabilities(logits: Float[Tensor, "n k"], temperature: float | Tensor, several: bool) -> Float[Tensor, "n k"]:
    """Of one class out of K, or of each by itself where a picture has `several`."""
    scaled = logits / temperature
    return scaled.sigmoid() if several else scaled.softmax(dim=1)


def cross_entropy(
    logits: Float[Tensor, "n k"],
    targets: Int[Tensor, " n"] | Float[Tensor, "n k"],
    weights: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """The mean negative log-likelihood; of several labels the mean over classes too. `weights`: of classes."""
    if targets.ndim == 2:
        positive = None if weights is None else weights
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), pos_weight=positive)
    return F.cross_entropy(logits, targets, weight=weights)


def fitted_temperature(logits: Float[Tensor, "n k"], targets: Int[Tensor, " n"] | Float[Tensor, "n k"]) -> float:
    """What logits are divided by so that their cross-entropy is least.  arXiv 1706.04599, section 4.2

    The cross-entropy is convex in 1 / temperature, so a golden-section search over its logarithm ends at the one
    least value, or at the edge of [0.02, 50]. One imagined picture more is of every class alike (as in Platt's
    scaling): N pictures that are all told apart do not make one sure beyond 1 in N.
    """
    logits, ratio, n, count = logits.double(), 0.6180339887498949, len(logits), logits.shape[1]
    several = targets.ndim == 2
    hard = targets.double() if several else F.one_hot(targets, count).double()
    soft = (n * hard + (0.5 if several else 1 / count)) / (n + 1)
    low, high = (torch.tensor(edge, dtype=torch.float64).log() for edge in (_COLDEST, _HOTTEST))

    def loss(place: Tensor) -> float:
        scaled = logits / place.exp()
        if several:
            return float(F.binary_cross_entropy_with_logits(scaled, soft))
        return float(F.cross_entropy(scaled, soft))

    first, second = high - ratio * (high - low), low + ratio * (high - low)
    left, right = loss(first), loss(second)
    for _ in range(48):
        if left < right:
            high, second, right = second, first, left
            first = high - ratio * (high - low)
            left = loss(first)
        else:
            low, first, left = first, second, right
            second = low + ratio * (high - low)
            right = loss(second)
    return float(((low + high) / 2).exp())


def expected_error(found: Float[Tensor, "n k"], targets: Int[Tensor, " n"] | Float[Tensor, "n k"]) -> float:
    """Expected calibration error in percent: |confidence - share that is right| over 15 equal bins of confidence.

    Of one class the confidence of the likeliest; of several labels every probability by itself.
    """
    if targets.ndim == 2:
        confidence, right = found.flatten(), targets.flatten().to(found.dtype)
    else:
        confidence, guess = found.max(dim=1)
        right = (guess == targets).to(found.dtype)
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(BINS, dtype=found.dtype).index_add_(0, place, confidence - right)
    return 100 * float(sums.abs().sum() / len(confidence))

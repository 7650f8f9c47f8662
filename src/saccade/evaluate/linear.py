"""A linear probe: multinomial logistic regression on frozen, standardised features.

The objective is convex, so the answer depends on the features and the penalty alone, not on a learning rate or a seed.
L-BFGS works on preconditioned weights V = chol(X'X / 4N + penalty)' W, Böhning's bound on the curvature
(Ann. Inst. Stat. Math. 44, 1992): some tens of passes over the features instead of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

PENALTIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Swept from strong to weak, each fit starting from the one before. Features have spread 1, the loss is a mean."""


@dataclass(frozen=True)
class Standard:
    """Takes features to mean 0 and spread 1, as measured on the training rows; constant ones become 0."""

    mean: Float[Tensor, " d"]
    spread: Float[Tensor, " d"]

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> Standard:
        mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        floor = 1e-6 * spread.max().clamp_min(1e-30)
        return cls(mean, torch.where(spread > floor, spread, torch.inf))

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (features - self.mean) / self.spread


@dataclass(frozen=True)
class Linear:
    """Weights [D K] and bias [K] of a fitted classifier."""

    weight: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]

    def predict(self, features: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The most likely class of each row."""
        return (features @ self.weight + self.bias).argmax(dim=1)


def fit(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"] | Float[Tensor, "n k"],
    classes: int,
    penalty: float,
    start: Linear | None = None,
    iterations: int = 100,
    weights: Float[Tensor, " n"] | None = None,
) -> Linear:
    """Minimises mean cross-entropy + penalty / 2 · |weight|² over weight and (unpenalised) bias.

    `labels` [N K] of zeros and ones are several labels a row: one logistic regression each. `weights` count rows more
    or less, with a mean of 1. With fewer rows than features it works in the rows' span, where the optimum lies:
    X = L Q with X X' = L L'.
    """
    n, d = features.shape
    if n < d:
        inside = _root(features @ features.T, 0.0)
        inner = fit(inside, labels, classes, penalty, None, iterations, weights)
        back = torch.linalg.solve_triangular(inside.T, inner.weight, upper=True)
        return Linear(features.T @ back, inner.bias)
    share = features.new_full((n, 1), 1 / n) if weights is None else (weights / n)[:, None].to(features.dtype)
    root = _root(features.T @ (features * share) / 4, penalty)  # weight = root'^-1 V
    several = labels.ndim == 2
    target = labels.to(features.dtype) if several else F.one_hot(labels, classes).to(features.dtype)
    weight = torch.zeros(d, classes, dtype=features.dtype, device=features.device) if start is None else start.weight
    bias = torch.zeros(1, classes, dtype=features.dtype, device=features.device) if start is None else start.bias[None]
    # one tensor: preconditioned weights, then the bias, whose curvature bound is 1/4 (features have mean 0)
    packed = torch.cat([root.T @ weight, bias / 2]).requires_grad_()
    slope, change = (1e-5, 1e-9) if features.dtype == torch.float32 else (1e-10, 1e-14)
    optimizer = torch.optim.LBFGS(
        [packed], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=slope, tolerance_change=change,
    )  # fmt: skip

    def unpack() -> tuple[Tensor, Tensor]:
        return torch.linalg.solve_triangular(root.T, packed.detach()[:-1], upper=True), 2 * packed.detach()[-1]

    def loss() -> Tensor:
        weight, bias = unpack()
        logits = features @ weight + bias
        if several:
            error = (logits.sigmoid() - target) * share
            value = ((F.softplus(logits) - target * logits) * share).sum()
        else:
            logits = torch.log_softmax(logits, dim=1)
            error = (logits.exp() - target) * share
            value = -(logits * target * share).sum()
        gradient = features.T @ error + penalty * weight
        packed.grad = torch.cat(
            [torch.linalg.solve_triangular(root, gradient, upper=False), 2 * error.sum(dim=0)[None]]
        )
        return value + penalty / 2 * (weight * weight).sum()

    optimizer.step(loss)
    return Linear(*unpack())


def _root(products: Float[Tensor, "n n"], extra: float) -> Float[Tensor, "n n"]:
    """The lower Cholesky factor of inner products plus `extra` on the diagonal, and what rounding may have taken."""
    rounding = 10 * torch.finfo(products.dtype).eps * float(products.diagonal().sum()) + 1e-30
    products.diagonal().add_(extra + rounding)
    return torch.linalg.cholesky(products)


def choose_penalty(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, apart: np.ndarray
) -> tuple[float, float]:
    """The penalty that does best on the rows set `apart` of the training rows, and its accuracy there in percent.

    Ties go to the stronger penalty. The sweep ends when two weaker ones in a row have not helped.
    """
    held = torch.from_numpy(apart).to(features.device)
    standard = Standard.of(features[~held])
    rest, examined, start = standard(features[~held]), standard(features[held]), None
    best, best_accuracy, since = PENALTIES[0], -1.0, 0
    for penalty in PENALTIES:
        start = fit(rest, labels[~held], classes, penalty, start)
        accuracy = 100 * (start.predict(examined) == labels[held]).double().mean().item()
        best, best_accuracy, since = (
            (penalty, accuracy, 0) if accuracy > best_accuracy else (best, best_accuracy, since + 1)
        )
        if since == 2:
            break
    return best, best_accuracy


@dataclass(frozen=True)
class Probed:
    """What a probe predicts for the test rows, and the choice that train alone decided."""

    predicted: Int[Tensor, " m"]
    penalty: float
    held_out: float  # accuracy in percent on the part of train that the penalty was chosen on


def probe(
    train: Float[Tensor, "n d"], labels: Int[Tensor, " n"], test: Float[Tensor, "m d"], classes: int, apart: np.ndarray
) -> Probed:
    """Chooses the penalty on the rows of train set `apart`, fits all of train with it, predicts test."""
    penalty, held_out = choose_penalty(train, labels, classes, apart)
    standard = Standard.of(train)
    classifier = fit(standard(train), labels, classes, penalty)
    return Probed(classifier.predict(standard(test)), penalty, held_out)

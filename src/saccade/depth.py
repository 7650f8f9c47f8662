"""Stochastic depth (arXiv 1603.09382): which residual branches of which samples are left out while a student learns."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.draws import Stream

Kept = tuple[Tensor | None, Tensor] | None
"""Samples of which a residual branch is computed, by index (None: all of them), and its factors; None: just added."""


def stochastic_depth(rows: Int[Tensor, " b"], rates: list[float]) -> Float[Tensor, "b branches"] | None:
    """Factors of residual branches: 0 with a branch's rate, else 1 / (1 - rate). `rows` are random, one a sample."""
    if not any(rates):
        return None
    rate = torch.tensor(rates, dtype=torch.float64, device=rows.device)
    return (Stream(rows, 0).uniform(len(rates)) >= rate) / (1 - rate)


def kept(drop: Float[Tensor, "b branches"], device: torch.device) -> list[Kept]:
    """Of which samples each branch is computed: of those whose factor is not 0 (DINOv2, arXiv 2304.07193).

    `drop` is best on the CPU: how many there are is asked here, and a GPU would have to be waited for. A compiled graph
    has fixed shapes, and computes all.
    """
    if torch.compiler.is_compiling():
        return [(None, factors) for factors in drop.to(device).unbind(1)]
    counts, order = (drop != 0).sum(0).tolist(), torch.argsort((drop == 0).byte(), dim=0, stable=True)
    factors, order = (part.T.to(device, non_blocking=True) for part in (drop.gather(0, order), order))
    return [(None if n == len(drop) else rows[:n], by[:n]) for n, rows, by in zip(counts, order, factors, strict=True)]

"""Numbers of lightly's NT-Xent for tests/test_simclr.py: loss and gradients, in float64.

    python tests/parity/make_simclr.py tests/parity/simclr.safetensors

An environment of its own needs lightly, torch and safetensors. Inputs come from Python's `random`, the same everywhere.
"""

from __future__ import annotations

import random
import sys

import torch
from torch import Tensor

CASES = {"sharp": (6, 5, 0.1), "usual": (8, 16, 0.5), "two": (2, 3, 0.2)}
"""Samples, width and temperature."""


def pairs(case: str) -> Tensor:
    """Two views of each sample, [B 2 D], of all lengths."""
    samples, width, _ = CASES[case]
    draw = random.Random(case)
    values = [draw.gauss(0, 1) * draw.choice([0.1, 1, 10]) for _ in range(2 * samples * width)]
    return torch.tensor(values, dtype=torch.float64).reshape(samples, 2, width)


def main(path: str) -> None:
    from lightly.loss import NTXentLoss
    from safetensors.torch import save_file

    numbers = {}
    for case, (_, _, temperature) in CASES.items():
        views = pairs(case).requires_grad_()
        loss = NTXentLoss(temperature=temperature)(views[:, 0], views[:, 1])
        loss.backward()
        numbers |= {f"{case}/loss": loss.detach(), f"{case}/gradient": views.grad.contiguous()}
    save_file(numbers, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

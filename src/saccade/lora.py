"""Of each matrix in a backbone's blocks only a product of two thin ones is learned.  LoRA, arXiv 2106.09685"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from saccade import backbone
from saccade.errors import SaccadeError

_INSIDE = ".parametrizations.weight."
"""What stands between the name of a layer and those of its matrix and of what is added to it."""


class LowRank(nn.Module):
    """What is added to a matrix: `b` times `a`, nothing at first, for `b` is zero.

    `a` is drawn with a variance of 1 / rank: a step of Adam on `b` then moves the matrix as far as one on the matrix
    itself, whatever the rank, so that a learning rate means the same. It stands in the place of alpha.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) * rank**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
        """The matrix, or the kernel of a convolution, and what is added to it."""
        return _sum(weight, self.a, self.b)


def _sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return weight + (b @ a).view(weight.shape)


def _layers(network: nn.Module) -> list[nn.Module]:
    """Linear layers of the blocks, and convolutions that mix channels."""
    parts = [part for block in network.modules() if isinstance(block, backbone.UNITS) for part in block.modules()]
    return [part for part in parts if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)]


def add(network: nn.Module, rank: int, seed: int) -> None:
    """Gives a backbone on the CPU deltas of this rank, and lets nothing but them be learned.

    It stays the same function, bit for bit. Raises `SaccadeError` where no block holds a matrix, or one is too small.
    """
    layers = _layers(network)
    if not layers:
        raise SaccadeError(
            f"{type(network).__name__} has no matrices in blocks, to which --lora could add something",
            path="--lora",
            hint="leave it out: the whole backbone then moves",
        )
    most = min(side for layer in layers for side in layer.get_parameter("weight").flatten(1).shape)
    if rank > most:
        raise SaccadeError(
            f"a matrix of the backbone has rank {most}, less than {rank}", path="--lora", hint=f"use {most} at most"
        )
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.get_parameter("weight"), rank, generator))


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network without deltas that is the same function. One that has none is its own."""
    found = {}
    for name, tensor in tensors.items():
        layer, inside, part = name.partition(_INSIDE)
        if not inside:
            found[name] = tensor
        elif part == "original":
            a, b = (tensors[f"{layer}{inside}0.{side}"] for side in "ab")
            found[f"{layer}.weight"] = _sum(tensor, a, b)
    return found


def merge(network: nn.Module) -> None:
    """The network becomes one without deltas that is the same function."""
    for part in network.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")

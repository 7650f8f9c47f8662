"""Heads: what stands on an encoder while it is trained, and is thrown away afterwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saccade import vit
from saccade.norm import BatchNorm


class DINOHead(nn.Module):
    """How near an embedding is to each of K prototypes, as cosines (arXiv 2104.14294, appendix C).

    Three linear layers with GELU between them end in a narrow bottleneck. It and every prototype are scaled to length
    1: the reference's weight norm with its gain held at 1. `norm`: batch norm before each GELU. It takes away what all
    pictures have in common, which in a short run nothing else does.
    """

    def __init__(self, width: int, prototypes: int, *, hidden: int = 2048, bottleneck: int = 256, norm: bool = False):
        super().__init__()
        self.mlp = nn.Sequential()
        for wide in (width, hidden):
            between = [BatchNorm(hidden), nn.GELU()] if norm else [nn.GELU()]
            self.mlp.extend([vit.Linear(wide, hidden), *between])
        self.mlp.append(vit.Linear(hidden, bottleneck))
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights from torch's generator."""
        vit.initialise(self, "trunc_normal")
        for part in self.mlp:
            if isinstance(part, BatchNorm):
                part.reset_parameters()

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Cosines, so in [-1, 1]: a temperature makes logits of them."""
        weight = self.last_layer.weight
        products = vit.linear(F.normalize(self.mlp(x), dim=-1), weight, None)
        return products / torch.linalg.vector_norm(weight, dim=-1)  # cheaper than K prototypes divided by their lengths

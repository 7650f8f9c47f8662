"""Prototypes: the head that scores them while an encoder is trained, and what is asked of a student's scores.

The loss stands beside its head so that DINO is followed from disk to loss in seven files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from saccade import vit
from saccade.linear import Linear, linear
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
            self.mlp.extend([Linear(wide, hidden), *between])
        self.mlp.append(Linear(hidden, bottleneck))
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
        products = linear(F.normalize(self.mlp(x), dim=-1), weight, None)
        return products / torch.linalg.vector_norm(weight, dim=-1)  # cheaper than K prototypes divided by their lengths


def cross_view(
    student: Float[Tensor, "v b k"], teacher: Float[Tensor, "u b k"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of a student's views to a teacher's, over all pairs but those of one view (DINO, arXiv 2104.14294).

    `student` are logits before the temperature, `teacher` probabilities of its first U <= V views; the mean is over
    samples and the U V - U pairs. Raises `ValueError` where no pair is left.
    A pair's loss is logsumexp(s) - q.s, and the sums over pairs go inside: no pair is ever formed.
    """
    views, samples, _ = student.shape
    seen = len(teacher)
    if not 0 < seen <= views or views == 1:
        raise ValueError(f"{views} views of a student and {seen} of a teacher make no pair")
    student = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    partners = torch.full((views, 1), seen, device=student.device)
    partners[:seen] -= 1
    spread = (student.logsumexp(-1) * partners).sum()
    agreement = (teacher.sum(0) * student.sum(0)).sum() - (teacher * student[:seen]).sum()
    return (spread - agreement) / (samples * seen * (views - 1))


def concentration(probabilities: Float[Tensor, "b k"]) -> dict[str, Float[Tensor, ""]]:
    """How sharp a teacher's answers are, as their mean entropy in nats, and which part of the K prototypes they use.

    The part is exp(entropy of the mean answer) / K: 1 where all are used alike, 1/K where every answer is the same one.
    """
    used = torch.special.entr(probabilities.mean(0)).sum().exp() / probabilities.shape[1]
    return {"teacher_entropy": torch.special.entr(probabilities).sum(1).mean(), "prototype_use": used}

"""Losses as functions of tensors: they hold no state and know no model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saccade import distributed


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


def info_nce(pairs: Float[Tensor, "b 2 d"], temperature: float) -> Float[Tensor, ""]:
    """Cross-entropy of finding a view's partner among all other views, by cosine (SimCLR, arXiv 2002.05709, eq. 1).

    `pairs` are two views of each of this rank's samples; the others are those of all ranks' samples, and the mean over
    ranks is the loss of them together. In float32 at least, also under autocast. Memory: two matrices of 2b x 2n.
    """
    with torch.autocast(pairs.device.type, enabled=False):
        views = F.normalize(pairs.to(torch.promote_types(pairs.dtype, torch.float32)), dim=2)
        everyone = distributed.gather(views).flatten(0, 1)  # [2n D]
        partners = (views[:, 0] * views[:, 1]).sum(1) / temperature  # [b], the same both ways
        logits = views.flatten(0, 1) / temperature @ everyone.T  # [2b 2n]
        logits.diagonal(2 * distributed.first_row(pairs)).fill_(-torch.inf)  # nobody is its own partner
        return logits.logsumexp(1).mean() - partners.mean()

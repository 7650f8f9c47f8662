"""k-nearest-neighbour classification of frozen features, as DINO's evaluation does it.  arXiv 2104.14294, appendix F

Exact, no training, nothing to choose: 20 neighbours by cosine, each voting with exp(cosine / 0.07).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@torch.inference_mode()
def predict(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 2048,
    groups: tuple[Int[Tensor, " n"], Int[Tensor, " m"]] | None = None,
) -> Int[Tensor, " m"]:
    """The class of each test row by a weighted vote of its `k` nearest train rows (all where there are fewer).

    `groups`: of train and test rows; a row has no vote from its own group, so that rows may be tested among themselves.
    """
    reference = F.normalize(train.float(), dim=1).T
    found = []
    for start, rows in zip(range(0, len(test), chunk), test.split(chunk), strict=False):
        likeness = F.normalize(rows.float(), dim=1) @ reference
        if groups is not None:
            own = groups[1][start : start + chunk, None] == groups[0]
            likeness = likeness.masked_fill(own, -torch.inf)
        nearest = likeness.topk(min(k, len(train)), dim=1)
        # the largest cosine is taken off first: exp(1 / 0.07) is fine, but this keeps votes near 1 in float32
        votes = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        ballot = votes.new_zeros(len(rows), classes)
        found.append(ballot.scatter_add_(1, labels[nearest.indices], votes).argmax(dim=1))
    return torch.cat(found) if found else labels.new_zeros(0)

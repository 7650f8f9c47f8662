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
) -> Int[Tensor, " m"]:
    """The class of each test row by a weighted vote of its `k` nearest train rows (all where there are fewer)."""
    reference = F.normalize(train.float(), dim=1).T
    found = []
    for rows in test.split(chunk):
        nearest = (F.normalize(rows.float(), dim=1) @ reference).topk(min(k, len(train)), dim=1)
        # the largest cosine is taken off first: exp(1 / 0.07) is fine, but this keeps votes near 1 in float32
        votes = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        ballot = votes.new_zeros(len(rows), classes)
        found.append(ballot.scatter_add_(1, labels[nearest.indices], votes).argmax(dim=1))
    return torch.cat(found) if found else labels.new_zeros(0)

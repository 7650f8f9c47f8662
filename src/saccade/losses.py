"""Losses as functions of tensors: they hold no state and know no model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saccade import distributed


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

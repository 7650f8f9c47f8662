"""Losses between pictures and their texts, as functions of tensors: softmax (CLIP) and sigmoid (SigLIP).

Two samples whose texts are the same, or whose pictures are, are no negatives of each other: those pairs are left out of
the loss, and counted. `identity` says what is the same: columns of numbers, and one equal column is enough.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import distributed

_TILES = {"cpu": (256, 2048)}
_TILE = (4096, 16384)
"""Pictures and texts whose logits are held at a time: what fits a core's cache, else what keeps a GPU busy."""


def contrast(
    pairs: Float[Tensor, "b 2 d"], scale: Float[Tensor, "*one"], identity: Int[Tensor, "b k"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy of a picture's text among all texts and of a text's picture among all pictures, by cosine times
    `scale` (CLIP, arXiv 2103.00020, figure 3), and how many pairs of this rank's pictures were left out.

    `pairs` are this rank's pictures and texts, the others those of all ranks; the mean over ranks is the loss of them
    together. In float32 at least, also under autocast. Memory: a few matrices of b x n.
    """
    with torch.autocast(pairs.device.type, enabled=False):
        ours = F.normalize(pairs.to(torch.promote_types(pairs.dtype, torch.float32)), dim=2)
        everyone = distributed.gather(ours)  # [n 2 D]
        first = distributed.first_row(ours)
        same = _same(identity, distributed.gather(identity))
        same.diagonal(first).fill_(False)
        target = torch.arange(first, first + len(ours), device=ours.device)
        loss = ours.new_zeros(())
        for one, other in ((0, 1), (1, 0)):
            logits = (scale * ours[:, one]) @ everyone[:, other].T  # [b n]
            loss = loss + F.cross_entropy(logits.masked_fill(same, -torch.inf), target) / 2
        return loss, same.sum().to(loss.dtype)


def sigmoid(
    pairs: Float[Tensor, "b 2 d"],
    scale: Float[Tensor, "*one"],
    bias: Float[Tensor, "*one"],
    identity: Int[Tensor, "b k"],
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-log sigmoid(±(scale * cosine + bias)), + for a picture and its own text, summed over the texts of all ranks and
    meant over pictures (SigLIP, arXiv 2303.15343, algorithm 1), and how many pairs of our pictures were left out.

    The matrix of logits is never whole: `tile` pictures and texts at a time are compared, and their gradient is taken
    on the spot. Texts pass from rank to rank in a ring, and their gradients with them. In float32 at least, also under
    autocast. Gradients are those of the ranks' sum, as `distributed.gather` has them, and right where every rank's loss
    counts alike.
    """
    with torch.autocast(pairs.device.type, enabled=False):
        ours = F.normalize(pairs.to(torch.promote_types(pairs.dtype, torch.float32)), dim=2)
        tile = _TILES.get(ours.device.type, _TILE) if tile is None else tile
        both = (one.reshape(()).to(ours.dtype) for one in (scale, bias))
        return _Sigmoid.apply(ours[:, 0], ours[:, 1], *both, identity, tile)


def sigmoid_by_chance(batch: int) -> float:
    """The sigmoid loss when every text fits every picture alike: each is taken for a pair once in so many times."""
    return math.log(batch) + (batch - 1) * math.log(batch / (batch - 1))


class _Sigmoid(torch.autograd.Function):
    """Loss and gradient in one pass: the gradient at a logit is its sigmoid, less 1 for a picture's own text."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, identity: Tensor, tile: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        scaled, pulls = images * scale, torch.zeros_like(images)
        sums = images.new_zeros(3)  # loss, gradient of the bias, pairs left out
        held, theirs = texts.contiguous(), identity.contiguous()
        pushes = torch.zeros_like(held)
        for hop in range(distributed.world()):
            last = hop == distributed.world() - 1
            ahead = None if last else distributed.Passing(held, theirs)  # on its way while we compute
            doubled = _doubled(identity, theirs, own=hop == 0)
            _tiles(scaled, held, bias, identity, theirs, doubled, hop == 0, tile, pulls, pushes, sums)
            pushes = distributed.Passing(pushes).arrived()[0]
            held, theirs = (held, theirs) if ahead is None else ahead.arrived()
        sums[:2] /= len(images)
        pulls /= len(images)
        pushes /= len(images)
        ctx.save_for_backward(pulls * scale, pushes, (pulls * images).sum(), sums[1].clone())
        loss, left_out = sums[0].clone(), sums[2].clone()  # no views: FSDP2 puts its hooks on what is returned
        ctx.mark_non_differentiable(left_out)
        return loss, left_out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * saved for saved in ctx.saved_tensors), None, None


def _tiles(
    scaled: Tensor, texts: Tensor, bias: Tensor, ours: Tensor, theirs: Tensor, doubled: Tensor, own: bool,
    tile: tuple[int, int], pulls: Tensor, pushes: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """Adds to `pulls` (before the scale), `pushes` and `sums` what our pictures [b D] and some rank's texts [n D] do.

    `doubled`: rows of ours that have a double among those texts. `own`: the texts are those of our pictures.
    """
    for top in range(0, len(scaled), tile[0]):
        rows = slice(top, top + tile[0])
        here = doubled[(doubled >= top) & (doubled < top + tile[0])]
        for left in range(0, len(texts), tile[1]):
            columns = slice(left, left + tile[1])
            logits = torch.addmm(bias, scaled[rows], texts[columns].T)
            if len(here):
                same = _same(ours[here], theirs[columns])
                if own:
                    places = torch.arange(left, left + same.shape[1], device=same.device)
                    same &= here[:, None] != places
                logits[here - top] = logits[here - top].masked_fill(same, -torch.inf)
                sums[2] += same.sum()
            crossed = own and left < top + tile[0] and top < left + tile[1]
            mine = logits.diagonal(top - left) if crossed else logits[0, :0]
            sums[0] += F.softplus(logits, threshold=40).sum() - mine.sum()
            logits.sigmoid_()
            mine -= 1
            sums[1] += logits.sum()
            pulls[rows].addmm_(logits, texts[columns])
            pushes[columns].addmm_(logits.T, scaled[rows])


def _same(ours: Int[Tensor, "b k"], theirs: Int[Tensor, "n k"]) -> Bool[Tensor, "b n"]:
    """Which rows agree in some column."""
    found = ours[:, None, 0] == theirs[None, :, 0]
    for column in range(1, ours.shape[1]):
        found |= ours[:, None, column] == theirs[None, :, column]
    return found


def _doubled(ours: Int[Tensor, "b k"], theirs: Int[Tensor, "n k"], own: bool) -> Int[Tensor, " m"]:
    """Rows of ours that agree in some column with one of theirs; with another one, where they are our own."""
    found = torch.zeros(len(ours), dtype=torch.bool, device=ours.device)
    for mine, other in zip(ours.unbind(1), theirs.unbind(1), strict=True):
        if own:
            _, places, counts = mine.unique(return_inverse=True, return_counts=True)
            found |= counts[places] > 1
        else:
            found |= torch.isin(mine, other)
    return found.nonzero()[:, 0]

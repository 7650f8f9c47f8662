"""Losses as functions of tensors: they hold no state and know no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import distributed
from saccade.errors import SaccadeError


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


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "b k"],
    temperature: float | Float[Tensor, ""],
    past: Float[Tensor, "q k"] | None = None,
    iterations: int = 3,
) -> Float[Tensor, "b k"]:
    """Probabilities in which all samples of all ranks together use every prototype alike (SwAV, arXiv 2006.09882).

    Rows and columns of exp(logits / temperature) are scaled in turn; the last turn makes each sample's sum 1. `past`
    are logits of former batches, the same on every rank: with them a small batch is judged among many samples. Its rows
    of -inf are places that nothing has come to yet, and count for nothing. In float32 at least.
    """
    rows = logits if past is None else torch.cat([logits, past[distributed.rank() :: distributed.world()]])
    return even(logits, temperature, evening([lambda: rows], temperature, iterations))


@torch.no_grad()
def evening(
    parts: Sequence[Callable[[], Float[Tensor, "b k"]]], temperature: float | Float[Tensor, ""], iterations: int = 3
) -> Float[Tensor, " k"]:
    """What Sinkhorn-Knopp adds to each prototype's logit / temperature (`even`), over samples that come in parts.

    A part is asked for its logits anew in every turn, so that memory holds those of one at a time. A row's factor is
    in the softmax but in the first turn, when it is one for all: there the largest logit of all ranks is taken out.
    """
    most = torch.stack([F.pad(_wide(part()).amax(1), (0, 1), value=-torch.inf).max() for part in parts])
    largest, added = distributed.largest(most.max()), torch.zeros_like(most[0])
    for turn in range(iterations):
        used = torch.zeros_like(largest)
        for part in parts:
            share = even(part(), temperature, added) if turn else ((_wide(part()) - largest) / temperature).exp()
            used = used + share.sum(0)
        used = distributed.total(used)
        added = added - used.clamp(min=torch.finfo(used.dtype).tiny).log()
    return added


def even(
    logits: Float[Tensor, "b k"], temperature: float | Float[Tensor, ""], added: Float[Tensor, "*k"]
) -> Float[Tensor, "b k"]:
    """Probabilities of samples by logits that `evening` has weighed; a row of -inf is no sample and has none."""
    rows = _wide(logits)
    most = rows.amax(1, keepdim=True)  # taken out first, where float32 still tells the others apart
    share = ((rows - most.clamp(min=torch.finfo(rows.dtype).min)) / temperature + added).softmax(1)
    return share.masked_fill(most == -torch.inf, 0.0)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hidden_patches(
    student: Float[Tensor, "m k"], teacher: Float[Tensor, "m k"], hide: Bool[Tensor, "b n"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of hidden patches' prototypes to the teacher's in the same view (iBOT, arXiv 2111.07832).

    `student` are logits before the temperature and `teacher` probabilities of the M patches that `hide` shows, in its
    order. A picture's patches count together as one picture, and the mean is over all B: pictures of which nothing is
    hidden count as zero, as in the released code.
    """
    student = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    each = student.logsumexp(-1) - (teacher * student).sum(-1)
    return (each / hide.sum(1)[hide.nonzero()[:, 0]]).sum() / len(hide)


def check_groups(rows: int, group: int) -> None:
    """Raises `SaccadeError` where this rank's micro-batches of so many samples do not divide into KoLeo's groups."""
    if rows % group:
        raise SaccadeError(
            f"KoLeo looks for neighbours in groups of {group}, which do not divide micro-batches of {rows}",
            path="--koleo-group",
            hint=f"use a part of {rows}, or fewer --accumulate",
        )


def koleo(x: Float[Tensor, "b d"], group: int, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Mean -log distance on the unit sphere to the nearest neighbour in one's group of rows (arXiv 1806.03198).

    Groups are of `group` rows in order, so that no rank and no accumulation changes them. In float32 at least, also
    under autocast. Raises `ValueError` where the rows do not divide.
    """
    if len(x) % group or group < 2:
        raise ValueError(f"{len(x)} rows do not make groups of {group}")
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=eps).unflatten(0, (-1, group))
        with torch.no_grad():
            alike = x @ x.transpose(1, 2)
            alike.diagonal(dim1=1, dim2=2).fill_(-1)
            nearest = alike.argmax(2, keepdim=True).expand_as(x)
        apart = F.pairwise_distance(x.flatten(0, 1), x.gather(1, nearest).flatten(0, 1), eps=eps)
        return -(apart + eps).log().mean()


def gram(student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"]) -> Float[Tensor, ""]:
    """Mean squared difference of the cosines between all patches of a picture (DINOv3, arXiv 2508.10104).

    In float32 at least, also under autocast.
    """
    with torch.autocast(student.device.type, enabled=False):
        pair = [F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (student, teacher)]
        ours, theirs = (x @ x.transpose(1, 2) for x in pair)
        return F.mse_loss(ours, theirs)


def feature_distance(student: Float[Tensor, "*n d"], teacher: Float[Tensor, "*n d"]) -> Float[Tensor, ""]:
    """Half of 1 - cosine and half of smooth L1, means over rows and numbers (UNIC, arXiv 2408.05088, eq. 2 to 4).

    In float32 at least, also under autocast.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
        return (1 - F.cosine_similarity(student, teacher, dim=-1).mean() + F.smooth_l1_loss(student, teacher)) / 2


_LOGITS = {"cpu": 1 << 22}
"""How many logits of a vocabulary are held at a time; elsewhere 2^28."""


def vocabulary(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"],
    target: Int[Tensor, " n"],
    share: Float[Tensor, " n"],
    rows: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over rows of their `share` times the cross-entropy of their target, by logits x @ weight.T + bias.

    The matrix of logits is never whole: so many `rows` at a time, whose gradient is taken on the spot. Products are in
    the precision of autocast, all else in float32 at least. `share` gets no gradient.
    """
    kind = x.device.type
    rows = rows or max(1, _LOGITS.get(kind, 1 << 28) // len(weight))
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return _Vocabulary.apply(x, weight, bias, target, share, rows, dtype)


class _Vocabulary(torch.autograd.Function):
    """Loss and gradient in one pass: the gradient at a logit is its probability, less 1 for the target's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, share: Tensor, rows: int, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        matrix, pulls = weight.to(dtype), torch.zeros_like(x, dtype=wide)
        pushes, lifts = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        loss = torch.zeros((), dtype=wide, device=x.device)
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            some, by = x[part].to(dtype), share[part, None].to(wide)
            logits = (some @ matrix.T).to(wide) + bias
            most = logits.logsumexp(1, keepdim=True)
            wanted = target[part, None]
            loss += (by * (most - logits.gather(1, wanted))).sum()
            logits.sub_(most).exp_().scatter_add_(1, wanted, torch.full_like(most, -1.0)).mul_(by)
            lifts += logits.sum(0)
            logits = logits.to(dtype)
            pulls[part] = logits @ matrix
            pushes += logits.T @ some
        ctx.save_for_backward(pulls.to(x.dtype), pushes.to(weight.dtype), lifts.to(bias.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None

"""A memory of what is normal: a core-set of vectors, how far others are from it, and a Gaussian of vectors.

PatchCore, arXiv 2106.08265 (greedy core-set by random projection); AnomalyDINO, arXiv 2405.14529 (cosine distance).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

PROJECTED = 128
"""Width in which the core-set is looked for: distances change little by a random projection (Johnson-Lindenstrauss)."""
_CANDIDATES = 2048
_ROWS = 2048  # rows whose distances stand in memory together
_SAME = 1e-6  # of the mean squared length: what rounding makes of the distance between copies


def core_set(vectors: Float[Tensor, "n d"], count: int, seed: int) -> Int[Tensor, " m"]:
    """Rows of so many vectors that leave none far away: each next one is the farthest from those before it.

    Fewer where the rest are copies. In memory for N + 2048 M distances at most; the distances of a row are computed
    when it may be the farthest, and not before: its last known one is a bound, because they only fall.
    """
    if count >= len(vectors):
        return torch.arange(len(vectors), device=vectors.device)
    points = _projected(vectors, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    same = _SAME * float(points.square().sum(dim=1).mean())
    bound = _squared(points, points[chosen])[:, 0]
    known = torch.ones(len(points), dtype=torch.int64, device=points.device)  # centres that a bound has heard of
    while len(chosen) < count:
        size = min(_CANDIDATES, len(points))
        rows = bound.topk(size).indices
        _refresh(points, chosen, bound, known, rows)
        outside = bound.clone()
        outside[rows] = -1.0
        limit, near = float(outside.max()), bound[rows]
        if float(near.max()) <= same and limit <= same:
            break
        inside = points[rows]
        while len(chosen) < count:
            place = int(near.argmax())
            if float(near[place]) <= same or float(near[place]) < limit:
                break
            chosen.append(int(rows[place]))
            near = torch.minimum(near, _squared(inside, inside[place : place + 1])[:, 0])
            near[place] = 0.0
        bound[rows], known[rows] = near, len(chosen)
    return torch.tensor(chosen, device=vectors.device)


def _projected(vectors: Tensor, seed: int) -> Float[Tensor, "n e"]:
    if vectors.shape[1] <= PROJECTED:
        return vectors.float()
    generator = torch.Generator().manual_seed(seed)
    onto = torch.randn(vectors.shape[1], PROJECTED, generator=generator).to(vectors.device) / PROJECTED**0.5
    return torch.cat([rows.float() @ onto for rows in vectors.split(1 << 16)])


def _refresh(points: Tensor, chosen: list[int], bound: Tensor, known: Tensor, rows: Tensor) -> None:
    """The distances of these rows to all centres so far."""
    since = int(known[rows].min())
    if since < len(chosen):
        near = _squared(points[rows], points[chosen[since:]]).amin(dim=1)
        bound[rows] = torch.minimum(bound[rows], near)
        bound[torch.tensor(chosen[since:], device=bound.device)] = 0.0  # of themselves, whatever rounding says
    known[rows] = len(chosen)


def _squared(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    lengths = rows.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    return (lengths - 2 * rows @ others.T).clamp_min(0.0)


def nearest(
    rows: Float[Tensor, "n d"], memory: Float[Tensor, "m d"], neighbours: int = 1, chunk: int = _ROWS
) -> Float[Tensor, " n"]:
    """Half the squared distance of rows to the nearest of a memory, or its mean over so many nearest.

    Of vectors of length 1 that is 1 minus the cosine.
    """
    return torch.cat([near(part, memory, neighbours) for part in rows.split(chunk)])


def near(rows: Float[Tensor, "... d"], memory: Float[Tensor, "m d"], neighbours: int = 1) -> Float[Tensor, ...]:
    """As `nearest`, all at once."""
    away = memory.square().sum(dim=1) / 2 - rows @ memory.T
    if neighbours == 1:
        least = away.amin(dim=-1)
    else:
        least = away.topk(min(neighbours, len(memory)), dim=-1, largest=False).values.mean(dim=-1)
    return (least + rows.square().sum(dim=-1) / 2).clamp_min(0.0)


def gaussian(vectors: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean and whitening of a Gaussian, its covariance shrunk towards a multiple of one as Ledoit and Wolf found best.

    The length of `(x - mean) @ whitening` is Mahalanobis' distance. Well-conditioned estimator, J. Multivariate
    Analysis 88 (2004).
    """
    x = vectors.double()
    n, width = x.shape
    mean = x.mean(dim=0)
    centred = x - mean
    covariance = centred.T @ centred / n
    scale = covariance.trace() / width
    away = (covariance.square().sum() - width * scale**2).clamp_min(0)
    noise = (centred.square().sum(dim=1).square().sum() / n - covariance.square().sum()) / n
    share = float((noise / away).clamp(0, 1)) if float(away) > 0 else 1.0
    shrunk = (1 - share) * covariance + share * scale * torch.eye(width, dtype=x.dtype, device=x.device)
    values, axes = torch.linalg.eigh(shrunk)
    floor = values[-1].clamp_min(1e-4) * 1e-6  # of one vector alone there is no spread
    return mean.float(), ((axes / values.clamp_min(floor).sqrt()) @ axes.T).float()

"""Near duplicates across the split: found among the neighbours in features, proved by the detail of the pixels.

Features alone call any two healthy cells alike, and small pictures alone any two round ones. So a pair counts as one
picture only where the fine structure of both fits, after the shift and the zoom that cropping makes: what is left of a
picture when its coarse light is taken off is as good as independent between different pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from saccade.diagnose.evidence import Finding, Side, flat, nearest
from saccade.evaluate.baselines import resampled

CANDIDATES = 3  # by features, and as many by coarse pixels
COARSE = (0.92, 1.0, 1.08)
PROMISING = 0.6  # with these zooms; only then are all of them tried
ZOOMS = (0.86, 0.89, 0.92, 0.95, 0.975, 1.0, 1.025, 1.05, 1.08, 1.12, 1.16)
BAND = 0.15  # of a cycle a pixel: finer detail does not survive JPEG and resampling
SHARE = 0.01
"""Fewer leaks than this cannot move accuracy by more than a point: they are listed, and nothing is named."""
DETAIL = 0.87
"""Correlation of detail from which two pictures are one. Copies (cropped by 3 to 8 %, JPEG again) reach it in 99 of 100
cases on leaves and CIFAR-10, in 70 on cells of 50 pixels; nearest neighbours that are no copies in 0 to 1 of 100."""


def pairs(test: Side, train: Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each test row the row of train that fits best in its detail, how well, and whether it is its leak.

    Candidates are the nearest in features and in coarse pixels.
    """
    by_features = nearest(test.start, train.start, CANDIDATES)[1]
    by_pixels = nearest(_centred(flat(test.pixels)), _centred(flat(train.pixels)), CANDIDATES)[1]
    places = torch.cat([by_features, by_pixels], 1)
    scores = torch.stack([_fit(test.pixels, train.pixels[column]) for column in places.unbind(1)], dim=1)
    best = scores.max(1)
    chosen = places.gather(1, best.indices[:, None])[:, 0]
    return chosen.numpy(), best.values.numpy(), (best.values >= DETAIL).numpy()


def _centred(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows - rows.mean(1, keepdim=True)


def detail(pixels: Shaped[Tensor, "n c s s"]) -> Float[Tensor, "n s s"]:
    """A grey picture without its coarse light, and fading to its edges, where crops differ."""
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    grey = values.mean(1, keepdim=True)
    coarse = F.avg_pool2d(F.pad(grey, (3, 3, 3, 3), mode="replicate"), 7, stride=1)
    window = torch.hann_window(grey.shape[-1], periodic=False)
    return ((grey - coarse) * (window[:, None] * window))[:, 0]


def _fit(ours: Shaped[Tensor, "n c s s"], theirs: Shaped[Tensor, "n c s s"]) -> Float[Tensor, " n"]:
    """The highest correlation of detail over small shifts and zooms of each pair."""
    found = torch.cat([_fitted(a, b, COARSE) for a, b in zip(ours.split(256), theirs.split(256), strict=True)])
    worth = torch.nonzero(found > PROMISING)[:, 0]
    for rows in worth.split(256) if len(worth) else ():
        found[rows] = _fitted(ours[rows], theirs[rows], ZOOMS)
    return found


def _fitted(
    ours: Shaped[Tensor, "n c s s"], theirs: Shaped[Tensor, "n c s s"], zooms: Sequence[float]
) -> Float[Tensor, " n"]:
    side = ours.shape[-1]
    shifts = torch.arange(-_reach(side), _reach(side) + 1) % side
    fixed = _evened(detail(ours))
    best = torch.full((len(ours),), -1.0)
    values = theirs.float() / 255 if theirs.dtype == torch.uint8 else theirs.float()
    for zoom in zooms:
        moved = _evened(detail(_zoomed(values, zoom)))
        surface = torch.fft.irfft2(fixed * moved.conj(), s=(side, side))
        window = surface[:, shifts][:, :, shifts].flatten(1).amax(1)
        best = torch.maximum(best, window / (_length(fixed, side) * _length(moved, side)).clamp_min(1e-12))
    return best


def _reach(side: int) -> int:
    return max(1, round(0.12 * side))


def _evened(pictures: Float[Tensor, "n s s"]) -> Complex[Tensor, "n s f"]:
    """Spectra halfway to phase alone: outlines, which many pictures share, weigh less beside what only one has."""
    spectrum = torch.fft.rfft2(pictures)
    side = pictures.shape[-1]
    squares = torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side) ** 2
    return spectrum / (spectrum.abs() + 1e-6).sqrt() * torch.exp(-squares / (2 * BAND**2))


def _length(spectrum: Complex[Tensor, "n s f"], side: int) -> Float[Tensor, " n"]:
    return torch.fft.irfft2(spectrum, s=(side, side)).flatten(1).norm(dim=1)


def _zoomed(pictures: Float[Tensor, "n c s s"], zoom: float) -> Float[Tensor, "n c s s"]:
    """The middle enlarged, or the whole made smaller with its edge continued."""
    if zoom == 1:
        return pictures
    axes = torch.tensor([[1 / zoom, 0.0, 0.0], [0.0, 1 / zoom, 0.0]]).expand(len(pictures), 2, 3)
    grid = F.affine_grid(axes, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def examine(train: Side, test: Side) -> tuple[Finding, np.ndarray]:
    """Whether test holds copies of train, and which rows of it they are, Bool[m]."""
    places, scores, same = pairs(test, train)
    share, interval = float(same.mean()), resampled(same, test.names)
    found = share >= SHARE and int(same.sum()) >= 3
    rows = [row for row in np.argsort(-scores, kind="stable").tolist() if same[row]][:24]
    right = {"leaked": _percent(test.right[same]), "others": _percent(test.right[~same])}
    reason = (
        f"{int(same.sum())} of {len(same)} test pictures ({share:.1%}) are copies of train pictures; of them the head "
        f"names {right['leaked']:.1f} percent, of the others {right['others']:.1f}"
        if found
        else f"{int(same.sum())} of {len(same)} test pictures are copies of train pictures"
    )
    finding = Finding(
        "leakage", found, "part of test that train holds too", share, interval, SHARE, reason,
        rows=tuple(rows), beside=tuple((int(places[row]),) for row in rows),
        more={"copies": int(same.sum()), "percent_right": right},
    )  # fmt: skip
    return finding, same


def _percent(right: np.ndarray) -> float | None:
    return 100 * float(right.mean()) if len(right) else None

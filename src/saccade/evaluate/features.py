"""What is compared: the encoder's features, the untrained network's, raw pixels, and the border of raw pixels.

Every picture is read and decoded once; both networks see it and a small copy is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from saccade.backbone import known
from saccade.embed import examining, pooled, read_pictures
from saccade.encoder import Encoder, untrained
from saccade.evaluate.labelled import Labelled
from saccade.vit import Features

SMALL = 32
"""Side of the pictures that raw pixels are taken from; smaller encoders' pictures keep their size."""


@dataclass(frozen=True)
class Extracted:
    """Features of train rows, then test rows, by contestant: `pretrained/cls`, `untrained/mean`, `pixels`, …"""

    features: dict[str, Float[Tensor, "n d"]]
    train: np.ndarray  # rows of the source that could be read, in the order of the features
    test: np.ndarray
    failures: list[tuple[int, str, str]]


def small(pixels: Shaped[Tensor, "c h w"], side: int) -> Shaped[Tensor, "c s s"]:
    """A small copy of what the encoder sees."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels[None], size=(side, side), mode="bicubic", antialias=True, align_corners=False)[0]


def border(pictures: Float[Tensor, "n c s s"]) -> Float[Tensor, "n d"]:
    """Only the outermost eighth on each side, where the thing to be recognised seldom is."""
    side = pictures.shape[-1]
    width = max(1, side // 8)
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[width : side - width, width : side - width] = True
    return pictures.flatten(2)[:, :, ~inside.flatten()].flatten(1)


def extract(
    encoder: Encoder,
    labelled: Labelled,
    *,
    baselines: bool,
    seed: int,
    workers: int,
    batch: int = 64,
    beside: Mapping[str, Encoder] | None = None,
) -> Extracted:
    """Runs the encoder, and the baselines where they are wanted, over all labelled pictures.

    `beside`: other networks, by name, that take the same pictures as the encoder.
    """
    networks = {"pretrained": encoder, **(beside or {})}
    if baselines and known(encoder.backbone):
        networks["untrained"] = untrained(encoder, seed).to(encoder.device)
    rows = np.concatenate([labelled.train, labelled.test])
    side = min(SMALL, encoder.preprocess.crop)
    found: dict[str, list[Tensor]] = {}
    good: list[int] = []
    failures: list[tuple[int, str, str]] = []
    with examining(encoder) as look:
        reads = read_pictures(
            labelled.source, [encoder.preprocess], rows=rows.tolist(), batch=batch, workers=workers, words="evaluating"
        )
        for read in reads:
            failures += read.failures
            good += read.rows
            if not read.rows:
                continue
            images = read.views[0]
            for name, network in networks.items():
                for pooling, vectors in _poolings(network, look(images, encoder=network)).items():
                    found.setdefault(f"{name}/{pooling}", []).append(vectors.float().cpu())
            if baselines:
                copies = torch.stack([small(image, side) for image in images])
                found.setdefault("pixels", []).append(copies)
    features = {name: torch.cat(parts) for name, parts in found.items()}
    if baselines and good:
        features |= _of_pixels(features.pop("pixels"))
    kept = set(good)
    train, test = (
        np.array([row for row in part.tolist() if row in kept], dtype=np.int64)
        for part in (labelled.train, labelled.test)
    )
    return Extracted(features, train, test, failures)


def _poolings(network: Encoder, features: Features) -> dict[str, Float[Tensor, "b d"]]:
    """Class token, patch mean, and the family's own vector where it is neither."""
    kinds = {"cls": pooled(features, "cls")} if features.cls is not None else {}
    if features.patches.shape[1]:  # some give one vector and no patches
        kinds["mean"] = pooled(features, "mean")
    if network.backbone.config.pooling not in kinds:
        kinds[network.backbone.config.pooling] = network.embedding(features)
    return kinds


def _of_pixels(pictures: Shaped[Tensor, "n c s s"]) -> dict[str, Float[Tensor, "n d"]]:
    """Flat pixels and their border, as floats in [0, 1]; equal channels are kept once, which says the same."""
    if bool((pictures == pictures[:, :1]).all()):
        pictures = pictures[:, :1]
    values = pictures.float() if pictures.is_floating_point() else pictures.float() / 255
    return {"pixels": values.flatten(1), "border": border(values)}

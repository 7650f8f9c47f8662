"""Every picture read once: features before and after tuning and untrained, small copies, and what the head says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saccade.backbone import known
from saccade.data import Source
from saccade.embed import Look, examining, read_pictures
from saccade.encoder import Encoder, untrained
from saccade.errors import SaccadeError
from saccade.evaluate.features import small
from saccade.finetune.frozen import pooled
from saccade.finetune.task import presented
from saccade.finetune.tasks.classification import Head
from saccade.finetune.tuned import Tuned

SIDE = 48
"""Pixels a side of the small copies: the detail by which copies of a picture are known."""


@dataclass(frozen=True)
class Seen:
    """What is known of the pictures that could be read, in the order of `rows` of the source."""

    rows: list[int]
    features: Float[Tensor, "n d"]
    start: Float[Tensor, "n d"]
    untrained: Float[Tensor, "n d"] | None
    pixels: Shaped[Tensor, "n c s s"]
    guesses: np.ndarray
    failures: list[tuple[int, str, str]]


def see(model: Tuned, before: Encoder | None, source: Source, rows: np.ndarray, workers: int) -> Seen:
    """Looks at these rows; `before` is the backbone as it was, if it was tuned. Raises `SaccadeError` for none."""
    head = model.head
    assert isinstance(head, Head)
    networks = {"features": model.encoder} | ({} if before is None else {"start": before.eval()})
    if known(model.encoder.backbone):
        networks["untrained"] = untrained(model.encoder, 0).to(model.encoder.device)
    parts: dict[str, list[Tensor]] = {}
    good: list[int] = []
    failures: list[tuple[int, str, str]] = []
    preprocess = model.encoder.preprocess
    side = min(SIDE, preprocess.crop)
    with examining(model.encoder) as look:
        reads = read_pictures(source, [preprocess], rows=rows.tolist(), batch=64, workers=workers, words="diagnosing")
        for read in reads:
            failures += read.failures
            if not read.rows:
                continue
            good += read.rows
            images = read.views[0]
            for name, network in networks.items():
                found = _vectors(look, network, head.pooling, images)
                parts.setdefault(name, []).append(found.float().cpu())
                if name == "features":
                    parts.setdefault("guesses", []).append(head.logits(found).argmax(1).cpu())
            copies = torch.stack([small(image, side) for image in images])
            parts.setdefault("pixels", []).append(copies)
    if not good:
        first = f"; the first: {failures[0][1]}: {failures[0][2]}" if failures else ""
        raise SaccadeError(f"none of {len(rows)} pictures can be read{first}", hint="look at the files", code=1)
    if len({part.dtype for part in parts["pixels"]}) > 1:
        parts["pixels"] = [part if part.is_floating_point() else part.float() / 255 for part in parts["pixels"]]
    joined = {name: torch.cat(some).clone() for name, some in parts.items()}
    return Seen(
        good, joined["features"], joined.get("start", joined["features"]), joined.get("untrained"), joined["pixels"],
        joined["guesses"].numpy(), failures,
    )  # fmt: skip


def _vectors(look: Look, network: Encoder, pooling: str, images: Tensor) -> Float[Tensor, "b d"]:
    return pooled(presented(network.backbone, look(images, encoder=network)), pooling)

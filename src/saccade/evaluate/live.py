"""How good the features are while they are being learned, on labelled pictures that are held out of train.

Test is never read here: what is chosen by these numbers, such as the best checkpoint, is examined by `evaluate`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from saccade.data import Source
from saccade.draws import Permutation
from saccade.embed import Tokens, examining, read_pictures
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.evaluate import knn, linear
from saccade.evaluate.labelled import SHARE, read_labelled
from saccade.evaluate.splits import set_apart

MEMORY = 1 << 28
"""Bytes of pictures that are kept decoded, at most."""


class Live:
    """Labelled pictures, four fifths of them to learn from and the rest, of other groups, to examine.

    Both come from the train side; the held-out part is the one that `evaluate` chooses penalties on. At most `rows`
    pictures, a fixed choice, are read, at the first measurement, and kept. Raises `SaccadeError` for data without
    labels or with a train side that cannot be divided.
    """

    def __init__(self, labelled: str | Path | Source, group_by: str | None, preprocess: Preprocess, rows: int):
        data = read_labelled(labelled, group_by, preprocess.canvas, preprocess.channels)
        apart = set_apart(data.names(data.train), SHARE, "hold-out")
        rows = min(rows, MEMORY // (preprocess.channels * preprocess.crop**2))
        learn, held = data.train[~apart], data.train[apart]
        self._rows = [*_some(learn, round(rows * (1 - SHARE))), *_some(held, round(rows * SHARE))]
        self._held = set(held.tolist())
        self._data, self._preprocess = data, preprocess
        self._pictures: list[Shaped[Tensor, "b c s s"]] = []
        self._read: list[int] = []

    def _decode(self) -> None:
        for found in read_pictures(self._data.source, [self._preprocess], rows=self._rows, batch=64, words="reading"):
            if found.rows:
                self._pictures.append(found.views[0])
                self._read += found.rows

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """`knn` and `linear` in percent of the held-out pictures, on the vector that the family pools."""
        if not self._pictures:
            self._decode()
        labels = torch.from_numpy(self._data.labels[self._read]).to(encoder.device)
        apart = np.array([row in self._held for row in self._read])
        if apart.all() or not apart.any() or len(labels[torch.from_numpy(~apart)].unique()) < 2:
            raise SaccadeError("too few labelled pictures could be read", path="--eval", code=1)
        with examining(encoder) as look:
            tokens: Tokens = "cls" if encoder.backbone.config.pooling == "cls" else "patches"
            vectors = torch.cat([encoder.embedding(look(part, tokens=tokens)).float() for part in self._pictures])
        vectors, classes, held = vectors.clone(), len(self._data.classes), torch.from_numpy(apart).to(vectors.device)
        if not torch.isfinite(vectors).all():
            return {"knn": 0.0, "linear": 0.0}
        guess = knn.predict(vectors[~held], labels[~held], vectors[held], classes)
        _, accuracy = linear.choose_penalty(vectors, labels, classes, apart)
        return {"knn": 100 * (guess == labels[held]).double().mean().item(), "linear": accuracy}


def _some(rows: np.ndarray, count: int) -> list[int]:
    """A fixed choice of at most `count` rows, in order."""
    if len(rows) <= count:
        return rows.tolist()
    order = Permutation(len(rows), "live")
    return sorted(int(rows[order(place)]) for place in range(max(count, 2)))

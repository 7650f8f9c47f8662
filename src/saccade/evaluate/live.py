"""How good the features are while they are being learned, on labelled pictures that are held out of train.

Test is never read here: what is chosen by these numbers, such as the best checkpoint, is examined by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saccade.data import Source
from saccade.draws import Permutation
from saccade.embed import Tokens, examining, read_pictures
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError
from saccade.evaluate import knn, linear
from saccade.evaluate.labelled import SHARE, Labelled, read_labelled
from saccade.evaluate.splits import set_apart
from saccade.text import Pairing

MEMORY = 1 << 28
"""Bytes of pictures that are kept decoded, at most."""


Parts = tuple[np.ndarray, np.ndarray]
"""Rows to learn from, and rows to examine."""


def held_out(data: Labelled) -> Parts:
    """The train side, and of it the part that `evaluate` chooses penalties on."""
    apart = set_apart(data.names(data.train), SHARE, "hold-out")
    return data.train[~apart], data.train[apart]


class Live:
    """Labelled pictures to learn from, and others, of other groups, to examine; both from the train side.

    `divide` says which. At most `rows` pictures, a fixed choice, are read, at the first measurement, and kept. With
    `leave_out` k-NN examines them all, each by those of other groups: several times as many, for nothing. Raises
    `SaccadeError` for data without labels or with a train side that cannot be divided.
    """

    def __init__(
        self,
        labelled: str | Path | Source,
        group_by: str | None,
        preprocess: Preprocess,
        rows: int,
        divide: Callable[[Labelled], Parts] = held_out,
        leave_out: bool = False,
    ):
        data = read_labelled(labelled, group_by, preprocess.canvas, preprocess.channels)
        learn, held = divide(data)
        rows = min(rows, MEMORY // (preprocess.channels * preprocess.crop**2))
        share = len(held) / (len(learn) + len(held))
        self._rows = [*_some(learn, round(rows * (1 - share))), *_some(held, round(rows * share))]
        self._held = set(held.tolist())
        self._data, self._preprocess, self._leave_out = data, preprocess, leave_out
        self._pictures: list[Shaped[Tensor, "b c s s"]] = []
        self._read: list[int] = []
        self.examined = 0
        """How many pictures the last measurement examined by k-NN."""

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self._data.classes)

    def _decode(self) -> None:
        for found in read_pictures(self._data.source, [self._preprocess], rows=self._rows, batch=64, words="reading"):
            if found.rows:
                self._pictures.append(found.views[0])
                self._read += found.rows

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """`knn` and `linear` in percent of the pictures examined, on the vector that the family pools."""
        vectors, labels, apart = self._look(encoder)
        self.examined = len(apart) if self._leave_out else int(apart.sum())
        if not torch.isfinite(vectors).all():
            return {"knn": 0.0, "linear": 0.0}
        _, accuracy = linear.choose_penalty(vectors, labels, len(self._data.classes), apart)
        right = self._among(vectors, labels) if self._leave_out else self._right(vectors, labels, apart)
        return {"knn": 100 * right.double().mean().item(), "linear": accuracy}

    def right(self, encoder: Encoder) -> tuple[np.ndarray, list[str]]:
        """Which of the held-out pictures k-NN gets right, Bool[n], and the group (or key) of each."""
        vectors, labels, apart = self._look(encoder)
        names = self._data.names(np.array(self._read)[apart])
        if not torch.isfinite(vectors).all():
            return np.zeros(len(names), dtype=bool), names
        return self._right(vectors, labels, apart).cpu().numpy(), names

    def told(self, encoder: Encoder, words: Float[Tensor, "c d"], pairing: Pairing) -> np.ndarray:
        """Of which of the held-out pictures the nearest class in words is the right one (zero-shot), Bool[n]."""
        vectors, labels, apart = self._look(encoder)
        held = torch.from_numpy(apart).to(vectors.device)
        with torch.inference_mode():
            fits = pairing.to(vectors.device).images(vectors[held]) @ words.to(vectors.device).mT
        right: np.ndarray = (fits.argmax(1) == labels[held]).cpu().numpy()
        return right

    def _look(self, encoder: Encoder) -> tuple[Tensor, Tensor, np.ndarray]:
        """Vectors and labels of all pictures, and which of them are held out."""
        if not self._pictures:
            self._decode()
        labels = torch.from_numpy(self._data.labels[self._read]).to(encoder.device)
        apart = np.array([row in self._held for row in self._read])
        if apart.all() or not apart.any() or len(labels[torch.from_numpy(~apart)].unique()) < 2:
            raise SaccadeError("too few labelled pictures could be read", path="--eval", code=1)
        with examining(encoder) as look:
            tokens: Tokens = "cls" if encoder.backbone.config.pooling == "cls" else "patches"
            vectors = torch.cat([encoder.embedding(look(part, tokens=tokens)).float() for part in self._pictures])
        return vectors.clone(), labels, apart

    def _right(self, vectors: Tensor, labels: Tensor, apart: np.ndarray) -> Tensor:
        held = torch.from_numpy(apart).to(vectors.device)
        guess = knn.predict(vectors[~held], labels[~held], vectors[held], len(self._data.classes))
        return guess == labels[held]

    def _among(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Which pictures those of other groups get right."""
        _, groups = np.unique(self._data.names(np.array(self._read)), return_inverse=True)
        own = torch.from_numpy(groups).to(vectors.device)
        return knn.predict(vectors, labels, vectors, len(self._data.classes), groups=(own, own)) == labels


def _some(rows: np.ndarray, count: int) -> list[int]:
    """A fixed choice of at most `count` rows, in order."""
    if len(rows) <= count:
        return rows.tolist()
    order = Permutation(len(rows), "live")
    return sorted(int(rows[order(place)]) for place in range(max(count, 2)))

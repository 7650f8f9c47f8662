"""Texts found by pictures, and pictures by texts: recall among the 1, 5 and 10 nearest, in percent.

A picture asks once, and is right where any of its captions is among the nearest; every caption asks for its picture. A
text that several pictures have (case and spaces aside) is right for each of them. Ties go by the order of the data, so
that an encoder to which everything is the same finds what chance finds. No more of the likenesses than a tile is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.data import Source, same_text
from saccade.embed import device
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import column_of, in_test
from saccade.evaluate.shared import pictured, test_side, worded
from saccade.search import best_of
from saccade.sources import open_source
from saccade.sources.captions import usable

AT = (1, 5, 10)
_HINT = "captions are picture.txt beside picture.jpg, a column `caption` of a list, or .txt members of tar shards"
_QUERIES, _ITEMS = 1024, 1 << 14
"""A tile of likenesses: 64 MB."""


def evaluate(encoder: Encoder, pairs: str | Path | Source, *, workers: int = 0) -> dict[str, Any]:
    """Recall both ways and by chance, for JSON. Raises `SaccadeError` without a text tower or without captions.

    Of a folder the test side is read: test.jsonl (or another list), test.tar, test/; everything where there is none.
    """
    encoder.pairing()
    source, rows, part = _open(pairs, encoder)
    seen = pictured(encoder, source, rows, workers, hint=_HINT)
    captions = Captions.of(source, seen.rows)
    vectors, cut = worded(encoder, captions.texts)
    found = {
        "image_to_text": recall(seen.vectors, vectors, captions.of_picture),
        "text_to_image": recall(vectors, seen.vectors, captions.of_text),
    }
    warnings = []
    if captions.doubles:
        warnings.append(
            f"{captions.doubles} captions are another picture's as well; each counts as right for all of its pictures"
        )
    if cut:
        warnings.append(f"{len(cut)} captions are longer than the text tower reads and were cut")
    return {
        "retrieval": {
            **{way: {f"r{k}": _percent(right[:, :k].any(1)) for k in AT} for way, right in found.items()},
            "chance": captions.chance(),
            "pictures": len(seen.rows),
            "captions": len(captions.texts),
            "duplicates": captions.doubles,
            "part": part,
        },
        "image_size": encoder.preprocess.crop,
        "quarantined": len(seen.failures),
        "unreadable": [{"key": key, "reason": reason} for _, key, reason in seen.failures[:20]],
        "warnings": warnings,
    }


def _open(pairs: str | Path | Source, encoder: Encoder) -> tuple[Source, list[int], str]:
    """The source, which of its rows are examined, and how that part is called."""
    prepare = encoder.preprocess
    place, part = (pairs, "all") if isinstance(pairs, Source) else test_side(Path(pairs).expanduser())
    source = open_source(place, short_side=prepare.canvas, channels=prepare.channels, texts=True)
    if (named := column_of(source, "split")) is not None:
        rows = [row for row, name in enumerate(named) if in_test(name)]
        return source, rows or list(range(len(source))), "the column split: test" if rows else part
    return source, list(range(len(source))), part


@dataclass(frozen=True)
class Captions:
    """The captions of some pictures, those of one picture together, and which text is which."""

    texts: list[str]
    owner: Int[Tensor, " c"]  # the number of the picture
    same: Int[Tensor, " c"]  # equal where texts are
    pictures: int

    @classmethod
    def of(cls, source: Source, rows: list[int]) -> Captions:
        """Those of rows that could be read. Raises `SaccadeError` where there are none."""
        texts, owner = list[str](), list[int]()
        for number, row in enumerate(rows):
            try:
                some = usable(source.key(row), source.words(row))
            except Unreadable:  # a source in memory may hold pictures alone
                some = ()
            texts += some
            owner += [number] * len(some)
        if not texts:
            raise SaccadeError("none of the pictures has a caption", path="LABELLED", hint=_HINT)
        same = np.unique([same_text(text) for text in texts], return_inverse=True)[1]
        return cls(texts, torch.tensor(owner), torch.from_numpy(same), len(rows))

    @property
    def doubles(self) -> int:
        """How many captions another picture has as well."""
        return int((self._pictures_of_text()[self.same] > 1).sum())

    def of_picture(self, asked: Int[Tensor, " q"], found: Int[Tensor, "q k"]) -> Bool[Tensor, "q k"]:
        """Whether these captions belong to the pictures that asked."""
        return self._belong(asked[:, None], self.same[found])

    def of_text(self, asked: Int[Tensor, " q"], found: Int[Tensor, "q k"]) -> Bool[Tensor, "q k"]:
        """Whether these pictures belong to the captions that asked."""
        return self._belong(found, self.same[asked][:, None])

    def chance(self) -> dict[str, dict[str, float]]:
        """What a choice at random scores, in percent."""
        pictures_of_text = self._pictures_of_text()
        texts_of_picture = torch.zeros(self.pictures, dtype=torch.int64)
        pairs = self._pairs
        counts = torch.bincount(self.same)
        texts_of_picture.index_add_(0, pairs // self._texts, counts[pairs % self._texts])
        return {
            "image_to_text": by_chance(texts_of_picture, len(self.texts)),
            "text_to_image": by_chance(pictures_of_text[self.same], self.pictures),
        }

    @cached_property
    def _texts(self) -> int:
        return int(self.same.max()) + 1

    @cached_property
    def _pairs(self) -> Int[Tensor, " p"]:
        """Every pair of picture and text that belongs together, once, as one number, in order."""
        return torch.unique(self.owner * self._texts + self.same)

    def _pictures_of_text(self) -> Int[Tensor, " t"]:
        return torch.bincount(self._pairs % self._texts, minlength=self._texts)

    def _belong(self, pictures: Int[Tensor, "q _"], texts: Int[Tensor, "q _"]) -> Bool[Tensor, "q k"]:
        asked = pictures * self._texts + texts
        place = torch.searchsorted(self._pairs, asked).clamp(max=len(self._pairs) - 1)
        return self._pairs[place] == asked


def recall(
    queries: Float[Tensor, "q d"],
    items: Float[Tensor, "n d"],
    right: Callable[[Tensor, Tensor], Bool[Tensor, "q k"]],
) -> Bool[Tensor, "q k"]:
    """Which of the `AT[-1]` nearest items of each query are right, nearest first; vectors have length 1.

    `right` says of queries and of what they found, both by number, whether they belong together.
    """
    where, asked, found = device(), torch.arange(len(queries)), []
    for some in queries.split(_QUERIES):
        some = some.to(where)
        tiles = (some @ part.to(where).T for part in items.split(_ITEMS))
        found.append(best_of(tiles, AT[-1])[0].cpu())
    return torch.cat([right(*pair) for pair in zip(asked.split(_QUERIES), found, strict=True)])


def by_chance(right: Int[Tensor, " q"], items: int) -> dict[str, float]:
    """Percent of queries for which one of `right` items is among the first k, in an order at random."""
    missed = torch.ones(len(right), dtype=torch.float64)
    scores = {}
    for place in range(AT[-1]):
        missed *= (items - right - place).clamp(min=0) / max(items - place, 1)
        if place + 1 in AT:
            scores[f"r{place + 1}"] = round(100 * (1 - missed.mean().item()), 3)
    return scores


def _percent(right: Tensor) -> float:
    return round(100 * right.double().mean().item(), 3)

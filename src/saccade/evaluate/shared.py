"""Pictures and texts as vectors of length 1 in the space that they share, and where such pictures are found."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.data import Source
from saccade.embed import Tokens, examining, read_pictures
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import TEST

_LISTS = (".jsonl", ".csv", ".tsv", ".parquet")
_PICTURES, _TEXTS = 64, 256  # that go through a tower together


@dataclass(frozen=True)
class Pictured:
    """Vectors of the pictures that could be read, their rows of the source, and what could not."""

    vectors: Float[Tensor, "n d"]
    rows: list[int]
    failures: list[tuple[int, str, str]]  # row, key, reason


def pictured(
    encoder: Encoder, source: Source, rows: Sequence[int], workers: int, *, hint: str = "look at the files"
) -> Pictured:
    """Vectors of these rows. Raises `SaccadeError` where none can be read, and for vectors that are not numbers.

    `hint` says what to do where none can be read.
    """
    found: list[Tensor] = []
    good: list[int] = []
    failures: list[tuple[int, str, str]] = []
    needed: Tokens = "cls" if encoder.backbone.config.pooling == "cls" else "patches"
    with examining(encoder) as look:
        for read in read_pictures(
            source, [encoder.preprocess], rows=rows, batch=_PICTURES, workers=workers, words="evaluating"
        ):
            failures += read.failures
            good += read.rows
            if read.rows:
                features = look(read.views[0], tokens=needed)
                found.append(encoder.paired(features).float().cpu())
    if not good:
        first = f"; the first: {failures[0][1]}: {failures[0][2]}" if failures else ""
        raise SaccadeError(f"none of {len(failures)} pictures can be used{first}", hint=hint, code=1)
    return Pictured(_finite(torch.cat(found), "pictures"), good, failures)


def worded(encoder: Encoder, texts: Sequence[str]) -> tuple[Float[Tensor, "n d"], list[int]]:
    """Vectors of texts, and which of them were longer than the tower reads. Raises `SaccadeError`."""
    pairing, found, cut = encoder.pairing(), list[Tensor](), list[int]()
    with torch.inference_mode():
        for start in range(0, len(texts), _TEXTS):
            some = texts[start : start + _TEXTS]
            found.append(pairing(pairing.tokens(some)).float().cpu())
            cut += [start + place for place in pairing.cut(some)]
    return _finite(torch.cat(found), "texts"), cut


def _finite(vectors: Float[Tensor, "n d"], what: str) -> Float[Tensor, "n d"]:
    if not torch.isfinite(vectors).all():
        raise SaccadeError(f"the vectors of {what} have NaN or infinite values", hint="the backbone is damaged", code=1)
    return vectors


def test_side(data: Path) -> tuple[Path, str]:
    """What of a folder is examined, and its name: test.jsonl (or another list), test.tar, test/; else all of it.

    `val` stands in where there is no `test`. Parquet files may be in a folder `data`, as on Hugging Face's hub.
    """
    for name in TEST if data.is_dir() else ():
        for place in [*(data / f"{name}{suffix}" for suffix in (*_LISTS, ".tar")), data / name]:
            if place.exists():
                return place, place.name
        for shards in (f"{name}-*.tar", f"{name}-*.parquet", f"data/{name}-*.parquet"):
            if glob.glob(str(data / shards)):
                return data / shards, shards
    return data, "all"

"""Exact nearest neighbours by cosine, over vectors that stay on disk.

An index is a directory that `embed` writes: index.json, keys.jsonl (one JSON string a line), one .npy of float32 for
each kind of token, a row for each sample in the order of the data, and quarantine.jsonl (the rows that stayed zero).
Vectors of the kind `pair` lie in the space that pictures share with texts: words are searched for among them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from saccade import weights
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable, say

FORMAT = "saccade-index-1"
STATE, KEYS, QUARANTINE = "index.json", "keys.jsonl", "quarantine.jsonl"
PAIR = "pair"
"""The kind of vectors that pictures and texts share."""
_ROWS = 1 << 16  # rows a chunk: 100 MB at 384 wide


@dataclass(frozen=True)
class Hit:
    """A neighbour: its key, and the cosine of its vector with the query's."""

    key: str
    score: float


class Index:
    """Keys and vectors, and their neighbours. `Index.open(path)` opens one; `embed` makes one."""

    def __init__(self, path: Path, state: dict[str, Any], backbone: str | Path | Encoder | None = None):
        self.path, self.state = path, state
        self.images_per_second: float | None = None
        self._backbone = backbone
        self._keys: list[str] | None = None
        self._norms: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path, *, backbone: str | Path | Encoder | None = None) -> Index:
        """An index that is finished. `backbone` says where the encoder is now, for queries that are pictures.

        Raises `SaccadeError` for what is no index, and for one that is not finished, with the command that goes on.
        """
        place = Path(path).expanduser()
        state = read_state(place)
        if not state["done"]:
            done, total = state["rows"], state["samples"]
            raise SaccadeError(
                f"the index {place} is not finished: {done} of {total}",
                path=place,
                hint=f"go on with: {state['command']}",
            )
        return cls(place, state, backbone)

    def __len__(self) -> int:
        """How many samples have vectors."""
        return int(self.state["count"])

    @property
    def keys(self) -> list[str]:
        """The name of each row, in the order of the data; also of rows that were set aside."""
        return [json.loads(line) for line in self._lines()]

    def vectors(self, token: str) -> np.ndarray:
        """The memory-mapped rows of one kind of token: [N D], or [N P D] for patches."""
        if token not in self.state["tokens"]:
            hint = f"embed again with --tokens {','.join([*self.state['tokens'], token])}"
            raise SaccadeError(f"the index {self.path} holds no {token} tokens", path=self.path, hint=hint)
        return np.load(self.path / f"{token}.npy", mmap_mode="c")  # as "r", in a form that torch takes

    def summary(self) -> dict[str, Any]:
        """What `saccade embed` prints."""
        return {
            "index": str(self.path),
            "count": len(self),
            "dim": self.state["dim"],
            "tokens": self.state["tokens"],
            "image_size": self.state["image_size"],
            "images_per_second": self.images_per_second,
            "quarantined": self.state["quarantined"],
        }

    def search(
        self,
        query: Any = None,
        k: int = 10,
        *,
        image: Image.Image | str | Path | None = None,
        text: str | None = None,
        key: str | None = None,
    ) -> list[Hit]:
        """The `k` nearest, nearest first; ties by the order of the data. A key finds itself first.

        `query` is a vector [D], a Pillow picture, a `Path` or a string: a key of the index, else a file. `image`,
        `text` and `key` say which it is; words are found in an index of the kind `pair`. Raises `SaccadeError` for an
        unknown key, an unreadable picture, a vector of another width, and words where there is no text tower.
        """
        if text is not None:
            return self.search_many(self._of_text(text)[None], k, token=PAIR)[0]
        if isinstance(query, str):
            known = json.dumps(query) in self._lines()
            key, image = (query, None) if known or not Path(query).is_file() else (None, query)
        elif isinstance(query, Image.Image | Path):
            image = query
        if key is not None:
            vector = self._of_key(key)
        elif image is not None:
            vector = self._of_image(image)
        elif query is not None:
            vector = _array(query)
        else:
            raise SaccadeError("search for what?", hint="give a vector, an image, words or a key")
        if vector.ndim != 1:
            raise SaccadeError(f"a query is one vector, not {list(vector.shape)}", hint="search_many takes several")
        return self.search_many(vector[None], k)[0]

    def search_many(self, vectors: Tensor | np.ndarray, k: int = 10, *, token: str | None = None) -> list[list[Hit]]:
        """The `k` nearest of each query [Q D], exactly, in one pass over the vectors on disk.

        `token`: among which kind of vectors; the first pooled one that the index has, if not given.
        """
        token, queries = token or self._token(), _array(vectors)
        dim = self.vectors(token).shape[-1]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise SaccadeError(
                f"queries are [Q {dim}], not {list(queries.shape)}", hint="embed them with the same backbone"
            )
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise SaccadeError("a query of length zero or with NaN has no direction")
        rows, scores = best_of(self._cosines(token, torch.from_numpy(queries / lengths)), k)
        lines = self._lines()
        return [
            [
                Hit(json.loads(lines[row]), min(1.0, float(score)))
                for row, score in zip(*pair, strict=True)
                if np.isfinite(score)
            ]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _cosines(self, token: str, queries: Float[Tensor, "q d"]) -> Iterator[Float[Tensor, "q _"]]:
        """Cosines with the rows on disk, some at a time; minus infinity where a row has no vector."""
        vectors, norms = self.vectors(token), self._lengths(token)
        for start in range(0, len(vectors), _ROWS):
            chunk, norm = (torch.from_numpy(part[start : start + _ROWS]) for part in (vectors, norms))
            yield (queries @ chunk.T).div_(norm).masked_fill_(norm == 0, -torch.inf)

    def _lengths(self, token: str) -> np.ndarray:
        if token not in self._norms:
            vectors = self.vectors(token)
            parts = [np.linalg.norm(vectors[start : start + _ROWS], axis=1) for start in range(0, len(vectors), _ROWS)]
            self._norms[token] = np.concatenate(parts)
        return self._norms[token]

    def _token(self) -> str:
        """The kind of token that is searched: the first pooled one."""
        pooled = [token for token in self.state["tokens"] if token != "patches"]
        if not pooled:
            hint = "embed with --tokens cls or --tokens mean as well"
            raise SaccadeError(f"the index {self.path} holds patches only", path=self.path, hint=hint)
        return pooled[0]

    def _lines(self) -> list[str]:
        """The keys as they stand in the file, quoted: read once."""
        if self._keys is None:
            self._keys = (self.path / KEYS).read_text(encoding="utf-8").split("\n")[:-1]
        return self._keys

    def _of_key(self, key: str) -> np.ndarray:
        try:
            row = self._lines().index(json.dumps(key))
        except ValueError:
            raise SaccadeError(
                f"there is no key {key!r} in {self.path}", path=self.path, hint=self._nearest_key(key)
            ) from None
        vector = np.array(self.vectors(self._token())[row])
        if not vector.any():
            raise SaccadeError(
                f"{key!r} could not be read when the index was made", path=self.path, hint=f"see {QUARANTINE}"
            )
        return vector

    def _nearest_key(self, key: str) -> str:
        """The nearest key, among those that share a part of the name where there are very many."""
        keys = self._lines()
        if len(keys) > 20_000:
            stem = json.dumps(Path(key).stem)[1:-1].lower()
            keys = [line for line in keys if stem in line.lower()][:20_000]
        close = difflib.get_close_matches(json.dumps(key), keys, n=1, cutoff=0.5)
        return (
            f"did you mean {json.loads(close[0])!r}?" if close else f"keys look like {json.loads(self._lines()[0])!r}"
        )

    def _of_image(self, image: Image.Image | str | Path) -> np.ndarray:
        """The vector of a picture, made as those of the index were."""
        encoder, token = self._encoder(), self._token()
        try:
            pixels = encoder.preprocess(image)
        except Unreadable as error:
            raise SaccadeError(
                f"the picture {error.key} cannot be read: {error.reason}", path=error.key or None
            ) from None
        images = pixels[None].to(encoder.device)
        with torch.inference_mode():
            if token == PAIR:
                return _array(encoder.pair(images)[0])
            if token == "cls":
                return _array(encoder(images, tokens="cls").cls[0])
            return _array(encoder(images, tokens="patches").patches.mean(dim=1)[0])

    def _of_text(self, text: str) -> np.ndarray:
        """The vector of words in the space that pictures share. Raises `SaccadeError` without a text tower."""
        if not text.strip():
            raise SaccadeError("search for which words?", path="--text", hint='e.g. --text "a crushed yellow leaf"')
        encoder = self._encoder()
        try:
            pairing = encoder.pairing()
        except SaccadeError as error:
            hint = "embed with a backbone that has one (CLIP, SigLIP, or a run of pictures with words)"
            raise SaccadeError(error.error, path="--text", hint=f"{hint}, or search by --image or --key") from None
        self.vectors(PAIR)  # raises where the index was made without
        with torch.inference_mode():
            found = _array(pairing([text])[0])
        if pairing.cut([text]):
            say("the words are more than the text tower reads, and were cut")
        return found

    def _encoder(self) -> Encoder:
        """The backbone that made the index. Raises `SaccadeError` for another one."""
        said = self.state["backbone"]
        if not isinstance(self._backbone, Encoder):
            place = self._backbone or said["path"]
            if place is None:
                raise SaccadeError("the index does not know its backbone's place", hint="Index.open(path, backbone=…)")
            self._backbone = weights.load(place, image_size=self.state["image_size"], **(said.get("asked") or {}))
        encoder = self._backbone
        tower = (encoder.record.get("text") or {}).get("hash") if "text" in said else None
        if encoder.record.get("hash") != said["hash"] or tower != said.get("text"):
            raise SaccadeError(
                f"the backbone {said['path']} is not the one that made {self.path}", path=self.path, hint="embed again"
            )
        return encoder


def best_of(parts: Iterable[Float[Tensor, "q _"]], k: int) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """The `k` best columns of each row of scores, and these, best first; ties in the order of the columns.

    The scores come in parts, columns from left to right, and only one part is held at a time.
    """
    rows = best = torch.empty(0)
    start = 0
    for scores in parts:
        top, chosen = scores.topk(min(k, scores.shape[1]))
        reach = int((scores >= top[:, -1:]).sum(dim=1).max())
        if reach > top.shape[1]:  # all that reach the k-th score stay, so that ties go by the order of the columns
            top, chosen = scores.topk(reach)
        chosen, order = chosen.sort(dim=1)
        top, chosen = top.gather(1, order), chosen + start
        if start:
            top, chosen = torch.cat([best, top], 1), torch.cat([rows, chosen], 1)
        best, order = top.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], chosen.gather(1, order)[:, :k]
        start += scores.shape[1]
    return rows, best


def read_state(place: Path) -> dict[str, Any]:
    """What index.json says. Raises `SaccadeError` where there is no index."""
    if not place.exists():
        raise SaccadeError(
            f"there is no index {place}", path=place, hint="make one: saccade embed BACKBONE DATA --out INDEX"
        )
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        assert state["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        hint = "an index is a directory that saccade embed has written"
        raise SaccadeError(f"{place} is not an index", path=place, hint=hint) from None
    return state


def _array(vector: Any) -> np.ndarray:
    array = vector.detach().cpu().numpy() if isinstance(vector, Tensor) else np.asarray(vector)
    return array.astype(np.float32)

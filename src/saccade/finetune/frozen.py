"""Vectors of all pictures, computed once: every pooling, augmented copies, raw pixels; kept on disk where it is asked.

A folder of kept vectors has one file for each encoder and way of looking; pictures that it lacks are added to it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from jaxtyping import Float, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saccade import augment
from saccade.data import Source
from saccade.draws import Draws, hash64
from saccade.embed import Look, examining, read_pictures
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.features import SMALL, small
from saccade.finetune.task import presented
from saccade.settings import Looking
from saccade.vit import Features

BOTH = "cls+mean"
"""Class token and mean patch side by side."""
_BATCH = 64


@dataclass(frozen=True)
class Vectors:
    """What was seen of the pictures that could be read, in the order of `rows` of the source."""

    rows: np.ndarray
    pooled: Mapping[str, Float[Tensor, "n d"]]  # by pooling
    copies: Mapping[str, Float[Tensor, "n v d"]]  # of augmented copies, v may be 0
    small: Shaped[Tensor, "n c s s"]  # for raw pixels
    failures: list[tuple[int, str, str]]
    seconds: float = 0.0
    computed: int = 0
    """How many pictures were looked at; the others had been kept."""

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where some rows stand here; those that could not be read are left out."""
        at = {row: place for place, row in enumerate(self.rows.tolist())}
        return np.array([at[row] for row in rows.tolist() if row in at], dtype=np.int64)

    def poolings(self) -> list[str]:
        """What to choose from: each, and both where there is a class token beside patches."""
        return [*self.pooled, *([BOTH] if {"cls", "mean"} <= self.pooled.keys() else [])]

    def of(self, pooling: str, places: np.ndarray) -> Float[Tensor, "n d"]:
        """Vectors at these places."""
        where = torch.from_numpy(places)
        return torch.cat([self.pooled[name][where] for name in parts(pooling)], dim=1)

    def copied(self, pooling: str, places: np.ndarray) -> Float[Tensor, "n v d"]:
        """Vectors of the augmented copies of these."""
        where = torch.from_numpy(places)
        return torch.cat([self.copies[name][where] for name in parts(pooling)], dim=2)

    def pixels(self, places: np.ndarray) -> Float[Tensor, "n d"]:
        """Raw pixels, as `evaluate` has them: floats in [0, 1]; equal channels are kept once."""
        some = self.small[torch.from_numpy(places)]
        if bool((self.small == self.small[:, :1]).all()):
            some = some[:, :1]
        return (some if some.is_floating_point() else some.float() / 255).flatten(1)


def parts(pooling: str) -> list[str]:
    """The vectors that stand side by side in one."""
    return pooling.split("+")


def pooled(features: Features, pooling: str) -> Float[Tensor, "b d"]:
    """The vector of each picture by this pooling. Differentiable."""
    found = []
    for name in parts(pooling):
        vector = features.cls if name == "cls" else features.patches.mean(dim=1)
        assert vector is not None
        found.append(vector)
    return torch.cat(found, dim=1)


def vectors(
    encoder: Encoder,
    source: Source,
    rows: np.ndarray,
    *,
    looking: Looking,
    seed: int = 0,
    copied: np.ndarray | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
) -> Vectors:
    """Looks at these rows of a source; `copied` are those of which augmented copies are wanted, if `looking.views`.

    With a folder `cache` what was looked at before, by this very encoder and in this way, is read from there. Raises
    `SaccadeError` when no picture can be read, and for features that are no numbers.
    """
    began = time.perf_counter()
    wanted = np.unique(rows)
    twice = set() if copied is None or not looking.views else set(copied.tolist())
    kept = _Kept(cache, encoder, looking, seed) if cache is not None else None
    known = kept.read() if kept else {}
    keys = {row: source.key(row) for row in wanted.tolist()}
    missing = [row for row in wanted.tolist() if _name(keys[row], row in twice) not in known]
    fresh, failures = _look(encoder, source, missing, keys, twice, looking, seed, workers)
    if kept and fresh:
        kept.write(known | fresh)
    known |= fresh
    good = [row for row in wanted.tolist() if _name(keys[row], row in twice) in known]
    if not good:
        first = f"; the first: {failures[0][1]}: {failures[0][2]}" if failures else ""
        raise SaccadeError(f"none of {len(wanted)} pictures can be read{first}", hint="look at the files", code=1)
    seen = [known[_name(keys[row], row in twice)] for row in good]
    names = [name for name in seen[0] if name not in ("small", "copies") and not name.startswith("copies/")]
    stacked = {name: torch.stack([one[name] for one in seen]) for name in names}
    if not all(bool(torch.isfinite(part).all()) for part in stacked.values()):
        raise SaccadeError("features have NaN or infinite values", hint="the backbone is damaged", code=1)
    none = {name: part.new_zeros(looking.views, part.shape[1]) for name, part in stacked.items()}
    copies = {
        name: torch.stack([one.get(f"copies/{name}", none[name]) for one in seen])
        for name in names
    }  # fmt: skip
    thumbs = torch.stack(_alike([one["small"] for one in seen]))
    took = time.perf_counter() - began
    return Vectors(np.array(good), stacked, copies, thumbs, failures, took, len(fresh))


def _alike(pictures: list[Tensor]) -> list[Tensor]:
    if len({picture.dtype for picture in pictures}) > 1:
        return [picture if picture.is_floating_point() else picture.float() / 255 for picture in pictures]
    return pictures


def _name(key: str, twice: bool) -> str:
    return f"{key}\0copies" if twice else key


def _look(
    encoder: Encoder,
    source: Source,
    rows: Sequence[int],
    keys: Mapping[int, str],
    twice: set[int],
    looking: Looking,
    seed: int,
    workers: int,
) -> tuple[dict[str, dict[str, Tensor]], list[tuple[int, str, str]]]:
    """By name of a picture what is seen of it, and what could not be read."""
    found: dict[str, dict[str, Tensor]] = {}
    failures: list[tuple[int, str, str]] = []
    if not rows:
        return found, failures
    side = min(SMALL, encoder.preprocess.crop)
    with examining(encoder) as look:
        reads = read_pictures(
            source, [encoder.preprocess], rows=rows, batch=_BATCH, workers=workers, words="computing features"
        )
        for read in reads:
            failures += read.failures
            if not read.rows:
                continue
            images = read.views[0]
            seen = _poolings(look, images)
            more = [place for place, row in enumerate(read.rows) if row in twice]
            extra = _copies(look, images[more], [keys[read.rows[place]] for place in more], looking, seed)
            at = {place: n for n, place in enumerate(more)}
            for place, row in enumerate(read.rows):
                one = {name: part[place].clone() for name, part in seen.items()}
                one["small"] = small(images[place], side).clone()
                if place in at:
                    one |= {f"copies/{name}": part[at[place]].clone() for name, part in extra.items()}
                found[_name(keys[row], row in twice)] = one
    return found, failures


def _poolings(look: Look, images: Tensor) -> dict[str, Float[Tensor, "b d"]]:
    features = presented(look.encoder.backbone, look(images))
    kinds = (["cls"] if features.cls is not None else []) + (["mean"] if features.patches.shape[1] else [])
    return {kind: pooled(features, kind).float().cpu() for kind in kinds}


def _copies(
    look: Look, images: Tensor, keys: Sequence[str], looking: Looking, seed: int
) -> dict[str, Float[Tensor, "b v d"]]:
    """Vectors of augmented copies: each a crop of what the encoder sees, mirrored or not."""
    if not len(images) or not looking.views:
        return {}
    sizes = torch.tensor([images.shape[2:]]).expand(len(images), 2)
    addresses = torch.tensor([hash64(key) for key in keys])
    found: dict[str, list[Tensor]] = {}
    for visit in range(looking.views):
        draws = Draws(seed, 0, addresses, torch.full((len(images),), visit), torch.arange(len(images)))
        rows = crops(looking, sizes, draws)
        seen = _poolings(look, augment.render(images, rows, images.shape[-1]))
        for name, part in seen.items():
            found.setdefault(name, []).append(part)
    return {name: torch.stack(each, dim=1) for name, each in found.items()}


def crops(looking: Looking, size: Shaped[Tensor, "b 2"], draws: Draws) -> augment.Views:
    """A random crop of each picture, mirrored or not, in other colours: the views that a head and a backbone learn."""
    views = augment.random_resized_crop(draws.sample("crop"), size, scale=(looking.min_scale, 1.0))
    views = augment.flip(views, draws.sample("flip"), looking.flip)
    if looking.colour:
        strength = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.05}
        scaled = {name: looking.colour * value for name, value in strength.items()}
        views = augment.jitter(views, draws.sample("jitter"), probability=0.8, **scaled)
    return views


class _Kept:
    """A file of vectors by picture, for one encoder and one way of looking."""

    def __init__(self, folder: str | Path, encoder: Encoder, looking: Looking, seed: int):
        state = blake3()
        for name, tensor in sorted(encoder.backbone.state_dict().items()):
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        said = {
            "weights": state.hexdigest(),
            "network": encoder.backbone.config.model_dump(mode="json"),
            "preprocess": asdict(encoder.preprocess),
            "looking": looking.model_dump(include=set(Looking.model_fields)) if looking.views else {},
            "seed": seed if looking.views else 0,
        }
        name = blake3(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder).expanduser() / f"features-{name}.safetensors"

    def read(self) -> dict[str, dict[str, Tensor]]:
        """What is known, by name of a picture."""
        if not self.path.is_file():
            return {}
        with safe_open(self.path, "pt") as file:
            names = json.loads(file.metadata()["names"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        found: dict[str, dict[str, Tensor]] = {}
        for kind, some in names.items():
            for place, name in enumerate(some):
                found[name] = {part: x[place] for full, x in tensors.items() if (part := _within(full, kind))}
        return found

    def write(self, known: Mapping[str, dict[str, Tensor]]) -> None:
        """All of it anew, beside, then renamed. Pictures alike in what is known of them stand in one table."""
        kinds: dict[str, list[str]] = {}
        for name, one in known.items():
            kind = "|".join(f"{part}{tuple(x.shape)}{x.dtype}" for part, x in sorted(one.items()))
            kinds.setdefault(kind, []).append(name)
        numbered = {str(n): some for n, some in enumerate(kinds.values())}
        tensors = {
            f"{kind}:{part}": torch.stack([known[name][part] for name in some])
            for kind, some in numbered.items()
            for part in known[some[0]]
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".writing-{os.getpid()}-{self.path.name}")
        save_file(tensors, beside, {"names": json.dumps(numbered)})
        os.replace(beside, self.path)


def _within(full: str, kind: str) -> str | None:
    """The name of a part in a table of this kind."""
    found, _, part = full.partition(":")
    return part if found == kind else None


def spoken(seen: Vectors) -> dict[str, Any]:
    """For the record: how many pictures, how quickly."""
    return {"pictures": len(seen.rows), "computed": seen.computed, "seconds": round(seen.seconds, 2)}

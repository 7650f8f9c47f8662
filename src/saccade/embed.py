"""Pictures to vectors on disk. Stopped at any moment, the same command goes on, to the same bytes."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade.data import Source, fingerprint, keep_memory
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable, nearest
from saccade.linear import packing
from saccade.search import FORMAT, KEYS, PAIR, QUARANTINE, STATE, Index, read_state
from saccade.sources import open_source
from saccade.vit import Features
from saccade.weights import load

TOKENS = ("cls", "mean", "patches", PAIR)
Tokens = Literal["all", "cls", "patches"]
_SHARED_FROM = 64  # pixels a side; below it a network is so quick that handing pictures over costs more
_SAVE_SECONDS = 2.0
_SAY_SECONDS = 10.0


@dataclass(frozen=True)
class Read:
    """Some samples of a source, decoded: which, one batch a view, and what could not be read."""

    rows: list[int]
    views: tuple[Tensor, ...]
    failures: list[tuple[int, str, str]]  # row, key, reason


class _Pictures(Dataset[Any]):
    """Rows of a source to `Read`: every picture decoded once, then seen through each of `views`."""

    def __init__(self, source: Source, views: tuple[Callable[[Tensor], Tensor], ...]):
        self._source, self._views = source, views

    def __getitems__(self, rows: list[int]) -> Read | SaccadeError:
        good, seen, failures = [], [], []
        for row in rows:
            try:
                sample = self._source[row]
                if sample.pixels is None or len(sample.pixels) != 1:
                    raise Unreadable(sample.key, "no picture" if sample.pixels is None else "a clip, not a picture")
                seen.append([view(sample.pixels[0]) for view in self._views])
                good.append(row)
            except Unreadable as error:
                failures.append((row, error.key, error.reason))
            except SaccadeError as error:  # returned, because a worker would bury it in a traceback
                return error
        return Read(good, tuple(_stack(list(view)) for view in zip(*seen, strict=True)), failures)


def _stack(pictures: list[Tensor]) -> Tensor:
    """One batch [B C H W]; pictures of several depths become floats in [0, 1]."""
    if len({picture.dtype for picture in pictures}) > 1:
        pictures = [picture if picture.is_floating_point() else picture.float() / 255 for picture in pictures]
    return torch.stack(pictures)


def read_pictures(
    source: Source,
    views: Sequence[Callable[[Tensor], Tensor]],
    *,
    rows: Sequence[int],
    batch: int,
    workers: int = 0,
    words: str = "reading",
) -> Iterator[Read]:
    """Batches of the chosen rows, in order, with progress on stderr. `views` make tensors of one size each."""
    keep_memory()
    batches = [list(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    loader = DataLoader(
        _Pictures(source, tuple(views)),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        generator=torch.Generator(),  # without one, the loader would draw from the global generator
    )
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()]
    console, said = Console(stderr=True), time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=len(rows))
        done = 0
        for found in loader:
            if isinstance(found, SaccadeError):
                raise found
            yield found
            done += len(found.rows) + len(found.failures)
            progress.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - said > _SAY_SECONDS:  # a log: a line now and then
                said = time.monotonic()
                print(f"{words} {done}/{len(rows)}", file=sys.stderr, flush=True)


def _as_it_is(found: Any) -> Any:
    return found


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


def pooled(features: Features, token: str) -> Float[Tensor, "b ..."]:
    """One kind of token: `cls` or `mean` [B D], `patches` [B N D]."""
    if token == "patches":
        return features.patches
    if token == "mean":
        return features.patches.mean(dim=1)
    assert features.cls is not None
    return features.cls


def _computed(tokens: Sequence[str], pooling: str) -> Tokens:
    """What the network must compute for these kinds of tokens, where it pools so."""
    needed = {("cls" if pooling == "cls" else "mean") if token == PAIR else token for token in tokens}
    return "patches" if "cls" not in needed else "cls" if needed == {"cls"} else "all"


def width(encoder: Encoder, token: str) -> int:
    """How long a vector of this kind is."""
    return encoder.pairing().tower.config.out if token == PAIR else int(encoder.backbone.config.width)


class Look:
    """Pictures to `Features`. On a CPU every thread computes pictures of its own: so none waits for another."""

    def __init__(self, encoder: Encoder, threads: ThreadPoolExecutor, count: int):
        self.encoder, self._threads, self._count = encoder, threads, count

    def __call__(
        self, images: Shaped[Tensor, "b c h w"], *, tokens: Tokens = "all", encoder: Encoder | None = None
    ) -> Features:
        """By the encoder that is examined, or by another one beside it."""
        encoder = encoder or self.encoder
        images = images.to(encoder.device)
        if images.device.type != "cpu" or min(self._count, len(images)) == 1 or images.shape[-1] < _SHARED_FROM:
            return encoder(images, tokens=tokens)

        def share(part: Tensor) -> Features:
            with torch.inference_mode():
                return encoder(part, tokens=tokens)

        parts = list(self._threads.map(share, images.chunk(self._count)))
        cls, registers, patches, positions, grids = zip(*parts, strict=True)
        together = None if cls[0] is None else torch.cat(cls)
        return Features(together, torch.cat(registers), torch.cat(patches), torch.cat(positions), grids[0])


@contextlib.contextmanager
def examining(encoder: Encoder) -> Iterator[Look]:
    """The encoder as it is used after training, without gradients; gives its mode back."""
    training, count = encoder.training, torch.get_num_threads()
    encoder.eval()
    try:
        with (  # torch's number of threads is that of the thread that sets it
            torch.inference_mode(),
            packing(encoder),
            ThreadPoolExecutor(count, "look", torch.set_num_threads, (1,)) as threads,
        ):
            yield Look(encoder, threads, count)
    finally:
        encoder.train(training)
        torch.set_num_threads(count)


def device() -> torch.device:
    """Where features are computed: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encoder_of(
    backbone: str | Path | Encoder, *, image_size: int | None, channels: int | None, patch: int | None
) -> Encoder:
    """The encoder that a name stands for, on the device, with size, channels and patch as they are asked.

    Raises `SaccadeError` where one that is loaded already should be another.
    """
    if not isinstance(backbone, Encoder):
        return load(backbone, image_size=image_size, channels=channels, patch=patch).to(device())
    for name, value in (("image_size", image_size), ("channels", channels), ("patch", patch)):
        if value is not None:
            raise SaccadeError(
                f"this encoder is loaded already, and {name} belongs to that",
                path=name,
                hint=f"load(…, {name}={value})",
            )
    return backbone


def embed(
    backbone: str | Path | Encoder,
    data: str | Path | Source | Sequence[str | Path | Source],
    *,
    out: str | Path,
    tokens: Sequence[str] | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    patch: int | None = None,
    workers: int = 0,
    batch: int = 64,
) -> Index:
    """Writes the vectors of all pictures to the directory `out` and returns the index.

    `tokens` are `cls`, `mean` (of the patches), `patches`, and `pair`: the one vector in the space that pictures share
    with texts. If not given, `pair` where the backbone has a text tower, so that words can be searched for, else the
    class token, or the mean where the family has none. The command goes on where it was stopped, and refuses to with
    another backbone, data or settings. Raises `SaccadeError` for that, and when no picture can be read.
    """
    there(data)
    encoder = encoder_of(backbone, image_size=image_size, channels=channels, patch=patch)
    if tokens is None:
        tokens = (PAIR,) if encoder.text is not None else ("cls",) if encoder.backbone.config.cls else ("mean",)
    _check_tokens(encoder, tokens)
    canvas, channels = encoder.preprocess.canvas, encoder.preprocess.channels
    source = open_source(data, short_side=canvas, channels=channels)
    place = Path(out).expanduser()
    state = _begin(place, _asked(encoder, backbone, data, source, tokens, batch, place))
    index = Index(place, state, encoder)
    if state["done"]:
        return index
    started, first = time.perf_counter(), state["rows"]
    _write(place, state, encoder, source, workers)
    index.images_per_second = round((state["samples"] - first) / max(time.perf_counter() - started, 1e-9), 1)
    return index


def there(data: str | Path | Source | Sequence[str | Path | Source]) -> None:
    """Raises `SaccadeError` for data that do not exist, before a backbone is fetched for them."""
    for item in [data] if isinstance(data, str | Path | Source) else data:
        if not isinstance(item, Source) and not glob.has_magic(str(item)) and not Path(item).expanduser().exists():
            open_source(item)


def _check_tokens(encoder: Encoder, tokens: Sequence[str]) -> None:
    for token in tokens:
        if token not in TOKENS:
            raise SaccadeError(f"there are no {token!r} tokens", path="--tokens", hint=nearest(token, TOKENS))
    if not tokens:
        raise SaccadeError("no tokens are asked for", path="--tokens", hint=f"choose of: {', '.join(TOKENS)}")
    if "cls" in tokens and not encoder.backbone.config.cls:
        raise SaccadeError("this backbone has no class token", path="--tokens", hint="use --tokens mean")
    if PAIR in tokens:
        encoder.pairing()
    if not math.prod(encoder.grid) and not {*tokens} <= {"cls", PAIR}:
        raise SaccadeError("this backbone gives one vector and no patches", path="--tokens", hint="use --tokens cls")


def _asked(
    encoder: Encoder, backbone: Any, data: Any, source: Source, tokens: Sequence[str], batch: int, place: Path
) -> dict[str, Any]:
    """What an index is made of. Everything but the command must stay the same for it to go on."""
    several = [data] if isinstance(data, str | Path | Source) else list(data)
    names = ["DATA" if isinstance(item, Source) else str(item) for item in several]
    words = ["saccade", "embed", "BACKBONE" if isinstance(backbone, Encoder) else str(backbone), *names]
    other = encoder.record.get("asked") or {}
    flags = [word for name in ("channels", "patch") if name in other for word in (f"--{name}", str(other[name]))]
    made_by = {name: encoder.record.get(name) for name in ("path", "hash", "family", "asked")}
    if PAIR in tokens:
        made_by["text"] = (encoder.record.get("text") or {}).get("hash")
    return {
        "format": FORMAT,
        "backbone": made_by,
        "data": fingerprint(source)["fingerprint"],
        "samples": len(source),
        "tokens": list(dict.fromkeys(tokens)),
        "dim": width(encoder, tokens[0]),
        "image_size": encoder.preprocess.crop,
        "batch": batch,
        "command": shlex.join([*words, *flags, "--out", str(place), "--tokens", ",".join(tokens)]),
    }


def _begin(place: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The state to go on from. Raises `SaccadeError` when the directory holds something else."""
    if (place / STATE).exists():
        state = read_state(place)
        for name, what in (
            ("backbone", "another backbone"), ("data", "other data"), ("tokens", "other tokens"),
            ("image_size", "another image size"), ("batch", "another batch"),
        ):  # fmt: skip
            before, now = (
                [part[name].get(key) for key in ("hash", "asked", "text")] if name == "backbone" else part[name]
                for part in (state, asked)
            )
            if before != now:
                hint = f"name another --out, or go on with: {state['command']}"
                values = "" if name in ("backbone", "data") else f": {before}, not {now}"
                raise SaccadeError(f"the index {place} was begun with {what}{values}", path=place, hint=hint)
        return state
    if place.exists() and (not place.is_dir() or any(path.name != f"{STATE}.new" for path in place.iterdir())):
        raise SaccadeError(f"{place} exists and is not an index", path="--out", hint="name a new directory")
    place.mkdir(parents=True, exist_ok=True)
    state = {**asked, "rows": 0, "quarantined": 0, "quarantine_bytes": 0, "count": 0, "done": False}
    _save(place, state)
    return state


def _save(place: Path, state: dict[str, Any]) -> None:
    new = place / f"{STATE}.new"
    with new.open("w", encoding="utf-8") as file:
        file.write(json.dumps(state, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, place / STATE)


def _arrays(place: Path, state: dict[str, Any], encoder: Encoder) -> dict[str, np.ndarray]:
    """The files of vectors, made when nothing has been counted yet, opened for writing."""
    patches = math.prod(encoder.grid)
    arrays: dict[str, np.ndarray] = {}
    for token in state["tokens"]:
        shape = (state["samples"], *([patches] if token == "patches" else []), width(encoder, token))
        path = place / f"{token}.npy"
        if state["rows"]:
            arrays[token] = np.lib.format.open_memmap(path, mode="r+")
        else:
            arrays[token] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    return arrays


def _write(place: Path, state: dict[str, Any], encoder: Encoder, source: Source, workers: int) -> None:
    """Computes and writes the rows that are still missing; `state` follows what has reached the disk."""
    arrays = _arrays(place, state, encoder)
    if not state["rows"]:
        with (place / KEYS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(source.key(row)) + "\n" for row in range(len(source)))
    rows = range(state["rows"], state["samples"])
    saved = time.perf_counter()
    with (place / QUARANTINE).open("a+b") as quarantine, examining(encoder) as look:
        quarantine.truncate(state["quarantine_bytes"])  # lines after the last save will be written again

        def save(done: bool) -> None:
            quarantine.flush()
            for array in arrays.values():
                array.flush()  # type: ignore[attr-defined]
            state.update(quarantine_bytes=quarantine.tell(), count=state["rows"] - state["quarantined"], done=done)
            _save(place, state)

        for found in read_pictures(
            source, [encoder.preprocess], rows=rows, batch=state["batch"], workers=workers, words="embedding"
        ):
            if found.rows:
                features = look(found.views[0], tokens=_computed(state["tokens"], encoder.backbone.config.pooling))
                for token, array in arrays.items():
                    vectors = encoder.paired(features) if token == PAIR else pooled(features, token)
                    array[found.rows] = vectors.float().cpu().numpy()
            for row, key, reason in found.failures:
                quarantine.write((json.dumps({"row": row, "key": key, "reason": reason}) + "\n").encode())
            state["rows"] += len(found.rows) + len(found.failures)
            state["quarantined"] += len(found.failures)
            if time.perf_counter() - saved > _SAVE_SECONDS:
                save(done=False)
                saved = time.perf_counter()
        save(done=True)
    if not state["count"]:
        raise SaccadeError(
            "none of the pictures could be read", path=place / QUARANTINE, hint="it names each with a reason", code=1
        )

"""A model of `saccade finetune` on pictures: one line a picture, and scores where the pictures are labelled."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.data import Source
from saccade.embed import Look, device, examining, read_pictures, there
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import TEST, TRAIN
from saccade.finetune.task import Head, Picture, presented
from saccade.finetune.tuned import Tuned, load
from saccade.run import Run, write_json
from saccade.sources import Files, open_source

PREDICTIONS, QUARANTINE, FACTS, SCORES = "predictions.jsonl", "quarantine.jsonl", "facts.json", "scores.json"
_BATCH = 64
Failure = tuple[int, str, str]


class Said(NamedTuple):
    """Rows, their heights and widths as decoded, a head's outputs, and the pixels where they were decoded whole."""

    rows: list[int]
    sizes: list[tuple[int, int]]
    outputs: Sequence[Tensor]
    pixels: Sequence[Tensor | None]


def predict(
    run: str | Path | Run,
    data: str | Path | Source,
    *,
    out: str | Path | None = None,
    workers: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answers for all pictures of `data` by the model of a run; the keys are those of `saccade predict --json`.

    `out`, a new folder, gets predictions.jsonl (a line a picture, in order), facts.json (the classes in the order of
    the probabilities), quarantine.jsonl (what could not be read, and why) and the files that a task makes of a picture.
    Where pictures are labelled there are `scores`, and `unknown` counts labels that were never learned. Raises
    `SaccadeError` where no picture can be read.
    """
    there(data)
    place = None if out is None else Path(out).expanduser()
    if place is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SaccadeError(f"{out} exists", path="--out", hint="name a new folder")
    if threads:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    tuned = load(run.path if isinstance(run, Run) else run)
    tuned.encoder.to(device())
    tuned.head.to(device())
    source, (targets, unknown) = opened(tuned, data)
    targets, warnings = _unlearned(source, targets)
    failures: list[Failure] = []
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    rows = list(range(len(source)))
    told = list(tell(tuned.encoder, tuned.head, source, rows, targets, failures, place, workers))
    if not told:
        first = f"; the first: {failures[0][1]}: {failures[0][2]}" if failures else ""
        raise SaccadeError(f"none of {len(rows)} pictures can be read{first}", hint="look at the files", code=1)
    score = tuned.task.part("scores")
    found = score(told, tuned.facts) if score is not None else {}
    result: dict[str, Any] = {
        "run": str(run.path if isinstance(run, Run) else run), "task": tuned.task.name,
        "data": "a source in memory" if isinstance(data, Source) else str(data), "pictures": len(told),
        "quarantined": len(failures), "unreadable": [{"key": key, "reason": why} for _, key, why in failures[:20]],
        "unknown": dict(unknown), "warnings": warnings, **({"scores": found} if found else {}), **_head_of(told),
    }  # fmt: skip
    if place is not None:
        write_told(place, told, failures)
        write_json(place / FACTS, dict(tuned.facts))
        if found:
            write_json(place / SCORES, found)
        result["predictions"] = str(place / PREDICTIONS)
    result["seconds"] = round(time.perf_counter() - began, 2)
    return result


def _unlearned(source: Source, targets: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    """Targets without those of a train side that stands beside a test side: answers to them are no examination."""
    column = source.columns.get("split") if isinstance(source, Files) else None
    parts = [source.key(row).split("/")[0] if column is None else column[row].strip().lower()
             for row in range(len(source))]  # fmt: skip
    train = {row for row, part in enumerate(parts) if part in TRAIN}
    if not train or not set(parts) & {*TEST}:
        return targets, []
    said = f"{len(train)} pictures are in train: they are answered, and not scored"
    return [None if row in train else targets[row] for row in range(len(source))], [said]


def opened(tuned: Tuned, data: str | Path | Source) -> tuple[Source, tuple[Sequence[Any], Mapping[str, int]]]:
    """The pictures, decoded as the head reads them; their targets (None: not known), and labels never learned."""
    own = tuned.task.part("opened")
    if own is not None and (found := own(data, tuned.encoder, tuned.facts)) is not None:
        return found[0], (found[1], found[2])
    short = None if tuned.head.whole else tuned.encoder.preprocess.canvas
    source = open_source(data, short_side=short, channels=tuned.encoder.preprocess.channels)
    known = tuned.task.part("known")
    if known is None:
        return source, ([None] * len(source), {})
    return source, known(source, tuned.facts)


def tell(
    encoder: Encoder,
    head: Head,
    source: Source,
    rows: Sequence[int],
    targets: Sequence[Any],
    failures: list[Failure],
    folder: Path | None = None,
    workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """What the head says of each picture that can be read, in order; `targets` are those of the source's rows."""
    for said in outputs(encoder, head, source, rows, failures, workers):
        yield from lines(head, source, said, targets, folder)


def lines(
    head: Head,
    source: Source,
    said: Said,
    targets: Sequence[Any],
    folder: Path | None,
) -> list[dict[str, Any]]:
    """One object a picture: key, group, and what the head tells of its outputs."""
    grouped = not isinstance(source, Files) or source.group_by is not None or "group" in source.columns
    pictures = [
        Picture(source.key(row), said.sizes[n], targets[row], source.group(row) if grouped else None, said.pixels[n])
        for n, row in enumerate(said.rows)
    ]
    told = head.told(said.outputs, pictures, folder)
    return [
        {"key": picture.key, **({} if picture.group is None else {"group": picture.group}), **line}
        for picture, line in zip(pictures, told, strict=True)
    ]


def outputs(
    encoder: Encoder, head: Head, source: Source, rows: Sequence[int], failures: list[Failure], workers: int = 0
) -> Iterator[Said]:
    """What the head says of the rows that can be read, some at a time."""
    was = head.training
    head.eval()
    try:
        with examining(encoder) as look:
            yield from (_whole if head.whole else _cropped)(look, head, source, rows, failures, workers)
    finally:
        head.train(was)


def _cropped(
    look: Look, head: Head, source: Source, rows: Sequence[int], failures: list[Failure], workers: int
) -> Iterator[Said]:
    views: list[Callable[[Tensor], Tensor]] = [look.encoder.preprocess, _size]
    for read in read_pictures(source, views, rows=rows, batch=_BATCH, workers=workers, words="predicting"):
        failures += read.failures
        if read.rows:
            features = presented(look.encoder.backbone, look(read.views[0], tokens=head.tokens))
            sizes = [(int(h), int(w)) for h, w in read.views[1].tolist()]
            yield Said(read.rows, sizes, list(head(features)), [None] * len(sizes))


def _size(pixels: Tensor) -> Tensor:
    return torch.tensor(pixels.shape[-2:])


def _whole(
    look: Look, head: Head, source: Source, rows: Sequence[int], failures: list[Failure], workers: int
) -> Iterator[Said]:
    for row in rows:
        try:
            sample = source[row]
            if sample.pixels is None or len(sample.pixels) != 1:
                raise Unreadable(sample.key, "no picture" if sample.pixels is None else "a clip, not a picture")
        except Unreadable as error:
            failures.append((row, error.key, error.reason))
            continue
        picture = sample.pixels[0]
        size = (int(picture.shape[-2]), int(picture.shape[-1]))
        yield Said([row], [size], head.look(look, [picture]), [picture])


def write_told(place: Path, told: Sequence[Mapping[str, Any]], failures: Sequence[Failure]) -> None:
    """Writes predictions.jsonl and quarantine.jsonl beside, then renames them. Keys that begin with `_` stay out."""
    _write(place / PREDICTIONS, ({k: v for k, v in one.items() if not k.startswith("_")} for one in told))
    _write(place / QUARANTINE, ({"key": key, "reason": why} for _, key, why in failures))


def _write(path: Path, objects: Iterator[dict[str, Any]]) -> None:
    beside = path.with_name(f".writing-{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        for one in objects:
            file.write(json.dumps(_finite(one), ensure_ascii=False) + "\n")
    os.replace(beside, path)


def _finite(value: Any) -> Any:
    """NaN is null in JSON."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _head_of(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often each answer was given, where answers are names."""
    said = [one["predicted"] for one in told if "predicted" in one]
    counts: dict[str, int] = {}
    for answer in said:
        for name in answer if isinstance(answer, list) else [answer]:
            if isinstance(name, str):
                counts[name] = counts.get(name, 0) + 1
    return {"predicted": dict(sorted(counts.items()))} if counts else {}

"""What lies where on this disk: a run, a folder or a file to its config.json and its files of tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from saccade import hub
from saccade.errors import SaccadeError, nearest
from saccade.hub import CONFIG, SHARDS, WEIGHTS
from saccade.hub import PICKLE as BIN
from saccade.settings import json_object
from saccade.tensors import ARRAYS, PICKLES

ONNX = "model.onnx"


def find(backbone: str | Path) -> tuple[Path, list[Path]]:
    """The folder with config.json, and the files of tensors."""
    place = Path(backbone).expanduser()
    if not place.exists():
        raise _no_such(str(backbone), place)
    if place.is_file():
        return place.parent, [place]
    for folder in (place / "backbone", place):
        for name in (WEIGHTS, ONNX):
            if (folder / name).is_file():
                return folder, [folder / name]
    if (place / SHARDS).is_file():
        return place, _shards(place / SHARDS)
    if (place / CONFIG).is_file() and (place / BIN).is_file():
        return place, [place / BIN]
    if (place / "backbone" / "text").is_dir():
        raise SaccadeError(
            f"{place} holds a text encoder, and none of pictures", path=place,
            hint="saccade evaluate examines it; in Python: saccade.pairing.load(RUN/backbone/text)",
        )  # fmt: skip
    if (place / "checkpoints").is_dir() or (place / "metrics.jsonl").is_file():
        raise SaccadeError(
            f"the run {place} has no backbone yet", path=place, hint="let it finish: the same command goes on"
        )
    others = sorted(path for path in place.iterdir() if path.suffix in (".safetensors", ".onnx", ARRAYS, *PICKLES))
    if others:
        raise SaccadeError(
            f"{place} has no {WEIGHTS}, but {others[0].name}", path=place, hint=f"name the file: {others[0]}"
        )
    raise SaccadeError(
        f"there is no backbone in {place}", path=place, hint=f"a run, or a folder with {WEIGHTS} and {CONFIG}"
    )


def _shards(path: Path) -> list[Path]:
    """The files that an index names, all beside it. Raises `SaccadeError`."""
    files = [path.parent / name for name in hub.shards(path)]
    for file in files:
        if not file.is_file():
            raise SaccadeError(f"{path} names {file.name}, which is not there", path=path, hint="copy the whole folder")
    if not files:
        raise SaccadeError(f"{path} names no files of tensors beside it", path=path, hint="copy it again")
    return files


def _no_such(name: str, place: Path) -> SaccadeError:
    siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
    beside = nearest(place.name, siblings[:1000]) if 0 < len(siblings) <= 1000 else f"look at {place.parent}"
    if name in hub.elsewhere() or (os.sep not in name and place.suffix not in (".safetensors", *PICKLES)):
        error = f"there is no backbone {name!r} here, and no published one of that name"
        published = hub.similar(name)
        here = beside.startswith("did you mean") and not published.startswith("did you mean")
        return SaccadeError(error, path=name, hint=beside if here else published)
    return SaccadeError(f"there is no backbone {place}", path=place, hint=beside if len(beside) < 300 else None)


def config_of(path: Path) -> dict[str, Any]:
    """What config.json says; nothing where there is none. Raises `SaccadeError`."""
    return json_object(path) if path.is_file() else {}

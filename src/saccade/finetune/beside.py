"""Pictures with a file beside each that says something of every pixel, as the examples of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Shaped
from rich.console import Console
from rich.progress import track
from torch import Tensor

from saccade.data import Sample, Source
from saccade.decode import decode
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import SHARE, TEST
from saccade.evaluate.splits import group_names, set_apart
from saccade.finetune.task import Aside, Examples
from saccade.sources.files import read


@runtime_checkable
class Part(Protocol):
    """Pictures of one side of a split. `masks` are the files beside them; `failures` those that have none, and why."""

    @property
    def root(self) -> Path: ...
    @property
    def channels(self) -> int: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def masks(self) -> list[str]: ...
    @property
    def failures(self) -> list[tuple[str, str]]: ...
    def target(self, row: int, size: tuple[int, int] | None = None) -> Shaped[Tensor, "h w"]:
        """What the file says of each pixel of a picture so wide and high. Raises `Unreadable`."""


@dataclass(frozen=True)
class Pictures(Source):
    """The pictures of some parts, one after the other, as they lie on disk."""

    sides: Sequence[Part]

    def __post_init__(self) -> None:
        places = [(part, row) for part in self.sides for row in range(len(part.keys))]
        object.__setattr__(self, "_places", places)

    def at(self, index: int) -> tuple[Part, int]:
        """The part that a picture is of, and its row there."""
        found: tuple[Part, int] = vars(self)["_places"][index]
        return found

    def __len__(self) -> int:
        return len(vars(self)["_places"])

    def key(self, index: int) -> str:
        part, row = self.at(index)
        return part.keys[row]

    def label(self, index: int) -> str | None:
        return None

    def group(self, index: int) -> str | None:
        return None

    def content(self, index: int) -> bytes:
        part, row = self.at(index)
        return b"\0".join(read(str(part.root / name), name) for name in (part.keys[row], part.masks[row]))

    def size(self, index: int) -> int:
        part, row = self.at(index)
        return sum((part.root / name).stat().st_size for name in (part.keys[row], part.masks[row]))

    def __getitem__(self, index: int) -> Sample:
        part, row = self.at(index)
        key = part.keys[row]
        pixels = decode(read(str(part.root / key), key), key=key, short_side=None, channels=part.channels)
        return Sample(key, pixels, source=str(part.root))


@dataclass(frozen=True)
class Targets(Sequence[Any]):
    """What the files beside pictures say, read when it is asked for."""

    pictures: Pictures

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        part, row = self.pictures.at(index)
        return part.target(row)


def examples(parts: Mapping[str, Part], group_by: str | None, note: Callable[[str, Tensor], str | None]) -> Examples:
    """Of `train` and `test`, after a look at every file; without facts.

    `note` is told of each target that can be used (`train` or `test`, its numbers) and may say why not. Pictures of
    train whose group is in test are not learned from. Raises `SaccadeError` when too little is left.
    """
    pictures = Pictures([parts["train"], parts["test"]])
    aside = [Aside(*failure) for part in pictures.sides for failure in part.failures]
    keys = [pictures.key(row) for row in range(len(pictures))]
    groups = _groups(keys, group_by)
    names = keys if groups is None else groups
    first = len(parts["train"].keys)
    examined = set(names[first:])
    good: list[int] = []
    for row in _shown(range(len(pictures))):
        side = "train" if row < first else "test"
        reason = "its group is in test too" if side == "train" and names[row] in examined else _reason(pictures, row)
        if reason is None:
            reason = note(side, Targets(pictures)[row])
        if reason is None:
            good.append(row)
        else:
            aside.append(Aside(keys[row], reason))
    train, test = (np.array([row for row in good if (row < first) is side], dtype=np.int64) for side in (True, False))
    if len({names[row] for row in train.tolist()}) < 2 or not len(test):
        said = f"{aside[0][0]}: {aside[0][1]}" if aside else "a split needs two pictures to learn from, and one of test"
        raise SaccadeError("too few pictures can be used", path=str(parts["train"].root), hint=said, code=1)
    apart = set_apart([names[row] for row in train.tolist()], SHARE, "hold-out")
    split = {"made": "as given: train and test", "train": int((~apart).sum()), "held": int(apart.sum()),
             "test": len(test), "aside": len(aside)}  # fmt: skip
    return Examples(pictures, keys, Targets(pictures), train[~apart], train[apart], test, {}, groups, split, [], aside)


def _groups(keys: list[str], group_by: str | None) -> list[str] | None:
    if group_by is None:
        return None
    groups, _ = group_names(keys, group_by)
    return [key if group is None else group for group, key in zip(groups, keys, strict=True)]


def _reason(pictures: Pictures, row: int) -> str | None:
    """Why a picture cannot be used with the file beside it."""
    part, place = pictures.at(row)
    try:
        sample = pictures[row]
        assert sample.pixels is not None
        part.target(place, (sample.pixels.shape[3], sample.pixels.shape[2]))
    except Unreadable as error:
        return error.reason
    return None


def _shown(rows: range) -> Iterator[int]:
    console = Console(stderr=True)
    yield from track(rows, "reading", console=console, transient=True, disable=not console.is_terminal)


def opened(
    data: str | Path | Source, part: Callable[[Path, Path], Part], folder: str
) -> tuple[Source, Sequence[Any], Mapping[str, int]] | None:
    """For `predict`: pictures of a folder with images/ and `folder`, or of its test/ (or val/), and what files say.

    A picture whose file is missing, or says nothing that can be used, has no target. None for any other folder.
    """
    root = Path(data).expanduser() if not isinstance(data, Source) else None
    if root is None or not root.is_dir():
        return None
    for place in (root, *(root / name for name in TEST)):
        if (place / "images").is_dir() and (place / folder).is_dir():
            return _known(part(root, place))
    return None


def _known(part: Any) -> tuple[Source, Sequence[Any], Mapping[str, int]]:
    """All pictures, those without a file too, which come last."""
    known, missing = len(part.keys), [key for key, _ in part.failures]
    whole = dataclasses.replace(part, keys=[*part.keys, *missing], masks=[*part.masks, *[""] * len(missing)])
    pictures = Pictures([whole])
    targets = [Targets(pictures)[row] if _reason(pictures, row) is None else None for row in range(known)]
    return pictures, [*targets, *[None] * len(missing)], {}

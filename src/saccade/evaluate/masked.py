"""Pictures with a class for each pixel: PART/images/X.jpg and PART/masks/X.png, and classes.txt that names the values.

What cannot be used is set aside with a reason, and ends nothing unless no picture is left.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor

from saccade.decode import decode
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import TEST, TRAIN
from saccade.sources.files import read
from saccade.sources.folder import scan

VOID = 255
"""The value of pixels that are neither learned from nor examined, here and in every mask."""


@dataclass(frozen=True)
class Classes:
    """The names of the classes, and to each value of a mask the class that it stands for.

    A value that classes.txt marks `(ignore)` or calls void, or leaves out up to one past the last, is `VOID`.
    """

    names: list[str]
    place: UInt8[np.ndarray, " 256"]
    allowed: np.ndarray  # bool [256]

    @classmethod
    def read(cls, path: Path) -> Classes:
        """From lines `NUMBER name`, or names alone, which count from 0. Raises `SaccadeError`."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise SaccadeError(
                f"{path} cannot be read: {error}", path=path, hint="masks need a classes.txt with lines `NUMBER name`"
            ) from None
        numbered = [re.fullmatch(r"(\d+)[\s:,]+(.+)", line) for line in lines]
        pairs = [(int(found[1]), found[2]) for found in numbered if found]
        if len(pairs) != len(lines):
            pairs = list(enumerate(lines))
        values = [value for value, _ in pairs]
        named = [(value, name) for value, name in pairs if not _void(name) and value != VOID]
        if len(set(values)) < len(values) or not named or max(values) > VOID:
            raise SaccadeError(
                f"{path} names no classes, one number twice, or one above {VOID}", path=path, hint="lines `NUMBER name`"
            )
        place, allowed = np.full(256, VOID, dtype=np.uint8), np.zeros(256, dtype=bool)
        for at, (value, _) in enumerate(named):
            place[value] = at
        allowed[: min(max(value for value, _ in named) + 2, VOID)] = True
        allowed[[*values, VOID]] = True
        return cls([name for _, name in named], place, allowed)

    @property
    def values(self) -> list[int]:
        """The value that stands for each class in a mask."""
        return [int(np.flatnonzero(self.place == at)[0]) for at in range(len(self.names))]


def _void(name: str) -> bool:
    return re.search(r"\(ignored?\)$|^(void|ignored?)$", name.lower()) is not None


@dataclass(frozen=True)
class Masked:
    """The pictures of one part that have a mask beside them; `failures` are those that have none, with the reason."""

    root: Path
    classes: Classes
    channels: int
    keys: list[str]  # of the pictures, below root
    masks: list[str]
    failures: list[tuple[str, str]]

    def __getitem__(self, row: int) -> tuple[Shaped[Tensor, "c h w"], UInt8[Tensor, "h w"]]:
        """A picture as it lies on disk, and the class of each of its pixels. Raises `Unreadable`."""
        key = self.keys[row]
        picture = decode(read(str(self.root / key), key), key=key, short_side=None, channels=self.channels)[0]
        return picture, self.target(row, (picture.shape[2], picture.shape[1]))

    def target(self, row: int, size: tuple[int, int] | None = None) -> UInt8[Tensor, "h w"]:
        """The class of each pixel, of a picture that is so wide and high where that is known. Raises `Unreadable`."""
        return self._mask(self.masks[row], size)

    def some(self, rows: list[int]) -> Masked:
        """Only these."""
        return replace(self, keys=[self.keys[row] for row in rows], masks=[self.masks[row] for row in rows])

    def _mask(self, key: str, size: tuple[int, int] | None) -> UInt8[Tensor, "h w"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a large one is refused by its size, before it is decoded
                with Image.open(self.root / key, formats=("PNG",)) as image:
                    if size is not None and image.size != size:
                        raise Unreadable(key, f"the mask is {_spoken(image.size)}, its picture {_spoken(size)}")
                    if image.mode not in ("L", "P", "1", "I", "I;16"):  # a palette only paints numbers, as in VOC's
                        kind = {"RGB": "colours", "RGBA": "colours"}.get(image.mode, image.mode)
                        raise Unreadable(key, f"the mask has {kind}, not class numbers: save them as 8-bit grey")
                    values = np.array(image).astype(np.int64)
        except Unreadable:
            raise
        except Exception as error:  # Pillow raises anything on hostile bytes
            raise Unreadable(key, f"the mask cannot be read: {' '.join(str(error).split())}") from None
        wrong = np.unique(values[(values > VOID) | ~self.classes.allowed[values & VOID]])
        if len(wrong):
            raise Unreadable(key, f"the mask has the value {wrong[0]}, which classes.txt does not name")
        return torch.from_numpy(self.classes.place[values])


def _spoken(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def read_masked(labelled: str | Path, channels: int = 3) -> dict[str, Masked]:
    """`train` and `test` of a folder, and `val` where it has both; `test` is val/ where there is no test/.

    Raises `SaccadeError` for a folder that is laid out otherwise.
    """
    root = Path(labelled).expanduser()
    layout = "use train/images/X.jpg, train/masks/X.png, the same in test/ (or val/), and classes.txt"
    if not root.is_dir():
        raise SaccadeError(f"{labelled} is no folder", path=str(labelled), hint=layout)
    there = {
        part: root / part for part in (*TRAIN, *TEST) if all((root / part / x).is_dir() for x in ("images", "masks"))
    }
    train = [path for part, path in there.items() if part in TRAIN]
    test = [path for part, path in there.items() if part in TEST]
    if not train or not test:
        raise SaccadeError(f"{labelled} has no masks to learn from and to be examined on", path=str(root), hint=layout)
    classes = Classes.read(root / "classes.txt")
    parts = {"train": train[0], "test": test[0]}
    if "val" in there and test[0].name != "val":
        parts["val"] = there["val"]
    found = {name: masked_part(root, path, classes, channels) for name, path in parts.items()}
    for name in ("train", "test"):
        if not found[name].keys:
            told = f": {found[name].failures[0][1]}" if found[name].failures else ""
            raise SaccadeError(f"{parts[name]} has no picture with a mask{told}", path=str(parts[name]), hint=layout)
    return found


def masked_part(root: Path, path: Path, classes: Classes, channels: int) -> Masked:
    """The pictures of `path`/images, named below `root`, that have a mask of the same name in `path`/masks."""
    pictures, masks = (list(scan(path / inner).keys) for inner in ("images", "masks"))
    known = {mask.removesuffix(".png"): mask for mask in masks if mask.endswith(".png")}
    keys, beside, failures = [], [], []
    within = "" if path == root else f"{path.relative_to(root).as_posix()}/"
    for picture in pictures:
        mask, key = known.get(picture.rpartition(".")[0]), f"{within}images/{picture}"
        if mask is None:
            failures.append((key, f"there is no mask {within}masks/{picture.rpartition('.')[0]}.png"))
        else:
            keys.append(key)
            beside.append(f"{within}masks/{mask}")
    return Masked(root, classes, channels, keys, beside, failures)

"""Pictures with a number for each pixel: PART/images/X.jpg and PART/targets/X.png (8 or 16 bits), .tif or .npy."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import TEST, TRAIN
from saccade.sources.files import read
from saccade.sources.folder import scan

FOLDER = "targets"
_KINDS = (".npy", ".png", ".tif", ".tiff")
_LAYOUT = "use train/images/X.jpg, train/targets/X.png (8 or 16 bits), .tif or .npy, and the same in test/ (or val/)"


@dataclass(frozen=True)
class Measured:
    """The pictures of one part that have numbers beside them; `failures` are those that have none, with the reason.

    Numbers are divided by `unit`; the number `unknown`, NaN and infinity say nothing, and are NaN here.
    """

    root: Path
    channels: int
    unit: float
    unknown: float | None
    keys: list[str]
    masks: list[str]
    failures: list[tuple[str, str]]

    def target(self, row: int, size: tuple[int, int] | None = None) -> Float[Tensor, "h w"]:
        """The number of each pixel, of a picture that is so wide and high where that is known. Raises `Unreadable`."""
        key = self.masks[row]
        data = read(str(self.root / key), key)
        try:
            values = _array(data, key)
        except Unreadable:
            raise
        except Exception as error:  # numpy and Pillow raise anything on hostile bytes
            raise Unreadable(key, f"the numbers cannot be read: {' '.join(str(error).split())}") from None
        if size is not None and values.shape != (size[1], size[0]):
            found = f"{values.shape[1]}x{values.shape[0]}" if values.ndim == 2 else f"of shape {values.shape}"
            raise Unreadable(key, f"the numbers are {found}, their picture {size[0]}x{size[1]}")
        numbers = values.astype(np.float64)
        known = np.isfinite(numbers) if self.unknown is None else np.isfinite(numbers) & (numbers != self.unknown)
        return torch.from_numpy(np.where(known, numbers / self.unit, np.nan).astype(np.float32))


def _array(data: bytes, key: str) -> np.ndarray:
    if key.endswith(".npy"):
        found = np.load(io.BytesIO(data), allow_pickle=False)
        found = found.squeeze()  # an axis of one channel says nothing
        if found.ndim != 2 or found.dtype.kind not in "iufb":
            raise Unreadable(key, f"the array has shape {found.shape} of {found.dtype}: save one number a pixel")
        return np.asarray(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a large one is refused by the size of its picture
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF")) as image:
            if image.mode not in ("L", "I", "I;16", "I;16B", "I;16L", "F"):
                raise Unreadable(key, f"the file has {image.mode}, not one number a pixel")
            return np.array(image)


def read_measured(
    data: str | Path, channels: int = 3, unit: float = 1.0, unknown: float | None = None
) -> dict[str, Measured]:
    """`train` and `test` of a folder; `test` is val/ where there is no test/. Raises `SaccadeError`."""
    root = Path(data).expanduser()
    if not root.is_dir():
        raise SaccadeError(f"{data} is no folder", path=str(data), hint=_LAYOUT)
    there = [part for part in (*TRAIN, *TEST) if all((root / part / inner).is_dir() for inner in ("images", FOLDER))]
    train, test = ([part for part in there if part in side] for side in (TRAIN, TEST))
    if not train or not test:
        raise SaccadeError(f"{data} has no numbers to learn from and to be examined on", path=str(root), hint=_LAYOUT)
    return {
        name: measured_part(root, root / part[0], channels, unit, unknown)
        for name, part in (("train", train), ("test", test))
    }


def measured_part(root: Path, path: Path, channels: int, unit: float, unknown: float | None) -> Measured:
    """The pictures of `path`/images, named below `root`, that have a file of the same name in `path`/targets."""
    known: dict[str, str] = {}
    for kind in reversed(_KINDS):  # where there are several the array stands
        known |= {file.name.removesuffix(kind): file.name for file in sorted((path / FOLDER).iterdir())
                  if file.name.endswith(kind)}  # fmt: skip
    within = "" if path == root else f"{path.relative_to(root).as_posix()}/"
    keys, beside, failures = [], [], []
    for picture in scan(path / "images").keys:
        stem = picture.rpartition(".")[0]
        if stem in known:
            keys.append(f"{within}images/{picture}")
            beside.append(f"{within}{FOLDER}/{known[stem]}")
        else:
            failures.append((f"{within}images/{picture}", f"there are no numbers {within}{FOLDER}/{stem}.png or .npy"))
    return Measured(root, channels, unit, unknown, keys, beside, failures)

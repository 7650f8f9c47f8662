"""Pictures of what is normal to learn from, and others to be examined, and masks of what is wrong where there are some.

train/good/…  test/good/…  test/scratch/X.png  ground_truth/scratch/X_mask.png     as MVTec AD has it
train/CLASS/… test/CLASS/… with --normal CLASS; test/masks/[CLASS/]X.png           any labelled folder
train/images/…  test/images/X.jpg  test/masks/X.png                                 a mask alone says what is wrong
CLASS/… and no train/: a part of the normal ones is set apart to be examined        or a list with `label`, `split`
"""

from __future__ import annotations

import warnings as python_warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from saccade.data import Source
from saccade.draws import hash64
from saccade.errors import SaccadeError, Unreadable, nearest
from saccade.evaluate.labelled import SHARE, TEST, TRAIN
from saccade.evaluate.splits import group_names, set_apart
from saccade.finetune.task import Aside, Examples
from saccade.sources import Files, open_source

NORMAL = ("good", "normal", "ok")
"""Names of classes that are normal without being said to be."""
_MASKS = ("masks", "ground_truth")


class Shown(NamedTuple):
    """What is known of a picture: its class, whether that is anomalous, and where a mask of it lies."""

    label: str
    anomalous: bool
    mask: str | None


@dataclass(frozen=True)
class _Place:
    part: str  # train, test, mask, unused, or any where there is no split
    label: str | None


def read_normal(
    data: str | Path | Source, *, normal: str | None, pictures: int, group_by: str | None, channels: int
) -> Examples:
    """Normal pictures in `train`, at most so many; `test` of both kinds; targets are `Shown`.

    What cannot take part is set aside with the reason. Raises `SaccadeError` where nothing normal is found, or it is
    not said which class is normal.
    """
    source = open_source(data, channels=channels)
    keys = [source.key(row) for row in range(len(source))]
    places = _places(source, keys)
    usual = _normal(places, normal, data)
    said, aside = list[str](), list[Aside]()
    groups = _groups(source, keys, group_by, said)
    masks = {key for key, place in zip(keys, places, strict=True) if place.part == "mask"}
    root = Path(source.root) if isinstance(source, Files) else None
    shown = [_shown(key, place, usual, masks, root, aside) for key, place in zip(keys, places, strict=True)]
    train, test = _parts(keys, places, shown, groups, aside, said)
    train = _at_most(train, keys, pictures, said)
    _check(train, test, shown, keys, groups, data, said)
    counts = Counter(shown[row].label for row in test.tolist())
    masked = sum(1 for row in test.tolist() if (one := shown[row]) and one.mask)
    split = {"train": len(train), "test": len(test), "of_test": dict(sorted(counts.items())), "with_masks": masked}
    facts = {"normal": usual if usual is not None else NORMAL[1]}
    none = np.zeros(0, dtype=np.int64)
    return Examples(source, keys, shown, train, none, test, facts, groups, split, said, aside)


def _places(source: Source, keys: Sequence[str]) -> list[_Place]:
    """Part and class of each picture, by its folders or by the columns of a list."""
    columns = source.columns if isinstance(source, Files) else {}
    if "label" in columns or not isinstance(source, Files):
        parts = [_part(name) for name in columns["split"]] if "split" in columns else ["any"] * len(keys)
        return [_Place(part, source.label(row)) for row, part in enumerate(parts)]
    tops = {key.split("/")[0] for key in keys if "/" in key}
    official = bool(tops & {*TRAIN})
    tests = ({"test", "testing"} & tops) or ({*TEST} & tops)
    return [_place(key.split("/"), official, tests) for key in keys]


def _place(path: list[str], official: bool, tests: set[str]) -> _Place:
    if is_mask("/".join(path)):
        return _Place("mask", None)
    if not official:
        return _Place("any", path[0] if len(path) > 1 else None)
    part = "train" if path[0] in TRAIN else "test" if path[0] in tests else "unused"
    return _Place(part, path[1] if len(path) > 2 and path[1] != "images" else None)


def is_mask(key: str) -> bool:
    """Whether a picture lies where masks do: in ground_truth/ or masks/, or in masks/ of a part."""
    path = key.split("/")
    return (len(path) > 1 and path[0] in _MASKS) or (len(path) > 2 and path[1] in _MASKS)


def _part(name: str) -> str:
    name = name.strip().lower()
    return "train" if name in TRAIN else "test" if name in TEST else "unused"


def _normal(places: Sequence[_Place], normal: str | None, data: Any) -> str | None:
    """The class that is normal; None where train has no classes. Raises `SaccadeError`."""
    learned = {place.label for place in places if place.part in ("train", "any")}
    names = sorted(name for name in learned if name is not None)
    if normal is not None:
        if normal not in names:
            raise SaccadeError(f"there is no class {normal!r} to learn from", path="--normal",
                               hint=nearest(normal, names) if names else "use folders train/CLASS/…")  # fmt: skip
        return normal
    usual = [name for name in names if name.lower() in NORMAL]
    if len(usual) == 1:
        return usual[0]
    split = any(place.part == "train" for place in places)
    if split and len(learned) == 1:
        return names[0] if names else None
    if not learned:
        raise SaccadeError(
            f"{data} has nothing to learn from", path=str(data), hint="put normal pictures in train/good"
        )
    hint = f"--normal NAME, of: {', '.join(names[:8])}" if names else "use folders train/good/… and test/…"
    raise SaccadeError(f"which class of {data} is normal is not said", path="--normal", hint=hint)


def _groups(source: Source, keys: Sequence[str], group_by: str | None, said: list[str]) -> list[str] | None:
    """Each picture's group; one that has none is alone."""
    columns = source.columns if isinstance(source, Files) else {}
    if group_by is None or group_by in columns:
        column = columns.get(group_by or "group")
        if column is None:
            return None
        found: list[str | None] = [name or None for name in column]
    else:
        found, _ = group_names(keys, group_by)
    alone = sum(name is None for name in found)
    if alone:
        said.append(f"{alone} pictures have no group and count as groups of their own")
    return [f"\0{key}" if name is None else name for key, name in zip(keys, found, strict=True)]


def _shown(
    key: str, place: _Place, usual: str | None, masks: set[str], root: Path | None, aside: list[Aside]
) -> Shown | None:
    """What is known of a picture, None where it takes no part."""
    if place.part == "mask":
        return None
    if place.part == "unused":
        aside.append(Aside(key, "neither in train nor in test"))
        return None
    mask = _mask_of(key, masks)
    path = None if mask is None or root is None else str(root / mask)
    if place.part == "train" and place.label != usual:
        aside.append(Aside(key, f"in train, and not of the normal class {usual!r}: only normal ones are learned from"))
        return None
    if (place.label == usual and usual is not None) or place.part == "train":
        return Shown(usual or NORMAL[1], False, None)
    if place.label is not None:
        same = usual is None and place.label.lower() in NORMAL
        return Shown(place.label, not same, None if same else path)
    if path is None:
        aside.append(Aside(key, "neither a class nor a mask says whether it is normal"))
        return None
    try:
        odd = bool(read_mask(path).any())
    except Unreadable as error:
        aside.append(Aside(key, error.reason))
        return None
    return Shown("anomalous" if odd else NORMAL[1], odd, path if odd else None)


def _mask_of(key: str, masks: set[str]) -> str | None:
    """The mask that belongs to a picture, by its name."""
    path = PurePosixPath(key)
    inner, stem = path.parts[1:-1], path.stem
    rest = [part for part in inner if part != "images"]
    likely = [
        PurePosixPath("ground_truth", *rest, f"{stem}_mask.png"),
        PurePosixPath("ground_truth", *rest, f"{stem}.png"),
        PurePosixPath(path.parts[0], "masks", *rest, f"{stem}.png"),
        PurePosixPath(path.parts[0], "masks", f"{stem}.png"),
        PurePosixPath("masks", *path.parts[:-1], f"{stem}.png"),
    ]
    return next((name for one in likely if (name := str(one)) in masks), None)


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> Bool[Tensor, "h w"]:
    """Which pixels are anomalous: those that are not 0. `size`: height and width that it must have.

    Raises `Unreadable` for another size, and for what is no PNG.
    """
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG",)) as image:
                if size is not None and (image.height, image.width) != size:
                    raise Unreadable(
                        str(path), f"the mask is {image.width}x{image.height}, its picture {size[1]}x{size[0]}"
                    )
                values = np.array(image.convert("RGB") if image.mode == "RGBA" else image)
    except Unreadable:
        raise
    except Exception as error:  # Pillow raises anything on hostile bytes
        raise Unreadable(str(path), f"the mask cannot be read: {' '.join(str(error).split())}") from None
    return torch.from_numpy(values.any(axis=2) if values.ndim == 3 else values != 0)


def _parts(
    keys: Sequence[str], places: Sequence[_Place], shown: Sequence[Shown | None], groups: list[str] | None,
    aside: list[Aside], said: list[str],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rows of train and of test; no group is in both."""
    rows = [row for row, one in enumerate(shown) if one is not None]
    names = keys if groups is None else groups
    part = {row: places[row].part for row in rows}
    if rows and all(part[row] == "any" for row in rows):
        usual = [row for row in rows if not _odd(shown[row])]
        apart = {row for row, out in zip(usual, set_apart([names[row] for row in usual], SHARE, "test"), strict=True)
                 if out} if len({names[row] for row in usual}) > 1 else set[int]()  # fmt: skip
        part = {row: "test" if row in apart or _odd(shown[row]) else "train" for row in rows}
        learned = {names[row] for row in usual if row not in apart}
        lost = [row for row in rows if part[row] == "test" and groups is not None and names[row] in learned]
        reason = "its group is learned from, and no group is split"
        said.append(f"{len(apart)} of {len(usual)} normal pictures were set apart to be examined")
    else:
        examined = {names[row] for row in rows if part[row] == "test"}
        lost = [row for row in rows if part[row] == "train" and groups is not None and names[row] in examined]
        reason = "its group is in test, and no group is split"
    aside += [Aside(keys[row], reason) for row in lost]
    if lost:
        said.append(f"{len(lost)} pictures take no part: {reason}")
    kept = [row for row in rows if row not in set(lost)]
    return tuple(np.array([row for row in kept if part[row] == name], dtype=np.int64) for name in ("train", "test"))  # type: ignore[return-value]


def _odd(one: Shown | None) -> bool:
    return one is not None and one.anomalous


def _at_most(train: np.ndarray, keys: Sequence[str], count: int, said: list[str]) -> np.ndarray:
    if len(train) <= count:
        return train
    said.append(f"{count} of {len(train)} normal pictures are learned from, chosen by their names: --pictures")
    order = sorted(train.tolist(), key=lambda row: (hash64(f"normal\0{keys[row]}"), keys[row]))
    return np.array(sorted(order[:count]), dtype=np.int64)


def _check(
    train: np.ndarray, test: np.ndarray, shown: Sequence[Shown | None], keys: Sequence[str], groups: list[str] | None,
    data: Any, said: list[str],
) -> None:  # fmt: skip
    """Raises `SaccadeError` where there is too little to learn from; says what cannot be measured."""
    names = {(keys if groups is None else groups)[row] for row in train.tolist()}
    if len(names) < 2:
        what = "picture" if groups is None else "group"
        raise SaccadeError(
            f"{data} has {len(names)} normal {what} to learn from", path=str(data),
            hint="a threshold is set by normal pictures held out: two or more, better hundreds",
        )  # fmt: skip
    kinds = {_odd(shown[row]) for row in test.tolist()}
    if len(kinds) < 2:
        have = "nothing" if not kinds else "anomalous pictures only" if True in kinds else "normal pictures only"
        said.append(f"test has {have}: AUROC and average precision are not defined")

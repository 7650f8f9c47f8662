"""Labelled pictures: which class, which group, learned from or examined."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saccade.data import Source
from saccade.errors import SaccadeError, nearest
from saccade.evaluate.splits import group_names, set_apart
from saccade.sources import Files, Rows, Shards, open_source

TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
SHARE = 0.2
"""What is set apart: for the examination where there is no official split, and of train to choose a penalty on."""


@dataclass(frozen=True)
class Labelled:
    """Samples of a source with class and group; `train` and `test` are rows of the source."""

    source: Source
    keys: list[str]
    classes: list[str]
    labels: np.ndarray  # int64 [n]; -1 for rows that are in neither part
    groups: list[str] | None
    train: np.ndarray
    test: np.ndarray
    split: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def names(self, rows: np.ndarray) -> list[str]:
        """What must not be split, for each row: its group, or its own key."""
        named = self.keys if self.groups is None else self.groups
        return [named[row] for row in rows.tolist()]


def read_labelled(
    labelled: str | Path | Source, group_by: str | None, short_side: int | None, channels: int
) -> Labelled:
    """The labelled samples and their split.

    A folder with train/ and test/ (or val/), or with train.tar and test.tar (or .parquet), or a list with a column
    `split`, has an official split; it is kept, unless `group_by` names groups that it tears: then both parts are pooled
    and split by group. One level of folders, or a list without that column, is split 80/20 by hash.
    Raises `SaccadeError` for unlabelled data.
    """
    source = open_source(labelled, short_side=short_side, channels=channels)
    keys = [source.key(row) for row in range(len(source))]
    parts, classes_of = _parts_and_classes(source, keys, labelled)
    groups, warnings = groups_of(source, keys, group_by)
    official = any(part is not None for part in parts)
    if official and (group_by is None or not _torn(groups, parts)):
        train, test, split = _official(parts, warnings)
        _tell_torn_groups(groups, train, test, warnings)
    else:
        used = np.arange(len(keys))
        names = keys if groups is None else groups
        apart = set_apart([names[row] for row in used], SHARE, "test")
        train, test = used[~apart], used[apart]
        split = {"made": "by hash of the group" if groups is not None else "by hash of the key"}
        if official:
            split["made"] += "; the folders' own split was pooled, because it tears groups"
        if groups is None:
            warnings.append(
                "split 80/20 by key: where pictures come in groups (patients, scenes), name them with --group-by"
            )
    classes = sorted({name for row in (*train, *test) if (name := classes_of[row]) is not None})
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([-1 if name is None else number.get(name, -1) for name in classes_of], dtype=np.int64)
    train, test = train[labels[train] >= 0], test[labels[test] >= 0]
    _check(classes, labels, train, test, labelled, warnings)
    split |= {"train": len(train), "test": len(test), "classes": len(classes)}
    if groups is not None:
        counts = (len({groups[row] for row in rows.tolist()}) for rows in (train, test))
        split |= dict(zip(("train_groups", "test_groups"), counts, strict=True))
    return Labelled(source, keys, classes, labels, groups, train, test, split, warnings)


def read_examined(labelled: str | Path | Source, short_side: int | None, channels: int) -> Labelled:
    """The samples of the test side, or all where there is none, for what learns from no label: `train` is empty.

    Classes are those of both sides. A folder may have its test side alone. Raises `SaccadeError` for unlabelled data.
    """
    place = labelled if isinstance(labelled, Source) else Path(labelled).expanduser()
    made = ""
    if isinstance(place, Path) and not any((place / name).is_dir() for name in TRAIN):
        side = next((name for name in TEST if (place / name).is_dir()), None)
        place, made = (place, "") if side is None else (place / side, f"as given: {side}")
    source = open_source(place, short_side=short_side, channels=channels)
    keys = [source.key(row) for row in range(len(source))]
    parts, classes_of = _parts_and_classes(source, keys, labelled)
    official = any(part is not None for part in parts)
    classes = sorted({name for name, part in zip(classes_of, parts, strict=True) if name and part != "unused"})
    number: dict[str | None, int] = {name: place for place, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in classes_of], dtype=np.int64)
    examined = np.array([not official or part == "test" for part in parts]) & (labels >= 0)
    test, warnings = np.flatnonzero(examined), list[str]()
    _check(classes, labels, None, test, labelled, warnings)
    made = made or ("as given: test" if official else "all: there is no split, and nothing is learned")
    none = np.zeros(0, dtype=np.int64)
    return Labelled(source, keys, classes, labels, None, none, test, {"made": made}, warnings)


def in_test(name: str) -> bool:
    """Whether a column `split` says so."""
    return part_of(name) == "test"


def _parts_and_classes(source: Source, keys: list[str], labelled: Any) -> tuple[list[str | None], list[str | None]]:
    """For each sample: train, test or None (no official split); and the name of its class."""
    columns = source.columns if isinstance(source, Files) else {}
    tops = {key.split("/")[0] for key in keys}
    if "label" in columns or not isinstance(source, Files):
        classes = [source.label(row) for row in range(len(source))]
        if not any(classes):
            hint = "give the list a column `label`" if columns else "use folders train/CLASS/… and test/CLASS/…"
            raise SaccadeError(f"{labelled} has no labels", path=str(labelled), hint=hint)
        parts: list[str | None] = [None] * len(keys)
        if isinstance(source, Shards | Rows):
            parts = _parts_of_shards(keys) if isinstance(source, Shards) else _parts_of_rows(source)
        if (named := column_of(source, "split")) is not None:
            parts = [part_of(name) for name in named]
            if "train" not in parts or "test" not in parts:
                raise SaccadeError("the column `split` needs rows of train and of test (or val)", path=str(labelled))
        return parts, classes
    if tops & {*TRAIN} and tops & {*TEST}:
        split = [key.split("/") for key in keys]
        # a validation folder beside a test folder takes no part: it is neither learned from nor examined here
        tests = {"test", "testing"} & tops or tops & {*TEST}
        parts = [
            None if len(path) < 3 else "train" if path[0] in TRAIN else "test" if path[0] in tests else "unused"
            for path in split
        ]
        return parts, [path[1] if part in ("train", "test") else None for path, part in zip(split, parts, strict=True)]
    if tops & {*TRAIN, *TEST} and all("/" in key for key in keys) and any(key.count("/") > 1 for key in keys):
        have = sorted(tops)
        raise SaccadeError(
            f"{labelled} has only {', '.join(have[:3])}",
            path=str(labelled),
            hint="train/ and test/ (or val/) belong together",
        )
    return [None] * len(keys), [key.split("/")[0] if "/" in key else None for key in keys]


def _parts_of_shards(keys: list[str]) -> list[str | None]:
    """By the tar's name (train.tar, test-0003.tar), else by the member's first folder, where both parts are there."""
    for place in (0, 1):
        firsts = [key.split("/")[place] for key in keys]
        found: list[str | None] = [part_of(re.split(r"[-_.]", first)[0] if place == 0 else first) for first in firsts]
        if "train" in found and "test" in found:
            return found
    return [None] * len(keys)


def _parts_of_rows(source: Rows) -> list[str | None]:
    """By the words of a file's name (data/train-00000-of-00002.parquet), where both parts are there."""
    words = [set(re.split(r"[-_./]", file.lower())) for file in source.files]
    tests = {"test", "testing"} if any(some & {"test", "testing"} for some in words) else {*TEST}
    parts = ["train" if some & {*TRAIN} else "test" if some & tests else "unused" for some in words]
    if not {"train", "test"} <= {*parts}:
        return [None] * len(source)
    counts = np.diff([*source.starts, len(source)])
    return [part for part, count in zip(parts, counts, strict=True) for _ in range(count)]


def column_of(source: Source, name: str) -> list[str] | None:
    """The cells of a list's or a Parquet file's column; None where there is no such."""
    if isinstance(source, Files):
        return list(source.columns[name]) if name in source.columns else None
    return source.column(name) if isinstance(source, Rows) else None


def part_of(name: str) -> str:
    """Which side a folder or a cell of the column `split` means: train, test or unused."""
    name = name.strip().lower()
    return "train" if name in TRAIN else "test" if name in TEST else "unused"


def groups_of(source: Source, keys: list[str], group_by: str | None) -> tuple[list[str] | None, list[str]]:
    """Each sample's group: by pattern, or as the source has it; a sample without one is a group of its own."""
    warnings: list[str] = []
    if group_by is not None:
        cells = column_of(source, group_by)
        found: list[str | None] = group_names(keys, group_by)[0] if cells is None else [cell or None for cell in cells]
    elif isinstance(source, Files) and "group" not in source.columns:
        return None, warnings
    else:
        found = [source.group(row) for row in range(len(source))]
        if not any(found):
            return None, warnings
    alone = [key for key, name in zip(keys, found, strict=True) if name is None]
    if alone:
        warnings.append(f"{len(alone)} samples have no group and count as groups of their own, first {alone[0]!r}")
    return [f"\0{key}" if name is None else name for key, name in zip(keys, found, strict=True)], warnings


def _official(parts: Sequence[str | None], warnings: list[str]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    named = np.array([part or "unused" for part in parts])
    unused = int((named == "unused").sum())
    if unused:
        warnings.append(f"{unused} samples are neither in train nor in test and take no part")
    return np.flatnonzero(named == "train"), np.flatnonzero(named == "test"), {"made": "as given: train and test"}


def _torn(groups: list[str] | None, parts: Sequence[str | None]) -> bool:
    """Whether a group is on both sides of a split."""
    sides = {
        side: {group for group, part in zip(groups or [], parts, strict=False) if part == side}
        for side in ("train", "test")
    }
    return bool(sides["train"] & sides["test"])


def _tell_torn_groups(groups: list[str] | None, train: np.ndarray, test: np.ndarray, warnings: list[str]) -> None:
    if groups is None:
        return
    torn = {groups[row] for row in train.tolist()} & {groups[row] for row in test.tolist()}
    if torn:
        warnings.append(
            f"{len(torn)} groups are on both sides of the given split: numbers are too good; use --group-by"
        )


def _check(
    classes: list[str],
    labels: np.ndarray,
    train: np.ndarray | None,
    test: np.ndarray,
    labelled: Any,
    warnings: list[str],
) -> None:
    """Raises `SaccadeError` when there is nothing to tell apart; warns of classes that one side lacks."""
    if len(classes) < 2:
        have = f"only the class {classes[0]!r}" if classes else "no classes"
        raise SaccadeError(
            f"{labelled} has {have}", path=str(labelled), hint="use folders train/CLASS/… and test/CLASS/…"
        )
    for rows, where in ((train, "train"), (test, "test")):
        if rows is None:
            continue
        counts = Counter(labels[rows].tolist())
        if not counts:
            raise SaccadeError(f"there is nothing in {where} of {labelled}", path=str(labelled))
        absent = [name for number, name in enumerate(classes) if not counts[number]]
        if absent:
            close = f"; {absent[0]!r}: {nearest(absent[0], set(classes) - set(absent))}" if len(absent) == 1 else ""
            warnings.append(f"{where} has no sample of {', '.join(map(repr, absent[:5]))}{close}")

"""Labels of a source for a head of classes: one a picture or several, each odd one named, few of them if asked."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saccade.data import Source
from saccade.draws import Permutation
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, nearest
from saccade.evaluate.labelled import SHARE, read_labelled
from saccade.evaluate.splits import few, set_apart
from saccade.finetune.task import Aside, Examples
from saccade.sources import Files, open_source

Names = tuple[str, ...]
"""The classes of a picture; none is an answer too where there may be several."""


@dataclass(frozen=True)
class Given:
    """What a source says of its pictures: the classes of each (None: no label), and whether there may be several."""

    names: list[Names | None]
    several: bool


def opened(data: str | Path | Source, encoder: Encoder, column: str) -> Source:
    """The source, its labels those of a `column`. Raises `SaccadeError` where a list has no such column."""
    source = open_source(data, short_side=encoder.preprocess.canvas, channels=encoder.preprocess.channels)
    if column == "label":
        return source
    if not isinstance(source, Files) or column not in source.columns:
        have = list(source.columns) if isinstance(source, Files) else []
        hint = nearest(column, have) if have else "a list (.csv, .tsv, .jsonl) has columns"
        raise SaccadeError(f"{data} has no column {column!r}", path="--label", hint=hint)
    return dataclasses.replace(source, columns={**source.columns, "label": source.columns[column]})


def given(source: Source, separator: str | None, column: str = "label") -> Given:
    """Labels as a source says them; several where they are JSON lists, or a `separator` stands between them."""
    if column != "label":
        if not isinstance(source, Files) or column not in source.columns:
            return Given([None] * len(source), separator is not None)
        source = dataclasses.replace(source, columns={**source.columns, "label": source.columns[column]})
    said = [source.label(row) for row in range(len(source))]
    listed = isinstance(source, Files) and "label" in source.columns
    several = separator is not None or (listed and any(text and text.startswith("[") for text in said))
    return Given([None if text is None else _names(text, separator, several) for text in said], several)


def _names(text: str, separator: str | None, several: bool) -> Names:
    if not several:
        return (text,)
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = [text]
        return tuple(dict.fromkeys(str(name) for name in found))
    parts = [text] if separator is None else text.split(separator)
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def examples(
    data: str | Path | Source,
    encoder: Encoder,
    *,
    column: str = "label",
    separator: str | None = None,
    group_by: str | None = None,
    count: int | None = None,
    seed: int = 0,
    strangers: bool = False,
) -> Examples:
    """Rows by their parts, targets as numbers of classes; `count` labels a class are learned from, all if None.

    `strangers`: what tells pictures apart need not have learned of their classes, so those of test alone are kept.

    A class that train has not is unknown: its test pictures are set aside and named. So is a path that comes again.
    Raises `SaccadeError` where there is nothing to tell apart.
    """
    place = data if column == "label" else opened(data, encoder, column)
    found = read_labelled(place, group_by, encoder.preprocess.canvas, encoder.preprocess.channels)
    source = found.source
    labels = given(source, separator)
    warnings, aside = list(found.warnings), list[Aside]()
    taken = once(found.keys, labels.names, aside)
    train, test = (np.array([row for row in part.tolist() if taken[row]], dtype=np.int64) for part in
                   (found.train, found.test))  # fmt: skip
    _left_out(found.keys, labels.names, {*found.train.tolist(), *found.test.tolist()}, aside)
    if count is not None:
        train = train[_few([labels.names[row] for row in train.tolist()], [found.keys[r] for r in train], count, seed)]
    classes = sorted({name for row in train.tolist() for name in labels.names[row] or ()})
    if len(classes) < (1 if labels.several else 2):
        raise SaccadeError(f"train has only the class {classes[0]!r}" if classes else "train has no classes",
                           path=str(data), hint="two classes or more can be told apart")  # fmt: skip
    if strangers:
        classes = sorted({*classes, *(name for row in test.tolist() for name in labels.names[row] or ())})
    test = _known(test, labels, classes, found.keys, aside, warnings)
    number = {name: place for place, name in enumerate(classes)}
    targets = [target(names, number, labels.several) for names in labels.names]
    named = found.keys if found.groups is None else found.groups
    apart = set_apart([named[row] for row in train.tolist()], SHARE, "hold-out")
    counts = Counter(name for row in train.tolist() for name in labels.names[row] or ())
    facts = {
        "classes": classes,
        "several": labels.several,
        "label": column,
        "separator": separator,
        "counts": {name: counts[name] for name in classes},
    }
    _uneven(counts, warnings)
    split = {**found.split, "train": int((~apart).sum()), "held": int(apart.sum()), "test": len(test),
             "classes": len(classes)}  # fmt: skip
    return Examples(
        source, found.keys, targets, train[~apart], train[apart], test, facts, found.groups, split, warnings, aside
    )


def once(keys: Sequence[str], names: Sequence[Any], aside: list[Aside]) -> list[bool]:
    """Which rows are the first of their path; the others are set aside."""
    first: dict[str, int] = {}
    taken = []
    for row, key in enumerate(keys):
        before = first.setdefault(key, row)
        taken.append(before == row)
        if before != row:
            other = " with another label" if names[before] != names[row] else ""
            aside.append(Aside(key, f"its path comes again{other}; the first row counts"))
    return taken


def _left_out(keys: Sequence[str], names: Sequence[Names | None], used: set[int], aside: list[Aside]) -> None:
    for row, key in enumerate(keys):
        if row not in used:
            aside.append(Aside(key, "no label" if names[row] is None else "neither in train nor in test"))


def _known(
    test: np.ndarray, labels: Given, classes: list[str], keys: Sequence[str], aside: list[Aside], warnings: list[str]
) -> np.ndarray:
    """The test rows that can be examined: a class that was never learned cannot be found."""
    known, unknown, good = set(classes), Counter[str](), list[int]()
    for row in test.tolist():
        strange = [name for name in labels.names[row] or () if name not in known]
        unknown.update(strange)
        if strange and not labels.several:
            aside.append(Aside(keys[row], f"class {strange[0]!r} is not in train"))
        else:
            good.append(row)
    if unknown:
        told = ", ".join(f"{name!r} ({times})" for name, times in unknown.most_common(5))
        what = "they count as wrong for no class" if labels.several else "these pictures are set aside"
        warnings.append(f"test has classes that train has not: {told}; {what}")
    if not good:
        raise SaccadeError("test has no picture of a class that train has", hint="look at the names of the classes")
    return np.array(good, dtype=np.int64)


def target(names: Names | None, number: dict[str, int], several: bool) -> Any:
    """What is learned of a picture: the number of its class, or of each that is known; None without a label."""
    if names is None:
        return None
    if several:
        return tuple(number[name] for name in names if name in number)
    return number.get(names[0])


def _few(names: Sequence[Names | None], keys: Sequence[str], count: int, seed: int) -> np.ndarray:
    """So many of each class, as `evaluate` draws few labels; of several labels so many a class on the whole."""
    if any(len(one or ()) != 1 for one in names):
        classes = {name for one in names for name in one or ()}
        order = Permutation(len(names), "few-label", seed)
        return np.sort(np.array([order(n) for n in range(min(len(names), count * len(classes)))], dtype=np.int64))
    numbers = {name: place for place, name in enumerate(sorted({one[0] for one in names if one}))}
    return np.sort(few(np.array([numbers[one[0]] for one in names if one]), keys, count, 0, seed))


def _uneven(counts: Counter[str], warnings: list[str]) -> None:
    (often, most), (seldom, least) = counts.most_common()[0], counts.most_common()[-1]
    if most > 10 * least:
        warnings.append(
            f"{often!r} has {most} pictures to learn from and {seldom!r} {least}: --balance counts classes alike"
        )


def known(source: Source, facts: Mapping[str, Any]) -> tuple[list[Any], Counter[str]]:
    """Targets of a source as far as it says them, and how often each class came that was never learned.

    Names that are all unknown are no labels: a folder is called after anything.
    """
    said = given(source, facts["separator"], facts["label"]).names
    number, several = {name: place for place, name in enumerate(facts["classes"])}, bool(facts["several"])
    strange = Counter(name for names in said for name in names or () if name not in number)
    targets = [target(names, number, several) for names in said]
    if not any(name in number for names in said for name in names or ()):
        return [None] * len(said), Counter()
    return targets, strange

"""Which pictures to label next: those that stand for most of the others, and later those a classifier is in doubt of.

One rule for any number of labels (arXiv 2407.12212, 2412.20644): greedy coverage of the frozen features by what is
labelled and what is proposed. Where there are labels of two classes, a linear head learned from them says how much each
picture weighs that is to be covered: more where it is in doubt, and where it thinks of a class that has few labels.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saccade import coverage
from saccade.data import Source
from saccade.embed import embed, encoder_of, examining, pooled, read_pictures, there
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import groups_of
from saccade.evaluate.linear import Standard, fit
from saccade.labels import Labels, read_labels
from saccade.report.proposed import write_proposed
from saccade.search import QUARANTINE
from saccade.sources import open_source

FORMATS = (".csv", ".jsonl")
_STRENGTH = 0.03  # the penalty of the few-label task
_NAMED = 20  # of what is odd


@dataclass(frozen=True)
class Known:
    """Rows that are labelled, and their classes; None where only that is known."""

    rows: list[int]
    classes: Sequence[str | None]


@dataclass(frozen=True)
class Proposal:
    """Rows in the order of their use, what each of them says of the head's doubt, and what was passed over."""

    rows: list[int]
    stands_for: list[int]
    between: list[tuple[tuple[str, float], tuple[str, float]] | None]
    duplicates: int


def propose(
    vectors: Float[Tensor, "n d"],
    known: Known,
    count: int,
    *,
    free: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Proposal:
    """Up to `count` of the `free` rows (all that are not known, if not given) to label next.

    `groups` has a name for each row: each group gives as many as any other, as far as it can. Memory grows with the
    number of rows, not with its square.
    """
    unit = coverage.centred(vectors)
    open_rows = torch.ones(len(unit), dtype=torch.bool)
    if free is not None:
        open_rows[:] = False
        open_rows[torch.tensor(free, dtype=torch.long)] = True
    doubt = _Doubt.of(vectors, known)
    chosen = coverage.choose(
        unit,
        known.rows,
        count,
        free=open_rows,
        weight=None if doubt is None else doubt.weight,
        groups=groups,
        seed=seed,
    )
    between = [None if doubt is None else doubt.between(row) for row in chosen.rows]
    return Proposal(chosen.rows, coverage.stand_for(unit, chosen.rows, known.rows), between, chosen.duplicates)


@dataclass(frozen=True)
class _Doubt:
    """What a head learned from the labels thinks of every row."""

    names: list[str]
    probabilities: Float[Tensor, "n k"]
    weight: Float[Tensor, " n"]

    @classmethod
    def of(cls, vectors: Tensor, known: Known) -> _Doubt | None:
        """None where labels of two classes are not known."""
        told = [(row, name) for row, name in zip(known.rows, known.classes, strict=True) if name is not None]
        names = sorted({name for _, name in told})
        if len(names) < 2:
            return None
        standard, rows = Standard.of(vectors), torch.tensor([row for row, _ in told])
        labels = torch.tensor([names.index(name) for _, name in told])
        head = fit(standard(vectors[rows]), labels, len(names), _STRENGTH * vectors.shape[1] / len(rows))
        parts = [(standard(part) @ head.weight + head.bias).softmax(dim=1) for part in vectors.split(8192)]
        probabilities = torch.cat(parts)
        best = probabilities.topk(2, dim=1).values
        have = torch.bincount(labels, minlength=len(names)).float()
        rare = probabilities @ (have.mean() / (have + 1))  # classes with few labels count for more
        return cls(names, probabilities, (1 - (best[:, 0] - best[:, 1])) * rare)

    def between(self, row: int) -> tuple[tuple[str, float], tuple[str, float]]:
        """The two likeliest classes of a row."""
        best = self.probabilities[row].topk(2)
        (one, other), (much, less) = best.indices.tolist(), best.values.tolist()
        return (self.names[one], much), (self.names[other], less)


def label_next(
    backbone: str | Path | Encoder,
    data: str | Path | Source,
    *,
    n: int = 50,
    labels: str | Path | None = None,
    out: str | Path | None = None,
    index: str | Path | None = None,
    group_by: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    patch: int | None = None,
    workers: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Proposes `n` pictures of `data` whose labels would help most; the keys are those of `saccade label-next --json`.

    `labels`: what is labelled already, a list (key or path, and label; a row with an empty label is not) or a folder
    with a folder for each class, whose pictures need not be those of `data`. `out`: a list to fill in (.csv or .jsonl),
    and beside it a page that shows the pictures. `index`: a directory that keeps the vectors for the next round.
    `group_by`: a pattern over keys, or a column, that names groups to spread over. Raises `SaccadeError`.
    """
    started = time.perf_counter()
    _check(n, out, labels)
    there(data)
    encoder = encoder_of(backbone, image_size=image_size, channels=channels, patch=patch)
    source = open_source(data, short_side=encoder.preprocess.canvas, channels=encoder.preprocess.channels)
    keys = [source.key(row) for row in range(len(source))]
    groups, warnings = (None, []) if group_by is None else groups_of(source, keys, group_by)
    root = None if isinstance(data, Source) else Path(data).expanduser()
    told = Labels() if labels is None else read_labels(labels, source, keys, root)
    with _kept(index) as place:
        pool = _embedded(encoder, source, place, told, workers)
    warnings += _odd(told, pool)
    known, left = _divided(told, pool, len(keys), labels or data)
    named = None if groups is None else [groups[row] if row < len(keys) else "" for row in pool.rows]
    proposal = propose(pool.vectors, known, n, free=left, groups=named, seed=seed)
    if not proposal.rows:
        said = f"the {len(left)} pictures left are near duplicates of labelled ones"
        raise SaccadeError(said, hint="add other pictures to the data")
    rows = [pool.rows[number] for number in proposal.rows]
    proposed = [
        _line(rank, proposal, keys[row], None if groups is None else groups[row]) for rank, row in enumerate(rows)
    ]
    if len(rows) < n:
        warnings.append(f"{n} were asked for; {len(left)} are left, and {len(rows)} of them are no near duplicates")
    result = {
        "asked": n,
        "proposed": proposed,
        "by": "coverage" if proposal.between[0] is None else "coverage and doubt",
        **_counted(known, told, pool, len(keys), len(left), proposal.duplicates),
        "warnings": warnings,
    }
    if groups is not None:
        result["groups"] = {"all": len(set(groups)), "proposed": len({groups[row] for row in rows})}
    if out is not None:
        result |= _written(Path(out).expanduser(), proposed, source, rows)
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def _check(n: int, out: str | Path | None, labels: str | Path | None) -> None:
    """What can be said before anything is computed."""
    if n < 1:
        raise SaccadeError(f"{n} pictures cannot be proposed", path="-n", hint="1 or more")
    if labels is not None and not Path(labels).expanduser().exists():
        hint = "a folder with a folder for each class, or a list (.csv, .jsonl) with the columns key and label"
        raise SaccadeError(f"there is no {labels}", path="--labels", hint=hint)
    if out is None:
        return
    path = Path(out).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise SaccadeError(f"{out} is no list", path="--out", hint="name it .csv or .jsonl")
    for place in (path, path.with_suffix(".html")):
        if place.exists():
            raise SaccadeError(f"{place} exists", path="--out", hint="name a new file: it may hold labels by now")


@contextlib.contextmanager
def _kept(index: str | Path | None) -> Iterator[Path]:
    """Where vectors lie: in the index that was named, or for as long as they are needed."""
    if index is not None:
        yield Path(index).expanduser()
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / "index"


@dataclass(frozen=True)
class _Pool:
    """Vectors of what could be read; rows from the number of the data on are labelled pictures beside the data."""

    vectors: Float[Tensor, "n d"]
    rows: list[int]
    failures: list[tuple[int, str, str]]


def _embedded(encoder: Encoder, source: Source, place: Path, told: Labels, workers: int) -> _Pool:
    """The data by way of an index, then the labelled pictures that are no part of them."""
    token: Literal["cls", "mean"] = "cls" if encoder.backbone.config.pooling == "cls" else "mean"
    index = embed(encoder, source, out=place, tokens=(token,), workers=workers)
    lines = (place / QUARANTINE).read_text(encoding="utf-8").splitlines()
    bad = [(line["row"], line["key"], line["reason"]) for line in map(json.loads, lines)]
    failed = {row for row, _, _ in bad}
    rows = [row for row in range(len(source)) if row not in failed]
    parts = [torch.from_numpy(np.asarray(index.vectors(token)[rows]))]
    if told.outside is not None and told.beside:
        with examining(encoder) as look:
            for read in read_pictures(
                told.outside, [encoder.preprocess], rows=sorted(told.beside), batch=64, workers=workers, words="labels"
            ):
                bad += [(len(source) + row, key, reason) for row, key, reason in read.failures]
                rows += [len(source) + row for row in read.rows]
                if read.rows:
                    features = look(read.views[0], tokens="cls" if token == "cls" else "patches")
                    parts.append(pooled(features, token).float().cpu())
    return _Pool(torch.cat(parts), rows, bad)


def _divided(told: Labels, pool: _Pool, count: int, asked: Any) -> tuple[Known, list[int]]:
    """What of the pool is labelled, and the numbers of what is not. Raises `SaccadeError` where nothing is left."""
    classes = {**told.inside, **{count + row: name for row, name in told.beside.items()}}
    have = [(number, classes[row]) for number, row in enumerate(pool.rows) if row in classes]
    left = [number for number, row in enumerate(pool.rows) if row not in classes]
    if not left:
        raise SaccadeError("every picture that can be read is labelled", path=str(asked), hint="there is no next one")
    return Known([number for number, _ in have], [name for _, name in have]), left


def _odd(told: Labels, pool: _Pool) -> list[str]:
    """What is wrong with the labels, in words."""
    said = []
    if told.unknown:
        said.append(f"{len(told.unknown)} labels are of pictures that the data do not have, first {told.unknown[0]!r}")
    if told.conflicts:
        said.append(f"{len(told.conflicts)} pictures have two labels, and the last counts, first {told.conflicts[0]!r}")
    failed = [key for row, key, _ in pool.failures if row in told.inside]
    if failed:
        said.append(f"{len(failed)} labels are of pictures that cannot be read, first {failed[0]!r}")
    classes = {name for name in (*told.inside.values(), *told.beside.values()) if name is not None}
    if (told.inside or told.beside) and len(classes) < 2:
        have = f"only the class {min(classes)!r} is labelled" if classes else "labels have no classes"
        said.append(f"{have}: proposed by coverage alone")
    return said


def _line(rank: int, proposal: Proposal, key: str, group: str | None) -> dict[str, Any]:
    """One proposal, with its reason in words."""
    stands, between = proposal.stands_for[rank], proposal.between[rank]
    reason = f"stands for {stands} picture{'s' * (stands != 1)}"
    line: dict[str, Any] = {"rank": rank + 1, "key": key, "reason": reason, "stands_for": stands}
    if between is not None:
        (one, much), (other, less) = between
        line["between"] = {one: round(much, 3), other: round(less, 3)}
        if less > much / 2:
            line["reason"] = f"between {one} and {other}; {reason}"
        else:
            line["reason"] = f"probably {one}; {reason}"
    if group is not None:
        line["group"] = group.removeprefix("\0")
    return line


def _counted(known: Known, told: Labels, pool: _Pool, count: int, left: int, duplicates: int) -> dict[str, Any]:
    """How much there is of everything, and what is odd by name."""
    of_data = [(key, reason) for row, key, reason in pool.failures if row < count]
    return {
        "labelled": {
            "pictures": len(known.rows),
            "classes": dict(sorted(Counter(name for name in known.classes if name is not None).items())),
            "waiting": told.empty,
        },
        "left": left,
        "near_duplicates": duplicates,
        "unknown": {"count": len(told.unknown), "first": told.unknown[:_NAMED]},
        "quarantined": len(of_data),
        "unreadable": [{"key": key, "reason": reason} for key, reason in of_data[:_NAMED]],
    }


def _written(out: Path, proposed: Sequence[Mapping[str, Any]], source: Source, rows: Sequence[int]) -> dict[str, str]:
    """The list, with an empty label to fill in, and the page beside it."""
    text = io.StringIO()
    if out.suffix.lower() == ".csv":
        columns = ["rank", "key", "label", "reason", *(["group"] if "group" in proposed[0] else [])]
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({"label": "", **line} for line in proposed)
    else:
        text.writelines(json.dumps({**line, "label": ""}, ensure_ascii=False) + "\n" for line in proposed)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.new")
    beside.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
    page = write_proposed(out.with_suffix(".html"), proposed, source, rows)
    os.replace(beside, out)
    return {"out": str(out), "page": str(page)}

"""Several backbones on the same labelled pictures, beside what costs nothing: was pretraining worth it here?

Raw pixels, networks with fresh weights, and a network that learned from the same labels alone stand in one table with
the backbones; differences are paired picture by picture, intervals by a bootstrap over whole groups.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.backbone import family_of, known
from saccade.data import Source
from saccade.embed import device, encoder_of, there
from saccade.encoder import Encoder, untrained
from saccade.errors import SaccadeError
from saccade.evaluate import few_label, knn, linear
from saccade.evaluate.baselines import difference, resampled
from saccade.evaluate.features import Extracted, extract
from saccade.evaluate.labelled import SHARE, Labelled, read_labelled
from saccade.evaluate.splits import set_apart
from saccade.finetune import finetune
from saccade.report.page import Page, Prose, Section, Table, write_page
from saccade.run import write_json

TASKS = ("knn", "linear", "few-label")
PIXELS, FRESH, SCRATCH, RUN, PUBLISHED = "raw pixels", "untrained", "from scratch", "a run", "published"
_TITLES = {"knn": "k-NN", "linear": "linear"}
_FOOTER = "Written by saccade. This page is one file: it loads nothing and runs no script."


@dataclass(frozen=True)
class _Row:
    """A contestant: which test pictures it names rightly by each task [draws N], and what train says of it."""

    name: str
    kind: str
    right: dict[str, np.ndarray]
    held_out: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def pretrained(self) -> bool:
        return self.kind in (RUN, PUBLISHED)


@dataclass(frozen=True)
class _Exam:
    """What everyone is asked."""

    data: Labelled
    train: np.ndarray  # rows
    test: np.ndarray
    apart: np.ndarray
    plan: few_label.Plan
    tasks: Sequence[str]

    @property
    def names(self) -> list[str]:
        return self.data.names(self.test)


def compare(
    backbones: Sequence[str | Path | Encoder],
    labelled: str | Path | Source,
    *,
    tasks: Sequence[str] = TASKS,
    labels: Sequence[int] = few_label.COUNTS,
    group_by: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    patch: int | None = None,
    seed: int = 0,
    workers: int = 0,
    baselines: bool = True,
    scratch: float | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """A `table` of all backbones and of what they must beat, in percent, and the `answer` in a sentence.

    `scratch`: minutes that the first backbone's network, with fresh weights, learns from the labels alone. `out`: a
    JSON file for the result; a page lies beside it. The rest is as `evaluate` has it. Raises `SaccadeError` before any
    work for backbones that are named twice or do not load.
    """
    if strange := [task for task in tasks if task not in TASKS]:
        hint = f"of several: {', '.join(TASKS)}"
        raise SaccadeError(f"{strange[0]} is asked of one backbone at a time", path="--tasks", hint=hint)
    beside = None if out is None else Path(out).with_suffix(".html")
    if beside is not None and beside.exists():
        raise SaccadeError(f"{beside} exists", path="--out", hint="name a new file")
    there(labelled)
    began = time.perf_counter()
    encoders = _loaded(backbones, image_size, channels, patch)
    everyone = {**encoders, **(_fresh(encoders, seed) if baselines else {})}
    exam, features = _examined(everyone, labelled, tasks, labels, group_by, seed, workers, baselines)
    rows = [_scored(name, _kind(name, everyone), found, exam) for name, found in features.items()]
    warnings = [
        *exam.data.warnings,
        *(f"{n} a class: {why}" for n, why in (exam.plan.short | exam.plan.skipped).items()),
    ]
    if scratch is not None:
        rows.append(_from_scratch(backbones[0], labelled, exam, scratch, group_by, image_size, channels, seed, workers))
    rows.sort(key=lambda row: (PIXELS, FRESH, SCRATCH, RUN, PUBLISHED).index(row.kind))
    answered = _answered(rows, tasks, exam.names)
    result = {
        "backbones": list(encoders),
        "data": "a source in memory" if isinstance(labelled, Source) else str(labelled),
        "table": [_told(row, exam) for row in rows],
        "answer": _sentence(answered),
        "answered": answered,
        "split": {**exam.data.split, "train": len(exam.train), "test": len(exam.test)},
        "warnings": warnings,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if out is not None and beside is not None:
        result["report"] = str(write(beside, result))
        write_json(Path(out), result)
    return result


def _loaded(
    backbones: Sequence[str | Path | Encoder], image_size: int | None, channels: int | None, patch: int | None
) -> dict[str, Encoder]:
    """Each by its name. Raises `SaccadeError` that names every one that is there twice or does not load."""
    names = [f"encoder {n}" if isinstance(one, Encoder) else str(one) for n, one in enumerate(backbones, 1)]
    same = [one if isinstance(one, Encoder) else str(Path(one).expanduser().resolve()) for one in backbones]
    for place, this in enumerate(same):
        if any(this is other or (isinstance(this, str) and this == other) for other in same[:place]):
            raise SaccadeError(f"{names[place]} is named twice", path=names[place], hint="name each backbone once")
    found, failed = dict[str, Encoder](), list[SaccadeError]()
    for name, one in zip(names, backbones, strict=True):
        try:
            found[name] = encoder_of(one, image_size=image_size, channels=channels, patch=patch)
        except SaccadeError as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        said = "; ".join(error.error for error in failed)
        raise SaccadeError(f"{len(failed)} backbones do not load: {said}", path=failed[0].path, hint=failed[0].hint)
    return found


def _fresh(encoders: dict[str, Encoder], seed: int) -> dict[str, Encoder]:
    """An untrained network of each architecture."""
    found, seen = dict[str, Encoder](), list[tuple[Any, ...]]()
    for name, encoder in encoders.items():
        if not known(encoder.backbone):
            continue
        kind = (family_of(encoder.backbone), encoder.backbone.config, encoder.preprocess)
        if kind not in seen:
            seen.append(kind)
            found[f"{name}, untrained"] = untrained(encoder, seed).to(encoder.device)
    return found


def _examined(
    everyone: dict[str, Encoder],
    labelled: str | Path | Source,
    tasks: Sequence[str],
    labels: Sequence[int],
    group_by: str | None,
    seed: int,
    workers: int,
    baselines: bool,
) -> tuple[_Exam, dict[str, dict[str, Tensor]]]:
    """Features by contestant and pooling. Pictures are decoded once for all that prepare them alike."""
    alike: dict[Any, dict[str, Encoder]] = {}
    for name, encoder in everyone.items():
        alike.setdefault(encoder.preprocess, {})[name] = encoder
    exam, found = None, dict[str, dict[str, Tensor]]()
    for number, (preprocess, some) in enumerate(alike.items()):
        data = read_labelled(labelled, group_by, preprocess.canvas, preprocess.channels)
        first, *others = some
        seen = _extracted(
            some[first], {name: some[name] for name in others}, data, seed, workers, not number and baselines
        )
        if exam is None:
            exam = _exam(data, seen, tasks, labels, seed)
        elif not (np.array_equal(seen.train, exam.train) and np.array_equal(seen.test, exam.test)):
            raise SaccadeError("the backbones can read different pictures", hint="evaluate them one by one", code=1)
        for key, vectors in seen.features.items():
            name, _, pooling = key.rpartition("/")
            if key == "pixels":
                found[PIXELS] = {"pixels": vectors}
            elif name:
                found.setdefault(first if name == "pretrained" else name, {})[pooling] = vectors
    assert exam is not None
    return exam, found


def _extracted(
    encoder: Encoder, others: dict[str, Encoder], data: Labelled, seed: int, workers: int, pixels: bool
) -> Extracted:
    """As `extract` does it; of its baselines only pixels are kept, for untrained networks are among the others."""
    seen = extract(encoder, data, baselines=pixels, seed=seed, workers=workers, beside=others)
    kept = {name: x for name, x in seen.features.items() if name != "border" and not name.startswith("untrained/")}
    return Extracted(kept, seen.train, seen.test, seen.failures)


def _exam(data: Labelled, seen: Extracted, tasks: Sequence[str], labels: Sequence[int], seed: int) -> _Exam:
    train = data.labels[seen.train]
    if not len(seen.test) or len(np.unique(train)) < 2:
        raise SaccadeError(
            "too few labelled pictures could be read", hint=f"{len(seen.failures)} are unreadable", code=1
        )
    keys = [data.keys[row] for row in seen.train.tolist()]
    plan = few_label.plan(train, keys, data.classes, len(seen.test), seed, labels)
    return _Exam(data, seen.train, seen.test, set_apart(data.names(seen.train), SHARE, "hold-out"), plan, tasks)


def _kind(name: str, everyone: dict[str, Encoder]) -> str:
    if name == PIXELS:
        return PIXELS
    if name.endswith(", untrained"):
        return FRESH
    return RUN if everyone[name].record.get("recipe") else PUBLISHED


def _scored(name: str, kind: str, poolings: dict[str, Tensor], exam: _Exam) -> _Row:
    """A contestant by the pooling that does best on the held-out part of train."""
    asked = {pooling: _answers(vectors, exam) for pooling, vectors in poolings.items()}
    chosen = max(asked, key=lambda pooling: asked[pooling][1])
    right, held_out = asked[chosen]
    return _Row(name, kind, right, held_out, {} if kind == PIXELS else {"pooling": chosen})


def _answers(vectors: Tensor, exam: _Exam) -> tuple[dict[str, np.ndarray], float]:
    """Which test pictures each task names rightly, and percent of the held-out part of train."""
    where, classes = device(), len(exam.data.classes)
    train, test = (part.to(where) for part in vectors.split([len(exam.train), len(exam.test)]))
    labels = torch.from_numpy(exam.data.labels[exam.train]).to(where)
    truth = exam.data.labels[exam.test]
    held, right = torch.from_numpy(exam.apart).to(where), dict[str, np.ndarray]()
    guess = knn.predict(train[~held], labels[~held], train[held], classes)
    held_out = 100 * (guess == labels[held]).double().mean().item()
    if "knn" in exam.tasks:
        right["knn"] = (knn.predict(train, labels, test, classes).cpu().numpy() == truth)[None]
    if "linear" in exam.tasks:
        probed = linear.probe(train, labels, test, classes, exam.apart)
        right["linear"], held_out = (probed.predicted.cpu().numpy() == truth)[None], probed.held_out
    if "few-label" in exam.tasks:
        for count, draws in exam.plan.draws.items():
            said = [few_label.predict(train, labels, test, classes, draw).cpu().numpy() == truth for draw in draws]
            right[str(count)] = np.stack(said)
    return right, held_out


def _from_scratch(
    backbone: str | Path | Encoder,
    labelled: str | Path | Source,
    exam: _Exam,
    minutes: float,
    group_by: str | None,
    image_size: int | None,
    channels: int | None,
    seed: int,
    workers: int,
) -> _Row:
    """The same network from fresh weights, taught by the labels alone, in so many minutes."""
    with tempfile.TemporaryDirectory() as folder:
        run = finetune(
            backbone, labelled, mode="full", from_scratch=True, minutes=minutes, epochs=None, group_by=group_by,
            image_size=image_size, channels=channels, seed=seed, workers=workers, out=Path(folder) / "scratch",
        )  # fmt: skip
        lines = (run.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        steps = run.metrics()[-1]["step"]
    said = {one["key"]: one.get("label") == one["predicted"] for one in map(json.loads, lines)}
    right = np.array([said.get(exam.data.keys[row], False) for row in exam.test.tolist()])
    task = "linear" if "linear" in exam.tasks else "knn"
    name = "the same network on these labels alone"
    return _Row(name, SCRATCH, {task: right[None]}, None, {"minutes": minutes, "steps": steps})


def _told(row: _Row, exam: _Exam) -> dict[str, Any]:
    told: dict[str, Any] = {"name": row.name, "kind": row.kind}
    few: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for task, right in row.right.items():
        if task in _TITLES:
            told[task] = round(100 * float(right.mean()), 3)
            intervals[task] = [round(100 * limit, 3) for limit in resampled(right[0], exam.names)]
            continue
        draws = 100 * right.mean(axis=1)
        spread = float(draws.std(ddof=1)) if len(draws) > 1 else 0.0
        few[task] = {"mean": round(float(draws.mean()), 3), "std": round(spread, 3), "draws": len(draws)}
    return {**told, "intervals": intervals, **({"few_label": few} if few else {}), **row.more}


def _answered(rows: Sequence[_Row], tasks: Sequence[str], names: Sequence[str]) -> dict[str, Any] | None:
    """The best backbone, as train decides, against the best without pretraining, which may be chosen on test."""
    task = next((task for task in ("linear", "knn") if task in tasks), None)
    ours = max((row for row in rows if row.pretrained), key=lambda row: row.held_out or 0.0)
    free = [row for row in rows if not row.pretrained]
    if not free:
        return None
    found: dict[str, Any] = {"backbone": ours.name}
    if task is not None:
        rival = max((row for row in free if task in row.right), key=lambda row: row.right[task].mean())
        gain = ours.right[task][0].astype(np.float64) - rival.right[task][0]
        low, high = resampled(gain, names)
        found |= {
            "task": task, "right": round(100 * float(ours.right[task].mean()), 3), "against": rival.name,
            "gain": round(100 * float(gain.mean()), 3), "interval": [round(100 * low, 3), round(100 * high, 3)],
            "worth": "yes" if low > 0 else "no" if high < 0 else "not shown",
        }  # fmt: skip
    if counts := [count for count in ours.right if count not in _TITLES]:
        count = "10" if "10" in counts else counts[-1]
        rival = max((row for row in free if count in row.right), key=lambda row: row.right[count].mean())
        few = difference(ours.right[count], rival.right[count], names)
        found["few_label"] = {
            "labels": int(count), "against": rival.name, "gain": round(few["mean"], 3),
            "two_standard_errors": round(few["two_standard_errors"], 3), "verdict": few["verdict"],
        }  # fmt: skip
    return found


def _sentence(found: dict[str, Any] | None) -> str:
    """Whether pretraining was worth it, in one sentence."""
    if found is None:
        return "Not asked: without baselines there is nothing to compare with."
    few = found.get("few_label")
    if few is not None:
        margin = f"{few['gain']:+.1f} ± {few['two_standard_errors']:.1f} points over {few['against']}"
        told = f"with {few['labels']} label{'s' * (few['labels'] != 1)} a class {margin}"
    if "task" not in found:
        assert few is not None
        worth = {"better": "Yes", "worse": "No", "no difference": "Not shown"}[few["verdict"]]
        return f"{worth}: {found['backbone']} gains {told}."
    low, high = found["interval"]
    start = {"yes": "Yes: pretraining was worth it here", "no": "No: pretraining was not worth it here",
             "not shown": "Not shown that pretraining was worth it here"}[found["worth"]]  # fmt: skip
    said = (
        f"{start}: {found['backbone']} names {found['right']:.1f} percent of test rightly ({_TITLES[found['task']]}, "
        f"all labels), {found['gain']:+.1f} points (95 %: {low:+.1f} to {high:+.1f}) against {found['against']}, "
        "the best without it"
    )
    return f"{said}; {told}." if few is not None else f"{said}."


def section(result: dict[str, Any]) -> Section:
    """The table as part of a page."""
    tasks = [task for task in _TITLES if any(task in row for row in result["table"])]
    counts = list(dict.fromkeys(count for row in result["table"] for count in row.get("few_label", {})))
    rows = []
    for row in result["table"]:
        few = row.get("few_label", {})
        cells = [_cell(row[task], row["intervals"][task]) if task in row else "" for task in tasks]
        cells += [f"{few[count]['mean']:.1f} ± {few[count]['std']:.1f}" if count in few else "" for count in counts]
        rows.append([row["name"], row["kind"], *cells])
    titles = ["", "", *(_TITLES[task] for task in tasks), *(f"{count} a class" for count in counts)]
    table = Table("Right, in percent of the test pictures (95 %)", titles, rows, numbers=True)
    blocks: list[Any] = [Prose([result["answer"]]), table, *([Prose(result["warnings"])] if result["warnings"] else [])]
    lede = "The same pictures, labels and draws for all; intervals by a bootstrap over whole groups."
    return Section("Was pretraining worth it?", lede, blocks)


def write(path: Path, result: dict[str, Any]) -> Path:
    """The comparison as a page of its own."""
    split = result["split"]
    lede = f"{split['train']:,} labelled pictures to learn from, {split['test']:,} to be examined on."
    name = Path(result["data"]).name
    return write_page(path, Page(f"Backbones on {name}", lede, [], [section(result)], footer=_FOOTER))


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"

"""How good frozen features are: k-NN, a linear probe and few labels, beside what they must beat. All scores in percent.

Where there is a text tower also without any label: classes told by their names, and texts and pictures found by each
other. Nothing is chosen on the test set: the penalty and the pooling are chosen on a part of train that is held out,
with groups kept together. Where baselines have a choice, they get the better one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.data import Source
from saccade.embed import device, encoder_of, there
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, nearest
from saccade.evaluate import few_label, knn, label_curve, linear, retrieval, segmentation, texts, zero_shot
from saccade.evaluate.baselines import difference, group_majority, majority
from saccade.evaluate.features import Extracted, extract
from saccade.evaluate.labelled import SHARE, Labelled, read_labelled
from saccade.evaluate.splits import set_apart
from saccade.own import OwnConfig

__all__ = ["evaluate"]

TASKS = ("knn", "linear", "few-label")
IN_WORDS = ("zero-shot",)
ON_MASKS = ("segmentation",)
ON_PAIRS = ("retrieval",)


def evaluate(
    backbone: str | Path | Encoder | Sequence[str | Path | Encoder],
    labelled: str | Path | Source,
    *,
    tasks: Sequence[str] = TASKS,
    labels: Sequence[int] = few_label.COUNTS,
    templates: str | Path | Sequence[str] | None = None,
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
    """Scores of a backbone on labelled pictures, in percent; the keys are those of `saccade evaluate --json`.

    The task `segmentation` reads masks (PART/images/X.jpg, PART/masks/X.png, classes.txt), `retrieval` pictures with
    captions; each stands alone. `zero-shot` asks for the classes by name; `templates` are its prompts, or a file.
    `labels`: how many a class the few-label task learns from, one score for each. `group_by`: a pattern over keys (or a
    column of the list) that names what must not be split. `seed`: of the few-label draws and of the untrained network.
    `image_size`, `channels` and `patch`: as `load` has them. `out`: a JSON file for the result. Several backbones, or
    `scratch` (minutes to learn from the labels alone, from fresh weights), stand in one `table`, with an `answer` to
    whether pretraining was worth it. Raises `SaccadeError`.
    """
    if out is not None and Path(out).exists():
        raise SaccadeError(f"{out} exists", path="--out", hint="name a new file")
    if scratch is not None or not isinstance(backbone, str | Path | Encoder):
        what = {"tasks": tasks, "labels": labels, "group_by": group_by, "seed": seed, "scratch": scratch}
        how = {"image_size": image_size, "channels": channels, "patch": patch, "workers": workers}
        which = [backbone] if isinstance(backbone, str | Path | Encoder) else backbone
        return _compared(which, labelled, what | how | {"baselines": baselines}, out)
    if (folder := texts.alone(backbone)) is not None:
        found = texts.evaluate(folder, labelled, texts.PROBES if tasks == TASKS else tasks, seed)
        return _written({"backbone": str(backbone), "data": str(labelled), **found}, out)
    _check_tasks(tasks, labels)
    if templates is not None and "zero-shot" not in tasks:
        raise SaccadeError("templates belong to the task zero-shot", path="--templates", hint="--tasks zero-shot")
    prompts = zero_shot.read_templates(templates)
    there(labelled)
    started = time.perf_counter()
    encoder = encoder_of(backbone, image_size=image_size, channels=channels, patch=patch)
    result: dict[str, Any] = {
        "backbone": str(encoder.record.get("path", "an encoder in memory") if backbone is encoder else backbone),
        "data": "a source in memory" if isinstance(labelled, Source) else str(labelled),
    }
    if tuple(tasks) == ON_MASKS:
        result |= segmentation.evaluate(encoder, labelled, group_by=group_by, seed=seed, baselines=baselines)
    elif tuple(tasks) == ON_PAIRS:
        result |= retrieval.evaluate(encoder, labelled, workers=workers)
    else:
        if "zero-shot" in tasks:
            result |= zero_shot.evaluate(encoder, labelled, templates=prompts, workers=workers)
        if probes := [task for task in tasks if task in TASKS]:
            found = _probed(encoder, labelled, probes, labels, group_by, seed, workers, baselines)
            result |= found | {"warnings": list(dict.fromkeys([*result.get("warnings", ()), *found["warnings"]]))}
    return _written({**result, "seconds": round(time.perf_counter() - started, 1)}, out)


def _compared(
    backbones: Sequence[str | Path | Encoder],
    labelled: str | Path | Source,
    asked: dict[str, Any],
    out: str | Path | None,
) -> dict[str, Any]:
    """Several in one table, and beside `out` a page of it."""
    from saccade import compare as page  # it stands beside finetune, which reads pages of this one

    _check_tasks(asked["tasks"], asked["labels"])
    beside = None if out is None else Path(out).with_suffix(".html")
    if beside is not None and beside.exists():
        raise SaccadeError(f"{beside} exists", path="--out", hint="name a new file")
    found = page.compare(backbones, labelled, **asked)
    if beside is not None:
        found["report"] = str(page.write(beside, found))
    return _written(found, out)


def _probed(
    encoder: Encoder,
    labelled: str | Path | Source,
    tasks: Sequence[str],
    labels: Sequence[int],
    group_by: str | None,
    seed: int,
    workers: int,
    baselines: bool,
) -> dict[str, Any]:
    """What is learned from labels, on features that are computed once."""
    started = time.perf_counter()
    data = read_labelled(labelled, group_by, encoder.preprocess.canvas, encoder.preprocess.channels)
    extracted = extract(encoder, data, baselines=baselines, seed=seed, workers=workers)
    read = time.perf_counter() - started
    exam = _exam(data, extracted, labels, seed)
    scores = {who: _score(vectors, exam, _asked(who, tasks)) for who, vectors in extracted.features.items()}
    beside = {}
    if baselines:
        beside["baselines"] = {**_report_baselines(scores), **_blind(exam)}
        beside["differences"] = _differences(scores, exam)
    if "few-label" in tasks:
        beside["label_curve"] = _label_curve(extracted.features[f"pretrained/{_chosen(scores)}"], exam, seed)
    return {
        **_report(scores, exam, tasks),
        **beside,
        "split": exam.split,
        "image_size": encoder.preprocess.crop,
        "quarantined": len(extracted.failures),
        "unreadable": [{"key": key, "reason": reason} for _, key, reason in extracted.failures[:20]],
        "warnings": _warnings(data, exam, encoder if baselines else None),
        "seed": seed,
        "images_per_second": round((len(extracted.train) + len(extracted.test)) / max(read, 1e-9), 1),
    }


def _label_curve(vectors: Tensor, exam: _Exam, seed: int) -> dict[str, Any]:
    """The score over labels a class of the chosen features, and what more labels would bring."""
    train, test = (part.to(device()) for part in vectors.split([len(exam.train), len(exam.test)]))
    labels = torch.from_numpy(exam.train).to(train.device)
    top = label_curve.largest(exam.train)
    measured = label_curve.measure(train, labels, test, exam.test, exam.keys, top, seed)
    return label_curve.curve(measured, 100 / len(exam.classes))


def _warnings(data: Labelled, exam: _Exam, compared: Encoder | None) -> list[str]:
    """What is odd about the data, which counts are short, and of `compared` that it cannot be measured untrained."""
    said = [*data.warnings, *(f"{n} a class: {why}" for n, why in (exam.plan.short | exam.plan.skipped).items())]
    own = compared is not None and isinstance(compared.backbone.config, OwnConfig)
    return said + (["untrained: not measured, since only you can build your own network anew"] if own else [])


def _written(result: dict[str, Any], out: str | Path | None) -> dict[str, Any]:
    if out is not None:
        new = Path(f"{out}.new")
        new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(new, out)
    return result


def _asked(contestant: str, tasks: Sequence[str]) -> list[str]:
    """The border is there to warn, and is not asked for what takes longest."""
    return [task for task in tasks if contestant != "border" or task != "few-label"]


def _check_tasks(tasks: Sequence[str], labels: Sequence[int]) -> None:
    if not labels or min(labels) < 1:
        raise SaccadeError("few labels are one a class or more", path="--labels", hint="e.g. --labels 1,10")
    if not tasks:
        raise SaccadeError("no task is asked for", path="--tasks", hint=f"e.g. --tasks {','.join(TASKS)}")
    known = TASKS + IN_WORDS + ON_MASKS + ON_PAIRS
    for task in tasks:
        if task not in known:
            raise SaccadeError(f"there is no task {task!r}", path="--tasks", hint=nearest(task, known))
    for alone, what in ((ON_MASKS, "masks"), (ON_PAIRS, "captions")):
        if alone[0] in tasks and tuple(tasks) != alone:
            said = f"{alone[0]} reads {what}, the other tasks classes"
            raise SaccadeError(said, path="--tasks", hint="ask for it alone")


@dataclass(frozen=True)
class _Exam:
    """What every contestant is asked: the same labels, the same held-out part, the same draws."""

    classes: list[str]
    train: np.ndarray  # labels
    test: np.ndarray
    keys: list[str]  # of train
    apart: np.ndarray  # of train: where penalties and poolings are chosen
    train_names: list[str]  # group of each sample, or its key
    test_names: list[str]
    grouped: bool
    plan: few_label.Plan
    split: dict[str, Any]


def _exam(data: Labelled, extracted: Extracted, counts: Sequence[int], seed: int) -> _Exam:
    train, test = data.labels[extracted.train], data.labels[extracted.test]
    if not len(test) or len(np.unique(train)) < 2:
        raise SaccadeError(
            "too few labelled pictures could be read", hint=f"{len(extracted.failures)} are unreadable", code=1
        )
    names = data.names(extracted.train)
    apart = set_apart(names, SHARE, "hold-out")
    split = {**data.split, "train": len(train), "test": len(test), "held_out_of_train": int(apart.sum())}
    keys = [data.keys[row] for row in extracted.train.tolist()]
    plan = few_label.plan(train, keys, data.classes, len(test), seed, counts)
    return _Exam(
        data.classes, train, test, keys, apart, names, data.names(extracted.test), data.groups is not None, plan, split
    )  # fmt: skip


@dataclass(frozen=True)
class _Scores:
    """One set of features: which test samples each task got right [draws N], and what train decided."""

    right: dict[str, np.ndarray]  # knn, linear, and few-label counts as "1", "5", …
    held_out: float  # percent on the held-out part of train
    penalty: float | None

    def accuracy(self, task: str) -> float:
        return 100 * float(self.right[task].mean())


def _score(vectors: Tensor, exam: _Exam, tasks: Sequence[str]) -> _Scores:
    """All tasks on one set of features, train rows first."""
    where, classes = device(), len(exam.classes)
    train, test = (part.to(where) for part in vectors.split([len(exam.train), len(exam.test)]))
    labels = torch.from_numpy(exam.train).to(where)
    right: dict[str, np.ndarray] = {}

    def correct(predicted: Tensor) -> np.ndarray:
        return predicted.cpu().numpy() == exam.test

    if "knn" in tasks:
        right["knn"] = correct(knn.predict(train, labels, test, classes))[None]
    held, penalty = torch.from_numpy(exam.apart).to(where), None
    if "linear" in tasks:
        probed = linear.probe(train, labels, test, classes, exam.apart)
        right["linear"], held_out, penalty = correct(probed.predicted)[None], probed.held_out, probed.penalty
    else:
        guess = knn.predict(train[~held], labels[~held], train[held], classes)
        held_out = 100 * (guess == labels[held]).double().mean().item()
    if "few-label" in tasks:
        for count, draws in exam.plan.draws.items():
            right[str(count)] = np.stack(
                [correct(few_label.predict(train, labels, test, classes, draw)) for draw in draws]
            )
    return _Scores(right, held_out, penalty)


def _numbers(best: dict[str, _Scores], plan: few_label.Plan | None = None) -> dict[str, Any]:
    """knn, linear and few_label, each from the scores that `best` names for it."""
    found: dict[str, Any] = {}
    few: dict[str, Any] = {}
    for task, scores in best.items():
        if task in ("knn", "linear"):
            found[task] = round(scores.accuracy(task), 3)
            continue
        draws = 100 * scores.right[task].mean(axis=1)
        few[task] = {
            "mean": round(float(draws.mean()), 3),
            "std": round(float(draws.std(ddof=1)), 3),
            "draws": len(draws),
        }
    if plan is not None and few:
        few |= {str(count): {"mean": None, "std": None, "skipped": why} for count, why in plan.skipped.items()}
    return found | ({"few_label": few} if few else {})


def _all(scores: _Scores, plan: few_label.Plan | None = None) -> dict[str, Any]:
    return _numbers(dict.fromkeys(scores.right, scores), plan)


def _of(scores: dict[str, _Scores], contestant: str) -> dict[str, _Scores]:
    """A network's scores by pooling."""
    return {name.partition("/")[2]: found for name, found in scores.items() if name.startswith(f"{contestant}/")}


def _chosen(scores: dict[str, _Scores]) -> str:
    """The pooling of the backbone that did best on the held-out part of train; the class token where they are equal."""
    poolings = _of(scores, "pretrained")
    return max(poolings, key=lambda name: poolings[name].held_out)


def _report(scores: dict[str, _Scores], exam: _Exam, tasks: Sequence[str]) -> dict[str, Any]:
    poolings, chosen = _of(scores, "pretrained"), _chosen(scores)
    details = {
        name: {**_all(found), "held_out": round(found.held_out, 3), "penalty": found.penalty}
        for name, found in poolings.items()
    }
    by = f"{'linear' if 'linear' in tasks else 'knn'} on {exam.split['held_out_of_train']} samples held out of train"
    return {**_all(poolings[chosen], exam.plan), "pooled": {"chosen": chosen, "by": by, **details}}


def _best(scores: dict[str, _Scores]) -> dict[str, _Scores]:
    """For each task the scores that did best on test: only baselines may be chosen so."""
    tasks = next(iter(scores.values())).right
    return {task: max(scores.values(), key=lambda found: found.accuracy(task)) for task in tasks}


def _report_baselines(scores: dict[str, _Scores]) -> dict[str, Any]:
    fresh = _of(scores, "untrained")
    numbers = {**_numbers(_best(fresh)), **{name: _all(found) for name, found in fresh.items()}} if fresh else None
    return {
        "pixels": _all(scores["pixels"]),
        **({"untrained": numbers} if numbers else {}),  # of a graph of others there is no network to draw anew
        "border": _all(scores["border"]),
    }


def _blind(exam: _Exam) -> dict[str, Any]:
    """What is scored without looking at the picture."""
    blind: dict[str, Any] = {"majority": round(majority(exam.train, exam.test), 3)}
    if exam.grouped:
        found = group_majority(exam.train, exam.train_names, exam.test, exam.test_names)
        blind["group_majority"] = {name: round(value, 3) for name, value in found.items()}
    return blind


def _differences(scores: dict[str, _Scores], exam: _Exam) -> dict[str, Any]:
    """For each task: how far the backbone is from the best baseline, paired sample by sample and draw by draw."""
    ours = _of(scores, "pretrained")[_chosen(scores)]
    theirs = {name: found for name, found in scores.items() if not name.startswith("pretrained/")}
    few: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for task, right in ours.right.items():
        rival = max(
            (name for name in theirs if task in theirs[name].right), key=lambda name: theirs[name].accuracy(task)
        )
        gain = difference(right, theirs[rival].right[task], exam.test_names)
        line = {key: round(value, 3) if isinstance(value, float) else value for key, value in gain.items()} | {
            "against": rival
        }
        (found if task in ("knn", "linear") else few)[task] = line
    return found | ({"few_label": few} if few else {})

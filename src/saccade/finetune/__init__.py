"""From a backbone to a model that does a task: a head on frozen features, or backbone and head tuned together.

A run holds `backbone/` (what `saccade.load` reads) and `head/`, what was said of each test picture, scores beside what
must be beaten, and a report. Nothing is chosen on test: a part of train is held out for that, groups kept together.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saccade.data import Source, fingerprint
from saccade.embed import device, encoder_of, there
from saccade.encoder import Encoder, untrained
from saccade.errors import SaccadeError
from saccade.finetune import predicting, reporting, tuning
from saccade.finetune import task as registry
from saccade.finetune.predicting import predict
from saccade.finetune.task import Examples, Fitted, Task
from saccade.finetune.tuned import Tuned
from saccade.provenance import origins
from saccade.run import Run, environment, holding, memory_gb
from saccade.settings import LENGTHS, FinetuneArguments, TuningSettings, checked, flag

__all__ = ["finetune", "predict"]


def finetune(
    backbone: str | Path | Encoder,
    data: str | Path | Source,
    *,
    out: str | Path,
    task: str = "classification",
    mode: str = "frozen",
    **settings: Any,
) -> Run:
    """Learns a task from labelled pictures on top of a backbone, examines it once on test, and writes the model.

    `mode`: `frozen` fits a head to features that are computed once; `lora` and `full` go on from that head with thin
    additions to the backbone, or all of it. `settings` are the flags of `saccade finetune` by their own names: the
    verb's (group_by, image_size, cache, …), the task's (views, labels, …) and, where the backbone moves, tuning's
    (epochs, lr, rank, …). `from_scratch=True` begins with fresh weights of the same architecture. The same call goes on
    with a run that was stopped. Raises `SaccadeError`; with `code` 75 when it was stopped on request.
    """
    asked, page, own, way = configured(backbone, data, out=out, task=task, mode=mode, **settings)
    there(data)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    said, first = _asked(asked, own, way), os.environ.get("RANK", "0") == "0"
    if first:
        with holding():
            run = Run.claim(asked.out, said)  # another run is refused before anything is computed
            if run.summary:
                return run
    began = time.perf_counter()
    encoder = _encoder(backbone, asked)
    examples = page.read(data, encoder, asked, own)
    seen = page.see(encoder, examples, own, asked)
    spent: dict[str, Any] = {"features": round(time.perf_counter() - began, 2)}
    fitted = _begun(page, encoder, seen, examples, own, way)
    model = Tuned(encoder, fitted.head.to(encoder.device), page, examples.facts)
    spent["head"] = fitted.chosen.get("seconds")
    initial = _initial(encoder, asked)
    if way is not None:
        started = time.perf_counter()
        run, model, chosen = tuning.tune(model, examples, own, asked, way, said, initial)
        spent["tuning"] = round(time.perf_counter() - started, 2)
        fitted = Fitted(model.head, {**chosen, "frozen": dict(fitted.chosen)})
        if not first:  # one of several processes examines and writes
            return run
    with holding():
        run = Run.claim(asked.out, said)
        if way is None:
            run.note(data=fingerprint(examples.source), sessions=[environment()], initial=initial)
        _conclude(run, model, fitted, seen, examples, own, asked, spent, began)
    return run


def _begun(page: Task, encoder: Encoder, seen: Any, examples: Examples, own: Any, way: TuningSettings | None) -> Fitted:
    """The head on frozen features, of all of train; where a backbone then moves, without what is held out to judge."""
    if way is None:
        return page.fit(seen, examples, own)
    fresh = page.part("fresh")
    if fresh is not None and not way.head_start:
        begun: Fitted = fresh(encoder, examples, own)
        return begun
    return page.fit(seen, dataclasses.replace(examples, held=examples.held[:0]), own)


def configured(
    backbone: str | Path | Encoder,
    data: str | Path | Source,
    *,
    out: str | Path,
    task: str = "classification",
    mode: str = "frozen",
    **settings: Any,
) -> tuple[FinetuneArguments, Task, Any, TuningSettings | None]:
    """What is asked: the verb's arguments, the task's page and settings, and those of tuning where a backbone moves.

    Raises `SaccadeError` for a name that none of them knows, or that belongs to another mode.
    """
    page = registry.find(task)
    verb = {name: settings.pop(name) for name in list(settings) if name in FinetuneArguments.model_fields}
    moving = {name: settings.pop(name) for name in list(settings) if name in TuningSettings.model_fields
              and name not in page.settings.model_fields}  # fmt: skip
    said = {
        **verb, "out": str(out), "task": task, "mode": mode,
        "backbone": "an encoder in memory" if isinstance(backbone, Encoder) else str(backbone),
        "data": "a source in memory" if isinstance(data, Source) else str(data),
    }  # fmt: skip
    asked = checked(FinetuneArguments, said, owner="finetune")
    also = (*FinetuneArguments.model_fields, *TuningSettings.model_fields)
    own = checked(page.settings, settings, owner=f"task {task}", also=also)
    if mode == "frozen":
        if moving:
            name = flag(next(iter(moving)))
            raise SaccadeError(f"{name} is of a backbone that moves", path=name, hint="--mode lora or --mode full")
        if asked.from_scratch and page.frozen_only is None:
            raise SaccadeError(
                "fresh weights that stand still learn nothing",
                path="--from-scratch",
                hint="--mode full; saccade evaluate shows what untrained features are worth",
            )
        return asked, page, own, None
    if page.frozen_only is not None:
        raise SaccadeError(f"{task} cannot move a backbone: {page.frozen_only}", path="--mode", hint="--mode frozen")
    usual = TuningSettings.usual(mode, asked.from_scratch)
    if any(moving.get(length) is not None for length in LENGTHS):
        usual |= dict.fromkeys(LENGTHS)
    way = checked(TuningSettings, {**usual, **moving}, owner="finetune")
    return asked, page, own, way


def _asked(asked: FinetuneArguments, own: Any, way: TuningSettings | None) -> dict[str, Any]:
    said = asked.model_dump(mode="json")
    machine = {name: said.pop(name) for name in ("cache", "workers", "threads", "out")}
    moving = {} if way is None else way.model_dump(mode="json")
    for name in ("workers", "threads", "save_every", "log_every"):
        if name in moving:
            machine[name] = moving.pop(name)
    return {"verb": "finetune", **said, "settings": {**own.model_dump(mode="json"), **moving}, "machine": machine}


def _encoder(backbone: str | Path | Encoder, asked: FinetuneArguments) -> Encoder:
    """On the device; with fresh weights where it is asked for."""
    encoder = encoder_of(backbone, image_size=asked.image_size, channels=asked.channels, patch=None)
    if not asked.from_scratch:
        return copy.copy(encoder)  # whose record becomes this run's; a caller's encoder keeps its own
    fresh = untrained(encoder, asked.seed)
    arch = encoder.record.get("arch")
    fresh.record = {"family": "saccade", "arch": arch, "weights": "random", "seed": asked.seed, "licence": None}
    return fresh.to(device())


def _initial(encoder: Encoder, asked: FinetuneArguments) -> dict[str, Any]:
    if asked.from_scratch:
        return {**encoder.record, "derived_from": []}
    names = ("path", "name", "revision", "family", "arch", "hash", "licence", "terms")
    found = {name: encoder.record[name] for name in names if encoder.record.get(name) is not None}
    return {**found, "derived_from": origins(encoder.record)}


def _conclude(
    run: Run,
    model: Tuned,
    fitted: Fitted,
    seen: Any,
    examples: Examples,
    own: Any,
    asked: FinetuneArguments,
    spent: dict[str, Any],
    began: float,
) -> None:
    """Examines the model on test, writes it, what it said, and what came out."""
    page, failures = model.task, list(seen.failures)
    told = _told(run, model, seen, examples, asked, failures)
    result = page.measure(told, seen, examples, own)
    model.encoder.record = _record(model.encoder, run, asked)
    model.save(run.path)
    aside = [(0, one[0], one[1]) for one in examples.aside]
    predicting.write_told(run.path, told, [*failures, *aside])
    spent["total"] = round(time.perf_counter() - began, 2)
    short = {name: value for name, value in result.items() if name not in ("classes", "confusion", "worst")}
    summary = {
        "run": str(run.path), "task": asked.task, "mode": asked.mode, "backbone": asked.backbone, "data": asked.data,
        "test": result, "chosen": dict(fitted.chosen), "split": dict(examples.split), "seconds": spent,
        "quarantined": len(failures), "unreadable": [{"key": key, "reason": why} for _, key, why in failures[:20]],
        "aside": len(aside), "set_aside": [{"key": key, "reason": why} for _, key, why in aside[:20]],
        "warnings": [*examples.warnings, *_lost(len(failures), len(aside))],
        "image_size": model.encoder.preprocess.crop, "memory_gb": round(memory_gb(), 2),
        "data_fingerprint": run.record["data"]["fingerprint"], "report": str(run.path / reporting.REPORT),
    }  # fmt: skip
    if not run.metrics():  # a run of one step, so that the same command finds it done and another one is refused
        run.log({"step": 1, "seconds": spent["total"], "eval": _numbers(short)})
    run.note(summary=summary)
    reporting.write(run, model, told, examples, result)


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def _lost(unreadable: int, aside: int) -> list[str]:
    found = []
    if unreadable:
        found.append(f"{unreadable} pictures cannot be read; quarantine.jsonl names each")
    if aside:
        found.append(f"{aside} samples take no part; quarantine.jsonl names each and says why")
    return found


def _told(
    run: Run, model: Tuned, seen: Any, examples: Examples, asked: FinetuneArguments, failures: list[Any]
) -> list[dict[str, Any]]:
    """What the model says of test, as far as it can be read."""
    again = model.task.part("again")
    if again is not None and asked.mode == "frozen":
        rows, outputs = again(model.head, seen, examples.test)
        rows = rows.tolist()
        none = [None] * len(rows)
        said = predicting.Said(rows, [(0, 0)] * len(rows), list(outputs), none)
        return predicting.lines(model.head, examples.source, said, examples.targets, run.path)
    known = {row for row, _, _ in failures}
    rows = [row for row in examples.test.tolist() if row not in known]
    return list(predicting.tell(
        model.encoder, model.head, examples.source, rows, examples.targets, failures, run.path, asked.workers
    ))  # fmt: skip


def _record(encoder: Encoder, run: Run, asked: FinetuneArguments) -> dict[str, Any]:
    """What is said of the backbone that comes out. One that stood still is what it was."""
    known = run.record
    kept = {name: encoder.record.get(name) for name in ("recipe", "arch", "licence")}
    tuned_by = {} if asked.mode == "frozen" else {"finetuned": {"task": asked.task, "mode": asked.mode}}
    return {
        **kept,
        **tuned_by,
        "derived_from": known["initial"]["derived_from"],
        "data": known["data"],
        "initial": known["initial"],
    }

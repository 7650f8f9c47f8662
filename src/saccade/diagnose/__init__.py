"""Why a run of `saccade finetune` disappoints, by measurement: labels, leaks, a shifted test set, backbone, head."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saccade.data import Source, fingerprint
from saccade.diagnose import page
from saccade.diagnose.culprits import ADVICE, told_apart
from saccade.diagnose.evidence import Finding, Side
from saccade.diagnose.seeing import Seen, see
from saccade.draws import Permutation
from saccade.embed import device, there
from saccade.encoder import Encoder, untrained
from saccade.errors import SaccadeError
from saccade.finetune.task import Examples
from saccade.finetune.tuned import Tuned, load
from saccade.run import Run, write_json
from saccade.settings import FinetuneArguments
from saccade.weights import load as load_backbone

__all__ = ["diagnose"]

MOST = {"train": 8000, "test": 4000}
"""Pictures of each side that are looked at: a choice at random says as much, and the tests take squares of them."""
RESULT = "diagnosis.json"


def diagnose(
    run: str | Path | Run,
    *,
    data: str | Path | Source | None = None,
    workers: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """What is the matter with a classifier, the usual culprits told apart; keys as `saccade diagnose --json`.

    `data`: where the pictures are now, if not where the run found them. `findings` has each culprit with strength,
    interval, threshold and reason; `named` those that are found, and `verdict` says it in words. Writes diagnosis.json
    and diagnosis.html into the run. Raises `SaccadeError` for a run of another task, and for pictures that are gone.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    place = _place(opened, data)
    began = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    model = load(opened.path)
    if model.facts.get("several"):
        raise SaccadeError(
            f"{opened.path} tells several classes of a picture",
            path=str(opened.path),
            hint="heads that tell one can be diagnosed",
        )
    warnings: list[str] = []
    examples = _examples(opened, model, place, warnings)
    before = _start(opened, model, warnings)
    rows = {"train": _some(examples.learned, "train", warnings), "test": _some(examples.test, "test", warnings)}
    model.encoder.to(device())
    model.head.to(device())
    seen = see(model, before, examples.source, np.concatenate(list(rows.values())), workers)
    train, test = (_side(seen, examples, part) for part in rows.values())
    _check(opened, train, test)
    classes = list(model.facts["classes"])
    findings = told_apart(train, test, classes, tuned=before is not None)
    result = _result(opened, place, findings, examples, (train, test), warnings)
    result |= {"quarantined": len(seen.failures), "seconds": round(time.perf_counter() - began, 1)}
    result["report"] = str(page.write(opened.path, result, findings, train, test, classes))
    write_json(opened.path / RESULT, result)
    return result


def _place(run: Run, data: str | Path | Source | None) -> str | Path | Source:
    """Where the pictures are. Raises `SaccadeError`, before anything is loaded, for what cannot be diagnosed."""
    config = run.config
    if config.get("verb") != "finetune":
        hint = "diagnose a run of saccade finetune"
        raise SaccadeError(f"{run.path} is a run of another verb", path=str(run.path), hint=hint)
    if config.get("task") != "classification":
        hint = "classification is what can be diagnosed"
        raise SaccadeError(f"{run.path} is of the task {config.get('task')}", path=str(run.path), hint=hint)
    place = config["data"] if data is None else data
    if data is None and (place == "a source in memory" or not Path(str(place)).expanduser().exists()):
        gone = "" if place == "a source in memory" else ", which is gone"
        hint = "say where the pictures are now: --data FOLDER"
        raise SaccadeError(f"{run.path} learned from {place}{gone}", path="--data", hint=hint)
    there(place)
    return place


def _examples(run: Run, model: Tuned, place: str | Path | Source, warnings: list[str]) -> Examples:
    """Who was learned from and who examined, as the run had it."""
    config = run.config
    known = {name: value for name, value in config.items() if name in FinetuneArguments.model_fields}
    asked = FinetuneArguments(**{**known, "data": str(place), "out": str(run.path)})
    own = model.task.settings(**{n: v for n, v in config["settings"].items() if n in model.task.settings.model_fields})
    examples = model.task.read(place, model.encoder, asked, own)
    warnings += examples.warnings
    if fingerprint(examples.source)["fingerprint"] != run.record.get("data", {}).get("fingerprint"):
        warnings.append("the pictures are not those that the run saw: some came, went or changed")
    missing = sorted({*examples.facts["classes"]} ^ {*model.facts["classes"]})
    if missing:
        raise SaccadeError(
            f"the classes are not those of the run: {', '.join(missing[:5])}", path=str(place), hint="--data FOLDER"
        )
    return examples


def _start(run: Run, model: Tuned, warnings: list[str]) -> Encoder | None:
    """The backbone before it was tuned; None where it stood still. What it learned from train, train cannot judge."""
    if run.config["mode"] == "frozen":
        return None
    if run.config.get("from_scratch"):
        return untrained(model.encoder, int(run.config["seed"])).to(device())
    try:
        encoder = load_backbone(run.config["backbone"], image_size=model.encoder.preprocess.crop,
                                channels=run.config.get("channels"))  # fmt: skip
    except SaccadeError as error:
        warnings.append(f"the backbone before tuning cannot be loaded ({error.error}): a fresh one stands for it")
        return untrained(model.encoder, 1).to(device())
    encoder.preprocess = model.encoder.preprocess
    return encoder.to(device())


def _some(rows: np.ndarray, side: str, warnings: list[str]) -> np.ndarray:
    if len(rows) <= MOST[side]:
        return rows
    order = Permutation(len(rows), "diagnose")
    warnings.append(f"{MOST[side]:,} of {len(rows):,} pictures of {side} are looked at, chosen at random")
    return np.sort(rows[[order(place) for place in range(MOST[side])]])


def _side(seen: Seen, examples: Examples, rows: np.ndarray) -> Side:
    at = {row: place for place, row in enumerate(seen.rows)}
    places = [at[row] for row in rows.tolist() if row in at]
    known = [seen.rows[place] for place in places]
    labels = np.array([examples.targets[row] for row in known], dtype=np.int64)
    which = np.array(places, dtype=np.int64)
    fresh = None if seen.untrained is None else seen.untrained[which]
    return Side(
        seen.features[which], seen.start[which], fresh, seen.pixels[which], labels,
        examples.names(np.array(known, dtype=np.int64)), seen.guesses[which], [examples.keys[row] for row in known],
    )  # fmt: skip


def _check(run: Run, train: Side, test: Side) -> None:
    """Raises `SaccadeError` where there is too little to compare."""
    for side, what in ((train, "train"), (test, "test")):
        if len(side.labels) < 10 or len(set(side.names)) < 5:
            raise SaccadeError(
                f"{len(side.labels)} pictures of {len(set(side.names))} groups in {what} are too few for a diagnosis",
                path=str(run.path), hint="10 pictures and 5 groups at least", code=1,
            )  # fmt: skip


def _result(
    run: Run,
    place: str | Path | Source,
    findings: dict[str, Finding],
    examples: Examples,
    sides: tuple[Side, Side],
    warnings: Sequence[str],
) -> dict[str, Any]:
    named = [name for name, finding in findings.items() if finding.found]
    train, test = sides
    return {
        "run": str(run.path),
        "data": "a source in memory" if isinstance(place, Source) else str(place),
        "verdict": ", ".join(named) or "nothing found",
        "named": named,
        "findings": {name: _told(finding, train, test) for name, finding in findings.items()},
        "right": round(100 * float(test.right.mean()), 3),
        "train": len(train.labels),
        "test": len(test.labels),
        "warnings": list(warnings),
    }


def _told(finding: Finding, train: Side, test: Side) -> dict[str, Any]:
    """A finding as JSON, its pictures by their keys."""
    keys = (train if finding.side == "train" else test).keys
    return {
        "found": finding.found, "measure": finding.measure, "strength": _rounded(finding.strength),
        "interval": None if finding.interval is None else [_rounded(limit) for limit in finding.interval],
        "threshold": finding.threshold, "reason": finding.reason,
        **({"advice": ADVICE[finding.culprit]} if finding.found else {}),
        "pictures": [keys[row] for row in finding.rows] if finding.found else [],
        **(finding.more or {}),
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)

"""Which class a picture shows, or which of several: logistic regression on features, its probabilities made honest.

Pooling and penalty are chosen on what is held out of train (by turns in five parts where that is little), and so is the
temperature by which logits are divided (arXiv 1706.04599). The backbone may then move: loss and mixup are here too.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.data import Source
from saccade.embed import device
from saccade.encoder import Encoder
from saccade.evaluate.baselines import difference, group_majority, majority
from saccade.evaluate.linear import PENALTIES, Linear, Standard
from saccade.evaluate.linear import fit as solve
from saccade.finetune.calibration import cross_entropy, expected_error, fitted_temperature, probabilities
from saccade.finetune.classes import average_precision, confusion, macro, report, share
from saccade.finetune.folds import folds
from saccade.finetune.frozen import Vectors, pooled, vectors
from saccade.finetune.labels import examples as labelled_examples
from saccade.finetune.labels import known as known_labels
from saccade.finetune.shown import of_classes
from saccade.finetune.task import Examples, Fitted, Picture, TaskSettings
from saccade.finetune.task import Head as AnyHead
from saccade.report.page import Section
from saccade.settings import FinetuneArguments, Looking
from saccade.vit import Features

SWEPT = 10_000
"""Rows, at most, on which penalty and pooling are chosen; the head then learns from all."""
STRENGTH = 0.03
"""Penalty as a part of width over labels where there are too few of them to choose it, as `evaluate` has it."""
CHOOSES = 3
"""Labels of the middle class from which on they can choose anything."""
WORST = 24


class Settings(TaskSettings, Looking):
    """How pictures are told apart."""

    label: str = Field("label", description="column of the list that holds the class, or several")
    separator: str | None = Field(None, description="what stands between several classes of a picture, e.g. ';'")
    labels: int | None = Field(None, ge=1, description="learn from so many labels a class, drawn by the seed")
    balance: bool = Field(False, description="every class counts alike in learning, however rare it is")


def read(data: str | Path | Source, encoder: Encoder, asked: FinetuneArguments, settings: Settings) -> Examples:
    """Labelled pictures by their parts. Raises `SaccadeError`."""
    return labelled_examples(
        data, encoder, column=settings.label, separator=settings.separator, group_by=asked.group_by,
        count=settings.labels, seed=asked.seed,
    )  # fmt: skip


def see(encoder: Encoder, examples: Examples, settings: Settings, asked: FinetuneArguments) -> Vectors:
    """Vectors of all pictures, and of augmented copies of those that are learned from."""
    rows = np.concatenate([examples.learned, examples.test])
    return vectors(
        encoder, examples.source, rows, looking=settings, seed=asked.seed, copied=examples.learned,
        cache=asked.cache, workers=asked.workers,
    )  # fmt: skip


class Head(AnyHead):
    """A linear layer on pooled, standardised features; logits, and probabilities of them by a temperature."""

    answers = ("probabilities",)

    def __init__(self, pooling: str, width: int, classes: Sequence[str], several: bool = False):
        super().__init__()
        self.pooling, self.classes, self.several = pooling, list(classes), several
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("temperature", torch.ones(()))
        self.linear = nn.Linear(width, len(self.classes))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.tokens = {"cls": "cls", "mean": "patches"}.get(pooling, "all")  # type: ignore[assignment]

    shift: Tensor
    scale: Tensor
    temperature: Tensor

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Float[Tensor, "b k"]:
        """Logits."""
        return self.logits(pooled(features, self.pooling))

    def logits(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Of vectors that are pooled already."""
        found: Tensor = self.linear((vectors - self.shift) * self.scale)
        return found

    def answer(self, outputs: Float[Tensor, "b k"]) -> tuple[Tensor, ...]:
        """Calibrated probabilities."""
        return (probabilities(outputs.float(), self.temperature, self.several),)

    def config(self) -> dict[str, Any]:
        """Its pooling, width and classes."""
        return {
            "pooling": self.pooling, "width": len(self.shift), "classes": self.classes, "several": self.several
        }  # fmt: skip

    def told(self, outputs: Sequence[Tensor], pictures: Sequence[Picture], folder: Path | None) -> list[dict[str, Any]]:
        """The class that was found, how sure that is, and the probability of every class, in their order."""
        logits = torch.stack(list(outputs)).float().cpu()
        chances = probabilities(logits, self.temperature.cpu(), self.several)
        found = []
        for picture, row, chance in zip(pictures, logits, chances, strict=True):
            place = int(chance.argmax())
            line: dict[str, Any] = {} if picture.target is None else {"label": self._names(picture.target)}
            if self.several:
                line["predicted"] = [name for name, p in zip(self.classes, chance.tolist(), strict=True) if p >= 0.5]
            else:
                line |= {"predicted": self.classes[place], "confidence": round(float(chance[place]), 6)}
            line["probabilities"] = [round(value, 6) for value in chance.tolist()]
            found.append({**line, "_logits": row, "_target": picture.target, "_temperature": float(self.temperature)})
        return found

    def _names(self, target: Any) -> Any:
        return [self.classes[n] for n in target] if self.several else self.classes[target]


@dataclass(frozen=True)
class _Choice:
    """A penalty, and what was said of rows that were not learned from: [N K], rows in no fold are NaN."""

    penalty: float
    logits: Tensor
    loss: float


def _rows(vectors: Tensor, copies: Tensor, targets: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to learn from: pictures, and behind them their augmented copies."""
    again = copies[some].flatten(0, 1)
    return torch.cat([vectors[some], again]), torch.cat([targets[some], targets[some].repeat_interleave(
        copies.shape[1], dim=0)])  # fmt: skip


def _class_weights(targets: Tensor, count: int) -> Tensor:
    """Factors by which every class counts alike, the mean over pictures being 1; of several labels, of positives."""
    if targets.ndim == 2:
        positive = targets.sum(dim=0).clamp_min(1)
        return (len(targets) - positive).clamp_min(1) / positive
    seen = torch.bincount(targets, minlength=count).clamp_min(1)
    return len(targets) / (int((seen > 0).sum()) * seen.double())


def _sample_weights(targets: Tensor, count: int, balance: bool) -> Tensor | None:
    if not balance or targets.ndim == 2:
        return None
    weights = _class_weights(targets, count)[targets]
    return weights / weights.mean()


def _choose(vectors: Tensor, copies: Tensor, targets: Tensor, count: int, apart: list[np.ndarray], balance: bool) -> (
    _Choice
):  # fmt: skip
    """The penalty with the least cross-entropy where it was not learned from; the stronger of equals."""
    starts: list[Linear | None] = [None] * len(apart)
    prepared = []
    for part in apart:
        held = torch.from_numpy(part)
        rest, known = _rows(vectors, copies, targets, ~held)
        standard = Standard.of(rest)
        prepared.append((held, standard, standard(rest), known, _sample_weights(known, count, balance)))
    best, since = None, 0
    weights = _class_weights(targets, count) if balance and targets.ndim == 1 else None
    for penalty in PENALTIES:
        said = vectors.new_full((len(vectors), count), torch.nan)
        for place, (held, standard, rest, known, weight) in enumerate(prepared):
            layer = solve(rest, known, count, penalty, starts[place], weights=weight)
            starts[place] = layer
            said[held] = standard(vectors[held]) @ layer.weight + layer.bias
        there = ~said[:, 0].isnan()
        scaled = None if weights is None else weights.to(said)
        loss = float(cross_entropy(said[there], targets[there], scaled))
        if best is None or loss < best.loss:
            best, since = _Choice(penalty, said, loss), 0
        else:
            since += 1
        if since == 2:
            break
    assert best is not None
    return best


@dataclass(frozen=True)
class _Layer:
    """A layer fitted to all of train, and the choice that led to it."""

    standard: Standard
    linear: Linear
    choice: _Choice | None
    penalty: float

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.standard(vectors) @ self.linear.weight + self.linear.bias


def _layer(vectors: Tensor, copies: Tensor, targets: Tensor, penalty: float, count: int, balance: bool) -> _Layer:
    every = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    rows, known = _rows(vectors, copies, targets, every)
    standard = Standard.of(rows)
    linear = solve(standard(rows), known, count, penalty, weights=_sample_weights(known, count, balance))
    return _Layer(standard, linear, None, penalty)


def stack(targets: Sequence[Any], facts: Mapping[str, Any]) -> Tensor:
    """Targets as numbers of classes [B], or as zeros and ones [B K] where there may be several."""
    if facts["several"]:
        found = torch.zeros(len(targets), len(facts["classes"]))
        for row, some in enumerate(targets):
            found[row, list(some)] = 1.0
        return found
    return torch.tensor(targets, dtype=torch.int64)


def _can_choose(targets: Tensor, count: int) -> bool:
    """Whether there are labels enough to hold some out."""
    if targets.ndim == 2:
        return len(targets) >= 2 * CHOOSES * 5
    return int(torch.bincount(targets, minlength=count).median()) >= CHOOSES


def fit(seen: Vectors, examples: Examples, settings: Settings) -> Fitted:
    """The head on frozen features: pooling, penalty and temperature by what was held out, then all of train."""
    began = time.perf_counter()
    names, several = list(examples.facts["classes"]), bool(examples.facts["several"])
    learned, targets, apart, some = _learned(seen, examples)
    where, count = device(), len(names)
    known = targets.to(where)

    def looked_at(pooling: str, places: np.ndarray) -> tuple[Tensor, Tensor]:
        return seen.of(pooling, places).to(where), seen.copied(pooling, places).to(where)

    tried: dict[str, _Choice] = {}
    if chosen := _can_choose(targets, count):
        for pooling in seen.poolings():
            parts = [part[some] for part in apart]
            of = looked_at(pooling, learned[some])
            tried[pooling] = _choose(*of, known[torch.from_numpy(some)], count, parts, settings.balance)
        pooling = min(tried, key=lambda name: tried[name].loss)
        penalty = tried[pooling].penalty
    else:
        pooling = seen.poolings()[0]
        penalty = STRENGTH * seen.of(pooling, learned[:1]).shape[1] / len(learned)
    layer = _layer(*looked_at(pooling, learned), known, penalty, count, settings.balance)
    head = Head(pooling, layer.linear.weight.shape[0], names, several)
    with torch.no_grad():
        head.shift.copy_(layer.standard.mean)
        head.scale.copy_(1 / layer.standard.spread)
        head.linear.weight.copy_(layer.linear.weight.T)
        head.linear.bias.copy_(layer.linear.bias)
    said: dict[str, Any] = {"pooling": pooling, "penalty": penalty}
    if chosen:
        found = tried[pooling].logits
        there = ~found[:, 0].isnan()
        said |= calibrate(head, found[there], known[torch.from_numpy(some)][there], settings)
        said["poolings"] = {name: {"loss": round(one.loss, 4), "penalty": one.penalty} for name, one in tried.items()}
        said["by"] = f"{int(there.sum())} pictures of train that were not learned from, in {len(apart)} part(s)"
    else:
        said["by"] = "nothing: too few labels to hold any out; penalty by a fixed rule, no temperature"
    return Fitted(head.eval(), {**said, "seconds": round(time.perf_counter() - began, 2)})


def fresh(encoder: Encoder, examples: Examples, settings: Settings) -> Fitted:
    """A head that knows nothing, on the vector that the family pools."""
    config = encoder.backbone.config
    pooling = "mean" if config.pooling == "mean" else "cls"
    head = Head(pooling, int(config.width), list(examples.facts["classes"]), bool(examples.facts["several"]))
    return Fitted(head, {"pooling": pooling})


def _learned(seen: Vectors, examples: Examples) -> tuple[np.ndarray, Tensor, list[np.ndarray], np.ndarray]:
    """Places of what is learned from, targets, the folds, and places among them of those that choose."""
    learned = seen.places(examples.learned)
    rows = seen.rows[learned]
    targets = stack([examples.targets[row] for row in rows.tolist()], examples.facts)
    held = np.isin(rows, examples.held)
    some = np.arange(len(rows))
    if len(rows) > SWEPT:
        some = np.sort(np.random.default_rng(0).permutation(len(rows))[:SWEPT])
    apart = folds(examples.names(rows), held)
    return learned, targets, apart, some


def calibrate(head: Head, outputs: Tensor, targets: Tensor, settings: Settings) -> dict[str, Any]:
    """Sets the head's temperature by outputs of what was held out; cross-entropy and error before and after there."""
    logits, targets = outputs.float().cpu(), targets.cpu()
    temperature = fitted_temperature(logits, targets)
    head.temperature.fill_(temperature)
    return {"temperature": round(temperature, 4), "held_out": {**score(logits, targets, settings),
            **_calibrated(logits, targets, temperature, head.several)}}  # fmt: skip


def _calibrated(logits: Tensor, targets: Tensor, temperature: float, several: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"nll": {}, "ece": {}}
    for when, value in (("before", 1.0), ("after", temperature)):
        found["nll"][when] = round(float(cross_entropy(logits / value, targets)), 4)
        chances = probabilities(logits, value, several)
        found["ece"][when] = round(expected_error(chances, targets), 3)
    return found


def chance(facts: Mapping[str, Any]) -> float:
    """Cross-entropy of even odds."""
    return math.log(2 if facts["several"] else len(facts["classes"]))


def loss(
    outputs: Float[Tensor, "b k"], targets: Tensor, settings: Settings, facts: Mapping[str, Any]
) -> Float[Tensor, ""]:
    """Cross-entropy; `targets` are numbers of classes, or shares [B K] of mixed pictures and of several labels."""
    if facts["several"]:
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))
    weights = None
    if settings.balance:
        seen = torch.tensor([facts["counts"][name] for name in facts["classes"]], device=outputs.device).clamp_min(1)
        weights = (seen.sum() / (len(seen) * seen)).to(outputs.dtype)
    return F.cross_entropy(outputs, targets, weight=weights)


def score(outputs: Tensor, targets: Tensor, settings: Settings) -> dict[str, float]:
    """Percent right (of classes alike, if balanced), or mean average precision of several; and cross-entropy."""
    outputs, targets = outputs.float().cpu(), targets.cpu()
    nll = round(float(cross_entropy(outputs, targets)), 4)
    if targets.ndim == 2:
        pairs = zip(outputs.T.numpy(), targets.T.numpy(), strict=True)
        each = [average_precision(said, truth) for said, truth in pairs]
        return {"map": round(float(np.mean([value for value in each if value is not None] or [0.0])), 3), "loss": nll}
    right = (outputs.argmax(dim=1) == targets).double()
    if not settings.balance:
        return {"accuracy": round(100 * float(right.mean()), 3), "loss": nll}
    recalls = [float(right[targets == k].mean()) for k in targets.unique()]
    return {"balanced_accuracy": round(100 * float(np.mean(recalls)), 3), "loss": nll}


def again(head: Head, seen: Vectors, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Outputs of rows that were looked at: which of them could be read, and their logits."""
    places = seen.places(rows)
    with torch.inference_mode():
        return seen.rows[places], head.cpu().logits(seen.of(head.pooling, places))


def scores(told: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of pictures whose class is known: shares right, each class, who is taken for whom, and what probabilities are
    worth before and after the temperature. Empty where none is known."""
    known = [one for one in told if one["_target"] is not None]
    if not known:
        return {}
    names, several = facts["classes"], bool(facts["several"])
    logits = torch.stack([one["_logits"] for one in known])
    targets = stack([one["_target"] for one in known], facts)
    calibrated = _calibrated(logits, targets, known[0]["_temperature"], several)
    if several:
        return {**_of_several(logits, targets, names), "pictures": len(known), **calibrated}
    labels_, predicted = targets.numpy(), logits.argmax(dim=1).numpy()
    table = confusion(labels_, predicted, len(names))
    each = report(table.diagonal(), table.sum(axis=1), table.sum(axis=0), names)
    return {
        "accuracy": round(100 * float((labels_ == predicted).mean()), 3),
        "balanced_accuracy": macro(each, "recall"), "macro_f1": macro(each, "f1"),
        "pictures": len(known), **calibrated, "classes": each, "confusion": table.tolist(), "worst": _worst(known),
    }  # fmt: skip


def _of_several(logits: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    said, truth = (logits >= 0).numpy(), targets.numpy().astype(bool)  # a temperature moves no sign
    hits = (said & truth).sum(axis=0)
    each = report(hits, truth.sum(axis=0), said.sum(axis=0), names)
    for place, name in enumerate(names):
        each[name]["average_precision"] = average_precision(logits[:, place].numpy(), truth[:, place])
    found = [one["average_precision"] for one in each.values() if one["average_precision"] is not None]
    return {
        "map": round(float(np.mean(found)), 3) if found else None, "macro_f1": macro(each, "f1"),
        "micro_f1": share(2 * float(hits.sum()), float(truth.sum() + said.sum())),
        "all_right": round(100 * float((said == truth).all(axis=1).mean()), 3), "classes": each,
    }  # fmt: skip


def _worst(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Most sure of a wrong class first."""
    wrong = [one for one in known if one["label"] != one["predicted"]]
    wrong.sort(key=lambda one: (-one["confidence"], one["key"]))
    return [{name: one[name] for name in ("key", "label", "predicted", "confidence")} for one in wrong[:WORST]]


def measure(told: list[dict[str, Any]], seen: Vectors, examples: Examples, settings: Settings) -> dict[str, Any]:
    """Scores on test, beside the commonest class and raw pixels, and how far they are from pixels."""
    found = scores(told, examples.facts)
    learned, targets, apart, some = _learned(seen, examples)
    at = {examples.keys[row]: row for row in examples.test.tolist()}
    rows = np.array([at[one["key"]] for one in told], dtype=np.int64)
    tested = stack([one["_target"] for one in told], examples.facts)
    count = len(examples.facts["classes"])
    copies = seen.small.new_zeros(len(learned), 0, seen.pixels(learned[:1]).shape[1], dtype=torch.float32)
    pixels = seen.pixels(learned)
    if _can_choose(targets, count):
        part = apart[0][some]
        choice = _choose(pixels[some], copies[some], targets[some], count, [part], settings.balance)
        penalty = choice.penalty
    else:
        penalty = STRENGTH * pixels.shape[1] / len(learned)
    layer = _layer(pixels, copies, targets, penalty, count, settings.balance)
    rival = layer(seen.pixels(seen.places(rows)))
    baselines: dict[str, Any] = {"pixels": {name: value for name, value in score(rival, tested, settings).items()
                                            if name != "loss"}}  # fmt: skip
    if targets.ndim == 2:
        rates = targets.mean(dim=0).expand(len(tested), -1)
        blind = _of_several(rates - 0.5, tested, examples.facts["classes"])
        baselines["prior"] = {"map": blind["map"], "micro_f1": blind["micro_f1"]}
        return {**found, "baselines": baselines}
    baselines |= _blind(targets.numpy(), tested.numpy(), examples, seen.rows[learned], rows)
    ours = np.array([one["label"] == one["predicted"] for one in told])[None]
    theirs = (rival.argmax(dim=1) == tested).numpy()[None]
    named = examples.names(rows)
    gain = difference(ours, theirs, named)
    doubt = difference(ours, np.zeros_like(ours), named)["two_standard_errors"]
    return {
        **found, "two_standard_errors": round(doubt, 3), "baselines": baselines,
        "difference": {"against": "pixels", **{k: round(v, 3) if isinstance(v, float) else v for k, v in gain.items()}},
    }  # fmt: skip


def _blind(
    learned: np.ndarray, tested: np.ndarray, examples: Examples, rows: np.ndarray, others: np.ndarray
) -> dict[str, Any]:
    """What is scored without looking at a picture."""
    found: dict[str, Any] = {"majority": {"accuracy": round(majority(learned, tested), 3)}}
    if examples.groups is not None:
        known = group_majority(learned, examples.names(rows), tested, examples.names(others))
        found["group_majority"] = {name: round(value, 3) for name, value in known.items()}
    return found


def known(source: Source, facts: Mapping[str, Any]) -> tuple[list[Any], Counter[str]]:
    """Targets of a source as far as it says them, and how often each class came that was never learned."""
    return known_labels(source, facts)


def sections(told: list[dict[str, Any]], examples: Examples, result: Mapping[str, Any]) -> list[Section]:
    """Scores beside baselines, each class, who is taken for whom, and the pictures it got most wrong."""
    return of_classes(examples, result)

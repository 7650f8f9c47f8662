"""A number, or several, of each picture: ridge regression on features in closed form, beside the mean predictor.

Pooling and penalty are chosen on what is held out of train. The backbone may move too: the loss is the squared error.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saccade.data import Source
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, nearest
from saccade.evaluate.labelled import SHARE, read_labelled
from saccade.evaluate.linear import Standard
from saccade.evaluate.splits import set_apart
from saccade.finetune.folds import folds
from saccade.finetune.frozen import Vectors, pooled, vectors
from saccade.finetune.labels import once
from saccade.finetune.task import Aside, Examples, Fitted, Picture, TaskSettings
from saccade.finetune.task import Head as AnyHead
from saccade.report.page import Section, Table
from saccade.settings import FinetuneArguments, Looking
from saccade.sources import Files, open_source
from saccade.sources.strings import Strings
from saccade.vit import Features

PENALTIES = (100.0, 10.0, 1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-6)
"""Features have spread 1, the squared error is a mean; the largest says little else than the mean of train."""


class Settings(TaskSettings, Looking):
    """Which numbers are to be learned."""

    target: tuple[str, ...] = Field(("label",), description="column of the list that holds the number, or several: a,b")


def _numbers(source: Source, columns: Sequence[str], data: Any) -> list[tuple[float, ...] | str]:
    """The numbers of each row, or why there are none. Raises `SaccadeError` where there is no such column."""
    have = [*source.columns] if isinstance(source, Files) else []
    for column in columns:
        if isinstance(source, Files) and column not in have:
            hint = nearest(column, have) if have else "a list (.csv, .tsv, .jsonl) has columns"
            raise SaccadeError(f"{data} has no column {column!r}", path="--target", hint=hint)
    found: list[tuple[float, ...] | str] = []
    for row in range(len(source)):
        said = [source.columns[c][row] if isinstance(source, Files) else source.label(row) or "" for c in columns]
        try:
            values = tuple(float(text) for text in said)
            bad = next((text for text, value in zip(said, values, strict=True) if not math.isfinite(value)), None)
        except ValueError:
            values, bad = (), next(text for text in said if not _is_number(text))
        found.append(values if bad is None else f"{bad!r} is no number" if bad else "no number")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read(data: str | Path | Source, encoder: Encoder, asked: FinetuneArguments, settings: Settings) -> Examples:
    """Pictures with numbers by their parts. Raises `SaccadeError`."""
    prepare = encoder.preprocess
    source = open_source(data, short_side=prepare.canvas, channels=prepare.channels)
    numbers = _numbers(source, settings.target, data)
    aside = [Aside(source.key(row), reason) for row, reason in enumerate(numbers) if isinstance(reason, str)]
    good = [values for values in numbers if isinstance(values, tuple)]
    if len({values[0] for values in good}) < 2:
        raise SaccadeError(f"{data} has {'one number only' if good else 'no numbers'}", path="--target",
                           hint=f"look at the column {settings.target[0]!r}")  # fmt: skip
    middle = float(np.median([values[0] for values in good]))
    if isinstance(source, Files):  # the two halves stand where classes do, so that parts are made as everywhere
        halves = ["" if isinstance(one, str) else "low" if one[0] < middle else "high" for one in numbers]
        source = dataclasses.replace(source, columns={**source.columns, "label": Strings(halves)})
    found = read_labelled(source, asked.group_by, prepare.canvas, prepare.channels)
    taken = once(found.keys, numbers, aside)
    usable = [taken[row] and isinstance(numbers[row], tuple) for row in range(len(numbers))]
    train, test = (np.array([row for row in part.tolist() if usable[row]], dtype=np.int64)
                   for part in (found.train, found.test))  # fmt: skip
    used = {*train.tolist(), *test.tolist()}
    aside += [Aside(key, "neither in train nor in test") for row, key in enumerate(found.keys)
              if usable[row] and row not in used]  # fmt: skip
    named = found.keys if found.groups is None else found.groups
    apart = set_apart([named[row] for row in train.tolist()], SHARE, "hold-out")
    known = np.array([numbers[row] for row in train.tolist()])
    spread = np.where(known.std(axis=0) > 0, known.std(axis=0), 1.0)
    facts = {"targets": list(settings.target), "mean": known.mean(axis=0).tolist(), "spread": spread.tolist()}
    made = {name: value for name, value in found.split.items() if name.startswith("made") or name.endswith("groups")}
    split = {**made, "train": int((~apart).sum()), "held": int(apart.sum()), "test": len(test)}
    targets = [values if isinstance(values, tuple) else None for values in numbers]
    warnings = [line for line in found.warnings if "'low'" not in line and "'high'" not in line]
    return Examples(
        source, found.keys, targets, train[~apart], train[apart], test, facts, found.groups, split, warnings, aside
    )


def see(encoder: Encoder, examples: Examples, settings: Settings, asked: FinetuneArguments) -> Vectors:
    """Vectors of all pictures, and of augmented copies of those that are learned from."""
    rows = np.concatenate([examples.learned, examples.test])
    return vectors(
        encoder, examples.source, rows, looking=settings, seed=asked.seed, copied=examples.learned,
        cache=asked.cache, workers=asked.workers,
    )  # fmt: skip


class Head(AnyHead):
    """A linear layer on pooled, standardised features: numbers in units of their spread, and in their own."""

    answers = ("values",)

    def __init__(
        self, pooling: str, width: int, targets: Sequence[str], mean: Sequence[float], spread: Sequence[float]
    ):
        super().__init__()
        self.pooling, self.targets, self.mean, self.spread = pooling, list(targets), list(mean), list(spread)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, len(self.targets))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.tokens = {"cls": "cls", "mean": "patches"}.get(pooling, "all")  # type: ignore[assignment]

    shift: Tensor
    scale: Tensor

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Float[Tensor, "b t"]:
        """How many spreads above the mean of train."""
        return self.of(pooled(features, self.pooling))

    def of(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b t"]:
        """Of vectors that are pooled already."""
        found: Tensor = self.linear((vectors - self.shift) * self.scale)
        return found

    def answer(self, outputs: Float[Tensor, "b t"]) -> tuple[Tensor, ...]:
        """In their own units."""
        outputs = outputs.float()
        return (outputs * outputs.new_tensor(self.spread) + outputs.new_tensor(self.mean),)

    def config(self) -> dict[str, Any]:
        """Its pooling, width, and what numbers mean."""
        return {
            "pooling": self.pooling, "width": len(self.shift), "targets": self.targets, "mean": self.mean,
            "spread": self.spread,
        }  # fmt: skip

    def told(self, outputs: Sequence[Tensor], pictures: Sequence[Picture], folder: Path | None) -> list[dict[str, Any]]:
        """Each number by the name of its column, and beside it the true one."""
        (values,) = self.answer(torch.stack(list(outputs)).cpu())
        found = []
        for picture, row in zip(pictures, values.tolist(), strict=True):
            line: dict[str, Any] = {"predicted": dict(zip(self.targets, row, strict=True)), "_target": picture.target}
            if picture.target is not None:
                line["label"] = dict(zip(self.targets, picture.target, strict=True))
            found.append({**line, "_values": row})
        return found


def _ridge(x: Float[Tensor, "n d"], y: Float[Tensor, "n t"]) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases that minimise mean squared error + penalty * |weight|², for each of `PENALTIES`."""
    middle, centre = x.mean(dim=0), y.mean(dim=0)
    inside = x - middle
    if len(x) < x.shape[1]:  # the optimum lies in the rows' span
        values, axes = torch.linalg.eigh(inside @ inside.T / len(x))
        turned = axes.T @ (y - centre)
        solved = [inside.T @ (axes @ (turned / (values.clamp_min(0) + p)[:, None])) / len(x) for p in PENALTIES]
    else:
        values, axes = torch.linalg.eigh(inside.T @ inside / len(x))
        turned = axes.T @ (inside.T @ (y - centre) / len(x))
        solved = [axes @ (turned / (values.clamp_min(0) + p)[:, None]) for p in PENALTIES]
    return [(weight, centre - middle @ weight) for weight in solved]


def _choose(x: Tensor, copies: Tensor, y: Tensor, apart: list[np.ndarray]) -> tuple[int, float, Tensor]:
    """Which penalty errs least where it was not learned from, its mean squared error there, and what it said."""
    said = x.new_full((len(PENALTIES), *y.shape), torch.nan)
    for part in apart:
        held = torch.from_numpy(part)
        rest, known = _rows(x, copies, y, ~held)
        standard = Standard.of(rest)
        there = standard(x[held])
        for place, (weight, bias) in enumerate(_ridge(standard(rest), known)):
            said[place, held] = there @ weight + bias
    seen = ~said[0, :, 0].isnan()
    errors = (said[:, seen] - y[seen]).square().mean(dim=(1, 2))
    best = int(errors.argmin())
    return best, float(errors[best]), said[best]


def _rows(x: Tensor, copies: Tensor, y: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    again = copies[some].flatten(0, 1)
    return torch.cat([x[some], again]), torch.cat([y[some], y[some].repeat_interleave(copies.shape[1], dim=0)])


def stack(targets: Sequence[Any], facts: Mapping[str, Any]) -> Float[Tensor, "b t"]:
    """Numbers in units of their spread in train, from its mean."""
    values = torch.tensor(np.array(targets, dtype=np.float64))
    return ((values - torch.tensor(facts["mean"])) / torch.tensor(facts["spread"])).float()


def _learned(seen: Vectors, examples: Examples) -> tuple[np.ndarray, Tensor, list[np.ndarray]]:
    learned = seen.places(examples.learned)
    rows = seen.rows[learned]
    targets = stack([examples.targets[row] for row in rows.tolist()], examples.facts).double()
    return learned, targets, folds(examples.names(rows), np.isin(rows, examples.held))


def fit(seen: Vectors, examples: Examples, settings: Settings) -> Fitted:
    """The head on frozen features: pooling and penalty by what was held out, then all of train."""
    began = time.perf_counter()
    learned, targets, apart = _learned(seen, examples)
    tried: dict[str, tuple[int, float, Tensor]] = {}
    for pooling in seen.poolings():
        x, copies = seen.of(pooling, learned).double(), seen.copied(pooling, learned).double()
        tried[pooling] = _choose(x, copies, targets, apart)
    pooling = min(tried, key=lambda name: tried[name][1])
    place, _, said = tried[pooling]
    every = torch.ones(len(learned), dtype=torch.bool)
    x, copies = seen.of(pooling, learned).double(), seen.copied(pooling, learned).double()
    rows, known = _rows(x, copies, targets, every)
    standard = Standard.of(rows)
    weight, bias = _ridge(standard(rows), known)[place]
    facts = examples.facts
    head = Head(pooling, len(weight), facts["targets"], facts["mean"], facts["spread"])
    with torch.no_grad():
        head.shift.copy_(standard.mean)
        head.scale.copy_(1 / standard.spread)
        head.linear.weight.copy_(weight.T)
        head.linear.bias.copy_(bias)
    there = ~said[:, 0].isnan()
    chosen = {
        "pooling": pooling, "penalty": PENALTIES[place], "held_out": score(said[there], targets[there], settings),
        "poolings": {name: {"loss": round(one[1], 4)} for name, one in tried.items()},
        "by": f"{int(there.sum())} pictures of train that were not learned from, in {len(apart)} part(s)",
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip
    return Fitted(head.eval(), chosen)


def fresh(encoder: Encoder, examples: Examples) -> Fitted:
    """A head that says the mean, on the vector that the family pools."""
    config, facts = encoder.backbone.config, examples.facts
    pooling = "mean" if config.pooling == "mean" else "cls"
    head = Head(pooling, int(config.width), facts["targets"], facts["mean"], facts["spread"])
    return Fitted(head, {"pooling": pooling})


def chance(facts: Mapping[str, Any]) -> float:
    """The squared error of the mean, in spreads."""
    return 1.0


def loss(
    outputs: Float[Tensor, "b t"], targets: Float[Tensor, "b t"], settings: Settings, facts: Mapping[str, Any]
) -> Float[Tensor, ""]:
    """The squared error, every number in units of its spread."""
    return (outputs - targets).square().mean()


def score(outputs: Tensor, targets: Tensor, settings: Settings) -> dict[str, float]:
    """The part of the variance that is told (R2), the mean over targets; and the squared error."""
    outputs, targets = outputs.double().cpu(), targets.double().cpu()
    return {"r2": round(float(_r2(outputs, targets).mean()), 4),
            "loss": round(float((outputs - targets).square().mean()), 5)}  # fmt: skip


def _r2(said: Float[Tensor, "n t"], truth: Float[Tensor, "n t"]) -> Float[Tensor, " t"]:
    """1 - squared error over variance; 0 where there is nothing to tell."""
    around = (truth - truth.mean(dim=0)).square().sum(dim=0)
    return torch.where(around > 0, 1 - (said - truth).square().sum(dim=0) / around.clamp_min(1e-300), 0.0)


def again(head: Head, seen: Vectors, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Outputs of rows that were looked at."""
    places = seen.places(rows)
    with torch.inference_mode():
        return seen.rows[places], head.cpu().of(seen.of(head.pooling, places))


def scores(told: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """R2, mean absolute and root mean square error of pictures whose numbers are known; of each target too."""
    known = [one for one in told if one["_target"] is not None]
    if not known:
        return {}
    said, truth = (torch.tensor([one[name] for one in known], dtype=torch.float64) for name in ("_values", "_target"))
    return {**_errors(said, truth, facts["targets"]), "pictures": len(known)}


def _errors(said: Tensor, truth: Tensor, names: Sequence[str]) -> dict[str, Any]:
    r2, off = _r2(said, truth), said - truth
    each = {
        name: {"r2": round(float(r2[n]), 4), "mean_absolute_error": _digits(float(off[:, n].abs().mean())),
               "root_mean_square_error": _digits(float(off[:, n].square().mean().sqrt()))}
        for n, name in enumerate(names)
    }  # fmt: skip
    whole: dict[str, Any] = {"r2": round(float(r2.mean()), 4)}
    return whole | (each[names[0]] if len(names) == 1 else {"targets": each})


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def measure(told: list[dict[str, Any]], seen: Vectors, examples: Examples, settings: Settings) -> dict[str, Any]:
    """Scores on test beside the mean of train and raw pixels."""
    learned, targets, apart = _learned(seen, examples)
    at = {examples.keys[row]: row for row in examples.test.tolist()}
    rows = np.array([at[one["key"]] for one in told], dtype=np.int64)
    truth = torch.tensor([examples.targets[row] for row in rows.tolist()], dtype=torch.float64)
    pixels = seen.pixels(learned).double()
    copies = pixels.new_zeros(len(learned), 0, pixels.shape[1])
    place, _, _ = _choose(pixels, copies, targets, apart[:1])
    standard = Standard.of(pixels)
    weight, bias = _ridge(standard(pixels), targets)[place]
    said = standard(seen.pixels(seen.places(rows)).double()) @ weight + bias
    spread, mean = (torch.tensor(examples.facts[name], dtype=torch.float64) for name in ("spread", "mean"))
    names = examples.facts["targets"]
    return {
        **scores(told, examples.facts),
        "baselines": {"pixels": _errors(said * spread + mean, truth, names),
                      "mean": _errors(mean.expand_as(truth), truth, names)},
    }  # fmt: skip


def known(source: Source, facts: Mapping[str, Any]) -> tuple[list[Any], Counter[str]]:
    """The numbers that a source has, where it has all of them."""
    if not isinstance(source, Files) or not set(facts["targets"]) <= source.columns.keys():
        return [None] * len(source), Counter()
    found = _numbers(source, facts["targets"], source.root)
    return [one if isinstance(one, tuple) else None for one in found], Counter()


def sections(told: list[dict[str, Any]], examples: Examples, result: Mapping[str, Any]) -> list[Section]:
    """A table of errors beside those of pixels and of the mean."""
    names = examples.facts["targets"]
    rows = []
    for who, found in (("this model", result), *result["baselines"].items()):
        for name in names:
            one = found if len(names) == 1 else found["targets"][name]
            rows.append(
                [
                    who,
                    name,
                    f"{one['r2']:.3f}",
                    f"{one['mean_absolute_error']:.4g}",
                    f"{one['root_mean_square_error']:.4g}",
                ]
            )
    table = Table("On test", ["", "target", "R2", "mean absolute error", "root mean square error"], rows, numbers=True)
    return [Section("Scores", "On test, which nothing was chosen by.", [table])]

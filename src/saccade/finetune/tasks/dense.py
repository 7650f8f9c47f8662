"""A number for every pixel (depth, height, a density): PART/images/X.jpg and PART/targets/X.png, .tif or .npy.

Ridge regression on patches interpolated at pixels, or a small decoder over several depths, whichever does better on
what is held out of train; errors on test beside the mean, a linear layer on colour and place, and the same head on an
untrained network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saccade.data import Batch, Source
from saccade.draws import Draws
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.linear import PENALTIES, Standard
from saccade.evaluate.segmentation import compared
from saccade.finetune import beside, cropping, paint, pictured, pixelwise, rivals, task
from saccade.finetune.measured import FOLDER, Measured, measured_part, read_measured
from saccade.finetune.pixelwise import Goal, Solved
from saccade.report.page import Section
from saccade.settings import FinetuneArguments, TuningSettings


class Settings(pixelwise.MapSettings):
    """The flags of `--task dense`."""

    unit: float = Field(1.0, gt=0, description="numbers of the files are divided by it: 256 for KITTI, 1000 for mm")
    unknown: float | None = Field(
        None, description="number that says nothing, often 0 in depth; NaN and infinity never do"
    )


def read(data: Any, encoder: Encoder, asked: FinetuneArguments, settings: Settings) -> task.Examples:
    """The pictures of train/ and test/ (or val/) that have numbers. Raises `SaccadeError` where too little is there."""
    if isinstance(data, Source):
        raise SaccadeError("numbers of pixels are read from a folder", path="DATA", hint="give its path")
    parts = read_measured(data, encoder.preprocess.channels, settings.unit, settings.unknown)
    sums = np.zeros(3)

    def note(side: str, numbers: Tensor) -> str | None:
        known = numbers[torch.isfinite(numbers)].double()
        if not len(known):
            return "no pixel has a number"
        if side == "train":
            sums[:] += [len(known), float(known.sum()), float((known * known).sum())]
        return None

    found = beside.examples(parts, asked.group_by, note)
    count, total, squares = sums.tolist()
    mean = total / count
    spread = max(squares / count - mean * mean, 0.0) ** 0.5
    if spread <= 1e-9 * max(1.0, abs(mean)):
        raise SaccadeError(f"every number of train is {mean:g}", path=str(data), hint="there is nothing to learn")
    facts = {"mean": mean, "spread": spread, "unit": settings.unit, "unknown": settings.unknown}
    return dataclasses.replace(found, facts=facts)


def see(encoder: Encoder, examples: task.Examples, settings: Settings, asked: FinetuneArguments) -> pixelwise.Seen:
    """Maps of all pictures to learn from."""
    return pixelwise.observe(encoder, examples, settings, asked.seed)


def _goal(facts: Mapping[str, Any]) -> Goal:
    """Numbers with mean 0 and spread 1 in train, by squared error."""

    def wanted(targets: Tensor) -> Tensor:
        return (targets - facts["mean"]) / facts["spread"]

    def loss(outputs: Float[Tensor, "n 1"], targets: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return (outputs[:, 0] - wanted(targets)).square().mean()

    def score(outputs: Float[Tensor, "n 1"], targets: Float[Tensor, " n"]) -> float:
        truth = wanted(targets)
        return 100 * (1 - float((outputs[:, 0] - truth).square().mean() / truth.var(correction=0).clamp_min(1e-12)))

    def solve(
        rows: Float[Tensor, "n d"], targets: Float[Tensor, " n"], held: Bool[Tensor, " n"], whole: bool
    ) -> Solved:
        return _ridge(rows, wanted(targets), held, whole, lambda outputs: score(outputs[:, None], targets[held]))

    return Goal(1, torch.isfinite, loss, score, solve)


def _ridge(
    rows: Float[Tensor, "n d"], targets: Float[Tensor, " n"], held: Bool[Tensor, " n"], whole: bool, score: Any
) -> Solved:
    """The penalty that scores best on the pixels held out, then fitted to these too if wanted; standardised."""

    def fitted(features: Tensor, numbers: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        standard = Standard.of(features)
        x, middle = standard(features).double(), numbers.double().mean()
        products = x.T @ x / len(x)
        products.diagonal().add_(penalty + 1e-9)
        weight = torch.linalg.solve(products, x.T @ (numbers.double() - middle) / len(x))
        weight = weight / standard.spread.double()
        return weight.float(), (middle - standard.mean.double() @ weight).float()

    scores = {}
    for penalty in PENALTIES:
        weight, bias = fitted(rows[~held], targets[~held], penalty)
        scores[penalty] = score(rows[held] @ weight + bias)
    best = max(scores, key=lambda penalty: (scores[penalty], penalty))
    learned = torch.ones_like(held) if whole else ~held
    weight, bias = fitted(rows[learned], targets[learned], best)
    return Solved(weight[:, None], bias[None], best, scores[best])


class Head(pixelwise.MapHead):
    """A number for every pixel, as spreads of train from its mean."""

    answers: ClassVar[tuple[str, ...]] = ("numbers",)

    def __init__(self, mean: float, spread: float, **said: Any):
        super().__init__(**said)
        self.mean, self.spread = mean, spread

    def config(self) -> dict[str, Any]:
        """What builds one like it."""
        return {**super().config(), "mean": self.mean, "spread": self.spread}

    def answer(self, outputs: Float[Tensor, "b 1 h w"]) -> tuple[Tensor, ...]:
        """Numbers as the files have them, in their unit."""
        return (outputs * self.spread + self.mean,)

    def told(
        self, outputs: Sequence[Tensor], pictures: Sequence[task.Picture], folder: Path | None
    ) -> list[dict[str, Any]]:
        """Of each picture the mean and the range; numbers as .npy and a picture of them go into `folder`."""
        return [self._told(one, picture, folder) for one, picture in zip(outputs, pictures, strict=True)]

    def _told(self, outputs: Float[Tensor, "1 h w"], picture: task.Picture, folder: Path | None) -> dict[str, Any]:
        numbers = self.answer(outputs[None])[0][0, 0].float().cpu()
        said: dict[str, Any] = {
            name: round(float(value), 5)
            for name, value in (("mean", numbers.mean()), ("lowest", numbers.min()), ("highest", numbers.max()))
        }
        if picture.target is not None:
            sums = _sums(numbers, picture.target)
            said |= {"rmse": _rounded(float(_rmse(sums))), "_sums": sums}
        if folder is not None:
            name = Path("numbers") / Path(picture.key).with_suffix(".npy")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, numbers.numpy())
            said["numbers"] = name.as_posix()
            if picture.pixels is not None:
                over = Path("overlays") / Path(picture.key).with_suffix(".jpg")
                reach = (self.mean - 2 * self.spread, self.mean + 2 * self.spread)
                said["_shown"] = paint.overlay(picture.pixels, paint.heat(numbers, *reach), folder / over)
                said["overlay"] = over.as_posix()
        return said


def fit(seen: pixelwise.Seen, examples: task.Examples, settings: Settings) -> task.Fitted:
    """The head that does best on the part held out."""
    whole = len(examples.held) > 0  # else it is to judge a backbone that moves
    learned = pixelwise.learn(seen, _goal(examples.facts), settings, whole=whole)
    return task.Fitted(_head(learned, seen.encoder, examples.facts, settings), learned.chosen)


def fresh(encoder: Encoder, examples: task.Examples, settings: Settings) -> task.Fitted:
    """A head that knows nothing."""
    learned = pixelwise.unlearned(encoder, 1, settings)
    return task.Fitted(_head(learned, encoder, examples.facts, settings), learned.chosen)


def _head(learned: pixelwise.Learned, encoder: Encoder, facts: Mapping[str, Any], settings: Settings) -> Head:
    head = Head(
        mean=facts["mean"], spread=facts["spread"], kind=learned.kind, widths=learned.widths, outputs=1,
        channels=encoder.backbone.config.channels, scale=settings.scale, overlap=settings.overlap,
    )  # fmt: skip
    head.network = learned.network
    return head.to(encoder.device).eval()


def views(
    settings: Settings, config: TuningSettings, batch: Batch, draws: Draws, targets: Sequence[Float[Tensor, "_ _"]]
) -> Batch:
    """A crop of each picture and of its numbers."""
    return cropping.views(settings, batch, draws, config.image_size, targets)


def stack(targets: Sequence[Float[Tensor, "h w"]], facts: Mapping[str, Any]) -> Float[Tensor, "b h w"]:
    """Numbers of pictures of one size."""
    return torch.stack(list(targets))


def chance(facts: Mapping[str, Any]) -> float:
    """The squared error of the mean, in spreads."""
    return 1.0


def loss(
    outputs: Float[Tensor, "b 1 h w"], targets: Float[Tensor, "b h w"], settings: Settings, facts: Mapping[str, Any]
) -> Float[Tensor, ""]:
    """Squared error of the pixels that have a number, in spreads of train."""
    known = torch.isfinite(targets)
    wrong = outputs[:, 0] - (torch.where(known, targets, facts["mean"]) - facts["mean"]) / facts["spread"]
    return (wrong.square() * known).sum() / known.sum().clamp_min(1)


def tally(
    outputs: Float[Tensor, "1 h w"], target: Float[Tensor, "h w"], facts: Mapping[str, Any]
) -> Float[Tensor, " 7"]:
    """Of a picture the sums that scores are made of."""
    numbers = outputs[0].float().cpu() * facts["spread"] + facts["mean"]
    return torch.from_numpy(_sums(numbers, target))


def score(outputs: Float[Tensor, "n 7"], targets: Any, settings: Settings) -> dict[str, float]:
    """Part of the variance that is explained, in percent, of pictures that were tallied."""
    return {"r2": _rounded(float(_r2(outputs.sum(dim=0).numpy())))}


def _sums(numbers: Float[Tensor, "h w"], target: Float[Tensor, "h w"]) -> Float[np.ndarray, " 7"]:
    """Over known pixels: count, errors, their squares, relative errors and where there are any, numbers, squares."""
    known = torch.isfinite(target)
    truth = target[known].double()
    wrong = numbers[known].double() - truth
    some = truth.abs() > 1e-6
    relative = (wrong.abs()[some] / truth.abs()[some]).sum()
    parts = (known.sum(), wrong.abs().sum(), wrong.square().sum(), relative, some.sum(), truth.sum(),
             truth.square().sum())  # fmt: skip
    return np.array([float(part) for part in parts])


def _rmse(sums: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(sums[..., 2] / np.maximum(sums[..., 0], 1)))


def _r2(sums: np.ndarray) -> np.ndarray:
    """Percent, about the mean of the pixels that are examined."""
    count = np.maximum(sums[..., 0], 1)
    variance = sums[..., 6] - sums[..., 5] ** 2 / count
    return np.asarray(100 * (1 - sums[..., 2] / np.maximum(variance, 1e-12)))


def _scores(sums: np.ndarray) -> dict[str, Any]:
    whole = sums.sum(axis=0)
    return {
        "r2": _rounded(float(_r2(whole))), "rmse": _rounded(float(_rmse(whole))),
        "mean_absolute_error": _rounded(float(whole[1] / max(whole[0], 1))),
        "abs_rel": _rounded(float(whole[3] / whole[4])) if whole[4] else None,
    }  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def measure(
    told: list[dict[str, Any]], seen: pixelwise.Seen, examples: task.Examples, settings: Settings
) -> dict[str, Any]:
    """Errors on test in the unit of the numbers, R² and relative errors, beside what must be beaten.

    `abs_rel` is over pixels whose number is not 0. `difference` is in points of R², to the best rival.
    """
    rows = {examples.keys[row]: row for row in examples.test.tolist()}
    examined, facts, goal = [rows[line["key"]] for line in told], examples.facts, _goal(examples.facts)

    def head(other: pixelwise.Seen) -> Head:
        return _head(pixelwise.learn(other, goal, settings, seen.kind), other.encoder, facts, settings)

    count = functools.partial(tally, facts=facts)
    found = rivals.rivals(seen, examples, settings, goal, head, examined, count)
    sums = {name: np.stack([np.asarray(one) for one in each]) for name, each in found.items()}
    none = [examples.targets[row] for row in examined]
    sums["mean"] = np.stack([_sums(torch.full_like(target, facts["mean"]), target) for target in none])
    ours = np.stack([line["_sums"] for line in told])
    rival = max(sums, key=lambda name: float(_r2(sums[name].sum(axis=0))))
    gain = compared(ours, sums[rival], _r2, examples.names(np.array(examined)), seen.seed)
    return {
        **_scores(ours),
        "baselines": {name: _scores(part) for name, part in sums.items()},
        "difference": {**gain, "against": rival},
    }


def scores(told: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of pictures whose numbers are known."""
    sums = [line["_sums"] for line in told if "_sums" in line]
    return _scores(np.stack(sums)) if sums else {}


def opened(
    data: str | Path | Source, encoder: Encoder, facts: Mapping[str, Any]
) -> tuple[Source, Sequence[Any], Mapping[str, int]] | None:
    """The pictures of a folder with images/ and targets/, or of its test/, and their numbers."""

    def part(root: Path, path: Path) -> Measured:
        return measured_part(root, path, encoder.preprocess.channels, facts["unit"], facts["unknown"])

    return beside.opened(data, part, FOLDER)


def sections(told: list[dict[str, Any]], examples: task.Examples, result: Mapping[str, Any]) -> list[Section]:
    """Explained variance beside what must be beaten, and the pictures with the largest errors."""
    worst = [(line, f"RMSE {line['rmse']:.3g}") for line in sorted(told, key=lambda line: -line["rmse"])]
    return pictured.sections(examples, result, "r2", "Variance explained on test, percent", worst)

"""The class of every pixel: PART/images/X.jpg, PART/masks/X.png and classes.txt, as `evaluate` reads them.

A linear layer on patches, or a small decoder over several depths, whichever does better on what is held out of train;
mean IoU on test beside a linear layer on colour and place, and the same head on an untrained network.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from saccade.data import Batch, Source
from saccade.draws import Draws
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate import segmentation
from saccade.evaluate.masked import VOID, Classes, Masked, masked_part, read_masked
from saccade.finetune import beside, cropping, paint, pictured, pixelwise, rivals, task
from saccade.finetune.pixelwise import Goal, Solved
from saccade.report.page import Section
from saccade.settings import FinetuneArguments, TuningSettings


class Settings(pixelwise.MapSettings):
    """The flags of `--task segmentation`."""

    balance: float = Field(
        0.0, ge=0, le=1, description="rare classes count more: 1 makes all classes equal, 0 all pixels"
    )


def read(data: Any, encoder: Encoder, asked: FinetuneArguments, settings: Settings) -> task.Examples:
    """The pictures of train/ and test/ (or val/) that have a mask. Raises `SaccadeError` where too little is there."""
    if isinstance(data, Source):
        raise SaccadeError("masks are read from a folder", path="DATA", hint="give its path")
    parts = read_masked(data, encoder.preprocess.channels)
    classes = parts["train"].classes
    pixels = {side: np.zeros(len(classes.names), dtype=np.int64) for side in ("train", "test")}

    def note(side: str, mask: Tensor) -> str | None:
        counts = torch.bincount(mask.flatten().long(), minlength=VOID + 1)[: len(classes.names)].numpy()
        pixels[side] += counts
        return None if counts.any() else "no pixel of the mask has a class"

    found = beside.examples({name: parts[name] for name in ("train", "test")}, asked.group_by, note)
    there = [name for name, count in zip(classes.names, pixels["train"], strict=True) if count]
    if len(there) < 2:
        hint = "masks name one class or none: look at classes.txt"
        raise SaccadeError(f"train shows only the class {there[0]!r}", path=str(data), hint=hint)
    for number, name in enumerate(classes.names):
        if not pixels["train"][number]:
            where = "test has it" if pixels["test"][number] else "nor has test"
            found.warnings.append(f"train has no pixel of {name!r}, which is never predicted; {where}")
        elif not pixels["test"][number]:
            found.warnings.append(f"test has no pixel of {name!r}, which has no IoU")
    facts = {"classes": classes.names, "values": classes.values, "pixels": pixels["train"].tolist()}
    split = {**found.split, "classes": len(there)}
    return dataclasses.replace(found, facts=facts, split=split)


def see(encoder: Encoder, examples: task.Examples, settings: Settings, asked: FinetuneArguments) -> pixelwise.Seen:
    """Maps of all pictures to learn from."""
    return pixelwise.observe(encoder, examples, settings, asked.seed)


def class_weights(facts: Mapping[str, Any], balance: float) -> Float[Tensor, " k"]:
    """How much a pixel of each class counts: its frequency to the power of -balance, with a mean of 1 over pixels."""
    pixels = torch.tensor(facts["pixels"], dtype=torch.float64)
    share = pixels / pixels.sum()
    weights = torch.where(share > 0, share.clamp_min(1e-9) ** -balance, 0.0)
    return (weights / (weights * share).sum()).float()


def _goal(facts: Mapping[str, Any], settings: Settings) -> Goal:
    classes, weights = len(facts["classes"]), class_weights(facts, settings.balance)

    def loss(logits: Float[Tensor, "n k"], targets: UInt8[Tensor, " n"]) -> Float[Tensor, ""]:
        each = weights.to(logits.device)
        return F.cross_entropy(logits, targets.long(), each, reduction="sum") / each[targets.long()].sum()

    def score(logits: Float[Tensor, "n k"], targets: UInt8[Tensor, " n"]) -> float:
        return float(segmentation.miou(segmentation.tally(logits.argmax(1), targets.long(), classes)))

    def solve(
        rows: Float[Tensor, "n d"], targets: UInt8[Tensor, " n"], held: Bool[Tensor, " n"], whole: bool
    ) -> Solved:
        counted = weights if settings.balance else None
        layer = segmentation.solve(rows, targets.long(), classes, held, counted, whole)
        spread = layer.weights.weight / layer.standard.spread[:, None]
        return Solved(spread, layer.weights.bias - layer.standard.mean @ spread, layer.penalty, layer.held_out)

    return Goal(classes, _counted, loss, score, solve)


def _counted(mask: UInt8[Tensor, "y x"]) -> Bool[Tensor, "y x"]:
    return mask != VOID


class Head(pixelwise.MapHead):
    """Logits of every pixel."""

    answers: ClassVar[tuple[str, ...]] = ("probabilities",)

    def __init__(self, classes: Sequence[str], values: Sequence[int], **said: Any):
        super().__init__(**said)
        self.classes, self.values = list(classes), list(values)

    def config(self) -> dict[str, Any]:
        """What builds one like it."""
        return {**super().config(), "classes": self.classes, "values": self.values}

    def answer(self, outputs: Float[Tensor, "b k h w"]) -> tuple[Tensor, ...]:
        """Probabilities of the classes at every pixel."""
        return (outputs.softmax(dim=1),)

    def told(
        self, outputs: Sequence[Tensor], pictures: Sequence[task.Picture], folder: Path | None
    ) -> list[dict[str, Any]]:
        """Of each picture what part each class has, in percent; its mask as PNG and an overlay go into `folder`."""
        return [self._told(logits, picture, folder) for logits, picture in zip(outputs, pictures, strict=True)]

    def _told(self, logits: Float[Tensor, "k h w"], picture: task.Picture, folder: Path | None) -> dict[str, Any]:
        best, found = logits.softmax(dim=0).max(dim=0)
        found = found.cpu()
        parts = torch.bincount(found.flatten(), minlength=len(self.classes)).double() * 100 / found.numel()
        parts_of = {name: round(part, 2) for name, part in zip(self.classes, parts.tolist(), strict=True) if part}
        said: dict[str, Any] = {"classes": parts_of, "confidence": round(float(best.mean()), 4)}
        if picture.target is not None:
            counts = _tally(found, picture.target, len(self.classes))
            right, there = counts[0].sum(), counts[1].sum()
            said |= {"pixel_accuracy": round(100 * right / there, 2) if there else None, "_counts": counts}
        if folder is not None:
            values = np.array(self.values, dtype=np.uint8)[found.numpy()]
            name = Path(picture.key).with_suffix(".png")
            paint.mask(values, folder / "masks" / name)
            said["mask"] = f"masks/{name.as_posix()}"
            if picture.pixels is not None:
                over = Path("overlays") / name.with_suffix(".jpg")
                said["_shown"] = paint.overlay(picture.pixels, paint.palette()[values], folder / over)
                said["overlay"] = over.as_posix()
        return said


def fit(seen: pixelwise.Seen, examples: task.Examples, settings: Settings) -> task.Fitted:
    """The head that does best on the part held out."""
    whole = len(examples.held) > 0  # else it is to judge a backbone that moves
    learned = pixelwise.learn(seen, _goal(examples.facts, settings), settings, whole=whole)
    return task.Fitted(_head(learned, seen.encoder, examples.facts, settings), learned.chosen)


def fresh(encoder: Encoder, examples: task.Examples, settings: Settings) -> task.Fitted:
    """A head that knows nothing."""
    learned = pixelwise.unlearned(encoder, len(examples.facts["classes"]), settings)
    return task.Fitted(_head(learned, encoder, examples.facts, settings), learned.chosen)


def _head(learned: pixelwise.Learned, encoder: Encoder, facts: Mapping[str, Any], settings: Settings) -> Head:
    head = Head(
        classes=facts["classes"], values=facts["values"], kind=learned.kind, widths=learned.widths,
        channels=encoder.backbone.config.channels, outputs=len(facts["classes"]), scale=settings.scale,
        overlap=settings.overlap,
    )  # fmt: skip
    head.network = learned.network
    return head.to(encoder.device).eval()


def views(
    settings: Settings, config: TuningSettings, batch: Batch, draws: Draws, targets: Sequence[UInt8[Tensor, "_ _"]]
) -> Batch:
    """A crop of each picture and of its mask."""
    return cropping.views(settings, batch, draws, config.image_size, targets)


def stack(targets: Sequence[UInt8[Tensor, "h w"]], facts: Mapping[str, Any]) -> UInt8[Tensor, "b h w"]:
    """Masks of one size."""
    return torch.stack(list(targets))


def chance(facts: Mapping[str, Any]) -> float:
    """Cross-entropy of even odds."""
    return math.log(len(facts["classes"]))


def loss(
    outputs: Float[Tensor, "b k h w"], targets: UInt8[Tensor, "b h w"], settings: Settings, facts: Mapping[str, Any]
) -> Float[Tensor, ""]:
    """Cross-entropy of the pixels that have a class."""
    known = targets != VOID
    logits, labels = outputs.movedim(1, -1)[known], targets[known].long()
    weights = class_weights(facts, settings.balance).to(logits)
    total = F.cross_entropy(logits, labels, weights, reduction="sum")
    return total / weights[labels].sum().clamp_min(1e-9)


def tally(
    outputs: Float[Tensor, "k h w"], target: UInt8[Tensor, "h w"], facts: Mapping[str, Any]
) -> Int[Tensor, "3 k"]:
    """Of a picture the pixels right, there and predicted, by class: all that a score needs."""
    return torch.from_numpy(_tally(outputs.argmax(dim=0).cpu(), target, outputs.shape[0]))


def score(outputs: Int[Tensor, "n 3 k"], targets: Any, settings: Settings) -> dict[str, float]:
    """Mean IoU of pictures that were tallied."""
    return {"miou": round(float(segmentation.miou(outputs.sum(dim=0).numpy())), 3)}


def _tally(found: Int[Tensor, "h w"], mask: UInt8[Tensor, "h w"], classes: int) -> Int[np.ndarray, "3 k"]:
    counted = _counted(mask)
    return segmentation.tally(found[counted], mask[counted].long(), classes)


def measure(
    told: list[dict[str, Any]], seen: pixelwise.Seen, examples: task.Examples, settings: Settings
) -> dict[str, Any]:
    """Mean IoU, IoU of each class and pixel accuracy of test, beside what colour and place say, and no training."""
    rows = {examples.keys[row]: row for row in examples.test.tolist()}
    examined, goal = [rows[line["key"]] for line in told], _goal(examples.facts, settings)
    names = list(examples.facts["classes"])

    def head(other: pixelwise.Seen) -> Head:
        learned = pixelwise.learn(other, goal, settings, seen.kind)
        return _head(learned, other.encoder, examples.facts, settings)

    counts = {"ours": [line["_counts"] for line in told]}
    counts |= rivals.rivals(
        seen, examples, settings, goal, head, examined, functools.partial(tally, facts=examples.facts)
    )
    found = {
        name: segmentation.Seen(np.stack([np.asarray(one) for one in each]), 0.0, 0.0) for name, each in counts.items()
    }
    ours = found.pop("ours")
    return {
        **_scores(ours, names),
        "baselines": {name: _scores(rival, names) for name, rival in found.items()},
        "difference": segmentation.difference(ours, found, examples.names(np.array(examined)), seen.seed),
    }


def _scores(seen: segmentation.Seen, names: list[str]) -> dict[str, Any]:
    said = seen.report(names)
    return {name: said[name] for name in ("miou", "pixel_accuracy", "classes")}


def scores(told: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of pictures whose mask is known."""
    counts = [line["_counts"] for line in told if "_counts" in line]
    return _scores(segmentation.Seen(np.stack(counts), 0.0, 0.0), list(facts["classes"])) if counts else {}


def opened(
    data: str | Path | Source, encoder: Encoder, facts: Mapping[str, Any]
) -> tuple[Source, Sequence[Any], Mapping[str, int]] | None:
    """The pictures of a folder with images/ and masks/, or of its test/, and their masks by the model's classes."""
    return beside.opened(data, lambda root, part: _part(root, part, encoder, facts), "masks")


def _part(root: Path, part: Path, encoder: Encoder, facts: Mapping[str, Any]) -> Masked:
    """Pictures and masks; values that the model has not learned are void."""
    place, values = np.full(256, VOID, dtype=np.uint8), facts["values"]
    place[values] = np.arange(len(values))
    classes = Classes(list(facts["classes"]), place, np.ones(256, dtype=bool))
    return masked_part(root, part, classes, encoder.preprocess.channels)


def sections(told: list[dict[str, Any]], examples: task.Examples, result: Mapping[str, Any]) -> list[Section]:
    """Mean IoU beside what must be beaten, each class, and the pictures with the fewest pixels right."""
    known = sorted((line for line in told if line["pixel_accuracy"] is not None), key=lambda x: x["pixel_accuracy"])
    worst = [(line, f"{line['pixel_accuracy']:.0f} % of pixels right") for line in known]
    return pictured.sections(examples, result, "miou", "Mean IoU on test, percent", worst)

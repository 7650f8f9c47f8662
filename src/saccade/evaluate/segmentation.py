"""How well a linear layer on frozen patches says what every pixel shows: mean intersection over union, in percent.

Logits on the grid of patches are enlarged bilinearly to the mask, and cross-entropy counts every pixel but void ones.
Enlarging is linear, so this is logistic regression on patches interpolated at pixels: convex, and solved as `linear`
solves it, on a fixed choice of pixels. One matrix of counts for all of test gives the score, not a mean over pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from saccade.backbone import known
from saccade.data import Source
from saccade.draws import hash64
from saccade.embed import Look, examining
from saccade.encoder import Encoder, untrained
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import SHARE
from saccade.evaluate.linear import PENALTIES, Linear, Standard, fit
from saccade.evaluate.masked import VOID, Masked, read_masked
from saccade.evaluate.splits import group_names, set_apart

PIXELS = 1 << 16
"""Pixels learned from, at most, the same number of every picture."""
_BATCH = 16
_LONGEST = 4  # a picture longer than so many times its width is squashed
_DRAWS = 400

Grid = Callable[[Shaped[Tensor, "b c h w"]], Float[Tensor, "b d y x"]]
"""A contestant: pictures to features on a grid of patches."""


@dataclass(frozen=True)
class Seen:
    """What a contestant's linear layer made of the examined pictures, and what train alone decided."""

    counts: Int[np.ndarray, "n 3 k"]  # of each picture and class: pixels right, pixels there, pixels predicted
    penalty: float
    held_out: float

    @property
    def miou(self) -> float:
        """Percent, over the classes that are there."""
        return float(miou(self.counts.sum(axis=0)))

    def report(self, names: list[str]) -> dict[str, Any]:
        """For JSON; a class that no examined pixel has is null."""
        right, there, predicted = self.counts.sum(axis=0)
        of = {name: _rounded(100 * r / (t + p - r)) if t else None
              for name, r, t, p in zip(names, right, there, predicted, strict=True)}  # fmt: skip
        return {
            "miou": _rounded(self.miou), "pixel_accuracy": _rounded(100 * right.sum() / there.sum()), "classes": of,
            "held_out": _rounded(self.held_out), "penalty": self.penalty,
        }  # fmt: skip


def _rounded(value: float) -> float:
    return round(float(value), 3)


def miou(counts: np.ndarray) -> np.ndarray:
    """Percent, of counts [… 3 K]: over the classes that are there."""
    right, there, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = there + predicted - right
    each = np.where(there > 0, right / np.maximum(union, 1), 0.0)
    return np.asarray(100 * each.sum(axis=-1) / np.maximum((there > 0).sum(axis=-1), 1))


def evaluate(
    encoder: Encoder,
    labelled: str | Path | Source,
    *,
    group_by: str | None = None,
    seed: int = 0,
    baselines: bool = True,
    pixels: int = PIXELS,
) -> dict[str, Any]:
    """Learns from train/, chooses the penalty on a part of it, reads test/ once. Raises `SaccadeError`.

    Beside the encoder stand the same network untrained, the mean colour of each patch, and where a patch is (which
    looks at no picture). Pictures keep their aspect, with the short side that the encoder was loaded for.
    """
    if isinstance(labelled, Source):
        raise SaccadeError("masks are read from a folder", path="LABELLED", hint="give its path")
    began = time.perf_counter()
    parts = read_masked(labelled, encoder.preprocess.channels)
    train, test, warnings = parts["train"], parts["test"], list[str]()
    names, others = _names(train, group_by), _names(test, group_by)
    if group_by is not None and set(names) & set(others):
        warnings.append(f"{len(set(names) & set(others))} groups are in train and in test: numbers are too good")
    apart = set_apart(names, SHARE, "hold-out")
    found = examine(encoder, train, test, apart, seed=seed, baselines=baselines, pixels=pixels)
    ours, label = found.seen["pretrained"], train.classes.names
    rivals = {name: seen for name, seen in found.seen.items() if name != "pretrained"}
    groups = [others[row] for row in found.examined]
    failures = [*train.failures, *test.failures, *found.failures]
    beside = {
        "baselines": {name: {"segmentation": seen.report(label)} for name, seen in rivals.items()},
        "differences": {"segmentation": difference(ours, rivals, groups, seed)},
    }
    return {
        "segmentation": ours.report(label),
        **(beside if rivals else {}),
        "split": {"train": found.learned, "test": len(found.examined), "held_out_of_train": found.held,
                  "classes": len(label), "pixels_learned_from": found.pixels},
        "image_size": encoder.preprocess.crop,
        "grids": found.grids,
        "quarantined": len(failures),
        "unreadable": [{"key": key, "reason": reason} for key, reason in failures[:20]],
        "warnings": warnings,
        "seed": seed,
        "images_per_second": round((found.learned + len(found.examined)) / max(time.perf_counter() - began, 1e-9), 1),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _names(part: Masked, group_by: str | None) -> list[str]:
    """What must not be split, of each picture."""
    if group_by is None:
        return part.keys
    groups, _ = group_names(part.keys, group_by)
    return [group or key for group, key in zip(groups, part.keys, strict=True)]


@dataclass(frozen=True)
class Examined:
    """What came of one examination, by contestant: `pretrained`, `untrained`, `pixels`, `position`."""

    seen: dict[str, Seen]
    examined: list[int]  # rows of test that could be read
    learned: int
    held: int
    pixels: int
    grids: list[list[int]]
    failures: list[tuple[str, str]]


def examine(
    encoder: Encoder,
    train: Masked,
    test: Masked,
    apart: np.ndarray,
    *,
    seed: int = 0,
    baselines: bool = True,
    pixels: int = PIXELS,
) -> Examined:
    """Learns from `train` but where it is set `apart` to choose the penalty, then from all of it; examines `test`.

    Raises `SaccadeError` when too little can be read, and for a backbone without patches.
    """
    if not encoder.grid or not all(encoder.grid):
        raise SaccadeError("this backbone gives one vector and no patches", path="--tasks", hint="use knn or linear")
    places, failures = len(train.classes.names), list[tuple[str, str]]()
    count = max(1, pixels // len(train.keys))
    with examining(encoder) as look:
        contestants = _contestants(encoder, look, seed, baselines)
        rows, labels, held, grids = _learnable(encoder, contestants, train, apart, count, seed, failures)
        if len(labels.unique()) < 2 or held.all() or not held.any():
            raise SaccadeError("too few pictures with masks could be read", hint=_first(failures), code=1)
        layers = {name: solve(x, labels, places, held) for name, x in rows.items()}
        counts: dict[str, list[np.ndarray]] = {name: [] for name in layers}
        examined: list[int] = []
        for some, images, masks in _batches(encoder, test, failures, "examining"):
            examined += some
            for name, contestant in contestants.items():
                logits = layers[name].on(contestant(images))
                counts[name] += [_counts(x, mask, places) for x, mask in zip(logits, masks, strict=True)]
    if not examined or not sum(part[1].sum() for part in next(iter(counts.values()))):
        raise SaccadeError("no picture to be examined on could be read", hint=_first(failures), code=1)
    seen = {name: Seen(np.stack(counts[name]), layer.penalty, layer.held_out) for name, layer in layers.items()}
    lost = {key for key, _ in failures}
    good = np.array([key not in lost for key in train.keys])
    return Examined(
        seen, examined, int(good.sum()), int((good & apart).sum()), len(labels), sorted(map(list, grids)), failures
    )


def _first(failures: list[tuple[str, str]]) -> str | None:
    return f"{failures[0][0]}: {failures[0][1]}" if failures else None


def _contestants(encoder: Encoder, look: Look, seed: int, baselines: bool) -> dict[str, Grid]:
    """The encoder first: the others take their grid from it."""

    def patches(network: Encoder) -> Grid:
        def grid(images: Tensor) -> Tensor:
            seen = look(images, tokens="patches", encoder=network)
            return seen.patches.float().mT.unflatten(2, seen.grid)

        return grid

    stride = encoder.backbone.stride

    def colour(images: Tensor) -> Tensor:
        images = images.to(encoder.device)
        values = images.float() if images.is_floating_point() else images.float() / 255
        return F.adaptive_avg_pool2d(values, [max(1, side // stride) for side in images.shape[2:]])

    def position(images: Tensor) -> Tensor:
        y, x = (torch.linspace(-1, 1, max(2, side // stride), device=encoder.device) for side in images.shape[2:])
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([y, x, y * y, x * x, y * x]).expand(len(images), -1, -1, -1)

    found = {"pretrained": patches(encoder)}
    if baselines:
        if known(encoder.backbone):
            found["untrained"] = patches(untrained(encoder, seed).to(encoder.device))
        found |= {"pixels": colour, "position": position}
    return found


def _batches(
    encoder: Encoder, part: Masked, failures: list[tuple[str, str]], words: str
) -> Iterator[tuple[list[int], Shaped[Tensor, "b c h w"], list[UInt8[Tensor, "_ _"]]]]:
    """Neighbours of one size together: their rows, the pictures in whole patches, and their masks."""
    rows: list[int] = []
    images: list[Tensor] = []
    masks: list[Tensor] = []
    console = Console(stderr=True)
    for row in track(range(len(part.keys)), words, console=console, transient=True, disable=not console.is_terminal):
        try:
            picture, mask = part[row]
        except Unreadable as error:
            failures.append((part.keys[row], error.reason))
            continue
        image = encoder.preprocess.sized(picture, sides(encoder, picture))
        if rows and (len(rows) == _BATCH or image.shape != images[0].shape or image.dtype != images[0].dtype):
            yield rows, torch.stack(images), masks
            rows, images, masks = [], [], []
        rows.append(row)
        images.append(image)
        masks.append(mask)
    if rows:
        yield rows, torch.stack(images), masks


def sides(encoder: Encoder, picture: Shaped[Tensor, "c h w"]) -> list[int]:
    """Height and width in whole patches, near the picture's aspect; square where nothing else can be read."""
    short, stride = encoder.preprocess.crop, encoder.backbone.stride
    if not known(encoder.backbone):  # a graph of others may hold its size
        return [short, short]
    least = min(picture.shape[1:])
    return [max(1, round(min(side / least, _LONGEST) * short / stride)) * stride for side in picture.shape[1:]]


def _learnable(
    encoder: Encoder,
    contestants: dict[str, Grid],
    train: Masked,
    apart: np.ndarray,
    count: int,
    seed: int,
    failures: list[tuple[str, str]],
) -> tuple[dict[str, Float[Tensor, "n d"]], Int[Tensor, " n"], Tensor, set[tuple[int, ...]]]:
    """Features at the chosen pixels of train by contestant, their classes, whether set apart, and the grids."""
    rows: dict[str, list[Tensor]] = {name: [] for name in contestants}
    labels, held, grids = list[Tensor](), list[Tensor](), set[tuple[int, ...]]()
    for some, images, masks in _batches(encoder, train, failures, "learning"):
        places = [_chosen(mask, count, f"{seed}\0{train.keys[row]}") for row, mask in zip(some, masks, strict=True)]
        for row, mask, place in zip(some, masks, places, strict=True):
            labels.append(mask.flatten()[place].long())
            held.append(torch.full((len(place),), bool(apart[row])))
        for name, contestant in contestants.items():
            grid = contestant(images)
            grids.add(tuple(grid.shape[2:]))
            rows[name] += [_at(x, mask, place) for x, mask, place in zip(grid, masks, places, strict=True)]
    device = encoder.device
    if not labels:
        return {}, torch.zeros(0), torch.zeros(0, dtype=torch.bool), grids
    return {name: torch.cat(x) for name, x in rows.items()}, torch.cat(labels).to(device), torch.cat(held), grids


def _chosen(mask: UInt8[Tensor, "h w"], count: int, address: str) -> Int[Tensor, " n"]:
    """At most so many of the pixels that count: a function of the address."""
    usable = np.flatnonzero(mask.flatten().numpy() != VOID)
    generator = np.random.default_rng(hash64(address) % (1 << 63))
    return torch.from_numpy(generator.permutation(usable)[:count])


def _at(grid: Float[Tensor, "d y x"], mask: UInt8[Tensor, "h w"], place: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """What the grid, enlarged bilinearly to the mask, has at these pixels; the rest is not computed."""
    height, width = mask.shape
    across, down = (place % width).to(grid), (place // width).to(grid)
    points = torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)[None, None]
    found = F.grid_sample(grid[None], points, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0].T


@dataclass(frozen=True)
class Layer:
    """A fitted linear layer on standardised features, with the penalty and its score on what was held out."""

    standard: Standard
    weights: Linear
    penalty: float
    held_out: float

    def on(self, grid: Float[Tensor, "b d y x"]) -> Float[Tensor, "b k y x"]:
        """Logits on the grid."""
        rows = self.standard(grid.permute(0, 2, 3, 1).flatten(0, 2)) @ self.weights.weight + self.weights.bias
        return rows.unflatten(0, (len(grid), *grid.shape[2:])).permute(0, 3, 1, 2)


def solve(
    rows: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    held: Tensor,
    weights: Float[Tensor, " k"] | None = None,
    whole: bool = True,
) -> Layer:
    """The penalty with the best score on the pixels held out, strong to weak as `linear` sweeps; then fitted to all.

    `weights`: how much each class counts. Not `whole`: never fitted to what is held out.
    """
    held = held.to(rows.device)
    each = None if weights is None else weights.to(rows)[labels]
    each = None if each is None else each / each.mean()
    some = None if each is None else each[~held]
    standard = Standard.of(rows[~held])
    rest, other, start = standard(rows[~held]), standard(rows[held]), None
    best, best_score, since = PENALTIES[0], -1.0, 0
    for penalty in PENALTIES:
        start = fit(rest, labels[~held], classes, penalty, start, weights=some)
        score = float(miou(tally(start.predict(other), labels[held], classes)))
        best, best_score, since = (penalty, score, 0) if score > best_score else (best, best_score, since + 1)
        if since == 2:
            break
    if whole:
        standard, some = Standard.of(rows), each
        rest = standard(rows)
    learned = labels if whole else labels[~held]
    return Layer(standard, fit(rest, learned, classes, best, weights=some), best, best_score)


def _counts(logits: Float[Tensor, "k y x"], mask: UInt8[Tensor, "h w"], classes: int) -> Int[np.ndarray, "3 k"]:
    """Right, there and predicted, by class, of the pixels of a picture that count."""
    size = list(mask.shape)
    predicted = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0).cpu()
    counted = mask != VOID
    return tally(predicted[counted], mask[counted].long(), classes)


def tally(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], classes: int) -> Int[np.ndarray, "3 k"]:
    """Pixels right, there and predicted, by class."""
    parts = (labels[predicted == labels], labels, predicted)
    return np.stack([torch.bincount(part, minlength=classes).cpu().numpy() for part in parts])


def difference(ours: Seen, rivals: dict[str, Seen], groups: list[str], seed: int) -> dict[str, Any]:
    """How far the encoder is from the best rival: a bootstrap over test pictures (groups), the same for both."""
    rival = max(rivals, key=lambda name: rivals[name].miou, default=None)
    if rival is None:
        return {}
    found = compared(ours.counts, rivals[rival].counts, miou, groups, seed)
    return {**found, "against": rival}


def compared(
    ours: np.ndarray, theirs: np.ndarray, score: Callable[[np.ndarray], np.ndarray], groups: list[str], seed: int
) -> dict[str, Any]:
    """How much higher one contestant scores, from what is summed over pictures before `score` makes a number of it.

    A bootstrap over groups of pictures, drawn the same for both, says how much of that may be chance.
    """
    number = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    member = np.array([number[name] for name in groups])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(number), np.full(len(number), 1 / len(number)), size=_DRAWS)[:, member]
    both = [score(np.tensordot(drawn, sums, axes=1)) for sums in (ours, theirs)]
    mean = float(score(ours.sum(axis=0)) - score(theirs.sum(axis=0)))
    bound = 2 * float((both[0] - both[1]).std(ddof=1))
    verdict = "no difference" if abs(mean) <= bound else "better" if mean > 0 else "worse"
    return {"mean": _rounded(mean), "two_standard_errors": _rounded(bound), "verdict": verdict}

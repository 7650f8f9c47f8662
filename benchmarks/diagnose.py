"""Whether `saccade diagnose` names a planted cause, and nothing else: trials on cached features, a JSON file each.

    python benchmarks/diagnose.py --out DIR --pack tomato=TOMATO=BACKBONE[=GROUP_BY] [--pack ...] [--trials 10]
        [--rows 2400] [--image-size N] [--first 0] [--only tomato]

Each pack's pictures are read once and turned into features once: as they are, with four shifts (colour, blur, noise,
another camera), and as leaks look (cropped a little, JPEG again), by the backbone and by two untrained networks. A
trial divides the pictures at random, 70 to 30, groups never split, plants one cause, trains a head (a linear probe
whose penalty is chosen on train) and asks for a diagnosis. Causes: none; labels (20 % of all labels are drawn anew
among the other classes); shift (one of the four, test alone); leak (15 % of test are copies of pictures of train); head
(nearest class mean, a probe whose penalty is 1,000 times too strong, or one gradient step, in turn); backbone (an
untrained network of another seed). `--out` keeps features and answers; `--first 100` makes other trials of them.
Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from saccade.diagnose.culprits import told_apart
from saccade.diagnose.evidence import Side
from saccade.diagnose.seeing import SIDE
from saccade.embed import examining, pooled, read_pictures
from saccade.encoder import Encoder, untrained
from saccade.evaluate import linear
from saccade.evaluate.features import small
from saccade.evaluate.labelled import SHARE, read_labelled
from saccade.evaluate.splits import set_apart
from saccade.weights import load

SHIFTS = ("colour", "blur", "noise", "camera")
CAUSES = ("none", "labels", "shift", "leak", "head", "backbone")
NAMED = {"leak": "leakage"}
OTHER = 7
"""Seed of the untrained network that stands as a backbone; the diagnosis compares with that of seed 0."""


def shifted(images: Tensor, kind: str, random: torch.Generator) -> Tensor:
    """Pictures in [0, 1], as another place, season or device would give them."""
    side = images.shape[-1]
    if kind == "colour":  # another white balance; of grey pictures contrast alone
        gains = torch.tensor([1.25, 1.0, 0.75])[: images.shape[1], None, None]
        return (0.8 * (images * gains) + 0.1).clamp(0, 1)
    if kind == "blur":
        less = F.interpolate(images, scale_factor=0.4, mode="area")
        return F.interpolate(less, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    if kind == "noise":
        return (images + 0.08 * torch.randn(images.shape, generator=random)).clamp(0, 1)
    gamma = images.clamp_min(1e-4) ** 0.7  # camera: another curve, vignetting, JPEG
    line = torch.linspace(-1, 1, side)
    fall = 1 - 0.25 * (line[:, None] ** 2 + line**2)
    return _again(gamma * fall, 40)


def leaked(images: Tensor, random: np.random.Generator) -> Tensor:
    """Copies as they come about: 3 to 8 % cut off each way, to the old size, JPEG again."""
    side, found = images.shape[-1], []
    for image in images:
        cut = max(1, round(float(random.uniform(0.03, 0.08)) * side))
        top, left = random.integers(0, cut + 1, size=2)
        part = image[None, :, top : side - cut + top, left : side - cut + left]
        found.append(F.interpolate(part, size=(side, side), mode="bicubic", align_corners=False)[0].clamp(0, 1))
    return _again(torch.stack(found), int(random.integers(60, 90)))


def _again(images: Tensor, quality: int) -> Tensor:
    """Through JPEG."""
    found = []
    for image in images:
        array = image.mul(255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(array if array.shape[2] == 3 else array[..., 0]).save(file, "JPEG", quality=quality)
        back = torch.from_numpy(np.asarray(Image.open(file)).copy())
        found.append((back[None] if back.ndim == 2 else back.permute(2, 0, 1)).float() / 255)
    return torch.stack(found)


def cached(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Features of a pack in all its guises; computed where they are not there yet."""
    place, backbone, group_by = asked.packs[name]
    file = asked.out / f"{name}.pt"
    if file.exists():
        return torch.load(file)
    encoder = load(backbone, image_size=asked.image_size)
    fresh = {"untrained": untrained(encoder, 0), "other": untrained(encoder, OTHER)}
    data = read_labelled(place, group_by, encoder.preprocess.canvas, encoder.preprocess.channels)
    rows = np.concatenate([data.train, data.test])
    rows = np.sort(np.random.default_rng(0).permutation(rows)[: asked.rows])
    parts: dict[str, list[Tensor]] = {}
    good: list[int] = []
    noise, random = torch.Generator().manual_seed(0), np.random.default_rng(1)
    with examining(encoder) as look:

        def seen(images: Tensor, by: Encoder = encoder) -> Tensor:
            features = look(images, encoder=by)
            return pooled(features, "mean" if features.cls is None else "cls").float().clone()

        for read in read_pictures(data.source, [encoder.preprocess], rows=rows.tolist(), batch=64, words=name):
            good += read.rows
            images = read.views[0]
            images = images.float() / 255 if images.dtype == torch.uint8 else images
            guises = {"": images, "leak": leaked(images, random)}
            guises |= {kind: shifted(images, kind, noise) for kind in SHIFTS}
            for guise, pictures in guises.items():
                parts.setdefault(f"features/{guise}", []).append(seen(pictures))
                copies = torch.stack([small(one, SIDE) for one in pictures]).clamp(0, 1)
                parts.setdefault(f"pixels/{guise}", []).append(copies.half())
            for which, network in fresh.items():
                parts.setdefault(f"{which}/", []).append(seen(images, network))
            parts.setdefault("untrained/leak", []).append(seen(guises["leak"], fresh["untrained"]))
    found: dict[str, Any] = {key: torch.cat(tensors) for key, tensors in parts.items()}
    found |= {"labels": data.labels[good].tolist(), "names": data.names(np.array(good)), "classes": data.classes}
    torch.save(found, file)
    return found


@dataclass(frozen=True)
class Planted:
    """Both sides of a trial, before a head was trained."""

    train: Side
    test: Side


def planted(found: dict[str, Any], cause: str, trial: int) -> Planted:
    """A division of the pack with one cause in it."""
    random = np.random.default_rng([trial, CAUSES.index(cause)])
    labels, names, count = np.array(found["labels"]), found["names"], len(found["classes"])
    groups = np.array(sorted(set(names)))
    apart = set(random.permutation(groups)[: round(0.3 * len(groups))].tolist())
    test = np.array([name in apart for name in names])
    if cause == "labels":
        bad = random.random(len(labels)) < 0.2
        labels = np.where(bad, (labels + random.integers(1, count, len(labels))) % count, labels)
    which = "other/" if cause == "backbone" else "features/"
    learn, ask = (np.flatnonzero(part) for part in (~test, test))

    def side(rows: np.ndarray, guise: str = "") -> Side:
        features = found[which + guise][rows].float()
        fresh = found["untrained/" + (guise if guise == "leak" else "")][rows]
        return Side(features, features, fresh, found["pixels/" + guise][rows].float(), labels[rows],
                    [names[row] for row in rows], labels[rows])  # fmt: skip

    train, examined = side(learn), side(ask, SHIFTS[trial % len(SHIFTS)] if cause == "shift" else "")
    if cause == "leak":
        copies = random.permutation(learn)[: round(0.15 * len(ask))]
        examined = together(side(random.permutation(ask)[len(copies) :]), side(copies, "leak"))
    return Planted(train, examined)


def together(one: Side, other: Side) -> Side:
    """Copies in a test set go by names of their own: who leaks does not say so."""
    parts = [torch.cat([ours, theirs]) for ours, theirs in
             ((one.features, other.features), (one.start, other.start), (one.untrained, other.untrained),
              (one.pixels, other.pixels))]  # fmt: skip
    labels = np.concatenate([one.labels, other.labels])
    return Side(*parts, labels, [*one.names, *(f"copy {name} {n}" for n, name in enumerate(other.names))], labels)


def headed(sides: Planted, cause: str, trial: int, classes: int) -> Planted:
    """What a head says of both sides: a probe as it should be, or one of three weak ones."""
    train, test = sides.train, sides.test
    targets = torch.from_numpy(train.labels)
    standard = linear.Standard.of(train.features)
    rows, asked = standard(train.features), standard(test.features)
    penalty, _ = linear.choose_penalty(train.features, targets, classes, set_apart(train.names, SHARE, "hold-out"))
    fitted = linear.fit(rows, targets, classes, 1000 * penalty if cause == "head" and trial % 3 == 1 else penalty)
    if cause == "head" and trial % 3 != 1:
        one_hot = F.one_hot(targets, classes).float()
        if trial % 3 == 0:  # nearest class mean
            means = one_hot.T @ rows / one_hot.sum(0)[:, None].clamp_min(1)
            fitted = linear.Linear(means.T, -means.square().sum(1) / 2)
        else:  # one step from nothing
            step = rows.T @ (one_hot - one_hot.mean(0)) / len(rows)
            fitted = linear.Linear(step, torch.zeros(classes))
    return Planted(replace(train, guesses=fitted.predict(rows).numpy()),
                   replace(test, guesses=fitted.predict(asked).numpy()))  # fmt: skip


def one_trial(name: str, cause: str, trial: int, asked: argparse.Namespace) -> dict[str, Any]:
    """What was named; from the file of a trial that was made before."""
    answer = asked.out / f"{name}-{cause}-{trial}.json"
    if not answer.exists():
        found, started = cached(name, asked), time.perf_counter()
        sides = headed(planted(found, cause, trial), cause, trial, len(found["classes"]))
        told = told_apart(sides.train, sides.test, found["classes"])
        result = {
            "named": [culprit for culprit, finding in told.items() if finding.found],
            "findings": {culprit: {"strength": one.strength, "interval": one.interval, "reason": one.reason,
                                   "more": one.more} for culprit, one in told.items()},
            "right": float(sides.test.right.mean()), "seconds": time.perf_counter() - started,
        }  # fmt: skip
        answer.write_text(json.dumps(result, default=str))
    made: dict[str, Any] = json.loads(answer.read_text())
    return made


def tell(name: str, trials: dict[str, list[dict[str, Any]]]) -> None:
    """A row a cause: how often each culprit was named."""
    culprits = ("labels", "leakage", "shift", "backbone", "head")
    print(f"| {name} | head right, % | {' | '.join(culprits)} | nothing | named, nothing else |\n|---|---|{'---|' * 7}")
    for cause, made in trials.items():
        wanted = [] if cause == "none" else [NAMED.get(cause, cause)]
        counts = [sum(culprit in one["named"] for one in made) for culprit in culprits]
        good = sum(one["named"] == wanted for one in made)
        right = 100 * sum(one["right"] for one in made) / len(made)
        cells = [*counts, sum(not one["named"] for one in made), f"{good} of {len(made)}"]
        print(f"| {cause} | {right:.1f} | {' | '.join(map(str, cells))} |")


def main() -> None:
    """The trials and their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pack", action="append", required=True, help="NAME=FOLDER=BACKBONE[=GROUP_BY]")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial: other ones than were tuned on")
    parser.add_argument("--rows", type=int, default=2400, help="pictures of a pack that are used")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--causes", default=",".join(CAUSES))
    asked = parser.parse_args()
    asked.packs = {}
    for said in asked.pack:
        name, place, backbone, *group = said.split("=")
        asked.packs[name] = (place, backbone, group[0] if group else None)
    asked.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )
    for name in asked.packs:
        found: dict[str, list[dict[str, Any]]] = {}
        for trial in range(asked.first, asked.first + asked.trials):
            for cause in asked.causes.split(","):
                made = one_trial(name, cause, trial, asked)
                found.setdefault(cause, []).append(made)
                print(
                    f"  {name} {cause} {trial}: {', '.join(made['named']) or 'nothing'} ({made['seconds']:.0f} s)",
                    flush=True,
                )
        tell(name, found)


if __name__ == "__main__":
    main()

"""Vectors in which pictures of one class, or of one thing, lie near each other: a linear projection for retrieval.

Learned by classifying with unit vectors against one unit vector a class (normalised softmax, arXiv 1811.12649); test
may hold classes that train has not. How long it learns is chosen on what is held out, and not at all is a choice too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.data import Source
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.linear import Standard
from saccade.finetune.frozen import Vectors, pooled, vectors
from saccade.finetune.labels import examples as labelled_examples
from saccade.finetune.labels import known as known_labels
from saccade.finetune.task import Examples, Fitted, Picture, TaskSettings
from saccade.finetune.task import Head as AnyHead
from saccade.report.page import Section, Table
from saccade.settings import FinetuneArguments, Looking
from saccade.vit import Features

FROZEN = "its projection learns on features that stand still; classification moves a backbone"
ROUNDS = (0, 10, 30, 100, 300)
"""Steps after which the held-out part is asked; the best is kept."""
RATE, SHARPNESS, BATCH = 3e-3, 20.0, 512


class Settings(TaskSettings, Looking):
    """What counts as the same."""

    label: str = Field("label", description="column of the list that says which pictures belong together")
    out_width: int = Field(128, ge=1, description="length of the vectors; the features' own where that is less")


def read(data: str | Path | Source, encoder: Encoder, asked: FinetuneArguments, settings: Settings) -> Examples:
    """Pictures with a class each; those of test may be strangers. Raises `SaccadeError`."""
    found = labelled_examples(
        data, encoder, column=settings.label, group_by=asked.group_by, seed=asked.seed, strangers=True
    )
    if found.facts["several"]:
        raise SaccadeError("a picture has several labels", path="--label", hint="one says what belongs together")
    return found


def see(encoder: Encoder, examples: Examples, settings: Settings, asked: FinetuneArguments) -> Vectors:
    """Vectors of all pictures, and of augmented copies of those that are learned from."""
    rows = np.concatenate([examples.learned, examples.test])
    return vectors(
        encoder, examples.source, rows, looking=settings, seed=asked.seed, copied=examples.learned,
        cache=asked.cache, workers=asked.workers,
    )  # fmt: skip


class Head(AnyHead):
    """A projection of pooled, standardised features to vectors of length 1."""

    answers = ("vectors",)

    def __init__(self, pooling: str, width: int, out: int):
        super().__init__()
        self.pooling = pooling
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, out, bias=False)
        self.tokens = {"cls": "cls", "mean": "patches"}.get(pooling, "all")  # type: ignore[assignment]

    shift: Tensor
    scale: Tensor

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Float[Tensor, "b e"]:
        """Unit vectors."""
        return self.of(pooled(features, self.pooling))

    def of(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """Of vectors that are pooled already."""
        found: Tensor = F.normalize(self.linear((vectors - self.shift) * self.scale), dim=1)
        return found

    def config(self) -> dict[str, Any]:
        """Its pooling and widths."""
        return {"pooling": self.pooling, "width": len(self.shift), "out": self.linear.out_features}

    def told(self, outputs: Sequence[Tensor], pictures: Sequence[Picture], folder: Path | None) -> list[dict[str, Any]]:
        """The vector."""
        return [
            {"vector": [round(value, 6) for value in row.tolist()], "_vector": row.float().cpu(),
             "_target": picture.target}
            for picture, row in zip(pictures, outputs, strict=True)
        ]  # fmt: skip


def retrieval(vectors: Float[Tensor, "n d"], labels: Int[Tensor, " n"], chunk: int = 1024) -> dict[str, float]:
    """Each picture asks all others by cosine: percent of those that find one of their own first, among the first five,
    and the mean average precision. Pictures that are alone in their class ask nothing."""
    unit = F.normalize(vectors.double(), dim=1)
    first, five, precisions = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in range(0, len(unit), chunk):
        likeness = unit[start : start + chunk] @ unit.T
        rows = torch.arange(len(likeness))
        likeness[rows, start + rows] = -torch.inf
        order = likeness.argsort(dim=1, descending=True, stable=True)[:, :-1]
        same = labels[order] == labels[start : start + chunk, None]
        asked = same.any(dim=1)
        same = same[asked]
        hits = same.double().cumsum(dim=1)
        places = torch.arange(1, same.shape[1] + 1)
        first.append(same[:, 0])
        five.append(same[:, :5].any(dim=1))
        precisions.append((hits / places * same).sum(dim=1) / hits[:, -1])
    found = {"recall_at_1": first, "recall_at_5": five, "map": precisions}
    if not sum(len(part) for part in first):
        return dict.fromkeys(found, 0.0)
    return {name: round(100 * float(torch.cat(parts).double().mean()), 3) for name, parts in found.items()}


def _begun(x: Float[Tensor, "n d"], out: int) -> Float[Tensor, "e d"]:
    """The directions in which features vary most: lengths are kept as far as that goes."""
    _, axes = torch.linalg.eigh(x.T @ x / len(x))
    return axes[:, -out:].flip(1).T.contiguous()


def _train(
    x: Float[Tensor, "n d"],
    copies: Float[Tensor, "n v d"],
    labels: Int[Tensor, " n"],
    head: Head,
    rounds: int,
    seed: int,
) -> list[tuple[int, Tensor]]:
    """The projection after each of `ROUNDS` up to this one."""
    number = {int(label): place for place, label in enumerate(labels.unique())}
    names = torch.tensor([number[int(label)] for label in labels])
    inside = torch.cat([x[:, None], copies], dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.stack([head.of(x[names == place]).mean(dim=0) for place in range(len(number))]).detach()
    proxies = nn.Parameter(F.normalize(centres, dim=1))
    optimizer = torch.optim.AdamW([head.linear.weight, proxies], lr=RATE, weight_decay=1e-2)
    kept = []
    for step in range(rounds + 1):
        if step in ROUNDS:
            kept.append((step, head.linear.weight.detach().clone()))
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        which = torch.randint(inside.shape[1], (len(rows),), generator=generator)
        likeness = head.of(inside[rows, which]) @ F.normalize(proxies, dim=1).T
        loss = F.cross_entropy(SHARPNESS * likeness, names[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kept


def _started(x: Float[Tensor, "n d"], pooling: str, out: int) -> Head:
    standard = Standard.of(x)
    head = Head(pooling, x.shape[1], min(out, x.shape[1]))
    with torch.no_grad():
        head.shift.copy_(standard.mean)
        head.scale.copy_(1 / standard.spread)
        head.linear.weight.copy_(_begun(standard(x), head.linear.out_features))
    return head


def fit(seen: Vectors, examples: Examples, settings: Settings) -> Fitted:
    """The projection: pooling and length of training by mean average precision of what was held out."""
    began = time.perf_counter()
    train, held = (seen.places(rows) for rows in (examples.train, examples.held))
    targets = {name: _targets(seen, examples, places) for name, places in (("train", train), ("held", held))}
    tried: dict[tuple[str, int], dict[str, float]] = {}
    for pooling in seen.poolings():
        x = seen.of(pooling, train)
        head = _started(x, pooling, settings.out_width)
        for step, weight in _train(x, seen.copied(pooling, train), targets["train"], head, max(ROUNDS), 0):
            with torch.no_grad():
                head.linear.weight.copy_(weight)
                tried[pooling, step] = retrieval(head.of(seen.of(pooling, held)), targets["held"])
            head.linear.weight.requires_grad_(True)
    pooling, rounds = max(tried, key=lambda one: (tried[one]["map"], -one[1]))
    learned = seen.places(examples.learned)
    x = seen.of(pooling, learned)
    head = _started(x, pooling, settings.out_width)
    kept = _train(x, seen.copied(pooling, learned), _targets(seen, examples, learned), head, rounds, 0)
    with torch.no_grad():
        head.linear.weight.copy_(kept[-1][1])
    chosen = {
        "pooling": pooling, "rounds": rounds, "held_out": tried[pooling, rounds],
        "by": f"mean average precision of {len(held)} pictures held out of train",
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip
    return Fitted(head.eval(), chosen)


def _targets(seen: Vectors, examples: Examples, places: np.ndarray) -> Int[Tensor, " n"]:
    return torch.tensor([examples.targets[row] for row in seen.rows[places].tolist()], dtype=torch.int64)


def again(head: Head, seen: Vectors, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Outputs of rows that were looked at."""
    places = seen.places(rows)
    with torch.inference_mode():
        return seen.rows[places], head.cpu().of(seen.of(head.pooling, places))


def scores(told: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """How well pictures whose class is known find each other."""
    known = [one for one in told if one["_target"] is not None]
    if len(known) < 2:
        return {}
    vectors = torch.stack([one["_vector"] for one in known])
    return {**retrieval(vectors, torch.tensor([one["_target"] for one in known])), "pictures": len(known)}


def known(source: Source, facts: Mapping[str, Any]) -> tuple[list[Any], Counter[str]]:
    """Targets of a source as far as it says them."""
    return known_labels(source, facts)


def measure(told: list[dict[str, Any]], seen: Vectors, examples: Examples, settings: Settings) -> dict[str, Any]:
    """Retrieval among the test pictures, beside the untouched features (the better pooling of each) and raw pixels."""
    at = {examples.keys[row]: row for row in examples.test.tolist()}
    places = seen.places(np.array([at[one["key"]] for one in told], dtype=np.int64))
    targets = _targets(seen, examples, places)
    untouched = [retrieval(seen.of(pooling, places), targets) for pooling in seen.pooled]
    best = max(untouched, key=lambda one: one["map"])
    trained = {examples.targets[row] for row in examples.learned.tolist()}
    strangers = len({examples.targets[row] for row in examples.test.tolist()} - trained)
    return {
        **scores(told, examples.facts), "strange_classes": strangers,
        "baselines": {"untouched": best, "pixels": retrieval(seen.pixels(places), targets)},
    }  # fmt: skip


def sections(told: list[dict[str, Any]], examples: Examples, result: Mapping[str, Any]) -> list[Section]:
    """A table beside untouched features and pixels."""
    columns = ("recall_at_1", "recall_at_5", "map")
    rows = [[who, *(f"{found[name]:.1f}" for name in columns)]
            for who, found in (("this projection", result), *result["baselines"].items())]  # fmt: skip
    table = Table("Percent", ["", "recall at 1", "recall at 5", "mean average precision"], rows, numbers=True)
    lede = "Every test picture asks all others; right is what is of its class."
    return [Section("Scores", lede, [table])]

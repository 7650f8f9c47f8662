"""Numbers of the reference MAE for tests/test_mae_parity.py: loss and gradient of every tensor, in float64.

    python tests/parity/make_mae.py CHECKOUT tests/parity/mae.safetensors

CHECKOUT is a clone of github.com/facebookresearch/mae (CC-BY-NC: nothing of it is kept here). An environment of its own
needs torch, timm, numpy and safetensors. Inputs and weights come from Python's `random`, which is the same everywhere.
"""

from __future__ import annotations

import functools
import math
import random
import sys

import torch
from torch import Tensor, nn

GEOMETRY = {"image_size": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2, "hidden": 64}
DECODER = {"decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}
SAMPLES, MASK = 3, 0.75
MEAN, STD = (0.5, 0.375, 0.25), (0.25, 0.5, 0.125)  # exact in binary


def redraw(name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Numbers that follow from the name alone, no two of them alike."""
    draw = random.Random(name)
    return torch.tensor([draw.uniform(low, high) for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape)


def redraw_parameters(method: nn.Module, prefix: str = "") -> None:
    """Every trained tensor non-constant: norms and biases too. `prefix` is taken off the names first."""
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix(prefix)
            gain = "norm" in name and name.endswith("weight")
            parameter.data = (
                redraw(name, tuple(parameter.shape), 0.5, 1.5)
                if gain
                else redraw(name, tuple(parameter.shape), -0.4, 0.4)
            )


def inputs() -> tuple[Tensor, Tensor]:
    """Pictures in [0, 1] and the noise whose order says what is masked."""
    size = GEOMETRY["image_size"]
    return redraw("images", (SAMPLES, 3, size, size), 0, 1), redraw(
        "noise", (SAMPLES, (size // GEOMETRY["patch"]) ** 2), 0, 1
    )


def main(checkout: str, path: str) -> None:
    import numpy
    import timm.models.vision_transformer as timm
    from safetensors.torch import save_file

    # the reference was written for numpy 1.19 and timm 0.3.2
    numpy.float = float
    block = timm.Block
    timm.Block = lambda *arguments, qk_scale, **settings: block(*arguments, **settings)
    sys.path.insert(0, checkout)
    import models_mae

    images, noise = inputs()
    images = (images - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]) / torch.tensor(STD, dtype=torch.float64)[
        :, None, None
    ]
    torch.rand = lambda *shape, device: noise
    numbers = {}
    for normalised in (False, True):
        model = models_mae.MaskedAutoencoderViT(
            img_size=GEOMETRY["image_size"], patch_size=GEOMETRY["patch"], embed_dim=GEOMETRY["width"],
            depth=GEOMETRY["depth"], num_heads=GEOMETRY["heads"], decoder_embed_dim=DECODER["decoder_width"],
            decoder_depth=DECODER["decoder_depth"], decoder_num_heads=DECODER["decoder_heads"],
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=normalised,
        ).double()  # fmt: skip
        # its tables are rounded to float32; they are made again, in float64
        for table in (model.pos_embed, model.decoder_pos_embed):
            side = GEOMETRY["image_size"] // GEOMETRY["patch"]
            exact = models_mae.get_2d_sincos_pos_embed(table.shape[-1], side, cls_token=True)
            table.data = torch.from_numpy(exact)[None]
        redraw_parameters(model)
        torch.set_default_dtype(torch.float64)  # its mask is made in the default type
        loss, _, _ = model(images, MASK)
        loss.backward()
        torch.set_default_dtype(torch.float32)
        kind = "normalised" if normalised else "plain"
        numbers[f"{kind}/loss"] = loss.detach()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and normalised:
                numbers[f"{kind}/{name}"] = parameter.grad.contiguous()
    save_file(numbers, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Same weights, pictures and masks as facebookresearch/mae: same loss and gradients, and no mutation passes for it.

tests/parity/make_mae.py made the numbers and says how.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saccade import vit
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.recipes import mae

PARITY = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("make_mae", PARITY / "make_mae.py")
make_mae = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_mae)
TOLERANCE = 1e-8


def build(
    *, position: str = "sincos", eps: float = 1e-6, activation: str = "gelu", normalise: bool = True
) -> mae.Method:
    """Our method with the redrawn weights, in float64."""
    geometry = make_mae.GEOMETRY | {"position": position, "init": "xavier", "eps": eps, "activation": activation}
    backbone = vit.ViT(vit.ViTConfig(mean=make_mae.MEAN, std=make_mae.STD, **geometry))
    config = mae.Config(
        arch="vit-ti/4", image_size=16, normalise_target=normalise, mask=make_mae.MASK, **make_mae.DECODER
    )
    method = mae.Method(config, backbone, {}).double()
    backbone.reset_buffers()
    method.decoder_pos_embed.copy_(vit.sincos(backbone.config.grid, config.decoder_width))
    make_mae.redraw_parameters(method, "backbone.")
    return method


def worst(method: mae.Method, kind: str = "normalised") -> float:
    """The largest relative difference from the reference, over the loss and every gradient."""
    reference = load_file(PARITY / "mae.safetensors")
    images, noise = make_mae.inputs()
    loss, _ = method({"images": images, "order": noise.argsort(1)}, torch.tensor(0.0))
    loss.backward()
    ours = {"loss": loss.detach()}
    if kind == "normalised":
        ours |= {name.removeprefix("backbone."): p.grad for name, p in method.named_parameters()}
    theirs = {name.removeprefix(f"{kind}/"): x for name, x in reference.items() if name.startswith(kind)}
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


@pytest.mark.parametrize("kind", ["plain", "normalised"])
def test_loss_and_gradients_are_the_reference_s(kind):
    assert worst(build(normalise=kind == "normalised"), kind) < TOLERANCE


def swap_norms(method: mae.Method) -> None:
    block = method.backbone.blocks[1]
    block.norm1.weight.data, block.norm2.weight.data = block.norm2.weight.data, block.norm1.weight.data


def swap_norms_of_the_last_decoder_block(method: mae.Method) -> None:
    block = method.decoder_blocks[-1]
    block.norm1.bias.data, block.norm2.bias.data = block.norm2.bias.data, block.norm1.bias.data


def decoder_eps(method: mae.Method) -> None:
    method.decoder_norm.eps = 1e-5


def decoder_y_first(method: mae.Method) -> None:
    method.decoder_pos_embed.copy_(vit.sincos(method.backbone.config.grid, method.config.decoder_width, x_first=False))


def no_decoder_positions(method: mae.Method) -> None:
    method.decoder_pos_embed.zero_()


def other_spread(method: mae.Method) -> None:
    method.backbone.std.mul_(1 + 1e-7)


def keep_others(method: mae.Method) -> None:
    method.kept += 1


@pytest.mark.parametrize(
    "mutate",
    [
        swap_norms,
        swap_norms_of_the_last_decoder_block,
        decoder_eps,
        decoder_y_first,
        no_decoder_positions,
        other_spread,
        keep_others,
    ],
)
def test_a_mutated_model_fails(mutate: Callable[[mae.Method], None]):
    method = build()
    mutate(method)
    assert worst(method) > 10 * TOLERANCE


@pytest.mark.parametrize("switches", [{"eps": 1e-5}, {"position": "sincos_y_first"}, {"activation": "gelu_tanh"}])
def test_a_wrong_switch_fails(switches):
    assert worst(build(**switches)) > 10 * TOLERANCE


def test_biased_variance_fails(monkeypatch):
    method = build()

    def biased(x: torch.Tensor, axis: int, keepdim: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return x.var(axis, correction=0, keepdim=keepdim), x.mean(axis, keepdim)

    monkeypatch.setattr(mae.torch, "var_mean", biased)
    assert worst(method) > 10 * TOLERANCE


def test_other_patches_as_target_fail(monkeypatch):
    method = build()
    target = method.target
    monkeypatch.setattr(method, "target", lambda images, hidden: target(images, hidden.flip(1)))
    assert worst(method) > 10 * TOLERANCE


def test_views_of_other_pictures_and_what_cannot_be():
    config = mae.Config(arch="vit-ti/4", image_size=16, channels=5, decoder_width=8, decoder_depth=1, decoder_heads=2)
    backbone = vit.build(config.arch, image_size=16, channels=5, **config.backbone())
    rows = torch.arange(2)
    pixels = torch.randint(0, 256, (2, 1, 5, 30, 20), dtype=torch.uint8)
    batch = {"pixels": pixels, "size": torch.tensor([[30, 20], [12, 20]])}
    seen = mae.views(config, batch, Draws(0, 0, rows, rows, rows))
    assert seen["images"].shape == (2, 5, 16, 16) and torch.equal(
        seen["order"].sort(1).values, torch.arange(16).tile(2, 1)
    )
    method = mae.Method(config, backbone, {})
    loss, _ = method(seen, torch.tensor(0.0))
    loss.backward()
    assert method.kept == 4 and loss.isfinite() and all(p.grad is not None for p in method.parameters())
    for settings, error in (({"image_size": 50}, "50 is not divisible by patch 4"), ({"mask": 0.99}, "leaves 0 of 16")):
        wrong = config.model_copy(update=settings)
        with pytest.raises(SaccadeError, match=error):
            mae.views(wrong, batch, Draws(0, 0, rows, rows, rows))

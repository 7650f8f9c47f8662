"""Other channels, patches and sizes: what must stay the same function does, and the record says what became another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade import backbone, resize, vit, weights
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.vit import ViTConfig

TINY = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "pre_norm": True, "patch_bias": False, "eps": 1e-5}


def redrawn(network: Any) -> Any:
    """Every weight and statistic non-constant."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.copy_(drawn + 1 if name.endswith(("norm1.weight", "norm2.weight", "running_var")) else drawn)
    return network.eval()


def saved(place: Path, arch: str = "vit-ti/4", image_size: int = 16, channels: int = 3, **switches: Any) -> Path:
    numbers = {**TINY, **switches} if arch.startswith("vit") else switches
    network = redrawn(backbone.build(arch, image_size=image_size, channels=channels, **numbers))
    weights.save_backbone(place, network, {"licence": "CC0-1.0"})
    return place


def tokens(encoder: Encoder, images: Tensor) -> Tensor:
    with torch.no_grad():
        features = encoder(images)
    return features.patches if features.cls is None else torch.cat([features.cls[:, None], features.patches], 1)


def noise(channels: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "switches", [{}, CLIP, {"mean": (0.5,) * 3, "std": (0.5,) * 3}], ids=["imagenet", "clip", "half"]
)
def test_one_channel_is_the_grey_picture(tmp_path: Path, switches: dict[str, Any]) -> None:
    place, grey = saved(tmp_path, **switches), noise(1)
    three, one = weights.load(place), weights.load(place, channels=1)
    torch.testing.assert_close(tokens(one, grey), tokens(three, grey.expand(-1, 3, -1, -1)), rtol=0, atol=2e-5)
    assert one.backbone.config.patch_bias == ("patch_bias" not in switches or CLIP is switches)
    assert one.preprocess.channels == 1 and len(one.record["mean"]) == len(one.record["std"]) == 1
    assert {"from": 3, "to": 1} == {name: one.record["channels"][name] for name in ("from", "to")}
    assert "patch_embed.proj.weight" in one.record["reshaped"] and "channels" not in three.record
    assert tokens(one, (grey * 255).byte()).isfinite().all()


@pytest.mark.parametrize("arch", ["resnet-10/8", "conv-4/16", "convnext-a/32", "convnext-a/8"])
def test_one_channel_of_a_convnet(tmp_path: Path, arch: str) -> None:
    """Away from the border, where a convolution's zeros stood for the mean colour and now stand for a grey."""
    place, grey = saved(tmp_path, arch, image_size=64), noise(1, 256, 256)
    three, one = weights.load(place), weights.load(place, channels=1)
    expected, found = (
        tokens(*pair).unflatten(1, (256 // three.backbone.stride,) * 2)
        for pair in ((three, grey.expand(-1, 3, -1, -1)), (one, grey))
    )
    apart = (found - expected).abs().amax((0, 3)) / expected.abs().max()
    middle = len(apart) // 2
    assert apart[middle, middle] < 1e-4
    assert apart.max() < (1e-4 if arch == "convnext-a/32" else 0.2)


@pytest.mark.parametrize("channels", [2, 4, 6, 13])
@pytest.mark.parametrize("switches", [{}, CLIP], ids=["imagenet", "clip"])
def test_more_channels_see_the_mean_of_every_third(tmp_path: Path, channels: int, switches: dict[str, Any]) -> None:
    place, bands = saved(tmp_path, **switches), noise(channels)
    many = weights.load(place, channels=channels)
    seen = [bands[:, start::3].mean(1) if start < channels else bands.mean(1) for start in range(3)]
    expected = tokens(weights.load(place), torch.stack(seen, 1))
    torch.testing.assert_close(tokens(many, bands), expected, rtol=0, atol=2e-5)
    flat = torch.full((1, 1, 16, 16), 0.4)
    torch.testing.assert_close(
        tokens(many, flat.expand(-1, channels, -1, -1)),
        tokens(weights.load(place), flat.expand(-1, 3, -1, -1)),
        rtol=0,
        atol=2e-5,
    )
    if channels > 3:
        assert many.record["mean"] == [many.record["mean"][band % 3] for band in range(channels)]


def test_named_bands_are_the_picture_of_these_bands(tmp_path: Path) -> None:
    place, bands = saved(tmp_path), noise(13)
    encoder = weights.load(place, channels=13, bands=(3, 2, 1))
    torch.testing.assert_close(
        tokens(encoder, bands), tokens(weights.load(place), bands[:, [3, 2, 1]]), rtol=0, atol=1e-5
    )
    assert encoder.record["asked"] == {"channels": 13, "bands": [3, 2, 1]}
    other = weights.load(place, channels=13, bands=(3, 2, 1), mean=(0.1,) * 13, std=(0.05,) * 13)
    theirs = weights.load(place)
    mean, std = (torch.tensor(values)[:, None, None] for values in (theirs.record["mean"], theirs.record["std"]))
    pictured = (bands[:, [3, 2, 1]] - 0.1) / 0.05 * std + mean
    torch.testing.assert_close(tokens(other, bands), tokens(theirs, pictured), rtol=0, atol=1e-4)


def test_the_same_channels_change_nothing(tmp_path: Path) -> None:
    place = saved(tmp_path)
    plain, asked = weights.load(place), weights.load(place, channels=3, patch=4)
    assert plain.record == asked.record
    for name, tensor in plain.backbone.state_dict().items():
        assert torch.equal(tensor, asked.backbone.state_dict()[name]), name


def test_there_and_back(tmp_path: Path) -> None:
    """An encoder of other channels is saved and goes on as any."""
    weights.save_backbone(tmp_path / "one", weights.load(saved(tmp_path), channels=1).backbone, {})
    grey, back = noise(1), weights.load(tmp_path / "one", channels=3)
    torch.testing.assert_close(
        tokens(back, grey.expand(-1, 3, -1, -1)),
        tokens(weights.load(tmp_path), grey.expand(-1, 3, -1, -1)),
        rtol=0,
        atol=2e-5,
    )


def projected(network: vit.ViT, patches: Tensor) -> Tensor:
    return F.conv2d(patches.double(), network.patch_embed.proj.weight.detach().double())


@pytest.mark.parametrize(("before", "after"), [(16, 32), (14, 16), (8, 16), (16, 17)])
def test_a_larger_patch_answers_to_the_enlarged_picture(tmp_path: Path, before: int, after: int) -> None:
    place = saved(tmp_path, f"vit-ti/{before}", image_size=4 * before)
    old, new = weights.load(place), weights.load(place, patch=after, image_size=4 * after)
    patches = noise(3, before, before).double()
    enlarged = F.interpolate(patches, size=(after, after), mode="bilinear", align_corners=False)
    torch.testing.assert_close(projected(new.backbone, enlarged), projected(old.backbone, patches), rtol=0, atol=1e-5)
    assert new.grid == (4, 4) and new.preprocess.crop == 4 * after
    torch.testing.assert_close(new.backbone.pos_embed, old.backbone.pos_embed, rtol=0, atol=0)
    assert new.record["patch"]["to"] == after and "2212.08013" in new.record["patch"]["how"]


def test_a_smaller_patch_is_the_nearest_there_is(tmp_path: Path) -> None:
    """For white noise, by the normal equations; and a picture that shrinking keeps (a flat one) is kept."""
    place = saved(tmp_path, "vit-ti/16", image_size=32)
    old, new = weights.load(place), weights.load(place, patch=8)
    assert new.grid == (4, 4) and new.backbone.config.image_size == 32 and new.record["reshaped"]
    eye = torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
    shrinking = F.interpolate(eye, size=(8, 8), mode="bilinear", antialias=True, align_corners=False).flatten(1).T
    weight, found = (each.backbone.patch_embed.proj.weight.detach().double().flatten(2) for each in (old, new))
    torch.testing.assert_close((found @ shrinking - weight) @ shrinking.T, torch.zeros_like(found), rtol=0, atol=1e-5)
    expected = F.interpolate(
        old.backbone.pos_embed[:, 1:].unflatten(1, (2, 2)).movedim(-1, 1), size=(4, 4), mode="bicubic"
    )
    torch.testing.assert_close(new.backbone.pos_embed[:, 1:], expected.flatten(2).mT, rtol=0, atol=1e-6)


def test_every_switch_is_kept_or_said_not_to_be() -> None:
    """A new switch of the ViT is kept where training goes on from an encoder, unless weights.py names it."""
    assert set(weights._CHOSEN) < set(ViTConfig.model_fields)
    assert {"heads", "eps", "activation", "mean", "std", "position_antialias", "rope_rounded"} <= {*weights._KEPT}
    encoder = Encoder(vit.build("vit-ti/4", image_size=16, **TINY, eps=1e-5, position="rope"), {"family": "saccade"})
    kept = weights.switches(encoder)
    assert kept["eps"] == 1e-5 and kept["position"] == "rope" and "width" not in kept

"""Other channels, patches and sizes: what must stay the same function does, and the record says what became another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from toys.sources import Bands

import saccade
from saccade import backbone, initial, published, vit, weights
from saccade.cli import main
from saccade.data import Sample
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.vit import ViTConfig

TINY = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "pre_norm": True, "patch_bias": False, "eps": 1e-5}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


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
    assert (one.record["channels"]["from"], one.record["channels"]["to"]) == (3, 1) and one.record["channels"]["how"]
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
    every = {name for family in backbone.FAMILIES.values() for name in family.config.model_fields}
    assert set(initial._CHOSEN) < every
    encoder = Encoder(vit.build("vit-ti/4", image_size=16, **TINY, eps=1e-5, position="rope"), {"family": "saccade"})
    kept = initial.switches(encoder)
    assert kept["eps"] == 1e-5 and kept["position"] == "rope" and "width" not in kept
    assert {"heads", "activation", "mean", "std", "position_antialias", "rope_rounded"} <= kept.keys()


def test_training_keeps_what_an_own_run_kept(tmp_path: Path) -> None:
    """A run that went on from CLIP is gone on from: its norm before the blocks and its mean are not the defaults."""
    encoder = weights.load(saved(tmp_path, **CLIP), channels=1)
    network = backbone.build("vit-ti/4", image_size=16, channels=1, **{**TINY, **initial.switches(encoder)})
    record = initial.load_state(network, encoder)
    assert record["channels"]["to"] == 1
    torch.testing.assert_close(network.eval()(noise(1)).cls, encoder(noise(1)).cls, rtol=0, atol=1e-6)


def test_init_makes_channels_and_patch_fit_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = backbone.build("vit-ti/16", image_size=32, position="sincos", depth=12)
    weights.save_backbone(tmp_path / "start", start, {"licence": "CC0-1.0"})
    sizes = {"arch": "vit-ti/8", "image_size": 16, "channels": 13, "batch": 4, "steps": 1}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    place = str(tmp_path / "start")
    run = saccade.pretrain(Bands(4), recipe="mae", out=tmp_path / "run", init=place, **sizes, **decoder)
    initial = saccade.load(run.path).record["initial"]
    assert (initial["channels"]["from"], initial["channels"]["to"]) == (3, 13)
    assert (initial["patch"]["from"], initial["patch"]["to"]) == (16, 8) and initial["image_size"]["to"] == 16
    said = capfd.readouterr().err
    assert "channels from 3 to 13" in said and "patch from 16 to 8" in said
    trained = saccade.load(run.path)
    assert trained.backbone.config.channels == 13 and trained.backbone.config.patch == 8


class Scenes(Bands):
    """Bands with a class: what the fifth band shows."""

    def make(self, index: int, generator: torch.Generator) -> Sample:
        sample = super().make(index, generator)
        assert sample.pixels is not None
        return Sample(sample.key, sample.pixels, label=str(int(sample.pixels[0, 4].float().mean() > 32767)))

    def label(self, index: int) -> str | None:
        return self[index].label


@pytest.mark.parametrize("arch", ["vit-ti/4", "resnet-10-half/8"])
def test_thirteen_bands_are_embedded_and_evaluated(tmp_path: Path, arch: str) -> None:
    place = saved(tmp_path / "backbone", arch)
    index = saccade.embed(place, Bands(6), out=tmp_path / "index", tokens=("mean",), channels=13)
    encoder = saccade.load(place, channels=13)
    expected = encoder(encoder.preprocess(Bands(6)[5].pixels)[None]).patches.mean(1)[0]
    torch.testing.assert_close(
        torch.from_numpy(index.vectors("mean")[5].copy()), expected.detach(), rtol=1e-4, atol=1e-5
    )
    result = saccade.evaluate(place, Scenes(40), tasks=("knn",), channels=13)
    assert 0 <= result["knn"] <= 100 and result["baselines"]["pixels"]["knn"] > 0
    with pytest.raises(SaccadeError, match=r"reads 3 channels, not 13 \[--channels\] \(--channels 13 makes"):
        saccade.embed(place, Bands(6), out=tmp_path / "other", tokens=("mean",))
    with pytest.raises(SaccadeError, match="loaded already"):
        saccade.embed(encoder, Bands(6), out=tmp_path / "other", channels=3)
    with pytest.raises(SaccadeError, match="another backbone"):  # the same file, but not the same encoder
        saccade.embed(place, Bands(6), out=tmp_path / "index", tokens=("mean",), channels=13 * 2)


def test_flags(tmp_path: Path) -> None:
    place, data = saved(tmp_path / "backbone", "vit-ti/8", image_size=32), tmp_path / "data"
    data.mkdir()
    for number in range(5):
        noisy = torch.rand(36, 32, generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        Image.fromarray(noisy).save(data / f"{number}.png")
    words = ["embed", str(place), str(data), "--out", str(tmp_path / "index"), "--channels", "1", "--patch", "16"]
    assert main(words) == 0
    index = saccade.Index.open(tmp_path / "index")
    assert index.search(image=data / "3.png", k=1)[0].score == pytest.approx(1, abs=1e-4)
    encoder = saccade.load(place, channels=1, patch=16)
    with torch.no_grad():
        expected = encoder(encoder.preprocess(data / "3.png")[None]).cls[0]
    torch.testing.assert_close(torch.from_numpy(index.vectors("cls")[3].copy()), expected, rtol=1e-4, atol=1e-5)
    assert main([*words[:-4], "--channels", "5", "--json"]) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"image_size": 18}, "18 is not divisible by patch 4.*use 16 or 20"),
        ({"patch": 8, "image_size": 20}, "20 is not divisible by patch 8.*use 16 or 24"),
        ({"bands": (0, 1, 2)}, "say channels=N too"),
        ({"channels": 4, "bands": (0, 1)}, "do not name 3 of 4 channels.*from 0 to 3"),
        ({"channels": 4, "bands": (0, 1, 4)}, "do not name 3 of 4"),
        ({"channels": 0}, "one channel or more"),
        ({"patch": 0}, "one pixel or more"),
        ({"channels": 4, "mean": (0.5,)}, "4 channels need as many means"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SaccadeError, match=message):
        weights.load(saved(tmp_path), **asked)


def test_a_convnet_has_no_patches(tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match=r"no patches.*stride"):
        weights.load(saved(tmp_path, "conv-4/16", image_size=32), patch=8)


RULES: dict[str, dict[str, Any]] = {
    "dino": {"offset": 0.1},
    "ibot": {"offset": 0.1},
    "dinov2": {"offset": 0.1},
    "dinov2-registers": {"antialias": True},
    "timm-vit": {"antialias": True},
    **{name: {} for name in ("clip", "siglip", "mae", "ijepa", "mocov3")},
}
"""How each family's authors (or, where they have no way, transformers) resize a learned table: recipes.md C10."""


@pytest.mark.parametrize("grid", [(3, 3), (5, 9), (11, 4), (12, 12)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_tables_of_every_family_at_any_size(name: str, grid: tuple[int, int]) -> None:
    family = published.families()[name.removesuffix("-registers")]
    switches = dict(family.switches) | {"pooling": "mean"}
    if family.read is not None:
        tensors = {"pos_embed": (1, 50, 32), "cls_token": (1, 1, 32), "blocks.0.attn.qkv.bias": (96,)}
        registers = {"register_tokens": (1, 4, 32)} if name.endswith("registers") else {}
        switches |= family.read(tensors | registers, {})
    network = redrawn(vit.ViT(ViTConfig(**{**TINY, **switches, "patch": 4, "image_size": 28})))
    rule, table = RULES[name], network.pos_embed[:, -49:].detach()
    stored = table.view(1, 7, 7, 32).permute(0, 3, 1, 2)
    if offset := rule.get("offset"):
        scale = tuple((side + offset) / 7 for side in grid)
        expected = F.interpolate(stored, scale_factor=scale, mode="bicubic")
    else:
        expected = F.interpolate(stored, size=grid, mode="bicubic", antialias=rule.get("antialias", False))
    assert expected.shape[2:] == grid
    torch.testing.assert_close(network.position_table(grid), expected.flatten(2).mT, rtol=0, atol=1e-6)
    images = noise(3, 4 * grid[0], 4 * grid[1])
    assert network(images).grid == grid


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (9, 4)], ids=str)
@pytest.mark.parametrize("x_first", [True, False], ids=["mae", "moco v3"])
def test_formulas_at_any_size_and_aspect(grid: tuple[int, int], x_first: bool) -> None:
    position = "sincos" if x_first else "sincos_y_first"
    network = vit.ViT(ViTConfig(**TINY, patch=4, image_size=16, position=position))
    found = network.position_table(grid)[0].view(*grid, 32)
    for row in range(grid[0]):
        for column in range(grid[1]):
            axes = [column, row] if x_first else [row, column]
            angles = [[place / 10000 ** (n / 8) for n in range(8)] for place in axes]
            expected = [
                one for turns in angles for wave in (torch.sin, torch.cos) for one in wave(torch.tensor(turns)).tolist()
            ]
            torch.testing.assert_close(found[row, column], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (9, 4)], ids=str)
def test_rotations_at_any_size_and_aspect(grid: tuple[int, int]) -> None:
    """DINOv3: the centre of a patch in [-1, 1] along each side, periods from 1 to 100, the row's angles first."""
    rotation = vit.Rotation(16, 2)
    rotation.reset_buffers()
    sine, cosine = rotation(grid, 1)
    assert sine.shape == (1, 1 + grid[0] * grid[1], 16) and not sine[0, 0].any() and (cosine[0, 0] == 1).all()
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = [2 * (row + 0.5) / grid[0] - 1, 2 * (column + 0.5) / grid[1] - 1]
            turns = torch.tensor([2 * torch.pi * place / 100 ** (n / 4) for place in places for n in range(4)] * 2)
            signed = turns.sin() * torch.tensor([-1.0] * 8 + [1.0] * 8)  # as they are added to the turned halves
            torch.testing.assert_close(sine[0, 1 + row * grid[1] + column], signed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["", "larger"])
def test_a_published_clip_on_grey_pictures(tmp_path: Path, size: str) -> None:
    """Through transformers' folder: its patch embedding has no bias until one is needed."""
    transformers = pytest.importorskip("transformers", reason="writes the folder")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape, image_size=32, patch_size=8))
    redrawn(network).save_pretrained(tmp_path / "clip")
    side = 32 if not size else 48
    three, one = (weights.load(tmp_path / "clip", channels=channels, image_size=side) for channels in (3, 1))
    assert one.record["family"] == "clip" and one.record["licence"] == "MIT" and one.backbone.config.patch_bias
    assert ("image_size" in one.record) == bool(size) and one.preprocess.crop == side
    grey = noise(1, side, side)
    torch.testing.assert_close(tokens(one, grey), tokens(three, grey.expand(-1, 3, -1, -1)), rtol=0, atol=2e-5)
    sizes = {"width": 32, "depth": 2, "hidden": 64}
    further = backbone.build("vit-ti/4", image_size=24, channels=1, **{**initial.switches(one), **sizes})
    record = initial.load_state(further, one)
    assert record["patch"]["to"] == 4 and record["channels"]["to"] == 1 and record["hash"] == one.record["hash"]
    enlarged = F.interpolate(grey[:, :, :24, :24], scale_factor=2, mode="nearest")
    assert further(enlarged).cls.isfinite().all()

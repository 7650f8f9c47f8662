"""Convnets: the numbers of torchvision and timm, the contract of every backbone, and every verb on one."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import saccade
from saccade import backbone, convnet, initial, optim, vit, weights
from saccade.encoder import untrained
from saccade.errors import SaccadeError
from saccade.evaluate.features import _poolings

PARITY = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("make_convnet", PARITY / "make_convnet.py")
make_convnet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_convnet)
REFERENCE = load_file(PARITY / "convnet.safetensors")
TOLERANCE = 1e-8
KINDS = sorted({name.split("/gradient")[0] for name in REFERENCE if "/gradient" in name})


def redrawn(kind: str) -> convnet.Convnet:
    """Our network with the redrawn tensors, in float64; `kind` is an architecture and a mode."""
    arch, mode = kind.split()
    network = backbone.build(arch, image_size=64, mean=make_convnet.MEAN, std=make_convnet.STD).double()
    network.reset_buffers()
    make_convnet.redraw_all(network)
    return network.train(mode == "train")


def worst(network: convnet.Convnet, kind: str) -> float:
    """The largest difference from the reference, relative to the size of what is compared."""
    ours = make_convnet.numbers(network, network(make_convnet.inputs()).patches)
    theirs = {name.removeprefix(f"{kind}/"): x for name, x in REFERENCE.items() if name.startswith(f"{kind}/")}
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_features_gradients_and_statistics_are_the_reference_s(kind: str) -> None:
    assert worst(redrawn(kind), kind) < TOLERANCE


def swap_norms(network: convnet.Convnet) -> None:
    block = network.layer2[1]
    block.bn1.weight.data, block.bn2.weight.data = block.bn2.weight.data, block.bn1.weight.data


def other_eps(network: convnet.Convnet) -> None:
    network.layer4[0].bn1.eps = 1.1e-5


def other_momentum(network: convnet.Convnet) -> None:
    network.layer1[0].bn1.momentum = 0.11


def stride_in_the_first(network: convnet.Convnet) -> None:
    block = network.layer2[0]
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def no_shortcut(network: convnet.Convnet) -> None:
    network.layer1[1].downsample = nn.Sequential(nn.ReLU(), nn.Tanh())


def other_spread(network: convnet.Convnet) -> None:
    network.std.mul_(1 + 1e-6)


def norm_eps(network: convnet.Convnet) -> None:
    network.norm.eps = 1e-5


def block_eps(network: convnet.Convnet) -> None:
    network.stages[2][4].norm.eps = 1e-5


def downsample_eps(network: convnet.Convnet) -> None:
    network.downsample_layers[0][1].eps = 1e-5


def swap_blocks(network: convnet.Convnet) -> None:
    network.stages[0][0].gamma.data, network.stages[0][1].gamma.data = (
        block.gamma for block in network.stages[0][1::-1]
    )


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [
        ("resnet-18/32 eval", swap_norms),
        ("resnet-18/32 train", other_eps),
        ("resnet-18/32 train", other_momentum),
        ("resnet-50/32 eval", stride_in_the_first),
        ("resnet-18/8 train", no_shortcut),
        ("resnet-18/8 train", other_spread),
        ("convnext-t/32 eval", norm_eps),
        ("convnext-t/32 eval", block_eps),
        ("convnext-t/32 eval", downsample_eps),
        ("convnext-t/32 eval", swap_blocks),
    ],
)
def test_a_mutated_network_fails(kind: str, mutate: Callable[[convnet.Convnet], None]) -> None:
    network = redrawn(kind)
    mutate(network)
    assert worst(network, kind) > 10 * TOLERANCE


def test_another_gelu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = convnet.Linear.forward
    monkeypatch.setattr(
        convnet.Linear,
        "forward",
        lambda layer, x, then="none": forward(layer, x, "gelu_tanh" if then == "gelu" else then),
    )
    assert worst(redrawn("convnext-t/32 eval"), "convnext-t/32 eval") > 10 * TOLERANCE


def test_every_tensor_of_the_reference_has_its_name() -> None:
    for kind in KINDS:
        names = {name.split("gradient ")[1] for name in REFERENCE if name.startswith(f"{kind}/gradient")}
        with torch.device("meta"):
            assert dict(backbone.build(kind.split()[0], image_size=64).named_parameters()).keys() == names


TINY = {
    "resnet": lambda **settings: convnet.ResNet(
        convnet.ResNetConfig(**{"blocks": (1, 2), "widths": (8, 12), "stride": 2, "image_size": 16} | settings)
    ),
    "bottleneck": lambda **settings: convnet.ResNet(
        convnet.ResNetConfig(
            **{"kind": "bottleneck", "blocks": (1, 1), "widths": (4, 8), "stride": 8, "image_size": 16} | settings
        )
    ),
    "conv": lambda **settings: convnet.Conv(
        convnet.ConvConfig(**{"blocks": (1, 2), "widths": (8, 12), "stride": 4, "image_size": 16} | settings)
    ),
    "convnext": lambda **settings: convnet.ConvNeXt(
        convnet.ConvNeXtConfig(**{"blocks": (1, 2), "widths": (8, 12), "stride": 2, "image_size": 16} | settings)
    ),
}


def tiny(family: str, **settings: object) -> convnet.Convnet:
    """A little network in float64 in which no tensor is constant."""
    network = TINY[family](**settings).double()
    network.reset_buffers()
    make_convnet.redraw_all(network)
    return network.eval()


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("step", [2, 4, 8])
def test_the_contract_of_features(family: str, step: int) -> None:
    network = tiny(family, stride=step)
    assert isinstance(network, backbone.Backbone)
    for height, width in ((16, 16), (17, 31), (8, 9)):
        images = torch.rand(2, 3, height, width, dtype=torch.float64)
        features = network(images)
        count, d = math.prod(features.grid), network.config.width
        assert features.grid == network.config.grid_of(height, width)
        assert abs(features.grid[1] - width / step) < 1
        assert features.cls is None and features.registers.shape == (2, 0, d)
        assert features.patches.shape == (2, count, d) and features.positions.shape == (2, count, 2)
        second = min(1, count - 1)
        assert features.positions[1, second].tolist() == [second // features.grid[1], second % features.grid[1]]
        assert features.positions[0, -1].tolist() == [n - 1 for n in features.grid]
        torch.testing.assert_close(network.embedding(features), features.patches.mean(1))
        torch.testing.assert_close(network.pooled(images), features.patches.mean(1))
    assert network.stride == network.config.stride == step and network.config.grid == (16 // step,) * 2
    assert len(network.drop_rates(0.3)) == network.branches == (3 if family == "convnext" else 0)
    assert type(network.config).model_validate_json(network.config.model_dump_json()) == network.config


@pytest.mark.parametrize("family", TINY)
def test_a_patch_says_what_is_where_it_stands(family: str) -> None:
    """What is changed in one corner moves the features of that corner most."""
    network, images = tiny(family, stride=2, image_size=32), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    other = images.clone()
    other[..., :4, 28:] += 1
    moved = (network(images).patches - network(other).patches).norm(dim=2)[0]
    places = network(images).positions[0, moved.argmax()]
    assert places[0] < 4 and places[1] > 11


@pytest.mark.parametrize("family", TINY)
def test_pictures_may_be_bytes_and_normalisation_is_inside(family: str) -> None:
    network = tiny(family, channels=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5, 0.4, 0.3, 0.2, 0.1))
    pixels = torch.randint(0, 256, (2, 5, 16, 16), dtype=torch.uint8)
    images = pixels.double() / 255
    torch.testing.assert_close(network(pixels).patches, network(images).patches, rtol=1e-9, atol=1e-11)
    plain = tiny(family, channels=5, mean=(0.0,) * 5, std=(1.0,) * 5)
    mean, std = (part[:, None, None] for part in (network.mean, network.std))
    torch.testing.assert_close(plain((images - mean) / std).patches, network(images).patches)
    assert network.normalise(images).shape == images.shape


def test_plain_blocks_are_convolution_norm_relu_and_pooling() -> None:
    network, images = tiny("conv", stride=2), torch.rand(2, 3, 9, 16, dtype=torch.float64)
    x = network.normalise(images)
    for number, stage in enumerate(network.stages):
        for block in stage:
            norm = block.norm
            x = F.conv2d(x, block.conv.weight, padding=1)
            x = F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))
        x = F.max_pool2d(x, 2) if number else x  # a stem of stride 1: the first stage is not pooled
    torch.testing.assert_close(network(images).patches, x.flatten(2).transpose(1, 2))
    assert network(images).grid == (4, 8)


def test_dropped_branches_of_a_convnext() -> None:
    network, images = tiny("convnext"), torch.rand(3, 3, 16, 16, dtype=torch.float64)
    whole = network(images)
    ones = torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(network(images, drop=ones).patches, whole.patches)
    drop = ones.clone()
    drop[1, 2] = 0
    some = network(images, drop=drop)
    torch.testing.assert_close(some.patches[::2], whole.patches[::2])
    network.stages[1][1].gamma.data.zero_()  # the third branch
    torch.testing.assert_close(some.patches[1], network(images).patches[1])
    assert not torch.allclose(some.patches[1], whole.patches[1])
    torch.testing.assert_close(network.pooled(images, drop=drop)[1], some.patches[1].mean(0))


def test_branches_of_a_fresh_resnet_begin_at_zero() -> None:
    network = TINY["resnet"]()
    block = network.layer2[1]
    x = torch.rand(2, 12, 4, 4)
    torch.testing.assert_close(block(x), x)
    assert block.bn1.weight.data.eq(1).all() and network.bn1.weight.data.eq(1).all()
    spread = torch.stack([backbone.build("resnet-10/8", image_size=32).layer4[0].conv1.weight.std() for _ in range(2)])
    torch.testing.assert_close(spread, torch.full((2,), math.sqrt(2 / (9 * 512))), rtol=0.01, atol=0)


MILLIONS = {"resnet-18": 11.1765, "resnet-34": 21.2847, "resnet-50": 23.5080, "resnet-10": 4.9033, "resnet-8": 1.2324}
MILLIONS |= {"convnext-t": 27.8201, "convnext-s": 49.4539, "convnext-b": 87.5660, "convnext-l": 196.2301}


@pytest.mark.parametrize(
    "name", [name for family in ("resnet", "conv", "convnext") for name in backbone.FAMILIES[family].names]
)
def test_every_size_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        network = backbone.build(name.partition("/")[0] + "/16", image_size=224)
    assert all(p.is_meta for p in network.parameters())
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert abs(count - MILLIONS.get(name.partition("/")[0], count)) < 0.02, count


@pytest.mark.parametrize("family", TINY)
def test_a_network_from_the_meta_device_can_be_filled(family: str) -> None:
    with torch.device("meta"):
        network = TINY[family]()
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(77)
    torch.manual_seed(0)
    network.reset_parameters()
    other = TINY[family]()
    torch.manual_seed(0)
    other.reset_parameters()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name
    assert torch.equal(network.mean, other.mean)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: backbone.build("resnet-19/8", image_size=32), "no architecture.*did you mean 'resnet-18/8'"),
        (lambda: backbone.build("resnet50", image_size=32), "no architecture.*did you mean 'resnet-50/32'"),
        (lambda: backbone.build("resnet-18", image_size=32), "no architecture.*did you mean 'resnet-18/32'"),
        (lambda: backbone.build("convnext-tiny/32", image_size=64), "did you mean 'convnext-t/32'"),
        (lambda: backbone.build("vit-tiny/4", image_size=32), "did you mean 'vit-ti/4'"),
        (lambda: backbone.build("resnet-18/4", image_size=32), r"stride of 4 \[--arch\] \(use one of 8, 16, 32"),
        (lambda: backbone.build("resnet-18/32", image_size=24), r"size 24 leaves no cell.*--image-size.*32 or more"),
        (lambda: tiny("convnext", stride=8)(torch.rand(1, 3, 7, 16)), "size 7 leaves no cell at stride 8"),
        (lambda: tiny("resnet")(torch.rand(1, 1, 16, 16)), "reads 3 channels, not 1"),
        (lambda: backbone.build("resnet-18/8", image_size=32, position="sincos"), "this recipe needs a ViT.*--arch"),
        (lambda: backbone.build("resnet-18/8", image_size=32, width=4), "no switch|needs a ViT"),
        (lambda: backbone.build("resnet-18/8", image_size=32, kinds="basic"), "no switch 'kinds'.*mean 'kind'"),
        (lambda: backbone.build("vit-ti/4", image_size=50), r"\[--image-size\] \(use 48 or 52"),
        (lambda: convnet.ResNetConfig(blocks=(1, 1), widths=(8,), stride=2), "as many widths"),
    ],
)
def test_mistakes_name_the_way_out(call: Callable[[], object], says: str) -> None:
    with pytest.raises(SaccadeError) as caught:
        call()
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)


def test_layer_decay_counts_blocks_of_any_family() -> None:
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.bn2.bias", "layer2.0.downsample.0.weight", "fc.weight"]
    assert list(optim.layer_scales(names, 0.5).values()) == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    names = ["downsample_layers.0.0.weight", "stages.0.0.gamma", "downsample_layers.1.1.weight", "stages.1.0.norm.bias"]
    scales = optim.layer_scales([*names, "stages.1.10.norm.bias", "stages.1.9.gamma", "norm.weight"], 0.5)
    assert list(scales.values()) == [1 / 32, 1 / 16, 1 / 8, 1 / 8, 1 / 2, 1 / 4, 1]
    names = ["cls_token", "blocks.0.norm1.weight", "blocks.10.norm1.weight", "blocks.9.mlp.fc1.weight", "norm.bias"]
    assert list(optim.layer_scales(names, 0.5).values()) == [1 / 16, 1 / 8, 1 / 2, 1 / 4, 1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colours, to train on and to test on."""
    place, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for number, name in enumerate(("dark", "light")):
            (place / part / name).mkdir(parents=True)
            for row in range(count):
                noise = draw.integers(100 * number, 100 * number + 60, (20, 24, 3), np.uint8)
                Image.fromarray(noise).save(place / part / name / f"{row}.png")
    return place


@pytest.mark.parametrize("family", TINY)
def test_every_verb_takes_a_convnet(family: str, pictures: Path, tmp_path: Path) -> None:
    network = TINY[family]().eval()
    for name, part in network.named_buffers():
        if "running" in name:
            part += 0.1  # statistics that were learned
    weights.save_backbone(tmp_path / "run" / "backbone", network, {"licence": "CC0-1.0"})
    encoder = saccade.load(tmp_path / "run")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(encoder(images).patches, network(images).patches, rtol=0, atol=0)
    assert encoder.grid == (16 // network.stride,) * 2
    assert encoder.record["size"] == 16 and encoder.record["missing"] == []
    config = json.loads((tmp_path / "run" / "backbone" / "config.json").read_text())
    assert config[backbone.family_of(network)]["widths"] == list(network.config.widths)
    fresh, again = (untrained(encoder, 3)(images).patches for _ in range(2))
    assert torch.equal(fresh, again) and not torch.equal(fresh, network(images).patches)
    found = saccade.evaluate(tmp_path / "run", pictures, tasks=("knn",))
    assert found["knn"] == 100 and found["pooled"]["chosen"] == "mean" and set(found["pooled"]) >= {"mean"}
    assert set(_poolings(encoder, encoder(images))) == {"mean"}
    data = pictures / "train" / "dark"
    index = saccade.embed(tmp_path / "run", data, out=tmp_path / "index", image_size=24)
    assert index.summary()["tokens"] == ["mean"] and index.summary()["dim"] == network.config.width
    assert index.search(image=data / "3.png")[0].key == "3.png"
    with pytest.raises(SaccadeError, match=r"no class token.*--tokens mean"):
        saccade.embed(tmp_path / "run", data, out=tmp_path / "other", tokens=("cls",))
    settings = {"tokens": ("mean", "patches"), "image_size": 24}
    patches = saccade.embed(tmp_path / "run", data, out=tmp_path / "patches", **settings).vectors("patches")
    assert patches.shape == (12, (24 // network.stride) ** 2, network.config.width)


def test_weights_of_another_family_are_refused_and_of_this_one_taken(tmp_path: Path) -> None:
    network = TINY["resnet"]()
    weights.save_backbone(tmp_path, network, {"licence": "CC0-1.0"})
    fresh = TINY["resnet"](image_size=24)
    saved = weights.load(tmp_path)
    assert initial.load_state(fresh, saved)["licence"] == "CC0-1.0"
    assert torch.equal(fresh.layer1[0].conv1.weight, network.layer1[0].conv1.weight)
    for other in (TINY["convnext"](), vit.build("vit-ti/4", image_size=16)):
        with pytest.raises(SaccadeError, match="another architecture"):
            initial.load_state(other, saved)

"""ConvNeXts and ResNets: transformers' own networks are the oracle, every tensor of which is drawn anew."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import backbone, initial, published, weights
from saccade.convnet import ConvNeXt, ConvNeXtConfig, ResNet, ResNetConfig
from saccade.embed import embed
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.features import _poolings
from saccade.published import dinov3_convnext, resnet, timm_convnext

transformers = pytest.importorskip("transformers", reason="the oracle")

BLOCKS, WIDTHS = (1, 1, 2, 1), (8, 16, 24, 32)
SIZES = {"native": (64, 64), "not square": (64, 96), "smaller": (32, 32), "odd": (70, 101)}
NEXT = {"hidden_sizes": list(WIDTHS), "depths": list(BLOCKS), "image_size": 64}
"""Its image_size is what the native size of a network that is not published is read from."""


def _resnet(kind: str) -> Any:
    widths = [width * (4 if kind == "bottleneck" else 1) for width in WIDTHS]
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=list(BLOCKS), layer_type=kind)
    return transformers.ResNetModel(config)


CASES: dict[str, Callable[[], Any]] = {
    "dinov3-convnext": lambda: transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**NEXT)),
    "timm-convnext": lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**NEXT)),
    "resnet-basic": lambda: _resnet("basic"),
    "resnet-bottleneck": lambda: _resnet("bottleneck"),
}


def _oracle(case: str) -> Any:
    """transformers' network with no tensor left as it was made; eps of the last norm as trained."""
    model = CASES[case]().eval()
    draw = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if not tensor.is_floating_point():
                tensor.fill_(7)
            elif tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * tensor[0].numel() ** -0.5)
            else:  # all of one kind, so that any two can change places
                tensor.copy_(0.3 + torch.rand(tensor.shape, generator=draw))
    if case == "timm-convnext":
        model.layernorm.eps = 1e-6
    return model


def _pictures(size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(5))


def _theirs(case: str, model: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pooled vector and patches. transformers norms only the pooled vector of a plain ConvNeXt."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in published.IMAGENET.values())
    with torch.no_grad():
        found = model((_pictures(size) - mean) / std)
        pooled, patches = found.pooler_output.flatten(1), found.last_hidden_state
        if case == "dinov3-convnext":
            return pooled, patches[:, 1:]
        patches = patches.flatten(2).transpose(1, 2)
        return pooled, model.layernorm(patches) if case == "timm-convnext" else patches


def _difference(case: str, model: Any, encoder: Encoder, size: tuple[int, int] = (64, 64)) -> float:
    with torch.no_grad():
        features = encoder(_pictures(size))
    pooled, patches = _theirs(case, model, size)
    return max((encoder.embedding(features) - pooled).abs().max(), (features.patches - patches).abs().max()).item()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def oracle(case: str) -> Any:
    return _oracle(case)


@pytest.fixture
def saved(oracle: Any, tmp_path: Path) -> Path:
    oracle.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _family(case: str) -> published.Family:
    return published.families()[case.partition("-b")[0]]


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_features_are_those_of_transformers(case: str, oracle: Any, saved: Path, size: tuple[int, int]) -> None:
    encoder = weights.load(saved)
    assert _difference(case, oracle, encoder, size) < 1e-5
    record = encoder.record
    assert (record["family"], record["naming"], record["arch"]) == (_family(case).name, "transformers", None)
    assert record["pooling"] == ("mean" if case.startswith("resnet") else "cls")
    assert record["matched"] == len(encoder.backbone.state_dict())
    assert record["missing"] == record["unexpected"] == record["ignored"] == record["reshaped"] == []


def _pairs(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Neighbours of like shape in every block, and the parts of the last norm."""
    found, names = [], sorted(name for name in tensors if tensors[name].is_floating_point())
    for one, other in itertools.pairwise(names):
        if tensors[one].shape == tensors[other].shape and one.rpartition(".")[0] == other.rpartition(".")[0]:
            found.append((one, other))
    return found


def test_mutations_are_seen(case: str, oracle: Any, saved: Path) -> None:
    """Every pair of like shape swapped, every tensor flipped: none may go unseen."""
    encoder = weights.load(saved)
    naming = _family(case).namings["transformers"]
    whole = load_file(saved / "model.safetensors")
    mutants = [whole | {one: whole[other], other: whole[one]} for one, other in _pairs(whole)]
    mutants += [whole | {name: x.flatten().flip(0).view(x.shape)} for name, x in whole.items() if x.ndim]
    assert len(mutants) > 50
    for mutant in mutants:
        encoder.backbone.load_state_dict(published.to_ours(naming, mutant))
        assert _difference(case, oracle, encoder, (32, 32)) > 1e-4
    encoder.backbone.load_state_dict(published.to_ours(naming, whole))
    assert _difference(case, oracle, encoder) < 1e-5


def test_the_way_back(case: str, oracle: Any, saved: Path) -> None:
    """Our weights by their names, loaded by transformers: the same features, and the same bits."""
    encoder = weights.load(saved)
    theirs = published.to_theirs(_family(case).namings["transformers"], encoder.backbone.state_dict())
    whole = load_file(saved / "model.safetensors")
    assert theirs.keys() == whole.keys() and all(torch.equal(theirs[name], whole[name]) for name in whole)
    save_file(theirs, saved / "model.safetensors")
    again = type(oracle).from_pretrained(saved).eval()
    if case == "timm-convnext":
        again.layernorm.eps = 1e-6
    assert _difference(case, again, encoder) < 1e-5


EVERY = [(name, naming) for name in published.families() for naming in published.families()[name].namings]
CONVNETS = [(name, naming) for name, naming in EVERY if published.families()[name].network != "vit"]


def _network(network: str, **switches: Any) -> Any:
    """A tiny network of ours with every tensor drawn."""
    numbers = {"blocks": BLOCKS, "widths": WIDTHS, "image_size": 64}
    if network == "resnet":
        numbers |= {"kind": "bottleneck"}
    made = backbone.FAMILIES[network].network(backbone.FAMILIES[network].config(**numbers, **switches))
    draw = torch.Generator().manual_seed(9)
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + (0.5 if "var" in name else -0.3))
        else:
            tensor.fill_(3)
    return made.eval()


@pytest.mark.parametrize(("name", "naming"), CONVNETS)
def test_a_naming_round_trips_bit_for_bit(name: str, naming: str) -> None:
    family = published.families()[name]
    ours = _network(family.network, **family.switches).state_dict()
    theirs = published.to_theirs(family.namings[naming], ours)
    again = published.to_ours(family.namings[naming], theirs)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)
    back = published.to_theirs(family.namings[naming], again)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)
    with pytest.raises(SaccadeError, match=r"no place for odd\.bias"):
        published.to_theirs(family.namings[naming], {**ours, "odd.bias": torch.zeros(3)})


@pytest.mark.parametrize("name", sorted({name for name, _ in CONVNETS}))
def test_sizes_are_recognised_and_have_the_parameters_that_are_said(name: str) -> None:
    """Every published size, the first in every naming, on the meta device."""
    family = published.families()[name]
    kind = backbone.FAMILIES[family.network]
    for title, size in family.sizes.items():
        with torch.device("meta"):
            network = kind.network(kind.config(**size.numbers, **family.switches, image_size=size.image_size))
        assert sum(x.numel() for x in network.parameters()) == size.parameters, title
        first = title == next(iter(family.sizes))
        for naming in [*family.namings.values()][: None if first else 1]:
            theirs = published.to_theirs(naming, network.state_dict(), naming.prefixes[0])
            shapes = {key: tuple(x.shape) for key, x in theirs.items()}
            said = {"model_type": naming.model_types[0], "depths": size.blocks} if naming.model_types else {}
            found = published.recognise(shapes, said, size.names[0])
            assert (found.family.name, found.size) == (name, title)
            assert found.config["image_size"] == size.image_size and found.config["channels"] == 3


def test_convnext_as_its_authors_and_timm_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names by a hand that is not the one under test; norms.3 is norm, or the file is refused."""
    model = _oracle("dinov3-convnext")
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    tiny = {"convnext-tiny/32": published.ConvnetSize(BLOCKS, WIDTHS, 64, 0)}
    for page in (dinov3_convnext, timm_convnext):
        monkeypatch.setattr(page, "FAMILY", replace(page.FAMILY, sizes=tiny))
    official, timm = {}, {}
    for name, tensor in tensors.items():
        name = re.sub(r"stages\.(\d)\.downsample_layers\.", r"downsample_layers.\1.", name)
        name = re.sub(r"stages\.(\d)\.layers\.", r"stages.\1.", name)
        name = (
            name.replace("depthwise_conv", "dwconv").replace("pointwise_conv", "pwconv").replace("layer_norm", "norm")
        )
        official[name] = tensor
        other = re.sub(r"^stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2.", name)
        other = re.sub(r"^downsample_layers\.0\.", "stem.", other)
        other = re.sub(r"^downsample_layers\.(\d)\.", r"stages.\1.downsample.", other)
        other = other.replace("dwconv", "conv_dw").replace("pwconv", "mlp.fc")
        timm[f"head.{other}" if other.startswith("norm.") else other] = tensor
    twice = official | {f"norms.3.{kind}": official[f"norm.{kind}"].clone() for kind in ("weight", "bias")}
    for name, file in (("dinov3_convnext_tiny.pth", twice), ("convnext_tiny.dinov3_lvd1689m.pth", timm)):
        torch.save(file, tmp_path / name)
        encoder = weights.load(tmp_path / name)
        assert (encoder.record["family"], encoder.record["arch"]) == ("dinov3-convnext", "convnext-tiny/32")
        assert _difference("dinov3-convnext", model, encoder) < 1e-5
    twice["norms.3.bias"][0] += 1e-6
    torch.save(twice, tmp_path / "dinov3_other.pth")
    assert "norms.3 is not norm" in _refusal(tmp_path / "dinov3_other.pth")
    torch.save(timm, tmp_path / "convnext_tiny.fb_in22k.pth")
    record = weights.load(tmp_path / "convnext_tiny.fb_in22k.pth").record
    assert (record["family"], record["licence"]) == ("timm-convnext", "unknown")
    torch.save(timm, tmp_path / "convnext_tiny.eupe_lvd1689m.pth")
    assert "these tensors may be of" in _refusal(tmp_path / "convnext_tiny.eupe_lvd1689m.pth")


def _refusal(place: Path) -> str:
    with pytest.raises(SaccadeError) as caught:
        weights.load(place)
    return str(caught.value)


LOST = ["layers.0.", "stages.3", "stages.2.layers.1"]


@pytest.mark.parametrize("lost", LOST)
def test_half_a_state_dict_is_refused(case: str, saved: Path, lost: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    left = {name: x for name, x in tensors.items() if lost not in name}
    assert len(left) < len(tensors)
    save_file(left, saved / "model.safetensors")
    assert "not a whole encoder" in _refusal(saved)


def test_half_a_state_dict_without_a_config_is_refused(case: str, saved: Path) -> None:
    """A network of fewer blocks has the very names and shapes: only a published size is believed."""
    (saved / "config.json").unlink()
    assert "nothing says that it is whole" in _refusal(saved)
    family = _family(case)
    network = {"convnext": ConvNeXt, "resnet": ResNet}[family.network]
    settings = {"convnext": ConvNeXtConfig, "resnet": ResNetConfig}[family.network]
    size = next(iter(family.sizes.values()))
    with torch.device("meta"):
        whole = network(settings(**size.numbers, **family.switches)).state_dict()
    naming = family.namings["transformers"]
    for lost in ("3.", r"[234]\.1\."):  # the last stage; the last block of some stages
        ours = {name: x for name, x in whole.items() if not re.match(rf"\D+{lost}", name)}
        shapes = {name: tuple(x.shape) for name, x in published.to_theirs(naming, ours).items()}
        assert 0 < len(shapes) < len(whole)
        with pytest.raises(SaccadeError, match="not a whole encoder"):
            published.recognise(shapes, None, family.name)


def test_another_network_under_the_same_names_is_refused(tmp_path: Path) -> None:
    for case, said in (
        ("resnet-bottleneck", {"downsample_in_bottleneck": True}),
        ("resnet-basic", {"hidden_act": "gelu"}),
        ("dinov3-convnext", {"hidden_act": "relu"}),
    ):
        _oracle(case).save_pretrained(tmp_path / case)
        path = tmp_path / case / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
        assert f"its config.json says {next(iter(said))}" in _refusal(tmp_path / case)


def _official_resnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    """A tiny bottleneck network as if it were published, and its tensors by torchvision's names."""
    tiny = {"resnet-tiny/32": published.ConvnetSize(BLOCKS, WIDTHS, 64, 0, kind="bottleneck")}
    for name, value in vars(resnet).copy().items():
        if isinstance(value, published.Family):
            monkeypatch.setattr(resnet, name, replace(value, sizes=tiny))
    model = _oracle("resnet-bottleneck")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^encoder\.stages\.(\d)\.layers", lambda found: f"layer{int(found[1]) + 1}", name)
        for k in (0, 1, 2):
            name = name.replace(f"layer.{k}.convolution", f"conv{k + 1}").replace(f"layer.{k}.norm", f"bn{k + 1}.norm")
        name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.norm", "downsample.1.norm")
        name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.norm", "bn1.norm")
        tensors[name.replace("normalization.", "")] = tensor.clone()
    tensors = {re.sub(r"\.(bn\d|downsample\.1)\.", r".\1.", name): x for name, x in tensors.items()}
    return model, tensors


CALLED = {
    "resnet50-0676ba61.pth": ("resnet", "unknown", ""),
    "dino_resnet50_pretrain.pth": ("dino-resnet", "Apache-2.0", ""),
    "swav_800ep_pretrain.pth.tar": ("swav", "CC-BY-NC-4.0", "module."),
    "barlowtwins/resnet50.pth": ("barlow-twins", "MIT", ""),
    "vicreg/resnet50.pth": ("vicreg", "MIT", ""),
    "resnet50-1x.pth": ("simclr", "Apache-2.0", "state_dict."),
    "r-50-1000ep.pth.tar": ("mocov3-resnet", "CC-BY-NC-4.0", "state_dict.module.base_encoder."),
    "any.pth": ("augnet", "MIT", "module.pre."),
}


@pytest.mark.parametrize("name", CALLED)
def test_names_and_prefixes_tell_resnets_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, tensors = _official_resnet(tmp_path, monkeypatch)
    family, licence, prefix = CALLED[name]
    path = tmp_path / "given" / name
    path.parent.mkdir(parents=True)
    content = {f"{prefix}{key}": x for key, x in tensors.items()} | {f"{prefix}fc.weight": torch.zeros(5, 128)}
    if "base_encoder" in prefix:
        content |= {name.replace("base_", "momentum_"): x + 1 for name, x in content.items()}
    if family == "swav":
        content |= {"module.prototypes.weight": torch.zeros(3), "module.projection_head.0.bias": torch.zeros(3)}
    torch.save(content, path)
    encoder = weights.load(path)
    assert (encoder.record["family"], encoder.record["licence"]) == (family, licence)
    assert (encoder.record["matched"], encoder.record["size"]) == (len(tensors), 64)
    assert f"{prefix}fc.weight" in encoder.record["ignored"]
    if family not in ("swav", "simclr"):  # whose normalisation is another
        assert _difference("resnet-bottleneck", model, encoder) < 1e-5
    assert (encoder.backbone.std[0] == 1) == (family == "simclr")


def test_a_resnet_that_nothing_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = _official_resnet(tmp_path, monkeypatch)
    torch.save(tensors, tmp_path / "checkpoint.pth")
    assert "these tensors may be of" in _refusal(tmp_path / "checkpoint.pth")


def test_a_count_of_batches_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors = _official_resnet(tmp_path, monkeypatch)
    torch.save({name: x for name, x in tensors.items() if x.ndim}, tmp_path / "resnet50.pth")
    encoder = weights.load(tmp_path / "resnet50.pth")
    assert _difference("resnet-bottleneck", model, encoder) < 1e-5
    counts = [x for name, x in encoder.backbone.state_dict().items() if name.endswith("tracked")]
    assert counts and not any(counts)
    torch.save({name: x for name, x in tensors.items() if name != "bn1.running_var"}, tmp_path / "resnet50.pth")
    assert "1 missing (bn1.running_var)" in _refusal(tmp_path / "resnet50.pth")


def test_a_class_token_of_a_convnet_is_used_everywhere(tmp_path: Path) -> None:
    """The pooled vector is the normed mean, not the mean of what is normed; the switch adds no weights."""
    plain, pooling = _network("convnext"), _network("convnext", pooled_cls=True)
    pictures = _pictures((64, 96))
    with torch.no_grad():
        one, other = plain(pictures), pooling(pictures)
        assert one.cls is None and other.cls is not None
        assert torch.equal(one.patches, other.patches)
        assert torch.equal(plain.embedding(one), one.patches.mean(1))
        assert torch.equal(pooling.embedding(other), other.cls) and torch.equal(pooling.pooled(pictures), other.cls)
        assert (other.cls - other.patches.mean(1)).abs().max() > 1e-3
    assert (plain.config.pooling, pooling.config.pooling, pooling.config.cls) == ("mean", "cls", True)
    assert plain.state_dict().keys() == pooling.state_dict().keys()
    assert plain.drop_rates(0.3) == pooling.drop_rates(0.3)
    encoder = Encoder(pooling, {"family": "saccade", "path": "here", "hash": "1"})
    assert _poolings(encoder, other).keys() == {"cls", "mean"}
    weights.save_backbone(tmp_path / "saved", pooling, {})
    again = weights.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(pictures).cls, other.cls)
    for number in range(2):
        pixels = (_pictures()[number] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    index = embed(again, tmp_path, out=tmp_path / "index")
    assert (tmp_path / "index" / "cls.npy").is_file() and len(index) == 2


def test_training_goes_on_with_the_published_switches(tmp_path: Path) -> None:
    _oracle("dinov3-convnext").save_pretrained(tmp_path)
    encoder = weights.load(tmp_path)
    switches = initial.switches(encoder)
    assert switches == {"pooled_cls": True, **published.IMAGENET}
    network = backbone.build("convnext-a/32", image_size=64, blocks=BLOCKS, widths=WIDTHS, **switches)
    initial.load_state(network, encoder)
    with torch.no_grad():
        assert torch.equal(network.eval().pooled(_pictures()), encoder(_pictures()).cls)


def test_part_of_a_siglip_is_no_plain_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its attention pool it has just the tensors of a plain ViT that has no class token."""
    siglip = published.families()["siglip"]
    size = siglip.sizes["vit-b/16"]
    kind = backbone.FAMILIES["vit"]
    with torch.device("meta"):
        switches = {**siglip.switches, "mask_token": False}
        whole = published.to_theirs(
            siglip.namings["timm"], kind.network(kind.config(**size.numbers, **switches)).state_dict()
        )
    half = {name: tuple(x.shape) for name, x in whole.items() if not name.startswith("attn_pool")}
    assert published.recognise({name: tuple(x.shape) for name, x in whole.items()}).family.name == "siglip"
    with pytest.raises(SaccadeError, match=r"nearest is siglip \(timm names\): .* missing \(attn_pool"):
        published.recognise(half, {"architecture": "vit_base_patch16_siglip_224"}, "vit_base_patch16_siglip_224 webli")
    with pytest.raises(SaccadeError, match="not a whole encoder"):
        published.recognise(half, {}, "model.safetensors")
    said = {"global_pool": "avg"}
    assert published.recognise(half, said, "vit_base_patch16_224").family.name == "timm-vit"
    with pytest.raises(SaccadeError, match="nearest is siglip"):  # also where it says how it pools
        published.recognise(half, said, "siglip.safetensors")


def test_another_family_s_part_is_no_plain_vit(tmp_path: Path) -> None:
    dinov2 = published.families()["dinov2"]
    kind = backbone.FAMILIES["vit"]
    size = dinov2.sizes["vit-b/14"]
    with torch.device("meta"):
        network = kind.network(kind.config(**size.numbers, **dinov2.switches, **size.switches, mask_token=True))
    theirs = published.to_theirs(dinov2.namings["official"], network.state_dict())
    half = {key: tuple(x.shape) for key, x in theirs.items() if ".ls" not in key}
    with pytest.raises(SaccadeError, match="nearest is dinov2"):
        published.recognise(half, {}, "dinov2_vitb14_pretrain.pth")

"""What other libraries call our networks: no switch is lost on the way out, and every published family finds a way."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade import published, weights
from saccade.backbone import FAMILIES
from saccade.convnet import ConvNeXtConfig
from saccade.errors import SaccadeError
from saccade.export import export
from saccade.vit import ViTConfig

pytest.importorskip("transformers", reason="what the exports are for")

BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"position": "rope", "eps": 1e-5, "qkv_bias": "k_masked"},
}
OTHER: dict[str, list[Any]] = {
    "width": [48],
    "depth": [1],
    "heads": [4],
    "hidden": [96, 75],
    "patch": [16],
    "patch_time": [2],
    "image_size": [48],
    "frames": [4],
    "channels": [2],
    "mean": [(0.1, 0.2, 0.3)],
    "std": [(0.1, 0.2, 0.3)],
    "eps": [1e-6, 1e-5, 1e-4],
    "activation": ["gelu_tanh", "gelu_quick", "swiglu"],
    "qkv_bias": ["all", "none", "k_masked"],
    "layer_scale": [1e-2, None],
    "pre_norm": [True],
    "patch_bias": [False],
    "cls": [False],
    "registers": [0, 3],
    "mask_token": [True],
    "position": ["learned", "sincos", "sincos_y_first", "rope", "none"],
    "cls_position": [False],
    "position_offset": [0.1],
    "position_antialias": [True],
    "position_linear": [True],
    "rope_rounded": [True],
    "pooling": ["mean", "map"],
    "init": ["xavier"],
}
IDLE = {"frames": "a picture has none", "init": "how weights began", "rope_rounded": "nothing without RoPE"}
BESIDE = {"patch_time": {"frames": 2}, "channels": {"mean": (0.5,) * 2, "std": (0.2,) * 2}, "cls": {"pooling": "mean"}}
ELSEWHERE = ("position_offset", "position_antialias", "position_linear")
"""What differs at other sizes than the native one: there it is said, and the next test asks whether."""


def _run(folder: Path, config: Any) -> Path:
    """A run whose network has these switches, and every tensor a value of its own."""
    family = next(family for family in FAMILIES.values() if family.config is type(config))
    network = family.network(config)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            values = torch.randn(tensor.shape, generator=draw) * max(1, tensor[0].numel()) ** -0.5
            tensor.copy_(values * 0.3 + 1 if name.endswith("weight") and tensor.ndim == 1 else values)
            if "keys" in name or (isinstance(config, ViTConfig) and config.qkv_bias == "k_masked" and "qkv.b" in name):
                tensor.chunk(3)[1].zero_()
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
    weights.save_backbone(folder, network, {"recipe": "mae", "arch": "x"})
    return folder


def _config(base: str, **switches: Any) -> ViTConfig:
    tiny = {"width": 32, "depth": 2, "heads": 2, "hidden": 64, "patch": 8, "image_size": 32}
    return ViTConfig(**tiny | BASES[base] | switches)


def _left(place: Path, to: str, out: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """What another library reads, and what is said."""
    result = export(place, to=to, out=out)
    said = {name: value for name, value in json.loads((out / "config.json").read_text()).items() if name != "saccade"}
    processor = out / "preprocessor_config.json"
    said |= json.loads(processor.read_text()) if processor.is_file() else {}
    return {**said, "notes": result["notes"], "left_out": result["left_out"]}, load_file(out / "model.safetensors")


def test_every_switch_is_asked_after() -> None:
    assert OTHER.keys() == ViTConfig.model_fields.keys(), "a new switch: say what another value of it is"


@pytest.fixture(scope="module")
def before(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], tuple[dict[str, Any], Mapping[str, Tensor]]]:
    """What is written of the network whose switches are a base's."""

    @functools.cache
    def written(base: str, to: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        folder = tmp_path_factory.mktemp(base)
        return _left(_run(folder / "run", _config(base)), to, folder / "out")

    return written


@pytest.mark.parametrize("to", ["hf", "timm"])
@pytest.mark.parametrize("base", ["plain", pytest.param("rope", marks=pytest.mark.slow)])
@pytest.mark.parametrize("switch", OTHER)
def test_a_switch_leaves_with_its_network_or_is_refused(
    switch: str, base: str, to: str, before: Any, tmp_path: Path
) -> None:
    """Slow for rope: it is half a minute together. `export` compares features itself, with transformers here and with
    timm where it is; so what is left to ask is that the export differs from that of the network without the switch.
    """
    for number, value in enumerate(OTHER[switch]):
        if getattr(_config(base), switch) == value:
            continue
        config = _config(base, **{switch: value, **BESIDE.get(switch, {})})
        place, out = _run(tmp_path / f"run-{number}", config), tmp_path / f"out-{number}"
        try:
            said, tensors = _left(place, to, out)
        except SaccadeError as error:
            if "has no network that computes this one" in error.error:
                continue
            raise
        folded = {"mask_token": config.mask_token and "mask_token" not in said["left_out"]}
        folded |= {"cls_position": False} if to == "timm" and config.registers and config.position == "learned" else {}
        assert weights.load(out).backbone.config == config.model_copy(update=folded)
        plain = before(base, to)
        same = said == plain[0] and tensors.keys() == plain[1].keys()
        same = same and all(torch.equal(tensor, plain[1][name]) for name, tensor in tensors.items())
        moot = base == "rope" and switch in ("cls_position", *ELSEWHERE)
        assert not same or switch in (*IDLE, *ELSEWHERE) or moot, (value, "is nowhere in the export")


def test_positions_that_another_library_resizes_otherwise_are_said(tmp_path: Path) -> None:
    said = {}
    for name, switches in {
        "as timm": {"position_antialias": True},
        "as transformers": {},
        "linear": {"position_antialias": True, "position_linear": True},
        "offset": {"position_offset": 0.1},
    }.items():
        place = _run(tmp_path / name, _config("plain", **switches))
        for to in ("hf", "timm"):
            notes = export(place, to=to, out=tmp_path / f"{name} {to}")["notes"]
            said[name, to] = any("at other sizes" in note for note in notes)
    assert [key for key, one in said.items() if not one] == [("as timm", "timm"), ("as transformers", "hf")]


STAGES = {"blocks": (1, 2, 1, 1), "widths": (8, 12, 16, 20), "image_size": 64}


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("to", ["hf", "timm"])
def test_a_convnext_leaves_with_or_without_a_class_token(to: str, pooled: bool, tmp_path: Path) -> None:
    place = _run(tmp_path / "run", ConvNeXtConfig(**STAGES, pooled_cls=pooled))
    result = export(place, to=to, out=tmp_path / "out")
    assert result["checked"]["max_abs_difference"] < 1e-5 and not result["left_out"]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {"hf": "layer_norm.weight", "timm": "head.norm.weight" if pooled else "norm_pre.weight"}[to] in names
    one, other = weights.load(place), weights.load(tmp_path / "out")
    assert other.backbone.config == one.backbone.config
    assert all(torch.equal(x, other.backbone.state_dict()[name]) for name, x in one.backbone.state_dict().items())


def _tiny(family: published.Family) -> Any:
    """A small network with the switches of a family."""
    config = FAMILIES[family.network].config
    switches: dict[str, Any] = {**family.switches}
    if family.network == "vit":
        keys = {"qkv_bias": "k_masked"} if switches.get("position") == "rope" else {}  # what its tensors tell
        return _config("plain", **{"pooling": family.pooling, **switches, **keys})
    kind = {"kind": "bottleneck"} if family.network == "resnet" else {}
    return config(**STAGES | {"widths": (64, 8, 12, 16)} | switches | kind)


@pytest.mark.parametrize("to", ["hf", "timm", "safetensors"])
@pytest.mark.parametrize("name", published.families())
def test_a_published_family_leaves(name: str, to: str, tmp_path: Path) -> None:
    """Whether its files are here or not: a network with its switches, said to be one of it."""
    known = published.families()[name]
    encoder = weights.load(_run(tmp_path / "run", _tiny(known)))
    encoder.record |= {"family": name, "licence": known.licence, "licence_url": known.licence_url, "terms": known.terms}
    result = export(encoder, to=to, out=tmp_path / "out")
    assert result["checked"]["max_abs_difference"] < 1e-5 and result["licence"] == known.licence
    again = weights.load(tmp_path / "out")
    assert again.record["family"] == name
    assert again.backbone.config == encoder.backbone.config

"""What leaves: loaded by transformers (and timm where it is installed) it says the same, and it loads here again."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import saccade
from saccade import backbone, card, naming, provenance, published, weights
from saccade.cli import main
from saccade.convnet import ConvNeXt, ConvNeXtConfig, ResNet, ResNetConfig
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.export import FARTHEST, export
from saccade.vit import ViT, ViTConfig

transformers = pytest.importorskip("transformers", reason="what the exports are for")

TINY = {"width": 32, "depth": 2, "heads": 2, "hidden": 64, "patch": 8, "image_size": 32}
LARGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
PLAIN = LARGE | {"intermediate_size": 64}
TIMM = importlib.util.find_spec("timm") is not None
FIVE = {"channels": 5, "mean": (0.5,) * 5, "std": (0.2,) * 5}
CLIP = {"pre_norm": True, "patch_bias": False, "eps": 1e-5}
ROPE = {"position": "rope", "eps": 1e-5}

OURS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mae": ({"position": "sincos"}, "vit", "vit_base_patch16_224"),
    "moco": ({"position": "sincos_y_first"}, "vit", "vit_base_patch16_224"),
    "dino": ({}, "vit", "vit_base_patch16_224"),
    "no bias": ({"qkv_bias": "none", "hidden": 75}, "vit", "vit_base_patch16_224"),
    "keyless": ({"qkv_bias": "k_masked"}, "vit", "vit_base_patch16_224"),
    "no row": ({"cls_position": False, "activation": "gelu_tanh"}, "vit", "vit_base_patch16_224"),
    "nowhere": ({"position": "none", **FIVE}, "vit", "vit_base_patch16_224"),
    "mean": ({"pooling": "mean"}, "vit", "vit_base_patch16_224"),
    "jepa": ({"cls": False, "pooling": "mean", "position": "sincos"}, "ijepa", "vit_base_patch16_224"),
    "scaled": ({"layer_scale": 1e-5, "mask_token": True}, "dinov2", "vit_base_patch16_224"),
    "registers": ({"registers": 3, "position": "sincos"}, "dinov2_with_registers", "vit_base_patch16_224"),
    "gate": ({"activation": "swiglu"}, "dinov2", "vit_giant_patch14_dinov2"),
    "rope": ({**ROPE, "registers": 4, "qkv_bias": "none"}, "dinov3_vit", "vit_small_patch16_dinov3"),
    "rope 1e-6": ({"position": "rope", "qkv_bias": "k_masked"}, "dinov3_vit", "eva_giant_patch14_224"),
    "rope gate": (
        {**ROPE, "activation": "swiglu", "qkv_bias": "none", "hidden": 72, "layer_scale": 1.0},
        "dinov3_vit",
        "vit_small_patch16_dinov3",
    ),
    "clip": ({**CLIP, "activation": "gelu_quick"}, "clip_vision_model", "vit_base_patch16_clip_224"),
    "clip, no bias": ({**CLIP, "qkv_bias": "none"}, "clip_vision_model", "vit_base_patch16_clip_224"),
    "siglip": ({"cls": False, "pooling": "map"}, "siglip_vision_model", "vit_base_patch16_224"),
}
FOUR = {"blocks": (1, 2, 1, 1), "widths": (64, 8, 12, 16), "image_size": 64}
CONVNETS: dict[str, tuple[Any, str, str]] = {
    "basic": (partial(ResNetConfig, **FOUR, kind="basic"), "resnet", "resnet18"),
    "bottleneck": (partial(ResNetConfig, **FOUR, kind="bottleneck"), "resnet", "resnet50"),
    "convnext": (partial(ConvNeXtConfig, **FOUR), "dinov3_convnext", "convnext_tiny"),
}


def _redrawn(network: Any) -> Any:
    """No tensor is left as it was made: norms, biases, tokens and scales too; keys that are masked stay zero."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            values = torch.randn(tensor.shape, generator=draw)
            if tensor.ndim > 1 and tensor.shape[0] > 1:
                values *= tensor[0].numel() ** -0.5
            tensor.copy_(values * 0.3 + 1 if "norm" in name and name.endswith("weight") else values)
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
    return network.eval()


def _vit(switches: dict[str, Any]) -> ViT:
    network = _redrawn(ViT(ViTConfig(**TINY | switches)))
    if network.config.qkv_bias == "k_masked":
        for block in network.blocks:
            block.attn.qkv.bias.data[32:64] = 0
    return network


def _run(folder: Path, network: Any, **record: Any) -> Path:
    weights.save_backbone(folder, network, {"recipe": "mae", "arch": "vit-x/8", "licence": None, **record})
    return folder


def _pictures(encoder: Encoder, side: int = 32) -> Tensor:
    return torch.rand(2, encoder.backbone.config.channels, side, side, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _ours(encoder: Encoder, pictures: Tensor) -> Tensor:
    """All tokens in our order."""
    found = encoder(pictures)
    return torch.cat([*([] if found.cls is None else [found.cls[:, None]]), found.registers, found.patches], 1)


@torch.no_grad()
def _theirs(folder: Path, encoder: Encoder, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """All tokens that AutoModel gives, and what it pools; nothing may be missing, left over or drawn anew."""
    model, loaded = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values()), loaded
    model.eval()
    if encoder.backbone.config.__class__ is ViTConfig and encoder.backbone.config.rope_rounded:
        model.rope_embeddings.inv_freq = 1 / (1 / model.rope_embeddings.inv_freq).bfloat16().float()
    count = encoder.backbone.config.grid[0] * encoder.backbone.config.grid[1]
    noise = (
        {"noise": torch.arange(count).float().expand(len(pictures), -1)} if model.config.model_type == "vit_mae" else {}
    )
    output = model(encoder.backbone.normalise(pictures), **noise)
    tokens = output.last_hidden_state
    if model.config.model_type == "clip_vision_model":
        tokens = model.post_layernorm(tokens)
    if tokens.ndim == 4:
        return tokens.flatten(2).transpose(1, 2), output.pooler_output.flatten(1)
    if model.config.model_type == "dinov3_convnext":
        return tokens[:, 1:], None
    return tokens, output.get("pooler_output")


def _same_weights(one: Encoder, other: Encoder) -> None:
    theirs, ours = one.backbone.state_dict(), other.backbone.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert one.backbone.config == other.backbone.config
    assert one.preprocess == other.preprocess


@pytest.mark.parametrize("case", OURS)
def test_a_run_of_ours_goes_to_the_network_of_transformers_that_computes_it(case: str, tmp_path: Path) -> None:
    switches, architecture, _ = OURS[case]
    encoder = weights.load(_run(tmp_path / "run", _vit(switches)))
    result = export(tmp_path / "run", to="hf", out=tmp_path / "out")
    assert result["architecture"] == architecture
    assert result["checked"]["by"].startswith("transformers") and result["checked"]["max_abs_difference"] < 1e-5
    pictures = _pictures(encoder)
    tokens, pooled = _theirs(tmp_path / "out", encoder, pictures)
    assert (tokens - _ours(encoder, pictures)).abs().max() < 1e-5
    if pooled is not None and encoder.backbone.config.pooling != "mean":
        assert (pooled - encoder.embedding(encoder(pictures))).abs().max() < 1e-5
    again = weights.load(tmp_path / "out")
    _same_weights(again, encoder)
    assert again.record["family"] == "saccade" and again.record["recipe"] == "mae"
    assert torch.equal(_ours(again, _pictures(encoder, 48)), _ours(encoder, _pictures(encoder, 48)))


@pytest.mark.parametrize("case", CONVNETS)
@pytest.mark.parametrize("to", ["hf", "timm", "safetensors"])
def test_a_convnet_leaves(case: str, to: str, tmp_path: Path) -> None:
    config, architecture, called = CONVNETS[case]
    network = _redrawn((ConvNeXt if case == "convnext" else ResNet)(config()))
    encoder = weights.load(_run(tmp_path / "run", network))
    result = export(tmp_path / "run", to=to, out=tmp_path / "out")
    assert result["architecture"] == {"hf": architecture, "timm": called}.get(to)
    assert result["checked"]["max_abs_difference"] < 1e-5
    _same_weights(weights.load(tmp_path / "out"), encoder)
    if to == "hf":
        pictures = _pictures(encoder, 64)
        patches, pooled = _theirs(tmp_path / "out", encoder, pictures)
        assert (patches - _ours(encoder, pictures)).abs().max() < 1e-5
        assert pooled is None or (pooled - encoder.embedding(encoder(pictures))).abs().max() < 1e-5


def _mae() -> Any:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(**PLAIN, **decoder, mask_ratio=0.0, layer_norm_eps=1e-6))


def _plain() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**PLAIN, layer_norm_eps=1e-6))


def _dinov2(registers: bool, gated: bool) -> Any:
    kind = "WithRegisters" if registers else ""
    config = getattr(transformers, f"Dinov2{kind}Config")(**LARGE, mlp_ratio=3, use_swiglu_ffn=gated)
    return getattr(transformers, f"Dinov2{kind}Model")(config)


def _dinov3(gated: bool) -> Any:
    gate = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**PLAIN, **gate, num_register_tokens=4))


PUBLISHED: dict[str, tuple[str, Callable[[], Any]]] = {
    "mae": ("vit_mae", _mae),
    "dino": ("vit", _plain),
    "timm-vit": ("vit", _plain),
    "dinov2": ("dinov2", partial(_dinov2, False, False)),
    "dinov2-giant": ("dinov2", partial(_dinov2, False, True)),
    "dinov2-registers": ("dinov2_with_registers", partial(_dinov2, True, False)),
    "dinov3": ("dinov3_vit", partial(_dinov3, False)),
    "dinov3-plus": ("dinov3_vit", partial(_dinov3, True)),
    "ijepa": ("ijepa", lambda: transformers.IJepaModel(transformers.IJepaConfig(**PLAIN, layer_norm_eps=1e-6))),
    "clip": ("clip_vision_model", lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PLAIN))),
    "siglip": ("siglip_vision_model", lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PLAIN))),
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """transformers' tiny network of a case, every tensor drawn anew, saved by itself."""

    def save(case: str) -> Path:
        _redrawn(PUBLISHED[case][1]()).save_pretrained(tmp_path / case)
        return tmp_path / case

    return save


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_published_encoder_goes_back_to_where_it_came_from(
    case: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    given = saved(case)
    encoder = weights.load(given)
    result = export(given, to="hf", out=tmp_path / "out")
    assert result["architecture"] == PUBLISHED[case][0] and result["checked"]["max_abs_difference"] < 1e-5
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (given, tmp_path / "out"))
    ours = {name.removeprefix("vision_model."): tensor for name, tensor in ours.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs if not name.startswith("pooler."))
    pictures = _pictures(encoder)
    first, second = (_theirs(folder, encoder, pictures)[0] for folder in (given, tmp_path / "out"))
    assert (first - second).abs().max() < 1e-6, "its own config.json would compute the same"
    again = weights.load(tmp_path / "out")
    _same_weights(again, encoder)
    for name in ("family", "licence", "terms", "data", "pooling", "mean"):
        assert again.record[name] == encoder.record[name], name
    assert result["licence"] == encoder.record["licence"] and result["terms"] == encoder.record["terms"]


def _official(family: str, folder: Path) -> Path:
    """A tiny file of a family that transformers does not have, under its authors' names."""
    known = published.families()[family]
    switches = {"pooling": known.pooling, **known.switches, "mask_token": family == "ibot"}
    table = known.namings["official"]
    folder.mkdir()
    theirs = published.to_theirs(table, _vit(switches).state_dict(), table.prefixes[0])
    save_file(theirs, folder / f"{family}.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 2}')
    return folder / f"{family}.safetensors"


@pytest.mark.parametrize("family", ["ibot", "mocov3"])
def test_a_family_that_transformers_does_not_have_goes_to_one_that_computes_it(family: str, tmp_path: Path) -> None:
    file = _official(family, tmp_path / "given")
    encoder = weights.load(file)
    result = export(file, to="hf", out=tmp_path / "out")
    assert result["architecture"] == "vit"
    assert result["left_out"] == (["mask_token"] if family == "ibot" else [])
    tokens, _ = _theirs(tmp_path / "out", encoder, _pictures(encoder))
    assert (tokens - _ours(encoder, _pictures(encoder))).abs().max() < 1e-5
    assert weights.load(tmp_path / "out").record["family"] == family


@pytest.mark.parametrize("case", [*PUBLISHED, "ibot", "mocov3"])
def test_plain_safetensors_have_the_authors_names_where_there_are_some(
    case: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    given = saved(case) if case in PUBLISHED else _official(case, tmp_path / "given")
    encoder = weights.load(given)
    result = export(given, to="safetensors", out=tmp_path / "out")
    assert result["checked"] == {"by": "saccade", "max_abs_difference": 0.0}
    again = weights.load(tmp_path / "out")
    _same_weights(again, encoder)
    assert again.record["family"] == encoder.record["family"]
    assert again.record["licence"] == encoder.record["licence"]
    names = load_file(tmp_path / "out" / "model.safetensors")
    if case == "dinov3":
        assert {"storage_tokens", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"} <= names.keys()
    if case == "clip":
        assert "visual.transformer.resblocks.1.attn.in_proj_weight" in names


@pytest.mark.parametrize("case", OURS)
def test_what_is_written_for_timm(case: str, tmp_path: Path) -> None:
    """The facts that timm reads, which say what the network is; timm itself is asked where it is installed."""
    switches, _, architecture = OURS[case]
    network = _vit(switches)
    encoder = weights.load(_run(tmp_path / "run", network))
    result = export(tmp_path / "run", to="timm", out=tmp_path / "out")
    assert result["checked"]["by"].startswith("timm" if TIMM else "saccade")
    assert ("timm was not there to read it" in " ".join(result["notes"])) is not bool(TIMM)
    assert result["checked"]["max_abs_difference"] < 1e-5
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architecture"] == architecture and said["num_features"] == 32 and said["num_classes"] == 0
    arguments = said["model_args"]
    gated = network.config.activation == "swiglu"
    packed = 2 if gated and network.config.position != "rope" else 1
    assert int(32 * arguments["mlp_ratio"]) == packed * network.config.hidden
    assert said["global_pool"] == {"cls": "token", "mean": "avg", "map": "map"}[network.config.pooling]
    assert said["pretrained_cfg"]["input_size"] == [network.config.channels, 32, 32]
    assert said["pretrained_cfg"]["mean"] == list(network.config.mean)
    again = weights.load(tmp_path / "out")
    if case != "scaled":
        _same_weights(again, encoder)
    assert torch.equal(_ours(again, _pictures(encoder)), _ours(encoder, _pictures(encoder)))
    assert result["left_out"] == (["mask_token"] if case == "scaled" else [])


def test_a_position_that_timm_adds_to_the_class_token_stays_there(tmp_path: Path) -> None:
    encoder = weights.load(_run(tmp_path / "run", _vit({"registers": 3, "layer_scale": 1.0})))
    result = export(tmp_path / "run", to="timm", out=tmp_path / "out")
    assert "cannot be taken apart again" in result["notes"][0]
    again = weights.load(tmp_path / "out")
    assert not again.backbone.config.cls_position
    assert (_ours(again, _pictures(encoder)) - _ours(encoder, _pictures(encoder))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "case", ["dinov2", "dinov2-giant", "dinov2-registers", "dinov3", "dinov3-plus", "clip", "siglip"]
)
def test_a_published_encoder_goes_to_timm(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    given = saved(case)
    result = export(given, to="timm", out=tmp_path / "out")
    assert result["checked"]["max_abs_difference"] < 1e-5
    if case.startswith("dinov3") and TIMM:
        assert result["checked"]["unrounded"] > 1e-4
    again, encoder = weights.load(tmp_path / "out"), weights.load(given)
    assert (_ours(again, _pictures(encoder)) - _ours(encoder, _pictures(encoder))).abs().max() < 1e-5
    said = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert said["crop_mode"] == ("squash" if case.startswith(("dinov3", "siglip")) else "center")


def test_published_sizes_are_called_as_timm_calls_them() -> None:
    known = published.families()["dinov2"]
    size = known.sizes["vit-s/14-registers"]
    config = ViTConfig(**{"pooling": "cls", **known.switches, **size.numbers, **size.switches})
    assert naming.timm(config, "dinov2", "vit-s/14-registers").architecture == "vit_small_patch14_reg4_dinov2"
    other = config.model_copy(update={"image_size": 224})
    assert naming.timm(other, "dinov2", "vit-s/14-registers").architecture == "vit_base_patch16_224"


def test_timm_has_every_network_that_is_named() -> None:
    timm = pytest.importorskip("timm")
    for family in published.families().values():
        for name, size in family.sizes.items():
            switches = {"pooling": family.pooling, **family.switches, **size.numbers, **size.switches}
            if family.switches.get("position") == "rope":
                switches["qkv_bias"] = "k_masked"  # what its tensors tell
            if family.network == "resnet" and switches["widths"][0] != 64:
                continue  # timm has none with a wider stem
            kind = backbone.FAMILIES[family.network].config
            config = kind(**{key: value for key, value in switches.items() if key in kind.model_fields})
            assert timm.is_model(naming.timm(config, family.name, name).architecture), (family.name, name)


@pytest.mark.parametrize(
    ("switches", "to", "why"),
    [
        ({"registers": 2, "cls": False, "pooling": "mean"}, "hf", "without a class token"),
        ({"registers": 2, "cls": False, "pooling": "mean"}, "timm", "registers without a class token"),
        ({"layer_scale": 1.0, "hidden": 75}, "hf", "an MLP of 75"),
        ({"eps": 1e-4}, "timm", "an eps of 0.0001"),
        ({"position": "rope"}, "timm", "a bias of the keys"),
        ({"position": "rope", "cls": False, "pooling": "mean"}, "hf", "without a class token"),
        ({"pre_norm": True}, "hf", "with bias"),
        ({"pooling": "map"}, "hf", "attention pooling and a class token"),
    ],
)
def test_a_network_that_nobody_has_is_refused_by_what_differs(
    switches: dict[str, Any], to: str, why: str, tmp_path: Path
) -> None:
    _run(tmp_path / "run", _vit(switches))
    with pytest.raises(SaccadeError, match=why) as caught:
        export(tmp_path / "run", to=to, out=tmp_path / "out")
    assert "--to safetensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert export(tmp_path / "run", to="safetensors", out=tmp_path / "out")["files"]


@pytest.mark.parametrize(
    ("arch", "to", "why"),
    [
        ("conv-4/16", "hf", "plain convolutions"),
        ("resnet-8/8", "hf", "a stride of 2, not 4"),
        ("convnext-a/8", "timm", "a stride of 1, not 4"),
        ("resnet-10-half/32", "timm", "a width of 32, not 64"),
    ],
)
def test_a_convnet_that_nobody_has_is_refused(arch: str, to: str, why: str, tmp_path: Path) -> None:
    _run(tmp_path / "run", backbone.build(arch, image_size=64))
    with pytest.raises(SaccadeError, match=why):
        export(tmp_path / "run", to=to, out=tmp_path / "out")


def test_rope_with_biased_keys_and_rounded_periods(tmp_path: Path) -> None:
    _run(tmp_path / "run", _vit({**ROPE, "qkv_bias": "all", "rope_rounded": True, "image_size": 64}))
    result = export(tmp_path / "run", to="hf", out=tmp_path / "out")
    assert result["checked"]["max_abs_difference"] < 1e-5 < result["checked"]["unrounded"]
    assert any("float32" in note for note in result["notes"])
    _same_weights(weights.load(tmp_path / "out"), weights.load(tmp_path / "run"))


@pytest.mark.parametrize(("name", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 0.1), ("qkv_bias", False)])
def test_an_export_that_says_something_else_is_not_kept(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = naming.transformers

    def wrong(config: Any, family: str = "saccade") -> Any:
        target = right(config, family)
        return naming.replace(target, facts={**target.facts, name: value})

    _run(tmp_path / "run", _vit({}))
    monkeypatch.setattr(naming, "transformers", wrong)
    with pytest.raises(SaccadeError, match=r"other features|does not load the export whole"):
        export(tmp_path / "run", to="hf", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path / "run", _vit({}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(SaccadeError, match="is there already"):
        export(tmp_path / "run", to="safetensors", out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "run", to="safetensors", out=tmp_path / "empty")["files"]
    with pytest.raises(SaccadeError, match="is there already"):
        export(tmp_path / "run", to="safetensors", out=tmp_path / "empty")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(card, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "run", to="safetensors", out=tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())
    with pytest.raises(SaccadeError, match="cannot be made"):
        export(tmp_path / "run", to="safetensors", out=tmp_path / "mine" / "notes.txt" / "out")
    with pytest.raises(SaccadeError, match="hf"):
        export(tmp_path / "run", to="hff", out=tmp_path / "out")


def _front(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_of_a_run(tmp_path: Path) -> None:
    place = tmp_path / "secret" / "run"
    data = {"fingerprint": "f1n9", "samples": 30, "keys": {}}
    _run(place / "backbone", _vit({}), recipe="dino", arch="vit-s/8", steps=40, data=data,
         initial={"weights": "random", "seed": 7})  # fmt: skip
    rows = [{"step": 20, "knn": 1.0, "linear": 2.0, "part": "held out of train"},
            {"step": 40, "knn": 61.25, "linear": 75.5, "part": "test"}]  # fmt: skip
    record = {"summary": {"eval": rows}, "sessions": [{"code": {"version": "0.1.0", "blake3": "c0de"}}]}
    (place / "record.json").write_text(json.dumps(record))
    export(place, to="hf", out=tmp_path / "out")
    front, text = _front(tmp_path / "out")
    assert front["license"] == "other" and front["library_name"] == "transformers" and "license_name" not in front
    for said in ("vit-s/8", "dino", "f1n9", "30 pictures", "c0de", "seed 7", "61.2", "75.5", "0.485", "class token"):
        assert said in text, said
    assert "| 20 |" not in text, "another checkpoint's result"
    assert 'AutoModel.from_pretrained("out")' in text and "who trained it to choose" in text
    hashes = [weights.load(folder).record["hash"] for folder in (place, tmp_path / "out")]
    assert all(digest in text for digest in hashes)
    everything = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert "secret" not in everything, "paths of this machine stay here"


@pytest.mark.parametrize("far", [False, True])
def test_a_run_that_started_from_others_weights_says_under_which_terms(
    far: bool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    start = weights.load(saved("dinov3"))
    began = {"family": "saccade", "licence": None, "initial": start.record} if far else start.record
    behind = provenance.origins(start.record)  # what a run writes down, after any number of runs
    _run(tmp_path / "run", start.backbone, initial=began, derived_from=behind, licence=None)
    result = export(tmp_path / "run", to="safetensors", out=tmp_path / "out")
    assert result["licence"] == "DINOv3 License" and "custom licence" in result["terms"]
    front, text = _front(tmp_path / "out")
    assert front["license"] == "other" and front["license_name"] == "DINOv3 License"
    assert front["license_link"].endswith("dinov3-license/")
    assert "It derives from dinov3 weights" in text and "bound by it too" in text
    assert provenance.terms_of(weights.load(tmp_path / "out").record)["licence"] == "DINOv3 License"


def test_a_non_commercial_licence_is_in_the_card(saved: Callable[[str], Path], tmp_path: Path) -> None:
    export(saved("mae"), to="hf", out=tmp_path / "out")
    front, text = _front(tmp_path / "out")
    assert front["license"] == "cc-by-nc-4.0" and "non-commercial" in text and "rises" in text


def test_what_another_library_trained_on_is_not_thrown_away(tmp_path: Path) -> None:
    """Scales of one and rows of zero are ours as long as they are that; then they are switches of the network."""
    _run(tmp_path / "run", _vit({"registers": 2, "position": "sincos", "qkv_bias": "k_masked"}))
    export(tmp_path / "run", to="hf", out=tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    _same_weights(weights.load(tmp_path / "again"), weights.load(tmp_path / "run"))
    _redrawn(model).save_pretrained(tmp_path / "trained")
    encoder = weights.load(tmp_path / "trained")
    config = encoder.backbone.config
    assert (config.position, config.cls_position, config.layer_scale) == ("learned", True, 1.0)
    assert (config.mask_token, config.qkv_bias) == (True, "all")
    tokens, _ = _theirs(tmp_path / "trained", encoder, _pictures(encoder))
    assert (tokens - _ours(encoder, _pictures(encoder))).abs().max() < 1e-5


def test_a_table_that_was_trained_is_kept_without_a_row_too(tmp_path: Path) -> None:
    _run(tmp_path / "run", _vit({"position": "sincos"}))
    export(tmp_path / "run", to="hf", out=tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.position_embeddings"][:, 1:] += 1
    save_file(tensors, path)
    encoder = weights.load(tmp_path / "out")
    assert encoder.backbone.config.position == "learned" and not encoder.backbone.config.cls_position
    assert torch.equal(encoder.backbone.pos_embed, tensors["embeddings.position_embeddings"][:, 1:])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_act": "relu"}, "says hidden_act 'relu', but the network that was exported has 'gelu'"),
        ({"layer_norm_eps": 1e-12}, "says layer_norm_eps"),
        ({"saccade": {}}, "does not say what was exported"),
        ({"saccade": {"network": "vit", "page": "x", "naming": "y", "config": {"widht": 3}}}, "does not say"),
        ({"page": "elsewhere"}, "no naming 'transformers' of 'elsewhere'"),
        ({"config": {**TINY, "depth": 3}}, "missing"),
        ({"config": {**TINY, "position": 5}}, "does not say"),
        ({"record": 3}, "does not say"),
    ],
)
def test_an_export_that_contradicts_itself_is_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    _run(tmp_path / "run", _vit({}))
    export(tmp_path / "run", to="hf", out=tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    said = json.loads(path.read_text())
    if change.keys() <= said["saccade"].keys():
        change = {"saccade": said["saccade"] | change}
    path.write_text(json.dumps(said | change))
    with pytest.raises(SaccadeError, match=why) as caught:
        weights.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_half_an_export_is_refused(tmp_path: Path) -> None:
    _run(tmp_path / "run", _vit({}))
    export(tmp_path / "run", to="hf", out=tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "layernorm_after" not in name}, path)
    with pytest.raises(SaccadeError, match="missing"):
        weights.load(tmp_path / "out")
    save_file(tensors | {"gate.weight": torch.zeros(3)}, path)
    with pytest.raises(SaccadeError, match=r"1 unexpected \(gate.weight\)"):
        weights.load(tmp_path / "out")
    save_file(tensors | {"layernorm.weight": torch.full((32,), torch.nan)}, path)
    with pytest.raises(SaccadeError, match="NaN"):
        weights.load(tmp_path / "out")


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_transformers_prepares_a_picture_as_we_do(square: bool, saved: Callable[[str], Path], tmp_path: Path) -> None:
    given = saved("siglip" if square else "dinov2")
    export(given, to="hf", out=tmp_path / "out")
    encoder = weights.load(given)
    pixels = torch.rand(60, 90, 3, generator=torch.Generator().manual_seed(1)).mul(255).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy()).resize((240, 120), Image.Resampling.BICUBIC)
    prepared = encoder.preprocess(picture)
    ours = encoder.backbone.normalise(prepared[None])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 0.05, "two units of 255, for they round elsewhere"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path / "run", _vit({}))
    words = ["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["files"] == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert said["checked"]["max_abs_difference"] < 1e-5
    assert main(words) == 2
    assert "is there already" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert saccade.export is export


@pytest.mark.parametrize("apart", [1e-6, 1.0])
def test_onnx_is_written_and_checked_by_its_own_page(
    apart: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    class Page(ModuleType):
        @staticmethod
        def write(encoder: Encoder, directory: Path) -> list[Path]:
            (directory / "model.onnx").write_bytes(b"graph")
            return [directory / "model.onnx"]

        @staticmethod
        def check(encoder: Encoder, directory: Path) -> float:
            assert (directory / "model.onnx").is_file()
            return apart

    monkeypatch.setitem(sys.modules, "saccade.onnx", Page("saccade.onnx"))
    _run(tmp_path / "run", _vit({}))
    if apart > FARTHEST:
        with pytest.raises(SaccadeError, match="differ by 1"):
            export(tmp_path / "run", to="onnx", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    result = export(tmp_path / "run", to="onnx", out=tmp_path / "out")
    assert result["files"] == ["README.md", "model.onnx"] and result["checked"]["max_abs_difference"] == apart

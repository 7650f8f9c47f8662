"""DINO, iBOT, DINOv2 and DINOv3 against transformers' own networks, every tensor of which is drawn anew.

transformers resizes the tables of DINO and DINOv2 in its own way and rounds no periods of RoPE, so it is told to do as
the authors do; how much that matters is measured too. timm is not needed: its names are written out here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import published, weights
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.published import dinov2
from saccade.vit import Rotation

transformers = pytest.importorskip("transformers")
revert_weight_conversion = pytest.importorskip("transformers.core_model_loading").revert_weight_conversion

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"native": (56, 56), "not square": (42, 70), "larger": (84, 84), "smaller": (28, 28)}


def _vit(mask: bool = False) -> Any:
    config = transformers.ViTConfig(**TINY, intermediate_size=96, patch_size=14, image_size=56, layer_norm_eps=1e-6)
    return transformers.ViTModel(config, add_pooling_layer=False, use_mask_token=mask)


def _dinov2(registers: bool, gated: bool) -> Any:
    shape = {**TINY, "mlp_ratio": 3, "patch_size": 14, "image_size": 56, "use_swiglu_ffn": gated}
    if registers:
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**shape))
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape))


def _dinov3(gated: bool, bias: bool = True) -> Any:
    shape = {**TINY, "intermediate_size": 96, "patch_size": 14, "image_size": 56, "num_register_tokens": 4}
    biases = {"query_bias": bias, "value_bias": bias, "hidden_act": "silu" if gated else "gelu"}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**shape, **biases, use_gated_mlp=gated))


CASES: dict[str, Callable[[], Any]] = {
    "dino": _vit,
    "ibot": partial(_vit, mask=True),
    "dinov2": partial(_dinov2, False, False),
    "dinov2-giant": partial(_dinov2, False, True),
    "dinov2-registers": partial(_dinov2, True, False),
    "dinov2-giant-registers": partial(_dinov2, True, True),
    "dinov3": partial(_dinov3, False),
    "dinov3-plus": partial(_dinov3, True),
    "dinov3-7b": partial(_dinov3, True, False),
}
PORTED = [name for name in CASES if name != "ibot"]


def _oracle(case: str) -> Any:
    """transformers' network with no tensor left as it was made, resizing and turning as the authors do."""
    torch.manual_seed(len(case))
    model = CASES[case]().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn_like(tensor)
            if tensor.ndim > 1 and min(tensor.shape) > 4 and "token" not in name and "position" not in name:
                noise *= tensor[0].numel() ** -0.5  # a matrix
            elif re.search(r"norm\w*\.weight|lambda1", name):
                noise = 1 + 0.3 * noise
            tensor.copy_(noise)
    if case in ("dino", "ibot", "dinov2", "dinov2-giant"):
        model.embeddings.interpolate_pos_encoding = partial(_resized, model.embeddings.position_embeddings)
    if case.startswith("dinov3"):
        model.rope_embeddings.inv_freq = 1 / (1 / model.rope_embeddings.inv_freq).bfloat16().float()
    return model


def _resized(table: Tensor, _: Tensor, height: int, width: int) -> Tensor:
    """As the authors of DINO and DINOv2: 0.1 more cells than there are, which moves where the table is read."""
    if (height, width) == (56, 56):
        return table
    grid = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    factors = tuple((side // 14 + 0.1) / 4 for side in (height, width))
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def _pictures(size: tuple[int, int]) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(5))


def _asked(model: Any, pictures: Tensor, hide: Tensor | None = None) -> Tensor:
    """All tokens of transformers' network."""
    mean, std = (torch.tensor(published.IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    extra = {"interpolate_pos_encoding": True} if isinstance(model, transformers.ViTModel) else {}
    masked = {} if hide is None else {"bool_masked_pos": hide}
    with torch.no_grad():
        return model((pictures - mean) / std, **masked, **extra).last_hidden_state


def _ours(encoder: Encoder, pictures: Tensor, hide: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found = encoder.backbone(pictures, hide=hide)
    assert torch.equal(encoder.embedding(found), found.cls)
    return torch.cat([found.cls[:, None], found.registers, found.patches], 1)


def _difference(model: Any, encoder: Encoder, size: tuple[int, int]) -> float:
    pictures = _pictures(size)
    return float((_asked(model, pictures) - _ours(encoder, pictures)).abs().max())


def _state(model: Any) -> dict[str, Tensor]:
    """Its tensors by the names under which transformers saves them, which are not those that it has in memory."""
    saved = revert_weight_conversion(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    return {name: tensor for name, tensor in saved.items() if "inv_freq" not in name}


def _official(case: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, by a hand that is not the one under test."""
    if case.startswith("dinov3"):
        return _official_dinov3(state)
    for replaced, by in (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.mask_token", "masked_embed" if case == "ibot" else "mask_token"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("layernorm", "norm"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("weights_in", "w12"),
        ("weights_out", "w3"),
    ):
        state = {name.replace(replaced, by): tensor for name, tensor in state.items()}
    if case == "ibot":
        state["masked_embed"] = state["masked_embed"][0]
    return _fused(state, "attention.attention.{}.{}", ("query", "key", "value"))


def _fused(state: dict[str, Tensor], template: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    for block in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{block}.{template.format(name, kind)}", None) for name in names]
            if parts[0] is not None:
                parts = [torch.zeros_like(parts[0]) if part is None else part for part in parts]
                state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def _official_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    gated = "gate_proj" in "".join(state)
    pairs = (
        ("embeddings.patch_embeddings", "patch_embed.proj"),
        ("embeddings.register_tokens", "storage_tokens"),
        ("embeddings.", ""),
        ("attention.o_proj", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("gate_proj", "w1"),
        ("up_proj", "w2" if gated else "fc1"),
        ("down_proj", "w3" if gated else "fc2"),
    )
    for replaced, by in pairs:
        state = {name.replace(replaced, by): tensor for name, tensor in state.items()}
    state = {re.sub(r"^layer\.", "blocks.", name): tensor for name, tensor in state.items()}
    state["mask_token"] = state["mask_token"][0]
    state["rope_embed.periods"] = (100.0 ** (torch.arange(4) / 4)).bfloat16()
    state["local_cls_norm.weight"] = torch.ones(32)
    state = _fused(state, "attention.{}_proj.{}", ("q", "k", "v"))
    for name in [name for name in state if name.endswith("qkv.bias")]:
        state[name][32:64] = 9.0  # what the mask is for
        state[f"{name}_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    return state


def _timm(case: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names, from the official ones."""
    if case.startswith("dinov3"):
        state = {name: state[name] for name in state if not re.search("mask|periods|local_cls", name)}
        for name in [name for name in state if name.endswith("qkv.bias")]:
            before = name.removesuffix("qkv.bias")
            state[f"{before}q_bias"], _, state[f"{before}v_bias"] = state.pop(name).clone().chunk(3)
        changes = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
        changes |= {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
    else:
        state = {name: state[name] for name in state if name != "mask_token"}
        if "register_tokens" in state:
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
        changes = {"register_tokens": "reg_token", "w12": "fc1", "w3": "fc2"}
    for replaced, by in changes.items():
        state = {name.replace(replaced, by): tensor for name, tensor in state.items()}
    return state


def _write(folder: Path, state: dict[str, Tensor]) -> Path:
    """A .safetensors with no more beside it than how many heads there are, which no tensor tells."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return folder


def _saved(case: str, model: Any, folder: Path) -> Path:
    """By transformers itself; of iBOT it has no network, so that one goes by the authors' names."""
    if case == "ibot":
        return _write(folder, _official(case, _state(model)))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model = _oracle(case)
    encoder = weights.load(_saved(case, model, tmp_path / case))
    assert encoder.record["family"] == case.partition("-")[0]
    assert not encoder.record["missing"] and not encoder.record["unexpected"]
    assert (encoder.record["pooling"], encoder.record["size"]) == ("cls", 56)
    for name, size in SIZES.items():
        assert _difference(model, encoder, size) < 1e-5, name
    if encoder.backbone.config.mask_token:
        hide = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.5
        asked, got = (ask(net, _pictures((56, 56)), hide) for ask, net in ((_asked, model), (_ours, encoder)))
        assert float((asked - got).abs().max()) < 1e-5
        assert float((asked - _ours(encoder, _pictures((56, 56)))).abs().max()) > 0.1
    assert encoder.backbone.config.mask_token == (case != "dino")


@pytest.mark.parametrize("case", CASES)
def test_official_names_give_the_same_features(case: str, tmp_path: Path) -> None:
    """As a .pth that holds a training's student and teacher, the teacher of which is meant."""
    model = _oracle(case)
    state = _official(case, _state(model))
    (tmp_path / case).mkdir()
    student = {f"backbone.{name}": torch.ones_like(tensor) for name, tensor in state.items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()} | {"head.mlp.0.bias": torch.ones(3)}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / case / "checkpoint.pth")
    (tmp_path / case / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    encoder = weights.load(tmp_path / case / "checkpoint.pth")
    assert encoder.record["naming"] == "official" and encoder.record["family"] == case.partition("-")[0]
    assert "teacher.head.mlp.0.bias" in encoder.record["ignored"]
    assert max(_difference(model, encoder, size) for size in SIZES.values()) < 1e-5


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("dinov2")])
@pytest.mark.parametrize("prefix", ["", "teacher.backbone.", "model.teacher.backbone."])
def test_blocks_in_chunks_are_the_same_blocks(case: str, prefix: str, tmp_path: Path) -> None:
    """DINOv2 trains with its blocks in chunks; their numbers go on from chunk to chunk."""
    model = _oracle(case)
    state = _official(case, _state(model))
    chunked = {
        f"{prefix}{re.sub(r'blocks[.]([0-9]+)[.]', lambda found: f'blocks.{found[1]}.{found[1]}.', name)}": tensor
        for name, tensor in state.items()
    }
    if prefix:
        student = {name.replace("teacher", "student"): torch.ones_like(tensor) for name, tensor in chunked.items()}
        chunked |= student | {prefix.replace("backbone", "dino_head") + "mlp.0.bias": torch.ones(3)}
    folder = _write(tmp_path / case, chunked)
    encoder = weights.load(folder)
    assert (encoder.record["naming"], encoder.record["prefix"]) == ("official in chunks", prefix)
    assert max(_difference(model, encoder, size) for size in SIZES.values()) < 1e-5
    with pytest.raises(SaccadeError, match="no place for blocks"):  # nothing says where the chunks would end
        published.to_theirs(dinov2.CHUNKED, encoder.backbone.state_dict())
    (folder / "twice").mkdir()
    twice = {f"{prefix}blocks.0.1.norm1.bias": torch.zeros(32)}
    with pytest.raises(SaccadeError, match=r"unexpected \(\S*blocks\.1\.1\."):
        weights.load(_write(folder / "twice" / case, chunked | twice))


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("dinov")])
def test_timm_names_give_the_same_features(case: str, tmp_path: Path) -> None:
    model = _oracle(case)
    state = _official(case, _state(model))
    encoder = weights.load(_write(tmp_path / case, _timm(case, state)))
    assert encoder.record["family"] == case.partition("-")[0]
    assert not encoder.backbone.config.mask_token
    assert max(_difference(model, encoder, size) for size in SIZES.values()) < 1e-5


def _namings(case: str, tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    model = _oracle(case)
    state = _official(case, _state(model))
    files = {"official": state}
    if case.startswith("dinov"):
        files["timm"] = _timm(case, state)
    if case in PORTED:
        files["transformers"] = load_file(_saved(case, model, tmp_path / "saved") / "model.safetensors")
    return files


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_changes_no_bit(case: str, tmp_path: Path) -> None:
    for tensors in _namings(case, tmp_path).values():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = published.recognise(shapes, {"num_attention_heads": 2}, case)
        naming = found.family.namings[found.naming]
        back = published.to_theirs(naming, published.to_ours(naming, tensors))
        assert back.keys() == tensors.keys() - {"local_cls_norm.weight"}
        for name, tensor in back.items():
            assert torch.equal(tensor, tensors[name]), name


SWAPS = [
    (r"(layer\.1\.)norm1", "norm2"),
    (r"(layer\.1\.)layernorm_before", "layernorm_after"),
    (r"(layer\.0\..*)query", "key"),
    (r"(layer\.0\..*)q_proj.weight", "k_proj.weight"),
    (r"(layer\.0\..*)q_proj.bias", "v_proj.bias"),
    (r"(layer\.0\..*)value", "key"),
    (r"(layer\.1\.)layer_scale1", "layer_scale2"),
    (r"(layer\.1\.mlp\.)gate_proj", "up_proj"),
    (r"(layer\.0\.)mlp.fc2.bias", "norm1.bias"),
    (r"(layer\.0\.)output.dense.bias", "attention.output.dense.bias"),
    (r"(embeddings\.)cls_token", "mask_token"),
    (r"(layer\.)0", "1"),
]


@pytest.mark.parametrize("case", PORTED)
def test_a_swapped_pair_is_seen(case: str, tmp_path: Path) -> None:
    """Were a pair of names crossed in a key map, the features would say so: each pair moves them."""
    model = _oracle(case)
    tensors, swapped = load_file(_saved(case, model, tmp_path / case) / "model.safetensors"), 0
    config = (tmp_path / case / "config.json").read_text()
    for number, (pattern, other) in enumerate(SWAPS):
        crossed = dict(tensors)
        for name in tensors:
            partner = re.sub(f"^(.*){pattern}", rf"\g<1>\g<2>{other}", name) if pattern[0] == "(" else name
            if re.search(pattern, name) and partner != name and partner in tensors:
                crossed[name], crossed[partner] = tensors[partner].view_as(tensors[name]), tensors[name]
                crossed[partner] = crossed[partner].view_as(tensors[partner])
        if all(crossed[name] is tensors[name] for name in tensors):
            continue
        swapped += 1
        folder = tmp_path / str(number) / case
        folder.mkdir(parents=True)
        save_file({name: tensor.clone() for name, tensor in crossed.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(config)
        assert _difference(model, weights.load(folder), (56, 56)) > 1e-2, (pattern, other)
    assert swapped >= 4


@pytest.mark.parametrize("case", ["dino", "dinov2", "dinov2-registers"])
def test_tables_are_resized_as_each_family_does(case: str, tmp_path: Path) -> None:
    """transformers leaves out the tenth of a cell that DINO and DINOv2 add; with registers it does as the authors."""
    model = _oracle(case)
    encoder = weights.load(_saved(case, model, tmp_path / case))
    vars(model.embeddings).pop("interpolate_pos_encoding", None)
    moved = max(_difference(model, encoder, SIZES[name]) for name in ("larger", "not square"))
    assert (moved > 1e-2) == (case != "dinov2-registers")
    if case == "dinov2-registers":
        assert moved < 1e-5
        sharp = encoder.backbone.config.model_copy(update={"position_antialias": False})
        encoder.backbone.config = sharp
        assert _difference(model, encoder, SIZES["smaller"]) > 1e-2
    else:
        encoder.backbone.config = encoder.backbone.config.model_copy(update={"position_offset": 0.0})
        assert max(_difference(model, encoder, size) for size in SIZES.values()) < 1e-5


def test_periods_are_those_of_the_authors(tmp_path: Path) -> None:
    """transformers' float32 periods turn patches by up to 0.0081 rad otherwise; with them its features are ours."""
    for head, most in ((64, 0.0081), (128, 0.0094)):
        rounded, exact = Rotation(head, 2, True), Rotation(head, 2)
        for rotation in (rounded, exact):
            rotation.reset_buffers()
        angles = 2 * math.pi * (1 / rounded.periods - 1 / exact.periods) * 15 / 16  # the last of 16 cells
        assert most - 0.0002 < float(angles.abs().max()) < most
    model = _oracle("dinov3")
    encoder = weights.load(_saved("dinov3", model, tmp_path / "dinov3"))
    model.rope_embeddings.inv_freq = 1 / 100 ** torch.arange(0, 1, 0.25)
    assert 1e-5 < _difference(model, encoder, (56, 56)) < 2e-2
    encoder.backbone.rope_embed.periods.copy_(100 ** torch.arange(0, 1, 0.25))
    assert _difference(model, encoder, (84, 84)) < 1e-5


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (0.5, "other than 1, 0, 1")])
def test_a_mask_of_biases_that_was_not_set_is_refused(value: float, said: str, tmp_path: Path) -> None:
    state = _official("dinov3", _state(_oracle("dinov3")))
    state["blocks.1.attn.qkv.bias_mask"][:] = value
    with pytest.raises(SaccadeError, match=said):
        weights.load(_write(tmp_path / "dinov3", state))


def test_a_config_with_another_eps_does_not_change_it(tmp_path: Path) -> None:
    model = _oracle("dino")
    folder = _saved("dino", model, tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(config))
    assert weights.load(folder).backbone.config.eps == 1e-6


PUBLISHED = [
    (family, size) for family in ("dino", "ibot", "dinov2", "dinov3") for size in published.families()[family].sizes
]


def _real(family: str, size: published.Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers gives a published network, on the meta device."""
    shape: dict[str, Any] = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "patch_size": size.patch,
        "image_size": size.image_size,
    }
    gated = size.switches.get("activation") == "swiglu"
    with torch.device("meta"):
        if family in ("dino", "ibot"):
            config = transformers.ViTConfig(**shape, intermediate_size=size.hidden)
            model = transformers.ViTModel(config, add_pooling_layer=False)
        elif family == "dinov2":
            kind = "Dinov2WithRegisters" if size.switches["registers"] else "Dinov2"
            config = getattr(transformers, f"{kind}Config")(**shape, use_swiglu_ffn=gated)
            model = getattr(transformers, f"{kind}Model")(config)
        else:
            biases = {"query_bias": size.width < 4096, "value_bias": size.width < 4096}
            shape |= {"intermediate_size": size.hidden, "num_register_tokens": 4, "use_gated_mlp": gated}
            model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**shape, **biases))
    return {name: tuple(tensor.shape) for name, tensor in _state(model).items()}


@pytest.mark.parametrize(("family", "size"), PUBLISHED, ids=str)
def test_each_published_size_is_recognised(family: str, size: str) -> None:
    """Its geometry as transformers builds it, the 7B too: names, shapes, number of parameters."""
    facts = published.families()[family].sizes[size]
    shapes = _real(family, facts)
    if family == "ibot":
        hollow = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        dino, ibot = (published.families()[name].namings for name in ("dino", "ibot"))
        ours = published.to_ours(dino["transformers"], hollow)
        shapes = {name: tuple(x.shape) for name, x in published.to_theirs(ibot["official"], ours).items()}
    found = published.recognise(shapes, None, facts.names[0].rpartition("/")[2] if facts.names else family)
    assert (found.family.name, found.size) == (family, size)
    assert {name: found.config[name] for name in facts.numbers} == facts.numbers
    keyless = 0 if found.config.get("qkv_bias") != "k_masked" else facts.width * facts.depth
    mask = facts.width * (family == "dinov3" and "embeddings.mask_token" not in shapes)
    assert sum(map(math.prod, shapes.values())) + keyless + mask == facts.parameters


def test_what_tensors_cannot_tell_the_name_must(tmp_path: Path) -> None:
    """Land or satellite, which differ in their normalisation; DINO or iBOT."""
    large = published.families()["dinov3"].sizes["vit-l/16"]
    shapes = _real("dinov3", large)
    with pytest.raises(SaccadeError, match="name must say which"):
        published.recognise(shapes, None, "weights")
    land, satellite = (
        published.recognise(shapes, None, f"dinov3-vitl16-pretrain-{data}").config["mean"]
        for data in ("lvd1689m", "sat493m")
    )
    assert (land, satellite) == ((0.485, 0.456, 0.406), (0.430, 0.411, 0.296))
    state = _official("dino", _state(_oracle("dino")))
    for family in ("dino", "ibot"):
        assert weights.load(_write(tmp_path / family / "s", state).rename(tmp_path / family / f"{family}-s"))
    with pytest.raises(SaccadeError, match="may be of"):
        weights.load(_write(tmp_path / "unnamed" / "s", state))


@pytest.mark.parametrize(("gated", "said"), [(True, "gelu"), (False, "silu"), (False, "relu")])
def test_an_activation_that_the_mlp_cannot_have_is_refused(gated, said, tmp_path):
    """It is read from config.json alone, so a wrong one would be silent."""
    _dinov3(gated).save_pretrained(tmp_path / "dinov3")
    path = tmp_path / "dinov3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": said}))
    with pytest.raises(SaccadeError, match=f"activation '{said}'"):
        weights.load(tmp_path / "dinov3")


def test_an_activation_that_config_json_says_is_believed(tmp_path):
    config = transformers.Dinov2Config(**TINY, mlp_ratio=3, patch_size=14, image_size=56, hidden_act="quick_gelu")
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dinov2")
    encoder = weights.load(tmp_path / "dinov2")
    assert encoder.backbone.config.activation == "gelu_quick"
    assert _difference(model, encoder, (56, 56)) < 1e-5

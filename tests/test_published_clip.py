"""CLIP, SigLIP, I-JEPA, MoCo v3 and plain ViTs against transformers, or a float64 forward written here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from saccade import published, vit, weights
from saccade.errors import SaccadeError

transformers = pytest.importorskip("transformers")

NUMBERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MEAN_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5,) * 3, (0.5,) * 3),
    "ijepa": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mocov3": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "timm-vit": ((0.5,) * 3, (0.5,) * 3),
}
FAMILIES = ["clip", "siglip", "ijepa", "timm-vit"]
SIZES = [(32, 32), (32, 48), (64, 64), (24, 16)]


def _model(family: str, **changes: Any) -> Any:
    """transformers' network with every tensor redrawn."""
    settings = NUMBERS | changes
    if family == "clip":
        network = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**settings))
    elif family == "siglip":
        network = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings))
    elif family == "ijepa":
        network = transformers.IJepaModel(transformers.IJepaConfig(**settings, layer_norm_eps=1e-6))
    else:
        network = transformers.ViTModel(transformers.ViTConfig(**settings, layer_norm_eps=1e-6))
    return _redrawn(network)


def _redrawn(network: Any) -> Any:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            values = torch.randn(tensor.shape, generator=draw) * (0.2 if tensor.ndim > 1 else 0.4)
            tensor.copy_(values + (tensor.ndim == 1 and name.endswith("weight")))
    return network.eval()


def _images(size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def _normalised(family: str, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in MEAN_STD[family])
    return (images - mean) / std


@torch.no_grad()
def _theirs(family: str, network: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    out = network(_normalised(family, images), interpolate_pos_encoding=True)
    tokens = out.last_hidden_state
    if family == "clip":  # its last norm is given to the class token alone
        tokens = network.post_layernorm(tokens)
        assert torch.equal(tokens[:, 0], out.pooler_output)
    if family == "siglip":
        return {"patches": tokens, "pooled": out.pooler_output}
    if family == "ijepa":
        return {"patches": tokens, "pooled": tokens.mean(1)}
    return {"cls": tokens[:, 0], "patches": tokens[:, 1:], "pooled": tokens[:, 0]}


@torch.no_grad()
def _ours(encoder: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    features = encoder(images)
    found = {"patches": features.patches, "pooled": encoder.embedding(features)}
    return found if features.cls is None else found | {"cls": features.cls}


def _apart(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert some.keys() == others.keys()
    return max((some[name] - others[name]).abs().max().item() for name in some)


def _saved(network: Any, folder: Path) -> Path:
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_folder_gives_transformers_features(family, tmp_path):
    network = _model(family)
    encoder = weights.load(_saved(network, tmp_path / family))
    assert (encoder.record["family"], encoder.record["naming"]) == (family, "transformers")
    assert encoder.record["mean"] == pytest.approx(MEAN_STD[family][0])
    assert encoder.backbone.config.heads == 4
    assert _theirs(family, network, _images())["pooled"].std() > 0.1
    for size in SIZES:
        assert _apart(_ours(encoder, _images(size)), _theirs(family, network, _images(size))) < 1e-5, size


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensors_exchanged_give_other_features(family, tmp_path):
    network = _model(family)
    encoder = weights.load(_saved(network, tmp_path / family))
    tensors, naming = load_file(tmp_path / family / "model.safetensors"), encoder.record["naming"]
    right, rules = _theirs(family, network, _images()), published.families()[family].namings[naming]
    last = [name for name in tensors if ".1." not in name and not name.startswith("pooler")]
    alike = sorted(last, key=lambda name: (tensors[name].shape, name))
    pairs = [(one, other) for step in (1, 2, 3) for one, other in zip(alike, alike[step:], strict=False)]
    swapped = 0
    for one, other in pairs:
        if tensors[one].shape != tensors[other].shape:
            continue
        exchanged = tensors | {one: tensors[other], other: tensors[one]}
        encoder.backbone.load_state_dict(published.to_ours(rules, exchanged))
        assert _apart(_ours(encoder, _images()), right) > 1e-3, (one, other)
        swapped += 1
    assert swapped > 24
    encoder.backbone.load_state_dict(published.to_ours(rules, tensors))
    assert _apart(_ours(encoder, _images()), right) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, "mocov3"])
def test_every_naming_is_a_round_trip_and_is_recognised(family, tmp_path):
    known = published.families()[family]
    config = vit.ViTConfig(
        width=32,
        depth=2,
        heads=4,
        hidden=48,
        patch=8,
        image_size=32,
        **{"pooling": known.pooling} | dict(known.switches),
    )
    tensors = {name: torch.randn(tensor.shape) for name, tensor in vit.ViT(config).state_dict().items()}
    for name, naming in known.namings.items():
        prefix = naming.prefixes[0]
        theirs = published.to_theirs(naming, tensors, prefix)
        again = published.to_ours(naming, theirs, prefix)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)
        back = published.to_theirs(naming, again, prefix)
        assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)
        called = {"timm-vit": "vit_tiny", "mocov3": "moco"}.get(family, family)
        shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
        found = published.recognise(shapes, {"num_attention_heads": 4}, called)
        assert found.family is known and not found.names.missing
        assert name == found.naming or naming.rules == known.namings[found.naming].rules
        del shapes[next(key for key in shapes if key.endswith("bias"))]
        with pytest.raises(SaccadeError):
            published.recognise(shapes, {"num_attention_heads": 4}, called)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_gives_the_file_that_transformers_wrote(family, tmp_path):
    folder = _saved(_model(family), tmp_path / family)
    encoder, given = weights.load(folder), load_file(folder / "model.safetensors")
    theirs = published.to_theirs(published.families()[family].namings["transformers"], encoder.backbone.state_dict())
    assert given.keys() - theirs.keys() == set(encoder.record["ignored"])
    assert theirs.keys() <= given.keys()
    assert all(torch.equal(theirs[name], given[name]) for name in theirs)


@pytest.mark.parametrize("whole", [True, False])
def test_a_clip_with_texts_or_a_projection_gives_its_image_tower(whole, tmp_path):
    vision = transformers.CLIPVisionConfig(**NUMBERS, projection_dim=16)
    if whole:
        text = {name: NUMBERS[name] for name in list(NUMBERS)[:4]} | {"vocab_size": 99, "eos_token_id": 2}
        config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=16)
        network = _redrawn(transformers.CLIPModel(config))
    else:
        network = _redrawn(transformers.CLIPVisionModelWithProjection(vision))
    encoder = weights.load(_saved(network, tmp_path / "given"))
    assert encoder.record["family"] == "clip"
    assert "visual_projection.weight" in encoder.record["ignored"]
    assert any(name.startswith("text_model.") for name in encoder.record["ignored"]) == whole
    assert _apart(_ours(encoder, _images()), _theirs("clip", network.vision_model, _images())) < 1e-5


def test_a_siglip_with_texts_gives_its_image_tower(tmp_path):
    text = {name: NUMBERS[name] for name in list(NUMBERS)[:4]} | {"vocab_size": 99, "eos_token_id": 2}
    config = transformers.SiglipConfig(vision_config=dict(NUMBERS), text_config=text)
    network = _redrawn(transformers.SiglipModel(config))
    encoder = weights.load(_saved(network, tmp_path / "given"))
    assert encoder.record["family"] == "siglip" and encoder.record["pooling"] == "map"
    assert _apart(_ours(encoder, _images()), _theirs("siglip", network.vision_model, _images())) < 1e-5


def test_a_siglip_whose_patches_leave_a_margin(tmp_path):
    """So400m/14 at 384: the margin of 6 pixels right and below is never seen."""
    network = _model("siglip", image_size=30, patch_size=7)
    encoder = weights.load(_saved(network, tmp_path / "given"))
    assert encoder.record["size"] == 28
    seen = _images((30, 30))
    assert _apart(_ours(encoder, seen[:, :, :28, :28]), _theirs("siglip", network, seen)) < 1e-5


def test_pictures_become_squares_for_siglip_and_are_cropped_for_clip(tmp_path):
    wide = torch.zeros(3, 64, 128)
    wide[:, :, 96:] = 1
    for family, white in (("siglip", 0.25), ("clip", 0.0)):
        encoder = weights.load(_saved(_model(family), tmp_path / family))
        pixels = encoder.preprocess(wide)
        assert pixels.shape == (3, 32, 32)
        assert pixels.mean().item() == pytest.approx(white, abs=0.01)


def test_a_clip_trained_with_exact_gelu_is_run_with_it(tmp_path):
    network = _model("clip", hidden_act="gelu")
    folder = _saved(network, tmp_path / "given")
    encoder = weights.load(folder)
    assert _apart(_ours(encoder, _images()), _theirs("clip", network, _images())) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    assert _apart(_ours(weights.load(folder), _images()), _theirs("clip", network, _images())) > 1e-3
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(SaccadeError, match="relu"):
        weights.load(folder)


def _official_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' image tower as OpenAI names it, written from the fact sheet."""
    out = {
        "class_embedding": tensors["embeddings.class_embedding"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "conv1.weight": tensors["embeddings.patch_embedding.weight"],
        "proj": torch.randn(32, 16),
    }
    for kind in ("weight", "bias"):
        out[f"ln_pre.{kind}"], out[f"ln_post.{kind}"] = (
            tensors[f"pre_layrnorm.{kind}"],
            tensors[f"post_layernorm.{kind}"],
        )
        for n in range(2):
            ours, theirs = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
            parts = [tensors[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            out[f"{ours}.attn.in_proj_{kind}"] = torch.cat(parts)
            out[f"{ours}.attn.out_proj.{kind}"] = tensors[f"{theirs}.self_attn.out_proj.{kind}"]
            out[f"{ours}.ln_1.{kind}"] = tensors[f"{theirs}.layer_norm1.{kind}"]
            out[f"{ours}.ln_2.{kind}"] = tensors[f"{theirs}.layer_norm2.{kind}"]
            out[f"{ours}.mlp.c_fc.{kind}"] = tensors[f"{theirs}.mlp.fc1.{kind}"]
            out[f"{ours}.mlp.c_proj.{kind}"] = tensors[f"{theirs}.mlp.fc2.{kind}"]
    return {f"visual.{name}": tensor for name, tensor in out.items()}


def _beside(folder: Path, heads: int = 4, **facts: Any) -> Path:
    """A folder whose config.json says what a file of an unpublished size cannot."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": heads} | facts))
    return folder


def test_an_official_clip_state_dict(tmp_path):
    network = _model("clip")
    texts = {"transformer.resblocks.0.ln_1.weight": torch.ones(32), "logit_scale": torch.ones(())}
    path = _beside(tmp_path / "given") / "ViT-B-32.pt"
    torch.save(_official_clip(network.state_dict()) | texts, path)
    encoder = weights.load(path)
    assert (encoder.record["family"], encoder.record["naming"]) == ("clip", "official")
    assert sorted(encoder.record["ignored"]) == ["logit_scale", "transformer.resblocks.0.ln_1.weight", "visual.proj"]
    assert _apart(_ours(encoder, _images((32, 48))), _theirs("clip", network, _images((32, 48)))) < 1e-5


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' ViT as timm and most authors name it, written from the fact sheet."""
    out = {"pos_embed": tensors["embeddings.position_embeddings"]}
    if "embeddings.cls_token" in tensors:
        out["cls_token"] = tensors["embeddings.cls_token"]
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = tensors[f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"norm.{kind}"] = tensors[f"layernorm.{kind}"]
        for n in range(2):
            theirs = f"encoder.layer.{n}"
            parts = [tensors[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            out[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(parts)
            out[f"blocks.{n}.attn.proj.{kind}"] = tensors[f"{theirs}.attention.output.dense.{kind}"]
            out[f"blocks.{n}.norm1.{kind}"] = tensors[f"{theirs}.layernorm_before.{kind}"]
            out[f"blocks.{n}.norm2.{kind}"] = tensors[f"{theirs}.layernorm_after.{kind}"]
            out[f"blocks.{n}.mlp.fc1.{kind}"] = tensors[f"{theirs}.intermediate.dense.{kind}"]
            out[f"blocks.{n}.mlp.fc2.{kind}"] = tensors[f"{theirs}.output.dense.{kind}"]
    return out


def test_an_official_ijepa_file_gives_the_moving_average(tmp_path):
    network = _model("ijepa")
    wanted = _plain(load_file(_saved(network, tmp_path / "theirs") / "model.safetensors"))
    path = _beside(tmp_path / "given") / "IN1K-vit.h.14-300e.pth.tar"
    content = {
        "encoder": {f"module.{name}": torch.randn(tensor.shape) for name, tensor in wanted.items()},
        "target_encoder": {f"module.{name}": tensor for name, tensor in wanted.items()},
        "predictor": {"module.mask_token": torch.zeros(1, 1, 8)},
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "epoch": 300,
    }
    torch.save(content, path)
    encoder = weights.load(path)
    assert (encoder.record["family"], encoder.record["naming"]) == ("ijepa", "official")
    assert encoder.record["licence"] == "CC-BY-NC-4.0" and "non-commercial" in encoder.record["terms"]
    assert "encoder.module.norm.weight" in encoder.record["ignored"]
    assert _apart(_ours(encoder, _images((32, 48))), _theirs("ijepa", network, _images((32, 48)))) < 1e-5


def test_a_plain_vit_under_timm_s_names(tmp_path):
    network = _model("timm-vit")
    tensors = _plain(load_file(_saved(network, tmp_path / "theirs") / "model.safetensors"))
    folder = _beside(tmp_path / "given", architecture="vit_tiny_patch16_224", pretrained_cfg={"tag": "augreg_in21k"})
    save_file(tensors | {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}, folder / "model.safetensors")
    encoder = weights.load(folder)
    assert (encoder.record["family"], encoder.record["naming"]) == ("timm-vit", "timm")
    assert encoder.record["ignored"] == ["head.bias", "head.weight"]
    assert encoder.backbone.config.position_antialias  # as timm itself; the oracle does without
    assert _apart(_ours(encoder, _images((32, 32))), _theirs("timm-vit", network, _images((32, 32)))) < 1e-5
    (folder / "config.json").write_text('{"num_attention_heads": 4, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}')
    save_file(tensors, folder / "deit_tiny.safetensors")
    assert weights.load(folder / "deit_tiny.safetensors").record["mean"] == [0.1, 0.2, 0.3]


def _forward(tensors: dict[str, torch.Tensor], x: torch.Tensor, heads: int, patch: int = 8) -> torch.Tensor:
    """All tokens of a plain ViT in float64: convolution, class token, positions, blocks, norm; eps 1e-6."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    x = F.conv2d(x.double(), tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=patch)
    x, table = x.flatten(2).transpose(1, 2), tensors["pos_embed"]
    if table.shape[1] == x.shape[1]:
        x = x + table
    if "cls_token" in tensors:
        x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], 1)
    if table.shape[1] == x.shape[1] and table.shape[1] % 2:
        x = x + table
    for n in range(2):
        qkv = linear(f"blocks.{n}.attn.qkv", norm(f"blocks.{n}.norm1", x))
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        branch = linear(f"blocks.{n}.attn.proj", (weight @ value).transpose(1, 2).flatten(2))
        x = x + branch * tensors.get(f"blocks.{n}.ls1.gamma", 1)
        inner = linear(f"blocks.{n}.mlp.fc1", norm(f"blocks.{n}.norm2", x))
        branch = linear(f"blocks.{n}.mlp.fc2", inner * (1 + torch.erf(inner / 2**0.5)) / 2)
        x = x + branch * tensors.get(f"blocks.{n}.ls2.gamma", 1)
    return norm("norm", x)


def _drawn(rows: int, *, cls: bool = True, scales: bool = False, seed: int = 3) -> dict[str, torch.Tensor]:
    """A plain ViT's tensors under timm's names, width 32, 2 blocks, none of them constant."""
    shapes = {"pos_embed": (1, rows, 32), "patch_embed.proj.weight": (32, 3, 8, 8), "patch_embed.proj.bias": (32,)}
    shapes |= {"cls_token": (1, 1, 32)} if cls else {}
    for n in range(2):
        outs = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (48, 32), "mlp.fc2": (32, 48)}
        shapes |= {f"blocks.{n}.{name}.weight": shape for name, shape in outs.items()}
        shapes |= {f"blocks.{n}.{name}.bias": shape[:1] for name, shape in outs.items()}
        shapes |= {f"blocks.{n}.norm{i}.{kind}": (32,) for i in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"blocks.{n}.ls{i}.gamma": (32,) for i in (1, 2) if scales}
    shapes |= {"norm.weight": (32,), "norm.bias": (32,)}
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}


def _tokens(encoder: Any) -> torch.Tensor:
    features = encoder.double()(_images().double())
    return features.patches if features.cls is None else torch.cat([features.cls[:, None], features.patches], 1)


def test_an_official_mocov3_file_gives_the_encoder(tmp_path):
    """Oracle: the forward above, for no library has these networks."""
    tensors = _drawn(17)
    other = _drawn(17, seed=4)
    content = {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": {
            **{f"module.base_encoder.{name}": tensor for name, tensor in tensors.items()},
            **{f"module.momentum_encoder.{name}": tensor for name, tensor in other.items()},
            "module.base_encoder.head.0.weight": torch.ones(4, 32),
            "module.predictor.0.weight": torch.ones(4, 4),
        },
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    path = _beside(tmp_path / "given", heads=8) / "vit-s-300ep.pth.tar"
    torch.save(content, path)
    encoder = weights.load(path)
    assert encoder.record["family"] == "mocov3" and encoder.record["pooling"] == "cls"
    assert any("momentum_encoder" in name for name in encoder.record["ignored"])
    with torch.no_grad():
        right, found = _forward(tensors, _normalised("mocov3", _images().double()), 8), _tokens(encoder)
        assert (found - right).abs().max() < 1e-6  # mean and spread are kept in float32
        for one, swapped in itertools.combinations([name for name in tensors if ".1." not in name], 2):
            if tensors[one].shape == tensors[swapped].shape and len(tensors[one].shape) < 2:
                encoder.backbone.load_state_dict(tensors | {one: tensors[swapped], swapped: tensors[one]})
                assert (_tokens(encoder) - right).abs().max() > 1e-3, (one, swapped)


@pytest.mark.parametrize(("rows", "cls", "scales"), [(16, False, False), (17, True, True), (16, True, True)])
def test_what_a_plain_vit_has_is_read_from_its_tensors(rows, cls, scales, tmp_path):
    tensors = _drawn(rows, cls=cls, scales=scales)
    path = _beside(tmp_path / "given", **({} if cls else {"global_pool": "avg"})) / "vit_custom.safetensors"
    save_file(tensors, path)
    encoder = weights.load(path)
    config = encoder.backbone.config
    assert (config.cls, config.cls_position, config.pooling) == (cls, rows == 17, "cls" if cls else "mean")
    with torch.no_grad():
        right = _forward(tensors, _normalised("timm-vit", _images().double()), 4)
        assert (_tokens(encoder) - right).abs().max() < 1e-6


CASES = [(family, size) for family in [*FAMILIES, "mocov3"] for size in published.families()[family].sizes]


@pytest.mark.parametrize(("family", "size"), CASES)
def test_published_sizes_have_their_parameters_and_are_recognised(family, size):
    known = published.families()[family]
    facts = known.sizes[size]
    config = vit.ViTConfig(**{"pooling": known.pooling} | dict(known.switches) | dict(facts.switches) | facts.numbers)
    with torch.device("meta"):
        network = vit.ViT(config)
    assert sum(tensor.numel() for tensor in network.parameters()) == facts.parameters
    if facts.depth > 12 and size not in ("vit-l/14-336", "vit-so400m/14-384", "vit-g/16"):
        return  # a network of each family is enough: recognising tries them all
    name, naming = next(iter(known.namings.items()))
    theirs = published.to_theirs(naming, network.state_dict(), naming.prefixes[0])
    found = published.recognise({key: tuple(x.shape) for key, x in theirs.items()}, {}, f"{family} {facts.names[0]}")
    assert (found.family.name, found.naming) == (family, name)
    assert found.size is not None and known.sizes[found.size].numbers == facts.numbers
    assert vit.ViTConfig(**found.config) == config

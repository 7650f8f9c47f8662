"""What our networks are called elsewhere: the network of transformers or timm that computes the same, and the way back.

Which one fits is read off the network's switches, never off the recipe that trained it. What the other network has and
ours has not is folded into it: a table that a formula gives, factors of one, biases of zero. `unfold` takes that out
again where it still is what was put in; what has been trained since stays, as switches of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade import published
from saccade.convnet import ConvConfig, ConvNeXtConfig, ResNetConfig
from saccade.errors import SaccadeError
from saccade.published import Naming, dinov3, timm_convnext
from saccade.vit import ViTConfig, sincos

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "gelu_quick": "quick_gelu"}
_TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_quick": "quick_gelu"}


def _rope(gated: bool) -> Naming:
    """DINOv3's network in transformers, for one whose keys have a bias; DINOv3's have none."""
    known = dinov3.FAMILY.namings["transformers gated" if gated else "transformers"]
    bias = "blocks.{n}.attn.qkv.bias"
    theirs = tuple(f"layer.{{n}}.attention.{part}_proj.bias" for part in "qkv")
    return replace(known, rules=tuple((bias, theirs) if rule[0] == bias else rule for rule in known.rules))


def _normed_cells() -> Naming:
    """timm's ConvNeXt that norms every cell before the mean; a published one norms the mean (`head.norm`)."""
    known = timm_convnext.FAMILY.namings["timm"]
    moved = {f"head.norm.{kind}": f"norm_pre.{kind}" for kind in ("weight", "bias")}
    return replace(known, rules=tuple((rule[0], moved.get(str(rule[1]), rule[1]), *rule[2:]) for rule in known.rules))


_NAMINGS: dict[str, dict[str, Naming]] = {
    "rope": {"transformers": _rope(gated=False), "transformers gated": _rope(gated=True)},
    "convnext": {"timm": _normed_cells()},
}
"""Networks that no page under `published/` names."""


@dataclass(frozen=True)
class Target:
    """A network of another library that computes the same.

    `page` and `naming` are whose table of names; `facts` go into its config.json; `folds` are what must be put into the
    tensors because it has them: table, row (of the class token, in the table), scales, mask, biases, keys; `dense` is
    the width of a pooler that it insists on; `notes` are what a user must know.
    """

    architecture: str
    page: str
    naming: str
    facts: Mapping[str, Any]
    folds: frozenset[str] = frozenset()
    dense: int | None = None
    notes: tuple[str, ...] = field(default=())


def naming(page: str, name: str) -> Naming:
    """A table of names. Raises `SaccadeError` for one that this version does not know."""
    namings = _NAMINGS[page] if page in _NAMINGS else known.namings if (known := _family(page)) else {}
    if name not in namings:
        raise SaccadeError(f"no naming {name!r} of {page!r} is known", path=page, hint="a newer saccade may have it")
    return namings[name]


def _family(page: str) -> published.Family | None:
    return published.families().get(page)


def _first(library: str, wrong: Mapping[str, Any]) -> None:
    """Raises `SaccadeError` with the first of these that is so."""
    for what, holds in wrong.items():
        if holds:
            raise SaccadeError(
                f"{library} has no network that computes this one: {what}",
                path="--to",
                hint="--to safetensors and --to onnx take every network as it is",
            )


def transformers(config: Any, family: str = "saccade") -> Target:
    """The network of transformers with these switches. Raises `SaccadeError` that says what none of them has.

    `family`: where the weights come from, which decides only whether a plain ViT is said to be an MAE.
    """
    if isinstance(config, ViTConfig):
        target = _vit_transformers(config, family)
        if config.pooling == "mean":
            first = int(config.cls) + config.registers
            mean = f"the embedding is the mean of the patches: `last_hidden_state[:, {first}:].mean(1)`"
            target = replace(target, notes=(*target.notes, mean))
        return _placed(target, config, antialias=target.architecture == "dinov2_with_registers")
    common = {"num_channels": config.channels, "depths": list(config.blocks)}
    _first("transformers", {"plain convolutions with max-pooling": isinstance(config, ConvConfig)})
    _first("transformers", {f"its stem has a stride of {config.stem}, not 4": config.stem != 4})
    _first("transformers", {f"{len(config.blocks)} stages, not 4": len(config.blocks) != 4})
    if isinstance(config, ResNetConfig):
        factor = 1 if config.kind == "basic" else 4
        facts = {
            **common,
            "embedding_size": config.widths[0],
            "hidden_sizes": [factor * width for width in config.widths],
            "layer_type": config.kind,
            "hidden_act": "relu",
        }
        return Target("resnet", "resnet", "transformers", {**facts, "architectures": ["ResNetModel"]})
    assert isinstance(config, ConvNeXtConfig)
    facts = {
        **common,
        "hidden_sizes": list(config.widths),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": config.image_size,
        "architectures": ["DINOv3ConvNextModel"],
    }
    note = "the embedding is `last_hidden_state[:, 1:].mean(1)`: `pooler_output` is normed after pooling, not before"
    notes = () if config.cls else (note,)
    return Target("dinov3_convnext", "dinov3-convnext", "transformers", facts, notes=notes)


def _vit_transformers(config: ViTConfig, family: str) -> Target:
    _first("transformers", {"it reads clips": config.patch_time is not None})
    facts = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "layer_norm_eps": config.eps,
        "hidden_act": _ACTIVATIONS.get(config.activation, "silu"),
    }
    gated = config.activation == "swiglu"
    if config.position == "rope":
        return _dinov3(config, facts, gated)
    if config.pre_norm:
        return _clip(config, facts)
    _first("transformers", {"its patch embedding has no bias": not config.patch_bias})
    if config.pooling == "map":
        return _siglip(config, facts)
    folds = _folds(config, row=config.cls)
    if config.layer_scale is not None or config.registers or gated:
        return _dinov2(config, facts, folds)
    facts |= {"intermediate_size": config.hidden, "qkv_bias": config.qkv_bias != "none"}
    if not config.cls:
        return Target("ijepa", "ijepa", "transformers", facts | {"architectures": ["IJepaModel"]}, folds)
    if family == "mae":
        note = "ViTMAEModel shuffles the patches: give it `noise` that rises to keep their order; nothing is hidden"
        facts |= {"mask_ratio": 0.0, "architectures": ["ViTMAEModel"]}
        return Target("vit_mae", "mae", "transformers", facts, folds, notes=(note,))
    note = "`pooler_output` is the class token itself: the pooler that ViTModel insists on is written as the identity"
    facts |= {"pooler_act": "linear", "architectures": ["ViTModel"]}
    return Target("vit", "timm-vit", "transformers", facts, folds, dense=config.width, notes=(note,))


def _placed(target: Target, config: ViTConfig, *, antialias: bool) -> Target:
    """With a note where a library places patches of another size than the native one otherwise: bicubic, on sides."""
    alike = config.position_antialias == antialias and not config.position_linear and not config.position_offset
    if config.position in ("rope", "none") or (config.position == "learned" and alike):
        return target
    theirs = f"bicubic{', antialiased' if antialias else ''}"
    note = f"at other sizes than {config.image_size} it resizes positions its own way ({theirs}): features differ a bit"
    return replace(target, notes=(*target.notes, note))


def _folds(config: ViTConfig, *, row: bool, biases: bool = False) -> frozenset[str]:
    """What a network with a table, the three biases or none, and perhaps a row for the class token needs."""
    found = {"table"} if config.position != "learned" else set()
    if row and not (config.cls and config.cls_position and config.position == "learned"):
        found.add("row")
    if config.qkv_bias == "k_masked":
        found.add("keys")
    if biases and config.qkv_bias == "none":
        found.add("biases")
    return frozenset(found)


def _dinov2(config: ViTConfig, facts: dict[str, Any], folds: frozenset[str]) -> Target:
    def hidden(ratio: int) -> int:
        inner = config.width * ratio
        return (int(inner * 2 / 3) + 7) // 8 * 8 if config.activation == "swiglu" else inner

    ratio = next((ratio for ratio in range(1, 33) if hidden(ratio) == config.hidden), None)
    _first(
        "transformers",
        {
            "layer scale, registers or a gate without a class token": not config.cls,
            f"an MLP of {config.hidden}, which is no multiple of the width {config.width}": ratio is None,
        },
    )
    kind, name = ("dinov2_with_registers", "WithRegisters") if config.registers else ("dinov2", "")
    facts |= {
        "mlp_ratio": ratio,
        "use_swiglu_ffn": config.activation == "swiglu",
        "qkv_bias": config.qkv_bias != "none",
        "architectures": [f"Dinov2{name}Model"],
    }
    if config.registers:
        facts["num_register_tokens"] = config.registers
    if config.activation == "swiglu":
        facts["hidden_act"] = "gelu"  # not read where there is a gate
    scales = frozenset({"scales"} if config.layer_scale is None else ())
    return Target(kind, "dinov2", "transformers", facts, folds | scales | {"mask"})


def _dinov3(config: ViTConfig, facts: dict[str, Any], gated: bool) -> Target:
    _first(
        "transformers",
        {
            "rotated positions without a class token": not config.cls,
            "rotated positions and a norm before the blocks": config.pre_norm,
            "rotated positions and attention pooling": config.pooling == "map",
            "its patch embedding has no bias": not config.patch_bias,
            f"heads of {config.width // config.heads}, which 4 does not divide": config.width // config.heads % 4,
        },
    )
    biased = config.qkv_bias != "none"
    facts |= {
        "intermediate_size": config.hidden,
        "use_gated_mlp": gated,
        "num_register_tokens": config.registers,
        "query_bias": biased,
        "value_bias": biased,
        "key_bias": config.qkv_bias == "all",
        "rope_theta": 100.0,
        "pos_embed_rescale": None,  # it would scale positions at random in training
        "architectures": ["DINOv3ViTModel"],
    }
    folds = {"mask", *(["scales"] if config.layer_scale is None else []), *([] if config.registers else ["registers"])}
    notes = (_ROUNDED,) if config.rope_rounded else ()
    page, table = "rope" if config.qkv_bias == "all" else "dinov3", "transformers gated" if gated else "transformers"
    return Target("dinov3_vit", page, table, facts, frozenset(folds), notes=notes)


_ROUNDED = (
    "it computes RoPE's periods in float32, the released network has them rounded to bfloat16: patches differ a bit"
)


def _clip(config: ViTConfig, facts: dict[str, Any]) -> Target:
    _first(
        "transformers",
        {
            "a norm before the blocks and a patch embedding with bias": config.patch_bias,
            "a norm before the blocks without a class token": not config.cls,
            "a norm before the blocks and registers": config.registers,
            "a norm before the blocks and layer scale": config.layer_scale is not None,
            "a norm before the blocks and a gate": config.activation == "swiglu",
            "a norm before the blocks and attention pooling": config.pooling == "map",
        },
    )
    facts |= {"intermediate_size": config.hidden, "architectures": ["CLIPVisionModel"]}
    note = "patches need the last norm: `model.post_layernorm(output.last_hidden_state)`; `pooler_output` has had it"
    folds = _folds(config, row=True, biases=True)
    return Target("clip_vision_model", "clip", "transformers", facts, folds, notes=(note,))


def _siglip(config: ViTConfig, facts: dict[str, Any]) -> Target:
    _first(
        "transformers",
        {
            "attention pooling and a class token": config.cls,
            "attention pooling and registers": config.registers,
            "attention pooling and layer scale": config.layer_scale is not None,
            "attention pooling and a gate": config.activation == "swiglu",
        },
    )
    facts |= {"intermediate_size": config.hidden, "architectures": ["SiglipVisionModel"]}
    folds = _folds(config, row=False, biases=True)
    return Target("siglip_vision_model", "siglip", "transformers", facts, folds)


def timm(config: Any, family: str = "saccade", size: str | None = None) -> Target:
    """The network of timm with these switches; `facts` are `architecture`, `global_pool` and `model_args`.

    `family` and `size`: a published network is called as timm calls it. Raises `SaccadeError`.
    """
    if isinstance(config, ViTConfig):
        target = _placed(_eva(config) if config.position == "rope" else _vit_timm(config), config, antialias=True)
    else:
        target = _convnet_timm(config)
    return _called_by_timm(target, config, family, size)


def _convnet_timm(config: Any) -> Target:
    _first("timm", {"plain convolutions with max-pooling": isinstance(config, ConvConfig)})
    _first("timm", {f"its stem has a stride of {config.stem}, not 4": config.stem != 4})
    _first("timm", {f"{len(config.blocks)} stages, not 4": len(config.blocks) != 4})
    if isinstance(config, ResNetConfig):
        _first("timm", {f"its stem has a width of {config.widths[0]}, not 64": config.widths[0] != 64})
        arguments = {"layers": list(config.blocks), "channels": list(config.widths), "in_chans": config.channels}
        name = "resnet18" if config.kind == "basic" else "resnet50"
        return Target(name, "resnet", "torchvision", {"global_pool": "avg", "model_args": arguments})
    arguments = {
        "depths": list(config.blocks),
        "dims": list(config.widths),
        "in_chans": config.channels,
        "head_norm_first": not config.cls,  # every cell is normed and then the mean taken, or the mean is normed
    }
    note = "cells need the norm of the mean: `model.head.norm(model.forward_features(images))`"
    page, notes = ("timm-convnext", (note,)) if config.cls else ("convnext", ())
    return Target("convnext_tiny", page, "timm", {"global_pool": "avg", "model_args": arguments}, notes=notes)


def _ratio(config: ViTConfig, factor: int = 1) -> float:
    """`int(width * ratio)` is the hidden width, whatever rounding does."""
    ratio = factor * config.hidden / config.width
    return (
        ratio if int(config.width * ratio) == factor * config.hidden else (factor * config.hidden + 0.5) / config.width
    )


def _pool(config: ViTConfig) -> str:
    return {"cls": "token", "mean": "avg", "map": "map"}[config.pooling]


def _arguments(config: ViTConfig) -> dict[str, Any]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "in_chans": config.channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "class_token": config.cls,
        "init_values": config.layer_scale,
        "qkv_bias": config.qkv_bias != "none",
        "dynamic_img_size": True,
        "global_pool": _pool(config),
    }


def _vit_timm(config: ViTConfig) -> Target:
    gated, norms = config.activation == "swiglu", {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
    _first(
        "timm",
        {
            "it reads clips": config.patch_time is not None,
            f"an eps of {config.eps} with these switches": config.eps not in norms or (gated and config.eps != 1e-6),
            "a norm before the blocks and a patch embedding with bias": config.pre_norm and config.patch_bias,
            "its patch embedding has no bias": not config.pre_norm and not config.patch_bias,
            "attention pooling and a class token": config.pooling == "map" and config.cls,
            "attention pooling and a gate": config.pooling == "map" and gated,
            "registers without a class token": config.registers and not config.cls,
        },
    )
    arguments = _arguments(config) | {
        "mlp_ratio": _ratio(config, 1 + gated),
        "pre_norm": config.pre_norm,
        "reg_tokens": config.registers,
        "no_embed_class": bool(config.registers) or not config.cls,
        "fc_norm": False,
    }
    if not gated:
        arguments["act_layer"] = _TIMM_ACTIVATIONS[config.activation]
    folded = bool(config.registers and config.cls and config.cls_position and config.position == "learned")
    note = "the class token's position was added to the class token, which cannot be taken apart again"
    name = "vit_giant_patch14_dinov2" if gated else norms[config.eps]
    page, naming = "dinov2", f"timm{' giant' if gated else ''}{' registers' if config.registers else ''}"
    if config.pre_norm:
        page, naming = "clip", "timm"
        _first(
            "timm", {"a norm before the blocks, with layer scale or registers": config.layer_scale or config.registers}
        )
    elif config.pooling == "map":
        page, naming = "siglip", "timm"
        _first("timm", {"attention pooling, with layer scale or registers": config.layer_scale or config.registers})
    elif not gated and not config.registers:
        page = "timm-vit"
    folds = _folds(config, row=config.cls and not config.registers)
    facts = {"global_pool": _pool(config), "model_args": arguments}
    return Target(name, page, naming, facts, folds, notes=(note,) if folded else ())


def _eva(config: ViTConfig) -> Target:
    norms = {1e-5: "vit_small_patch16_dinov3", 1e-6: "eva_giant_patch14_224"}
    _first(
        "timm",
        {
            "it reads clips": config.patch_time is not None,
            f"rotated positions and an eps of {config.eps}": config.eps not in norms,
            "rotated positions and a bias of the keys": config.qkv_bias == "all",
            "rotated positions and a norm before the blocks": config.pre_norm,
            "rotated positions and attention pooling": config.pooling == "map",
            f"rotated positions and {config.activation}": config.activation not in ("gelu", "swiglu"),
            "its patch embedding has no bias": not config.patch_bias,
            f"heads of {config.width // config.heads}, which 4 does not divide": config.width // config.heads % 4,
        },
    )
    gated = config.activation == "swiglu"
    arguments = _arguments(config) | {
        "init_values": 1.0 if config.layer_scale is None else config.layer_scale,
        "mlp_ratio": _ratio(config),
        "swiglu_mlp": gated,
        "swiglu_align_to": 1 if gated else 0,
        "num_reg_tokens": config.registers,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "use_fc_norm": False,
    }
    facts = {"global_pool": _pool(config), "model_args": arguments}
    folds = frozenset({"scales"} if config.layer_scale is None else ())
    notes = (_ROUNDED,) if config.rope_rounded else ()
    return Target(norms[config.eps], "dinov3", "timm gated" if gated else "timm", facts, folds, notes=notes)


def _called_by_timm(target: Target, config: Any, family: str, size: str | None) -> Target:
    """The name that timm has for a published size, if the network still is that one."""
    known = _family(family)
    if known is None or size is None or size not in known.sizes:
        return target
    facts = known.sizes[size]
    tagged = [name.removeprefix("timm/").partition(".") for name in facts.names if name.startswith("timm/")]
    names = [name for name, _, tag in tagged if tag]  # what has no tag is a shape that timm may not have
    same = all(getattr(config, key) == value for key, value in facts.numbers.items())
    return replace(target, architecture=names[0]) if names and same else target


def fold(target: Target, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors with what the target has beside them, still by our names; nothing for what it does not take."""
    made = dict(tensors)
    if not isinstance(config, ViTConfig):
        return made
    _like_the_formula(made, config)
    if "table" in target.folds:
        made["pos_embed"] = _table(config).to(next(iter(made.values())).dtype)
    if "row" in target.folds:
        made["pos_embed"] = torch.cat([torch.zeros_like(made["pos_embed"][:, :1]), made["pos_embed"]], 1)
    blocks = [f"blocks.{number}" for number in range(config.depth)]
    if "scales" in target.folds:
        one = torch.ones_like(made["norm.weight"])
        made |= {f"{block}.ls{number}.gamma": one.clone() for block in blocks for number in (1, 2)}
    if "mask" in target.folds:
        made.setdefault("mask_token", torch.zeros_like(made["norm.weight"])[None])
    else:
        made.pop("mask_token", None)
    if "registers" in target.folds:
        made["register_tokens"] = made["norm.weight"].new_empty(1, 0, config.width)
    for block in blocks:
        bias = f"{block}.attn.qkv.bias"
        if "biases" in target.folds:
            made[bias] = torch.zeros_like(made[f"{block}.attn.qkv.weight"][:, 0])
        if "keys" in target.folds:
            query, key, value = made[bias].chunk(3)
            made[bias] = torch.cat([query, torch.zeros_like(key), value])
    return made


def _table(config: ViTConfig) -> Tensor:
    if config.position == "none":
        return torch.zeros(1, math.prod(config.grid), config.width)
    return sincos(config.grid, config.width, config.position == "sincos").float()[None]


def _like_the_formula(tensors: dict[str, Tensor], config: ViTConfig) -> None:
    """Raises `SaccadeError` where RoPE's periods are others than everyone computes."""
    periods = tensors.get("rope_embed.periods")
    if periods is None:
        return
    count = len(periods)
    expected = 100.0 ** (torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(periods.double(), expected, rtol=0.01):
        raise SaccadeError("RoPE's periods are not those from 1 to 100 that others compute", path="rope_embed.periods")


def dense(target: Target) -> dict[str, Tensor]:
    """The pooler that a target insists on, as the identity, by the target's names."""
    if target.dense is None:
        return {}
    return {"pooler.dense.weight": torch.eye(target.dense), "pooler.dense.bias": torch.zeros(target.dense)}


def unfold(config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The network before `fold` and its tensors, as far as what was folded has not been trained since."""
    found = dict(tensors)
    if not isinstance(config, ViTConfig):
        return config, found
    changes = _unfold_table(config, found)
    scales = [name for name in found if name.endswith((".ls1.gamma", ".ls2.gamma"))]
    if config.layer_scale is None and scales:
        changes |= _dropped(found, scales, lambda tensor: (tensor == 1).all(), {"layer_scale": 1.0})
    biases = [name for name in found if name.endswith(".attn.qkv.bias")]
    if config.qkv_bias == "none" and biases:
        changes |= _dropped(found, biases, lambda tensor: not tensor.any(), {"qkv_bias": "all"})
    if config.qkv_bias == "k_masked" and any(found[name].chunk(3)[1].any() for name in biases):
        changes["qkv_bias"] = "all"
    if not config.mask_token and "mask_token" in found:
        changes |= _dropped(found, ["mask_token"], lambda tensor: not tensor.any(), {"mask_token": True})
    if config.mask_token and "mask_token" not in found:
        changes["mask_token"] = False
    if not config.registers and "register_tokens" in found and not found["register_tokens"].numel():
        del found["register_tokens"]
    return ViTConfig(**{**config.model_dump(), **changes}), found


def _dropped(
    tensors: dict[str, Tensor], names: list[str], still: Callable[[Tensor], Any], otherwise: dict[str, Any]
) -> dict[str, Any]:
    """Takes out what is still as it was folded; else it stays, and these switches with it."""
    if not all(bool(still(tensors[name])) for name in names):
        return otherwise
    for name in names:
        del tensors[name]
    return {}


def _unfold_table(config: ViTConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    table, count = tensors.get("pos_embed"), math.prod(config.grid)
    if table is None or table.ndim != 3:
        return {}
    rows = table.shape[1] - count
    changes: dict[str, Any] = {}
    own = int(config.cls and config.cls_position and config.position == "learned")
    if own and rows == 0:  # timm adds it to the class token of a network with registers
        changes["cls_position"] = False
    elif not own and rows == 1 and config.cls:
        if table[:, 0].any():
            return {"position": "learned", "cls_position": True}
        table = table[:, 1:]
    tensors["pos_embed"] = table
    if config.position != "learned":
        if torch.equal(table, _table(config).to(table.dtype)):
            del tensors["pos_embed"]
        else:
            changes |= {"position": "learned", "cls_position": False}
    return changes

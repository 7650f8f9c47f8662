"""DINOv3 (arXiv 2508.10104): the ViTs. They have registers and rotate queries and keys by their positions (RoPE).

RoPE's periods were computed in bfloat16, and official files hold them so; transformers and timm leave them out and
compute them in float32, which turns patches at the border by up to 0.008 rad (0.009 at 7B) otherwise. We run the
released networks, so where a file has none ours are rounded too (`rope_rounded`, which only they have).

Keys have no bias. Official files have one and a mask of it (1, 0, 1 for queries, keys, values) that starts as NaN: a
file whose mask says something else is refused. The 7B has no such biases, and timm's files without `_qkvb` have lost
theirs, which were zero in B, L and H+. `local_cls_norm` served the local crops of training. timm has no mask token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.errors import SaccadeError
from saccade.published import IMAGENET, KEYLESS, UNBATCH, Family, Naming, Prepared, Rule, Shapes, Size, Way, pairs

_TOKENS = ("cls_token", "mask_token")
_OUTSIDE = {name: name for name in ("patch_embed.proj", "norm")}
_BLOCK = {f"blocks.{{n}}.{name}": f"blocks.{{n}}.{name}" for name in ("norm1", "attn.proj", "norm2")}
_PERIODS = "rope_embed.periods"
_SATELLITE = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}


def _mask(bias: Any) -> Any:
    import torch

    return torch.cat([torch.full_like(part, value) for part, value in zip(bias.chunk(3), (1, 0, 1), strict=True)])


def _unmasked(theirs: list[Any]) -> list[Any]:
    """The bias alone. Raises `SaccadeError` unless its mask takes out the keys' part and nothing else."""
    bias, mask = theirs
    if not mask.is_meta and not bool((mask == _mask(mask)).all()):
        what = "NaN" if bool(mask.isnan().any()) else "other than 1, 0, 1"
        hint = "the checkpoint was written before its weights were set: take another"
        raise SaccadeError(f"the mask of the keys' bias (attn.qkv.bias_mask) is {what}", path="bias_mask", hint=hint)
    return [bias]


_MASKED = Way(_unmasked, lambda ours: [ours[0], _mask(ours[0])])
_BIAS = "blocks.{n}.attn.qkv.bias"


def _mlp(gate: str, value: str, last: str, block: str) -> tuple[Rule, ...]:
    return pairs({"w1": gate, "w2": value, "w3": last}, before=("blocks.{n}.mlp.", block))


OFFICIAL = Naming(
    rules=(
        *((name, name) for name in (*_TOKENS, _PERIODS)),
        ("register_tokens", "storage_tokens"),
        *pairs(_OUTSIDE | _BLOCK),
        ("blocks.{n}.attn.qkv.weight", "blocks.{n}.attn.qkv.weight"),
        (_BIAS, (_BIAS, "blocks.{n}.attn.qkv.bias_mask"), _MASKED),
        *((f"blocks.{{n}}.ls{n}.gamma", f"blocks.{{n}}.ls{n}.gamma") for n in (1, 2)),
        *pairs({"fc1": "fc1", "fc2": "fc2"}, before=("blocks.{n}.mlp.", "blocks.{n}.mlp.")),
        *_mlp("w1", "w2", "w3", "blocks.{n}.mlp."),
    ),
    prefixes=("", "teacher.backbone.", "model_ema.backbone.", "student.backbone.", "backbone.", "module.", "model."),
    ignored=(r"local_cls_norm\.", r"head\.", r"dino_head\.", r"ibot_head\."),
)


def _transformers(gated: bool) -> Naming:
    """`up_proj` is the first matrix of a plain MLP, but the second of a gated one."""
    theirs = "layer.{n}."
    plain = pairs({"fc1": "up_proj", "fc2": "down_proj"}, before=("blocks.{n}.mlp.", f"{theirs}mlp."))
    query, key, value = (f"{theirs}attention.{part}_proj" for part in "qkv")
    return Naming(
        rules=(
            ("cls_token", "embeddings.cls_token"),
            ("mask_token", "embeddings.mask_token", UNBATCH),
            ("register_tokens", "embeddings.register_tokens"),
            *pairs({"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"}),
            ("blocks.{n}.attn.qkv.weight", (f"{query}.weight", f"{key}.weight", f"{value}.weight")),
            (_BIAS, (f"{query}.bias", f"{value}.bias"), KEYLESS),
            *pairs(
                {"norm1": "norm1", "attn.proj": "attention.o_proj", "norm2": "norm2"}, before=("blocks.{n}.", theirs)
            ),
            *((f"blocks.{{n}}.ls{n}.gamma", f"{theirs}layer_scale{n}.lambda1") for n in (1, 2)),
            *(_mlp("gate_proj", "up_proj", "down_proj", f"{theirs}mlp.") if gated else plain),
        ),
        prefixes=("", "model.", "dinov3_vit."),
        ignored=(r"classifier\.",),
        optional=(_PERIODS,),
        model_types=("dinov3_vit",),
    )


def _timm(mlp: tuple[Rule, ...]) -> Naming:
    return Naming(
        rules=(
            ("cls_token", "cls_token"),
            ("register_tokens", "reg_token"),
            *pairs(_OUTSIDE | _BLOCK),
            ("blocks.{n}.attn.qkv.weight", "blocks.{n}.attn.qkv.weight"),
            (_BIAS, ("blocks.{n}.attn.q_bias", "blocks.{n}.attn.v_bias"), KEYLESS),
            *((f"blocks.{{n}}.ls{n}.gamma", f"blocks.{{n}}.gamma_{n}") for n in (1, 2)),
            *mlp,
        ),
        ignored=(r"head\.", r"fc_norm\."),
        optional=("mask_token", _PERIODS),
    )


def _read(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether queries and values have a bias."""
    return {"qkv_bias": "k_masked" if _BIAS.format(n=0) in shapes else "none"}


def _size(name: str, timm: str, numbers: tuple[int, ...], parameters: int, data: str = "LVD-1689M") -> Size:
    width, depth, heads, hidden = numbers
    file = f"{name}-pretrain-{data.lower().replace('-', '')}"
    names = [f"dinov3_{file.replace('-', '_')}"]
    if timm:  # the newest is at the authors' alone
        short, biases = data.lower().replace("-", ""), ("",) if timm == "7b" else ("", "_qkvb")
        hubs = (f"timm/vit_{timm}_patch16_dinov3{bias}.{short}" for bias in biases)
        names = [f"facebook/dinov3-{file}", *hubs, *names]
    gated = {"activation": "swiglu"} if name.endswith("plus") or timm == "7b" else {}
    satellite = _SATELLITE if data.startswith("SAT") else {}
    return Size(width, depth, heads, hidden, 16, 224, parameters, tuple(names), gated | satellite, data)


_LARGE, _HUGEST = (1024, 24, 16, 4096), (4096, 40, 32, 8192)


FAMILY = Family(
    name="dinov3",
    licence="DINOv3 License",
    licence_url="https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    terms="a custom licence: copies and derivatives only under the same agreement and with its text, publications must "
    "acknowledge it, military, nuclear, espionage and weapons uses are barred",
    data="LVD-1689M",
    pooling="cls",
    switches={"eps": 1e-5, "position": "rope", "rope_rounded": True, "layer_scale": 1e-5, "registers": 4, **IMAGENET},
    sizes={
        "vit-s/16": _size("vits16", "small", (384, 12, 6, 1536), 21_601_152),
        "vit-s+/16": _size("vits16plus", "small_plus", (384, 12, 6, 1536), 28_697_472),
        "vit-b/16": _size("vitb16", "base", (768, 12, 12, 3072), 85_669_632),
        "vit-l/16": _size("vitl16", "large", _LARGE, 303_154_176),
        "vit-l/16-satellite": _size("vitl16", "large", _LARGE, 303_154_176, "SAT-493M"),
        "vit-l+/16": _size("vitl16plus", "", _LARGE, 403_915_776),
        "vit-h+/16": _size("vith16plus", "huge_plus", (1280, 32, 20, 5120), 840_633_600),
        "vit-7b/16": _size("vit7b16", "7b", _HUGEST, 6_716_035_072),
        "vit-7b/16-satellite": _size("vit7b16", "7b", _HUGEST, 6_716_035_072, "SAT-493M"),
    },
    namings={
        "official": OFFICIAL,
        "transformers": _transformers(gated=False),
        "transformers gated": _transformers(gated=True),
        "timm": _timm(pairs({"fc1": "fc1", "fc2": "fc2"}, before=("blocks.{n}.mlp.", "blocks.{n}.mlp."))),
        "timm gated": _timm(_mlp("fc1_g", "fc1_x", "fc2", "blocks.{n}.mlp.")),
    },
    preprocess=Prepared(224, 224, "bilinear", square=True),
    read=_read,
    signs=("dinov3",),
    figures={
        "vit-s/16": {"linear_real": 87.0},
        "vit-s+/16": {"linear_real": 88.0},
        "vit-b/16": {"linear_real": 89.3},
        "vit-l/16": {"linear_real": 90.2},
        "vit-h+/16": {"linear_real": 90.3},
        "vit-7b/16": {"linear": 88.4, "linear_real": 90.4},
    },
    figures_source="model card of facebookresearch/dinov3, and arXiv 2508.10104 for 88.4",
    recipe="dinov3",
)

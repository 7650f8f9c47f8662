"""DINOv2 (arXiv 2304.07193), and with registers (arXiv 2309.16588): they resize their position tables differently.

Without registers: by the factor (n + 0.1) / N, not smoothed (transformers: to exactly n). With registers: to exactly n,
with antialiasing (`position_antialias`, which only they have). Registers have no position. The giant's MLP is a SwiGLU
whose two first matrices official files, transformers and timm pack into one. timm leaves out the mask token, and where
there are registers it adds the class token's position to the class token, which cannot be taken apart again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.published import APACHE, HALVES, IMAGENET, Family, Naming, Prepared, Rule, Shapes, Size, Way, pairs

_ATTENTION = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_OUTSIDE = {name: name for name in ("patch_embed.proj", "norm")}
_BLOCK = {f"blocks.{{n}}.{name}": f"blocks.{{n}}.{name}" for name in ("norm1", "attn.qkv", "attn.proj", "norm2")}
_SCALES = tuple((f"blocks.{{n}}.ls{n}.gamma", f"blocks.{{n}}.ls{n}.gamma") for n in (1, 2))
_PREFIXES = (
    "",
    "teacher.backbone.",
    "model.teacher.backbone.",
    "student.backbone.",
    "backbone.",
    "module.",
    "model.",
    "dinov2.",
)


def _gated(packed: str, last: str, block: str = "blocks.{n}.mlp.") -> tuple[Rule, ...]:
    """SwiGLU: gate above value in one matrix with them."""
    ours = "blocks.{n}.mlp."
    halves = tuple(
        ((f"{ours}w1.{kind}", f"{ours}w2.{kind}"), f"{block}{packed}.{kind}", HALVES) for kind in ("weight", "bias")
    )
    return (*halves, *pairs({"w3": last}, before=(ours, block)))


def _plain(block: str = "blocks.{n}.mlp.") -> tuple[Rule, ...]:
    return pairs({"fc1": "fc1", "fc2": "fc2"}, before=("blocks.{n}.mlp.", block))


def _fold(ours: list[Any]) -> list[Any]:
    """The class token's position added to it, where it has one."""
    token, table = ours
    whole = round((table.shape[1] - 1) ** 0.5) ** 2 == table.shape[1] - 1
    return [token + table[:, :1], table[:, 1:]] if whole else ours


OFFICIAL = Naming(
    rules=(
        *((name, name) for name in ("cls_token", "pos_embed", "mask_token", "register_tokens")),
        *pairs(_OUTSIDE | _BLOCK),
        *_SCALES,
        *_plain(),
        *_gated("w12", "w3"),
    ),
    prefixes=_PREFIXES,
    ignored=(r"head\.", r"dino_head\.", r"ibot_head\."),
)

TRANSFORMERS = Naming(
    rules=(
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("mask_token", "embeddings.mask_token"),
        ("register_tokens", "embeddings.register_tokens"),
        *pairs({"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}),
        *pairs(
            {"norm1": "norm1", "attn.qkv": _ATTENTION, "attn.proj": "attention.output.dense", "norm2": "norm2"},
            before=("blocks.{n}.", "encoder.layer.{n}."),
        ),
        *((f"blocks.{{n}}.ls{n}.gamma", f"encoder.layer.{{n}}.layer_scale{n}.lambda1") for n in (1, 2)),
        *_plain("encoder.layer.{n}.mlp."),
        *_gated("weights_in", "weights_out", "encoder.layer.{n}.mlp."),
    ),
    prefixes=("", "dinov2.", "dinov2_with_registers.", "backbone."),
    ignored=(r"classifier\.",),
    model_types=("dinov2", "dinov2_with_registers"),
)

CHUNKED = Naming(
    rules=tuple(
        (
            ours,
            tuple(
                name.replace("blocks.{n}.", "blocks.{chunk}.{n}.")
                for name in ([theirs] if isinstance(theirs, str) else theirs)
            ),
            *way,
        )
        for ours, theirs, *way in OFFICIAL.rules
    ),
    prefixes=_PREFIXES,
    ignored=OFFICIAL.ignored,
)
"""Training checkpoints, whose blocks stand in chunks for sharding: the number of a block is the second one."""


def _timm(mlp: tuple[Rule, ...], registers: bool) -> Naming:
    tokens: tuple[Rule, ...] = (("cls_token", "cls_token"), ("pos_embed", "pos_embed"))
    if registers:
        both = ("cls_token", "pos_embed")
        tokens = ((both, both, Way(list, _fold)), ("register_tokens", "reg_token"))
    return Naming((*tokens, *pairs(_OUTSIDE | _BLOCK), *_SCALES, *mlp), ignored=(r"head\.",), optional=("mask_token",))


def _read(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the position table is resized."""
    registers = "register_tokens" in shapes
    return {"position_offset": 0.0 if registers else 0.1, "position_antialias": registers}


def _sizes(letter: str, word: str, width: int, depth: int, heads: int, hidden: int, parameters: int) -> dict[str, Size]:
    gated = {"activation": "swiglu"} if letter == "g" else {}
    numbers = (width, depth, heads, hidden, 14, 518)
    names, registered = (
        (
            f"facebook/dinov2-{infix}{'giant' if letter == 'g' else word}",
            f"timm/vit_{word}_patch14_{four}dinov2.lvd142m",
            f"dinov2_vit{letter}14_{four}pretrain",
        )
        for infix, four in (("", ""), ("with-registers-", "reg4_"))
    )
    return {
        f"vit-{letter}/14": Size(*numbers, parameters, names, {"registers": 0, **gated}),
        f"vit-{letter}/14-registers": Size(*numbers, parameters + 4 * width, registered, {"registers": 4, **gated}),
    }


FAMILY = Family(
    name="dinov2",
    licence=APACHE[0],
    licence_url=APACHE[1],
    terms=APACHE[2],
    data="LVD-142M",
    pooling="cls",
    switches={"eps": 1e-6, "position": "learned", "layer_scale": 1.0, **IMAGENET},
    sizes={
        **_sizes("s", "small", 384, 12, 6, 1536, 22_056_576),
        **_sizes("b", "base", 768, 12, 12, 3072, 86_580_480),
        **_sizes("l", "large", 1024, 24, 16, 4096, 304_368_640),
        **_sizes("g", "giant", 1536, 40, 24, 4096, 1_136_480_768),
    },
    namings={
        "official": OFFICIAL,
        "official in chunks": CHUNKED,
        "transformers": TRANSFORMERS,
        "timm": _timm(_plain(), registers=False),
        "timm giant": _timm(_gated("fc1", "fc2"), registers=False),
        "timm registers": _timm(_plain(), registers=True),
        "timm giant registers": _timm(_gated("fc1", "fc2"), registers=True),
    },
    preprocess=Prepared(side=224),  # trained last at 518, evaluated by its authors at 224
    read=_read,
    signs=("dinov2",),
    figures={
        "vit-s/14": {"knn": 79.0, "linear": 81.1},
        "vit-s/14-registers": {"knn": 79.1, "linear": 80.9},
        "vit-b/14": {"knn": 82.1, "linear": 84.5},
        "vit-b/14-registers": {"knn": 82.0, "linear": 84.6},
        "vit-l/14": {"knn": 83.5, "linear": 86.3},
        "vit-l/14-registers": {"knn": 83.8, "linear": 86.7},
        "vit-g/14": {"knn": 83.5, "linear": 86.5},
        "vit-g/14-registers": {"knn": 83.7, "linear": 87.1},
    },
    figures_source="README of facebookresearch/dinov2",
    recipe="dinov2",
)

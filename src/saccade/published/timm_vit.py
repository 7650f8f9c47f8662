"""Any plain ViT (arXiv 2010.11929) under timm's names, or as transformers' ViT: whoever trained it, on whatever.

What a file can lack or have is read from its tensors: class token, its row of the position table, layer scale, the
biases of queries, keys and values. A ViT that norms after pooling (timm's fc_norm) is another network and is refused.
One without a class token is believed only where timm's config.json says that it pools by the mean (`global_pool`): a
SigLIP that has lost its attention pool has the same tensors.
Mean and spread are .5 (Google's and timm's own training) unless timm's config.json says otherwise; eps is 1e-6 for
both, whatever transformers' config.json says (1e-12 by default). timm resizes positions with antialiasing,
transformers without: each file as its own library does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saccade.errors import SaccadeError
from saccade.published import Family, Naming, Rule, Shapes, Size, pairs

_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_MATRICES = ("patch_embed.proj", *(f"blocks.{{n}}.{name}" for name in _BLOCK), "norm")

PLAIN: tuple[Rule, ...] = (("pos_embed", "pos_embed"), *pairs({name: name for name in _MATRICES}))
"""timm's names, which are those of most authors; without the class token."""

TRANSFORMERS: tuple[Rule, ...] = (
    ("pos_embed", "embeddings.position_embeddings"),
    *pairs({"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}),
    *pairs(
        {
            "norm1": "layernorm_before",
            "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
            "attn.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
        ("blocks.{n}.", "encoder.layer.{n}."),
    ),
)
"""transformers' names of a ViT and of what it built from one; without the class token."""

_SCALES: tuple[Rule, ...] = tuple((f"blocks.{{n}}.{name}.gamma",) * 2 for name in ("ls1", "ls2"))


def _read(shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    rows, cls = shapes["pos_embed"][1], "cls_token" in shapes
    if not cls and config.get("global_pool") != "avg":
        raise SaccadeError(
            "it has no class token, and no config.json of timm says that it pools by the mean (global_pool avg)"
        )
    given = config.get("pretrained_cfg", config)
    return {
        "cls": cls,
        "cls_position": math.isqrt(rows) ** 2 != rows,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        "qkv_bias": "all" if "blocks.0.attn.qkv.bias" in shapes else "none",
        "pooling": "cls" if cls else "mean",
        **({"position_antialias": False} if "model_type" in config else {}),
        **{name: tuple(given[name]) for name in ("mean", "std") if name in given},
    }


def _names(size: str, patch: int, side: int = 224) -> tuple[str, ...]:
    return (f"timm/vit_{size}_patch{patch}_{side}",)


FAMILY = Family(
    name="timm-vit",
    licence="unknown",
    licence_url="https://huggingface.co/timm",
    terms="the licence is that of whoever published the file: read the card that came with it",
    data="what the file's card says",
    pooling="cls",
    switches={"eps": 1e-6, "position_antialias": True, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    sizes={
        "vit-ti/16": Size(192, 12, 3, 768, 16, 224, 5_524_416, _names("tiny", 16)),
        "vit-s/32": Size(384, 12, 6, 1536, 32, 224, 22_493_952, _names("small", 32)),
        "vit-s/16": Size(384, 12, 6, 1536, 16, 224, 21_665_664, _names("small", 16)),
        "vit-s/14": Size(384, 12, 6, 1536, 14, 224, 21_619_584, _names("small", 14)),
        "vit-s/8": Size(384, 12, 6, 1536, 8, 224, 21_670_272, _names("small", 8)),
        "vit-b/32": Size(768, 12, 12, 3072, 32, 224, 87_455_232, _names("base", 32)),
        "vit-b/16": Size(768, 12, 12, 3072, 16, 224, 85_798_656, _names("base", 16)),
        "vit-b/14": Size(768, 12, 12, 3072, 14, 224, 85_706_496, _names("base", 14)),
        "vit-b/8": Size(768, 12, 12, 3072, 8, 224, 85_807_872, _names("base", 8)),
        "vit-l/32": Size(1024, 24, 16, 4096, 32, 224, 305_510_400, _names("large", 32)),
        "vit-l/16": Size(1024, 24, 16, 4096, 16, 224, 303_301_632, _names("large", 16)),
        "vit-l/14": Size(1024, 24, 16, 4096, 14, 224, 303_178_752, _names("large", 14)),
        "vit-h/14": Size(1280, 32, 16, 5120, 14, 224, 630_764_800, _names("huge", 14)),
    },
    namings={
        "timm": Naming((("cls_token", "cls_token"), *PLAIN, *_SCALES), ignored=("head\\.", "mask_token")),
        "transformers": Naming(
            (("cls_token", "embeddings.cls_token"), *TRANSFORMERS),
            prefixes=("", "vit."),
            ignored=("pooler\\.", "embeddings\\.mask_token"),
            model_types=("vit",),
        ),
    },
    read=_read,
    signs=(
        "timm-vit",
        "^(?!.*(mae|dino|moco|ibot|clip|siglip|jepa)).*(vit_|vit-|deit)",
    ),
)

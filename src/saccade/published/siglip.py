"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) at fixed resolution: image towers with attention pool.

Both generations have the same tensors, so one family serves them; which one a file is, only its name says. The MLPs are
run with GELU by tanh, as trained: timm runs many of its copies with the exact one. Pictures are squeezed to a square.
So400m/14 at "384" sees 27 x 27 patches, which are 378 pixels. Positions are resized bicubically, as transformers does
it; the authors, who did so between stages of training, interpolate linearly from corner to corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.published import APACHE, QUERY_REST, Family, Naming, Prepared, Shapes, Size, pairs
from saccade.published.clip import TOWER, activation

_POOL = {f"attn_pool.{name}": f"attn_pool.{name}" for name in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")}

TRANSFORMERS = Naming(
    rules=(
        *TOWER,
        ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
        ("attn_pool.latent", "head.probe"),
        *(
            ((f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), f"head.attention.in_proj_{kind}", QUERY_REST)
            for kind in ("weight", "bias")
        ),
        *pairs(
            {
                "norm": "post_layernorm",
                "attn_pool.proj": "head.attention.out_proj",
                "attn_pool.norm": "head.layernorm",
                "attn_pool.mlp.fc1": "head.mlp.fc1",
                "attn_pool.mlp.fc2": "head.mlp.fc2",
            }
        ),
    ),
    prefixes=("vision_model.", ""),
    ignored=("embeddings\\.position_ids$",),
    model_types=("siglip", "siglip_vision_model"),
)

TIMM = Naming(
    rules=(
        ("pos_embed", "pos_embed"),
        ("attn_pool.latent", "attn_pool.latent"),
        *pairs({name: name for name in ("patch_embed.proj", "norm", *_POOL)}),
        *pairs(
            {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")},
            ("blocks.{n}.", "blocks.{n}."),
        ),
    ),
    prefixes=("", "visual.trunk."),
    ignored=("head\\.",),
)


def _read(shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return activation(config)


def _size(
    numbers: tuple[int, int, int, int], name: str, patch: int, side: int, generations: str, parameters: int
) -> Size:
    """`generations`: those of 1 and 2 that were published at this side."""
    native = side // patch * patch
    names = []
    for generation in generations:
        names.append(f"google/siglip{generation.strip('1')}-{name}-patch{patch}-{side}")
        tag = "webli" if generation == "1" else "v2_webli"
        names.append(f"timm/vit_{name.replace('-', '')}_patch{patch}_siglip_{native}.{tag}")
    return Size(*numbers, patch, native, parameters, tuple(names))


_B, _L, _SO, _G = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304), (1536, 40, 16, 6144)

FAMILY = Family(
    name="siglip",
    licence=APACHE[0],
    licence_url=APACHE[1],
    terms=APACHE[2],
    data="WebLI (not published)",
    pooling="map",
    switches={
        "eps": 1e-6,
        "activation": "gelu_tanh",
        "cls": False,
        "pooling": "map",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    },
    sizes={
        "vit-b/32-256": _size(_B, "base", 32, 256, "2", 94_552_320),
        "vit-b/16": _size(_B, "base", 16, 224, "12", 92_884_224),
        "vit-b/16-256": _size(_B, "base", 16, 256, "12", 92_930_304),
        "vit-b/16-384": _size(_B, "base", 16, 384, "12", 93_176_064),
        "vit-b/16-512": _size(_B, "base", 16, 512, "12", 93_520_128),
        "vit-l/16-256": _size(_L, "large", 16, 256, "12", 315_956_224),
        "vit-l/16-384": _size(_L, "large", 16, 384, "12", 316_283_904),
        "vit-l/16-512": _size(_L, "large", 16, 512, "2", 316_742_656),
        "vit-so400m/14": _size(_SO, "so400m", 14, 224, "12", 427_680_704),
        "vit-so400m/14-384": _size(_SO, "so400m", 14, 384, "12", 428_225_600),
        "vit-so400m/16-256": _size(_SO, "so400m", 16, 256, "2", 427_888_064),
        "vit-so400m/16-384": _size(_SO, "so400m", 16, 384, "2", 428_256_704),
        "vit-so400m/16-512": _size(_SO, "so400m", 16, 512, "2", 428_772_800),
        "vit-g/16-256": _size(_G, "giant-opt", 16, 256, "2", 1_163_168_256),
        "vit-g/16-384": _size(_G, "giant-opt", 16, 384, "2", 1_163_659_776),
    },
    namings={"transformers": TRANSFORMERS, "timm": TIMM},
    preprocess=Prepared(interpolation="bilinear", square=True),
    read=_read,
    signs=("siglip",),
)

"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) at fixed resolution: image towers with attention pool.

Both generations have the same tensors, so one family serves them; which one a file is, only its name says. The MLPs are
run with GELU by tanh, as trained: timm runs many of its copies with the exact one. Pictures are squeezed to a square.
So400m/14 at "384" sees 27 x 27 patches, which are 378 pixels. Positions are resized bicubically, as transformers does
it; the authors, who did so between stages of training, interpolate linearly from corner to corner.

big_vision's own files (.npz) hold flax's arrays: kernels are [in, out], those of attention have the heads as an axis of
their own ([D heads D/heads], and [heads D/heads D] on the way out), and the patch embedding is [row column C D]. SigLIP
2 keeps all layers in one array each. The text towers are in `texts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.errors import SaccadeError
from saccade.published import (
    APACHE,
    QUERY_REST,
    SAME,
    TRANSPOSED,
    Family,
    Naming,
    Prepared,
    Rule,
    Shapes,
    Size,
    Way,
    pairs,
    rows,
)
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

_IMAGE = Way(lambda theirs: [theirs[0].permute(3, 2, 0, 1).contiguous()], lambda ours: [ours[0].permute(2, 3, 1, 0)])


def _heads(width: int) -> int:
    """How many heads a published width has: the arrays of big_vision have an axis for them, ours do not."""
    for size in FAMILY.sizes.values():
        if size.width == width:
            return size.heads
    raise SaccadeError(f"width {width} is none of SigLIP's, so nothing says how many heads it has", path="width")


def _matrices(count: int) -> Way:
    """So many kernels [D heads D/heads] to one matrix of as many parts."""

    def theirs(ours: list[Any]) -> list[Any]:
        width = ours[0].shape[1]
        return [part.t().reshape(width, _heads(width), -1) for part in ours[0].chunk(count)]

    return Way(lambda theirs: _rows([kernel.flatten(1).t() for kernel in theirs]), theirs)


def _vectors(count: int) -> Way:
    """So many biases [heads D/heads] to one."""

    def theirs(ours: list[Any]) -> list[Any]:
        return [part.reshape(_heads(len(part)), -1) for part in ours[0].chunk(count)]

    return Way(lambda theirs: _rows([bias.flatten() for bias in theirs]), theirs)


def _rows(parts: list[Any]) -> list[Any]:
    return [part.contiguous() for part in rows(parts)]


def _back(ours: list[Any]) -> list[Any]:
    width = len(ours[0])
    return [ours[0].t().reshape(_heads(width), -1, width)]


_OUT = Way(lambda theirs: [theirs[0].flatten(0, 1).t().contiguous()], _back)
_MIXER = "MultiHeadDotProductAttention_0/"


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return ((f"{ours}.weight", f"{theirs}/scale"), (f"{ours}.bias", f"{theirs}/bias"))


def _dense(ours: str, theirs: str) -> tuple[Rule, ...]:
    return ((f"{ours}.weight", f"{theirs}/kernel", TRANSPOSED), (f"{ours}.bias", f"{theirs}/bias"))


def _projected(ours: str, theirs: str, parts: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(
        (f"{ours}.{kind}", tuple(f"{theirs}{_MIXER}{part}/{their_kind}" for part in parts), way)
        for kind, their_kind, way in (
            ("weight", "kernel", _matrices(len(parts))),
            ("bias", "bias", _vectors(len(parts))),
        )
    )


def _layer(ours: str, theirs: str, norm: str, projection: str) -> tuple[Rule, ...]:
    """What a block and the attention pool share: the way out, and an MLP after a norm."""
    return (
        (f"{projection}.weight", f"{theirs}{_MIXER}out/kernel", _OUT),
        (f"{projection}.bias", f"{theirs}{_MIXER}out/bias"),
        *_norm(f"{ours}{norm}", f"{theirs}LayerNorm_{1 if norm == 'norm2' else 0}"),
        *_dense(f"{ours}mlp.fc1", f"{theirs}MlpBlock_0/Dense_0"),
        *_dense(f"{ours}mlp.fc2", f"{theirs}MlpBlock_0/Dense_1"),
    )


_BLOCK, _MAP = "blocks.{n}.", "MAPHead_0/"


def layers(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Blocks and last norm of a tower in the authors' files: `ours` before our names, `theirs` the folder of theirs."""
    block, layer = f"{ours}{_BLOCK}", f"{theirs}encoderblock_{{n}}/"
    return (
        *_norm(f"{block}norm1", f"{layer}LayerNorm_0"),
        *_projected(f"{block}attn.qkv", layer, ("query", "key", "value")),
        *_layer(block, layer, "norm2", f"{block}attn.proj"),
        *_norm(f"{ours}norm", f"{theirs}encoder_norm"),
    )


def big_vision(patches: Way, stacked: bool, table: Way = SAME) -> Naming:
    """The names of the authors' own files, and how the patch embedding's kernel and the positions become ours."""
    return Naming(
        rules=(
            ("pos_embed", "pos_embedding", table),
            ("patch_embed.proj.weight", "embedding/kernel", patches),
            ("patch_embed.proj.bias", "embedding/bias"),
            *layers("", "Transformer/"),
            ("attn_pool.latent", f"{_MAP}probe"),
            *_projected("attn_pool.q", _MAP, ("query",)),
            *_projected("attn_pool.kv", _MAP, ("key", "value")),
            *_layer("attn_pool.", _MAP, "norm", "attn_pool.proj"),
        ),
        prefixes=("params/img/", "img/"),
        ignored=("head/",),
        stacked="encoderblock" if stacked else None,
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
    namings={
        "transformers": TRANSFORMERS,
        "timm": TIMM,
        "big_vision": big_vision(_IMAGE, stacked=False),
        "big_vision stacked": big_vision(_IMAGE, stacked=True),
    },
    preprocess=Prepared(interpolation="bilinear", square=True),
    read=_read,
    signs=("siglip",),
    recipe="dino",
)

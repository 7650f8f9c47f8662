"""CLIP (arXiv 2103.00020): OpenAI's image towers. The projection into the space shared with texts is in `texts`.

QuickGELU, a norm before the first block and eps 1e-5 set it apart. Official files are TorchScript archives in float16,
which are read for their tensors and not run (`torchscript`), or the state dict of one, saved by itself. timm's plain
`.openai` names run with the exact GELU, which is not what these weights were trained with; here they get QuickGELU.
Others trained CLIPs with the exact GELU: where the config.json says so, it is believed. OpenAI resized no positions: it
is done as transformers does it (bicubic).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.errors import SaccadeError, nearest
from saccade.published import BATCH, TOKEN, Family, Naming, Prepared, Rule, Shapes, Size, pairs

_NORMS = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}  # the first as they spell it
_ACTIVATIONS = {"quick_gelu": "gelu_quick", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

OFFICIAL = Naming(
    rules=(
        ("cls_token", "class_embedding", TOKEN),
        ("pos_embed", "positional_embedding", BATCH),
        ("patch_embed.proj.weight", "conv1.weight"),
        *(
            (f"blocks.{{n}}.attn.qkv.{kind}", f"transformer.resblocks.{{n}}.attn.in_proj_{kind}")
            for kind in ("weight", "bias")
        ),
        *pairs({"norm_pre": "ln_pre", "norm": "ln_post"}),
        *pairs(
            {
                "norm1": "ln_1",
                "attn.proj": "attn.out_proj",
                "norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            },
            ("blocks.{n}.", "transformer.resblocks.{n}."),
        ),
    ),
    prefixes=("visual.", "module.visual.", "state_dict.visual.", "state_dict.module.visual."),
    ignored=("proj$",),
)

BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""transformers' names in a block of CLIP's and SigLIP's towers, of pictures and of texts."""

TOWER: tuple[Rule, ...] = (
    ("pos_embed", "embeddings.position_embedding.weight", BATCH),
    ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    *pairs(BLOCK, ("blocks.{n}.", "encoder.layers.{n}.")),
)
"""What the image towers of CLIP and SigLIP share in transformers."""

TRANSFORMERS = Naming(
    rules=(*TOWER, ("cls_token", "embeddings.class_embedding", TOKEN), *pairs(_NORMS)),
    prefixes=("vision_model.", ""),
    ignored=("embeddings\\.position_ids$",),
    model_types=("clip", "clip_vision_model"),
)

TIMM = Naming(
    rules=(
        ("cls_token", "cls_token"),
        ("pos_embed", "pos_embed"),
        ("patch_embed.proj.weight", "patch_embed.proj.weight"),
        *pairs({name: name for name in ("norm_pre", "norm")}),
        *pairs(
            {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")},
            ("blocks.{n}.", "blocks.{n}."),
        ),
    ),
    prefixes=("", "visual.trunk."),
    ignored=("head\\.",),
)


def activation(config: Mapping[str, Any]) -> dict[str, str]:
    """The switch that a transformers config.json names. Raises `SaccadeError` for an activation that is not known."""
    name = config.get("vision_config", config).get("hidden_act")
    if name is None:
        return {}
    if name not in _ACTIVATIONS:
        raise SaccadeError(f"no activation {name!r} is known", path="hidden_act", hint=nearest(name, _ACTIVATIONS))
    return {"activation": _ACTIVATIONS[name]}


def _read(shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    architecture, _, tag = str(config.get("architecture", "")).partition(".")
    tag = config.get("pretrained_cfg", {}).get("tag", tag)
    if architecture and "quickgelu" not in architecture and tag != "openai":  # timm's names of others' CLIPs
        return {"activation": "gelu"}
    return activation(config)


def _names(size: str, patch: int, side: int) -> tuple[str, ...]:
    at = "" if side == 224 else f"-{side}"
    return (
        f"openai/clip-vit-{size}-patch{patch}{at}",
        f"timm/vit_{size}_patch{patch}_clip_quickgelu_{side}.openai",
        f"ViT-{size[0].upper()}-{patch}{at and at + 'px'}.pt",
    )


FAMILY = Family(
    name="clip",
    licence="MIT",
    licence_url="https://opensource.org/license/mit",
    terms=None,
    data="400 M pairs of picture and text (not published)",
    pooling="cls",
    switches={
        "eps": 1e-5,
        "activation": "gelu_quick",
        "pre_norm": True,
        "patch_bias": False,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    sizes={
        "vit-b/32": Size(768, 12, 12, 3072, 32, 224, 87_456_000, _names("base", 32, 224)),
        "vit-b/16": Size(768, 12, 12, 3072, 16, 224, 85_799_424, _names("base", 16, 224)),
        "vit-l/14": Size(1024, 24, 16, 4096, 14, 224, 303_179_776, _names("large", 14, 224)),
        "vit-l/14-336": Size(1024, 24, 16, 4096, 14, 336, 303_507_456, _names("large", 14, 336)),
    },
    namings={"official": OFFICIAL, "transformers": TRANSFORMERS, "timm": TIMM},
    preprocess=Prepared(resize=224),
    read=_read,
    signs=("clip",),
    recipe="dino",
)

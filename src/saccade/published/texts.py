"""Text towers that lie in the files of image towers: CLIP's, SigLIP's and SigLIP 2's, and how texts and pictures meet.

Our names are those of `text.Pairing`. CLIP looks back only, pools the end-of-text token and has a matrix each for
pictures and texts into the shared space; its transformers configs of old call token 2 the end, where it is the last of
the vocabulary. SigLIP looks both ways, pools the last token, padding too, and has a head for texts alone. SigLIP 2 is
the same with Gemma's words. What is called open_clip is its layout with the text tower apart (`text.`); its other one
is OpenAI's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saccade.published import BATCH, TRANSPOSED, Naming, Rule, Way, pairs
from saccade.published.clip import BLOCK
from saccade.published.siglip import layers


@dataclass(frozen=True)
class Texts:
    """What is known of a family's text towers.

    `switches` are those of `TextConfig` that no tensor tells; `heads` by width, where it is not one for each 64.
    """

    namings: Mapping[str, Naming]
    switches: Mapping[str, Any]
    heads: Mapping[int, int] = field(default_factory=dict)


_ONE = Way(lambda theirs: [theirs[0].reshape(())], lambda ours: [ours[0].reshape(1)])
"""A number, which they keep as a list of one."""

_CLIP_BLOCK = {"norm1": "ln_1", "attn.proj": "attn.out_proj", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
_CLIP_BLOCK |= {"mlp.fc2": "mlp.c_proj"}

_TRANSFORMERS: tuple[Rule, ...] = (
    ("tower.token_embed.weight", "text_model.embeddings.token_embedding.weight"),
    ("tower.pos_embed", "text_model.embeddings.position_embedding.weight", BATCH),
    *pairs(BLOCK, ("tower.blocks.{n}.", "text_model.encoder.layers.{n}.")),
    *pairs({"tower.norm": "text_model.final_layer_norm"}),
)
_IMAGES = ("vision_model\\.", "text_model\\.embeddings\\.position_ids$")


def _open_clip(before: str) -> tuple[Rule, ...]:
    """What OpenAI's names and open_clip's share; `before` the text tower's."""
    block = f"{before}transformer.resblocks.{{n}}."
    return (
        ("tower.token_embed.weight", f"{before}token_embedding.weight"),
        ("tower.pos_embed", f"{before}positional_embedding", BATCH),
        *((f"tower.blocks.{{n}}.attn.qkv.{kind}", f"{block}attn.in_proj_{kind}") for kind in ("weight", "bias")),
        *pairs(_CLIP_BLOCK, ("tower.blocks.{n}.", block)),
        *pairs({"tower.norm": f"{before}ln_final"}),
        ("logit_scale", "logit_scale"),
    )


def _projected(before: str) -> tuple[Rule, ...]:
    """CLIP's two matrices into the shared space."""
    return (
        ("tower.head.weight", f"{before}text_projection", TRANSPOSED),
        ("projection.weight", "visual.proj", TRANSPOSED),
    )


def _big_vision(stacked: bool) -> Naming:
    return Naming(
        rules=(
            ("tower.token_embed.weight", "txt/Embed_0/embedding"),
            ("tower.pos_embed", "txt/pos_embedding"),
            *layers("tower.", "txt/Encoder_0/"),
            ("tower.head.weight", "txt/head/kernel", TRANSPOSED),
            ("tower.head.bias", "txt/head/bias"),
            ("logit_scale", "t", _ONE),
            ("logit_bias", "b", _ONE),
        ),
        prefixes=("params/", ""),
        ignored=("img/",),
        stacked="encoderblock" if stacked else None,
    )


_BEFORE = ("", "module.", "state_dict.", "state_dict.module.")
_SCALARS = "(input_resolution|context_length|vocab_size)$"

CLIP = Texts(
    namings={
        "official": Naming(
            rules=(*_open_clip(""), *_projected("")), prefixes=_BEFORE, ignored=("visual\\.", _SCALARS, "attn_mask$")
        ),
        "open_clip": Naming(
            rules=(*_open_clip("text."), *_projected("text.")),
            prefixes=_BEFORE,
            ignored=("visual\\.", "text\\.attn_mask$", _SCALARS),
        ),
        "transformers": Naming(
            rules=(
                *_TRANSFORMERS,
                ("tower.head.weight", "text_projection.weight"),
                ("projection.weight", "visual_projection.weight"),
                ("logit_scale", "logit_scale"),
            ),
            prefixes=("",),
            ignored=_IMAGES,
        ),
    },
    switches={
        "causal": True,
        "pooling": "end",
        "activation": "gelu_quick",
        "eps": 1e-5,
        "projection_bias": False,
    },
)

SIGLIP = Texts(
    namings={
        "transformers": Naming(
            rules=(
                *_TRANSFORMERS,
                *pairs({"tower.head": "text_model.head"}),
                ("logit_scale", "logit_scale", _ONE),
                ("logit_bias", "logit_bias", _ONE),
            ),
            prefixes=("",),
            ignored=_IMAGES,
        ),
        "open_clip": Naming(
            rules=(
                *_open_clip("text."),
                *pairs({"tower.head": "text.text_projection"}),
                ("logit_bias", "logit_bias"),
            ),
            prefixes=_BEFORE,
            ignored=("visual\\.", "text\\.attn_mask$", _SCALARS),
        ),
        "big_vision": _big_vision(stacked=False),
        "big_vision stacked": _big_vision(stacked=True),
    },
    switches={"causal": False, "pooling": "last", "activation": "gelu_tanh", "eps": 1e-6},
    heads={1152: 16},
)

TOWERS = {"clip": CLIP, "siglip": SIGLIP, "siglip2-naflex": SIGLIP}
"""By the name of the image towers' family."""

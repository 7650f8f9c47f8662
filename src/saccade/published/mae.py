"""MAE (arXiv 2111.06377): encoders as released, and the same in files that have the decoder too.

The position table is the fixed sincos one, but every file stores it: a stored table is used as it is, and resized as
the authors' fine-tuning and transformers do (bicubic). A config.json of transformers says eps 1e-12: the networks were
trained with 1e-6, and so they are run. transformers' copies come from the files that have the decoder, which were
trained on raw pixels: other encoders than `mae_pretrain_*`. A run of the recipe that starts from a file with a decoder
goes on with that decoder, where it has the same numbers.
"""

from __future__ import annotations

from saccade.published import CC_BY_NC, IMAGENET, PLAIN, Decoder, Family, Names, Naming, Rule, Size, pairs

_ATTENTION = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))

OFFICIAL = Naming(
    rules=PLAIN,
    prefixes=("", "model.", "module.", "model.module."),
    ignored=("decoder_", "mask_token", r"head\.", r"fc_norm\."),
)

_BLOCK: dict[str, Names] = {
    "norm1": "layernorm_before",
    "attn.qkv": _ATTENTION,
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

TRANSFORMERS = Naming(
    rules=(
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        *pairs({"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}),
        *pairs(_BLOCK, before=("blocks.{n}.", "encoder.layer.{n}.")),
    ),
    prefixes=("", "vit."),
    model_types=("vit_mae",),
)


def _decoder(before: str) -> tuple[Rule, ...]:
    """The parts outside the blocks."""
    return (
        *((name, f"{before}{name}") for name in ("mask_token", "decoder_pos_embed")),
        *pairs({name: name for name in ("decoder_embed", "decoder_norm", "decoder_pred")}, before=("", before)),
    )


DECODER = Decoder(
    namings=(
        Naming(
            (*_decoder(""), *pairs({name: name for name in _BLOCK}, before=("decoder_blocks.{n}.",) * 2)),
            prefixes=OFFICIAL.prefixes,
        ),
        *(
            Naming(
                (*_decoder("decoder."), *pairs(_BLOCK, before=("decoder_blocks.{n}.", f"decoder.{layers}.{{n}}."))),
                prefixes=("",),
            )
            for layers in ("decoder_layers", "decoder_encoder.layer")  # the second as transformers 5 saves them
        ),
    ),
    positions="decoder_pos_embed",
    heads=16,
    heads_key="decoder_num_attention_heads",
    note="the released decoders predict raw pixels, not normalised patches: --no-normalise-target goes on with that",
)

FAMILY = Family(
    name="mae",
    licence=CC_BY_NC[0],
    licence_url=CC_BY_NC[1],
    terms=CC_BY_NC[2],
    data="ImageNet-1k",
    pooling="cls",
    switches={"eps": 1e-6, "position": "learned", **IMAGENET},
    sizes={
        "vit-b/16": Size(
            768, 12, 12, 3072, 16, 224, 85_798_656, ("facebook/vit-mae-base", "timm/vit_base_patch16_224.mae")
        ),
        "vit-l/16": Size(
            1024, 24, 16, 4096, 16, 224, 303_301_632, ("facebook/vit-mae-large", "timm/vit_large_patch16_224.mae")
        ),
        "vit-h/14": Size(
            1280, 32, 16, 5120, 14, 224, 630_764_800, ("facebook/vit-mae-huge", "timm/vit_huge_patch14_224.mae")
        ),
    },
    namings={"official": OFFICIAL, "transformers": TRANSFORMERS},
    signs=("mae",),
    figures={
        "vit-b/16": {"linear": 68.0},
        "vit-l/16": {"linear": 75.8},
        "vit-h/14": {"linear": 76.6},
    },
    figures_source="arXiv 2111.06377, of the encoders trained on normalised pixels",
    decoder=DECODER,
    recipe="mae",
)

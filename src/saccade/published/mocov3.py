"""MoCo v3 (arXiv 2104.02057): ViTs trained by contrast of two views. ViT-S has 12 heads here, not 6.

A file of the authors holds the encoder (`base_encoder`, whose `head` is the projector), its moving average and a
predictor; the encoder is taken, as their linear evaluation does. Its positions are fixed, the row in the first half of
the width, and stored: the stored table is used, and resized bicubically for want of an official way.
"""

from __future__ import annotations

from saccade.published import CC_BY_NC, IMAGENET, Family, Naming, Size
from saccade.published.timm_vit import PLAIN

FAMILY = Family(
    name="mocov3",
    licence=CC_BY_NC[0],
    licence_url=CC_BY_NC[1],
    terms=CC_BY_NC[2],
    data="ImageNet-1k",
    pooling="cls",
    switches={"eps": 1e-6, **IMAGENET},
    sizes={
        "vit-s/16": Size(384, 12, 12, 1536, 16, 224, 21_665_664, ("vit-s-300ep.pth.tar",)),
        "vit-b/16": Size(768, 12, 12, 3072, 16, 224, 85_798_656, ("vit-b-300ep.pth.tar",)),
    },
    namings={
        "official": Naming(
            (("cls_token", "cls_token"), *PLAIN),
            prefixes=(
                "module.base_encoder.",
                "state_dict.module.base_encoder.",
                "base_encoder.",
                "state_dict.base_encoder.",
                "model.",
                "",
            ),
            ignored=("head\\.",),
        ),
    },
    signs=("moco",),
    figures={
        "vit-s/16": {"linear": 73.2},
        "vit-b/16": {"linear": 76.7},
    },
    figures_source="README of facebookresearch/moco-v3",
    recipe="simclr",
)

"""I-JEPA (arXiv 2301.08243): predicts what it does not see, in features. No class token; patches are averaged.

A file of the authors has an encoder and its moving average, which they evaluate: that one (`target_encoder`) is taken
where there is one, while the copies of transformers and timm hold the other (`encoder`). Pictures are prepared with
ImageNet's mean and spread as in training, whatever the processor of transformers says. The fixed table of positions is
in every file: it is used as it stands, and resized as transformers does it (bicubic).
"""

from __future__ import annotations

from saccade.published import CC_BY_NC, IMAGENET, Family, Naming, Size
from saccade.published.timm_vit import PLAIN
from saccade.published.timm_vit import TRANSFORMERS as RULES

_H, _G = (1280, 32, 16, 5120), (1408, 40, 16, 6144)

FAMILY = Family(
    name="ijepa",
    licence=CC_BY_NC[0],
    licence_url=CC_BY_NC[1],
    terms=CC_BY_NC[2],
    data="ImageNet-1k",
    pooling="mean",
    switches={"eps": 1e-6, "cls": False, "pooling": "mean", **IMAGENET},
    sizes={
        "vit-h/14": Size(
            *_H,
            14,
            224,
            630_762_240,
            (
                "facebook/ijepa_vith14_1k",
                "facebook/ijepa_vith14_22k",
                "timm/vit_huge_patch14_gap_224.in1k_ijepa",
                "timm/vit_huge_patch14_gap_224.in22k_ijepa",
                "IN1K-vit.h.14-300e.pth.tar",
                "IN22K-vit.h.14-900e.pth.tar",
            ),
            data="ImageNet-1k or ImageNet-22k, as the name says",
        ),
        "vit-h/16-448": Size(
            *_H,
            16,
            448,
            631_668_480,
            (
                "facebook/ijepa_vith16_1k",
                "timm/vit_huge_patch16_gap_448.in1k_ijepa",
                "IN1K-vit.h.16-448px-300e.pth.tar",
            ),
        ),
        "vit-g/16": Size(
            *_G,
            16,
            224,
            1_011_368_576,
            (
                "facebook/ijepa_vitg16_22k",
                "timm/vit_giant_patch16_gap_224.in22k_ijepa",
                "IN22K-vit.g.16-600e.pth.tar",
            ),
            data="ImageNet-22k",
        ),
    },
    namings={
        "official": Naming(PLAIN, prefixes=("target_encoder.module.", "target_encoder.", "encoder.module.", "module.")),
        "transformers": Naming(
            RULES, prefixes=("", "ijepa."), ignored=("pooler\\.", "embeddings\\.mask_token"), model_types=("ijepa",)
        ),
        "timm": Naming(PLAIN, prefixes=("",), ignored=("head\\.",)),
    },
    signs=("jepa",),
    figures={
        "vit-h/14": {"linear": 79.3},
        "vit-h/16-448": {"linear": 81.1},
    },
    figures_source="arXiv 2301.08243, table 1, trained on ImageNet-1k",
    recipe="dino",
)

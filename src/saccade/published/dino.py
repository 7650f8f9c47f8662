"""DINO (arXiv 2104.14294): the four ViTs as released.

The authors resize the position table by the factor (n + 0.1) / N (`position_offset`), transformers to exactly n. A
config.json of transformers says eps 1e-12: the networks were trained with 1e-6, and so they are run. Of a training
checkpoint, which holds student and teacher, the teacher is taken. timm's names are the official ones.
"""

from __future__ import annotations

from saccade.published import APACHE, IMAGENET, Family, Naming, Size
from saccade.published.timm_vit import PLAIN
from saccade.published.timm_vit import TRANSFORMERS as PLAIN_TRANSFORMERS

OFFICIAL = Naming(
    rules=(
        ("cls_token", "cls_token"),
        *PLAIN,
    ),
    prefixes=(
        "",
        "teacher.backbone.",
        "teacher.module.backbone.",
        "student.module.backbone.",
        "student.backbone.",
        "module.backbone.",
        "backbone.",
        "module.",
        "model.",
    ),
    ignored=(r"head\.",),
)

TRANSFORMERS = Naming(
    rules=(
        ("cls_token", "embeddings.cls_token"),
        *PLAIN_TRANSFORMERS,
    ),
    prefixes=("", "vit."),
    ignored=(r"pooler\.", r"classifier\."),
    model_types=("vit",),
)


def _size(letter: str, patch: int, parameters: int) -> Size:
    width, heads, official, timm = {
        "s": (384, 6, "dino_deitsmall", "vit_small_patch"),
        "b": (768, 12, "dino_vitbase", "vit_base_patch"),
    }[letter]
    names = (f"facebook/dino-vit{letter}{patch}", f"timm/{timm}{patch}_224.dino", f"{official}{patch}_pretrain")
    return Size(width, 12, heads, 4 * width, patch, 224, parameters, names)


FAMILY = Family(
    name="dino",
    licence=APACHE[0],
    licence_url=APACHE[1],
    terms=APACHE[2],
    data="ImageNet-1k",
    pooling="cls",
    switches={"eps": 1e-6, "position": "learned", "position_offset": 0.1, **IMAGENET},
    sizes={
        "vit-s/16": _size("s", 16, 21_665_664),
        "vit-s/8": _size("s", 8, 21_670_272),
        "vit-b/16": _size("b", 16, 85_798_656),
        "vit-b/8": _size("b", 8, 85_807_872),
    },
    namings={"official": OFFICIAL, "transformers": TRANSFORMERS},
    signs=("dino(?!v)",),
    figures={
        "vit-s/16": {"knn": 74.5, "linear": 77.0},
        "vit-s/8": {"knn": 78.3, "linear": 79.7},
        "vit-b/16": {"knn": 76.1, "linear": 78.2},
        "vit-b/8": {"knn": 77.4, "linear": 80.1},
    },
    figures_source="README of facebookresearch/dino; linear on the last layers' class tokens",
    recipe="dino",
)

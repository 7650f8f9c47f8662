"""iBOT (arXiv 2111.07832): ViTs with DINO's geometry, and the mask token where a file has one (`masked_embed`).

The position table is resized as DINO's is. Of a training checkpoint, which holds student and teacher, the teacher is
taken, as the authors advise; heads are left out. Neither transformers nor timm has these networks.
"""

from __future__ import annotations

from saccade.published import APACHE, IMAGENET, Family, Naming, Size
from saccade.published.timm_vit import PLAIN

OFFICIAL = Naming(
    rules=(
        ("cls_token", "cls_token"),
        ("mask_token", "masked_embed"),
        *PLAIN,
    ),
    prefixes=(
        "",
        "state_dict.",
        "teacher.backbone.",
        "teacher.module.backbone.",
        "teacher.",
        "student.module.backbone.",
        "student.backbone.",
        "student.",
        "module.backbone.",
        "backbone.",
        "module.",
    ),
    ignored=(r"head\.", r"fc_norm\."),
)

FAMILY = Family(
    name="ibot",
    licence=APACHE[0],
    licence_url=APACHE[1],
    terms=APACHE[2],
    data="ImageNet-1k or ImageNet-22k",
    pooling="cls",
    switches={"eps": 1e-6, "position": "learned", "position_offset": 0.1, **IMAGENET},
    sizes={
        "vit-s/16": Size(384, 12, 6, 1536, 16, 224, 21_665_664),
        "vit-b/16": Size(768, 12, 12, 3072, 16, 224, 85_798_656),
        "vit-l/16": Size(1024, 24, 16, 4096, 16, 224, 303_301_632),
    },
    namings={"official": OFFICIAL},
    signs=("ibot",),
    figures={
        "vit-s/16": {"knn": 75.2, "linear": 77.9},
        "vit-b/16": {"knn": 77.1, "linear": 79.5},
        "vit-l/16": {"knn": 78.0, "linear": 81.0},
    },
    figures_source="README of bytedance/ibot, trained on ImageNet-1k",
    recipe="ibot",
)

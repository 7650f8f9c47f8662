"""DINOv3 (arXiv 2508.10104): the ConvNeXts, distilled from the 7B. Our names are the official ones.

The mean of the last map is the class token: it joins the patches before the last norm, so that norm(mean) and not
mean(norm) is what was trained and is pooled (`pooled_cls`, as in every published ConvNeXt). Official files name the
last norm twice, `norm` and `norms.3`: a file in which the two differ is refused. timm's names are those of any
ConvNeXt, so that the file or its folder must say dinov3.
"""

from __future__ import annotations

from typing import Any

from saccade.errors import SaccadeError
from saccade.published import IMAGENET, ConvnetSize, Family, Naming, Prepared, Rule, Way, pairs
from saccade.published.timm_convnext import OFFICIAL, TIMM, B, L, S, T, names, read


def _one(theirs: list[Any]) -> list[Any]:
    """One of the two. Raises `SaccadeError` where they differ."""
    if not theirs[0].is_meta and not bool((theirs[0] == theirs[1]).all()):
        hint = "nothing says which was used: take another file"
        raise SaccadeError("the last norm is there twice, and norms.3 is not norm", path="norms.3", hint=hint)
    return theirs[:1]


_TWICE = Way(_one, lambda ours: [ours[0], ours[0].clone()])
_NORM: tuple[Rule, ...] = tuple(
    (f"norm.{kind}", (f"norm.{kind}", f"norms.3.{kind}"), _TWICE) for kind in ("weight", "bias")
)

TRANSFORMERS = Naming(
    rules=(
        *pairs({"downsample_layers.{stage}.{part}": "stages.{stage}.downsample_layers.{part}"}),
        *names(
            "stages.{stage}.layers.{n}.",
            ("depthwise_conv", "layer_norm", "pointwise_conv1", "pointwise_conv2"),
            "gamma",
        ),
        *pairs({"norm": "layer_norm"}),
    ),
    prefixes=("", "model."),
    model_types=("dinov3_convnext",),
)


def _size(name: str, numbers: tuple[tuple[int, ...], tuple[int, ...]], parameters: int) -> ConvnetSize:
    hubs = (f"facebook/dinov3-convnext-{name}-pretrain-lvd1689m", f"timm/convnext_{name}.dinov3_lvd1689m")
    return ConvnetSize(*numbers, 224, parameters, (*hubs, f"dinov3_convnext_{name}_pretrain_lvd1689m"))


FAMILY = Family(
    name="dinov3-convnext",
    licence="DINOv3 License",
    licence_url="https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    terms="a custom licence: copies and derivatives only under the same agreement and with its text, publications must "
    "acknowledge it, military, nuclear, espionage and weapons uses are barred",
    data="LVD-1689M",
    pooling="cls",
    network="convnext",
    switches={"pooled_cls": True, **IMAGENET},
    sizes={
        "convnext-t/32": _size("tiny", T, 27_820_128),
        "convnext-s/32": _size("small", S, 49_454_688),
        "convnext-b/32": _size("base", B, 87_566_464),
        "convnext-l/32": _size("large", L, 196_230_336),
    },
    namings={
        "official": Naming(
            (*OFFICIAL, *_NORM), ("", "teacher.backbone.", "backbone.", "module.", "model."), (r"head\.",)
        ),
        "transformers": TRANSFORMERS,
        "timm": TIMM,
    },
    preprocess=Prepared(224, 224, "bilinear", square=True),
    read=read,
    signs=("dinov3",),
    recipe="dino",
)

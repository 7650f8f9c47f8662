"""ResNets (arXiv 1512.03385) of several families, all with torchvision's names, which are ours and timm's too.

Only prefixes and the file's or folder's name tell the families apart; the network is the same, so a file that says
nothing but `resnet` is loaded with the licence unknown. The embedding is the mean of the last map, before `fc`.
Bottlenecks stride in their 3x3 convolution; transformers' config.json can say otherwise and is refused then. How many
batches a norm has seen may be missing: nothing is computed with it.

Barlow Twins and VICReg both call their file resnet50.pth: the folder must say which. SimCLR here are Google's networks
as converted to torch, which see pictures in [0, 1] as they are; a SimCLR of someone else is another normalisation.
AugNet's package runs whole pictures with a short side of 350 and puts tanh of a linear layer (`fc`, ignored here) on
the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from saccade.published import (
    APACHE,
    CC_BY_NC,
    IMAGENET,
    ConvnetSize,
    Family,
    Naming,
    Prepared,
    Rule,
    Shapes,
    only,
    stages,
)

_MIT = ("MIT", "https://opensource.org/license/mit", None)
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_BLOCK = "layer{stage}.{n}."
_COUNTS = tuple(f"{norm}.num_batches_tracked" for norm in ("bn1", f"{_BLOCK}bn{{k}}", f"{_BLOCK}downsample.1"))


def _layer(conv: str, norm: str, their_conv: str, their_norm: str) -> tuple[Rule, ...]:
    """A convolution, which has no bias, and the batch norm after it."""
    return (f"{conv}.weight", f"{their_conv}.weight"), *((f"{norm}.{x}", f"{their_norm}.{x}") for x in _NORM)


TORCHVISION = Naming(
    rules=(
        *_layer("conv1", "bn1", "conv1", "bn1"),
        *_layer(f"{_BLOCK}conv{{k}}", f"{_BLOCK}bn{{k}}", f"{_BLOCK}conv{{k}}", f"{_BLOCK}bn{{k}}"),
        *_layer(*(f"{_BLOCK}downsample.{part}" for part in (0, 1, 0, 1))),
    ),
    prefixes=(
        "",
        "teacher.backbone.",
        "teacher.module.backbone.",
        "student.module.backbone.",
        "student.backbone.",
        "state_dict.module.",
        "state_dict.",
        "module.backbone.",
        "backbone.",
        "module.",
        "model.",
        "encoder.",
    ),
    ignored=(r"fc\.", r"projection_head\.", r"prototypes"),
    optional=_COUNTS,
)


def _transformers() -> Naming:
    """Their stages and layers are counted from 0, ours from 1."""
    blocks: list[Rule] = []
    for stage in range(4):
        ours, theirs = f"layer{stage + 1}.{{n}}.", f"encoder.stages.{stage}.layers.{{n}}."
        parts = [(f"conv{k + 1}", f"bn{k + 1}", f"layer.{k}") for k in range(3)]
        for conv, norm, part in (*parts, ("downsample.0", "downsample.1", "shortcut")):
            inside = f"{theirs}{part}."
            blocks += _layer(ours + conv, ours + norm, f"{inside}convolution", f"{inside}normalization")
    stem = "embedder.embedder."
    return Naming(
        rules=(*_layer("conv1", "bn1", f"{stem}convolution", f"{stem}normalization"), *blocks),
        prefixes=("", "resnet."),
        ignored=(r"classifier\.",),
        optional=_COUNTS,
        model_types=("resnet",),
    )


def _read(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    only(config, hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
    blocks = stages(shapes, config, f"{_BLOCK}conv1.weight")
    deep = "layer1.0.conv3.weight" in shapes
    last = f"layer{{stage}}.0.conv{3 if deep else 2}.weight"
    widths = tuple(shapes[last.format(stage=stage + 1)][0] // (4 if deep else 1) for stage in range(len(blocks)))
    kind = "bottleneck" if deep else "basic"
    given = {
        name: tuple(values) for name, values in config.get("pretrained_cfg", {}).items() if name in ("mean", "std")
    }
    return {"blocks": blocks, "widths": widths, "kind": kind, "channels": shapes["conv1.weight"][1], **given}


def _bottlenecks(*names: str, wider: tuple[tuple[int, int, str], ...] = ()) -> dict[str, ConvnetSize]:
    """ResNet-50 by its names, and those of some times its width: factor, parameters, name."""
    sizes = {"resnet-50/32": ConvnetSize(_50, _WIDTHS, 224, 23_508_032, names, kind="bottleneck")}
    for factor, parameters, name in wider:
        widths = tuple(factor * width for width in _WIDTHS)
        sizes[f"resnet-50-w{factor}/32"] = ConvnetSize(_50, widths, 224, parameters, (name,), kind="bottleneck")
    return sizes


_WIDTHS, _50 = (64, 128, 256, 512), (3, 4, 6, 3)
_W2, _W4 = 93_907_072, 375_378_176

FAMILY = Family(
    name="resnet",
    licence="unknown",
    licence_url="https://huggingface.co/timm",
    terms="the licence is that of whoever published the file: read the card that came with it",
    data="what the file's card says",
    pooling="mean",
    network="resnet",
    switches=IMAGENET,
    sizes={
        "resnet-18/32": ConvnetSize(
            (2, 2, 2, 2), _WIDTHS, 224, 11_176_512, ("microsoft/resnet-18", "timm/resnet18"), kind="basic"
        ),
        "resnet-34/32": ConvnetSize(
            _50, _WIDTHS, 224, 21_284_672, ("microsoft/resnet-34", "timm/resnet34"), kind="basic"
        ),
        **_bottlenecks("microsoft/resnet-50", "timm/resnet50"),
        "resnet-101/32": ConvnetSize(
            (3, 4, 23, 3), _WIDTHS, 224, 42_500_160, ("microsoft/resnet-101", "timm/resnet101"), kind="bottleneck"
        ),
        "resnet-152/32": ConvnetSize(
            (3, 8, 36, 3), _WIDTHS, 224, 58_143_808, ("microsoft/resnet-152", "timm/resnet152"), kind="bottleneck"
        ),
    },
    namings={"torchvision": TORCHVISION, "transformers": _transformers()},
    read=_read,
    signs=(
        "torchvision",
        r"^(?!.*(dino|moco|swav|barlow|vicreg|imgsim|augnet|-[124]x)).*resnet-?(18|34|50|101|152)(?![a-z\d])",
    ),
)


def _trained(
    name: str, licence: tuple[str, str, str | None], sign: str, sizes: Mapping[str, ConvnetSize], **others: Any
) -> Family:
    """A family whose tensors are torchvision's by name."""
    licence_name, url, terms = licence
    facts: dict[str, Any] = {
        "namings": {"torchvision": TORCHVISION},
        "data": "ImageNet-1k",
        "recipe": "simclr",
        **others,
    }
    return replace(
        FAMILY,
        name=name,
        licence=licence_name,
        licence_url=url,
        terms=terms,
        sizes=sizes,
        signs=(sign,),
        **facts,
    )


DINO = _trained("dino-resnet", APACHE, "dino(?!v)", _bottlenecks("dino_resnet50_pretrain"), recipe="dino")
SWAV = _trained(
    "swav",
    CC_BY_NC,
    "swav",
    _bottlenecks(
        "swav_800ep_pretrain",
        wider=((2, _W2, "swav_RN50w2_400ep_pretrain"), (4, _W4, "swav_RN50w4_400ep_pretrain")),
    ),
    switches={"mean": IMAGENET["mean"], "std": (0.228, 0.224, 0.225)},
)
BARLOW_TWINS = _trained("barlow-twins", _MIT, "barlow", _bottlenecks("barlowtwins/resnet50.pth"))
VICREG = _trained(
    "vicreg", _MIT, "vicreg", _bottlenecks("vicreg/resnet50.pth", wider=((2, _W2, "vicreg/resnet50x2.pth"),))
)
SIMCLR = _trained(
    "simclr",
    APACHE,
    "resnet50-[124]x",
    _bottlenecks("resnet50-1x.pth", wider=((2, _W2, "resnet50-2x.pth"), (4, _W4, "resnet50-4x.pth"))),
    switches={"mean": (0.0,) * 3, "std": (1.0,) * 3},
)
MOCOV3 = _trained(
    "mocov3-resnet",
    CC_BY_NC,
    r"moco|\br-50-\d+ep",
    _bottlenecks("r-50-1000ep.pth.tar"),
    namings={
        "official": replace(
            TORCHVISION,
            prefixes=tuple(
                f"{outer}{inner}_encoder."
                for inner in ("base", "momentum")
                for outer in ("module.", "state_dict.module.", "", "state_dict.")
            ),
        ),
        "torchvision": TORCHVISION,
    },
)
AUGNET = _trained(
    "augnet",
    (_MIT[0], "https://github.com/chenmingxiang110/AugNet", None),
    "imgsim|augnet",
    {"resnet-50/32": ConvnetSize(_50, _WIDTHS, 350, 23_508_032, ("imgsim/model.pth",), kind="bottleneck")},
    namings={"official": replace(TORCHVISION, prefixes=("module.pre.", "pre."))},
    data="pictures without labels; the package does not say which",
    preprocess=Prepared(350, 350, "bilinear"),
)

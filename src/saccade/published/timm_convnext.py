"""Any plain ConvNeXt (arXiv 2201.03545) as its authors, timm or transformers name it: whoever trained it, on whatever.

All of them pool the last map and norm the mean, which is the class token here (`pooled_cls`): the norm of a mean is not
the mean of the norms. Our names are the authors'. Mean and spread are ImageNet's unless timm's config.json says
otherwise; eps is 1e-6 everywhere, whatever transformers' config.json says (1e-12 by default).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saccade.published import IMAGENET, ConvnetSize, Family, Naming, Rule, Shapes, only, pairs, stages

_BLOCK = ("dwconv", "norm", "pwconv1", "pwconv2")
_GAMMA = "stages.{stage}.{n}.gamma"
T, S = ((3, 3, 9, 3), (96, 192, 384, 768)), ((3, 3, 27, 3), (96, 192, 384, 768))
B, L = ((3, 3, 27, 3), (128, 256, 512, 1024)), ((3, 3, 27, 3), (192, 384, 768, 1536))


def names(block: str, parts: tuple[str, ...], gamma: str) -> tuple[Rule, ...]:
    """Rules for the blocks: what stands before a part of a block, its parts in our order, and the layer scale."""
    rules = pairs(dict(zip(_BLOCK, parts, strict=True)), ("stages.{stage}.{n}.", block))
    return (*rules, (_GAMMA, f"{block}{gamma}"))


OFFICIAL: tuple[Rule, ...] = (
    *pairs({"downsample_layers.{stage}.{part}": "downsample_layers.{stage}.{part}"}),
    *names("stages.{stage}.{n}.", _BLOCK, "gamma"),
)
"""The authors' names, without the last norm."""

TIMM = Naming(
    rules=(
        *pairs({f"downsample_layers.0.{part}": f"stem.{part}" for part in (0, 1)}),
        *pairs(
            {f"downsample_layers.{n}.{part}": f"stages.{n}.downsample.{part}" for n in (1, 2, 3) for part in (0, 1)}
        ),
        *names("stages.{stage}.blocks.{n}.", ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"), "gamma"),
        *pairs({"norm": "head.norm"}),
    ),
    prefixes=("", "module.", "visual.trunk."),
    ignored=(r"head\.fc\.",),
)

_TRANSFORMERS = Naming(
    rules=(
        *pairs(
            {"downsample_layers.0.0": "embeddings.patch_embeddings", "downsample_layers.0.1": "embeddings.layernorm"}
        ),
        *pairs(
            {
                f"downsample_layers.{n}.{part}": f"encoder.stages.{n}.downsampling_layer.{part}"
                for n in (1, 2, 3)
                for part in (0, 1)
            }
        ),
        *names(
            "encoder.stages.{stage}.layers.{n}.",
            ("dwconv", "layernorm", "pwconv1", "pwconv2"),
            "layer_scale_parameter",
        ),
        *pairs({"norm": "layernorm"}),
    ),
    prefixes=("", "convnext."),
    ignored=(r"classifier\.",),
    model_types=("convnext",),
)


def read(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors of a ConvNeXt tell. Raises `SaccadeError` where a config.json tells of another network."""
    only(config, hidden_act="gelu", patch_size=4)
    blocks = stages(shapes, config, _GAMMA)
    widths = tuple(shapes[_GAMMA.format(stage=stage, n=0)][0] for stage in range(len(blocks)))
    return {"blocks": blocks, "widths": widths, "channels": shapes["downsample_layers.0.0.weight"][1]}


def _read(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("pretrained_cfg", {})
    native = {"image_size": given["input_size"][-1]} if "input_size" in given else {}
    return read(shapes, config) | native | {name: tuple(given[name]) for name in ("mean", "std") if name in given}


def _size(letter: str, numbers: tuple[tuple[int, ...], tuple[int, ...]], parameters: int) -> ConvnetSize:
    name = {"t": "tiny", "s": "small", "b": "base", "l": "large", "xl": "xlarge"}[letter]
    hubs = [f"facebook/convnext-{name}-224-22k", f"timm/convnext_{name}.fb_in22k"]
    return ConvnetSize(*numbers, 224, parameters, (*hubs, f"convnext_{name}_22k_224"))


FAMILY = Family(
    name="timm-convnext",
    licence="unknown",
    licence_url="https://huggingface.co/timm",
    terms="the licence is that of whoever published the file: read the card that came with it",
    data="what the file's card says",
    pooling="cls",
    network="convnext",
    switches={"pooled_cls": True, **IMAGENET},
    sizes={
        "convnext-t/32": _size("t", T, 27_820_128),
        "convnext-s/32": _size("s", S, 49_454_688),
        "convnext-b/32": _size("b", B, 87_566_464),
        "convnext-l/32": _size("l", L, 196_230_336),
        "convnext-xl/32": _size("xl", ((3, 3, 27, 3), (256, 512, 1024, 2048)), 348_147_968),
    },
    namings={
        "official": Naming((*OFFICIAL, *pairs({"norm": "norm"})), ("", "model.", "module."), (r"head\.",)),
        "transformers": _TRANSFORMERS,
        "timm": TIMM,
    },
    read=_read,
    signs=("timm-convnext", "^(?!.*(dinov3|eupe)).*convnext"),
)

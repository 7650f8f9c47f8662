"""SigLIP 2 NaFlex (arXiv 2502.14786): image towers that were trained on pictures at their own aspect.

The network is SigLIP's. Its patch embedding is a matrix over a patch's numbers in the order row, column, channel, and
its 16 x 16 positions are resized for every picture: linearly (`position_linear`, which only it has) and with
antialiasing. The authors pad pictures of several shapes into one batch and mask the padding; here a batch has one size,
which says the same of each picture. `encoder.preprocess` squeezes to a square, as for SigLIP, so that verbs can batch;
`encoder.natural` keeps the aspect, with at most 256 patches as released, or as many as `image_size` gives.
"""

from __future__ import annotations

import math
from typing import Any

from saccade.published import APACHE, Family, Naming, Prepared, Rule, Size, Way
from saccade.published.siglip import FAMILY as SIGLIP
from saccade.published.siglip import TIMM, TRANSFORMERS, big_vision


def _convolution(theirs: list[Any]) -> list[Any]:
    """[D row*column*3] to [D 3 row column]."""
    side = math.isqrt(theirs[0].shape[1] // 3)
    return [theirs[0].unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()]


def _matrix(ours: list[Any]) -> list[Any]:
    return [ours[0].permute(0, 2, 3, 1).flatten(1)]


def _grid(table: Any) -> Any:
    """[1 N D] to [1 rows columns D]."""
    side = math.isqrt(table.shape[1])
    return table.unflatten(1, (side, side))


_PATCHES = Way(_convolution, _matrix)
_KERNEL = Way(lambda theirs: _convolution([theirs[0].t()]), lambda ours: [_matrix(ours)[0].t().contiguous()])
_TABLE = Way(lambda theirs: [theirs[0].flatten(0, 1)[None]], lambda ours: [_grid(ours[0])[0]])
_BATCHED = Way(lambda theirs: [theirs[0].flatten(1, 2)], lambda ours: [_grid(ours[0])])

_WEIGHT = "patch_embed.proj.weight"


def _with(naming: Naming, changed: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a naming, some of them in another way."""
    ours = {rule[0] for rule in changed}
    return (*(rule for rule in naming.rules if rule[0] not in ours), *changed)


FAMILY = Family(
    name="siglip2-naflex",
    licence=APACHE[0],
    licence_url=APACHE[1],
    terms=APACHE[2],
    data=SIGLIP.data,
    pooling="map",
    switches={**SIGLIP.switches, "position_antialias": True, "position_linear": True},
    sizes={
        name: Size(
            *numbers,
            16,
            256,
            parameters,
            (
                f"google/siglip2-{word}-patch16-naflex",
                f"timm/naflexvit_{word}_patch16_siglip.v2_webli",
                f"siglip2_{short}16_naflex.npz",
            ),
        )
        for name, word, short, numbers, parameters in (
            ("vit-b/16", "base", "b", (768, 12, 12, 3072), 92_930_304),
            ("vit-so400m/16", "so400m", "so400m", (1152, 27, 16, 4304), 427_888_064),
        )
    },
    namings={
        "transformers": Naming(
            rules=_with(TRANSFORMERS, ((_WEIGHT, "embeddings.patch_embedding.weight", _PATCHES),)),
            prefixes=TRANSFORMERS.prefixes,
            ignored=TRANSFORMERS.ignored,
            model_types=("siglip2", "siglip2_vision_model"),
        ),
        "timm": Naming(
            rules=_with(
                TIMM,
                (
                    (_WEIGHT, "embeds.proj.weight", _PATCHES),
                    ("patch_embed.proj.bias", "embeds.proj.bias"),
                    ("pos_embed", "embeds.pos_embed", _BATCHED),
                ),
            ),
            prefixes=TIMM.prefixes,
            ignored=TIMM.ignored,
        ),
        "big_vision": big_vision(_KERNEL, stacked=False, table=_TABLE),
        "big_vision stacked": big_vision(_KERNEL, stacked=True, table=_TABLE),
    },
    preprocess=Prepared(interpolation="bilinear", square=True),
    read=SIGLIP.read,
    signs=("naflex",),
    recipe="dino",
)

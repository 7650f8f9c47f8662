"""Recipes and sources that keep the contract wide: pictures of 13 bands, clips, texts without pictures."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade import backbone, weights
from toys.sources import Bands, Clips, Pairs, Pictures, Texts, Toy

RECIPES = str(Path(__file__).parent / "recipes")
"""Add it to `saccade.recipes.__path__` and the toys are recipes like any other."""

SOURCES: dict[str, type[Toy]] = {"bands": Bands, "clips": Clips, "texts": Texts}

WORDED = ("clip", "lit", "siglip", "siglip2")
"""Shipped recipes that read pictures with texts."""

ALONE = ("mlm",)
"""Those that read texts alone."""

_WORDS: dict[str, Any] = {"vocabulary": 600, "length": 12, "text_width": 48, "text_depth": 2, "text_heads": 3}

_DISTILLED: dict[str, Any] = {
    "local_crops": 2,
    "local_size": 16,
    "prototypes": 256,
    "hidden": 48,
    "colour": 0.5,
    "head_norm": True,
    "first_temperature": 0.02,
    "teacher_temperature": 0.02,
}

_SMALL: dict[str, dict[str, Any]] = {
    "clip": _WORDS | {"lr": 0.01, "warmup": 0.05},
    "siglip": _WORDS | {"lr": 0.01, "warmup": 0.05, "min_scale": 0.5},
    "siglip2": _WORDS
    | {"lr": 0.003, "warmup": 0.05, "min_scale": 0.5, "local_crops": 2, "local_size": 16, "prototypes": 256}
    | {"hidden": 48, "colour": 0.5, "distil": 0.3, "fixed": 0.65, "tail_size": 40},
    "dino": _DISTILLED,
    "ibot": _DISTILLED,
    "dinov2": _DISTILLED
    | {
        "lr": 0.001,
        "layer_scale": 0.5,
        "koleo_group": 4,
        "separate_heads": True,
        "assignment": "sinkhorn",
        "queue": 32,
    },
    "dinov3": _DISTILLED
    | {"lr": 0.001, "layer_scale": 0.5, "koleo_group": 4, "queue": 32, "warmup": 0.1, "steps": 8}
    | {"anchor": 0.13, "gram": 0.25, "refresh": 0.125, "high": 0.88},
    "distil": {"learn": "heads", "local_crops": 2, "local_size": 16, "colour": 0.5, "layer_scale": 0.5, "lr": 0.01}
    | {"queue": 32, "warmup": 0.1, "teacher_scale": 1.5},
    "lit": _WORDS | {"lr": 0.01, "warmup": 0.05, "bias": -2.0},
    "mae": {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 3},
    # with easy views: batches of 8 to 32 leave little to tell a picture by; lr as on a convnet, below
    "mlm": _WORDS | {"lr": 0.01, "warmup": 0.05},
    "simclr": {
        "lr": 0.001,
        "hidden": 48,
        "projection": 64,
        "temperature": 0.2,
        "min_scale": 0.5,
        "colour": 0.2,
        "grey": 0,
        "blur": 0,
    },
}
"""Settings that make a shipped recipe quick; one that needs none needs no entry."""


CONVNET = "resnet-10-half/8"


def source(case: str) -> Toy:
    """Sixteen samples that the recipe can read: pictures, unless it is one of the toys."""
    toy = Pairs if case.partition("-")[0] in WORDED else Texts if case in ALONE else Pictures
    return SOURCES.get(case, toy)(16)


def small(case: str) -> dict[str, Any]:
    """Settings with which the recipe runs in a moment; a case is a recipe, or RECIPE-on-a-convnet."""
    recipe, convnet, _ = case.partition("-on-a-convnet")
    taught = {"teacher": teacher()} if recipe == "distil" else {}
    shape = {} if recipe in (*SOURCES, *ALONE) else {"arch": CONVNET if convnet else "vit-ti/8", "image_size": 32}
    begun = {"init": start(str(shape["arch"]))} if recipe == "lit" else {}
    lr = 0.001 if convnet else 0.01  # batch norm over eight samples magnifies rounding, the more the longer the steps
    return {**shape, "batch": 8, "steps": 6, "lr": lr, **taught, **begun, **_SMALL.get(recipe, {})}


def tiny(case: str) -> dict[str, Any]:
    """The same on a `vit-nano`, which a test adds to `vit.SIZES` as small as it wants it."""
    settings = small(case)
    return {**settings, "arch": settings["arch"].replace("vit-ti", "vit-nano")}


def knobs(case: str) -> dict[str, Any]:
    """Of the recipe, without what follows from the backbone that a run goes on from."""
    return {name: value for name, value in tiny(case).items() if name not in ("arch", "image_size", "steps", "lr")}


def start(arch: str) -> str:
    """A backbone of this architecture, untrained, for recipes that leave one as it is; likewise made once."""
    if "SACCADE_TOY_START" not in os.environ:
        os.environ["SACCADE_TOY_START"] = tempfile.mkdtemp(prefix="saccade-toy-")
        atexit.register(shutil.rmtree, os.environ["SACCADE_TOY_START"], ignore_errors=True)
    out = Path(os.environ["SACCADE_TOY_START"]) / arch.replace("/", "-")
    if not out.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights.save_backbone(out, backbone.build(arch, image_size=32), {"arch": arch})
    return str(out)


def teacher() -> str:
    """A run of dinov2 with both its heads, to learn from; made once for all processes that come of this one."""
    if "SACCADE_TOY_TEACHER" not in os.environ:
        out = os.environ["SACCADE_TOY_TEACHER"] = tempfile.mkdtemp(prefix="saccade-toy-")
        atexit.register(shutil.rmtree, out, ignore_errors=True)
        saccade.pretrain(Pictures(16), recipe="dinov2", out=out, workers=0, **small("dinov2") | {"steps": 2})
    return os.environ["SACCADE_TOY_TEACHER"]

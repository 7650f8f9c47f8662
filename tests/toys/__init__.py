"""Recipes and sources that keep the contract wide: pictures of 13 bands, clips, texts without pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toys.sources import Bands, Clips, Pictures, Texts, Toy

RECIPES = str(Path(__file__).parent / "recipes")
"""Add it to `saccade.recipes.__path__` and the toys are recipes like any other."""

SOURCES: dict[str, type[Toy]] = {"bands": Bands, "clips": Clips, "texts": Texts}

_SMALL: dict[str, dict[str, Any]] = {"mae": {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 3}}
"""Settings that make a shipped recipe quick; one that needs none needs no entry."""


def source(recipe: str) -> Toy:
    """Sixteen samples that the recipe can read: pictures, unless it is one of the toys."""
    return SOURCES.get(recipe, Pictures)(16)


def small(recipe: str) -> dict[str, Any]:
    """Settings with which the recipe runs in a moment."""
    shape = {} if recipe in SOURCES else {"arch": "vit-ti/8", "image_size": 32}
    return {**shape, "batch": 8, "steps": 6, "lr": 0.01, **_SMALL.get(recipe, {})}

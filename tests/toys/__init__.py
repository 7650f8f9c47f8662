"""Recipes and sources that keep the contract wide: pictures of 13 bands, clips, texts without pictures."""

from __future__ import annotations

from pathlib import Path

RECIPES = str(Path(__file__).parent / "recipes")
"""Add it to `saccade.recipes.__path__` and the toys are recipes like any other."""

"""Pictures that are proposed for labelling, on one page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.data import Source
from saccade.errors import Unreadable
from saccade.report.page import Cards, Page, Section, write_page
from saccade.report.pictures import SMALL, Card, Tile, uri, visible

_MOST = 400  # pictures that a page still shows at once


def write_proposed(path: Path, proposed: Sequence[Mapping[str, Any]], source: Source, rows: Sequence[int]) -> Path:
    """Writes the page: a picture for each proposal, its rank, key and reason under it."""
    cards = []
    for one, row in list(zip(proposed, rows, strict=True))[:_MOST]:
        with contextlib.suppress(Unreadable):
            pixels = source[row].pixels
            if pixels is not None:
                tile = Tile(uri(visible(pixels), SMALL), one["key"], one["reason"])
                cards.append(Card([tile], f"{one['rank']}. {one['key']}"))
    more = f" The first {_MOST} are shown." if len(proposed) > _MOST else ""
    lede = f"{len(proposed)} pictures, those first that help most.{more}"
    sections = [Section("Proposed", "Each with what it stands for.", [Cards(cards, least=170)])]
    return write_page(path, Page("What to label next", lede, [], sections, footer="Written by saccade label-next."))

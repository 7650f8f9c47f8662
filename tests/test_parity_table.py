"""docs/parity.md: a row for every published size, and no difference above the floor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saccade import published

FLOOR, SEEN = 1e-4, 1e-3
TABLE = Path(__file__).parent.parent / "docs" / "parity.md"
NUMBER = re.compile(r"\d\.\de[-+]\d\d|nan|inf")


def _rows() -> dict[tuple[str, str], dict[str, str]]:
    lines = [line.strip("|").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


ROWS = _rows()
MEASURED = {key: row for key, row in ROWS.items() if row["oracle"] != "not run here"}
SIZES = [(family.name, size) for family in published.families().values() for size in family.sizes]


def test_every_published_size_has_a_row_and_says_its_parameters() -> None:
    assert sorted(ROWS) == sorted(SIZES)
    for (family, size), row in ROWS.items():
        known = published.families()[family].sizes[size]
        assert row["parameters"] == f"{known.parameters:,}" and row["published as"] == (", ".join(known.names) or "-")


def test_what_was_not_run_says_why_and_claims_nothing() -> None:
    for key in ROWS.keys() - MEASURED.keys():
        assert re.fullmatch(r"\(.+\)", ROWS[key]["native"]), key
        rest = [ROWS[key][name] for name in list(ROWS[key])[6:]]
        assert set(rest) == {"-"}, key


@pytest.mark.parametrize("key", MEASURED, ids="/".join)
def test_no_difference_is_above_the_floor(key: tuple[str, str]) -> None:
    row = MEASURED[key]
    for column in ("native", "not square", "other"):
        cells = row[column].split(" / ")
        pooled = published.families()[key[0]].pooling
        assert len(cells) == 3 and (cells[0] == "-") == (pooled in ("mean", "map")), column
        assert all(float(cell) < FLOOR for cell in cells if cell != "-"), column
    back = NUMBER.findall(row["way back"])
    assert all(float(value) < FLOOR for value in back) and (back or row["way back"] == "at smaller sizes")
    seen = re.fullmatch(r"(\d+) of (\d+), least (\S+)", row["mutations seen"])
    assert seen is None or (seen[1] == seen[2] and float(seen[3]) > SEEN)
    assert seen or row["mutations seen"] == "at the smallest size"
    namings = re.match(r"(\d+) of (\d+): ", row["namings there and back"])
    assert namings and namings[1] == namings[2] != "0" and "NOT" not in row["namings there and back"]
    assert float(row["spread"]) > 0.3

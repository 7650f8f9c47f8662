"""Parquet files that hold pictures, as Hugging Face's `datasets` lays them out, made here; and what may be wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet
from test_sources import keys, picture, plant, value

import saccade
from saccade.data import fingerprint, loader
from saccade.draws import Order
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.labelled import read_labelled
from saccade.evaluate.shared import test_side as side_of
from saccade.sources import Rows, open_source, row_groups


def hugging_face(names: Sequence[str]) -> dict[str, str]:
    """What `datasets` writes into a schema."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def written(path: Path, columns: dict[str, Any], rows: int = 100, names: Sequence[str] = (), **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table(columns)
    if names:
        table = table.replace_schema_metadata(hugging_face(names))
    parquet.write_table(table, path, row_group_size=rows, **more)
    return path


def pictures(values: Sequence[int], side: int = 8) -> list[dict[str, Any]]:
    return [{"bytes": picture(value, side), "path": f"P{value % 3}/{value}.png"} for value in values]


def test_the_layout_of_hugging_face(tmp_path: Path) -> None:
    labels = [0, 1, -1, None, 1]
    first = {"image": pictures(range(5)), "label": labels, "caption": [["a", "b"], ["c"], [], None, ["ü"]]}
    second = {"image": pictures(range(5, 8)), "label": [1, 0, 0], "caption": [["x"]] * 3}
    for number, columns in enumerate((first, second)):
        written(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", columns, 2, ["cat", "dog"])
    source = open_source(tmp_path)
    assert isinstance(source, Rows) and len(source) == 8
    assert keys(source)[:2] == [f"data/train-00000-of-00002.parquet/{n}/P{n}/{n}.png" for n in range(2)]
    assert source.key(5) == "data/train-00001-of-00002.parquet/0/P2/5.png"
    assert [value(source, index) for index in (7, 0, 3, 1, 6, 5, 2, 4)] == [7, 0, 3, 1, 6, 5, 2, 4]
    assert [source.label(index) for index in range(8)] == ["cat", "dog", None, None, "dog", "dog", "cat", "cat"]
    assert source[0].texts == () and source[0].source.endswith("train-00000-of-00002.parquet")
    assert source.content(3) == picture(3)
    named = open_source(tmp_path / "data" / "train-*.parquet", texts=True, group_by=r"/(P\d)/")
    assert named[0].texts == ("a", "b") and named[4].texts == ("ü",) and named.group(5) == "P2"
    for index, reason in ((2, "it has no caption"), (3, "it has no caption")):
        with pytest.raises(Unreadable, match=reason):
            named[index]
    assert fingerprint(source)["fingerprint"] == fingerprint(open_source(tmp_path))["fingerprint"]
    assert fingerprint(source)["contents"]["covered"] == 8


def test_plain_columns_of_bytes_and_other_columns(tmp_path: Path) -> None:
    columns = {
        "img": arrow.array([picture(1), picture(2), None], arrow.large_binary()),
        "label": arrow.array(["a", "b", "a"]).dictionary_encode(),
        "group": [3, 3, 4],
        "patient": ["x", None, "y"],
        "text": ["one", "two", "three"],
    }
    path = written(tmp_path / "plain.parquet", columns)
    source = open_source(path, texts=True)
    assert keys(source) == [f"plain.parquet/{n}" for n in range(3)]
    sample = source[1]
    assert (sample.label, sample.group, sample.texts, value(source, 1)) == ("b", "3", ("two",), 2)
    with pytest.raises(Unreadable, match="its row holds no bytes"):
        source[2]
    assert open_source(path, group_by="patient").group(0) == "x"
    assert source.column("patient") == ["x", "", "y"] and source.column("nothing") is None


def test_a_broken_row_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    images = pictures(range(40), side=16)
    images[7] = {"bytes": b"\x89PNG no picture", "path": "seven.png"}
    images[9] = {"bytes": picture(9, 16)[:60], "path": "nine.png"}
    written(tmp_path / "d" / "a.parquet", {"image": images[:20]}, 10)
    written(tmp_path / "d" / "b.parquet", {"image": images[20:]}, 10)
    run = saccade.pretrain(
        tmp_path / "d", recipe="mae", arch="vit-xs/8", image_size=16, batch=20, steps=4, out=tmp_path / "run", workers=1
    )
    lines = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"a.parquet/7/seven.png", "a.parquet/9/nine.png"}
    assert all(line["source"].endswith("d/a.parquet") for line in lines)
    index = saccade.embed(run.path, tmp_path / "d", out=tmp_path / "index", workers=1)
    assert index.state["quarantined"] == 2 and list(index.keys)[39] == "b.parquet/19/P0/39.png"


def damaged(path: Path, group: int) -> None:
    """Other bytes where the pictures of a row group lie."""
    facts = parquet.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    start = facts.data_page_offset if not facts.has_dictionary_page else facts.dictionary_page_offset
    content[start : start + facts.total_compressed_size] = b"\xff" * facts.total_compressed_size
    path.write_bytes(content)


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "d.parquet", {"image": [picture(n) for n in range(30)]}, 10)
    damaged(path, 1)
    source = open_source(path)
    assert [value(source, index) for index in (3, 25)] == [3, 25]
    for index in (10, 19):
        with pytest.raises(Unreadable, match="row group 1 cannot be read") as caught:
            source[index]
        assert caught.value.key == f"d.parquet/{index}"
    assert value(source, 9) == 9


def test_what_is_held_is_bounded_and_rows_come_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "ROWS", 8)
    monkeypatch.setattr(row_groups, "HELD", 30_000)
    noise = torch.Generator().manual_seed(0)
    data = [bytes(torch.randint(0, 256, (1000,), generator=noise, dtype=torch.uint8).tolist()) for _ in range(200)]
    path = written(tmp_path / "d.parquet", {"image": data}, 90)
    source = open_source(path)
    assert isinstance(source, Rows)
    order = torch.randperm(200, generator=noise).tolist()
    for index in [*order[:60], *range(200), *reversed(range(0, 200, 7))]:
        assert source.content(index) == data[index]
        assert source.recent._bytes == sum(block.nbytes for block in source.recent._blocks.values()) <= 30_000
    read = 0
    plain = row_groups.Recent._keep

    def counted(self: Any, key: Any, block: Any) -> None:
        nonlocal read
        read += len(block)
        plain(self, key, block)

    monkeypatch.setattr(row_groups.Recent, "_keep", counted)
    fresh = open_source(path)
    assert [fresh.content(index) for index in range(200)] == data and read == 200, "in order nothing is read twice"


def test_workers_forked_and_spawned_read_what_one_process_does(tmp_path: Path) -> None:
    path = written(tmp_path / "d.parquet", {"image": pictures(range(60)), "caption": [f"no {n}" for n in range(60)]}, 7)
    source = open_source(path, texts=True)
    assert value(source, 30) == 30  # a file is open, and rows are held, before workers begin

    def batches(workers: int) -> list[Any]:
        steps = loader(source, Order([60]), first_step=0, last_step=6, batch=12, workers=workers)
        return [(step.batch["pixels"].tolist(), step.batch["text"].tolist()) for step in steps]

    assert batches(0) == batches(2)
    again = pickle.loads(pickle.dumps(source))
    assert keys(again) == keys(source) and not again.recent._blocks and value(again, 59) == 59


def test_an_examination_finds_its_sides_and_classes(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 6), ("validation", 4)):
        columns = {"image": pictures(range(count)), "label": [n % 2 for n in range(count)]}
        written(tmp_path / "data" / f"{part}-00000-of-00001.parquet", columns, 5, ["cat", "dog"])
    data = read_labelled(tmp_path, None, 8, 3)
    assert (len(data.train), len(data.test), data.classes) == (12, 6, ["cat", "dog"])
    assert {data.source.key(row).split("-")[0] for row in data.test.tolist()} == {"data/test"}
    assert side_of(tmp_path) == (tmp_path / "data" / "test-*.parquet", "data/test-*.parquet")
    columns = {"image": pictures(range(20)), "label": ["x", "y"] * 10, "split": ["train"] * 14 + ["test"] * 6}
    one = written(tmp_path / "one.parquet", {**columns, "who": [f"p{n // 2}" for n in range(20)]})
    data = read_labelled(one, None, 8, 3)
    assert data.test.tolist() == list(range(14, 20)) and data.split["made"].startswith("as given")
    data = read_labelled(one, "who", 8, 3)
    assert data.groups is not None and data.groups[:4] == ["p0", "p0", "p1", "p1"]


def test_pairs_of_picture_and_caption_are_learned_from_and_examined(tmp_path: Path) -> None:
    columns = {"image": pictures(range(24), 16), "caption": [[f"number {n}", f"no {n}"] for n in range(24)]}
    written(tmp_path / "train-0.parquet", columns, 5)
    written(tmp_path / "test-0.parquet", columns, 5)
    small = {"arch": "vit-xs/8", "image_size": 16, "batch": 8, "steps": 2, "vocabulary": 516, "length": 8}
    words = {"text_width": 24, "text_depth": 1, "text_heads": 2}
    run = saccade.pretrain(
        tmp_path / "train-*.parquet", recipe="clip", out=tmp_path / "run", workers=0, **small, **words
    )
    assert run.record["texts"]["texts"] == 48 and not run.record["texts"]["faults"]
    found = saccade.evaluate(run.path, tmp_path, tasks=("retrieval",))["retrieval"]
    assert (found["pictures"], found["captions"], found["part"]) == (24, 48, "test-*.parquet")


def test_mistakes_are_named(tmp_path: Path) -> None:
    two = written(tmp_path / "two" / "a.parquet", {"left": [picture(1)], "right": [picture(2)]})
    with pytest.raises(SaccadeError, match="pictures in several columns: left, right"):
        open_source(two)
    written(tmp_path / "mixed" / "a.parquet", {"image": [picture(1)]})
    written(tmp_path / "mixed" / "b.parquet", {"image": [picture(1)], "label": ["a"]})
    with pytest.raises(SaccadeError, match=r"b\.parquet has other columns than .*a\.parquet"):
        open_source(tmp_path / "mixed")
    with pytest.raises(SaccadeError, match="has no captions, only image"):
        open_source(tmp_path / "mixed" / "a.parquet", texts=True)
    numbers = written(tmp_path / "numbers" / "a.parquet", {"x": [1, 2]})
    with pytest.raises(SaccadeError, match="no column `path`"):
        open_source(numbers)
    with pytest.raises(SaccadeError, match="has no pictures, only x"):
        open_source(tmp_path / "numbers")
    plant(tmp_path, {"cut/c.parquet": two.read_bytes()[:-20]})
    for place in ("cut", "cut/c.parquet"):
        with pytest.raises(SaccadeError, match=r"cannot read .*c\.parquet"):
            open_source(tmp_path / place)
    empty = written(tmp_path / "empty" / "e.parquet", {"image": arrow.array([], arrow.binary())})
    with pytest.raises(SaccadeError, match="there are no rows"):
        open_source(empty)

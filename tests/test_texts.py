"""Texts in rows of lists and of Parquet: pieces for `mlm`, and labelled ones for what a text tower knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_conformance import small

import saccade
from saccade.data import loader
from saccade.draws import Order
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate import texts as examined
from saccade.sources import open_source
from saccade.sources.texts import Texts, open_texts

LONG = " ".join(f"wörd{number}" for number in range(120))
ROWS = [
    {"text": "one two", "label": "a", "group": "p"},
    {"text": LONG, "label": "b", "group": "p"},
    {"text": "three", "label": "a", "group": "q"},
]


def listed(folder: Path, suffix: str, rows: list[dict[str, Any]], name: str = "list") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        gap = "," if suffix == ".csv" else "\t"
        lines = [gap.join(rows[0]), *(gap.join(str(cell) for cell in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_of_every_kind_are_cut_into_pieces(suffix: str, tmp_path: Path) -> None:
    path = listed(tmp_path, suffix, ROWS)
    source = open_source(path, pieces=100)
    assert isinstance(source, Texts)
    pieces = [source[row] for row in range(len(source))]
    count = round(len(LONG.encode()) / 100)
    keys = [f"list{suffix}/0", *(f"list{suffix}/1#{n}" for n in range(count)), f"list{suffix}/2"]
    assert [piece.key for piece in pieces] == keys
    words = {word for piece in pieces[1:-1] for word in piece.texts[0].split()}
    assert words == set(LONG.split()) and all(len(piece.texts[0].encode()) <= 150 for piece in pieces)
    assert pieces[0].texts == ("one two",) and pieces[-1].texts == ("three",)
    assert [piece.label for piece in (pieces[0], pieces[1], pieces[-1])] == ["a", "b", "a"]
    assert [piece.group for piece in (pieces[0], pieces[5], pieces[-1])] == ["p", "p", "q"]
    assert open_source(path, pieces=100, group_by="label").group(3) == "b"
    ordered = open_source(path, pieces=10_000)
    assert [ordered[row].texts[0] for row in (2, 0, 1)] == ["three", "one two", LONG]


def test_several_texts_of_a_row_and_none(tmp_path: Path) -> None:
    rows = [{"sentence1": "one", "sentence2": "two"}, {"sentence1": None, "sentence2": ["a", None, "b"]}, {"x": 1}]
    source = open_texts(listed(tmp_path, ".jsonl", rows), 100)
    assert [source[row].texts[0] for row in range(2)] == ["one\ntwo", "a\nb"]
    assert source.group(1) == "list.jsonl/1", "a row is its own group"
    with pytest.raises(Unreadable, match="empty") as caught:
        source[2]
    assert caught.value.key == "list.jsonl/2"


def test_parquet_texts_of_several_files_and_of_lists(tmp_path: Path) -> None:
    for number in range(2):
        listed(tmp_path / "data", ".parquet", [{"text": ["a", f"b{number}"]}, {"text": None}], f"train-{number}")
    listed(tmp_path / "data", ".parquet", [{"text": ["c"]}], "test-0")
    source = open_texts(tmp_path / "data" / "train-*.parquet", 100)
    assert [source.key(row) for row in range(4)] == [f"train-{n}.parquet/{row}" for n in range(2) for row in range(2)]
    assert [source[row].texts[0] for row in (2, 0)] == ["a\nb1", "a\nb0"]
    assert len(open_source(tmp_path, pieces=100)) == 5
    assert isinstance(open_source(tmp_path / "data" / "train-*.parquet", pieces=64), Texts)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_workers_read_what_one_process_does(suffix: str, tmp_path: Path) -> None:
    source = open_source(listed(tmp_path, suffix, [{"text": f"{n} {LONG}"} for n in range(9)]), pieces=100)
    assert source[0].texts

    def batches(workers: int) -> list[Any]:
        steps = loader(source, Order([len(source)]), first_step=0, last_step=3, batch=8, workers=workers)
        return [step.batch["text"].tolist() for step in steps]

    assert batches(0) == batches(2)


def labelled() -> list[dict[str, Any]]:
    """Two kinds of texts, each with words of its own."""
    kinds = (("sea", "ship sails over deep water"), ("wood", "bear walks under tall trees"))
    return [
        {"text": f"{words.split()[n % 5]} " * 18, "label": kind, "split": "train" if n < 10 else "test"}
        for kind, words in kinds
        for n in range(15)
    ]


def test_a_run_learns_from_a_list_and_is_examined_on_lists(tmp_path: Path) -> None:
    one = listed(tmp_path, ".jsonl", labelled())
    settings = {**small("mlm"), "steps": 12, "length": 20, "vocabulary": 516, "batch": 10, "lr": 0.1}
    run = saccade.pretrain(one, recipe="mlm", out=tmp_path / "run", workers=0, **settings)
    assert run.record["data"]["samples"] == 30 and not run.record["texts"]["faults"].get("empty")
    found = saccade.evaluate(run.path, one, tasks=("linear", "masked"))
    assert (found["split"]["train"], found["split"]["test"]) == (20, 10)
    assert found["baselines"]["words"]["linear"] == 100 and found["baselines"]["majority"] == 50
    for part in ("train", "test"):
        rows = [row for row in labelled() if row["split"] == part]
        listed(tmp_path / "two", ".csv", rows, part)
    again = saccade.evaluate(run.path, tmp_path / "two", tasks=("linear", "masked"))
    assert again["linear"] == found["linear"] and again["split"] == found["split"]
    assert abs(again["masked"] - found["masked"]) < 25, "which words are hidden depends on the key"


def test_where_there_is_no_split_a_fifth_is_set_apart_by_group(tmp_path: Path) -> None:
    rows = [{"text": "a text", "label": "xy"[n % 2], "group": f"g{n // 4}"} for n in range(120)]
    parts = examined._read(listed(tmp_path, ".jsonl", rows))
    groups = [{f"g{row // 4}" for row in parts[part][1]} for part in ("train", "test")]
    assert not groups[0] & groups[1] and 2 <= len(groups[1]) <= 12
    assert len(parts["train"][1]) + len(parts["test"][1]) == 120


def test_mistakes_are_named(tmp_path: Path) -> None:
    cases = [
        (listed(tmp_path / "1", ".jsonl", [{"path": "x.png"}]), "has no texts, only path"),
        (listed(tmp_path / "2", ".csv", [{"label": "text"}]), "has no texts, only label"),
        (listed(tmp_path / "3", ".jsonl", []), "is empty"),
        (tmp_path / "*.parquet", "there are no texts"),
    ]
    for place, said in cases:
        with pytest.raises(SaccadeError, match=said):
            open_texts(place, 100)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Unreadable, match="No such file"):
        open_texts(tmp_path, 100)[0]
    lists = [([{"text": "a", "split": "train", "label": "x"}], "needs rows of train and of test")]
    lists += [([{"text": f"t{n}", "label": "x"} for n in range(30)], "fewer than two classes")]
    for rows, said in lists:
        with pytest.raises(SaccadeError, match=said):
            examined._read(listed(tmp_path / "e", ".jsonl", rows))
    listed(tmp_path / "half", ".csv", [{"text": "a", "label": "x"}], "train")
    with pytest.raises(SaccadeError, match="has no test/"):
        examined._read(tmp_path / "half")

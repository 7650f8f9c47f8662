"""Pictures with texts, from every place they may lie, and everything that may be wrong with a text."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from test_sources import plant, tar

from saccade.data import Sample, caption, collate, loader
from saccade.draws import Order
from saccade.errors import SaccadeError, Unreadable
from saccade.reading import described, survey
from saccade.sources import captions, open_source
from saccade.tokenizer import Tokenizer


def texts(source) -> list[tuple[str, ...]]:
    return [source[index].texts for index in range(len(source))]


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path):
    plant(tmp_path, {"a/x.png": 1, "a/x.txt": "a süß cat\n".encode(), "y.png": 2, "y.txt": b"\n", "z.png": 3})
    plant(tmp_path, {"lone.txt": b"nobody's", "a/.hidden.txt": b"no"})
    source = open_source(tmp_path, texts=True)
    assert source[0].texts == ("a süß cat",) and source[0].pixels is not None
    for index, reason in ((1, "its caption is empty"), (2, "it has no caption")):
        with pytest.raises(Unreadable, match=reason):
            source[index]
    assert list(source.orphans()) == ["lone.txt"]
    assert texts(open_source(tmp_path)) == [(), (), ()], "texts are read where they are asked for"
    before = source.content(0)
    (tmp_path / "a" / "x.txt").write_text("another")
    assert source.content(0) != before, "the fingerprint of the data covers texts"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", 'path,caption,group\nx.png,"a, b",p\ny.png,c,q\n'),
        ("l.tsv", "caption\tpath\tgroup\na, b\tx.png\tp\nc\ty.png\tq\n"),
        ("l.csv", "image,caption,group\nx.png,\"a, b\",p\ny.png,c,q\n"),
        ("l.jsonl", '{"file": "x.png", "caption": "a, b", "group": "p"}\n\n{"file": "y.png", "text": "no", "caption": "c", "group": "q"}\n'),  # noqa: E501
    ],
)  # fmt: skip
def test_lists(tmp_path, name, content):
    plant(tmp_path, {"x.png": 1, "y.png": 2})
    (tmp_path / name).write_text(content)
    source = open_source(tmp_path / name, texts=True)
    assert texts(source) == [("a, b",), ("c",)]
    assert [source.group(index) for index in range(2)] == ["p", "q"], "groups are those of the list"
    assert texts(open_source(tmp_path / name)) == [(), ()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", "path,caption\nx.png,a\ny.png,c\nx.png,b\n"),
        ("l.csv", "path,caption_1,caption_2\nx.png,a,b\ny.png,c,\n"),
        ("l.jsonl", '{"path": "x.png", "captions": ["a", "b"]}\n{"path": "y.png", "captions": ["c"]}\n'),
    ],
)
def test_several_captions(tmp_path, name, content):
    plant(tmp_path, {"x.png": 1, "y.png": 2})
    (tmp_path / name).write_text(content)
    assert texts(open_source(tmp_path / name, texts=True)) == [("a", "b"), ("c",)]


def test_shards_in_the_layout_of_webdataset(tmp_path):
    files = {"0.png": 1, "0.txt": b"a cat", "1.png": 2, "1.json": json.dumps({"caption": "a dog"}).encode()}
    path = tar(tmp_path / "s.tar", {**files, "2.png": 3, "3.txt": b"no picture"})
    source = open_source(path, texts=True)
    assert source[0].texts == ("a cat",) and source[1].texts == ("a dog",)
    with pytest.raises(Unreadable, match="it has no caption"):
        source[2]
    assert list(source.orphans()) == ["s.tar/3.txt"]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    plant(tmp_path, {"x.png": 1, "y.png": 2})
    table = arrow.table({"path": ["x.png", "y.png"], "captions": [["a", "b"], ["c"]]})
    parquet.write_table(table, tmp_path / "l.parquet")
    assert texts(open_source(tmp_path / "l.parquet", texts=True)) == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("files", "data", "error"),
    [
        ({"l.csv": b"path,age\nx.png,4\n", "x.png": 1}, "l.csv", "has no captions, only paths, age"),
        ({"l.jsonl": b"{\n", "x.png": 1}, "l.jsonl", "line 1 of .* is no JSON"),
        ({"l.jsonl": b"[1]\n", "x.png": 1}, "l.jsonl", "line 1 of .* holds no JSON object"),
        ({"l.jsonl": b"\n", "x.png": 1}, "l.jsonl", "is empty"),
    ],
)
def test_errors_of_lists(tmp_path, files, data, error):
    plant(tmp_path, files)
    with pytest.raises(SaccadeError, match=error):
        open_source(tmp_path / data, texts=True)


@pytest.mark.parametrize(
    ("data", "text", "faults"),
    [
        ("süß".encode(), "süß", []),
        (b"\xef\xbb\xbfs\xc3\xbc", "sü", []),
        ("süß".encode("utf-16"), "süß", ["utf-16-le"]),
        ("süß".encode("latin-1"), "süß", ["latin-1"]),
        (b" \n", None, ["empty"]),
        (b"a\0b", "a b", []),
        (b"word " * 2_000_001, ("word " * 2000).strip()[: captions.LIMIT], ["over-long"]),
        (b"x" + "ü".encode() * 5_000_000, "x" + "ü" * (captions.LIMIT - 1), ["over-long"]),
    ],
)
def test_texts_of_every_kind(data, text, faults):
    found, noted = captions.cleaned([data])
    assert [part.strip() for part in found] == ([] if text is None else [text]) and noted == faults
    assert captions.cleaned([]) == ((), ["missing"])


def test_every_text_is_seen_equally_often_and_in_another_order_each_time():
    sample = Sample("k", texts=tuple("abcde"))
    rounds = ["".join(caption(sample, 5 * turn + visit) for visit in range(5)) for turn in range(40)]
    assert all(sorted(turn) == list("abcde") for turn in rounds) and len(set(rounds)) > 20
    assert Counter(turn[0] for turn in rounds).most_common()[-1][1] >= 2, "none is always late"
    assert caption(sample, 3, seed=1) == caption(sample, 3, seed=1)
    assert [caption(sample, v, seed=1) for v in range(40)] != [caption(sample, v) for v in range(40)]
    assert caption(sample, -7) in sample.texts, "a replacement's visits are negative"


def test_workers_tokenise_what_one_process_would(tmp_path):
    plant(tmp_path, {f"{n}.png": n for n in range(6)})
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps({"path": f"{n}.png", "captions": [f"red {n}", f"blue {n}"]}) + "\n" for n in range(6))
    )
    source = open_source(tmp_path / "l.jsonl", texts=True)
    tokenizer = Tokenizer.train(["red blue"], 600)

    def batches(workers: int, first: int = 0) -> list[list[list[int]]]:
        steps = loader(source, Order([6]), first_step=first, last_step=4, batch=3, workers=workers,
                       tokenize=lambda some: tokenizer.encode(some, 8).tokens)  # fmt: skip
        return [delivery.batch["text"].tolist() for delivery in steps]

    once = batches(0)
    assert once == batches(1) and once[2:] == batches(0, first=2)
    assert len({str(row) for step in once for row in step}) == 12, "the second pass shows the other captions"


def test_texts_that_are_the_same_have_one_key():
    samples = [Sample("a", texts=("A cat",)), Sample("b", texts=("a  CAT",)), Sample("c", texts=("a dog",))]
    keys = collate(samples)["text_key"]
    assert keys[0] == keys[1] != keys[2]


def test_a_survey_names_and_counts_all_that_is_wrong(tmp_path):
    plant(tmp_path, {f"{n}.png": n for n in range(8)})
    plant(tmp_path, {"0.txt": b"a cat", "1.txt": b"A  cat", "2.txt": b"", "3.txt": "größe".encode("latin-1")})
    plant(tmp_path, {"4.txt": b"word " * 2_200_000, "5.txt": b"one two three four five six", "9.txt": b"lone"})
    plant(tmp_path, {"7.txt": b"fine"})
    source = open_source(tmp_path, texts=True)
    found = survey(source, Tokenizer.train(["one two three four five six cat"], 600), 6)
    expected = {"cut", "duplicate", "empty", "latin-1", "missing", "over-long", "without a picture"}
    assert found["faults"].keys() == expected
    assert (found["samples"], found["with_texts"], found["texts"]) == (8, 6, 6)
    assert {name: found["first"][name] for name in expected - {"cut"}} == {
        "duplicate": ["1.png"], "empty": ["2.png"], "latin-1": ["3.png"], "missing": ["6.png"],
        "over-long": ["4.png"], "without a picture": ["9.txt"],
    }  # fmt: skip
    assert {"4.png", "5.png"} <= set(found["first"]["cut"])
    assert "1 missing (6.png)" in described(found)

"""Folders, lists, shards and mixtures: keys, labels, groups, errors that name the way out, shared pages."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing
from PIL import Image

from saccade.errors import SaccadeError, Unreadable
from saccade.sources import Mixture, open_source, shards
from saccade.sources.strings import Strings


def picture(value: int = 0, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def plant(root: Path, files: dict[str, bytes | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(content) if isinstance(content, int) else content)
    return root


def tar(path: Path, files: dict[str, bytes | int]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = picture(content) if isinstance(content, int) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def keys(source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def value(source, index: int) -> int:
    return int(source[index].pixels.float().mean())


def test_folder(tmp_path):
    plant(tmp_path, {"b/y.PNG": 2, "b/x.png": 1, "a/deep/z.png": 3, "top.png": 4, ".hidden/h.png": 5, "b/.h.png": 6})
    plant(tmp_path, {"b/readme.md": b"no picture", "b/spaces and ünïcödé 图片.png": 7})
    source = open_source(tmp_path)
    assert keys(source) == ["a/deep/z.png", "b/spaces and ünïcödé 图片.png", "b/x.png", "b/y.PNG", "top.png"]
    assert [value(source, index) for index in range(5)] == [3, 7, 1, 2, 4]
    assert [source.label(index) for index in range(5)] == ["deep", "b", "b", "b", None]
    sample = source[2]
    assert (sample.key, sample.label, sample.group, sample.source) == ("b/x.png", "b", None, str(tmp_path))
    assert sample.pixels.shape == (1, 3, 8, 8)
    assert source.content(2) == picture(1) and source.size(2) == len(picture(1))
    assert open_source(str(tmp_path), channels=1)[0].pixels.shape == (1, 1, 8, 8)
    assert open_source(tmp_path, short_side=4)[0].pixels.shape == (1, 3, 4, 4)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    plant(tmp_path, {name: 9})
    source = open_source(tmp_path)
    assert source.key(0) == name and value(source, 0) == 9


def test_links_are_followed_but_not_in_circles(tmp_path):
    plant(tmp_path, {"pool/x.png": 1})
    (tmp_path / "data" / "cats").mkdir(parents=True)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "pool")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "pool")
    (tmp_path / "data" / "cats" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(tmp_path / "data")
    assert keys(source) == ["again/x.png", "gone.png", "more/x.png"]
    with pytest.raises(Unreadable, match="No such file"):
        source[1]


def test_what_is_no_file_never_blocks(tmp_path):
    plant(tmp_path, {"a.png": 1})
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(tmp_path)
    with pytest.raises(Unreadable, match="not a regular file") as caught:
        source[1]
    assert caught.value.key == "pipe.png"


def test_groups(tmp_path):
    plant(tmp_path, {"a/C12_x.png": 1, "a/C12_y.png": 1, "b/C7_z.png": 1, "b/none.png": 1})
    source = open_source(tmp_path, group_by=r"(C\d+)")
    assert [source.group(index) for index in range(4)] == ["C12", "C12", "C7", None]
    other = dataclasses.replace(source, group_by="[a-z]/")
    assert other.group(0) == "a/" and other[0].group == "a/"
    with pytest.raises(SaccadeError, match="not a regular expression"):
        open_source(tmp_path, group_by="(")


def test_text_list(tmp_path):
    plant(tmp_path, {"cats/x.png": 1, "y.png": 2})
    far = plant(tmp_path / "far", {"z.png": 3}) / "z.png"
    (tmp_path / "list.txt").write_bytes(f"y.png\r\n\n./cats/x.png\n{far}\n".encode())
    source = open_source(tmp_path / "list.txt")
    assert keys(source) == ["y.png", "cats/x.png", str(far)]
    assert [value(source, index) for index in range(3)] == [2, 1, 3]
    assert [source.label(index) for index in range(3)] == [None, "cats", "far"]


def test_csv_list(tmp_path):
    plant(tmp_path, {"x.png": 1, "y, z.png": 2})
    (tmp_path / "list.csv").write_text('label,path,group,age\ncat,x.png,p1,3\n,"y, z.png",p2,4\n')
    source = open_source(tmp_path / "list.csv")
    assert keys(source) == ["x.png", "y, z.png"]
    assert [source.label(index) for index in (0, 1)] == ["cat", None]
    assert [source.group(index) for index in (0, 1)] == ["p1", "p2"]
    assert source[1].metadata == {"age": "4"} and value(source, 1) == 2
    assert dataclasses.replace(source, group_by="([xy])").group(1) == "y"


@pytest.fixture
def shard(tmp_path):
    files = {"cats/1.png": 1, "cats/1.txt": b"a cat\n", "cats/1.cls": b"7", "cats/2.png": 2, "3.jpg.png": 3}
    meta = json.dumps({"label": "dog", "group": "g", "age": 3}).encode()
    return tar(tmp_path / "s.tar", {**files, "3.jpg.json": meta, "._4.png": 4, "notes.md": b"x"})


def test_shards(shard):
    source = open_source(shard)
    assert keys(source) == ["s.tar/cats/1.png", "s.tar/cats/2.png", "s.tar/3.jpg.png"]
    assert [value(source, index) for index in range(3)] == [1, 2, 3]
    assert [source.label(index) for index in range(3)] == ["7", "cats", "dog"]
    assert [source[index].texts for index in range(3)] == [(), (), ()]
    assert open_source(shard, texts=True)[0].texts == ("a cat",)
    assert source.group(2) == "g" and source[2].metadata["age"] == 3 and source.origin(0) == str(shard)
    assert source.content(1) == picture(2) and source.size(1) == len(picture(2))


def test_several_shards(tmp_path):
    tar(tmp_path / "0.tar", {"a.png": 1, "b.png": 2})
    tar(tmp_path / "1.tar", {"a.png": 3})
    for source in (open_source(tmp_path), open_source(str(tmp_path / "*.tar"))):
        assert keys(source) == ["0.tar/a.png", "0.tar/b.png", "1.tar/a.png"]
        assert [value(source, index) for index in range(3)] == [1, 2, 3]
        assert source.origin(2).endswith("1.tar")


def test_the_index_is_made_once_and_again_when_the_tar_changes(shard, monkeypatch):
    open_source(shard)
    assert not (shard.parent / ".s.tar.index").exists(), "made in no time: not worth a file"
    monkeypatch.setattr(shards, "_WORTH_KEEPING", 0)
    open_source(shard)
    assert (shard.parent / ".s.tar.index").exists()
    made = []
    make = shards._make_index
    monkeypatch.setattr(shards, "_make_index", lambda path: made.append(path) or make(path))
    assert len(open_source(shard)) == 3 and made == []
    tar(shard, {"a.png": 1, "b.png": 2})
    assert keys(open_source(shard)) == ["s.tar/a.png", "s.tar/b.png"] and made == [shard]
    (shard.parent / ".s.tar.index").write_bytes(b"damaged")
    assert len(open_source(shard)) == 2 and len(made) == 2


def test_a_read_only_folder_sends_the_index_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_WORTH_KEEPING", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = tar(tmp_path / "data" / "s.tar", {"a.png": 1})
    path.parent.chmod(0o555)
    try:
        open_source(path)
        assert os.listdir(path.parent) == ["s.tar"]
        assert len(os.listdir(tmp_path / "cache" / "saccade")) == 1
        monkeypatch.setattr(shards, "_make_index", lambda path: pytest.fail("made again"))
        assert len(open_source(path)) == 1
    finally:
        path.parent.chmod(0o755)


def test_mixture(tmp_path):
    one, two = plant(tmp_path / "one", {"a/x.png": 1, "a/y.png": 2}), plant(tmp_path / "two", {"x.png": 3})
    (two / "bad.png").write_bytes(b"")
    source = open_source([one, two], weights=[3.0, 1.0])
    assert isinstance(source, Mixture) and len(source) == 4
    assert keys(source) == ["one/a/x.png", "one/a/y.png", "two/bad.png", "two/x.png"]
    assert source.parts() == ([2, 2], [3.0, 1.0])
    assert value(source, 3) == 3 and source[3].key == "two/x.png" and source.label(0) == "a"
    assert source.origin(3) == str(two) and source.content(3) == picture(3) and source.size(3) == len(picture(3))
    with pytest.raises(Unreadable, match="empty") as caught:
        source[2]
    assert caught.value.key == "two/bad.png"
    assert open_source([one]).parts() == ([2], None) and open_source([one, two]).parts() == ([2, 2], None)
    assert keys(open_source([one, one]))[::2] == ["one#0/a/x.png", "one#1/a/x.png"]
    assert open_source(source) is source


@pytest.mark.parametrize(
    ("files", "data", "error", "hint"),
    [
        ({"pictures/x.png": 1}, "picturs", "there is no folder or file", "did you mean .*pictures"),
        ({"pictures/x.png": 1}, "elsewhere/deep", "there is no folder or file", "exists and has no elsewhere"),
        ({"d/x.ppm": b"", "d/y.ppm": b"", "d/LICENSE": b""}, "d", "there are no pictures in", "2 .ppm, 1 without"),
        ({"d/.x.png": 1}, "d", "there are no pictures in", "no files that are not hidden"),
        ({"x.png": 1}, "x.png", "is one picture", "name its folder"),
        ({"x.bin": b""}, "x.bin", "neither a list nor a tar", "name a folder"),
        ({"l.txt": b"\n\n"}, "l.txt", "names no pictures", "one path a line"),
        ({"l.txt": b"a.png\n"}, "l.txt", "names files that do not exist, first 'a.png'", "relative to"),
        ({"l.csv": b"files,label\nx.png,1\n"}, "l.csv", "has no column `path`, only files, label", "rename"),
        ({"l.csv": b""}, "l.csv", "is empty", "names the columns"),
        ({"l.csv": b"path,label\nx.png\n"}, "l.csv", "line 2 of .* has 1 cells", ""),
        ({"s.tar": b"\x1f\x8b" + bytes(600)}, "s.tar", "cannot read the tar", "compressed"),
        ({"s.tar": b"nonsense" * 100}, "s.tar", "cannot read the tar", "damaged or cut"),
        ({}, "gs://bucket/folder", "local files only", r"saccade\[cloud\]"),
        ({"x.png": 1}, "*.png", "a pattern names tar shards", ".tar"),
        ({}, "none*.tar", "nothing matches", ""),
    ],
)
def test_errors_name_the_thing_and_the_way_out(tmp_path, monkeypatch, files, data, error, hint):
    plant(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaccadeError, match=error) as caught:
        open_source(data)
    assert re.search(hint, caught.value.hint or "")
    assert "\n" not in str(caught.value)


def test_more_errors(tmp_path):
    plant(tmp_path, {"x.png": 1})
    with pytest.raises(SaccadeError, match="no pictures in the tar"):
        open_source(tar(tmp_path / "s.tar", {"a.txt": b"x"}))
    whole = tar(tmp_path / "t.tar", {"a.png": 1, "b.png": 2}).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: 512 + 512 + 512 + 10])
    with pytest.raises(SaccadeError, match="cannot read the tar"):
        open_source(tmp_path / "t.tar")
    for options in ({"weights": [1.0, 2.0]}, {"weights": [0.0]}, {"channels": 4}):
        with pytest.raises(SaccadeError):
            open_source(tmp_path, **options)
    with pytest.raises(SaccadeError, match="no data"):
        open_source([])


def test_strings():
    values = ["", "a", "ünï", os.fsdecode(b"\xff\xfe"), "x" * 1000, "line\nbreak"]
    strings = Strings(values)
    assert list(strings) == values and strings[-1] == values[-1] and len(strings) == 6
    assert list(pickle.loads(pickle.dumps(strings))) == values
    with pytest.raises(IndexError):
        strings[6]


def test_a_folder_keeps_no_object_a_path(tmp_path):
    for number in range(2000):
        (tmp_path / f"{number}.png").touch()
    gc.collect()
    before = len(gc.get_objects())
    source = open_source(tmp_path)
    gc.collect()
    assert len(gc.get_objects()) - before < 200 and len(source) == 2000


def _answer(queue, source):
    blob = source.keys._blob
    with open("/proc/self/maps") as maps:
        address = blob.__array_interface__["data"][0]
        line = next(m for m in maps if int(m.split("-")[0], 16) <= address < int(m.split("-")[1].split()[0], 16))
    queue.put((source.key(1), " rw-s " in line))


def test_a_spawned_worker_shares_the_paths(tmp_path):
    plant(tmp_path, {"a.png": 1, "b.png": 2})
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(queue, open_source(tmp_path)))
    process.start()
    assert queue.get(timeout=60) == ("b.png", True)
    process.join()

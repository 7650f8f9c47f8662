"""Embedding: right rows, stopped anywhere and gone on with to the same bytes, refused when anything else changed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import vit, weights
from saccade.embed import embed
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.search import Index

page = importlib.import_module("saccade.embed")  # the name `saccade.embed` is the verb


def folder(root: Path, count: int) -> Path:
    root.mkdir()
    generator = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(generator.integers(0, 256, (18, 20, 3), np.uint8)).save(root / f"{n:03}.png")
    return root


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = vit.build("vit-ti/4", image_size=16, width=16, depth=2, heads=2, hidden=32)
    weights.save_backbone(tmp_path / "backbone", model, {"licence": "CC0-1.0"})
    return tmp_path / "backbone"


def contents(place: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in place.iterdir()}
    state = json.loads(found["index.json"])
    return found | {"index.json": json.dumps(state | {"command": ""}).encode()}


def test_rows_are_what_the_encoder_says(tmp_path: Path, backbone: Path) -> None:
    data = folder(tmp_path / "data", 10)
    (data / "003.png").write_bytes(b"no picture")
    index = embed(backbone, data, out=tmp_path / "index", tokens=("cls", "mean", "patches"), batch=4)
    encoder = weights.load(backbone)
    with torch.inference_mode():
        features = encoder(encoder.preprocess(data / "007.png")[None])
    for token, expected in (("cls", features.cls), ("mean", features.patches.mean(1)), ("patches", features.patches)):
        assert expected is not None
        np.testing.assert_allclose(index.vectors(token)[7], expected[0], rtol=1e-5, atol=1e-5)
        assert index.vectors(token).dtype == np.float32 and not index.vectors(token)[3].any()
    assert index.keys[7] == "007.png"
    summary = index.summary()
    assert summary.keys() == {"index", "image_size", "count", "dim", "tokens", "images_per_second", "quarantined"}
    assert (summary["count"], summary["dim"], summary["quarantined"]) == (9, 16, 1)
    assert json.loads((tmp_path / "index" / "quarantine.jsonl").read_text())["key"] == "003.png"
    assert (
        embed(backbone, data, out=tmp_path / "index", tokens=("cls", "mean", "patches"), batch=4).images_per_second
        is None
    )


@pytest.mark.parametrize(("tokens", "computed"), [(("cls",), "cls"), (("mean",), "patches"), (("mean", "cls"), "all")])
def test_only_what_is_asked_for_is_computed(
    tmp_path: Path, backbone: Path, tokens: tuple[str, ...], computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, forward = [], vit.ViT.forward
    monkeypatch.setattr(
        vit.ViT, "forward", lambda *a, tokens="all", **k: asked.append(tokens) or forward(*a, tokens=tokens, **k)
    )
    embed(backbone, folder(tmp_path / "data", 3), out=tmp_path / "index", tokens=tokens)
    assert asked == [computed]


def test_every_thread_computes_pictures_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen, forward = torch.get_num_threads(), [], vit.ViT.forward

    def watched(model: vit.ViT, images: torch.Tensor, **switches: str) -> vit.Features:
        seen.append((threading.get_ident(), torch.get_num_threads(), len(images)))
        time.sleep(0.05)
        return forward(model, images, **switches)

    model = vit.build("vit-ti/4", image_size=64, width=64, depth=2, heads=2, hidden=32)
    encoder = Encoder(model, {})
    images = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        expected = encoder.eval()(images)
    monkeypatch.setattr(vit.ViT, "forward", watched)
    torch.set_num_threads(2)
    try:
        with page.examining(encoder) as look:
            found, only = look(images), look(images[:4], tokens="cls")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sorted(row[1:] for row in seen) == [(1, 2), (1, 2), (1, 2), (1, 3)]
    assert len({ident for ident, *_ in seen}) == 2 and threading.get_ident() not in {row[0] for row in seen}
    torch.testing.assert_close(found[:4], expected[:4], atol=1e-5, rtol=1e-5)  # 256 tokens: also attention's other way
    torch.testing.assert_close(only.cls, expected.cls[:4], atol=1e-5, rtol=1e-5)
    assert found.grid == expected.grid


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_stopped_between_any_batches_it_ends_with_the_same_bytes(
    tmp_path: Path, backbone: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(tmp_path / "data", 23)
    for bad in (2, 9, 22):
        (data / f"{bad:03}.png").write_bytes(b"no picture")
    embed(backbone, data, out=tmp_path / "whole", batch=4)
    monkeypatch.setattr(
        page, "_SAVE_SECONDS", 0 if after % 2 else 1e9
    )  # every batch reaches the disk, or none is counted
    pooled, calls = page.pooled, 0

    def stopping(features: vit.Features, token: str) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return pooled(features, token)

    monkeypatch.setattr(page, "pooled", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(backbone, data, out=tmp_path / "parts", batch=4)
    with pytest.raises(SaccadeError, match=r"not finished: .*saccade embed"):
        Index.open(tmp_path / "parts")
    monkeypatch.setattr(page, "pooled", pooled)
    embed(backbone, data, out=tmp_path / "parts", batch=4)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


SLOW = """
import importlib, sys, time
page = importlib.import_module("saccade.embed")
page._SAVE_SECONDS = 0.02
pooled = page.pooled
def slowly(features, token):
    time.sleep(0.05)
    return pooled(features, token)
page.pooled = slowly
page.embed(*sys.argv[1:3], out=sys.argv[3], batch=2)
"""


def test_killed_it_goes_on(tmp_path: Path, backbone: Path) -> None:
    data, out = folder(tmp_path / "data", 80), tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(backbone), str(data), str(out)], env=dict(os.environ))
    try:
        for _ in range(600):
            time.sleep(0.05)
            if (out / "index.json").exists() and json.loads((out / "index.json").read_text())["rows"] > 4:
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = json.loads((out / "index.json").read_text())
    assert 4 < state["rows"] < 80
    embed(backbone, data, out=out, batch=2)
    embed(backbone, data, out=tmp_path / "whole", batch=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_has_changed_is_refused(tmp_path: Path, backbone: Path) -> None:
    data = folder(tmp_path / "data", 5)
    embed(backbone, data, out=tmp_path / "index")
    with pytest.raises(SaccadeError, match="other tokens"):
        embed(backbone, data, out=tmp_path / "index", tokens=("mean",))
    with pytest.raises(SaccadeError, match="another batch"):
        embed(backbone, data, out=tmp_path / "index", batch=3)
    weights.save_backbone(
        tmp_path / "other", vit.build("vit-ti/4", image_size=16, width=16, depth=2, heads=2, hidden=32), {}
    )
    with pytest.raises(SaccadeError, match="another backbone"):
        embed(tmp_path / "other", data, out=tmp_path / "index")
    (data / "001.png").write_bytes((data / "002.png").read_bytes())
    with pytest.raises(SaccadeError, match="other data"):
        embed(backbone, data, out=tmp_path / "index")
    with pytest.raises(SaccadeError, match="not an index"):
        embed(backbone, data, out=data)


def test_wrong_tokens(tmp_path: Path, backbone: Path) -> None:
    data = folder(tmp_path / "data", 2)
    with pytest.raises(SaccadeError, match="did you mean 'mean'"):
        embed(backbone, data, out=tmp_path / "index", tokens=("meen",))
    headless = vit.build("vit-ti/4", image_size=16, width=16, depth=1, heads=2, hidden=32, cls=False, pooling="mean")
    weights.save_backbone(tmp_path / "headless", headless, {})
    with pytest.raises(SaccadeError, match=r"no class token.*--tokens mean"):
        embed(tmp_path / "headless", data, out=tmp_path / "index", tokens=("cls",))
    whole = embed(tmp_path / "headless", data, out=tmp_path / "index").summary()
    assert (whole["count"], whole["tokens"]) == (2, ["mean"])
    for path in data.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(SaccadeError, match="none of the pictures"):
        embed(backbone, data, out=tmp_path / "nothing")


def test_workers_change_nothing(tmp_path: Path, backbone: Path) -> None:
    data = folder(tmp_path / "data", 9)
    (data / "004.png").write_bytes(b"no picture")
    for workers in (0, 2):
        embed(backbone, data, out=tmp_path / str(workers), workers=workers, batch=4)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")

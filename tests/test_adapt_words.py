"""Going on from a start that knows words: they hold it, the gate asks for them, and they are handed over with it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_published_clip import _saved
from test_published_text import _model
from test_tokenizer import _clip_files
from toys.sources import Pictures

from saccade import adapt, load, pretrain
from saccade.anchor import Anchored, Told, anchored
from saccade.draws import Draws
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate import gate
from saccade.model import build
from saccade.recipe import configure
from saccade.settings import AdaptArguments

page_of_adapt = importlib.import_module("saccade.adapt")
QUICK: dict[str, Any] = {
    "image_size": 32, "arch": "vit-ti/8", "steps": 6, "batch": 8, "local_crops": 0, "prototypes": 32, "hidden": 16,
    "workers": 0, "log_every": 1, "lr": 0.05, "warm": 0.2, "looks": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' CLIP, drawn at random, with a tokenizer."""
    torch.manual_seed(0)
    files = _clip_files(tmp_path_factory.mktemp("start") / "clip")
    return _saved(_model("clip", vocab_size=521, eos_token_id=520, max_position_embeddings=40), files)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for number in range(60):
        place = folder / ("cat" if number % 2 else "photo")
        place.mkdir(exist_ok=True)
        pixels = random.integers(0, 156, (32, 32, 3)) + 100 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return folder


def heard(start: Encoder, **asked: Any) -> tuple[Anchored, Any, dict[str, Any]]:
    """The method that goes on from it, a batch of views, and the words it is held to."""
    arguments = AdaptArguments(data=("x",), start="x", out="x", warm=0.0, **asked)
    told = page_of_adapt._told(start, arguments)
    page, config = configure("dino", {name: QUICK[name] for name in QUICK if name not in ("workers", "log_every",
                             "warm", "looks")})  # fmt: skip
    page = anchored(page, arguments, start, told)
    method, _ = build(page, config, start.record["path"])
    pixels = torch.randint(0, 256, (8, 1, 3, 34, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    number = torch.arange(8)
    batch = {"pixels": pixels, "size": torch.tensor([pixels.shape[-2:]] * 8), "key": number, "seen": number,
             "place": number}  # fmt: skip
    views = page.views(config, batch, Draws(0, 0, number, number, number))
    assert isinstance(method, Anchored)
    return method, views, {"told": told}


def test_words_hold_the_pictures_that_they_fit(clip: Path) -> None:
    start = load(clip)
    method, views, found = heard(start)
    told = found["told"]
    assert told.words.shape == (len(page_of_adapt.WORDS), 16) and torch.allclose(told.words.norm(dim=1), torch.ones(40))
    metrics = method(views, torch.tensor(0.5))[1]
    assert metrics["anchor_text"].abs() < 1e-6  # it has not moved
    network = method._trained[0]
    with torch.no_grad():
        network.norm.weight += 0.3 * torch.randn(len(network.norm.weight), generator=torch.Generator().manual_seed(1))
    metrics = method(views, torch.tensor(0.5))[1]
    with torch.no_grad():
        images = views["anchored"]
        now, before = (
            start.text.logits(start.text.images(net.embedding(net(images))), told.words)
            for net in (network, start.backbone)
        )
        wanted = torch.nn.functional.kl_div(
            now.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"
        )
    assert metrics["anchor_text"] == pytest.approx(wanted.item(), rel=1e-4) and wanted > 1e-3
    light, _, _ = heard(start, anchor_text=0.0)
    assert light._anchors() == ["anchor_token", "anchor_patches"]
    assert "_words" not in method.state_dict() and "_way" not in method.state_dict()


def test_the_text_tower_is_handed_over_and_the_gate_asks_for_words(clip: Path, labelled: Path, tmp_path: Path) -> None:
    run = adapt(Pictures(16), start=clip, out=tmp_path / "run", eval=str(labelled), recipe="dino", **QUICK)
    assert [entry["anchor_text"] > 0 for entry in run.metrics()][-1]
    start, ours = load(clip), load(run.path)
    words = ["a photo of a cat", "it is"]
    assert torch.equal(ours.text(words), start.text(words))
    zero_shot = run.summary["gate"].get("zero_shot")
    moved = run.record["best"] is not None and not run.record["best"]["warming"]
    assert (zero_shot is not None) == moved
    if moved:
        assert 0 <= zero_shot["before"] <= 100 and "zero-shot" in (run.path / "report.html").read_text()


def test_a_candidate_that_words_no_longer_fit_is_refused() -> None:
    names = [str(n) for n in range(100)]
    half, all_right, none = (np.arange(100) % 2 == 0), np.ones(100, bool), np.zeros(100, bool)
    passed = gate.judge(half, all_right, names)
    assert passed["passed"]
    kept = gate.held(passed, half, half, names)
    assert kept["passed"] and kept["zero_shot"] == {"before": 50.0, "after": 50.0, "difference": 0.0}
    lost = gate.held(passed, half, none, names)
    assert not lost["passed"] and "words fit worse" in lost["reason"] and lost["zero_shot"]["difference"] == -50.0
    assert passed["passed"], "the verdict that came in is as it was"
    refused = gate.held(gate.judge(half, half, names), half, none, names)
    assert refused["passed"] is False and "words" not in refused["reason"]


def test_without_a_tokenizer_words_hold_nothing(clip: Path) -> None:
    start = load(clip)
    start.text.tokenizer = None
    assert page_of_adapt._told(start, AdaptArguments(data=("x",), start="x", out="x")) is None
    with pytest.raises(SaccadeError, match="has no tokenizer"):
        start.text(["a cat"])


def test_classes_are_the_words_where_there_are_labels(clip: Path, labelled: Path) -> None:
    start = load(clip)
    told = page_of_adapt._told(start, AdaptArguments(data=("x",), start="x", out="x", eval=str(labelled)))
    assert isinstance(told, Told) and told.words.shape == (2, 16)


def test_a_run_without_words_has_none(tmp_path: Path) -> None:
    small = {name: QUICK[name] for name in QUICK if name not in ("warm", "looks")} | {"steps": 2, "lr": 1e-3}
    pretrain(Pictures(16), recipe="dino", out=tmp_path / "start", **small)
    run = adapt(Pictures(16), start=tmp_path / "start", out=tmp_path / "run", **QUICK)
    assert load(run.path).text is None and "anchor_text" not in run.metrics()[-1]

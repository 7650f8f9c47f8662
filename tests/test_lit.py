"""A locked image tower: it stays as it is, says what it is, and is looked at no more than it must be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import small, start
from toys.sources import Pairs

import saccade
from saccade import augment, pair_losses, recipe, weights
from saccade.draws import Draws
from saccade.encoder import Preprocess
from saccade.errors import SaccadeError
from saccade.frozen import Memory
from saccade.model import Model, build
from saccade.recipes import lit
from saccade.run import Run
from saccade.tensors import read_tensors

PARTS = {"sigmoid": "sigmoid", "softmax": "contrast"}


def trained(out: Path, **settings: Any) -> Run:
    run = {**small("lit"), "log_every": 1, **settings}
    return saccade.pretrain(Pairs(16), recipe="lit", out=out, workers=0, **run)


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics()]


@pytest.mark.parametrize("case", ["lit", "lit-on-a-convnet"])
def test_what_comes_out_is_the_start_with_words(case: str, tmp_path: Path) -> None:
    begun = Path(small(case)["init"])
    run = trained(tmp_path / "run", **small(case))
    before, after = (read_tensors(folder / "model.safetensors") for folder in (begun, run.path / "backbone"))
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])], "a locked tower moved"
    encoder = saccade.load(run.path)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        seen, texts = encoder.embedding(encoder(images)), encoder.text(["red wavy 3", "calm"])
        torch.testing.assert_close(encoder.pair(images), F.normalize(seen, dim=1))  # pictures are not projected
        assert encoder.logits(images, ["red wavy 3", "calm"]).shape == (3, 2)
    assert texts.shape == (2, seen.shape[1])


def test_only_texts_learn() -> None:
    page, config = recipe.configure("lit", {k: v for k, v in small("lit").items() if k != "init"})
    method, _ = build(page, config, None)
    batch = {
        "images": torch.rand(8, 3, 32, 32),
        "tokens": torch.randint(600, (8, 12)),
        "same": torch.arange(16).view(8, 2),
    }
    method(batch, torch.tensor(0.0))[0].backward()
    learning = {name.partition(".")[0] for name, one in method.named_parameters() if one.requires_grad}
    assert learning == {"pairing"}
    assert all(one.grad is None for one in method.encoder().parameters())
    assert not method.encoder().training


@pytest.mark.parametrize("kind", PARTS)
def test_the_loss_is_the_one_that_is_asked_for(kind: str) -> None:
    settings = {k: v for k, v in small("lit").items() if k != "init"} | {"loss": kind}
    page, config = recipe.configure("lit", settings)
    method, _ = build(page, config, None)
    pairs, same = torch.randn(8, 2, 192), torch.arange(16).view(8, 2)
    found, told = method.couple(pairs, torch.tensor(0.0), same=same)
    more = (torch.tensor(config.bias),) if kind == "sigmoid" else ()
    expected, _ = getattr(pair_losses, PARTS[kind])(pairs, torch.tensor(config.scale), *more, same)
    torch.testing.assert_close(found, expected)
    assert ("bias" in told) == (method.pairing.bias is not None) == (kind == "sigmoid")
    # of pairs that all fit alike, the offset being the one that is right for so many
    alike = torch.ones(8, 2, 192)
    if kind == "sigmoid":
        with torch.no_grad():
            method.pairing.bias.fill_(-config.scale - math.log(7))
    torch.testing.assert_close(method.couple(alike, torch.tensor(0.0), same=same)[0].item(), method.chance()["loss"])


def test_the_start_says_what_it_is_and_whose(tmp_path: Path) -> None:
    origin = {"family": "dinov2", "arch": "vit-s/14", "licence": "apache-2.0", "hash": "abc"}
    folder = tmp_path / "start"
    network = saccade.load(start("vit-ti/8")).backbone
    weights.save_backbone(folder, network, {"arch": "vit-ti/8", "derived_from": [origin]})
    settings = {name: value for name, value in small("lit").items() if name not in ("arch", "image_size")}
    run = saccade.pretrain(
        Pairs(16), recipe="lit", out=tmp_path / "run", workers=0, **{**settings, "init": str(folder), "steps": 1}
    )
    asked = run.config["settings"]
    assert (asked["arch"], asked["image_size"], asked["channels"]) == ("vit-ti/8", 32, 3)
    assert run.record["initial"]["hash"] == saccade.load(folder).record["hash"]
    assert saccade.load(run.path).record["derived_from"] == run.record["initial"]["derived_from"] == [origin]


def test_another_size_is_the_networks_own(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", image_size=48, steps=1)
    encoder = saccade.load(run.path)
    assert (encoder.preprocess.crop, encoder.grid) == (48, (6, 6))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match=r"needs one \[--init\]"):
        trained(tmp_path / "run", init=None)
    with pytest.raises(SaccadeError, match=r"is vit-ti/8 \[--arch\]"):
        trained(tmp_path / "run", arch="vit-s/16")
    with pytest.raises(SaccadeError, match=r"leaves the backbone as it is \[--recipe\]"):
        saccade.adapt(Pairs(16), start=start("vit-ti/8"), recipe="lit", out=tmp_path / "run")


def test_a_network_of_the_users_own_can_be_locked(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8))
    settings = {name: value for name, value in small("lit").items() if name not in ("arch", "init")}
    run = saccade.pretrain(Pairs(16), recipe="lit", network=module, out=tmp_path / "run", workers=0, **settings)
    after = saccade.load(run.path, network=module).backbone.module.state_dict()
    assert not [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, after[name])]


def test_training_sees_what_evaluation_sees() -> None:
    for side in (64, 224):
        config = lit.Config(image_size=side)
        assert config.canvas() == Preprocess.at(side).canvas
        pixels = (torch.rand(1, 1, 3, 30, 40).repeat_interleave(9, 3).repeat_interleave(9, 4) * 255).to(torch.uint8)
        batch = {
            "pixels": pixels,
            "size": torch.tensor([[270, 360]]),
            "key": torch.zeros(1),
            "text_key": torch.zeros(1),
        }
        draws = Draws(0, 0, *torch.zeros(3, 1, dtype=torch.int64))
        made = lit.views(config, batch | {"text": torch.zeros(1, 4)}, draws)["images"][0]
        assert (made - Preprocess.at(side)(pixels[0]).float() / 255).abs().max() < 2 / 255
    assert augment.resized_for(64) == 64


class Counted(nn.Module):
    """A backbone that counts how many pictures it has seen."""

    class config:
        width = 2

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def pooled(self, images: Tensor) -> Tensor:
        self.looks += len(images)
        return images.mean((2, 3))[:, :2]


def test_pictures_are_looked_at_once_and_no_more_than_fit_are_kept() -> None:
    backbone, images, keys = Counted(), torch.rand(6, 3, 4, 4), torch.tensor([7, 9, 7, 3, -1, 5])
    images[2] = images[0]
    expected = images.mean((2, 3))[:, :2]
    for room, after in ((1000, [5, 5, 5]), (3, [5, 7, 9]), (0, [6, 12, 18])):
        backbone.looks, memory = 0, Memory(backbone, room * 8 / 1e9)
        for looks in after:
            assert torch.equal(memory(images, keys, backbone), expected)
            assert backbone.looks == looks
        assert len(memory.rows) == min(room, 5)


def test_memory_changes_no_number(tmp_path: Path) -> None:
    with_it, without = (losses(trained(tmp_path / str(n), memory=n)) for n in (1.0, 0.0))
    torch.testing.assert_close(with_it, without, rtol=1e-5, atol=0)
    parts = losses(trained(tmp_path / "parts", accumulate=2))
    torch.testing.assert_close(parts, with_it, rtol=1e-5, atol=0)


def test_moments_are_of_the_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str] = []
    step = Model.step

    def looked(self: Model, *rest: Any) -> dict[str, Tensor]:
        held.extend(self.tensors())
        return step(self, *rest)

    monkeypatch.setattr(Model, "step", looked)
    trained(tmp_path / "run", steps=1)
    moments = [name for name in held if name.startswith("optimizer/")]
    assert moments
    assert not [name for name in moments if not name.startswith("optimizer/pairing.")]
    assert json.loads((tmp_path / "run" / "backbone" / "text" / "config.json").read_text())["text"]["projection"] == 192

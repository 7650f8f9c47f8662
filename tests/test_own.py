"""A network of the user's own: trained, stopped, loaded and used as the families are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toys.own_ranks import Plain, settings
from toys.sources import Pictures

import saccade
from saccade import Own, SaccadeError, backbone, model, recipe, weights
from saccade.own import OwnNetwork


class Map(nn.Module):
    """A convnet with batch norm and a padded last map."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, width, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x))


class Tokens(nn.Module):
    """Patches after `leading` tokens."""

    def __init__(self, leading: int = 1):
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.randn(1, leading, 12))
        self.mix = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).mT
        first = self.first + patches.mean(1, keepdim=True)
        return self.mix(torch.cat([first, patches], 1))


class Vector(nn.Module):
    """One vector and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Map()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x).mean((2, 3))


def build(module: nn.Module, side: int = 32, **more: Any) -> OwnNetwork:
    return Own(module, **more).build(side, 3)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher on disk."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    network = backbone.build("conv-3/8", image_size=32, blocks=(1, 1), widths=(16, 24))
    weights.save_backbone(folder, network, {"arch": "conv-3/8"})
    return str(folder)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures of two classes."""
    folder = tmp_path_factory.mktemp("labelled")
    source = Pictures(30)
    for n in range(30):
        place = folder / str(n % 2)
        place.mkdir(exist_ok=True)
        Image.fromarray(source[n].pixels[0].permute(1, 2, 0).numpy()).save(place / f"{n}.png")
    return folder


def train(out: Path, network: Any, taught: str | None = None, **more: Any) -> saccade.Run:
    settings: dict[str, Any] = {"recipe": "distil", "image_size": 32, "batch": 4, "steps": 4, "workers": 0}
    settings |= {"network": network, "out": out, "log_every": 1, "save_every": "2"} | more
    return saccade.pretrain(Pictures(8), **settings | ({"teacher": taught} if taught else {}))


def test_kind_width_and_grid_are_found_by_one_look() -> None:
    images = torch.rand(2, 3, 32, 32)
    for module, kind, cls, grid, stride in (
        (Map(), "map", False, (4, 4), 8),
        (Tokens(1), "tokens", True, (4, 4), 8),
        (Vector(), "vector", True, (0, 0), 32),
    ):
        network = build(module)
        config, seen = network.config, network.eval()(images)
        assert isinstance(network, backbone.Backbone) and isinstance(config, backbone.Config)
        assert (config.kind, config.cls, config.grid, config.width, network.stride) == (kind, cls, grid, 12, stride)
        assert seen.grid == grid and seen.patches.shape == (2, grid[0] * grid[1], 12)
        assert (seen.cls is not None) == cls and seen.positions.shape == (2, seen.patches.shape[1], 2)
        torch.testing.assert_close(network.pooled(images), network.embedding(seen))


def test_tokens_are_in_the_order_of_the_map_and_pictures_are_normalised() -> None:
    images = torch.rand(2, 3, 24, 40)
    plain = nn.Conv2d(3, 5, 8, 8)
    a, b = build(plain), build(_Flat(plain))
    one, two = a(images), b(images)
    assert one.grid == two.grid == (3, 5)
    torch.testing.assert_close(one.patches, two.patches)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    theirs = plain((images - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(one.patches, theirs.flatten(2).mT)
    raw = build(plain, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(
        raw((images * 255).round().byte()).patches, plain((images * 255).round() / 255).flatten(2).mT
    )


class _Flat(nn.Module):
    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x).flatten(2).mT


def test_leading_tokens_beyond_one_are_said() -> None:
    with pytest.raises(SaccadeError, match=r"patch tokens of Tokens fill no grid.*leading="):
        build(Tokens(3))
    seen = build(Tokens(3), leading=3)(torch.rand(2, 3, 32, 32))
    assert seen.cls is not None and seen.registers.shape == (2, 2, 12) and seen.grid == (4, 4)


def test_the_users_module_is_left_alone() -> None:
    module = Map().eval()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    network = build(module)
    network(torch.rand(4, 3, 32, 32))
    assert not module.training and network.module.training
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert network.module.stem[1].num_batches_tracked == 1, "the look through it was in evaluation"


class _Tied(Map):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.last


class _Several(Map):
    def forward(self, x: Tensor) -> Any:
        return [self.stem(x)]


def test_mistakes_say_what_is_wanted() -> None:
    with pytest.raises(SaccadeError, match=r"the class Map is not a network.*network=MyModule"):
        Own.of(Map)
    with pytest.raises(SaccadeError, match=r"_Several makes a list of pictures.*map \[B D h w\]"):
        build(_Several())
    with pytest.raises(SaccadeError, match=r"Map cannot look at pictures \[2 3 2 2\].*Kernel size"):
        build(Map(), 2)
    with pytest.raises(SaccadeError, match=r"last.weight and again.weight of _Tied are one tensor"):
        build(_Tied())
    with pytest.raises(SaccadeError, match="leave it out"):
        recipe.configure("distil", {"network": Map(), "arch": "vit-s/16"})
    with pytest.raises(SaccadeError, match=r"there is no architecture 'own/Map'.*network="):
        backbone.build("own/Map", image_size=32)
    for name, what in (("mae", "needs a ViT"), ("dinov2", "needs a ViT")):
        page, config = recipe.configure(name, {"network": Map(), "image_size": 32})
        with pytest.raises(SaccadeError, match=what):
            model.build(page, config, None)
    page, config = recipe.configure("simclr", {"network": Map(), "image_size": 32, "layer_decay": 0.5})
    with pytest.raises(SaccadeError, match="layers"):
        model.build(page, config, None)
    page, config = recipe.configure("dino", {"network": Map(), "image_size": 32, "local_size": 3, "prototypes": 16})
    with pytest.raises(SaccadeError, match=r"cannot look at pictures \[2 3 3 3\].*--local-size"):
        model.build(page, config, None)
    with pytest.raises(SaccadeError, match=r"begins with the weights it has.*--init"):
        model.build(page, config, "runs/other")


@pytest.mark.parametrize("module", [Map(), Tokens(), Vector()], ids=["map", "tokens", "vector"])
def test_distil_and_what_comes_out(
    module: nn.Module, taught: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(tmp_path / "run", module, taught, steps=2)
    kind = type(module)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    encoder = saccade.load(run.path, network=kind())
    assert encoder.record["arch"] == f"own/{kind.__name__}" and encoder.record["initial"]["weights"] == "given"
    assert not torch.equal(next(encoder.backbone.module.parameters()), next(module.parameters()))
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    logged = run.metrics()[-1]
    assert ("patch_loss" in logged) == (kind is not Vector) and logged["gradient_norm"] > 0
    index = saccade.embed(encoder, labelled, out=tmp_path / "index")
    assert len(index) == 30 and index.state["dim"] == 12
    hits = index.search(labelled / "0" / "0.png", k=2)
    assert Path(hits[0].key).name == "0.png"
    again = saccade.Index.open(tmp_path / "index", backbone=encoder)
    assert again.search(labelled / "0" / "0.png", k=1)[0].key == hits[0].key
    if kind is Map:
        scores = saccade.evaluate(encoder, labelled, tasks=("knn",))
        assert "untrained" not in scores["baselines"] and any("untrained" in said for said in scores["warnings"])


def test_it_is_said_how_to_load_it(taught: str, tmp_path: Path) -> None:
    run = train(tmp_path / "run", Map(), taught, steps=1)
    with pytest.raises(SaccadeError, match=r"of the class Map.*saccade.load\(…, network=Map\(\)\)"):
        saccade.load(run.path)
    with pytest.raises(
        SaccadeError, match=r"missing \(module.inside.*give the Map that it was made with|missing \(module.last"
    ):
        saccade.load(run.path, network=Vector())
    with pytest.raises(SaccadeError, match=r"reshaped \(module.last.bias \[12\] for \[16\]"):
        saccade.load(run.path, network=Map(16))
    with pytest.raises(SaccadeError, match=r"takes image_size alone"):
        saccade.load(run.path, network=Map(), channels=4)
    with pytest.raises(SaccadeError, match=r"is no network of your own"):
        saccade.load(taught, network=Map())
    larger = saccade.load(run.path, network=Map(), image_size=50)
    assert larger.grid == larger(torch.rand(1, 3, 50, 50)).grid == (6, 6)
    saved = json.loads((run.path / "backbone" / "config.json").read_text())["own"]
    assert saved["network"] == "Map" and saved["shapes"] == build(Map()).config.shapes != build(Map(16)).config.shapes


def stopped(monkeypatch: pytest.MonkeyPatch, out: Path, network: nn.Module, taught: str, at: int) -> None:
    """A run that is asked to stop after step `at`."""
    step = model.Model.step
    count = [0]

    def counting(*args: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model.Model, "step", counting)
        with pytest.raises(SaccadeError, match="stopped on request"):
            train(out, network, taught)


def test_a_run_that_was_stopped_ends_in_the_same_weights(
    taught: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    first, other = Map(), Map()
    whole = train(tmp_path / "whole", first, taught)
    stopped(monkeypatch, tmp_path / "cut", first, taught, 3)
    began = saccade.Run.open(tmp_path / "cut").record["initial"]
    with pytest.raises(SaccadeError, match=r"arch was own/Map, and is own/Vector now"):
        train(tmp_path / "cut", Vector(), taught)
    with pytest.raises(SaccadeError, match=r"of another architecture.*of another shape \(method/averages"):
        train(tmp_path / "cut", Map(16), taught)
    cut = train(tmp_path / "cut", other, taught)  # its weights do not matter: the checkpoint's stand
    assert cut.record["initial"] == began == whole.record["initial"]
    ours, theirs = (saccade.load(run.path, network=Map()).backbone.state_dict() for run in (whole, cut))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    fresh = train(tmp_path / "other", other, taught, steps=1)
    assert fresh.record["initial"]["hash"] != began["hash"]


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_other_recipes_train_it_and_look_at_it_live(name: str, labelled: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"hidden": 16, "colour": 0.2, "blur": 0.0, "lr": 1e-3, "steps": 2}
    more |= {"local_size": 16, "local_crops": 2, "prototypes": 16} if name == "dino" else {"projection": 8}
    run = train(tmp_path / "run", Own(Map()), recipe=name, eval=str(labelled), **more)
    logged = run.metrics()[-1]
    assert logged["health"] and 0 <= logged["eval"]["knn"] <= 100 and (run.path / "report.html").exists()
    assert run.summary["arch"] == "own/Map" and saccade.load(run.path / "best", network=Map()).grid == (4, 4)


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_learns(sharding: str, taught: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(Path(saccade.__file__).parents[1])])
    subprocess.run(
        [*launch, "toys.own_ranks", str(tmp_path / "two"), taught, sharding],
        check=True, capture_output=True, timeout=500,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    one = saccade.pretrain(Pictures(8), out=tmp_path / "one", teacher=taught, **settings())
    two = saccade.Run.open(tmp_path / "two")
    losses = [[entry["loss"] for entry in run.metrics()] for run in (one, two)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = (saccade.load(run.path, network=Plain()).backbone.state_dict() for run in (one, two))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-4)

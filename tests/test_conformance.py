"""What every recipe owes: asked of all that are shipped, and of the toys that keep the contract wide."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import ALONE, RECIPES, SOURCES, WORDED, small, source
from toys.sources import Toy

import saccade.recipes
from saccade import backbone, cli, convnet, distributed, reading, recipe, teachers, vit
from saccade.data import Batch, Sample, Source, Tokenize, collate
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.optim import default_groups
from saccade.run import Run
from saccade.tour import PICTURES

SHIPPED = recipe.names()
TOYS = sorted(SOURCES)
NEED_A_VIT = ["dinov2", "dinov3", "ibot", "mae", "siglip2"]
CONVNETS = [f"{name}-on-a-convnet" for name in SHIPPED if name not in (*NEED_A_VIT, *ALONE)]
CASES = [*SHIPPED, *TOYS, *CONVNETS]


@dataclass(frozen=True)
class Case:
    """A recipe on a backbone, small enough to run in a moment, and data that it can read."""

    name: str
    recipe: recipe.Recipe
    config: Any
    source: Toy
    settings: dict[str, Any]
    tokenize: Tokenize | None = None

    def method(self) -> recipe.Method:
        torch.manual_seed(0)
        tiny = {} if self.name in TOYS else TINY_CONVNET if self.name in CONVNETS else TINY
        config = self.config
        shape = {"image_size": config.image_size, "channels": config.channels}
        alone = config.pieces() is not None
        network = None if alone else backbone.build(config.arch, **shape, **{**tiny, **config.backbone()})
        for block in () if network is None else network.modules():
            if isinstance(block, convnet.BasicBlock):  # it starts at 0, and what is before it gets no gradient yet
                torch.nn.init.ones_(block.last_norm.weight)
        taught, _ = teachers.load(config)
        return self.recipe.method(config, network, taught)

    def batch(self, places: range = range(8), step: int = 3, seen: int = 0) -> Batch:
        samples = [self.source[place] for place in places]
        return collate(samples, [seen] * len(places), list(places), self.tokenize)

    def views(self, batch: Batch, seed: int = 0, step: int = 3) -> Batch:
        draws = Draws(seed, step, batch["key"], batch["seen"], batch["place"])
        return self.recipe.views(self.config, batch, draws)


TINY = {"depth": 2, "width": 48, "heads": 3, "hidden": 96}
TINY_CONVNET = {"blocks": (1, 1), "widths": (16, 24), "stride": 8}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr(saccade.recipes, "__path__", [*saccade.recipes.__path__, RECIPES])
    name = request.param
    settings = small(name)
    own = {setting: value for setting, value in settings.items() if setting != "init"}
    page, config = recipe.configure(name.partition("-")[0], own)
    data, tokenize = source(name), None
    if isinstance(config, recipe.Worded):
        tokenizer = reading.tokenizer_for(data, config)
        config, tokenize = reading.fitted(config, tokenizer), reading.Reading(tokenizer, config.length)
    return Case(name, page, config, data, {**settings, "log_every": 1}, tokenize)


ZERO = torch.tensor(0.25)


def test_the_loss_is_finite_and_every_trained_parameter_gets_a_gradient(case: Case) -> None:
    for _, config in case.recipe.stages(case.config):
        stage = replace(case, config=config)
        method = stage.method()
        loss, metrics = method(stage.views(stage.batch()), ZERO)
        assert loss.ndim == 0
        assert math.isfinite(loss.item())
        assert all(value.ndim == 0 and math.isfinite(value.item()) for value in metrics.values())
        loss.backward()
        groups = method.groups(0.25) or default_groups(method, method.encoder(), config.weight_decay, 1.0)
        trained = [parameter for group in groups for parameter in group.parameters.values()]
        assert {id(p) for p in trained} == {id(p) for p in method.parameters() if p.requires_grad}
        unreached = [name for name, p in method.named_parameters() if p.requires_grad and not useful(p.grad)]
        assert not unreached, "trained, but the loss does not reach them"
        method.after_step(ZERO)
        assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def useful(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any())


def test_the_same_address_gives_the_same_loss(case: Case) -> None:
    once, again = (case.method()(case.views(case.batch()), ZERO)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_views_do_not_depend_on_who_shares_the_batch(case: Case) -> None:
    """One batch of 8, or 3 and 5 on two ranks, whose canvases are padded differently: the same views, bit for bit."""
    together = case.views(case.batch(range(8)))
    apart = [case.views(case.batch(places)) for places in (range(3), range(3, 8))]
    for name, whole in together.items():
        parts = [rows(part[name], size) for part, size in zip(apart, (3, 5), strict=True)]
        assert torch.equal(rows(whole, 8), torch.cat(parts, 1)), name


def rows(views: Tensor, size: int) -> Tensor:
    """View-major rows [V*B ...] as [V B ...]."""
    assert len(views) % size == 0, "the first axis is the samples, or several views of each of them"
    return views.unflatten(0, (-1, size))


def test_views_change_with_the_seed_and_the_visit(case: Case) -> None:
    def differ(one: Batch, other: Batch) -> bool:
        return any(not torch.equal(one[name], other[name]) for name in one)

    if case.recipe.name == "lit":  # without crops it draws nothing, and remembers pictures
        case = replace(case, config=case.config.model_copy(update={"min_scale": 0.5}))
    before = case.views(case.batch())
    assert differ(before, case.views(case.batch(), seed=1))
    assert differ(before, case.views(case.batch(seen=1)))


def test_the_encoder_keeps_the_contract(case: Case) -> None:
    encoder = case.method().encoder().eval()
    batch = case.batch(range(4))
    if "pixels" in batch:
        frames = case.batch(range(4))["pixels"][..., :16, :16]
        inputs = (frames if frames.shape[1] > 1 else frames[:, 0]).float() / torch.iinfo(frames.dtype).max
    else:
        inputs = batch["text"][:, : case.config.length]
    with torch.no_grad():
        features = encoder(inputs)
        alone = encoder(inputs[:1])
        pooled = encoder.embedding(features)
    b, n, d = features.patches.shape
    assert isinstance(features, vit.Features)
    assert (b, n) == (4, math.prod(features.grid))
    assert features.positions.shape in ((4, n, 2), (4, n, 3))
    assert features.cls is None or features.cls.shape == (4, d)
    assert features.registers.shape[0] == 4
    assert features.registers.shape[2] == d
    assert pooled.shape[0] == 4
    assert torch.isfinite(pooled).all()
    torch.testing.assert_close(alone.patches, features.patches[:1], rtol=1e-4, atol=1e-5)


def test_every_knob_is_read(case: Case) -> None:
    """A field that a page declares for itself is read on that page."""
    page = inspect.getmodule(case.recipe.config)
    assert page is not None
    tree = ast.parse(inspect.getsource(page))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    shared = (recipe.SpreadDistillation, recipe.Worded, recipe.Captioned)  # read on the pages that recipes share
    own = {
        name
        for name in vars(case.recipe.config).get("__annotations__", {})
        if name in case.recipe.config.model_fields and not any(name in config.model_fields for config in shared)
    }
    assert own <= read, "dead knobs"
    assert all(field.description for field in case.recipe.config.model_fields.values())


def test_a_recipe_is_one_page(case: Case) -> None:
    page = inspect.getsourcefile(case.recipe.config)
    assert page is not None
    text = Path(page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert ast.get_docstring(ast.parse(text)), "the first line is the method in a sentence"
    imported = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in imported if module and module.startswith("saccade.recipes")]


def test_every_variant_is_a_config(case: Case) -> None:
    for variant in case.recipe.variants:
        config = case.recipe.configure(variant)
        assert isinstance(config, case.recipe.config)
        assert type(config).model_validate(config.model_dump()) == config


class Interrupted(Source):
    """A source whose first read after the second step comes with a SIGTERM, as a scheduler sends it."""

    def __init__(self, source: Toy, run: Path):
        self._source, self._metrics, self._calm = source, run / "metrics.jsonl", True

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        if self._calm and self._metrics.exists() and len(self._metrics.read_text().splitlines()) == 2:
            self._calm = False
            os.kill(os.getpid(), signal.SIGTERM)
        return self._source[index]


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint holds: weights, buffers, moments."""
    folder = run / "checkpoints" / str(step)
    entries = distributed.metadata(folder).state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    distributed.load_tensors(tensors, folder, distributed.Ranks(0, 1, torch.device("cpu")))
    return tensors


def test_a_run_that_was_stopped_ends_with_the_same_weights(case: Case, tmp_path: Path) -> None:
    def train(out: str) -> None:
        source = Interrupted(case.source, tmp_path / "stopped")
        saccade.pretrain(source, recipe=case.recipe.name, out=tmp_path / out, workers=0, **case.settings)

    train("whole")
    with pytest.raises(SaccadeError, match="stopped on request at step 3") as stop:
        train("stopped")
    assert stop.value.code == 75
    train("stopped")
    steps = case.settings["steps"]
    whole, resumed = checkpoint(tmp_path / "whole", steps), checkpoint(tmp_path / "stopped", steps)
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    losses = [[entry["loss"] for entry in Run.open(tmp_path / out).metrics()] for out in ("whole", "stopped")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe once on two ranks with DDP and once with FSDP2, all from one start of torchrun."""
    out, ours = tmp_path_factory.mktemp("ranks"), Path(saccade.__file__).parents[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for case in CASES:  # what they begin with, once, before two ranks would make it both
        small(case)
    environment = {**os.environ, "PYTHONPATH": f"{ours}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "toys.ranks", str(out), *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_equal_one(case: Case, sharding: str, on_two_ranks: Path, tmp_path: Path) -> None:
    saccade.pretrain(case.source, recipe=case.recipe.name, out=tmp_path / "alone", workers=0, **case.settings)
    alone, together = (
        Run.open(tmp_path / "alone").metrics(),
        Run.open(on_two_ranks / sharding / case.name).metrics(),
    )
    assert len(alone) == len(together) == case.settings["steps"]
    losses = torch.tensor([[entry["loss"] for entry in run] for run in (alone, together)], dtype=torch.float64)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NEED_A_VIT)
def test_a_recipe_that_needs_a_vit_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match=r"this recipe needs a ViT.*\[--arch\]"):
        saccade.pretrain(source(name), recipe=name, out=tmp_path / "run", **{**small(name), "arch": "convnext-a/8"})


@pytest.mark.slow  # half a minute of training for each recipe
@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in (*WORDED, *ALONE)])  # no picture has a text
def test_it_learns_from_real_pictures(name: str, tmp_path: Path) -> None:
    settings = {**small(name), "batch": 32, "steps": 60, "lr": 2e-3, "log_every": 1}
    settings |= {"queue": 64} if "queue" in settings else {}  # of whole steps
    run = saccade.pretrain(PICTURES / "train.tar", recipe=name, out=tmp_path / "run", workers=1, **settings)
    losses = [entry["loss"] for entry in run.metrics()]
    # a loss against a teacher ends at the teacher's entropy, not at 0: what is asked is a fall that no noise makes
    assert statistics.mean(losses[-10:]) < losses[0] - 3 * statistics.stdev(losses[-10:])


NEW = '''"""A recipe that did not exist a moment ago: guess the mean colour of a crop from its features."""

from saccade import augment, recipe
from torch import nn


class Config(recipe.Training):
    smallest: float = 0.5

    def backbone(self):
        return {"depth": 1, "width": 32, "heads": 2, "hidden": 64}


def views(config, batch, draws):
    crops = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(config.smallest, 1.0))
    return {"images": augment.render(batch["pixels"], crops, config.image_size)}


class Method(recipe.Method):
    def __init__(self, config, backbone, teachers):
        super().__init__(config, backbone, teachers)
        self.backbone, self.head = backbone, nn.Linear(2 * backbone.config.width, 3)

    def forward(self, batch, t):
        features = self.backbone(batch["images"])
        guess = self.head(__import__("torch").cat([features.cls, features.patches.mean(1)], 1))
        return (guess - batch["images"].mean((2, 3))).square().mean(), {}

    def encoder(self):
        return self.backbone
'''


def test_a_new_recipe_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It appears on disk, and the command line lists it, knows its settings, trains it and loads what came out."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "colour.py").write_text(NEW)
    monkeypatch.setattr(saccade.recipes, "__path__", [*saccade.recipes.__path__, str(tmp_path / "recipes")])
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        colour = (30 * number, 100, 255 - 30 * number)
        Image.new("RGB", (24, 20), colour).save(tmp_path / "pictures" / f"{number}.png")
    run = str(tmp_path / "run")
    words = ["pretrain", str(tmp_path / "pictures"), "--recipe", "colour", "--out", run, "--json", "--workers", "0"]
    words += ["--arch", "vit-ti/8", "--image-size", "16", "--batch", "4", "--steps", "3"]
    assert "colour" in recipe.names()
    assert cli.main([*words, "--smalest", "0.3"]) == 2
    assert "--smallest" in json.loads(capsys.readouterr().out)["hint"]
    assert cli.main([*words, "--smallest", "0.3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["recipe"], result["steps"]) == (True, "colour", 3)
    assert math.isfinite(result["loss"])
    features = saccade.load(run)(torch.zeros(1, 3, 16, 16))
    assert features.patches.shape == (1, 4, 32)

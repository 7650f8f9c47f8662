"""Going on from a backbone: what stands still, what is held, who is let through; that stopping changes nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from toys import knobs, tiny
from toys.sources import Pictures

from saccade import (
    adapt,
    advice,
    cli,
    distributed,
    hints,
    initial,
    load,
    model,
    optim,
    pretrain,
    published,
    recipe,
    report,
    vit,
    weights,
)
from saccade import backbone as backbones
from saccade.adapt import Watching, natural, short
from saccade.anchor import BRAKE, Anchored, anchored, architecture
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate import gate
from saccade.evaluate.labelled import read_labelled
from saccade.evaluate.live import Live
from saccade.model import Model
from saccade.published import Prepared
from saccade.report.charts import interval
from saccade.settings import AdaptArguments, PretrainArguments
from saccade.watch import Watch

CASES = ["mae", "dino", "simclr-on-a-convnet"]
page_of_adapt = importlib.import_module("saccade.adapt")  # the name in the package is the verb
QUIET = {"workers": 0, "log_every": 1}


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    """A network that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.SIZES, "nano", {"width": 48, "depth": 3, "heads": 3, "hidden": 96})
        yield


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbones that learned for two steps, by case."""
    folder = tmp_path_factory.mktemp("starts")
    for case in CASES:
        settings = {**tiny(case), "steps": 2, **QUIET}
        pretrain(Pictures(16), recipe=case.partition("-")[0], out=folder / case, **settings)
    return {case: folder / case for case in CASES}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light stripes: two classes, and eight groups by the first letter of the file."""
    folder, random = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for part, count in (("train", 48), ("test", 16)):
        for number in range(count):
            place = folder / part / str(number % 2)
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 156, (32, 32, 3)) + 100 * (number % 2 == np.arange(32) // 8 % 2)[:, None, None]
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{'abcdefgh'[number // 2 % 8]}{number}.png")
    return folder


def backbone(run: Path) -> dict[str, torch.Tensor]:
    return dict(load(run).backbone.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# the gate, as a function


def contest(random: np.random.Generator, gain: float, groups: int = 60) -> bool:
    """The best of 20 equal candidates on the watch part, then on the gate's; pictures of a group are alike."""
    names = [f"g{number % groups}" for number in range(4 * groups)]
    chances = np.clip(0.7 + 0.25 * random.standard_normal(groups), 0.05, 0.95)
    chance = np.tile(chances, 4)[: len(names)]
    wobble = 0.15 * random.standard_normal((2, 20, groups))  # what a candidate gains in one group it loses in another

    def answers(part: int, candidate: int | None) -> np.ndarray:
        moved = np.zeros(groups) if candidate is None else gain + wobble[part, candidate]
        return luck[part] < np.clip(chance + np.tile(moved, 4)[: len(names)], 0, 1)

    luck = random.random((2, len(names)))
    best = max(range(20), key=lambda candidate: answers(0, candidate).mean())
    return bool(gate.judge(answers(1, None), answers(1, best), names)["passed"])


@pytest.fixture
def quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "DRAWS", 500)


@pytest.mark.usefixtures("quick_gate")
def test_the_best_of_twenty_equal_candidates_seldom_passes() -> None:
    random = np.random.default_rng(1)
    assert sum(contest(random, 0.0) for _ in range(300)) <= 300 * 0.05 + 2 * (300 * 0.05 * 0.95) ** 0.5


@pytest.mark.usefixtures("quick_gate")
def test_a_real_gain_mostly_passes() -> None:
    random = np.random.default_rng(2)
    assert sum(contest(random, 0.1, groups=120) for _ in range(50)) >= 40


def test_a_gain_in_one_group_is_no_gain() -> None:
    """As pictures of their own they would pass."""
    before, after = np.zeros(100, dtype=bool), np.zeros(100, dtype=bool)
    after[:20] = True
    alone = gate.judge(before, after, [str(number) for number in range(100)])
    together = gate.judge(before, after, [str(number // 20) for number in range(100)])
    assert alone["passed"] and alone["bound"] > 0 and alone["difference"] == together["difference"] == 20
    assert not together["passed"] and together["bound"] <= 0 and together["groups"] == 5
    assert "20" in together["reason"] and "5 groups" in together["reason"]


@pytest.mark.parametrize(("better", "passes"), [(3, False), (4, False), (5, True), (0, False)])
def test_few_pictures_that_differ_are_few(better: int, passes: bool) -> None:
    """Three more and none less: the bootstrap alone would be content, and a coin as well, one time in eight."""
    before, after = np.zeros(200, dtype=bool), np.arange(200) < better
    found = gate.judge(before, after, [str(number) for number in range(200)])
    assert found["passed"] is passes
    assert found["chance"] == pytest.approx(0.5**better, abs=0.03)


def test_the_interval_is_drawn_with_zero() -> None:
    drawn = interval("gain", 0.5, 2.0, 3.5, unit="points")
    tree = ElementTree.fromstring(drawn.svg)
    dot = next(part for part in tree.iter("circle"))
    zero = next(part for part in tree.iter("line") if part.get("class") == "level")
    assert float(str(dot.get("cx"))) > float(str(zero.get("x1"))) and drawn.note == "2, from 0.500 to 3.50"


def test_worse_never_passes() -> None:
    found = gate.judge(np.ones(50, dtype=bool), np.arange(50) < 30, [str(number) for number in range(50)])
    assert not found["passed"] and found["bound"] <= found["difference"] == -40


def test_three_parts_share_no_group(labelled: Path) -> None:
    data = read_labelled(labelled, r"([a-h])\d+\.png", 32, 3)
    parts = gate.divide(data)
    groups = [set(data.names(part)) for part in parts]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups))
    assert sorted(np.concatenate(parts)) == sorted(data.train)
    assert not set(np.concatenate(parts)) & set(data.test)
    with pytest.raises(SaccadeError, match="divided in three"):
        gate.divide(read_labelled(labelled, r"/([01])/", 32, 3))


@pytest.mark.parametrize(
    ("after", "verdict", "passed", "says"),
    [
        ({"rank": 9.0, "spread": 0.5, "drift": 0.1}, "healthy", None, "unverified"),
        ({"rank": 90.0, "spread": 0.9, "drift": 0.1}, "healthy", None, "unverified"),  # a higher rank proves nothing
        ({"rank": 4.0, "spread": 0.5, "drift": 0.1}, "healthy", False, "collapsed"),
        ({"rank": None, "spread": None, "drift": 0.1}, "healthy", False, "collapsed"),
        ({"rank": 9.0, "spread": 0.001, "drift": 0.1}, "healthy", False, "collapsed"),
        ({"rank": 9.0, "spread": 0.5, "drift": 0.7}, "healthy", False, "drifted"),
        ({"rank": 9.0, "spread": 0.5, "drift": 0.1}, "diverged", False, "diverged"),
    ],
)
def test_without_labels_only_collapse_and_drift_are_told(
    after: dict[str, Any], verdict: str, passed: bool | None, says: str
) -> None:
    found = gate.unverified({"rank": 9.0, "spread": 0.5}, after, verdict)
    assert found["passed"] is passed and says in found["reason"] and found["measure"] is found["bound"] is None


# any method, held


@pytest.mark.parametrize("case", CASES)
def test_the_backbone_stands_still_then_moves_slowly(case: str, starts: dict[str, Path]) -> None:
    name = case.partition("-")[0]
    found = recipe.configure(name, {**tiny(case), "drop_path": 0.0} if name == "dino" else tiny(case))
    asked = AdaptArguments(data=("x",), start=str(starts[case]), out="x", warm=0.4, freeze_blocks=1)
    page = anchored(found[0], asked, load(starts[case]))
    arguments = PretrainArguments(data=("x",), out="x", recipe=name, init=str(starts[case]))
    model = Model(page, found[1], arguments, Ranks(0, 1, torch.device("cpu")))
    method = model.method
    assert isinstance(method, Anchored)
    (trained,) = method._trained
    start = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    heads = {key: p.clone() for key, p in method.inner.named_parameters() if p.requires_grad}

    def step(t: float) -> dict[str, float]:
        pictures = (
            torch.stack([Pictures(8)[0].pixels[:, :, :32, :32]] * 8)
            + torch.arange(8, dtype=torch.uint8)[:, None, None, None, None]
        )
        batch = {"pixels": pictures, "size": torch.tensor([[32, 32]] * 8)}
        draws = Draws(0, round(10 * t), torch.arange(8), torch.zeros(8, dtype=torch.long), torch.arange(8))
        metrics = model.step(iter([page.views(found[1], batch, draws)]), t)
        return {key: float(value) for key, value in metrics.items()}

    metrics = [step(t) for t in (0.1, 0.3)]
    assert all(values["anchor_token"] == pytest.approx(0, abs=1e-5) for values in metrics)
    assert all(torch.equal(tensor, start[key]) for key, tensor in trained.state_dict().items())
    inside = {id(parameter) for parameter in trained.parameters()}
    slow = [p for group in model.optimizer.groups for p in group.parameters.values() if id(p) in inside]
    assert slow and not any(model.optimizer.optimizer.state[p]["step"] for p in slow), "nor do its moments begin"
    assert any(not torch.equal(p, heads[key]) for key, p in method.inner.named_parameters() if key in heads)
    for t in (0.5, 0.7):  # with the first of them warming ends
        metrics.append(step(t))
    assert [values["warming"] for values in metrics] == [1, 1, 1, 0] and method.warmed_at == 0.5
    moved = {key for key, tensor in trained.state_dict().items() if not torch.equal(tensor, start[key])}
    layers, last = optim.layers_of(key for key, _ in trained.named_parameters())
    assert moved and {layers[key] for key in moved} <= set(range(2, last + 1)), "early blocks and statistics stay"
    assert 0 < max(abs(trained.state_dict()[key] - start[key]).max() for key in moved) < 0.01
    assert same(dict(method.anchor.state_dict()), start)


def test_the_anchor_holds(starts: dict[str, Path]) -> None:
    """Its gradient leads back to the start: with it alone, a backbone that was pushed away returns."""
    config = recipe.configure("mae", tiny("mae"))
    asked = AdaptArguments(data=("x",), start="x", out="x", anchor_patches=1.0, anchor_token=1.0)
    page = anchored(config[0], asked, load(starts["mae"]))
    arguments = PretrainArguments(data=("x",), out="x", recipe="mae", init=str(starts["mae"]))
    method = Model(page, config[1], arguments, Ranks(0, 1, torch.device("cpu"))).method
    assert isinstance(method, Anchored)
    method.move()
    (trained,) = method._trained
    with torch.no_grad():
        for parameter in trained.blocks.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    method.inner.forward = lambda *_: (torch.zeros(()), {})
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    optimizer, far = torch.optim.Adam(trained.parameters(), 1e-3), []
    for _ in range(30):
        loss, metrics = method({"anchored": images}, torch.tensor(0.5))
        assert loss.item() == pytest.approx(metrics["anchor_token"].item() + metrics["anchor_patches"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        far.append(loss.item())
    assert far[-1] < 0.2 * far[0]


# whole runs


def rising(labelled: Path) -> dict[str, Any]:
    """So fast that there is something to choose."""
    return {**knobs("mae"), **QUIET, "steps": 6, "lr": 0.05, "backbone_rate": 1.0, "eval": str(labelled)}


def test_noise_is_refused_and_the_start_handed_back(starts: dict[str, Path], labelled: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    folder = tmp_path / "noise"
    folder.mkdir()
    for number in range(16):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    run = adapt(str(folder), start=starts["mae"], out=tmp_path / "run", **rising(labelled))
    summary = run.summary
    assert summary["gate"]["passed"] is False and summary["gate"]["handed_over"] == "start", summary["gate"]
    assert same(backbone(run.path), backbone(starts["mae"]))
    assert summary["before"]["watch"].keys() == summary["after"]["watch"].keys()
    assert summary["before"]["watch"].keys() == {"knn", "linear", "chance", "pictures"}
    assert summary["before"]["test"] == {key: summary["eval"][-1][key] for key in ("knn", "linear")}
    assert run.record["gate"] == summary["gate"] and (run.path / "report.html").exists()


def test_what_passes_is_handed_over(
    starts: dict[str, Path], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best on the pictures that choose, which here is that of step 5 by decree."""
    values = iter([0.0, 10.0, 20.0, 30.0, 40.0, 80.0, 70.0, 80.0])  # first the start, last the candidate
    monkeypatch.setattr(Live, "measure", lambda *_: dict.fromkeys(("knn", "linear"), next(values)))
    asked: list[Any] = []
    monkeypatch.setattr(gate, "judge", lambda *answers: asked.append(answers) or {"passed": True, "reason": "decree"})
    run = adapt(Pictures(16), start=starts["mae"], out=tmp_path / "run", **rising(labelled))
    assert run.record["best"]["step"] == 5 and run.record["gate"]["handed_over"] == "candidate"
    assert same(backbone(run.path), backbone(run.path / "best"))
    assert not same(backbone(run.path), backbone(starts["mae"]))
    assert load(run.path).record["steps"] == 5 and natural(run.path) == "mae"
    ((before, after, names),) = asked
    data = read_labelled(labelled, None, 64, 3)
    assert sorted(names) == sorted(data.names(gate.divide(data)[2])) and len(before) == len(after) == len(names)


SCORES = {1: 50.0, 2: 50.0, 3: 50.0, 4: 90.0, 5: 10.0, 6: 88.0}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Watched scores by decree: better at step 4, far worse at step 5."""
    now, real, values = [0], Watching.see, dict(SCORES)

    def see(self: Watching, model: Model, step: int, delivered: Any) -> Any:
        now[0] = step
        return real(self, model, step, delivered)

    sound = {"rank": 1e9, "spread": 1.0, "drift": 0.0, "pictures": 100}
    monkeypatch.setattr(Watching, "see", see)
    monkeypatch.setattr(Watching, "evaluated", lambda *_: {"knn": values[now[0]], "linear": 0.0, **sound})
    return values


class Requests(dict[str, bool]):
    """A stop is requested at this step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def __getitem__(self, name: str) -> bool:
        self.step -= 1
        return self.step == 0


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    directory = run / "checkpoints" / str(step)
    entries: dict[str, Any] = dict(distributed.metadata(directory).state_dict_metadata)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    distributed.load_tensors(tensors, directory, Ranks(0, 1, torch.device("cpu")))
    return tensors


@pytest.fixture
def whole(starts: dict[str, Path], labelled: Path, scored: dict[int, float], tmp_path: Path) -> Path:
    adapt(Pictures(16), start=starts["mae"], out=tmp_path / "whole", **rising(labelled), save_every="1")
    return tmp_path / "whole"


def test_a_fall_is_taken_back_and_slows_the_run(whole: Path) -> None:
    lines = {
        entry["step"]: entry["eval"] for entry in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    }
    assert {step: line["turn"] for step, line in lines.items()} == {
        1: "best", 2: "best", 3: "best", 4: "best", 5: "fell", 6: "worse"
    }  # fmt: skip
    assert [lines[step]["warming"] for step in range(1, 7)] == [True] * 3 + [False] * 3
    assert [lines[step]["rate"] for step in (5, 6)] == [1.0, BRAKE]
    record = json.loads((whole / "record.json").read_text())
    assert record["rolled_back"] == record["summary"]["rolled_back"] == [5] and record["best"]["step"] == 4
    page = (whole / "report.html").read_text()
    assert "rolled back at step 5" in page and "The way and the gate" in page and "could not be shown" not in page
    assert "nearest by the start" in page and "nearest by the candidate" in page
    before, after = state(whole, 4), state(whole, 5)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"method/course"}
    assert after["method/course"][1] == BRAKE
    assert not same(after, state(whole, 6))


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_that_was_stopped_ends_the_same(
    starts: dict[str, Path], labelled: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped while the heads get warm, and right after a roll-back."""
    out, settings = tmp_path / "run", rising(labelled)
    with monkeypatch.context() as once:
        once.setattr(page_of_adapt, "stop_requests", lambda: contextlib.nullcontext(Requests(step)))
        with pytest.raises(SaccadeError, match=f"stopped on request at step {step}") as stopped:
            adapt(Pictures(16), start=starts["mae"], out=out, **settings)
    assert stopped.value.code == 75
    with pytest.raises(SaccadeError, match=r"warm was 0\.3"):
        adapt(Pictures(16), start=starts["mae"], out=out, **settings, warm=0.4)
    adapt(Pictures(16), start=starts["mae"], out=out, **settings)
    record, other = (json.loads((run / "record.json").read_text()) for run in (out, whole))
    names = ("before", "after", "gate", "best", "rolled_back", "advice")
    assert [record[name] for name in names] == [other[name] for name in names]
    assert same(state(out, 6), state(whole, 6)) and same(backbone(out), backbone(whole))


def test_a_run_that_gets_no_better_ends(
    starts: dict[str, Path], labelled: Path, scored: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored[4] = 49.0  # no fall: one picture of a hundred
    monkeypatch.setattr(page_of_adapt, "PATIENCE", 1)
    out = tmp_path / "run"
    for _ in range(2):
        run = adapt(Pictures(16), start=starts["mae"], out=out, **rising(labelled))
        assert run.summary["steps"] == 4 and run.metrics()[-1]["step"] == 4
    assert run.summary["gate"]["handed_over"] == "start" and "no checkpoint" in run.summary["gate"]["reason"]
    assert same(backbone(out), backbone(starts["mae"]))


@pytest.mark.parametrize(("losses", "ends"), [([1.0, 1.0, 1.0], True), ([1.0, 0.8, 0.6], False)])
def test_heads_are_warm_when_their_loss_settles(losses: list[float], ends: bool, starts: dict[str, Path]) -> None:
    page, config = recipe.configure("mae", {**tiny("mae"), "warmup": 0.1})
    asked = AdaptArguments(data=("x",), start="x", out="x", warm=0.9)
    page = anchored(page, asked, load(starts["mae"]))
    arguments = PretrainArguments(data=("x",), out="x", recipe="mae", init=str(starts["mae"]))
    method = Model(page, config, arguments, Ranks(0, 1, torch.device("cpu"))).method
    assert isinstance(method, Anchored)
    t = 0.0
    for loss in [9.0, *losses]:  # the first while the rate rises, which counts for nothing
        for _ in range(8):
            method.groups(t)
            method._loss.append(torch.tensor(loss))
            method.after_step(torch.tensor(t))
            t += 0.0125
    assert method.still is not ends
    again = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.move()
    method.load_state_dict(again)
    method.recall()
    assert method.still is not ends, "a checkpoint keeps it"


def test_two_steps_settle_nothing(starts: dict[str, Path]) -> None:
    """In a short run a window is eight steps all the same."""
    page, config = recipe.configure("mae", {**tiny("mae"), "warmup": 0.1})
    asked = AdaptArguments(data=("x",), start="x", out="x", warm=0.9)
    arguments = PretrainArguments(data=("x",), out="x", recipe="mae", init=str(starts["mae"]))
    page = anchored(page, asked, load(starts["mae"]))
    method = Model(page, config, arguments, Ranks(0, 1, torch.device("cpu"))).method
    assert isinstance(method, Anchored)
    stood = []
    for step in range(30):  # fifty in all: two in a window of 4 %
        method.groups(step / 50)
        method._loss.append(torch.tensor(1.0))
        method.after_step(torch.tensor(step / 50))
        stood.append(method.still)
    assert 5 + 2 * 8 - 1 <= stood.index(False) <= 5 + 2 * 8 + 1


def test_hints_tell_features_that_are_lost(starts: dict[str, Path]) -> None:
    encoder = load(starts["dino"])
    pictures = torch.stack([Pictures(16)[place].pixels[0, :, :32, :32] for place in range(16)])
    start = hints.vectors(encoder, pictures)
    before = hints.measure(encoder, pictures)
    now = hints.measure(encoder, pictures, start)
    assert now["drift"] == pytest.approx(0, abs=1e-6) and now["kept"] == 1 and 0 <= before["agreement"] <= 1
    assert hints.astray(before, now) is None
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert "collapsed" in str(hints.astray(before, hints.measure(encoder, pictures, start)))


@pytest.mark.parametrize(
    ("pictures", "distinct", "watch", "first_try"),
    [
        (5_000, 100, {"knn": 60.0, "chance": 10.0}, "adapt"),
        (5_000, 100, None, "adapt"),
        (5_000, 1, {"knn": 60.0, "chance": 10.0}, "probe"),  # the same picture again and again
        (60, 60, None, "probe"),
        (5_000, 100, {"knn": 99.0, "chance": 10.0}, "probe"),
        (200_000, 100, {"knn": 12.0, "chance": 10.0}, "pretrain"),
        (5_000, 100, {"knn": 12.0, "chance": 10.0}, "adapt"),
    ],
)
def test_advice(pictures: int, distinct: int, watch: dict[str, float] | None, first_try: str) -> None:
    found = advice.advise(pictures, distinct, 100, {"watch": watch} if watch else {})
    assert found["first_try"] == first_try and len(found["why"]) > 20


def test_copies_are_not_counted_as_pictures() -> None:
    """Of 5,000 pictures that are 50, each a hundred times, 256 show no more than the 50."""
    found = advice.advise(5_000, 50, 256, {})
    assert found["first_try"] == "probe" and "50 different pictures of 5,000" in found["why"]
    twice = advice.advise(5_000, 250, 256, {})["why"]  # six pairs among 256: every picture is there twice
    assert 2_000 < int(twice.split()[0].replace(",", "")) < 3_000


@pytest.mark.parametrize("case", CASES[1:])
def test_every_kind_of_method_adapts(case: str, starts: dict[str, Path], tmp_path: Path) -> None:
    """Without labels: measured by hints alone, and called unverified."""
    run = adapt(Pictures(16), start=starts[case], out=tmp_path / "run", steps=4, **knobs(case), **QUIET)
    assert run.config["recipe"] == case.partition("-")[0] and run.config["verb"] == "adapt"
    assert run.summary["gate"]["passed"] is None and "unverified" in run.summary["gate"]["reason"]
    assert (
        run.summary["before"]["hints"].keys() == {"rank", "spread", "agreement"}
        and "watch" not in run.summary["before"]
    )
    assert run.summary["after"]["hints"]["drift"] == pytest.approx(0, abs=0.01)
    assert not same(backbone(run.path), backbone(starts[case]))
    assert load(run.path).backbone.config == load(starts[case]).backbone.config


def test_pictures_of_other_channels(starts: dict[str, Path], tmp_path: Path) -> None:
    """Grey ones: the start's first weights are mixed, as `load` does it."""
    random = np.random.default_rng(5)
    (tmp_path / "grey").mkdir()
    for number in range(16):
        pixels = random.integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "grey" / f"{number}.png")
    settings = {**knobs("mae"), **QUIET, "channels": 1, "steps": 4}
    run = adapt(str(tmp_path / "grey"), start=starts["mae"], out=tmp_path / "run", **settings)
    config = load(run.path).backbone.config
    assert config.channels == 1 and config.mean == load(starts["mae"], channels=1).backbone.config.mean


def test_every_rank_knows_the_way_of_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first reads the lines; where another counted falls anew, the one would end and the other wait for it."""

    class Second(Ranks):
        def from_first(self, work: Any) -> Any:
            return ((5, "fell"), 3, 2)

    watch = Watching.__new__(Watching)
    watch.ranks, watch.arguments = (
        Second(1, 2, torch.device("cpu")),
        PretrainArguments(data=("x",), out="x", recipe="mae", eval="x"),
    )
    monkeypatch.setattr(Watch, "begin", lambda *_: None)
    monkeypatch.setattr(Anchored, "recall", lambda _: None)
    held = Model.__new__(Model)
    held.method = Anchored.__new__(Anchored)
    watch.begin(held, 6, print)
    assert watch.turn == (5, "fell") and watch.ended


def test_the_decoder_that_lay_beside_the_start_goes_on(
    starts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method that holds another gives it that one's place."""
    given: list[torch.nn.Module] = []
    monkeypatch.setattr(initial, "load_decoder", lambda method, *_: given.append(method) or {})
    page = anchored(recipe.find("mae"), AdaptArguments(data=("x",), start="x", out="x"), load(starts["mae"]))
    method, _ = model.build(page, recipe.configure("mae", tiny("mae"))[1], str(starts["mae"]))
    assert isinstance(method, Anchored) and given == [method.inner]


def test_a_report_that_a_kill_left_to_be_written(
    whole: Path, starts: dict[str, Path], labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the summary and the report: it shows what was handed over, not the last step."""
    shown: list[Encoder] = []
    monkeypatch.setattr(report, "write_run", lambda _, **given: shown.append(given["encoder"]))
    (whole / "report.html").unlink()
    adapt(Pictures(16), start=starts["mae"], out=whole, **rising(labelled), save_every="1")
    assert same(dict(shown[0].backbone.state_dict()), backbone(whole))


@pytest.mark.parametrize(("batch", "group"), [(64, 16), (24, 12), (25, 5), (17, 17), (1, 2)])
def test_groups_of_koleo_divide_the_batch(batch: int, group: int) -> None:
    config = recipe.find("dinov2").config
    found = page_of_adapt.short(config, {"batch": batch, "image_size": 56}, 14)
    assert found["koleo_group"] == group


# what to go on with, and the words for it


def test_the_recipe_follows_from_how_the_backbone_was_made(starts: dict[str, Path]) -> None:
    assert natural(starts["simclr-on-a-convnet"]) == "simclr"
    named = {family.recipe for family in published.families().values()}
    assert named <= {None, *recipe.names()} and {"mae", "dino", "dinov2", "dinov3", "simclr", None} <= named
    encoder = load(starts["mae"])
    encoder.record["family"] = "timm-vit"
    with pytest.raises(SaccadeError, match="no recipe here goes on with timm-vit") as mistake:
        natural(encoder)
    assert mistake.value.path == "--recipe"


def test_what_cannot_be_trained_is_said_before_a_recipe_is_sought(
    starts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of ONNX: to name a recipe would not help."""
    monkeypatch.setattr(backbones, "known", lambda _: False)
    with pytest.raises(SaccadeError, match="cannot be trained") as mistake:
        natural(starts["mae"])
    assert mistake.value.path == "--from"


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("vit-ti/8-registers", {"registers": 2}),
        ("vit-ti/8-336", {"width": 96, "heads": 2, "hidden": 128, "depth": 2}),
        ("resnet-50-w2/8", {"widths": (32, 32, 32, 32), "blocks": (1, 1, 1, 1)}),
    ],
)
def test_published_networks_are_built_again_whatever_they_are_called(name: str, switches: dict[str, Any]) -> None:
    """Registers, other sides, and other numbers than those that go by the name here."""
    plain = name.replace("-w2", "").replace("-registers", "").replace("-336", "")
    encoder = Encoder(backbones.build(plain, image_size=32, **switches), {"arch": name, "family": "x"})
    assert architecture(encoder) == plain
    page = anchored(recipe.find("dino"), AdaptArguments(data=("x",), start="x", out="x"), encoder)
    again = backbones.build(plain, image_size=32, **page.switches)
    again.load_state_dict(encoder.backbone.state_dict())
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in encoder.backbone.state_dict().items()
    }


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("pictures", "--out", "run"), "--from"),
        (("pictures", "--from", "nowhere", "--out", "run"), "nowhere"),
        (("pictures", "--from", "START"), "--out"),
        (("pictures", "--from", "START", "--out", "run", "--anchor-tokens", "2"), "--anchor-tokens"),
        (("pictures", "--from", "START", "--out", "run", "--freeze-blocks", "-1"), "--freeze-blocks"),
        (("pictures", "--from", "START", "--out", "run", "--decoder-widht", "4"), "--decoder-widht"),
    ],
)
def test_wrong_words(
    words: tuple[str, ...], path: str, starts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = [str(starts["mae"]) if word == "START" else word for word in words]
    assert cli.main(["adapt", *said, "--json"]) == cli.WRONG_USE
    assert json.loads(capsys.readouterr().out)["path"] == path


def test_the_command_line_says_the_same(
    starts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    class Done:
        summary = {"gate": {"passed": True}}  # noqa: RUF012

    def record(data: list[str], **settings: Any) -> Done:
        asked.update(settings, data=data)
        return Done()

    monkeypatch.setattr(page_of_adapt, "adapt", record)
    words = ["adapt", "a", "b", "--from", str(starts["mae"]), "--out", str(tmp_path / "run"), "--minutes", "2"]
    assert cli.main([*words, "--decoder-width", "48", "--warm", "0.5", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["gate"] == {"passed": True}
    assert (asked["start"], asked["minutes"], asked["decoder_width"], asked["warm"]) == (
        str(starts["mae"]),
        2.0,
        48,
        0.5,
    )
    assert asked["data"] == ["a", "b"] and "lr" not in asked and "batch" not in asked


@pytest.mark.parametrize("rate", [0.05, 500.0])
def test_pictures_are_prepared_as_for_the_start(
    rate: float, starts: dict[str, Path], labelled: Path, tmp_path: Path
) -> None:
    """Whoever is handed over: a family that squeezes pictures to squares goes on to do so."""
    start, prepared = load(starts["mae"]), Prepared(32, 32, "bilinear", square=True)
    weights.save_backbone(tmp_path / "start", start.backbone, {**start.record, "preprocess": asdict(prepared)})
    more = {**knobs("mae"), **QUIET, "steps": 4, "lr": rate, "backbone_rate": 1.0, "eval": str(labelled)}
    run = adapt(Pictures(16), start=tmp_path / "start", out=tmp_path / "run", **more)
    seen = load(tmp_path / "start").preprocess
    assert seen.square and seen.interpolation == "bilinear" and load(run.path).preprocess == seen
    assert not load(starts["mae"]).preprocess.square


def test_sinkhorn_knopp_under_accumulation_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    losses, start = {}, tmp_path / "start"
    pretrain(Pictures(16), recipe="dinov2", out=start, **tiny("dinov2") | {"steps": 2}, **QUIET)
    for parts in (1, 2):
        more = {**knobs("dinov2"), "batch": 8, "koleo_group": 4, "head_norm": False, "masked": 1.0, "queue": 0}
        more |= {"assignment": "sinkhorn", "patch_weight": 0.0, "warm": 0.0}
        run = adapt(Pictures(16), start=start, out=tmp_path / str(parts), steps=3, accumulate=parts, **more, **QUIET)
        losses[parts] = [entry["loss"] for entry in run.metrics()]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) and len(losses[1]) == 3


def test_short_runs_share_prototypes_out_by_whole_steps() -> None:
    config = recipe.configure("dinov2", {})[0].config
    found = {batch: short(config, {"batch": batch, "image_size": 56}, 14) for batch in (16, 48, 300)}
    assert {batch: one["queue"] for batch, one in found.items()} == {16: 512, 48: 576, 300: 600}
    assert found[16]["assignment"] == "sinkhorn"
    assert short(config, {"batch": 16, "image_size": 56, "assignment": "centre"}, 14)["queue"] == 0
    assert "queue" not in short(recipe.configure("mae", {})[0].config, {"batch": 16, "image_size": 56}, 14)


def test_too_many_frozen_blocks_and_accumulated_pairs_are_refused(starts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="leaves nothing") as mistake:
        adapt(Pictures(16), start=starts["mae"], out=tmp_path / "a", steps=4, freeze_blocks=3, **knobs("mae"), **QUIET)
    assert mistake.value.path == "--freeze-blocks"
    case = "simclr-on-a-convnet"
    with pytest.raises(SaccadeError, match="cannot accumulate"):
        adapt(Pictures(16), start=starts[case], out=tmp_path / "b", steps=4, accumulate=2, **knobs(case), **QUIET)

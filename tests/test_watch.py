"""What is looked at while a run trains, and that looking changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import RECIPES, forge, small
from toys.sources import Pictures

import saccade.recipes
from saccade import distributed, load, pretrain, vit, watch, weights
from saccade.data import Sample
from saccade.encoder import Preprocess
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import SHARE, read_labelled
from saccade.evaluate.live import Live
from saccade.evaluate.splits import set_apart
from saccade.run import Run, verify

STEPS = 20
SETTINGS = {"steps": STEPS, "save_every": "7"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pictures than those that are trained on, of two classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, first, count in (("train", 100, 60), ("test", 200, 20)):
        for name in "01":
            (folder / part / name).mkdir(parents=True)
        forge.pictures(folder, Pictures(first + count))
        for index in range(first, first + count):
            shutil.move(folder / f"{index}.png", folder / part / str(index % 2) / f"{index}.png")
        for left in folder.glob("*.png"):
            left.unlink()
    return folder


@pytest.fixture(scope="module")
def whole(workshop: forge.Forge, data: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated ten times, and never disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    told = workshop.session(out, data, eval=str(labelled), **SETTINGS)
    assert told["codes"] == [0] and "Warning" not in told["said"], told["said"]
    return out


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    entries = distributed.metadata(checkpoint).state_dict_metadata.items()
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    distributed.load_tensors(found, checkpoint, distributed.Ranks(0, 1, torch.device("cpu")))
    return found


def seen(out: Path) -> list[tuple[Any, ...]]:
    """All that was seen, step by step."""
    return [(entry["step"], entry.get("eval"), entry.get("health")) for entry in Run(out).metrics()]


@pytest.mark.parametrize("recipe", ["growing", "simclr"])  # stages and a teacher; batch norm, whose buffers move
def test_a_run_that_is_watched_has_the_same_weights(
    data: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(saccade.recipes, "__path__", [*saccade.recipes.__path__, RECIPES])
    settings = {"recipe": recipe, "workers": 0, "log_every": 1, "steps": 8}
    if recipe == "simclr":
        settings |= {**small(recipe), "arch": "resnet-8/8", "image_size": 16, "steps": 6}
    steps = settings["steps"]
    with monkeypatch.context() as often:
        often.setattr(watch, "EVALUATIONS", steps)
        pretrain(data, out=tmp_path / "watched", eval=str(labelled), **settings)
    monkeypatch.setattr(watch.Watch, "due", lambda *_: False)
    pretrain(data, out=tmp_path / "alone", **settings)
    watched, alone = Run(tmp_path / "watched"), Run(tmp_path / "alone")
    assert sum("eval" in entry for entry in watched.metrics()) == steps
    assert not any("health" in entry for entry in alone.metrics())
    ends = [tensors(run.checkpoints / str(steps)) for run in (watched, alone)]
    assert ends[0].keys() == ends[1].keys()
    assert not [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    assert [entry["loss"] for entry in watched.metrics()] == [entry["loss"] for entry in alone.metrics()]


def test_the_best_checkpoint_is_kept_and_marked(whole: Path) -> None:
    run = Run.open(whole)
    series = {entry["step"]: entry["eval"] for entry in run.metrics() if "eval" in entry}
    assert list(series) == [1, *range(2, STEPS + 1, 2)]
    assert all(0 <= value <= 100 for entry in series.values() for value in entry.values())
    best = run.record["best"]
    assert best["value"] == max(entry["linear"] for entry in series.values()) == series[best["step"]]["linear"]
    assert best["step"] == min(step for step, entry in series.items() if entry["linear"] == best["value"])
    assert best["step"] < STEPS - 7, "pruning must have had something to spare; another seed would do"
    assert verify(run.checkpoints / str(best["step"]))["step"] == best["step"]
    encoder, held = load(whole / "best"), tensors(run.checkpoints / str(best["step"]))
    assert encoder.record["steps"] == best["step"]
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, held[f"method/backbone.{name}"]), name
    *held_out, test = run.summary["eval"]
    assert [entry["step"] for entry in held_out] == list(series) and test["step"] == STEPS and test["part"] == "test"
    assert run.summary["best"] == best and run.summary["health"]["verdict"] == "healthy"
    assert run.summary["health"]["rank"] > 1 and 0 < run.summary["health"]["spread"] < 1


@pytest.mark.parametrize(
    "stop",
    [
        {"step": 7},
        {"saving": 0.0},
        pytest.param(
            {"step": 14, "signal": "SIGTERM"}, marks=pytest.mark.slow
        ),  # some seconds for what the others show
    ],
)
def test_a_run_that_was_stopped_has_the_same_series_and_the_same_best(
    workshop: forge.Forge, data: Path, labelled: Path, whole: Path, tmp_path: Path, stop: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    told = workshop.session(out, data, eval=str(labelled), stop=stop, **SETTINGS)
    assert told["codes"] in ([-9], [75]), told["said"]
    told = workshop.session(out, data, eval=str(labelled), **SETTINGS)
    assert told["codes"] == [0], told["said"]
    assert seen(out) == seen(whole) and Run(out).record["best"] == Run(whole).record["best"]
    assert (out / "best" / "model.safetensors").read_bytes() == (whole / "best" / "model.safetensors").read_bytes()


def test_a_kill_between_the_best_checkpoint_and_its_backbone_is_mended(
    workshop: forge.Forge, data: Path, labelled: Path, whole: Path, tmp_path: Path
) -> None:
    for name, harm in {
        "none": lambda out: shutil.rmtree(out / "best"),
        "older": lambda out: (out / "best" / "config.json").write_text('{"record": {"steps": 1}}'),
        "unmarked": lambda out: Run(out).note(best=None),
    }.items():
        out = tmp_path / name
        shutil.copytree(whole, out)
        harm(out)
        assert workshop.session(out, data, eval=str(labelled), **SETTINGS)["codes"] == [0]
        assert (
            load(out / "best").record["steps"] == Run(out).record["best"]["step"] == Run(whole).record["best"]["step"]
        )
        assert (out / "best" / "model.safetensors").read_bytes() == (whole / "best" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("sharding", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])  # slow: a dozen seconds
def test_two_ranks_see_what_one_sees(
    workshop: forge.Forge, data: Path, labelled: Path, whole: Path, tmp_path: Path, sharding: str
) -> None:
    out = tmp_path / "run"
    told = workshop.session(out, data, world=2, sharding=sharding, eval=str(labelled), **SETTINGS)
    assert told["codes"] == [0, 0] and "Warning" not in told["said"], told["said"]
    for (step, one, health), (again, other, gathered) in zip(seen(whole), seen(out), strict=True):
        assert step == again and (one is None) == (other is None) and (health is None) == (gathered is None)
        if one:  # rounding may move a picture or two across a border
            assert other == {name: pytest.approx(value, abs=9) for name, value in one.items()}
        if health:
            assert gathered["rank"] == pytest.approx(health["rank"], rel=1e-2)
    assert (out / "checkpoints" / str(Run(out).record["best"]["step"])).is_dir()
    assert load(out / "best").record["steps"] == Run(out).record["best"]["step"]


def test_bad_labelled_data_are_refused_before_training(workshop: forge.Forge, data: Path, tmp_path: Path) -> None:
    told = workshop.session(tmp_path / "run", data, world=2, eval=str(data), **SETTINGS)
    assert told["codes"] == [2, 2] and told["said"].count("\n") == 1, told["said"]
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


class Guarded(Pictures):
    """Pictures in groups of three; those that must not be looked at are not given."""

    def __init__(self, size: int, forbidden: frozenset[int] = frozenset()):
        super().__init__(size)
        self.forbidden, self.given = forbidden, set[int]()

    def key(self, index: int) -> str:
        return f"picture {index}"

    def label(self, index: int) -> str:
        return str(index % 2)

    def group(self, index: int) -> str:
        return str(index // 3)

    def __getitem__(self, index: int) -> Sample:
        assert index not in self.forbidden, "test was read"
        self.given.add(index)
        return super().__getitem__(index)


def test_the_part_that_decides_is_held_out_of_train_by_group_and_test_is_never_read() -> None:
    split = read_labelled(Guarded(90), None, 64, 3)
    source = Guarded(90, frozenset(split.test.tolist()))
    live = Live(source, None, Preprocess.at(16), 1000)
    encoder = saccade.encoder.Encoder(
        saccade.vit.build("vit-ti/8", image_size=16, depth=1, width=48, heads=3, hidden=96), {}
    )
    state = torch.get_rng_state()
    found = live.measure(encoder)
    assert source.given == set(split.train.tolist()) and found == live.measure(encoder)
    assert torch.equal(state, torch.get_rng_state())
    learned = {row // 3 for row in split.train.tolist() if row not in live._held}
    assert live._held and not learned & {row // 3 for row in live._held}
    apart = set_apart(split.names(split.train), SHARE, "hold-out")
    assert live._held == set(split.train[apart].tolist()), "the part that evaluate chooses penalties on"


def test_each_picture_may_be_asked_of_those_of_other_groups() -> None:
    encoder = saccade.encoder.Encoder(
        saccade.vit.build("vit-ti/8", image_size=16, depth=1, width=48, heads=3, hidden=96), {}
    )
    live = Live(Guarded(90), None, Preprocess.at(16), 1000, leave_out=True)
    found = live.measure(encoder)
    vectors, labels, _ = live._look(encoder)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    groups, right = [row // 3 for row in live._read], 0
    for row in range(len(labels)):
        others = [other for other in range(len(labels)) if groups[other] != groups[row]]
        cosines = vectors[others] @ vectors[row]
        near = cosines.topk(20).indices
        votes = torch.zeros(2).scatter_add(0, labels[others][near], (cosines[near] / 0.07).exp())
        right += int(votes.argmax() == labels[row])
    assert live.examined == len(labels) == len(live._read) and found["knn"] == pytest.approx(100 * right / len(labels))
    held = Live(Guarded(90), None, Preprocess.at(16), 1000)
    assert held.measure(encoder)["linear"] == found["linear"] and held.examined < live.examined


def test_large_labelled_data_are_read_in_part() -> None:
    source = Guarded(300)
    live = Live(source, None, Preprocess.at(16), 50)
    held = [row for row in live._rows if row in live._held]
    assert len(live._rows) == 50 and len(held) == 10 and live._rows != list(range(50))
    assert live._rows == Live(Guarded(300), None, Preprocess.at(16), 50)._rows


def test_a_run_that_diverges_says_so_in_its_record(workshop: forge.Forge, data: Path, tmp_path: Path) -> None:
    told = workshop.session(tmp_path / "run", data, world=2, lr=1e30, **SETTINGS)
    assert told["codes"] == [1, 1] and told["said"].count("diverged [") == 1, told["said"]
    found = Run(tmp_path / "run").record["health"]
    assert found["verdict"] == "diverged" and "--lr" in found["advice"]


def test_numbers_in_the_record_are_json(whole: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in (whole / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    json.loads((whole / "record.json").read_text(), parse_constant=refuse)
    assert np.isfinite(Run(whole).summary["data_wait"])


def test_another_yardstick_is_another_run(workshop: forge.Forge, data: Path, labelled: Path, whole: Path) -> None:
    told = workshop.session(whole, data, eval=str(data), **SETTINGS)
    assert told["codes"] == [2] and f"eval was {labelled}, and is {data} now" in told["said"], told["said"]
    with pytest.raises(SaccadeError, match="no backbone"):
        load(whole / "checkpoints")


def test_what_is_saved_computes_what_was_trained(tmp_path: Path) -> None:
    """A start's own switches (here the scales of its branches) belong to the copy that is looked at and saved."""
    size = {"arch": "vit-ti/8", "image_size": 32}
    weights.save_backbone(tmp_path / "start", vit.build("vit-ti/8", image_size=32, layer_scale=0.5), {"licence": "x"})
    settings = {**small("dino"), **size, "steps": 1, "workers": 0}
    run = pretrain(Pictures(8), recipe="dino", out=tmp_path / "run", init=str(tmp_path / "start"), **settings)
    found, before = load(run.path).backbone, load(tmp_path / "start").backbone
    assert found.config.layer_scale == 0.5
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(images).cls, before(images).cls, rtol=0, atol=1e-4)  # its first step has no rate

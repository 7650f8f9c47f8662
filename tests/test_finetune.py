"""A task learned on a backbone: what is chosen where, what comes out, and that everything odd is named."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import saccade
from saccade import backbone, cli, finetune, load, predict, vit, weights
from saccade.errors import SaccadeError
from saccade.evaluate import linear
from saccade.finetune import calibration, classes, configured, folds, task, tuned
from saccade.finetune.tasks import classification, metric, regression
from saccade.finetune.tuning import looked_at
from saccade.settings import FinetuneArguments, Looking, TuningSettings

SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    """A network that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.SIZES, "nano", {"width": 32, "depth": 2, "heads": 2, "hidden": 64})
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone as it comes from a run; its weights are of no training."""
    torch.manual_seed(0)
    network = backbone.build("vit-nano/8", image_size=SIDE)
    folder = tmp_path_factory.mktemp("start")
    weights.save_backbone(folder, network, {"arch": "vit-nano/8", "recipe": None})
    return folder


def picture(number: int, kind: int) -> Image.Image:
    """Noise with a tint that says the kind."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 160, (SIDE, SIDE, 3))
    pixels[:, :, kind % 3] += 9 + 3 * random.integers(0, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds, 36 pictures to learn from and 18 to be examined on; the letter of a file is its group."""
    folder = tmp_path_factory.mktemp("folders")
    for part, first, count in (("train", 0, 36), ("test", 1000, 18)):
        for number in range(count):
            place = folder / part / "abc"[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            letter = "stuvwxyz"[number // 3 % 4 + (4 if part == "test" else 0)]
            picture(first + number, number % 3).save(place / f"{letter}{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list with a column of several labels, one of them on every third picture."""
    folder = tmp_path_factory.mktemp("listed")
    with (folder / "all.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "degree", "split"])
        for number in range(60):
            kind = number % 3
            picture(number, kind).save(folder / f"{number:02}.png")
            names = ["red", "green", "blue"][kind] + (";even" if number % 2 == 0 else "")
            writer.writerow([f"{number:02}.png", names, 3 * kind + 1, "test" if number >= 42 else "train"])
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def frozen_run(start: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(start, folders, out=tmp_path_factory.mktemp("runs") / "frozen").path


# what is computed


def test_temperature_mends_sureness_and_moves_no_answer() -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 5, generator=random) * 2
    labels = torch.multinomial(truth.softmax(1), 1, generator=random)[:, 0]
    found = calibration.fitted_temperature(truth * 3, labels)  # three times as sure as is right
    assert 2.8 < found < 3.2
    sure = calibration.probabilities(truth * 3, 1.0, False)
    mended = calibration.probabilities(truth * 3, found, False)
    assert calibration.expected_error(mended, labels) < 3 < calibration.expected_error(sure, labels)
    assert torch.equal(sure.argmax(1), mended.argmax(1))


def test_average_precision_is_that_of_the_definition() -> None:
    assert classes.average_precision(np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])) == pytest.approx(83.333)
    assert classes.average_precision(np.full(10, 0.5), np.arange(10) < 3) == 30.0  # ties say what chance says
    assert classes.average_precision(np.array([0.1]), np.array([0])) is None


def test_several_labels_are_one_regression_each() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=random, dtype=torch.float64)
    x = linear.Standard.of(x)(x)
    labels = torch.stack([(x[:, 0] > 0), (x[:, 1] + x[:, 2] > 0.5)], dim=1).double()
    both = linear.fit(x, labels, 2, 0.01)
    for column in range(2):
        alone = linear.fit(x, labels[:, column : column + 1], 1, 0.01)
        assert torch.allclose(both.weight[:, column], alone.weight[:, 0], atol=1e-4)
    slope = x.T @ ((x @ both.weight + both.bias).sigmoid() - labels) / 200 + 0.01 * both.weight
    assert slope.abs().max() < 1e-6  # the gradient is zero at the optimum


def test_weights_of_rows_are_rows_again() -> None:
    random = torch.Generator().manual_seed(1)
    x, labels = torch.randn(60, 4, generator=random, dtype=torch.float64), torch.arange(60) % 3
    often = torch.cat([x, x[:20]])
    weights_ = torch.ones(60, dtype=torch.float64)
    weights_[:20] = 2
    ours = linear.fit(x, labels, 3, 0.1, weights=weights_ * 60 / 80)
    theirs = linear.fit(often, torch.cat([labels, labels[:20]]), 3, 0.1)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-5)


def test_folds_part_no_group_and_leave_nobody_out() -> None:
    names = [f"g{number // 7}" for number in range(100)]
    held = np.zeros(100, dtype=bool)
    held[:20] = True
    parts = folds.folds(names, held)
    assert len(parts) == 5 and (np.stack(parts).sum(0) == 1).all()
    for part in parts:
        assert not {names[n] for n in np.flatnonzero(part)} & {names[n] for n in np.flatnonzero(~part)}
    many = np.ones(700, dtype=bool)
    many[:350] = False
    assert len(folds.folds([str(n) for n in range(700)], many)) == 1


# frozen


def test_what_a_run_holds(frozen_run: Path, start: Path, folders: Path) -> None:
    run = saccade.Run.open(frozen_run)
    summary = run.summary
    assert summary["mode"] == "frozen" and summary["task"] == "classification"
    test = summary["test"]
    assert test["accuracy"] > 60 and test["pictures"] == 18
    assert test["classes"]["a"].keys() == {"precision", "recall", "f1", "count"}
    assert np.array(test["confusion"]).sum() == 18
    assert test["baselines"]["majority"]["accuracy"] == pytest.approx(100 / 3, abs=0.01)
    assert 0 <= test["ece"]["after"] <= 100 and test["nll"]["after"] > 0
    told = lines(frozen_run / "predictions.jsonl")
    assert [one["key"] for one in told] == sorted(one["key"] for one in told) and len(told) == 18
    right = sum(one["label"] == one["predicted"] for one in told)
    assert test["accuracy"] == pytest.approx(100 * right / 18, abs=0.01)
    for one in told:
        assert sum(one["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert not any(name.startswith("_") for name in one)
    html = (frozen_run / "report.html").read_text()
    assert "could not be shown" not in html and "Taken for another" in html
    kept, began = load(frozen_run).backbone.state_dict(), load(start).backbone.state_dict()
    assert all(torch.equal(kept[name], began[name]) for name in began)
    assert load(frozen_run).preprocess == load(start, image_size=SIDE).preprocess


def test_the_same_call_is_done_and_another_is_refused(frozen_run: Path, start: Path, folders: Path) -> None:
    before = (frozen_run / "head" / "head.safetensors").stat().st_mtime_ns
    assert finetune(start, folders, out=frozen_run).summary == saccade.Run.open(frozen_run).summary
    assert (frozen_run / "head" / "head.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SaccadeError, match="holds another run: balance was False"):
        finetune(start, folders, out=frozen_run, balance=True)


def test_an_encoder_in_memory_stays_what_it_was(start: Path, folders: Path, tmp_path: Path) -> None:
    encoder = load(start)
    before = dict(encoder.record)
    for number in range(2):
        finetune(encoder, folders, out=tmp_path / str(number))
    assert encoder.record == before


def test_predict_says_what_the_run_said_of_test(frozen_run: Path, folders: Path, tmp_path: Path) -> None:
    result = predict(frozen_run, folders / "test", out=tmp_path / "said")
    run = saccade.Run.open(frozen_run)
    assert result["scores"]["accuracy"] == run.summary["test"]["accuracy"] and result["unknown"] == {}
    ours = {one["key"].rpartition("test/")[2]: one for one in lines(frozen_run / "predictions.jsonl")}
    theirs = lines(tmp_path / "said" / "predictions.jsonl")
    assert len(theirs) == 18
    for one in theirs:
        assert one["probabilities"] == pytest.approx(ours[one["key"]]["probabilities"], abs=1e-4)
    assert json.loads((tmp_path / "said" / "facts.json").read_text())["classes"] == ["a", "b", "c"]
    with pytest.raises(SaccadeError, match="exists"):
        predict(frozen_run, folders / "test", out=tmp_path / "said")


def test_pictures_without_labels_broken_and_of_other_sizes(frozen_run: Path, tmp_path: Path) -> None:
    place = tmp_path / "new"
    place.mkdir()
    picture(0, 0).resize((70, 41)).save(place / "wide.png")
    picture(1, 1).convert("L").save(place / "grey.png")
    (place / "torn.png").write_bytes(b"no picture")
    result = predict(frozen_run, place, out=tmp_path / "said")
    assert result["pictures"] == 2 and result["quarantined"] == 1 and "scores" not in result
    assert result["unreadable"][0]["key"] == "torn.png"
    assert [one["key"] for one in lines(tmp_path / "said" / "quarantine.jsonl")] == ["torn.png"]
    (place / "wide.png").unlink()
    (place / "grey.png").unlink()
    with pytest.raises(SaccadeError, match="none of 1 pictures can be read"):
        predict(frozen_run, place)


def test_classes_that_were_never_learned_are_named(frozen_run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["a", "b", "zebra", "zebra"]):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        picture(number, number % 3).save(tmp_path / "set" / name / f"{number}.png")
    result = predict(frozen_run, tmp_path / "set")
    assert result["unknown"] == {"zebra": 2} and result["scores"]["pictures"] == 2 and result["pictures"] == 4


def test_features_are_kept_and_looked_up(start: Path, folders: Path, tmp_path: Path) -> None:
    settings = {"views": 2, "cache": tmp_path / "cache", "min_scale": 0.5}
    one = finetune(start, folders, out=tmp_path / "one", **{**settings, "cache": str(tmp_path / "cache")})
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    two = finetune(start, folders, out=tmp_path / "two", **{**settings, "cache": str(tmp_path / "cache")})
    assert files[0].stat().st_mtime_ns == stamp  # nothing new to write
    told = [lines(run.path / "predictions.jsonl") for run in (one, two)]
    assert told[0] == told[1]
    encoder = load(start)
    asked = FinetuneArguments(backbone="", data="", out="", cache=str(tmp_path / "cache"))
    own = classification.Settings(views=2, min_scale=0.5)
    examples = classification.read(folders, encoder, asked, own)
    seen = classification.see(encoder, examples, own, asked)
    assert seen.computed == 0 and seen.copied("cls", seen.places(examples.learned)).shape == (36, 2, 32)
    plain = seen.of("cls", seen.places(examples.learned))
    assert not torch.allclose(seen.copied("cls", seen.places(examples.learned))[:, 0], plain, atol=1e-3)


def test_few_labels_are_the_draws_of_evaluate(start: Path, folders: Path, tmp_path: Path) -> None:
    asked = FinetuneArguments(backbone="", data="", out="", seed=1)
    examples = classification.read(folders, load(start), asked, classification.Settings(labels=4))
    assert len(examples.learned) == 12 and len(examples.test) == 18
    from saccade.evaluate.labelled import read_labelled
    from saccade.evaluate.splits import few

    data = read_labelled(folders, None, None, 3)
    drawn = data.train[few(data.labels[data.train], [data.keys[r] for r in data.train], 4, 0, 1)]
    assert set(drawn) == set(examples.learned)
    run = finetune(start, folders, out=tmp_path / "few", labels=1)
    assert "too few labels" in run.summary["chosen"]["by"]


def test_rare_classes_count_alike_when_balanced(start: Path, tmp_path: Path) -> None:
    for number in range(66):
        name = "rare" if number % 11 == 0 else "often"
        place = tmp_path / "data" / ("test" if number >= 44 else "train") / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 200, (SIDE, SIDE, 3)) + (4 if name == "rare" else 0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    recalls = {}
    for balance in (False, True):
        run = finetune(start, tmp_path / "data", out=tmp_path / f"run{balance}", balance=balance)
        recalls[balance] = run.summary["test"]["classes"]["rare"]["recall"]
    assert recalls[True] > recalls[False]


# several labels


def test_several_labels(start: Path, listed: Path, tmp_path: Path) -> None:
    run = finetune(start, listed / "all.csv", out=tmp_path / "several", separator=";")
    test = run.summary["test"]
    assert {"map", "macro_f1", "micro_f1", "all_right"} <= test.keys()
    assert test["map"] > test["baselines"]["prior"]["map"]
    assert test["classes"]["red"]["average_precision"] > 45
    told = lines(run.path / "predictions.jsonl")
    assert all(isinstance(one["predicted"], list) and len(one["probabilities"]) == 4 for one in told)
    again = predict(run, listed / "all.csv")
    assert again["pictures"] == 60 and again["scores"]["pictures"] == 18
    assert again["warnings"] == ["42 pictures are in train: they are answered, and not scored"]
    assert again["scores"]["map"] == test["map"]


def test_json_lists_are_several_labels_and_empty_ones_are_none(start: Path, listed: Path, tmp_path: Path) -> None:
    rows = [{"path": str(listed / f"{n:02}.png"), "label": ["red", "green", "blue"][n % 3 : n % 3 + 1 + n % 2],
             "split": "test" if n >= 42 else "train"} for n in range(60)]  # fmt: skip
    rows[3]["label"] = []
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = finetune(start, tmp_path / "list.jsonl", out=tmp_path / "run")
    assert run.summary["split"]["classes"] == 3
    assert run.summary["split"]["train"] + run.summary["split"]["held"] == 42


# what is odd


def test_everything_odd_is_named(start: Path, listed: Path, tmp_path: Path) -> None:
    with (tmp_path / "odd.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for number in range(42):
            writer.writerow([listed / f"{number:02}.png", "abc"[number % 3], "test" if number >= 30 else "train"])
        writer.writerow([listed / "00.png", "b", "train"])  # again, and otherwise
        writer.writerow([listed / "50.png", "", "train"])  # no label
        writer.writerow([listed / "51.png", "a", "spare"])  # in no part
        writer.writerow([listed / "52.png", "zebra", "test"])  # never learned
        writer.writerow([listed / "missing.png", "a", "train"])
        (tmp_path / "torn.png").write_bytes(b"torn")
        writer.writerow([tmp_path / "torn.png", "b", "test"])
    run = finetune(start, tmp_path / "odd.csv", out=tmp_path / "run")
    summary = run.summary
    reasons = {Path(one["key"]).name: one["reason"] for one in lines(run.path / "quarantine.jsonl")}
    assert reasons["00.png"] == "its path comes again with another label; the first row counts"
    assert reasons["50.png"] == "no label"
    assert reasons["51.png"] == "neither in train nor in test"
    assert reasons["52.png"] == "class 'zebra' is not in train"
    assert "No such file" in reasons["missing.png"] and "torn.png" in reasons
    assert summary["quarantined"] == 2 and summary["aside"] == 4
    assert summary["test"]["pictures"] == 12
    assert any("zebra" in line for line in summary["warnings"])


def test_one_class_alone_is_refused(start: Path, tmp_path: Path) -> None:
    for number in range(8):
        place = tmp_path / "one" / ("test" if number > 5 else "train") / "only"
        place.mkdir(parents=True, exist_ok=True)
        picture(number, 0).save(place / f"{number}.png")
    with pytest.raises(SaccadeError, match="only the class 'only'"):
        finetune(start, tmp_path / "one", out=tmp_path / "run")


def test_groups_are_never_split(start: Path, folders: Path) -> None:
    asked = FinetuneArguments(backbone="", data="", out="", group_by=r"/(\w)\d+\.png")
    examples = classification.read(folders, load(start), asked, classification.Settings())
    parts = [set(examples.names(rows)) for rows in (examples.train, examples.held, examples.test)]
    assert all(parts) and not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "clasification"}, "did you mean 'classification'"),
        ({"vews": 3}, "did you mean '--views'"),
        ({"lr": 1e-3}, "--lr is of a backbone that moves"),
        ({"from_scratch": True}, "fresh weights that stand still"),
        ({"label": "kind"}, "has no column 'kind'"),
    ],
)
def test_mistakes_are_said(settings: dict[str, Any], said: str, start: Path, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(SaccadeError) as mistake:
        finetune(start, folders, out=tmp_path / "run", **settings)
    assert said in str(mistake.value)


def test_the_command_line(start: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", str(start), str(folders), "--views", "1", "--out", str(tmp_path / "run"), "--json"]
    assert cli.main(words) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["ok"] and said["test"]["accuracy"] > 60
    assert saccade.Run.open(tmp_path / "run").config["settings"]["views"] == 1
    assert cli.main(["predict", str(tmp_path / "run"), str(folders / "test"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["pictures"] == 18
    assert cli.main(["predict", str(tmp_path / "run"), str(folders / "test")]) == 0
    assert cli.main(["finetune", str(start), str(folders), "--out", str(tmp_path / "x"), "--epoch", "3", "--json"]) == 2
    assert "did you mean '--epochs'" in json.loads(capsys.readouterr().out.splitlines()[-1])["hint"]


def test_a_head_is_itself_again(frozen_run: Path, tmp_path: Path) -> None:
    model = tuned.load(frozen_run)
    images = torch.rand(2, 3, SIDE, SIDE)
    (found,) = model(images)
    assert torch.allclose(found.sum(1), torch.ones(2), atol=1e-5)
    model.save(tmp_path / "copy")
    assert torch.equal(tuned.load(tmp_path / "copy")(images)[0], found)
    state = tmp_path / "copy" / "head" / "head.safetensors"
    state.write_bytes(state.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(SaccadeError, match="not the file that was saved"):
        tuned.load(tmp_path / "copy")
    with pytest.raises(SaccadeError, match="has no head"):
        tuned.load(tmp_path)


# tuning

QUICK: dict[str, Any] = {"epochs": 3, "batch": 12, "lr": 1e-3, "workers": 0, "log_every": 1}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_backbone_moves_and_the_best_epoch_comes_out(mode: str, start: Path, folders: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "head_start": False, "rank": 2, "lr": 0.05, "epochs": 6}
    run = finetune(start, folders, mode=mode, out=tmp_path / mode, **settings)
    summary = run.summary
    assert summary["mode"] == mode and summary["chosen"]["best"]["step"] > 1
    evaluations = summary["chosen"]["evaluations"]
    assert summary["chosen"]["best"]["value"] == max(one["accuracy"] for one in evaluations)
    moved, still = load(run.path).backbone.state_dict(), load(start).backbone.state_dict()
    assert moved.keys() == still.keys()  # LoRA is merged
    assert any(not torch.equal(moved[name], still[name]) for name in still)
    assert predict(run, folders / "test")["scores"]["accuracy"] == summary["test"]["accuracy"]
    assert "could not be shown" not in (run.path / "report.html").read_text()


def test_it_begins_with_the_head_of_frozen_features(start: Path, folders: Path, tmp_path: Path) -> None:
    run = finetune(start, folders, mode="full", out=tmp_path / "run", **{**QUICK, "epochs": 1})
    first = lines(run.path / "metrics.jsonl")[0]
    assert first["loss"] < 0.9 * np.log(3)
    # which has not learned of the pictures that judge the epochs
    asked = FinetuneArguments(backbone="", data="", out="")
    encoder, own = load(start), classification.Settings()
    examples = classification.read(folders, encoder, asked, own)
    seen = classification.see(encoder, examples, own, asked)
    blind = dataclasses.replace(examples, held=examples.held[:0])
    head = classification.fit(seen, blind, own).head
    outputs, targets = looked_at(encoder, head, task.find("classification"), examples)
    assert first["eval"]["accuracy"] == classification.score(outputs, targets, own)["accuracy"]


def test_from_scratch_begins_with_nothing(start: Path, folders: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "epochs": 2, "mixup": 0.5, "average": 0.5}
    run = finetune(start, folders, mode="full", from_scratch=True, out=tmp_path / "scratch", **settings)
    assert lines(run.path / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(3), abs=1e-4)
    assert load(run.path).record["derived_from"] == []


def test_a_stopped_run_goes_on_to_the_same_weights(
    start: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "mode": "full", "average": 0.9, "save_every": "2", "patience": 50}
    whole = finetune(start, folders, out=tmp_path / "whole", **settings)
    from saccade.finetune.tuning import Tuning

    log = Tuning._log

    def stopping(self: Tuning, metrics: Any) -> bool:
        if self.step == 5:
            raise KeyboardInterrupt
        return log(self, metrics)

    monkeypatch.setattr(Tuning, "_log", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune(start, folders, out=tmp_path / "torn", **settings)
    monkeypatch.undo()
    torn = finetune(start, folders, out=tmp_path / "torn", **settings)
    one, two = (load(run.path).backbone.state_dict() for run in (whole, torn))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert lines(whole.path / "predictions.jsonl") == lines(torn.path / "predictions.jsonl")


def test_one_that_gets_no_better_ends(start: Path, folders: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "epochs": 30, "lr": 1e-9, "patience": 2}
    run = finetune(start, folders, mode="full", out=tmp_path / "run", **settings)
    assert run.summary["chosen"]["epochs"] < 8


def test_few_pictures_make_small_steps() -> None:
    way = TuningSettings()
    assert [way.fewer(n) for n in (3, 80, 300, 512, 10_000)] == [8, 8, 32, 64, 64]
    assert way.peak() == pytest.approx(way.lr / 2)


def test_settings_of_modes() -> None:
    _, _, own, way = configured("x", "y", out="z", mode="lora", views=2, steps=7)
    assert own.views == 2 and way is not None and way.steps == 7 and way.epochs is None and way.layer_decay == 1
    assert isinstance(own, Looking)
    assert task.names() == sorted(task.names()) and "classification" in task.names()


# the whole model elsewhere


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_whole_model_in_onnxruntime(kind: str, frozen_run: Path, folders: Path, tmp_path: Path) -> None:
    run = frozen_run
    if kind == "resnet":
        torch.manual_seed(0)
        network = backbone.build("resnet-18/8", image_size=SIDE)
        weights.save_backbone(tmp_path / "start", network.eval(), {"arch": "resnet-18/8", "recipe": None})
        run = finetune(tmp_path / "start", folders, out=tmp_path / "run").path
    result = saccade.export(run, to="onnx", out=tmp_path / "out")
    assert result["checked"]["max_abs_difference"] < 1e-4 and result["outputs"] == ["probabilities"]
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    images = torch.rand(5, 3, SIDE, SIDE)
    (found,) = session.run(None, {"images": images.numpy()})
    assert np.allclose(found, tuned.load(run)(images)[0], atol=1e-5) and np.allclose(found.sum(1), 1, atol=1e-5)
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts["facts"]["classes"] == ["a", "b", "c"] and facts["preprocess"]["crop"] == SIDE


# numbers, and likeness


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_numbers_are_learned(mode: str, start: Path, listed: Path, tmp_path: Path) -> None:
    moving = {**QUICK, "epochs": 1} if mode == "full" else {}
    run = finetune(start, listed / "all.csv", task="regression", target=("degree",), mode=mode, out=tmp_path / "run",
                   **moving)  # fmt: skip
    test = run.summary["test"]
    assert test["r2"] > 0.2 and test["mean_absolute_error"] < test["baselines"]["mean"]["mean_absolute_error"]
    assert test["baselines"]["mean"]["r2"] == pytest.approx(0, abs=0.1)
    told = lines(run.path / "predictions.jsonl")
    off = [one["predicted"]["degree"] - one["label"]["degree"] for one in told]
    assert np.abs(off).mean() == pytest.approx(test["mean_absolute_error"], rel=1e-3)
    assert predict(run, listed / "all.csv")["scores"]["pictures"] == 18
    assert "could not be shown" not in (run.path / "report.html").read_text()


def test_ridge_is_that_of_the_normal_equations() -> None:
    random = torch.Generator().manual_seed(0)
    y = torch.randn(30, 2, generator=random, dtype=torch.float64)
    for width in (8, 50):
        x = torch.randn(30, width, generator=random, dtype=torch.float64) + 3
        for penalty, (weight, bias) in zip(regression.PENALTIES, regression._ridge(x, y), strict=True):
            off = x @ weight + bias - y
            slope = x.T @ off / 30 + penalty * weight
            assert slope.abs().max() < 1e-6 and off.mean(dim=0).abs().max() < 1e-8


def test_odd_numbers_are_named(start: Path, listed: Path, tmp_path: Path) -> None:
    rows = [[str(listed / f"{n:02}.png"), str(n % 3)] for n in range(40)]
    rows += [[str(listed / "50.png"), "warm"], [str(listed / "51.png"), ""], [str(listed / "52.png"), "nan"]]
    (tmp_path / "list.csv").write_text("path,degree\n" + "".join(",".join(row) + "\n" for row in rows))
    run = finetune(start, tmp_path / "list.csv", task="regression", target=("degree",), out=tmp_path / "run")
    reasons = {Path(one["key"]).name: one["reason"] for one in lines(run.path / "quarantine.jsonl")}
    assert reasons == {"50.png": "'warm' is no number", "51.png": "no number", "52.png": "'nan' is no number"}
    with pytest.raises(SaccadeError, match="did you mean 'degree'"):
        finetune(start, tmp_path / "list.csv", task="regression", target=("degre",), out=tmp_path / "other")


def test_pictures_of_a_class_come_near(start: Path, folders: Path, tmp_path: Path) -> None:
    run = finetune(start, folders, task="metric", out=tmp_path / "run")
    test = run.summary["test"]
    assert test["map"] >= test["baselines"]["untouched"]["map"] - 5
    vectors = torch.tensor([one["vector"] for one in lines(run.path / "predictions.jsonl")])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(18), atol=1e-4)
    again = predict(run, folders / "test")
    assert again["scores"]["map"] == pytest.approx(test["map"], abs=0.5)
    with pytest.raises(SaccadeError, match="classification moves a backbone"):
        finetune(start, folders, task="metric", mode="full", out=tmp_path / "other")


def test_retrieval_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.3], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])  # the last is alone and asks nothing
    found = metric.retrieval(vectors, labels)
    # the first two find each other first; the third finds its own first; the fourth after two others
    assert found["recall_at_1"] == 75 and found["recall_at_5"] == 100
    assert found["map"] == pytest.approx(100 * (1 + 1 + 1 + 1 / 3) / 4, abs=0.01)

"""Each planted culprit is named and no other, on features made here; a run is read as it lies, bad ones are named."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import saccade
from saccade import backbone, cli, vit, weights
from saccade.diagnose import labels, leakage, shift
from saccade.diagnose.culprits import ADVICE, ORDER, told_apart
from saccade.diagnose.evidence import Side, folds
from saccade.errors import SaccadeError
from saccade.evaluate import linear

CLASSES = ["ant", "bee", "cat"]
CENTRES = np.random.default_rng(99).normal(size=(3, 12)) * 1.3


def side(count: int, seed: int, prefix: str) -> Side:
    """Features in three clouds, features and pixels that say little, and pictures that no other resembles."""
    random = np.random.default_rng(seed)
    truth = random.integers(3, size=count)
    features = torch.from_numpy(CENTRES[truth] + random.normal(size=(count, 12))).float()
    pixels = torch.from_numpy(random.random((count, 3, 24, 24))).float()
    names = [f"{prefix}{n // 2}" for n in range(count)]  # two of a group
    fresh = torch.from_numpy(CENTRES[truth] * 0.2 + random.normal(size=(count, 12))).float()
    return Side(features, features, fresh, pixels, truth, names, truth, [f"{prefix}/{n}.png" for n in range(count)])


@pytest.fixture(scope="module")
def sides() -> tuple[Side, Side]:
    return side(400, 0, "train"), side(200, 1, "test")


def headed(train: Side, test: Side, penalty: float = 0.01) -> tuple[Side, Side]:
    """What a linear head says of both."""
    standard = linear.Standard.of(train.features)
    fitted = linear.fit(standard(train.features), torch.from_numpy(train.labels), 3, penalty)
    guesses = (fitted.predict(standard(part.features)).numpy() for part in (train, test))
    return tuple(replace(part, guesses=said) for part, said in zip((train, test), guesses, strict=True))  # type: ignore[return-value]


def planted(cause: str, train: Side, test: Side) -> tuple[Side, Side]:
    random = np.random.default_rng(5)
    if cause == "labels":
        return headed(*(replace(part, labels=np.where(random.random(len(part.labels)) < 0.2, (part.labels + 1) % 3,
                                                      part.labels)) for part in (train, test)))  # fmt: skip
    if cause == "shift":
        moved = test.features + torch.linspace(-4, 4, 12)
        return headed(train, replace(test, features=moved, start=moved))
    if cause == "backbone":
        train, test = (
            replace(part, features=part.untrained[:, :6], start=part.untrained[:, :6]) for part in (train, test)
        )
        return headed(train, test)
    if cause == "leakage":
        copies = train.pixels[:40]
        cut = F.interpolate(copies[:, :, 1:-1, 1:-1], size=(24, 24), mode="bicubic", align_corners=False).clamp(0, 1)
        pixels, features = test.pixels.clone(), test.features.clone()
        pixels[:40], features[:40] = cut, train.features[:40] + 0.05
        truth = test.labels.copy()
        truth[:40] = train.labels[:40]
        return headed(train, replace(test, pixels=pixels, features=features, start=features, labels=truth))
    if cause == "head":
        train, test = headed(train, test)
        weak = np.where(test.labels == 2, 1, test.guesses)  # it does not know one class
        known = np.where(train.labels == 2, 1, train.guesses)
        return replace(train, guesses=known), replace(test, guesses=weak)
    return headed(train, test)


@pytest.mark.parametrize("cause", ["none", *ORDER])
def test_the_planted_cause_is_named_and_no_other(cause: str, sides: tuple[Side, Side]) -> None:
    found = told_apart(*planted(cause, *sides), CLASSES)
    assert [name for name in ORDER if found[name].found] == ([] if cause == "none" else [cause]), {
        name: one.reason for name, one in found.items()
    }
    for one in found.values():
        if one.found:
            assert one.rows and len(one.rows) == len(one.beside)
            assert one.interval is None or one.interval[0] <= one.strength <= one.interval[1]
    if cause == "labels":
        assert 0.1 < (found["labels"].strength or 0) < 0.35
        train, _ = planted(cause, *sides)
        listed = list(found["labels"].rows)
        assert (train.labels[listed] != sides[0].labels[listed]).mean() > 0.9, "the clearest of the list are wrong"
    if cause == "leakage":
        assert set(found["leakage"].rows) <= set(range(40))
        assert all(beside[0] == row for row, beside in zip(found["leakage"].rows, found["leakage"].beside, strict=True))


def test_several_causes_are_named_together(sides: tuple[Side, Side]) -> None:
    train, test = planted("labels", *sides)
    moved = test.features + torch.linspace(-4, 4, 12)
    found = told_apart(*headed(train, replace(test, features=moved, start=moved)), CLASSES)
    assert {name for name, one in found.items() if one.found} == {"labels", "shift"}


def test_patients_that_differ_are_no_shift(sides: tuple[Side, Side]) -> None:
    """Every group has a place of its own: rows alone would be told apart, whole groups are not."""
    random = np.random.default_rng(2)

    def patients(count: int, seed: int, prefix: str) -> Side:
        one, own = side(count, seed, prefix), random.normal(size=(20, 12)) * 3
        which = np.arange(count) % 20
        moved = one.features + torch.from_numpy(own[which]).float()
        return replace(one, features=moved, start=moved, names=[f"{prefix}{n}" for n in which])

    train, test = patients(400, 0, "a"), patients(200, 1, "b")
    assert shift.discrepancy(train, test) > shift.CHANCE
    alone = [replace(part, names=[f"{key}" for key in part.keys]) for part in (train, test)]
    assert shift.discrepancy(alone[0], alone[1]) <= shift.CHANCE


def test_other_shares_of_the_classes_are_no_shift(sides: tuple[Side, Side]) -> None:
    train, test = (replace(part, names=part.keys) for part in sides)
    kept = np.flatnonzero((test.labels != 0) | (np.arange(len(test.labels)) % 4 == 0))
    assert shift.discrepancy(train, test.chosen(kept)) > shift.CHANCE


def test_folds_part_no_name_and_are_all_used() -> None:
    names = [f"n{number % 17}" for number in range(200)]
    fold = folds(names)
    assert set(fold) == set(range(5))
    assert all(len(set(fold[[n == name for n in names]])) == 1 for name in set(names))


def test_detail_knows_a_copy_and_not_a_likeness() -> None:
    random = torch.Generator().manual_seed(0)
    light = F.interpolate(torch.rand(8, 1, 3, 3, generator=random), size=(48, 48), mode="bicubic").clamp(0, 1)
    ours, theirs = (0.7 * light + 0.3 * torch.rand(8, 1, 48, 48, generator=random) for _ in range(2))
    assert leakage._fit(ours, theirs).max() < 0.5, "the same light, other detail"
    cut = F.interpolate(ours[:, :, 1:-2, 2:-1], size=(48, 48), mode="bilinear").clamp(0, 1)
    assert leakage._fit(ours, cut).min() > leakage.DETAIL


def test_confident_learning_by_hand() -> None:
    said = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.05, 0.95]])
    wrong, share = labels.confident(said, np.array([0, 0, 1, 1, 0]))
    assert wrong.tolist() == [4]
    assert share == pytest.approx(0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of `saccade finetune` on two kinds of noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.SIZES, "nano", {"width": 32, "depth": 2, "heads": 2, "hidden": 64})
        folder = tmp_path_factory.mktemp("diagnosed")
        torch.manual_seed(0)
        network = backbone.build("vit-nano/8", image_size=32)
        weights.save_backbone(folder / "start", network, {"arch": "vit-nano/8", "recipe": None})
        random = np.random.default_rng(0)
        for number in range(90):
            place = folder / "pictures" / ("train" if number < 60 else "test") / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 200, (32, 32, 3))
            pixels[..., number % 2] += 30
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:03}.png")
        saccade.finetune(folder / "start", folder / "pictures", out=folder / "run")
        yield folder


def test_a_run_is_diagnosed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run / "pictures" / "test" / "a" / "060.png"
    kept = first.read_bytes()
    first.write_bytes(b"no picture")
    try:
        assert cli.main(["diagnose", str(run / "run"), "--json"]) == 0
    finally:
        first.write_bytes(kept)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["findings"]) == list(ORDER)
    assert found["quarantined"] == 1 and found["train"] == 60 and found["test"] == 29
    assert found["named"] == [name for name, one in found["findings"].items() if one["found"]]
    assert found["verdict"] == (", ".join(found["named"]) or "nothing found")
    assert any("not those that the run saw" in text for text in found["warnings"])
    assert json.loads((run / "run" / "diagnosis.json").read_text())["findings"] == found["findings"]
    page = (run / "run" / "diagnosis.html").read_text()
    assert "<script" not in page and all(ADVICE[name][:20].lower() in page.lower() for name in found["named"])
    assert cli.main(["diagnose", str(run / "run")]) == 0
    assert "labels:" in capsys.readouterr().out


def test_what_was_tuned_is_judged_by_where_it_began(run: Path) -> None:
    saccade.finetune(run / "start", run / "pictures", out=run / "full", mode="full", epochs=None, steps=2, batch=16)
    found = saccade.diagnose(run / "full")
    assert "of test by its features" in found["findings"]["backbone"]["reason"]


def test_bad_input_is_named_before_any_work(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="not a run directory"):
        saccade.diagnose(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((run / "run" / "config.json").read_text())
    for wrong, said in (
        ({"task": "segmentation"}, "of the task segmentation"),
        ({"verb": "pretrain"}, "another verb"),
        ({"data": str(tmp_path / "moved")}, "which is gone"),
        ({"data": "a source in memory"}, "source in memory"),
        ({}, "no head"),
    ):
        (other / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(SaccadeError, match=said) as raised:
            saccade.diagnose(other)
        assert raised.value.hint
    moved = run / "moved"
    (run / "pictures").rename(moved)
    try:
        with pytest.raises(SaccadeError, match="which is gone"):
            saccade.diagnose(run / "run")
        assert saccade.diagnose(run / "run", data=moved)["data"] == str(moved)
    finally:
        moved.rename(run / "pictures")


def test_a_test_side_without_labels_is_named(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for kind in "ab":
        (bare / "train" / kind).mkdir(parents=True)
        for path in (run / "pictures" / "train" / kind).iterdir():
            (bare / "train" / kind / path.name).write_bytes(path.read_bytes())
    (bare / "test").mkdir()
    (bare / "test" / "x.png").write_bytes((run / "pictures" / "test" / "a" / "060.png").read_bytes())
    with pytest.raises(SaccadeError, match=r"nothing in test|no picture of a class"):
        saccade.diagnose(run / "run", data=bare)


def test_the_guide_does_what_it_says(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/diagnose.md, on small pictures."""
    text = (Path(__file__).parents[1] / "docs" / "diagnose.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines() if line]
    assert any("diagnose" in line for line in commands) and any("evaluate" in line for line in commands)
    folder = run / "guide"
    folder.mkdir()
    (folder / "PICTURES").symlink_to(run / "pictures")
    torch.manual_seed(1)
    for name in ("BACKBONE", "OTHER"):
        network = backbone.build("vit-nano/8", image_size=32)
        weights.save_backbone(folder / name, network, {"arch": "vit-nano/8", "recipe": None})
    monkeypatch.chdir(folder)
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "saccade"
        short = [
            "0.05" if word == "5" and words[place - 1] == "--scratch" else word for place, word in enumerate(words)
        ]
        assert cli.main(short[1:]) == 0, line

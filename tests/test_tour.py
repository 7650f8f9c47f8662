"""The tour, short: all its steps, what it prints, and that nothing is done twice or overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saccade import cli, tour
from saccade.errors import SaccadeError
from saccade.evaluate.labelled import read_labelled

KEYS = {"seconds", "peak_memory_gb", "images", "labels_per_class", "knn", "few_label", "report"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tour, "SETTINGS", {**tour.SETTINGS, "batch": 8})
    monkeypatch.setattr(tour, "MINUTES", 0.01)
    return tmp_path / "tour"


@pytest.mark.slow  # evaluates all shipped pictures: a minute
def test_short_tour(short: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["tour", "--out", str(short), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS and found["labels_per_class"] == 10
    for name in ("pixels", "untrained", "pretrained"):
        assert 0 < found["knn"][name] < 100 and found["few_label"][name].keys() == {"mean", "std"}
    page = Path(found["report"]).read_text()
    assert f"{found['knn']['pretrained']:.1f}" in page and "://" not in page
    monkeypatch.setattr(tour, "pretrain", None)  # the same call again does nothing
    assert tour.tour(out=short).items() <= found.items()


@pytest.mark.slow  # the whole tour: minutes
def test_whole_tour(tmp_path: Path) -> None:
    found = tour.tour(out=tmp_path / "tour")
    assert found["seconds"] < 300 and found["peak_memory_gb"] < 4
    few, knn = found["few_label"], found["knn"]
    assert few["pretrained"]["mean"] > 5 + max(few["pixels"]["mean"], few["untrained"]["mean"])
    assert knn["pretrained"] > max(knn["pixels"], knn["untrained"])


def test_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SaccadeError, match="not a tour's directory"):
        tour.tour(out=tmp_path)
    (tmp_path / "tour.json").write_text("{}")
    with pytest.raises(SaccadeError, match="not of a tour"):
        tour.tour(out=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_verdict_is_honest() -> None:
    found = {"mean": 1.0, "two_standard_errors": 2.0, "verdict": "no difference", "against": "pixels"}
    assert tour._verdict(found) == "no difference from raw pixels"
    found = {"mean": -3.0, "two_standard_errors": 2.0, "verdict": "worse", "against": "untrained/mean"}
    assert tour._verdict(found) == "lost 3.0 ± 2.0 points against the same network, untrained"


def test_train_and_test_tars_are_an_official_split() -> None:
    labelled = read_labelled(tour.PICTURES, None, 48, 3)
    assert labelled.split["made"] == "as given: train and test" and not labelled.warnings
    for rows, name in ((labelled.train, "train.tar/"), (labelled.test, "test.tar/")):
        assert len(rows) and all(labelled.keys[row].startswith(name) for row in rows)
    assert "train.tar" not in labelled.classes

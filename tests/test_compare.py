"""Several backbones in one table: each as it scores alone, intervals, an answer, and mistakes named before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saccade
from saccade import backbone, cli, compare, vit, weights
from saccade.errors import SaccadeError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two backbones `good` and `other`, and pictures of two kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.SIZES, "nano", {"width": 32, "depth": 2, "heads": 2, "hidden": 64})
        folder = tmp_path_factory.mktemp("compared")
        for seed, name in enumerate(("good", "other")):
            torch.manual_seed(seed)
            network = backbone.build("vit-nano/8", image_size=32)
            record = {"arch": "vit-nano/8", "recipe": None if seed else "mae"}
            weights.save_backbone(folder / name, network, record)
        random = np.random.default_rng(0)
        for number in range(90):
            kind = folder / "pictures" / ("train" if number < 60 else "test") / "ab"[number % 2]
            kind.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 200, (32, 32, 3))
            pixels[..., number % 2] += 20
            Image.fromarray(pixels.astype(np.uint8)).save(kind / f"{number:03}.png")
        yield folder


def test_each_scores_as_it_does_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "table.json"
    words = ["evaluate", str(place / "good"), str(place / "other"), str(place / "pictures"), "--labels", "1,5"]
    assert cli.main([*words, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in found["table"]}
    assert [row["kind"] for row in found["table"]] == ["raw pixels", "untrained", "a run", "published"]
    for name in ("good", "other"):
        alone = saccade.evaluate(place / name, place / "pictures", labels=(1, 5))
        row = rows[str(place / name)]
        assert row["pooling"] == alone["pooled"]["chosen"]
        for task in ("knn", "linear"):
            assert row[task] == alone[task]
            low, high = row["intervals"][task]
            assert low <= row[task] <= high and low < high
        assert {
            count: {part: row["few_label"][count][part] for part in ("mean", "std", "draws")} for count in "15"
        } == {count: {part: alone["few_label"][count][part] for part in ("mean", "std", "draws")} for count in "15"}
        assert rows["raw pixels"]["linear"] == alone["baselines"]["pixels"]["linear"]
    answered = found["answered"]
    assert answered["interval"][0] <= answered["gain"] <= answered["interval"][1]
    assert f"{answered['gain']:+.1f} points" in found["answer"] and answered["against"] in found["answer"]
    assert json.loads(out.read_text())["answer"] == found["answer"]
    page = out.with_suffix(".html").read_text()
    assert "Was pretraining worth it?" in page and "raw pixels" in page
    assert cli.main([*words, "--out", str(out)]) == 2, "nothing is overwritten"
    assert cli.main(words) == 0
    assert found["answer"] in capsys.readouterr().out


def test_from_the_labels_alone(place: Path) -> None:
    found = saccade.evaluate(place / "good", place / "pictures", tasks=("linear",), scratch=0.03, baselines=False)
    scratch = next(row for row in found["table"] if row["kind"] == "from scratch")
    assert scratch["steps"] >= 1 and 0 <= scratch["linear"] <= 100
    assert found["answered"]["against"] == scratch["name"]


@pytest.mark.parametrize(
    ("gain", "worth", "start"), [(1, "yes", "Yes"), (0, "not shown", "Not shown"), (-1, "no", "No")]
)
def test_the_answer_follows_the_interval(gain: int, worth: str, start: str) -> None:
    random = np.random.default_rng(0)
    theirs = random.random(200) < 0.5
    other = random.random(200) < (0.5 + 0.4 * gain)
    rows = [
        compare._Row("ours", "a run", {"linear": other[None]}, 50.0),
        compare._Row("worse", "a run", {"linear": ~other[None]}, 10.0),  # train decides, not test
        compare._Row("pixels", "raw pixels", {"linear": theirs[None]}, 99.0),
    ]
    found = compare._answered(rows, ("linear",), [str(n) for n in range(200)])
    assert found is not None and found["backbone"] == "ours" and found["worth"] == worth
    assert compare._sentence(found).startswith(start)


def test_mistakes_are_named_before_any_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "extract", lambda *_, **__: pytest.fail("work began"))
    good, pictures = str(place / "good"), place / "pictures"
    with pytest.raises(SaccadeError, match="named twice"):
        saccade.evaluate([good, f"{place}/other/../good"], pictures)
    with pytest.raises(SaccadeError, match="nowhere"):
        saccade.evaluate([good, str(place / "nowhere")], pictures)
    with pytest.raises(SaccadeError, match=r"2 backbones do not load.*nowhere.*neither"):
        saccade.evaluate([str(place / "nowhere"), good, str(place / "neither")], pictures)
    with pytest.raises(SaccadeError, match="one backbone at a time"):
        saccade.evaluate([good, str(place / "other")], pictures, tasks=("zero-shot",))
    with pytest.raises(SaccadeError, match="missing"):
        saccade.evaluate([good, str(place / "other")], place / "missing")

"""A number for every pixel: files of several kinds, unknown numbers, errors by hand, heads that learn and are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import predict, vit
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable
from saccade.finetune import finetune, measured
from saccade.finetune.tasks import dense

QUICK: dict[str, Any] = {"decoder_steps": 12, "unit": 100.0, "unknown": 0.0}


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    config = vit.ViTConfig(width=32, depth=2, heads=2, hidden=32, patch=4, image_size=16, position="rope")
    return Encoder(vit.ViT(config), {"family": "saccade", "arch": "vit-test/4"}).eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Tiles whose green is their number; the first tile is unknown."""
    root, generator = tmp_path / "numbers", np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for inner in ("images", "targets"):
            (root / part / inner).mkdir(parents=True)
        for number in range(count):
            tiles = generator.integers(40, 250, (2, 3)).repeat(8, axis=0).repeat(8, axis=1)
            picture = np.stack([np.full_like(tiles, 90), tiles, np.full_like(tiles, 40)], axis=-1).astype(np.uint8)
            Image.fromarray(picture).save(root / part / "images" / f"{number}.png")
            values = (tiles * 20).astype(np.uint16)
            values[:8, :8] = 0
            Image.fromarray(values).save(root / part / "targets" / f"{number}.png")
    return root


def test_a_head_is_learned_examined_saved_and_used(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    run = finetune(encoder, data, task="dense", out=tmp_path / "run", **QUICK)
    test = run.summary["test"]
    assert test["r2"] > 50 and test["baselines"]["pixels"]["r2"] > 99  # the number is the green
    assert test["baselines"]["mean"]["r2"] <= 0 and "untrained" in test["baselines"]
    assert test["rmse"] < test["baselines"]["mean"]["rmse"] and 0 < test["abs_rel"] < 1
    assert test["difference"]["against"] == "pixels" and test["difference"]["verdict"] == "worse"
    assert set(run.summary["chosen"]["heads"]) == {"linear", "decoder"}
    line = json.loads((run.path / "predictions.jsonl").read_text().splitlines()[0])
    numbers = np.load(run.path / line["numbers"])
    assert numbers.shape == (16, 24) and 8 < numbers.mean() < 50  # in the unit of the files
    assert line["mean"] == pytest.approx(numbers.mean(), abs=1e-3)
    assert (run.path / line["overlay"]).is_file()
    report = (run.path / "report.html").read_text()
    assert "could not be shown" not in report and "RMSE" in report
    (data / "test" / "targets" / "3.png").unlink()
    again = predict(run, data, out=tmp_path / "said")
    assert again["pictures"] == 4  # one has no numbers, and an answer
    lines = [json.loads(line) for line in (tmp_path / "said" / "predictions.jsonl").read_text().splitlines()]
    assert ["rmse" in line for line in lines] == [True] * 3 + [False]
    assert again["scores"]["rmse"] == pytest.approx(test["rmse"], rel=0.5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_backbone_may_move(data: Path, encoder: Encoder, tmp_path: Path, mode: str) -> None:
    settings: dict[str, Any] = {"steps": 2, "batch": 4, "head": "linear", "workers": 0}
    settings |= {"rank": 2} if mode == "lora" else {}
    run = finetune(encoder, data, task="dense", mode=mode, out=tmp_path / mode, **settings, **QUICK)
    assert "r2" in run.metrics()[-1]["eval"] and run.summary["test"]["rmse"] > 0


def test_scores_by_hand() -> None:
    target = torch.tensor([[1.0, 2.0], [torch.nan, 5.0]])
    numbers = torch.tensor([[2.0, 2.0], [9.0, 3.0]])
    found = dense._scores(np.stack([dense._sums(numbers, target)]))
    variance = np.var([1.0, 2.0, 5.0])
    assert found["rmse"] == pytest.approx((5 / 3) ** 0.5, rel=1e-4) and found["mean_absolute_error"] == pytest.approx(
        1.0
    )
    assert found["abs_rel"] == pytest.approx((1 + 0 + 2 / 5) / 3, rel=1e-4)
    assert found["r2"] == pytest.approx(100 * (1 - 5 / 3 / variance), rel=1e-3)


def test_unknown_numbers_do_not_count_in_the_loss() -> None:
    facts = {"mean": 10.0, "spread": 2.0}
    outputs, targets = torch.zeros(1, 1, 1, 3), torch.tensor([[[12.0, torch.nan, 10.0]]])
    assert float(dense.loss(outputs, targets, dense.Settings(), facts)) == pytest.approx(0.5)
    outputs.requires_grad_()
    dense.loss(outputs, torch.full_like(targets, torch.nan), dense.Settings(), facts).backward()
    assert outputs.grad is not None and bool((outputs.grad == 0).all())


def test_ridge_is_the_best_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 50.0, 0.1]) + 7
    targets = rows @ torch.tensor([1.0, -0.02, 3.0]) + 5
    held = torch.arange(500) % 5 == 0
    solved = dense._goal({"mean": 0.0, "spread": 1.0}).solve(rows, targets, held, True)
    torch.testing.assert_close(rows @ solved.weight[:, 0] + solved.bias, targets, atol=1e-2, rtol=1e-3)
    assert solved.held_out > 99.9 and solved.penalty == min(dense.PENALTIES)
    spoiled = torch.where(held, -targets, targets)
    apart = dense._goal({"mean": 0.0, "spread": 1.0}).solve(rows, spoiled, held, False)
    again = dense._goal({"mean": 0.0, "spread": 1.0}).solve(rows, torch.where(held, 5 - targets, targets), held, False)
    if apart.penalty == again.penalty:  # what is held out chooses the penalty, and nothing else
        torch.testing.assert_close(apart.weight, again.weight)


def test_numbers_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "targets").mkdir()
    values = np.array([[1, 2, 0], [400, 500, 65535]])
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "targets" / "png.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "targets" / "tif.tif")
    np.save(tmp_path / "targets" / "npy.npy", values[..., None].astype(np.int32))
    Image.fromarray(np.zeros((2, 3, 3), dtype=np.uint8)).save(tmp_path / "targets" / "rgb.png")
    np.save(tmp_path / "targets" / "deep.npy", np.zeros((2, 3, 4)))
    np.save(tmp_path / "targets" / "other.npy", np.array([[{}]]), allow_pickle=True)
    names = ("png", "tif", "npy", "rgb", "deep", "other", "none")
    for name in names:
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / f"{name}.png")
    part = measured.measured_part(tmp_path, tmp_path, 3, 100.0, 0.0)
    assert [key for key, _ in part.failures] == ["images/none.png"]
    rows = {Path(key).stem: row for row, key in enumerate(part.keys)}
    for name in ("png", "tif", "npy"):
        found = part.target(rows[name], (3, 2))
        expected = torch.tensor([[0.01, 0.02, torch.nan], [4.0, 5.0, 655.35]])
        torch.testing.assert_close(found, expected, equal_nan=True)
    for name, words in (("rgb", "RGB"), ("deep", "one number a pixel"), ("other", "cannot be read")):
        with pytest.raises(Unreadable, match=words):
            part.target(rows[name], (3, 2))
    with pytest.raises(Unreadable, match="3x2, their picture 9x9"):
        part.target(rows["png"], (9, 9))


def test_nothing_to_learn(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    for path in (data / "train" / "targets").glob("*.png"):
        Image.fromarray(np.full((16, 24), 700, dtype=np.uint16)).save(path)
    with pytest.raises(SaccadeError, match="every number of train is 700"):
        finetune(encoder, data, task="dense", out=tmp_path / "run")
    with pytest.raises(SaccadeError, match="no numbers"):
        finetune(encoder, data / "train", task="dense", out=tmp_path / "run")


def test_pictures_without_a_number_are_named(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 24), dtype=np.uint16)).save(data / "train" / "targets" / "0.png")
    (data / "test" / "targets" / "1.png").write_bytes(b"no")
    run = finetune(encoder, data, task="dense", head="linear", out=tmp_path / "run", unknown=0.0)
    said = {one["key"]: one["reason"] for one in run.summary["set_aside"]}
    assert said["train/images/0.png"] == "no pixel has a number" and "cannot be read" in said["test/images/1.png"]

"""Segmentation: the linear layer is the field's, the score is one matrix of counts, and bad masks end nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from saccade import cli, vit
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate import evaluate, segmentation
from saccade.evaluate.masked import VOID, Classes, read_masked

COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [128, 128, 128]], dtype=np.uint8)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    config = vit.ViTConfig(width=16, depth=1, heads=2, hidden=16, patch=4, image_size=16, position="rope")
    return Encoder(vit.ViT(config), {"family": "test"}).eval()


def plant(root: Path, part: str, name: str, classes: list[int], size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """A picture of tiles of 8 pixels, each the colour of its class; class 3 is ignored."""
    tiles = np.resize(np.array(classes, dtype=np.uint8), (size[0] // 8, size[1] // 8))
    mask = tiles.repeat(8, axis=0).repeat(8, axis=1)
    for inner in ("images", "masks"):
        (root / part / inner).mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[mask]).save(root / part / "images" / f"{name}.png")
    Image.fromarray(mask).save(root / part / "masks" / f"{name}.png")
    return mask


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "masks"
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for number in range(count):
            classes = generator.integers(0, 3 if part == "train" else 2, 6).tolist()  # test lacks the third
            plant(root, part, f"{number}", [*classes[:5], 3])
    (root / "classes.txt").write_text("0 red\n1 green\n2 blue\n3 grey(ignore)\n")
    return root


def test_patches_interpolated_at_pixels_are_logits_enlarged() -> None:
    grid, weight = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    mask = torch.zeros(17, 29, dtype=torch.uint8)
    logits = F.interpolate((grid.permute(1, 2, 0) @ weight).permute(2, 0, 1)[None], size=mask.shape, mode="bilinear")
    found = segmentation._at(grid, mask, torch.arange(mask.numel())) @ weight
    torch.testing.assert_close(found, logits[0].flatten(1).T)


def test_one_matrix_of_counts_by_hand() -> None:
    logits = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.randint(0, 2, (6, 5), generator=torch.Generator().manual_seed(2)).to(torch.uint8)  # no class 2
    mask[0] = VOID
    counts = segmentation._counts(logits, mask, 3)
    guess, truth = logits.argmax(0)[1:], mask[1:]
    expected = []
    for number in (0, 1):
        both, either = ((guess == number) & (truth == number)).sum(), ((guess == number) | (truth == number)).sum()
        expected.append(float(both / either))
    assert (guess == 2).any()  # what is wrongly called 2 costs 0 and 1, and 2 is no class of the mean
    assert segmentation.miou(counts) == pytest.approx(100 * np.mean(expected))
    seen = segmentation.Seen(np.stack([counts, counts]), 1.0, 0.0)
    assert seen.miou == pytest.approx(100 * np.mean(expected))
    assert seen.report(["a", "b", "c"])["classes"]["c"] is None


def test_void_is_neither_learned_nor_examined() -> None:
    mask = torch.full((8, 8), VOID, dtype=torch.uint8)
    mask[2, 3:6] = 1
    assert sorted(segmentation._chosen(mask, 50, "a").tolist()) == [19, 20, 21]
    assert segmentation._chosen(mask, 2, "a").tolist() == segmentation._chosen(mask, 2, "a").tolist()
    assert segmentation._counts(torch.randn(2, 2, 2), mask, 2)[1].tolist() == [0, 3]


def test_colours_are_found_and_everything_is_said(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    result = evaluate(encoder, data, tasks=("segmentation",), out=tmp_path / "result.json")
    pixels = result["baselines"]["pixels"]["segmentation"]
    assert pixels["miou"] > 90  # the colour is the class; tiles meet where logits are between two
    assert pixels["classes"]["blue"] is None and set(pixels["classes"]) == {"red", "green", "blue"}
    assert pixels["miou"] > result["baselines"]["position"]["segmentation"]["miou"] + 20
    assert result["baselines"]["untrained"]["segmentation"]["miou"] > 0
    assert result["grids"] == [[4, 6]]  # the aspect stays
    assert result["split"] | {"held_out_of_train": 2} == result["split"] and result["split"]["test"] == 4
    against = result["differences"]["segmentation"]
    assert against["against"] in result["baselines"] and against["two_standard_errors"] >= 0
    assert json.loads((tmp_path / "result.json").read_text())["segmentation"] == result["segmentation"]
    assert "mean IoU" in cli._scores(result) and "green" in cli._scores(result)


def test_test_decides_nothing_and_seeds_repeat(data: Path, encoder: Encoder) -> None:
    first = segmentation.evaluate(encoder, data, baselines=False)
    assert "baselines" not in first
    assert segmentation.evaluate(encoder, data, baselines=False)["segmentation"] == first["segmentation"]
    for number in range(4):
        plant(data, "test", f"{number}", [number % 2, 2, 0, 1, 0, 3])
    again = segmentation.evaluate(encoder, data, baselines=False)["segmentation"]
    assert again["miou"] != first["segmentation"]["miou"]
    assert all(again[name] == first["segmentation"][name] for name in ("penalty", "held_out"))


def test_pictures_of_other_sizes_and_val_for_test(data: Path, encoder: Encoder) -> None:
    (data / "test").rename(data / "val")
    plant(data, "val", "tall", [0, 1, 1, 0], (32, 16))
    result = segmentation.evaluate(encoder, data, baselines=False)
    assert result["split"]["test"] == 5
    assert (data / "val").rename(data / "test").is_dir()
    plant(data, "val", "unused", [0, 1])
    assert segmentation.evaluate(encoder, data, baselines=False)["split"]["test"] == 5
    assert [len(part.keys) for part in read_masked(data).values()] == [10, 5, 1]


def _spoil(data: Path) -> dict[str, str]:
    """Five masks that cannot be used, and what is said of each."""
    masks = data / "train" / "masks"
    (masks / "0.png").unlink()
    Image.new("L", (9, 9)).save(masks / "1.png")
    Image.fromarray(np.full((16, 24), 37, dtype=np.uint8)).save(masks / "2.png")
    Image.new("LA", (24, 16)).save(masks / "3.png")
    Image.new("RGB", (24, 16)).save(masks / "4.png")
    (data / "test" / "masks" / "0.png").write_bytes(b"\x89PNG no")
    said = {"train/images/0": "no mask", "train/images/1": "9x9", "train/images/2": "value 37"}
    return said | {"train/images/3": "LA", "train/images/4": "colours", "test/images/0": "cannot be read"}


def test_bad_masks_are_named_and_set_aside(data: Path, encoder: Encoder) -> None:
    said = _spoil(data)
    result = segmentation.evaluate(encoder, data, baselines=False)
    told = {line["key"].removesuffix(".png"): line["reason"] for line in result["unreadable"]}
    assert result["quarantined"] == len(said) and told.keys() == said.keys()
    assert all(words in told[key] for key, words in said.items())
    assert result["split"]["train"] == 5 and result["split"]["test"] == 3


def test_the_numbers_of_a_palette_are_classes(data: Path, encoder: Encoder) -> None:
    grey = segmentation.evaluate(encoder, data, baselines=False)["segmentation"]
    for mask in data.glob("*/masks/*.png"):
        values = Image.open(mask)
        painted = Image.frombytes("P", values.size, values.tobytes())
        painted.putpalette([9, 200, 30] * 256)
        painted.save(mask)
    assert segmentation.evaluate(encoder, data, baselines=False)["segmentation"] == grey


def test_nothing_left_is_an_error(data: Path, encoder: Encoder) -> None:
    for mask in (data / "test" / "masks").iterdir():
        Image.new("L", (1, 1)).save(mask)
    with pytest.raises(SaccadeError, match="examined") as error:
        segmentation.evaluate(encoder, data, baselines=False)
    assert "1x1" in (error.value.hint or "")
    for mask in (data / "train" / "masks").iterdir():
        mask.unlink()
    with pytest.raises(SaccadeError, match="no picture with a mask: there is no mask"):
        segmentation.evaluate(encoder, data, baselines=False)


@pytest.mark.parametrize(
    ("text", "names", "void"),
    [
        ("0 red\n1 green\n2 sky (ignore)\n", ["red", "green"], [2, 255]),
        ("void\nred\ngreen", ["red", "green"], [0, 3, 255]),
        ("1 red\n3 green\n", ["red", "green"], [0, 2, 4, 255]),
    ],
)
def test_classes_have_numbers_and_the_rest_is_void(
    tmp_path: Path, text: str, names: list[str], void: list[int]
) -> None:
    (tmp_path / "classes.txt").write_text(text)
    found = Classes.read(tmp_path / "classes.txt")
    assert found.names == names
    assert all(found.allowed[value] and found.place[value] == VOID for value in void)
    assert sorted(found.place[found.place != VOID].tolist()) == [0, 1]
    assert not found.allowed[37]


@pytest.mark.parametrize("text", [None, "", "0 red\n0 green\n", "0 red\n256 green\n", "0 void\n"])
def test_classes_that_say_nothing_are_an_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(SaccadeError, match=r"classes\.txt"):
        Classes.read(tmp_path / "classes.txt")


def test_what_is_asked_wrongly(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="reads masks"):
        evaluate(encoder, data, tasks=("knn", "segmentation"))
    with pytest.raises(SaccadeError, match="no folder"):
        segmentation.evaluate(encoder, tmp_path / "nowhere")
    with pytest.raises(SaccadeError, match="no masks"):
        segmentation.evaluate(encoder, tmp_path)
    with pytest.raises(SaccadeError, match="cannot be split"):
        segmentation.evaluate(encoder, data, group_by="(train|test)")


def test_groups_on_both_sides_are_said(data: Path, encoder: Encoder) -> None:
    result: dict[str, Any] = segmentation.evaluate(encoder, data, group_by=r"/(\d)\.", baselines=False)
    assert "4 groups are in train and in test" in result["warnings"][0]


def test_a_mask_becomes_places_of_classes(data: Path) -> None:
    train = read_masked(data)["train"]
    picture, mask = train[0]
    assert picture.shape == (3, 16, 24) and mask.shape == (16, 24)
    assert set(mask.unique().tolist()) <= {0, 1, 2, VOID} and int(mask[-1, -1]) == VOID
    Image.fromarray(np.full((16, 24), 37, dtype=np.uint8)).save(data / "train" / "masks" / "0.png")
    with pytest.raises(Unreadable):
        train[0]

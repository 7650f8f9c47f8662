"""Retrieval: recall by hand and against the whole square, ties that are worth nothing, which side is read."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from toys.planted import COLOURS, plain, planted

from saccade import cli, vit
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate, retrieval
from saccade.evaluate.retrieval import Captions, by_chance, recall


def described(owner: list[int], same: list[int], pictures: int) -> Captions:
    return Captions([str(one) for one in same], torch.tensor(owner), torch.tensor(same), pictures)


def test_recall_by_hand() -> None:
    """Three pictures at 0, 90 and 180 degrees; four captions, of which the last two are of the third picture."""
    degrees = torch.tensor([0.0, 90, 180]).deg2rad()
    pictures = torch.stack([degrees.cos(), degrees.sin()], 1)
    degrees = torch.tensor([80.0, 10, 170, 60]).deg2rad()
    texts = torch.stack([degrees.cos(), degrees.sin()], 1)
    captions = described([0, 1, 2, 2], [0, 1, 2, 3], 3)
    found = recall(pictures, texts, captions.of_picture)
    # 0°: 10 60 80 170 -> its own (80) is third; 90°: 80 60 10/170 -> its own (10) comes before 170? both 80° away
    assert found[0].tolist() == [False, False, True, False]
    assert found[2].tolist() == [True, False, True, False]  # 170 80 60 10: its own are first and third
    assert found[1, :2].tolist() == [False, False] and found[1].sum() == 1
    found = recall(texts, pictures, captions.of_text)
    # 80° is nearest to 90, then 0; 10° to 0, then 90; 170° to 180; 60° to 90, 0, 180
    assert found.tolist() == [[False, True, False], [False, True, False], [True, False, False], [False, False, True]]


def test_a_text_of_two_pictures_is_right_for_both() -> None:
    captions = described([0, 1, 1, 2], [0, 0, 1, 2], 3)
    assert captions.doubles == 2
    numbers = torch.arange(4).expand(3, 4)
    assert captions.of_picture(torch.arange(3), numbers).tolist() == [
        [True, True, False, False], [True, True, True, False], [False, False, False, True],
    ]  # fmt: skip
    assert captions.of_text(torch.arange(4), torch.arange(3).expand(4, 3)).tolist() == [
        [True, True, False], [True, True, False], [False, True, False], [False, False, True],
    ]  # fmt: skip


def test_tiles_say_what_the_whole_square_says(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 40, (150,), generator=draw).sort().values
    captions = described(owner.tolist(), torch.randint(0, 120, (150,), generator=draw).tolist(), 40)
    # eighths: their products are exact in whatever order they are added, and very often the same
    pictures, texts = (torch.randint(-8, 9, (n, 3), generator=draw) / 8 for n in (40, 150))
    belongs = captions.of_picture(torch.arange(40), torch.arange(150).expand(40, 150))
    for queries, items, right, table in (
        (pictures, texts, captions.of_picture, belongs), (texts, pictures, captions.of_text, belongs.T),
    ):  # fmt: skip
        order = (queries @ items.T).sort(dim=1, descending=True, stable=True).indices[:, :10]
        wanted = table.gather(1, order)
        monkeypatch.setattr(retrieval, "_QUERIES", 1024)
        assert torch.equal(recall(queries, items, right), wanted)
        monkeypatch.setattr(retrieval, "_QUERIES", 7)
        monkeypatch.setattr(retrieval, "_ITEMS", 11)
        shapes, best_of = set(), retrieval.best_of

        def watched(parts, k, shapes=shapes, best_of=best_of):
            return best_of((shapes.add(tuple(part.shape)) or part for part in parts), k)

        monkeypatch.setattr(retrieval, "best_of", watched)
        assert torch.equal(recall(queries, items, right), wanted)
        assert max(rows for rows, _ in shapes) == 7 and max(columns for _, columns in shapes) == 11
        monkeypatch.undo()


def test_chance_by_hand_and_by_an_encoder_to_which_all_is_the_same() -> None:
    assert by_chance(torch.tensor([1, 3]), 4) == {"r1": 50.0, "r5": 100.0, "r10": 100.0}
    found = by_chance(torch.tensor([2]), 20)  # 1 - (18·17·16·15·14) / (20·19·18·17·16)
    assert found["r5"] == pytest.approx(100 * (1 - 15 * 14 / (20 * 19)), abs=1e-3) and found["r1"] == 10
    captions = described([n // 2 for n in range(50)], list(range(50)), 25)
    same = torch.ones(25, 1), torch.ones(50, 1)
    for found, chance in (
        (recall(same[0], same[1], captions.of_picture), captions.chance()["image_to_text"]),
        (recall(same[1], same[0], captions.of_text), captions.chance()["text_to_image"]),
    ):
        for k in (1, 5, 10):
            assert 100 * found[:, :k].any(1).double().mean() <= chance[f"r{k}"] + 1e-3 < 100


def pairs(root: Path, captions: dict[str, list[str]], name: str = "test") -> Path:
    """A picture of each colour and its captions, laid out as the Flickr8k pack is."""
    lines = []
    for colour, texts in captions.items():
        plain(root / name / f"{colour}.png", colour)
        lines.append(json.dumps({"file": f"{name}/{colour}.png", "captions": texts}))
    (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_a_tower_that_knows_colours_finds_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs(tmp_path, {"black": ["nobody reads this"]}, "train")
    pairs(tmp_path, {colour: [f"a {colour} wall", f"very {colour}", "a wall"] for colour in ("red", "green", "blue")})
    found = evaluate(planted(), tmp_path, tasks=("retrieval",))
    told = found["retrieval"]
    assert (told["pictures"], told["captions"], told["duplicates"], told["part"]) == (3, 9, 3, "test.jsonl")
    assert told["image_to_text"]["r1"] == 100 == told["text_to_image"]["r1"], "a wall is right for every picture"
    assert told["chance"]["image_to_text"]["r1"] == round(100 * 5 / 9, 3)  # two of its own, three times a wall
    assert told["chance"]["text_to_image"]["r1"] == round(100 * (6 / 3 + 3) / 9, 3)
    assert "3 captions are another picture's as well" in found["warnings"][0]
    json.dumps(found)
    assert "image to text" in cli._scores({"ok": True, **found})


def test_a_tower_that_confuses_two_finds_them_second(tmp_path: Path) -> None:
    pairs(tmp_path, {colour: [f"a {colour} wall"] for colour in COLOURS})
    told = evaluate(planted({"red": "blue", "blue": "red"}), tmp_path, tasks=("retrieval",))["retrieval"]
    assert told["image_to_text"]["r1"] == told["text_to_image"]["r1"] == round(500 / 7, 3)
    assert told["text_to_image"]["r10"] == 100


def test_which_side_is_read(tmp_path: Path) -> None:
    encoder = planted()

    def part(root: Path) -> tuple[str, int]:
        told = evaluate(encoder, root, tasks=("retrieval",))["retrieval"]
        return told["part"], told["pictures"]

    beside = tmp_path / "beside"
    for name, colours in (("train", ["red", "green"]), ("val", ["red", "blue", "pink"])):
        for colour in colours:
            plain(beside / name / f"{colour}.png", colour)
            (beside / name / f"{colour}.txt").write_text(colour)
    assert part(beside) == ("val", 3)
    assert part(beside / "train") == ("all", 2)
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, part_of in (("train-0.tar", "train"), ("test-0.tar", "val")):
        with tarfile.open(shards / name, "w") as tar:
            for path in sorted((beside / part_of).iterdir()):
                tar.add(path, path.name)
    assert part(shards) == ("test-*.tar", 3)
    listed = tmp_path / "beside" / "all.csv"
    listed.write_text("path,caption,split\nval/red.png,red,test\nval/blue.png,blue,test\ntrain/green.png,green,train\n")
    assert part(listed) == ("the column split: test", 2)


def test_pictures_without_captions_are_named_and_counted(tmp_path: Path) -> None:
    for colour in ("red", "green", "blue"):
        plain(tmp_path / f"{colour}.png", colour)
    with pytest.raises(SaccadeError, match=r"none of 3 pictures can be used.*it has no caption.*beside picture\.jpg"):
        evaluate(planted(), tmp_path, tasks=("retrieval",))
    (tmp_path / "red.txt").write_text("red " * 200)
    (tmp_path / "green.txt").write_text("green")
    found = evaluate(planted(), tmp_path, tasks=("retrieval",))
    assert (found["quarantined"], found["unreadable"][0]["key"]) == (1, "blue.png")
    assert found["retrieval"]["pictures"] == 2 and "1 captions are longer" in found["warnings"][0]


def test_refusals(tmp_path: Path) -> None:
    pairs(tmp_path, {"red": ["red"]})
    mute = Encoder(vit.build("vit-ti/4", image_size=16, width=16, depth=1, heads=2, hidden=32), {})
    with pytest.raises(SaccadeError, match="has no text tower"):
        evaluate(mute, tmp_path, tasks=("retrieval",))
    with pytest.raises(SaccadeError, match=r"retrieval reads captions, the other tasks classes.*alone"):
        evaluate(planted(), tmp_path, tasks=("retrieval", "knn"))
    broken = planted()
    broken.text.vectors["red"] = broken.text.vectors["red"] * torch.nan
    with pytest.raises(SaccadeError, match="vectors of texts have NaN"):
        evaluate(broken, tmp_path, tasks=("retrieval",))

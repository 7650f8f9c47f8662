"""Zero-shot: names out of folders, prompts out of files, CLIP's mean, and transformers' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_published_clip import _images, _saved
from test_published_text import _model, _theirs
from test_tokenizer import _clip_files
from toys.planted import COLOURS, plain, planted

from saccade import cli, vit, weights
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate, zero_shot

PROMPTS = ["a {}", "a photo of {}."]


def folders(root: Path, *, parts: tuple[str, ...] = ("test",), count: int = 2) -> Path:
    for part in parts:
        for colour in COLOURS:
            for number in range(count):
                plain(root / part / f"Deep_{colour.title()}" / f"{number}.png", colour)
    return root


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("Tomato___Late_blight", "tomato late blight"),
        ("Pepper,_bell___healthy", "pepper, bell healthy"),
        ("001.Black_footed_Albatross", "black footed albatross"),
        ("AnnualCrop", "annual crop"),
        ("t-shirt", "t-shirt"),
        ("n01440764", "n01440764"),
        ("7", "7"),
        ("747-400", "747-400"),
        ("___", "___"),
    ],
)
def test_folders_as_words(folder: str, words: str) -> None:
    assert zero_shot.readable(folder) == words


def test_a_tower_that_knows_the_classes_is_perfect(tmp_path: Path) -> None:
    encoder = planted()
    data = folders(tmp_path / "data", parts=("train", "test"))
    (data / "test" / "Deep_Red" / "9.png").write_bytes(b"no picture")
    found = evaluate(encoder, data, tasks=("zero-shot",), templates=PROMPTS)
    told = found["zero_shot"]
    assert (told["top1"], told["top5"], told["pictures"], told["part"]) == (100, 100, 14, "as given: test")
    assert told["chance"] == {"top1": round(100 / 7, 3), "top5": round(500 / 7, 3)}
    assert told["classes"]["Deep_Red"] == {"name": "deep red", "top1": 100, "pictures": 2}
    assert (told["templates"], told["majority"]) == (PROMPTS, round(100 / 7, 3))
    assert (found["quarantined"], found["unreadable"][0]["key"], found["warnings"]) == (1, "test/Deep_Red/9.png", [])
    assert len(encoder.text.seen) == 14 and "a photo of deep red." in encoder.text.seen
    json.dumps(found)


def test_and_one_that_takes_two_colours_for_others_is_not(tmp_path: Path) -> None:
    encoder = planted({"red": "blue", "blue": "red"})
    told = evaluate(encoder, folders(tmp_path / "data"), tasks=("zero-shot",), templates=PROMPTS)["zero_shot"]
    assert told["top1"] == round(500 / 7, 3) and told["top5"] < 100.1
    assert {name for name, one in told["classes"].items() if one["top1"] == 0} == {"Deep_Red", "Deep_Blue"}


def test_one_level_of_folders_is_examined_whole_and_few_classes_have_no_top_five(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        plain(tmp_path / "data" / colour / "0.png", colour)
    told = evaluate(planted(), tmp_path / "data", tasks=("zero-shot",))["zero_shot"]
    assert told["part"].startswith("all") and (told["top1"], told["pictures"]) == (100, 2) and "top5" not in told
    assert told["templates"] == list(zero_shot.TEMPLATES)


def test_beside_the_other_tasks(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", parts=("train", "test"), count=3)
    found = evaluate(planted(), data, tasks=("knn", "zero-shot"), baselines=False)
    assert found["zero_shot"]["top1"] == found["knn"] == 100 and found["split"]["train"] == 21
    assert not [said for said in found["warnings"] if "cut" in said]
    shown = cli._scores({"ok": True, **found})
    assert "deep red" in shown and "k-NN" in shown and "14.3" in shown


def test_classes_are_means_of_prompts_each_of_length_one() -> None:
    encoder = planted()
    vectors, cut = zero_shot.class_vectors(encoder, ["red", "blue"], ["{}", "{} and green", "{} {}"])
    one = [encoder.text(encoder.text.tokens([text]))[0] for text in ("red", "red and green", "red red")]
    wanted = torch.nn.functional.normalize(torch.stack(one).mean(0), dim=0)
    assert torch.allclose(vectors[0], wanted, atol=1e-6) and not cut
    assert not torch.allclose(vectors[0], one[1], atol=1e-3)
    assert zero_shot.class_vectors(encoder, ["red"], ["a photo of " * 60 + "{}"])[1] == ["a photo of " * 60 + "red"]


def test_what_is_odd_about_names_is_said(tmp_path: Path) -> None:
    for name, colour in (("Deep_Red", "red"), ("deep red", "blue"), ("12", "green")):
        plain(tmp_path / "data" / name / "0.png", colour)
    warnings = evaluate(planted(), tmp_path / "data", tasks=("zero-shot",), templates=["a " * 90 + "{}"])["warnings"]
    assert [said for said in warnings if "all called 'deep red'" in said and "Deep_Red, deep red" in said]
    assert [said for said in warnings if "'12'" in said] and [said for said in warnings if "were cut" in said]


def test_logits_are_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = _clip_files(tmp_path / "clip")
    network = _model("clip", vocab_size=521, eos_token_id=520, max_position_embeddings=40)
    encoder = weights.load(_saved(network, files))
    words = transformers.CLIPTokenizer.from_pretrained(files)
    names, templates = ["cat", "dog", "it is of a hat"], ["a photo of {}.", "{}!", "it is {}"]
    prompts = [[template.replace("{}", name) for name in names] for template in templates]
    tokens = [words(some, padding="max_length", max_length=40, return_tensors="pt")["input_ids"] for some in prompts]
    with torch.no_grad():
        theirs = [_theirs("clip", network, _images(), some) for some in tokens]
        for template, wanted in zip(templates, theirs, strict=True):
            classes, cut = zero_shot.class_vectors(encoder, names, [template])
            ours = encoder.text.logits(encoder.pair(_images()), classes)
            assert not cut and (ours - wanted["logits"]).abs().max() < 1e-5 and ours.std() > 0.02
        classes, _ = zero_shot.class_vectors(encoder, names, templates)
        mean = sum(wanted["texts"] for wanted in theirs) / 3
        ours = encoder.text.logits(encoder.pair(_images()), classes)
        wanted = network.logit_scale.exp() * theirs[0]["images"] @ (mean / mean.norm(dim=1, keepdim=True)).T
        assert (ours - wanted).abs().max() < 1e-5


def test_the_command_reads_templates_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _clip_files(tmp_path / "clip")
    _saved(_model("clip", vocab_size=521, eos_token_id=520), files)
    data = folders(tmp_path / "data", count=1)
    (tmp_path / "prompts.txt").write_text("\ufeffa {}\n\n  it is {}!\n", encoding="utf-8")
    line = ["evaluate", str(files), str(data), "--tasks", "zero-shot", "--templates", str(tmp_path / "prompts.txt")]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["zero_shot"]["templates"] == ["a {}", "it is {}!"] and found["zero_shot"]["part"] == "as given: test"
    assert found["backbone"] == str(files) and 0 <= found["zero_shot"]["top1"] <= found["zero_shot"]["top5"] <= 100
    (tmp_path / "prompts.txt").write_text("a {}\na photo\n", encoding="utf-8")
    assert cli.main([*line, "--json"]) == 2
    assert "'a photo' has no place for the class" in json.loads(capsys.readouterr().out)["error"]


def test_refusals(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", count=1)
    mute = Encoder(vit.build("vit-ti/4", image_size=16, width=16, depth=1, heads=2, hidden=32), {"path": "runs/mute"})
    with pytest.raises(SaccadeError, match=r"runs/mute has no text tower.*CLIP's and SigLIP's have one"):
        evaluate(mute, data, tasks=("knn", "zero-shot"))
    with pytest.raises(SaccadeError, match="templates belong to the task zero-shot"):
        evaluate(mute, data, tasks=("knn",), templates=PROMPTS)
    with pytest.raises(SaccadeError, match="cannot read the templates"):
        evaluate(mute, data, tasks=("zero-shot",), templates=tmp_path / "none.txt")
    wordless = planted()
    wordless.text.tokenizer = None
    with pytest.raises(SaccadeError, match="has no tokenizer"):
        evaluate(wordless, data, tasks=("zero-shot",))
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    (tmp_path / "flat").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "flat" / "0.png")
    with pytest.raises(SaccadeError, match="no classes"):
        evaluate(planted(), tmp_path / "flat", tasks=("zero-shot",))

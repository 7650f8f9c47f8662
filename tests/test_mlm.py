"""Masked words: what is hidden, the loss against transformers', pieces of files, and what evaluation says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import small
from toys.sources import Texts as Toy
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

import saccade
from saccade import cli, pairing, reading, recipe
from saccade.draws import Draws
from saccade.errors import SaccadeError, Unreadable
from saccade.model import build
from saccade.recipes import mlm
from saccade.report import hidden
from saccade.sources import open_source
from saccade.sources.texts import open_texts
from saccade.text import Reader

BEGIN, END, PAD, MASK = 1, 2, 0, 3


def made(config: mlm.Config, texts: torch.Tensor, seen: int = 0) -> dict[str, torch.Tensor]:
    keys = torch.arange(len(texts))
    return mlm.views(config, {"text": texts}, Draws(0, 0, keys, torch.full_like(keys, seen), keys))


def texts_of(count: int, length: int, words: list[int]) -> torch.Tensor:
    """Texts with so many words each, from 100 on, and what stands around them."""
    rows = torch.full((count, length), PAD)
    for row, number in zip(rows, words * count, strict=False):
        row[0], row[1 : number + 1], row[number + 1] = BEGIN, torch.randint(100, 5000, (number,)), END
    return rows


def test_as_much_is_hidden_as_the_paper_says() -> None:
    torch.manual_seed(0)
    config = mlm.Config(length=66, vocabulary=5000)
    texts = texts_of(3000, 66, [64, 20, 1])
    views = made(config, texts)
    asked = views["truth"] >= 0
    assert asked.sum(1).tolist() == [10, 3, 1] * 1000  # 15 percent of the words, and one at least
    assert torch.equal(texts.gather(1, views["places"])[asked], views["truth"][asked])
    assert (views["truth"][asked] >= 100).all(), "begin, end and padding are no words"
    shown = views["tokens"].gather(1, views["places"])[asked]
    parts = [(shown == MASK), (shown == views["truth"][asked]), (shown != MASK) & (shown != views["truth"][asked])]
    assert [round(part.double().mean().item(), 1) for part in parts] == [0.8, 0.1, 0.1]
    assert all(abs(p.double().mean().item() - e) < 0.012 for p, e in zip(parts, (0.8, 0.1, 0.1), strict=True))
    untouched = torch.ones_like(texts, dtype=torch.bool).scatter_(1, views["places"], ~asked)
    assert torch.equal(views["tokens"][untouched], texts[untouched])
    places = torch.zeros(66).index_add_(0, views["places"][asked], torch.ones(int(asked.sum())))
    assert places[2:21].min() > 0.7 * places[2:21].max(), "no place is preferred"
    assert not torch.equal(made(config, texts, seen=1)["places"], views["places"])


def test_the_loss_is_transformers() -> None:
    config = mlm.Config(length=18, vocabulary=600, text_width=48, text_depth=2, text_heads=3)
    torch.manual_seed(0)
    method = mlm.Method(config, None, {}).double()
    shape = BertConfig(hidden_size=48, vocab_size=600, hidden_act="gelu", layer_norm_eps=1e-6)
    head = BertOnlyMLMHead(shape).double().predictions
    with torch.no_grad():
        for parameter in (method.bias, method.transform.bias, method.norm.bias):
            parameter.normal_()
        head.transform.load_state_dict(
            {f"dense.{name}": tensor for name, tensor in method.transform.state_dict().items()}
            | {f"LayerNorm.{name}": tensor for name, tensor in method.norm.state_dict().items()}
        )
        head.decoder.weight.copy_(method.reader.tower.token_embed.weight)
        head.decoder.bias.copy_(method.bias)
        head.bias.copy_(method.bias)
    views = made(config, texts_of(6, 18, [16]) % 600)
    labels = torch.full((6, 18), -100).scatter(1, views["places"], views["truth"])
    logits = head(method.reader.tower(views["tokens"]).tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found, told = method(views, torch.tensor(0.0))
    right = (logits.argmax(2) == labels)[labels >= 0].double().mean()
    assert abs(found.item() - expected.item()) < 1e-8
    torch.testing.assert_close(told["accuracy"], 100 * right)
    exact = method.guess(views["tokens"], views["places"])
    at = views["places"][..., None].expand(-1, -1, 600)
    assert (exact - logits.gather(1, at)).abs().max() < 1e-12


def files(root: Path) -> Path:
    """Two kinds of texts, each with words of its own; a text says one of them again and again."""
    for kind, words in (("sea", "ship sails over deep water"), ("wood", "bear walks under tall trees")):
        for part, count in (("train", 10), ("test", 5)):
            (root / part / kind).mkdir(parents=True)
            for number in range(count):
                (root / part / kind / f"{number}.txt").write_text(f"{words.split()[number % 5]} " * 18)
    return root


def test_a_run_comes_out_as_a_text_encoder_and_is_examined(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = files(tmp_path / "texts")
    settings = {**small("mlm"), "steps": 60, "length": 20, "vocabulary": 516, "batch": 10, "lr": 0.1}
    run = saccade.pretrain(data / "train", recipe="mlm", out=tmp_path / "run", workers=0, **settings)
    found, _ = pairing.load(tmp_path / "run" / "backbone" / "text")
    reader = Reader(found.tower)
    features = reader(found.tokens(["deep water", "tall trees"]))
    assert features.patches.shape == (2, 20, 48)
    words = features.patches[0, 1:3]  # between begin and end
    torch.testing.assert_close(reader.embedding(features)[0], words.mean(0))
    assert run.summary["recipe"] == "mlm"
    out = saccade.evaluate(tmp_path / "run", data, tasks=("knn", "linear", "masked"))
    # the commonest of ten words that occur alike, against what the words around say
    assert out["baselines"]["unigram"]["masked"] < 25 < 60 < out["masked"]
    assert out["baselines"]["untrained"]["masked"] < 25
    assert out["linear"] > 60
    assert set(out["baselines"]["words"]) == {"knn", "linear"}
    assert (out["split"]["train"], out["split"]["test"], out["baselines"]["majority"]) == (20, 10, 50)
    assert cli.main(["evaluate", str(tmp_path / "run"), str(data), "--tasks", "masked,knn"]) == cli.DONE
    shown = capsys.readouterr().out
    assert "hidden words" in shown
    assert "the commonest word" in shown
    assert cli.main(["evaluate", str(tmp_path / "run"), str(data), "--tasks", "few-label", "--json"]) == 2
    assert "of texts" in json.loads(capsys.readouterr().out)["error"]


def test_pieces_hold_every_word_and_begin_and_end_at_one(tmp_path: Path) -> None:
    words = [f"wörd{number}" for number in range(200)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.md").write_text(" ".join(words), encoding="utf-8")
    (tmp_path / "short.rst").write_text("one two")
    (tmp_path / "picture.png").write_bytes(b"no text")
    source = open_source(tmp_path, pieces=100)
    pieces = [source[row] for row in range(len(source))]
    assert {word for piece in pieces for word in piece.texts[0].split()} == {*words, "one", "two"}
    assert len({piece.key for piece in pieces}) == len(pieces) == 18
    assert (pieces[0].key, pieces[0].label, pieces[0].group) == ("a/long.md#0", "a", "a/long.md")
    assert pieces[-1].key == "short.rst"
    assert all(len(piece.texts[0].encode()) <= 150 for piece in pieces)


@pytest.mark.parametrize(
    ("data", "reason"), [("wide".encode("utf-16"), "UTF-16"), (b" \n ", "empty")], ids=["utf-16", "blank"]
)
def test_texts_that_cannot_be_read_are_named(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(data)
    with pytest.raises(Unreadable, match=reason):
        open_texts(tmp_path, 100)[0]


def test_mistakes_are_named(tmp_path: Path) -> None:
    def begun(**settings: Any) -> Any:
        return saccade.pretrain(Toy(16), recipe="mlm", out=tmp_path / "run", workers=0, **small("mlm"), **settings)

    with pytest.raises(SaccadeError, match=r"begins afresh \[--init\]"):
        begun(init="anything")
    with pytest.raises(SaccadeError, match=r"when the run has ended \[--eval\]"):
        begun(eval=str(tmp_path))
    with pytest.raises(SaccadeError, match="there are no texts"):
        saccade.pretrain(tmp_path / "run", recipe="mlm", out=tmp_path / "other", **small("mlm"))
    page, config = recipe.configure("mlm", small("mlm"))
    with pytest.raises(SaccadeError, match="no word for what is hidden"):
        build(page, config.model_copy(update={"mask": -1}), None)


def test_the_report_shows_hidden_words_and_what_is_said_of_them(tmp_path: Path) -> None:
    data = files(tmp_path / "texts")
    settings = {**small("mlm"), "steps": 60, "length": 20, "vocabulary": 516, "batch": 10, "lr": 0.1}
    run = saccade.pretrain(data / "train", recipe="mlm", out=tmp_path / "run", workers=0, **settings)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "Hidden words" in page and "could not be shown" not in page and "images a second" not in page
    config, read = reading.reread(recipe.configure("mlm", settings)[1], run.path)
    method = build(recipe.find("mlm"), config, None)[0]
    tensors = {name: torch.zeros_like(tensor) for name, tensor in method.state_dict().items()}
    deep = int(read.tokenizer.encode(["deep"], 3).tokens[0, 1])
    tensors["bias"][deep] = 9.0
    source = open_source(data / "train", pieces=80)
    found = hidden.hidden(recipe.find("mlm"), config, source, tensors, read)
    assert found is not None and found.pieces == len(source) and len(found.examples) >= 4
    assert {example.said[0][0] for example in found.examples} == {"deep"}, "whoever is asked, it says one word"
    share = 100 * math.exp(9) / (math.exp(9) + config.vocabulary - 1)
    assert abs(found.examples[0].said[0][1] - share) < 1e-3
    views = [found.right[name] for name in ("this run", "the commonest of these words")]
    assert 0 < views[0] <= views[1] < 40
    for example in found.examples:
        whole = (data / "train" / example.key.partition("#")[0]).read_text().split()
        assert example.truth in whole[0] and example.around.count("____") == 1

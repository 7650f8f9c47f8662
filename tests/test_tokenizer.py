"""Tokenizers: each published kind from files made here, against the libraries that own it; and bad texts."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch

from saccade.errors import SaccadeError
from saccade.tokenizer import Tokenizer, _plain

PARITY = Path(__file__).parent / "parity"
TEXTS = ["a photo of a Cat", "  two\tdogs\n at night ", "it's 42°, isn't it?", "ÜBER straße 漢字", "", "<|endoftext|>"]
PLAIN = TEXTS[:5]
SAID = json.loads((PARITY / "spiece.json").read_text(encoding="utf-8"))


def _clip_files(folder: Path) -> Path:
    """vocab.json and merges.txt as CLIP's are laid out: bytes, bytes that end a word, merges, two special words."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("p", "h"), ("ph", "o"), ("o", "f</w>"), ("c", "a"), ("ca", "t</w>"), ("i", "t</w>"), ("d", "o")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _gemma(folder: Path) -> Path:
    """transformers' own tokenizer of SigLIP 2, saved by itself."""
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz'?.", "ca", "cat", "▁cat", "of", "▁of"]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("o", "f"), ("▁", "of")]
    tokenizer = transformers.GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=merges)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_s_byte_pairs_are_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = _clip_files(tmp_path / "clip")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    assert (ours.kind, ours.begin, ours.end, ours.pad) == ("clip", 519, 520, 520)
    wanted = theirs(PLAIN, padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert torch.equal(ours.encode(PLAIN, 12).tokens, torch.tensor(wanted))
    theirs.save_pretrained(tmp_path / "saved")  # one tokenizer.json
    assert not (tmp_path / "saved" / "merges.txt").exists()
    again = Tokenizer.load(tmp_path / "saved")
    assert again.kind == "clip" and torch.equal(again.encode(PLAIN, 12).tokens, ours.encode(PLAIN, 12).tokens)


def test_sentencepiece_is_the_library_s() -> None:
    """Oracle: sentencepiece itself, by parity/make_tokenizer.py."""
    tokenizer = Tokenizer.load(PARITY / "spiece.model")
    assert (tokenizer.kind, tokenizer.begin, tokenizer.end, tokenizer.pad) == ("siglip", None, 1, 1)
    found = tokenizer.encode([one["text"] for one in SAID], 64)
    for one, row in zip(SAID, found.tokens.tolist(), strict=True):
        assert row == one["tokens"] + [1] * (64 - len(one["tokens"])), one["text"]
    assert found.empty == (0,) and not found.cut


def test_siglip_s_texts_are_canonical() -> None:
    tokenizer = Tokenizer.load(PARITY / "spiece.model")
    plain, marked = tokenizer.encode(["a photo of a cat on the table", "A photo, of\n a CAT: (on the   table)!"], 32)[0]
    assert torch.equal(plain, marked)
    assert tokenizer.decode(plain[None]) == ["a photo of a cat on the table"]


def test_gemma_s_is_transformers_in_lower_case(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(_gemma(tmp_path / "gemma"))
    assert (ours.kind, ours.begin, ours.end, ours.pad, ours.mask) == ("gemma", None, 1, 0, 4)
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path / "gemma")
    texts = ["a photo of a Cat", "it's a  cat?", "ÜBER 漢字", ""]
    for text, row in zip(texts, ours.encode(texts, 40).tokens.tolist(), strict=True):
        words = theirs(text.lower(), add_special_tokens=False)["input_ids"]
        assert row == [*words, 1] + [0] * (39 - len(words)), text


def test_a_kind_is_read_from_its_words_where_nothing_says_it(tmp_path: Path) -> None:
    (_gemma(tmp_path / "gemma") / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path / "gemma").kind == "gemma"
    assert Tokenizer.load(tmp_path / "gemma" / "tokenizer.json").kind == "gemma"
    core = json.loads((tmp_path / "gemma" / "tokenizer.json").read_text(encoding="utf-8"))
    core["added_tokens"] = [one for one in core["added_tokens"] if one["content"] != "<eos>"]
    core["model"]["vocab"]["<over>"] = core["model"]["vocab"].pop("<eos>")
    (tmp_path / "gemma" / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    with pytest.raises(SaccadeError, match="no known kind"):
        Tokenizer.load(tmp_path / "gemma")
    with pytest.raises(SaccadeError, match="lacks <eos>") as error:
        Tokenizer.load(tmp_path / "gemma", "gemma")
    assert "tokenizer.json" in str(error.value)


def test_trained_on_texts_it_writes_every_text(tmp_path: Path) -> None:
    texts = ["a photo of a cat", "A photo of the dog's house", "the cat and the dog"] * 5
    tokenizer = Tokenizer.train(iter(texts), vocabulary=600)
    assert 280 < tokenizer.vocabulary <= 600
    assert (tokenizer.pad, tokenizer.begin, tokenizer.end, tokenizer.mask) == (0, 1, 2, 3)
    wanted = ["a photo of the cat", "zebra", "naïve 漢字 🦓", "</w>"]
    found = tokenizer.encode([text.upper() for text in wanted[:3]], 64)
    assert tokenizer.decode(found.tokens) == wanted[:3]
    assert len(tokenizer.encode(["a photo of the cat"], 64).tokens[0].nonzero()) < 9  # words of its own for them
    assert tokenizer.record["sha256"] == Tokenizer.train(texts, vocabulary=600).record["sha256"]
    assert tokenizer.record["sha256"] != Tokenizer.train(texts[:2], vocabulary=600).record["sha256"]

    tokenizer.save(tmp_path / "run")
    again = Tokenizer.load(tmp_path / "run")
    assert again.kind == "own" and again.vocabulary == tokenizer.vocabulary
    assert torch.equal(again.encode(wanted, 64).tokens, tokenizer.encode(wanted, 64).tokens)
    file = tmp_path / "run" / "tokenizer.json"
    assert again.record["sha256"] == {"tokenizer.json": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert again.record["sha256"] == tokenizer.record["sha256"]
    with pytest.raises(SaccadeError, match="too few"):
        Tokenizer.train(texts, vocabulary=259)


def test_every_kind_is_the_same_after_save_and_load(tmp_path: Path) -> None:
    kinds = [_clip_files(tmp_path / "clip"), _gemma(tmp_path / "gemma"), PARITY / "spiece.model"]
    for number, place in enumerate(kinds):
        one = Tokenizer.load(place)
        one.save(tmp_path / f"saved{number}")
        again = Tokenizer.load(tmp_path / f"saved{number}")
        assert (again.kind, again.vocabulary, again.begin, again.end, again.pad) == (
            one.kind,
            one.vocabulary,
            one.begin,
            one.end,
            one.pad,
        )
        assert torch.equal(again.encode(TEXTS, 24).tokens, one.encode(TEXTS, 24).tokens), place


def test_what_is_too_long_is_cut_and_keeps_its_end() -> None:
    tokenizer = Tokenizer.train(["a b c d e f g"] * 3, vocabulary=267)
    found = tokenizer.encode(["a b c", "a b c d", "", " \t\n", "a b c d e f g"], 5)
    assert found.tokens.shape == (5, 5) and found.tokens.dtype == torch.long
    assert found.cut == (1, 4) and found.empty == (2, 3)
    assert found.tokens[:, 0].eq(tokenizer.begin).all() and found.tokens[4, 4] == tokenizer.end
    assert found.tokens[2].tolist() == [1, 2, 0, 0, 0]


@pytest.mark.parametrize("kind", ["own", "siglip", "clip"])
def test_special_words_in_a_text_are_text(kind: str, tmp_path: Path) -> None:
    if kind == "own":
        tokenizer = Tokenizer.train(["a cat"], vocabulary=600)
    else:
        tokenizer = Tokenizer.load(PARITY / "spiece.model" if kind == "siglip" else _clip_files(tmp_path / "clip"))
    texts = ["a <end> cat </s> <|endoftext|> <|startoftext|> <pad>"]
    inside = [token for token in tokenizer.encode(texts, 64).tokens[0].tolist() if token != tokenizer.pad]
    special = [token for token in inside if token in (tokenizer.begin, tokenizer.end, tokenizer.mask)]
    assert (
        special
        == [token for token in (tokenizer.begin, tokenizer.end) if token not in (None, tokenizer.pad)][: len(special)]
    )
    assert len(inside) > 4


def test_strange_texts_are_quick_and_harmless() -> None:
    tokenizers = [Tokenizer.train(["a cat"], vocabulary=600), Tokenizer.load(PARITY / "spiece.model")]
    mixed = "caf\udce9 a\x00cat \ud800".encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
    texts = ["word " * 2_000_000, "a" * 10_000_000, "!" * 10_000_000, mixed, "\x00" * 100, "\u0301" * 100_000]
    for tokenizer in tokenizers:
        started = time.perf_counter()
        found = tokenizer.encode(texts, 16)
        assert time.perf_counter() - started < 10
        assert {0, 1} <= set(found.cut) and 3 not in found.cut
        assert 4 in found.empty
        assert torch.equal(found.tokens[3], tokenizer.encode(["caf  a cat  "], 16).tokens[0])


def test_one_word_as_long_as_a_file_does_not_stop_training() -> None:
    started = time.perf_counter()
    Tokenizer.train(["ab" * 500_000], vocabulary=600)
    assert time.perf_counter() - started < 20


def test_what_is_no_text_is_named_by_its_number() -> None:
    tokenizer = Tokenizer.train(["a cat"], vocabulary=600)
    with pytest.raises(SaccadeError, match="number 7 is a bytes"):
        _plain(b"b", 7)
    with pytest.raises(SaccadeError, match="list of texts"):
        tokenizer.encode("a cat", 8)
    with pytest.raises(SaccadeError, match="no room"):
        tokenizer.encode(["a"], 1)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="no tokenizer in"):
        Tokenizer.load(tmp_path)
    model = (PARITY / "spiece.model").read_bytes()
    for size in (10, 500, len(model) - 3):
        (tmp_path / "spiece.model").write_bytes(model[:size])
        with pytest.raises(SaccadeError, match=r"spiece\.model"):
            Tokenizer.load(tmp_path)
    (tmp_path / "spiece.model").unlink()
    for content in ("", "{}", '{"model": 3}', "[1]"):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(SaccadeError, match=r"tokenizer\.json is no readable"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    folder = _clip_files(tmp_path / "clip")
    (folder / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(SaccadeError, match=r"merges\.txt"):
        Tokenizer.load(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(SaccadeError, match=r"merges\.txt"):
        Tokenizer.load(folder)


def test_a_tokenizer_that_does_not_fit_names_both() -> None:
    tokenizer = Tokenizer.load(PARITY / "spiece.model")
    tokenizer.fits(73, "weights")
    with pytest.raises(SaccadeError, match=r"spiece\.model has 73 words, the table of w\.safetensors only 72"):
        tokenizer.fits(72, "w.safetensors")

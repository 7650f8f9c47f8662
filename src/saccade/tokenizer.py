"""Words to numbers: the published kinds of tokenizers, read from their own files, and one trained on the user's texts.

The `tokenizers` library does the splitting. What differs between the kinds is kept here: which words stand before,
behind and after a text, and how a text is written before it is split. Special words inside a text are plain text: no
caption can end itself. Control characters and halves of surrogate pairs count as spaces. No more than a million
characters of a text are looked at, for which no tower has room.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.settings import json_object

JSON, FACTS, SENTENCEPIECE, VOCABULARY, MERGES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)
FILES = (JSON, FACTS, SENTENCEPIECE, VOCABULARY, MERGES)
"""What may lie beside weights."""

Kind = Literal["clip", "siglip", "gemma", "own"]


class Words(NamedTuple):
    """The special words of a kind."""

    begin: str | None
    end: str
    pad: str
    mask: str | None = None


KINDS: dict[Kind, Words] = {
    "clip": Words("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "siglip": Words(None, "</s>", "</s>"),
    "gemma": Words(None, "<eos>", "<pad>", "<mask>"),
    "own": Words("<begin>", "<end>", "<pad>", "<mask>"),
}
"""CLIP's, SigLIP's (SentencePiece), SigLIP 2's (Gemma), and those that are trained here."""

_CLASSES: dict[str, Kind] = {"CLIP": "clip", "Siglip2": "gemma", "Siglip": "siglip", "Gemma": "gemma"}
_OURS = "saccade"
_STRANGE = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPLIT_OWN = (
    r" ?(?:[\p{L}]{1,32}|[\p{N}]|[^\s\p{L}\p{N}]{1,32})"  # a word as long as a file would take hours to train on
)
_SUFFIX = "</w>"
_LONGEST, _REACH = 1_000_000, 16_384


class Encoded(NamedTuple):
    """Tokens of texts, and which texts were longer than that, and which had none."""

    tokens: Int[Tensor, "b l"]
    cut: tuple[int, ...]
    empty: tuple[int, ...]


class Tokenizer:
    """Texts to tokens and back. `begin`, `end`, `pad` and `mask` are the tokens of the kind's special words."""

    def __init__(self, core: Any, kind: Kind, place: str, files: dict[str, str]):
        """`core`: of the library; `place`: where it was read; `files`: their SHA-256."""
        self.core, self.kind, self.place, self.files = core, kind, place, files
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
        vocabulary = core.get_vocab(with_added_tokens=True)
        self.vocabulary: int = 1 + max(vocabulary.values(), default=-1)
        self._reach = max(map(len, vocabulary), default=1)
        words = KINDS[kind]
        if missing := sorted({word for word in words if word is not None and word not in vocabulary} - {words.mask}):
            raise SaccadeError(
                f"the tokenizer {place} lacks {', '.join(missing)}, which one of the kind {kind!r} has",
                path=place,
                hint="is it the one that lies beside these weights?",
            )
        self.begin: int | None = None if words.begin is None else vocabulary[words.begin]
        self.end: int = vocabulary[words.end]
        self.pad: int = vocabulary[words.pad]
        self.mask: int | None = None if words.mask is None else vocabulary.get(words.mask)

    @classmethod
    def load(cls, place: str | Path, kind: Kind | None = None) -> Tokenizer:
        """The tokenizer of a folder or a file: tokenizer.json, spiece.model, or vocab.json with merges.txt.

        `kind`: what its folder does not say. Raises `SaccadeError` for what is missing, damaged or of no kind.
        """
        place = Path(place).expanduser()
        folder, wanted = (place, None) if place.is_dir() else (place.parent, place.name)
        facts = json_object(folder / FACTS) if (folder / FACTS).is_file() else {}
        kind = kind or _kind(facts)
        names = [name for name in (SENTENCEPIECE, JSON, VOCABULARY) if (folder / name).is_file()]
        name = wanted or next(iter(names), None)
        if name is None or not (folder / name).is_file():
            raise SaccadeError(
                f"there is no tokenizer in {place}", path=place, hint=f"it has none of {', '.join((JSON, *FILES[2:]))}"
            )
        if name in (VOCABULARY, MERGES):
            used = [VOCABULARY, MERGES]
            core, guess = _byte_pairs(folder), kind or "clip"
        elif name.endswith(".model"):
            used = [name]
            core, guess = _sentencepiece(folder / name), kind or "siglip"
        else:
            used = [name]
            core = _core(folder / name)
            guess = kind or _guess(core, folder / name)
        if guess == "gemma" and kind != "own":
            _lower(core)
        files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in used}
        return cls(core, guess, str(folder / used[0]), files)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int = 8192) -> Tokenizer:
        """Byte pairs that texts are made of, in lower case; any other text can be written with them too.

        The same texts in the same order give the same tokenizer. Fewer words than `vocabulary` where texts have no
        more. Raises `SaccadeError` where there is no room for the 260 that every text needs.
        """
        words, library = KINDS["own"], _library()
        letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        if vocabulary < len(letters) + len(words):
            least = len(letters) + len(words)
            raise SaccadeError(f"{vocabulary} words are too few: bytes alone need {least}", path="vocabulary")
        core = library.Tokenizer(library.models.BPE())
        # a space belongs to the word behind it, and no mark ends one: the library orders such marks by chance
        _by_bytes(core, _SPLIT_OWN, library.normalizers.Strip(), library.normalizers.Prepend(" "))
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[words.pad, words.begin, words.end, words.mask],
            initial_alphabet=letters,
            max_token_length=32,
            show_progress=False,
        )
        core.train_from_iterator((_plain(text, number)[:_LONGEST] for number, text in enumerate(texts)), trainer)
        written = core.to_str(pretty=False)
        return cls(core, "own", "trained here", {JSON: hashlib.sha256(written.encode()).hexdigest()})

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `load` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON).write_text(self.core.to_str(pretty=False), encoding="utf-8")
        words = {f"{name}_token": word for name, word in self._words().items()}
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", **words, _OURS: {"kind": self.kind}}
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @property
    def record(self) -> dict[str, Any]:
        """What a run's record says of it."""
        return {"kind": self.kind, "vocabulary": self.vocabulary, "path": self.place, "sha256": dict(self.files)}

    def fits(self, rows: int, weights: str | Path) -> None:
        """Raises `SaccadeError` that names both where some of its tokens have no row in the weights' table."""
        if self.vocabulary > rows:
            raise SaccadeError(
                f"the tokenizer {self.place} has {self.vocabulary} words, the table of {weights} only {rows}",
                path=self.place,
                hint="is it the one that lies beside these weights?",
            )

    def encode(self, texts: Sequence[str], length: int) -> Encoded:
        """Tokens of texts, `length` each: begin (where the kind has it), words, end, padding.

        What is too long is cut, and keeps its end. Raises `SaccadeError` for what is not text, by its number.
        """
        room = length - 1 - (self.begin is not None)
        if room < 0:
            raise SaccadeError(f"a text of {length} tokens has no room for its end", path="length")
        if isinstance(texts, str):
            raise SaccadeError("encode reads a list of texts", path="texts", hint="one text: [text]")
        reach = max(_REACH, length * self._reach)
        written = [self._written(text, number) for number, text in enumerate(texts)]
        words = self._split([text[:reach] for text in written])
        before = [] if self.begin is None else [self.begin]
        table = torch.full((len(words), length), self.pad, dtype=torch.long)
        for row, inside in zip(table, words, strict=True):
            tokens = [*before, *inside[:room], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        cut = [n for n, inside in enumerate(words) if len(inside) > room or len(written[n]) > reach]
        return Encoded(table, tuple(cut), tuple(n for n, inside in enumerate(words) if not inside))

    def decode(self, tokens: Int[Tensor, "b l"]) -> list[str]:
        """Texts of tokens, without special words and up to the end."""
        special = {self.begin, self.pad, self.mask, self.end}
        texts = []
        for row in tokens.tolist():
            inside = row[: row.index(self.end)] if self.end in row else row
            text = self.core.decode([token for token in inside if token not in special])
            texts.append(text.replace(_SUFFIX, " ").strip())
        return texts

    def _words(self) -> dict[str, str]:
        """Special words by transformers' names."""
        words = KINDS[self.kind]
        named = {"bos": words.begin, "eos": words.end, "pad": words.pad, "mask": words.mask}
        return {name: word for name, word in named.items() if word is not None}

    def _written(self, text: str, number: int) -> str:
        """A text as its kind writes it before it is split."""
        text = _plain(text, number).lstrip()[:_LONGEST]
        if self.kind == "siglip":
            text = re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()
        return text

    def _split(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.core.encode_batch_fast(texts, add_special_tokens=False)]


def _plain(text: Any, number: int) -> str:
    """A text without what no text has. Raises `SaccadeError` for what is none."""
    if not isinstance(text, str):
        raise SaccadeError(f"number {number} is a {type(text).__name__}, not a text", path="texts")
    return _STRANGE.sub(" ", text)


def _library() -> Any:
    """`tokenizers`. Raises `SaccadeError` where it is missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and a loader's forks hang each other
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise SaccadeError("texts need tokenizers", path="tokenizers", hint="pip install 'saccade[text]'") from None
    return tokenizers


def _kind(facts: dict[str, Any]) -> Kind | None:
    """The kind that a tokenizer_config.json says, ours or transformers' class."""
    ours = facts.get(_OURS)
    if isinstance(ours, dict) and ours.get("kind") in KINDS:
        return ours["kind"]
    said = str(facts.get("tokenizer_class", ""))
    return next((kind for word, kind in _CLASSES.items() if said.startswith(word)), None)


def _guess(core: Any, path: Path) -> Kind:
    """The kind whose special words are all there."""
    found = [
        kind
        for kind, words in KINDS.items()
        if all(core.token_to_id(word) is not None for word in words[:3] if word is not None)
    ]
    if not found:
        words = "; ".join(f"{kind}: {words.end}" for kind, words in KINDS.items())
        raise SaccadeError(f"{path} has the special words of no known kind ({words})", path=path)
    return found[0]


def _core(path: Path) -> Any:
    library = _library()
    try:
        return library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise SaccadeError(f"{path} is no readable tokenizer: {error}", path=path, hint="copy it again") from None


def _lower(core: Any) -> None:
    """SigLIP 2 was trained on lower case, which Gemma's file does not say."""
    library = _library()
    after = [] if core.normalizer is None else [core.normalizer]
    core.normalizer = library.normalizers.Sequence([library.normalizers.Lowercase(), *after])


def _by_bytes(core: Any, split: str, *further: Any) -> None:
    """Lower case with single spaces, then what `further` makes of it; words by a pattern, and bytes inside them."""
    library = _library()
    normal, pre = library.normalizers, library.pre_tokenizers
    spaces = normal.Replace(library.Regex(r"\s+"), " ")
    core.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase(), *further])
    words = pre.Split(library.Regex(split), behavior="removed", invert=True)
    core.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = library.decoders.ByteLevel()


def _byte_pairs(folder: Path) -> Any:
    """CLIP's: byte pairs inside words, the last of which says that the word ends."""
    library = _library()
    vocabulary = json_object(folder / VOCABULARY)
    path = folder / MERGES
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        model = library.models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_SUFFIX,
            fuse_unk=False,
            unk_token=KINDS["clip"].end,
        )
    except Exception as error:  # the library raises nothing narrower
        raise SaccadeError(
            f"{path} and {VOCABULARY} are no readable tokenizer: {error}", path=path, hint="copy them again"
        ) from None
    core = library.Tokenizer(model)
    _by_bytes(core, _SPLIT)
    core.add_special_tokens([word for word in KINDS["clip"][:2] if word in vocabulary])
    return core


def _sentencepiece(path: Path) -> Any:
    """SentencePiece's own file: a table of pieces and their probabilities, and how a text is written."""
    library = _library()
    pieces: list[tuple[str, float]] = []
    trained: dict[int, Any] = {}
    written: dict[int, Any] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            elif field == 2:
                trained = dict(_fields(value))
            elif field == 3:
                written = dict(_fields(value))
        if trained.get(3, 1) != 1:
            raise SaccadeError(
                f"{path} is a SentencePiece model of another kind than unigram", path=path, hint=f"take its {JSON}"
            )
        fallback = bool(trained.get(35, 0))
        core = library.Tokenizer(library.models.Unigram(pieces, trained.get(40, 0), fallback))
        normal, spaces = library.normalizers, library.Regex(" {2,}")
        charts = [normal.Precompiled(written[2])] if written.get(2) else []
        core.normalizer = normal.Sequence([*charts, normal.Strip(), normal.Replace(spaces, " ")])
    except SaccadeError:
        raise
    except Exception as error:  # what is damaged breaks the reader or the library anywhere
        raise SaccadeError(
            f"{path} is no readable SentencePiece model: {error}", path=path, hint="copy it again"
        ) from None
    space = {"replacement": "▁", "prepend_scheme": "always"}
    core.pre_tokenizer = library.pre_tokenizers.Metaspace(**space, split=True)
    core.decoder = library.decoders.Metaspace(**space)
    return core


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: integers, or bytes. Raises `ValueError`."""
    place = 0

    def number() -> int:
        nonlocal place
        value, shift = 0, 0
        while shift < 70:
            byte = message[place]
            value |= (byte & 127) << shift
            place, shift = place + 1, shift + 7
            if byte < 128:
                return value
        raise ValueError(f"no number at byte {place}")

    while place < len(message):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
            continue
        if tag & 7 not in (1, 2, 5):
            raise ValueError(f"no field at byte {place}")
        size = number() if tag & 7 == 2 else 8 if tag & 7 == 1 else 4
        if place + size > len(message):
            raise ValueError(f"it ends at byte {len(message)}, in the middle of a field")
        yield tag >> 3, message[place : place + size]
        place += size

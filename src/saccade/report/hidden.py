"""Hidden words of a run on texts alone, and what the model says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.data import Batch, Source, collate
from saccade.draws import Draws
from saccade.model import build
from saccade.reading import Reading
from saccade.recipe import Recipe, Training
from saccade.report.page import Facts, Section, Table
from saccade.report.pictures import readable
from saccade.tokenizer import Tokenizer

PIECES = 128
"""Pieces whose hidden words are counted."""
EXAMPLES, EACH = 4, 3
"""Pieces that are shown, and hidden words of each."""
_AROUND = 8
_ROWS = 32
_GAP = "▢"


@dataclass(frozen=True)
class Example:
    """A hidden word: where, what stood around it, what it was, and the likeliest words with their shares in percent."""

    key: str
    around: str
    truth: str
    said: list[tuple[str, float]]


@dataclass(frozen=True)
class Hidden:
    """Some examples, and of all words that were hidden how many are guessed, in percent, by whom."""

    examples: list[Example]
    words: int
    pieces: int
    right: dict[str, float]


@torch.inference_mode()
def hidden(
    page: Recipe, config: Training, source: Source, tensors: Mapping[str, Tensor], reading: Reading
) -> Hidden | None:
    """Words hidden in some pieces as in training, asked of a method; None where none can be read or nothing guesses.

    `tensors` are the state of the trained method. Beside it: the same untrained, and the commonest of these words.
    """
    method: Any = build(page, config, None)[0].eval()
    samples = readable(source, PIECES)
    if not samples or not callable(getattr(method, "guess", None)):
        return None
    batches = [collate(samples[at : at + _ROWS], tokenize=reading) for at in range(0, len(samples), _ROWS)]
    views = [page.views(config, b, Draws(config.seed, 0, b["key"], b["seen"], b["place"])) for b in batches]
    truth = torch.cat([view["truth"] for view in views])
    asked = truth >= 0
    if not asked.any():
        return None

    def guessed() -> Float[Tensor, "n k v"]:
        return torch.cat([method.guess(view["tokens"], view["places"]) for view in views])

    def percent(answers: Int[Tensor, "n k"]) -> float:
        return 100 * (answers == truth)[asked].double().mean().item()

    common = truth[asked].bincount().argmax()
    right = {"the commonest of these words": percent(common.expand_as(truth))}
    right["the same network, untrained"] = percent(guessed().argmax(2))
    method.load_state_dict(dict(tensors))
    logits = guessed()
    right["this run"] = percent(logits.argmax(2))
    first = _examples([sample.key for sample in samples], views[0], logits, reading.tokenizer)
    return Hidden(first, int(asked.sum()), len(samples), dict(reversed(right.items())))


def _examples(keys: list[str], view: Batch, logits: Float[Tensor, "n k v"], tokenizer: Tokenizer) -> list[Example]:
    """Those of the first pieces, in the order of the text."""
    found = []
    shown = (view["tokens"].gather(1, view["places"]) == tokenizer.mask) & (view["truth"] >= 0)
    for row in range(min(EXAMPLES, len(shown))):
        columns = shown[row].nonzero()[:, 0].tolist()
        for column in sorted(columns, key=lambda column, row=row: int(view["places"][row, column]))[:EACH]:
            chances, words = logits[row, column].softmax(0).topk(3)
            said = [(_word(tokenizer, word), 100 * chance)
                    for word, chance in zip(words.tolist(), chances.tolist(), strict=True)]  # fmt: skip
            around = _around(tokenizer, view["tokens"][row].tolist(), int(view["places"][row, column]))
            found.append(Example(keys[row], around, _word(tokenizer, int(view["truth"][row, column])), said))
    return found


def _around(tokenizer: Tokenizer, tokens: list[int], place: int) -> str:
    """What stands around a place, as the model sees it: other hidden words are gaps as well."""
    parts = []
    for some in (tokens[max(0, place - _AROUND) : place], tokens[place + 1 : place + 1 + _AROUND]):
        gaps = [n for n, token in enumerate(some) if token == tokenizer.mask]
        runs = [some[a + 1 : b] for a, b in zip([-1, *gaps], [*gaps, len(some)], strict=True)]
        parts.append(f" {_GAP} ".join(_text(tokenizer, run) for run in runs))
    return f"{parts[0]} ____ {parts[1]}".strip()


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return " ".join(tokenizer.decode(torch.tensor([tokens or [tokenizer.pad]]))[0].split())


def _word(tokenizer: Tokenizer, token: int) -> str:
    return _text(tokenizer, [token]) or "(none)"


def section(found: Hidden | None) -> Section | None:
    """Examples in a table, and how many words are guessed."""
    if found is None:
        return None
    counts = [(name, f"{share:.1f} %") for name, share in found.right.items()]
    rows = [[each.around, each.truth, ", ".join(f"{word} {share:.0f} %" for word, share in each.said), each.key]
            for each in found.examples]  # fmt: skip
    lede = (
        f"Of {found.words:,} words hidden in {found.pieces:,} pieces of the run's own texts, with other words hidden "
        "than a step has seen. A word may be a part of one; ____ is what is asked for, "
        f"{_GAP} is hidden too. Texts that were never learned from are examined by saccade evaluate RUN TEXTS."
    )
    table = Table("Some of them", ["Around it", "What stood there", "What the model says", "From"], rows)
    return Section("Hidden words", lede, [Facts("Guessed", counts), table])

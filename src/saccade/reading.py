"""What a run does with texts: it looks through them before its first step, and settles which tokenizer reads them.

A run's `tokenizer/` holds it from the start on; the text tower comes out beside the backbone, in its `text/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxtyping import Int

from saccade.data import Source, Tokenize, same_text
from saccade.distributed import Ranks
from saccade.draws import Permutation
from saccade.errors import SaccadeError, Unreadable, say
from saccade.recipe import Training, Worded
from saccade.run import Run
from saccade.sources.captions import cleaned
from saccade.tokenizer import Tokenizer

SEEN = 20_000
"""Samples whose texts are looked through before a run; of more, so many are chosen, always the same."""
FOLDER = "tokenizer"
_NAMED = 5
"""Of each fault so many samples are named."""


class Reading:
    """Texts to tokens, in a worker."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, texts: list[str]) -> Int[Tensor, "b l"]:
        return self.tokenizer.encode(texts, self.length).tokens


def prepare(source: Source, config: Training, run: Run, ranks: Ranks) -> tuple[Training, Tokenize | None]:
    """The settings with what the tokenizer says, and the tokenizer; for a recipe without words, what it was given.

    The first time, texts are looked through, the tokenizer is trained or copied, and the run's record says what was
    found. Raises `SaccadeError` where no text can be used, and for a tokenizer that cannot be.
    """
    if not isinstance(config, Worded):
        return config, None
    ranks.from_first(lambda: "texts" in run.record or _begin(source, config, run))
    with ranks.agreed():
        return reread(config, run.path)


def reread(config: Worded, run: Path) -> tuple[Worded, Reading]:
    """The settings with what the tokenizer in a run's folder says, and that tokenizer. Raises `SaccadeError`."""
    tokenizer = Tokenizer.load(run / FOLDER)
    return fitted(config, tokenizer), Reading(tokenizer, config.length)


def fitted(config: Worded, tokenizer: Tokenizer) -> Worded:
    """The settings with a tokenizer's words."""
    begin = -1 if tokenizer.begin is None else tokenizer.begin
    special = (begin, tokenizer.end, tokenizer.pad)
    mask = -1 if tokenizer.mask is None else tokenizer.mask
    return config.model_copy(update={"vocabulary": tokenizer.vocabulary, "special": special, "mask": mask})


def tokenizer_for(source: Source, config: Worded) -> Tokenizer:
    """The tokenizer that the settings name, or one trained on the texts of a source."""
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    return Tokenizer.train((text for _, texts, _ in _texts(source) for text in texts), config.vocabulary)


def _begin(source: Source, config: Worded, run: Run) -> bool:
    tokenizer = tokenizer_for(source, config)
    whole = config.pieces() is None  # a piece reads on until its tokens are full, and is cut on purpose
    found = survey(source, tokenizer, config.length if whole else None)
    if not found["texts"]:
        raise SaccadeError(
            f"none of the {found['covered']} samples that were looked at has a text: {described(found)}",
            path="data",
            hint="picture.jpg with picture.txt, a list with a column `caption`, or tar shards with .txt members",
        )
    tokenizer.save(run.path / FOLDER)
    run.note(texts=found | {"tokenizer": tokenizer.record})
    say(f"texts: {described(found)}")
    return True


def _texts(source: Source) -> Iterator[tuple[int, tuple[str, ...], list[str]]]:
    """Of the samples that are looked at: which, the texts that can be used, and their faults."""
    count = len(source)
    order = Permutation(count, "texts")
    for index in range(count) if count <= SEEN else sorted(order(place) for place in range(SEEN)):
        try:
            texts, faults = cleaned(source.words(index))
        except Unreadable:
            texts, faults = (), ["unreadable"]
        yield index, texts, faults


def survey(source: Source, tokenizer: Tokenizer, length: int | None) -> dict[str, Any]:
    """What the texts of a source are: how many, and how many have which fault, with the first samples of each.

    Faults: `missing`, `empty`, `over-long` (cut at `captions.LIMIT` characters), `cut` (more tokens than `length`),
    `duplicate` (a text that another sample has too), `unreadable`, an encoding that is not UTF-8, and `without a
    picture`, which are texts that belong to nothing.
    """
    counts: Counter[str] = Counter()
    named: dict[str, list[str]] = {}
    owners: dict[str, int] = {}
    covered = texts_seen = with_texts = 0

    def note(fault: str, name: str) -> None:
        counts[fault] += 1
        if len(named.setdefault(fault, [])) < _NAMED and name not in named[fault]:
            named[fault].append(name)

    for index, texts, faults in _texts(source):
        covered += 1
        texts_seen += len(texts)
        with_texts += bool(texts)
        faults = [*faults, *["cut"] * len(tokenizer.encode(texts, length).cut if length else ())]
        faults += ["duplicate" for text in texts if owners.setdefault(same_text(text), index) != index]
        for fault in faults:
            note(fault, source.key(index))
    for orphan in source.orphans():
        note("without a picture", orphan)
    return {
        "samples": len(source), "covered": covered, "with_texts": with_texts, "texts": texts_seen,
        "faults": dict(sorted(counts.items())), "first": named,
    }  # fmt: skip


def described(found: dict[str, Any]) -> str:
    """A survey in a line."""
    parts = [f"{found['texts']} of {found['with_texts']} samples"]
    for fault, count in found["faults"].items():
        names = found["first"][fault]
        parts.append(f"{count} {fault} ({', '.join(islice(names, 2))}{', …' if count > 2 else ''})")
    return "; ".join(parts)

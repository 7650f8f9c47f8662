"""What a text encoder alone knows: classes of texts from its frozen features, and hidden words, which its run guesses.

Of each file the first piece is read. Beside it stand the same tower untrained, how often each word occurs, the most
frequent class, and for hidden words the one that is most frequent in train. All scores in percent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade import distributed, pairing, reading
from saccade.checkpoint import CONFIG
from saccade.data import collate
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.errors import SaccadeError, Unreadable, nearest
from saccade.evaluate.baselines import difference, majority
from saccade.evaluate.knn import predict
from saccade.evaluate.labelled import SHARE, TEST, TRAIN, part_of
from saccade.evaluate.linear import probe
from saccade.evaluate.splits import set_apart
from saccade.model import build
from saccade.recipe import configure
from saccade.run import Run, verify
from saccade.settings import Worded
from saccade.sources.listing import TABLES
from saccade.sources.texts import Texts, open_texts
from saccade.text import Reader, TextEncoder

TASKS = ("knn", "linear", "masked")
PROBES = TASKS[:2]
_WHOLE = 1 << 28
_ROWS = 64
_APART = 0.2


def alone(backbone: Any) -> Path | None:
    """The folder of a text encoder without an image tower, of a run or by itself; None for anything else."""
    if not isinstance(backbone, str | Path):
        return None
    place = Path(backbone).expanduser()
    folders = [folder for folder in (place / "backbone", place) if (folder / pairing.FOLDER / CONFIG).is_file()]
    return folders[0] if folders and not (folders[0] / CONFIG).is_file() else None


def evaluate(folder: Path, labelled: Any, tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """Scores of the text encoder in a folder, on train/CLASS/*.txt and test/CLASS/*.txt, or on lists with labels.

    Lists are train.csv and test.csv (or .tsv, .jsonl, .parquet), or one with a column `split`. Raises `SaccadeError`.
    """
    began = time.perf_counter()
    for task in tasks:
        if task not in TASKS:
            raise SaccadeError(f"there is no task {task!r} of texts", path="--tasks", hint=nearest(task, TASKS))
    parts = _read(Path(labelled).expanduser())
    if any(task in PROBES for task in tasks):
        found = _probed(folder, parts, [task for task in PROBES if task in tasks], seed)
    else:
        found = {"baselines": {}}
    if "masked" in tasks:
        masked = _masked(folder.parent, parts, seed)
        found["masked"] = masked.pop("trained")
        for name, score in masked.items():
            found["baselines"].setdefault(name, {})["masked"] = score
    made = "as given: train and test"
    if parts["train"][2] is parts["test"][2] and parts["train"][2].documents.column("split") is None:
        made = "by hash of the group"
    split = {"made": made} | {part: len(rows) for part, (_, rows, _) in parts.items()}
    return {**found, "split": split, "seed": seed, "seconds": round(time.perf_counter() - began, 1)}


_LAYOUT = "train/CLASS/*.txt and test/CLASS/*.txt, or lists with columns `text` and `label`"

Parts = dict[str, tuple[list[str], list[int], Texts]]


def _read(place: Path) -> Parts:
    """Of train and test the class of each text, and the row of its first piece."""
    parts: Parts = {}
    for part, (source, rows) in _sides(place).items():
        classes, used = [], []
        for row in rows:
            try:
                name = source[row].label
            except Unreadable:
                continue
            if name is not None:
                used.append(row)
                classes.append(name)
        parts[part] = (classes, used, source)
    train, test = (set(parts[part][0]) for part in ("train", "test"))
    if len(train) < 2 or not test <= train:
        strange = sorted(test - train)
        said = f"the class {strange[0]!r} of test is not in train" if strange else "fewer than two classes"
        raise SaccadeError(f"{place} has {said}", path=place, hint=_LAYOUT)
    if not test:
        raise SaccadeError(f"{place} has no labelled text in test", path=place, hint=_LAYOUT)
    return parts


def _sides(place: Path) -> dict[str, tuple[Texts, Sequence[int]]]:
    """Texts of train and of test: folders or lists of these names, or one list by its column `split` or by hash."""
    if place.is_dir():
        found = {part: _side(place, names) for part, names in (("train", TRAIN), ("test", TEST))}
        if None in found.values():
            part = next(part for part, side in found.items() if side is None)
            raise SaccadeError(f"{place} has no {part}/", path=place, hint=_LAYOUT)
        sources = {part: open_texts(side, _WHOLE) for part, side in found.items() if side is not None}
        return {part: (source, range(len(source))) for part, source in sources.items()}
    source = open_texts(place, _WHOLE)
    split = source.documents.column("split")
    if split is None:
        names = [source.group(row) or source.key(row) for row in range(len(source))]
        test = set_apart(names, SHARE, "test")
    else:
        used = [part_of(name) for name in split]
        test = np.array([name == "test" for name in used])
        if "train" not in used or "test" not in used:
            raise SaccadeError("the column `split` needs rows of train and of test (or val)", path=place)
    learned = ~test if split is None else np.array([name == "train" for name in used])
    return {"train": (source, np.flatnonzero(learned).tolist()), "test": (source, np.flatnonzero(test).tolist())}


def _side(place: Path, names: Sequence[str]) -> Path | None:
    """The folder, list or Parquet files of one side."""
    for name in names:
        for side in (place / name, *(place / f"{name}{suffix}" for suffix in (*TABLES, ".parquet"))):
            if side.exists():
                return side
        for pattern in (f"{name}-*.parquet", f"data/{name}-*.parquet"):
            if any(place.glob(pattern)):
                return place / pattern
    return None


def _tokens(folder: Path, parts: Parts) -> tuple[Any, dict[str, Int[Tensor, "n l"]]]:
    """The encoder as it lies on disk, and its tokens of train and of test."""
    found, _ = pairing.load(folder / pairing.FOLDER)
    texts = {part: [source[row].texts[0] for row in rows] for part, (_, rows, source) in parts.items()}
    return found, {part: found.tokens(some) for part, some in texts.items()}


@torch.inference_mode()
def _vectors(reader: Reader, tokens: Int[Tensor, "n l"]) -> Float[Tensor, "n d"]:
    return torch.cat([reader.embedding(reader(some)) for some in tokens.split(_ROWS)])


def _counts(tokens: Int[Tensor, "n l"], words: int) -> Float[Tensor, "n w"]:
    """Roots of how often each word occurs; of many words several share a column."""
    columns = min(words, 4096)
    counted = torch.zeros(len(tokens), columns)
    return counted.scatter_add_(1, tokens % columns, torch.ones(tokens.shape)).sqrt()


def _probed(folder: Path, parts: Parts, tasks: list[str], seed: int) -> dict[str, Any]:
    found, tokens = _tokens(folder, parts)
    shape = found.tower.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        readers = {"trained": Reader(found.tower), "untrained": Reader(TextEncoder(shape).eval())}
    vectors = {
        name: {part: _vectors(reader, some) for part, some in tokens.items()} for name, reader in readers.items()
    }
    vectors["words"] = {part: _counts(some, shape.vocabulary) for part, some in tokens.items()}
    names = sorted(set(parts["train"][0]))
    train, test = (np.array([names.index(one) for one in parts[part][0]], dtype=np.int64) for part in ("train", "test"))
    keys = [parts["train"][2].key(row) for row in parts["train"][1]]
    apart, labels = set_apart(keys, _APART, "hold-out"), torch.from_numpy(train)
    right: dict[str, dict[str, np.ndarray]] = {}
    for name, both in vectors.items():
        answers = {}
        if "knn" in tasks:
            answers["knn"] = predict(both["train"], labels, both["test"], len(names))
        if "linear" in tasks:
            answers["linear"] = probe(both["train"], labels, both["test"], len(names), apart).predicted
        right[name] = {task: answer.numpy() == test for task, answer in answers.items()}
    scores = {name: {task: _percent(hits) for task, hits in found.items()} for name, found in right.items()}
    differences = {}
    for task in tasks:
        rival = max(("untrained", "words"), key=lambda name, task=task: scores[name][task])
        gain = difference(right["trained"][task][None], right[rival][task][None], [str(n) for n in range(len(test))])
        differences[task] = gain | {"against": rival}
    rivals: dict[str, Any] = {name: scores[name] for name in ("untrained", "words")}
    rivals["majority"] = round(majority(train, test), 3)
    return {**scores["trained"], "baselines": rivals, "differences": differences, "classes": len(names)}


def _percent(hits: np.ndarray) -> float:
    return round(100 * float(hits.mean()), 3)


def _masked(place: Path, parts: Parts, seed: int) -> dict[str, float]:
    """Hidden words of test that are guessed by the run, by the same method untrained, and by the commonest of train."""
    run = Run.open(place)
    checkpoint = next(run.steps(), None)
    if checkpoint is None:
        raise SaccadeError(f"{place} has no checkpoint, where the words are guessed", path=place, hint="--tasks linear")
    verify(checkpoint)
    page, asked = configure(run.config["recipe"], run.config["settings"])
    config, tokenize = reading.reread(cast(Worded, asked), place)
    method: Any = build(page, config.model_copy(update={"seed": seed}), None)[0].eval()
    rows, source = parts["test"][1:]
    views = []
    for start in range(0, len(rows), _ROWS):
        batch = collate([source[row] for row in rows[start : start + _ROWS]], tokenize=tokenize)
        views.append(page.views(config, batch, Draws(seed, 0, batch["key"], batch["seen"], batch["place"])))
    seen = tokenize([parts["train"][2][row].texts[0] for row in parts["train"][1]])
    known = tokenize.tokenizer
    special = [word for word in (known.begin, known.end, known.pad) if word is not None]
    common = seen[~torch.isin(seen, torch.tensor(special))].bincount().argmax()

    @torch.inference_mode()
    def accuracy(guess: Any) -> float:
        truth = torch.cat([view["truth"] for view in views])
        answers = torch.cat([guess(view).expand(view["truth"].shape) for view in views])
        return _percent((answers == truth)[truth >= 0].numpy())

    def guessed(view: dict[str, Tensor]) -> Int[Tensor, "b k"]:
        return method.guess(view["tokens"], view["places"]).argmax(2)

    found = {"unigram": accuracy(lambda view: common), "untrained": accuracy(guessed)}
    live = {f"method/{name}": tensor for name, tensor in method.state_dict().items()}
    distributed.load_tensors(live, checkpoint, Ranks(0, 1, torch.device("cpu")), part=True)
    return found | {"trained": accuracy(guessed)}

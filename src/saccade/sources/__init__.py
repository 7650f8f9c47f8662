"""Where samples come from: a folder, a list, tar shards, Parquet, or several of these mixed by weight."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from saccade.data import Source
from saccade.decode import EXTENSIONS
from saccade.errors import SaccadeError
from saccade.sources import listing
from saccade.sources.files import Beside, Files
from saccade.sources.folder import scan
from saccade.sources.mixture import Mixture
from saccade.sources.parquet import Rows, open_rows, pictured
from saccade.sources.shards import Shards, open_shards
from saccade.sources.texts import open_texts

__all__ = ["Files", "Mixture", "Rows", "Shards", "open_source"]

Data = str | Path | Source


def open_source(
    data: Data | Sequence[Data],
    *,
    short_side: int | None = None,
    channels: int = 3,
    weights: Sequence[float] | None = None,
    group_by: str | None = None,
    texts: bool = False,
    pieces: int | None = None,
) -> Source:
    """The samples of a folder, a list, tar shards (a tar, a folder of tars, a pattern), Parquet likewise, or several.

    Lists are .txt, .csv, .tsv, .jsonl or .parquet; a .parquet that holds the pictures' bytes is read row by row.
    `short_side` allows pictures to be shrunk at decoding as long as their short side keeps that many pixels; `channels`
    is 1 or 3; `weights` are the shares in which several sources are drawn (as many as they have samples, if None);
    `group_by` is a pattern whose first parenthesis finds a sample's group in its key; with `texts` every sample
    is a picture and its captions, and one without is unreadable; with `pieces` samples are pieces of text files (.txt,
    .md, .rst) or of the texts in a list, of so many bytes. Raises `SaccadeError`.
    """
    if group_by is not None:
        try:
            re.compile(group_by)
        except re.error as error:
            raise SaccadeError(
                f"the pattern {group_by!r} is not a regular expression: {error}", path="--group-by"
            ) from None
    several = [data] if isinstance(data, str | Path | Source) else list(data)
    if not several:
        raise SaccadeError("no data is named", hint="name a folder, a list or tar shards")
    sources = [
        item if isinstance(item, Source) else _open(item, short_side, channels, group_by, texts, pieces)
        for item in several
    ]
    if weights is not None:
        _check_weights(weights, len(sources))
    if len(sources) == 1:
        return sources[0]
    return Mixture(tuple(sources), _names(sources, several), None if weights is None else tuple(map(float, weights)))


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise SaccadeError(
            f"{len(weights)} weights for {count} sources", path="weights", hint="one weight for each source"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise SaccadeError(f"weights are positive numbers, not {list(weights)}", path="weights")


def _names(sources: list[Source], several: Sequence[Data]) -> tuple[str, ...]:
    """A short name for each source, numbered where two would have the same."""
    names = [f"source{n}" if isinstance(item, Source) else Path(item).absolute().name for n, item in enumerate(several)]
    return tuple(name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names))


def _open(
    data: str | Path, short_side: int | None, channels: int, group_by: str | None, texts: bool, pieces: int | None
) -> Source:
    if channels not in (1, 3):
        raise SaccadeError(f"picture files give 1 or 3 channels, not {channels}", path="channels", hint="--channels 3")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(data)):
        raise SaccadeError(
            f"{data} lies elsewhere, and saccade reads local files only so far",
            path=data,
            hint="copy it to a local folder; reading it in place will be the extra saccade[cloud]",
        )
    path = Path(data).expanduser()
    if pieces is not None and (path.exists() or glob.has_magic(str(path))):
        return open_texts(path, pieces, group_by)
    if path.is_dir():
        return _folder(path, short_side, channels, group_by, texts)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix == ".parquet" and pictured(path):
            return _rows(path.parent, [path], short_side, channels, group_by, texts)
        if suffix in listing.EXTENSIONS:
            keys, columns, captions = listing.read_list(path, texts)
            return Files(str(path.parent), keys, columns, short_side, channels, group_by, captions)
        if suffix == ".tar":
            return open_shards([path], short_side, channels, group_by, texts)
        what = "one picture" if suffix[1:] in EXTENSIONS else "neither a list nor a tar"
        hint = (
            f"name its folder, {path.parent}"
            if suffix[1:] in EXTENSIONS
            else "name a folder, a list (.txt, .csv, .jsonl), or .tar"
        )
        raise SaccadeError(f"{path} is {what}", path=path, hint=hint)
    if path.exists():
        raise SaccadeError(f"{path} is neither a folder nor a file", path=path)
    if glob.has_magic(str(path)):
        return _pattern(path, short_side, channels, group_by, texts)
    raise SaccadeError(f"there is no folder or file {path}", path=path, hint=_nearby(path))


def _folder(path: Path, short_side: int | None, channels: int, group_by: str | None, texts: bool) -> Source:
    found = scan(path)
    if len(found.keys):
        captions = Beside(str(path), found.keys) if texts else None
        return Files(str(path), found.keys, {}, short_side, channels, group_by, captions)
    if found.others["tar"]:
        return open_shards(sorted(path.rglob("*.tar")), short_side, channels, group_by, texts)
    if found.others["parquet"]:
        return _rows(path, sorted(path.rglob("*.parquet")), short_side, channels, group_by, texts)
    seen = ", ".join(
        f"{count} .{name}" if name else f"{count} without extension" for name, count in found.others.most_common(5)
    )
    hint = f"files there: {seen}" if seen else "it has no files that are not hidden"
    read = " ".join(f".{name}" for name in sorted(EXTENSIONS))
    raise SaccadeError(f"there are no pictures in {path}", path=path, hint=f"{hint}; read are {read}, .tar, .parquet")


def _rows(
    root: Path, files: list[Path], short_side: int | None, channels: int, group_by: str | None, texts: bool
) -> Rows:
    as_read = {"short_side": short_side, "channels": channels, "group_by": group_by}
    return open_rows(root, files, as_read, texts=texts)


def _pattern(path: Path, short_side: int | None, channels: int, group_by: str | None, texts: bool) -> Source:
    shards = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not shards:
        raise SaccadeError(f"nothing matches {path}", path=path)
    suffix = shards[0].suffix.lower()
    others = [shard for shard in shards if shard.suffix.lower() != suffix or not shard.is_file()]
    if others or suffix not in (".tar", ".parquet"):
        raise SaccadeError(
            f"a pattern names tar shards or Parquet files, but {path} matches {(others or shards)[0]}",
            path=path,
            hint=f"end it in {suffix if others and suffix in ('.tar', '.parquet') else '.tar'}",
        )
    if suffix == ".tar":
        return open_shards(shards, short_side, channels, group_by, texts)
    root = Path(os.path.commonpath([shard.parent for shard in shards]))
    return _rows(root, shards, short_side, channels, group_by, texts)


def _nearby(path: Path) -> str:
    """The sibling that was probably meant, or how far the path does exist."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    try:
        siblings = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        siblings = []
    name = path.absolute().relative_to(parent).parts[0]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    return f"did you mean {parent / close[0]}?" if close else f"{parent} exists and has no {name}"

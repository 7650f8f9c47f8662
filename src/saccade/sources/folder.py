"""A folder of pictures, nested as deep as it likes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from saccade.decode import EXTENSIONS
from saccade.errors import SaccadeError
from saccade.sources.strings import Strings


@dataclass(frozen=True)
class Listing:
    """What a folder holds: the relative paths of its pictures or texts, sorted, and how many others there are."""

    keys: Strings
    others: Counter[str]


def scan(root: Path, extensions: frozenset[str] = EXTENSIONS) -> Listing:
    """List the pictures below a folder, or files of other extensions.

    Hidden files are skipped, links followed unless they lead back up.

    Raises `SaccadeError` for a folder that may not be read.
    """
    keys: list[str] = []
    others: Counter[str] = Counter()
    ahead: list[tuple[str, str, frozenset[str]]] = [(str(root), "", frozenset({os.path.realpath(root)}))]
    while ahead:
        folder, prefix, above = ahead.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            raise SaccadeError(
                f"cannot read the folder {folder}: {error.strerror}",
                path=folder,
                hint="make it readable or leave it out",
            ) from None
        with entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                if entry.is_dir():  # answered by the listing itself, except for links
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    if real not in above:
                        ahead.append((entry.path, f"{prefix}{name}/", above | {real}))
                    continue
                extension = name.rpartition(".")[2].lower() if "." in name else ""
                if extension in extensions:
                    keys.append(prefix + name)
                else:
                    others[extension] += 1
    keys.sort()
    return Listing(Strings(keys), others)

"""The one error a user meets: what is wrong, with which file or setting, and what to do; and what is said without."""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path


class SaccadeError(Exception):
    """A mistake that the user can mend.

    `error` says what is wrong in one line, `path` names the file or setting, `hint` says what to do.
    `code` is the exit code of the command line: 1 failed, 2 wrong use. One that another rank says is `said_elsewhere`.
    """

    said_elsewhere = False

    def __init__(self, error: str, *, path: str | Path | None = None, hint: str | None = None, code: int = 2):
        super().__init__(error)
        self.error, self.path, self.hint, self.code = error, None if path is None else str(path), hint, code

    def __str__(self) -> str:
        where = f" [{self.path}]" if self.path and self.path not in self.error else ""
        return f"{self.error}{where}" + (f" ({self.hint})" if self.hint else "")

    def __reduce__(self) -> tuple[object, ...]:  # a worker's error crosses a process boundary
        return _restore, (self.error, self.path, self.hint, self.code)


def _restore(error: str, path: str | None, hint: str | None, code: int) -> SaccadeError:
    return SaccadeError(error, path=path, hint=hint, code=code)


class Unreadable(Exception):
    """One sample that cannot be read. It is counted, named and set aside; it never ends a run by itself."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@functools.cache
def say(line: str) -> None:
    """What is no error and must not be missed, to stderr: once a process, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def nearest(name: str, choices: Iterable[str]) -> str:
    """The hint for a name that does not exist: the nearest right one, or all of them when none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(choices)}"

"""The line on the screen that says how far a run is, and the figures of speed behind it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console

from saccade.run import memory_gb


class Progress:
    """Counts steps, seconds and waiting of one session of a run, and tells of them on stderr, if it may `speak`."""

    def __init__(self, batch: int, *, speak: bool):
        self._console, self._batch = Console(stderr=True, quiet=not speak, highlight=False), batch
        self._said, self.waited = -math.inf, 0.0
        self.begin(0, 0.0)

    def begin(self, step: int, seconds: float) -> None:
        """A session goes on at `step`, after `seconds` of sessions before it."""
        self._first, self._before, self._began, self.waited = step, seconds, time.monotonic(), 0.0
        self._last = (self._began, 0.0)

    def say(self, line: str) -> None:
        """A line on the screen."""
        self._console.print(line, markup=False, soft_wrap=True)

    def figures(self, step: int) -> dict[str, float]:
        """What a line of metrics.jsonl says of speed: seconds of all sessions, images a second of this one, memory in
        GB, and `data_wait`, the part of the time since the last call that was spent waiting for data."""
        now = time.monotonic()
        seconds, (then, waited) = now - self._began, self._last
        self._last = (now, self.waited)
        return {
            "images_per_second": self._batch * (step - self._first) / max(seconds, 1e-9),
            "data_wait": (self.waited - waited) / max(now - then, 1e-9),
            "memory_gb": memory_gb(),
            "seconds": self._before + seconds,
        }

    def tell(self, entry: dict[str, Any], steps: int) -> None:
        """The line of a logged `entry`: on a terminal always, else every ten seconds and at the end."""
        now, step = time.monotonic(), entry["step"]
        if not (self._console.is_terminal or now - self._said > 10 or step == steps):
            return
        self._said = now
        left = int((steps - step) * (now - self._began) / max(step - self._first, 1))
        aside = f"  set aside {entry['unreadable']}" if entry["unreadable"] else ""
        self.say(
            f"step {step}/{steps}  loss {entry['loss']:.4f}  {entry['images_per_second']:,.0f} images/s  "
            f"waiting for data {100 * entry['data_wait']:.0f} %  memory {entry['memory_gb']:.1f} GB  "
            f"left {left // 60}:{left % 60:02d}{aside}"
        )


def waited(logged: Sequence[Mapping[str, Any]]) -> float:
    """The part of all sessions' time that was spent waiting for data, from the lines of metrics.jsonl."""
    seconds = [0.0, *(entry["seconds"] for entry in logged)]
    parts = [entry["data_wait"] * (now - then) for entry, (then, now) in zip(logged, pairwise(seconds), strict=True)]
    return sum(parts) / max(seconds[-1], 1e-9)

"""The line on the screen and the figures behind it."""

from __future__ import annotations

import pytest

from saccade import progress
from saccade.progress import Progress, waited


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_figures_of_a_session_that_goes_on(clock: Clock) -> None:
    count = Progress(8, speak=False)
    count.begin(10, 50.0)
    clock.now += 4
    count.waited += 1
    found = count.figures(20)
    assert (found["images_per_second"], found["data_wait"], found["seconds"]) == (20.0, 0.25, 54.0)
    clock.now += 4
    count.waited += 4
    found = count.figures(30)
    assert (found["images_per_second"], found["data_wait"], found["seconds"]) == (20.0, 1.0, 58.0), (
        "since the last line"
    )


def test_waiting_is_averaged_over_time() -> None:
    lines = [{"seconds": 1.0, "data_wait": 1.0}, {"seconds": 3.0, "data_wait": 0.5}, {"seconds": 8.0, "data_wait": 0.0}]
    assert waited(lines) == 0.25


def test_the_line_says_what_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    count = Progress(8, speak=True)
    count.begin(0, 0.0)
    entry = {"step": 10, "loss": 1.5, "images_per_second": 80.0, "data_wait": 0.5, "memory_gb": 1.0, "unreadable": 2}
    clock.now += 20
    count.tell(entry, 40)
    count.tell(entry, 40)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "every ten seconds at most, where nobody watches"
    assert "step 10/40" in said and "waiting for data 50 %" in said and "left 1:00" in said and "set aside 2" in said
    count.tell({**entry, "step": 40, "unreadable": 0}, 40)
    said = capsys.readouterr().err
    assert "left 0:00" in said and "set aside" not in said
    Progress(8, speak=False).tell(entry, 10)
    assert not capsys.readouterr().err

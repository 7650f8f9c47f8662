"""Curves as inline SVG: axes with round numbers, units, the curve in words, and nothing that needs a script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 208
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 10, 34
_POINTS = 400
"""Points of a curve at most: more than its pixels would only make the page heavy."""
_TIPS = 40


@dataclass(frozen=True)
class Line:
    """A value at each step. What is not finite is left out, and counted."""

    steps: Sequence[float]
    values: Sequence[float]

    @property
    def points(self) -> list[tuple[float, float]]:
        """The finite ones."""
        return [pair for pair in zip(self.steps, self.values, strict=True) if math.isfinite(pair[1])]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: the last value as text, and the SVG, whose texts are escaped."""

    title: str
    unit: str
    latest: str
    svg: str
    note: str = ""


def number(value: float) -> str:
    """A number as a person would write it down: three digits that say something, thousands with commas."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
    if size >= 100 or value == round(value):
        return f"{value:.0f}"
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}" if size >= 1e-3 else f"{value:.1e}"


def _written(marks: Sequence[float], percent: bool) -> list[str]:
    """Numbers of an axis, all with as many digits as their distance needs."""
    if percent:
        marks = [100 * mark for mark in marks]
    step = min(abs(after - before) for before, after in itertools.pairwise(marks))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = digits <= 4 and max(map(abs, marks)) < 1e6
    texts = [f"{mark:,.{digits}f}" if plain else f"{mark:.1e}" for mark in marks]
    return [f"{text} %" for text in texts] if percent else texts


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low to high."""
    if high <= low:
        low, high = low - abs(low or 1) * 0.5, high + abs(high or 1) * 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten that cover low to high, at most six of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 5))
    return [10.0**n for n in range(first, last + stride, stride)]


@dataclass(frozen=True)
class _Axis:
    """Values to pixels."""

    marks: list[float]
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        if self.log:
            value, low, high = (math.log(number) for number in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _axes(points: list[tuple[float, float]], floor: float | None) -> tuple[_Axis, _Axis]:
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    log = floor is None and low > 0 and high / low > 100
    if log:
        marks = _powers(low, high)
    else:
        marks = ticks(low if floor is None else min(floor, low), high)
    across = ticks(min(xs), max(xs), 5) if max(xs) > min(xs) else [xs[0] - 1, xs[0], xs[0] + 1]
    # the curve uses the whole width: it ends at its last step, not at the next round number
    across = [min(xs), *(x for x in across if min(xs) < x < max(xs)), max(xs)] if max(xs) > min(xs) else across
    return _Axis(across, _LEFT, WIDTH - _RIGHT), _Axis(marks, HEIGHT - _BOTTOM, _TOP, log)


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Means of neighbours, so that at most about `most` are left, from the first step to the last."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    blocks = [points[n : n + size] for n in range(0, len(points), size)]
    means = [(block[len(block) // 2][0], sum(y for _, y in block) / len(block)) for block in blocks]
    return [(points[0][0], means[0][1]), *means[1:-1], points[-1]]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A mean over a window of a fortieth of the curve, centred."""
    half = max(1, len(points) // 80)
    smooth = []
    for place, (x, _) in enumerate(points):
        window = points[max(0, place - half) : place + half + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def _path(points: list[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)


def _grid(x: _Axis, y: _Axis, percent: bool) -> list[str]:
    """Lines across, numbers at both axes, and what the lower one counts."""
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high}"/>']
    texts = [f"{mark:g}" for mark in y.marks] if y.log else _written(y.marks, percent)
    for mark, text in zip(y.marks, texts, strict=True):
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{text}</text>')
    written = -math.inf
    for place, mark in enumerate(x.marks):
        last = place == len(x.marks) - 1
        if x(mark) - written < 42 or (not last and x.end - x(mark) < 42):
            continue
        written = x(mark)
        anchor = "end" if last else "middle" if place else "start"
        parts.append(f'<text x="{x(mark):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{mark:,.0f}</text>')
    parts.append(f'<text class="unit" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">'
                 "step</text>")  # fmt: skip
    return parts


def _curve(line: Line, x: _Axis, y: _Axis, percent: bool) -> list[str]:
    points = _thinned(line.points, _POINTS)
    parts = []
    if len(points) > 60:
        parts.append(f'<path class="curve faint c0" d="{_path(points, x, y)}"/>')
        points = _smoothed(points)
    if len(points) > 1:
        parts.append(f'<path class="curve c0" d="{_path(points, x, y)}"/>')
    marked = points if len(points) <= 12 else points[-1:]
    parts += [f'<circle class="dot c0" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>' for step, value in marked]
    for step, value in _thinned(points, _TIPS):
        text = f"{100 * value:.1f} %" if percent else number(value)
        parts.append(f'<circle class="tip" cx="{x(step):.1f}" cy="{y(value):.1f}" r="7">'
                     f"<title>step {step:,.0f}: {text}</title></circle>")  # fmt: skip
    return parts


def chart(
    title: str,
    line: Line,
    *,
    unit: str = "",
    floor: float | None = None,
    percent: bool = False,
    level: tuple[str, float] | None = None,
    begins: Sequence[float] = (),
    marks: Sequence[float] = (),
) -> Chart | None:
    """A curve over steps, or None where no value is finite.

    `floor` is a value that the axis includes; without one it fits the curve, by powers of ten where that spans a
    hundredfold. `percent` writes parts of 1 as percent. `level` is a dashed line with a name, such as chance's loss.
    `begins` are steps at which something new begins: dotted upright lines; `marks` those at which the run went back.
    """
    points = line.points
    if not points:
        return None
    lost = len(line.values) - len(points)
    x, y = _axes([*points, (points[0][0], level[1])] if level else points, floor)
    parts = _grid(x, y, percent)
    for step in begins:
        if points[0][0] <= step <= points[-1][0]:
            parts.append(
                f'<line class="begin" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
            )
    if level:
        at = y(level[1])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        below = at - 5 if at > _TOP + 14 else at + 13
        near_the_end = abs(points[-1][1] - level[1]) < abs(points[0][1] - level[1])
        place = f'x="{_LEFT + 4}"' if near_the_end else f'x="{WIDTH - _RIGHT - 4}" text-anchor="end"'
        parts.append(f'<text {place} y="{below:.1f}">{escape(level[0])}</text>')
    for step in marks:
        parts.append(f'<line class="level" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">'
                     f"<title>rolled back at step {step:,.0f}</title></line>")  # fmt: skip
    parts += _curve(line, x, y, percent)
    back = f", rolled back at step {', '.join(f'{step:,.0f}' for step in marks)}" if marks else ""
    label = escape(f"{title}, {_said(points, percent)}{back}")
    return Chart(
        title,
        unit + (", scale by powers of ten" if y.log else ""),
        f"{100 * points[-1][1]:.1f} %" if percent else number(points[-1][1]),
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>',
        f"{lost} values that are not finite are left out." if lost else back.removeprefix(", ").capitalize(),
    )


def interval(title: str, low: float, middle: float, high: float, *, unit: str = "") -> Chart:
    """A value with its interval on a line that shows zero."""
    marks = ticks(min(low, 0.0), max(high, 0.0))
    x, height = _Axis(marks, _LEFT, WIDTH - _RIGHT), HEIGHT // 2
    parts = [f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height}" y2="{height}"/>']
    for mark, text in zip(marks, _written(marks, percent=False), strict=True):
        parts.append(f'<text x="{x(mark):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="level" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    parts.append(f'<path class="curve c0" d="{_path([(low, 0), (high, 0)], x, _Axis([0, 1], height, height))}"/>')
    parts.append(f'<circle class="dot c0" cx="{x(middle):.1f}" cy="{height}" r="4"/>')
    said = f"{number(middle)}, from {number(low)} to {number(high)}"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {said}")}">'
    return Chart(title, unit, number(middle), f"{svg}{''.join(parts)}</svg>", said)


def forecast(
    title: str,
    measured: Sequence[tuple[int, float]],
    ahead: Sequence[tuple[int, float, float, float]],
    *,
    unit: str = "",
) -> Chart:
    """Values at counts on a scale of doublings, and ahead of them a low, a mean and a high value each, dashed."""
    counts = [count for count, _ in measured] + [count for count, *_ in ahead]
    values = [value for _, value in measured] + [value for _, *three in ahead for value in three]
    x = _Axis([float(counts[0]), float(max(counts[-1], 2 * counts[0]))], _LEFT, WIDTH - _RIGHT - 8, log=True)
    y = _Axis(ticks(min(values), max(values)), HEIGHT - _BOTTOM, _TOP)
    parts = []
    for mark, text in zip(y.marks, _written(y.marks, percent=False), strict=True):
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{text}</text>')
    written = -math.inf
    for count in counts:
        if x(count) - written > 26:
            written = x(count)
            parts.append(f'<text x="{written:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{count:,}</text>')
    points = [(float(count), value) for count, value in measured]
    if len(points) > 1:
        parts.append(f'<path class="curve c0" d="{_path(points, x, y)}"/>')
    for count, low, _, high in ahead:
        parts.append(f'<path class="curve c0" d="{_path([(count, low), (count, high)], x, y)}"/>')
    dots = [*points, *((float(count), middle) for count, _, middle, _ in ahead)]
    for (count, value), more in zip(
        dots, ["" for _ in points] + [f", {a} to {b}" for _, a, _, b in ahead], strict=True
    ):
        parts.append(f'<circle class="dot c0" cx="{x(count):.1f}" cy="{y(value):.1f}" r="3">'
                     f"<title>{count:,.0f}: {number(value)}{more}</title></circle>")  # fmt: skip
    if ahead:
        line = _path([points[-1], *((float(count), middle) for count, _, middle, _ in ahead)], x, y)
        parts.append(f'<path class="level" fill="none" d="{line}"/>')
    said = f"{number(points[0][1])} at {counts[0]:,} to {number(points[-1][1])} at {measured[-1][0]:,}"
    told = "".join(f"; ahead {number(m)} at {n:,}, from {number(a)} to {number(b)}" for n, a, m, b in ahead)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title} {said}{told}")}">'
    return Chart(title, unit, number(points[-1][1]), f"{svg}{''.join(parts)}</svg>")


def _said(points: list[tuple[float, float]], percent: bool) -> str:
    """A curve in words, for those who do not see it."""
    values = [value * (100 if percent else 1) for _, value in points]
    return (
        f"{'in percent ' if percent else ''}from {number(values[0])} at step {points[0][0]:,.0f} "
        f"to {number(values[-1])} at step {points[-1][0]:,.0f}, "
        f"lowest {number(min(values))}, highest {number(max(values))}"
    )

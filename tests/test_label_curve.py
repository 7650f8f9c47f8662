"""The label curve: laws are found again, the interval holds what was drawn, and too few counts say so."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saccade.evaluate import label_curve
from saccade.evaluate.label_curve import Point, curve, forecast
from saccade.report import sections


def error(n: float, exponent: float, floor: float, delay: float) -> float:
    """Of a law that begins at 90 percent."""
    return floor + (90 - floor) * ((n + delay) / delay) ** -exponent


def law(exponent: float, floor: float, delay: float, noise: float = 0.0, seed: int = 0) -> list[Point]:
    random, found = np.random.default_rng(seed), []
    for n in (1, 2, 5, 10, 20, 50):
        spread = noise / math.sqrt(n)
        found.append(Point(n, 100 - error(n, exponent, floor, delay) + random.normal(0, 1) * spread, spread + 1e-3))
    return found


@pytest.mark.parametrize(("exponent", "floor", "delay"), [(0.3, 0, 1), (0.6, 0, 2), (0.8, 10, 4), (0.5, 5, 0.5)])
def test_the_forecast_finds_the_law(exponent: float, floor: float, delay: float) -> None:
    told = forecast(law(exponent, floor, delay), 10.0, [100, 200])
    for n, one in zip((100, 200), told, strict=True):
        truth = 100 - error(n, exponent, floor, delay)
        assert one["low"] < truth < one["high"]
        assert one["mean"] == pytest.approx(truth, abs=2.0)
    assert told[0]["high"] - told[0]["low"] < told[1]["high"] - told[1]["low"] < 12


def test_the_interval_holds_what_it_says() -> None:
    """Forty noisy curves of many laws: nine in ten or more, and narrower than what is still to be gained."""
    random, held, widths = np.random.default_rng(1), [], []
    for seed in range(40):
        asked = (random.uniform(0.25, 0.9), random.uniform(0, 15), random.uniform(0.5, 4))
        one = forecast(law(*asked, noise=6.0, seed=seed), 10.0, [200])[0]
        truth = 100 - error(200, *asked)
        held.append(one["low"] <= truth <= one["high"])
        widths.append(one["high"] - one["low"])
    assert np.mean(held) >= 0.85 and np.mean(widths) < 15
    sure = forecast(law(0.5, 0, 1), 10.0, [200], drift=0.0)[0]
    wary = forecast(law(0.5, 0, 1), 10.0, [200], drift=0.1)[0]
    assert wary["high"] - wary["low"] > 2 * (sure["high"] - sure["low"])


def test_counts_and_the_largest() -> None:
    assert label_curve.counts(120) == [1, 2, 5, 10, 20, 50, 100, 120]
    assert label_curve.counts(5) == [1, 2, 3, 4, 5] and label_curve.counts(1) == [1]
    assert label_curve.largest(np.repeat([0, 1, 2], [50, 9, 30])) == 9
    assert label_curve.largest(np.repeat([0, 1, 2], [50, 2, 30])) == 30
    assert label_curve.largest(np.repeat(np.arange(10), 90_000)) == 2_000


def test_a_curve_is_measured_told_and_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    vectors = torch.eye(16)[labels] * 1.5 + torch.randn(240, 16, generator=generator)
    train, test = vectors[:120], vectors[120:]
    keys = [f"{n}" for n in range(120)]
    measured = label_curve.measure(train, labels[:120], test, labels[120:].numpy(), keys, 40, seed=0)
    assert [point.labels for point in measured] == [1, 2, 5, 10, 20, 40]
    assert measured[0].mean < measured[-1].mean and measured[0].error > measured[3].error > 0
    few = np.arange(30)  # labels of these alone
    inside = label_curve.measure(train, labels[:120], test, labels[120:].numpy(), keys, 10, 0, few)
    spoiled = torch.where(torch.arange(120) < 30, labels[:120], 0)
    assert inside == label_curve.measure(train, spoiled, test, labels[120:].numpy(), keys, 10, 0, few)
    told = curve(measured, 100 / 3)
    assert list(told["at"]) == ["80", "160"] and list(told["fitted"]) == ["1", "2", "5", "10", "20", "40"]
    assert told["at"]["80"]["low"] < told["at"]["80"]["mean"] < told["at"]["80"]["high"] <= 100
    assert "40 labels a class score" in told["says"] and "160" in told["says"]
    prose, charts = sections._more_labels(told)
    assert "90 of 100" in prose.lines[0] and "ahead" in charts.charts[0].svg
    assert charts.charts[0].svg.count('class="dot') == 8

    short = curve(measured[:3], 100 / 3)
    assert short["at"] == {} and "too few" in short["says"]
    assert sections._more_labels(short)[1].charts[0].svg.count('class="dot') == 3


def test_a_perfect_and_a_hopeless_curve() -> None:
    perfect = [Point(n, 100.0, 0.01) for n in (1, 2, 5, 10)]
    assert forecast(perfect, 50.0, [40])[0]["low"] > 97
    hopeless = [Point(n, 50.0, 1.0) for n in (1, 2, 5, 10)]
    one = forecast(hopeless, 50.0, [40])[0]
    assert one["low"] < 50 < one["high"] and one["high"] < 62

"""Figures of features, and verdicts on series of figures."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from toys.sources import Pictures

from saccade import health, vit
from saccade.encoder import Encoder, Preprocess
from saccade.health import Monitor

K = 256
CHANCE = math.log(K)
TAUGHT = {"cls_loss": CHANCE, "teacher_entropy": CHANCE, "patch_entropy": CHANCE}
PAIRED = {"loss": 4.143}
SEEN = {"pictures": 64, "distinct": 64, "most": 64, "rank": 20.0, "spread": 0.01, "weights": 10.0}


def verdict(lines: list[dict[str, Any]], chance: dict[str, float] = TAUGHT, samples: int = 2000) -> Monitor:
    """The monitor after lines at 1, 10, 20, …, with a warm-up of 20 steps."""
    monitor = Monitor(chance, 20, samples)
    for place, line in enumerate(lines):
        monitor.add({"step": max(1, 10 * place), "data_wait": 0.02, "gradient_norm": 1.0, **line})
    return monitor


def teacher(loss: float, entropy: float, use: float) -> dict[str, Any]:
    return {"loss": loss, "teacher_entropy": entropy, "prototype_use": use}


HEALTHY = {
    "a loss that falls": ([{"loss": 1.3 - 0.01 * n, "health": SEEN} for n in range(25)], {}),
    "a loss that stays": ([{"loss": 0.96 + 0.02 * (n % 2), "health": SEEN} for n in range(25)], {}),
    "a teacher that sharpens": ([teacher(5.5 - 0.05 * n, 5.3 - 0.06 * n, 0.9) for n in range(25)], TAUGHT),
    # before the centre has found its place, all answers are the same few prototypes: a loss far below what follows
    "a centre that finds its place": (
        [teacher(3.7 + 0.08 * n, 2.9 + 0.1 * n, 0.1 + 0.03 * n) for n in range(25)], TAUGHT,
    ),
    "a class token that nobody reads": (
        [{"loss": 1.0, "health": {**SEEN, "spread": 0.01 / (1 + 4 * n), "rank": 20 - n / 9}} for n in range(25)], {},
    ),
    "a loss that falls through chance": ([{"loss": 5.2 - 0.1 * n, "gradient_norm": 8.0} for n in range(25)], PAIRED),
    "a slow start at chance": ([teacher(5.56, 5.31, 0.97) for _ in range(25)], TAUGHT),
    "one slow batch in ten": ([{"loss": 1.0, "data_wait": 0.9 if n % 10 == 5 else 0.05} for n in range(25)], {}),
    # Gram anchoring begins at n = 12: the whole loss jumps
    "a stage that begins": (
        [{**teacher(7.5 if n < 12 else 14.0, 4.9, 0.7), "cls_loss": 5.4, "patch_entropy": 4.8, "patch_use": 0.5}
         for n in range(25)], TAUGHT,
    ),
    # in a small batch it happens that nothing is hidden
    "a step without hidden patches": (
        [{**teacher(5.0, 4.9, 0.7), "patch_entropy": 4.0 * (n % 2), "patch_use": 0.3 if n % 2 else 1 / K}
         for n in range(25)], TAUGHT,
    ),
    "patches that are not hidden": (
        [{**teacher(5.0, 4.9, 0.7), "patch_entropy": 0.0, "patch_use": 1 / K} for _ in range(25)],
        {"cls_loss": CHANCE, "teacher_entropy": CHANCE},
    ),
    "a loss that jumps once": ([{"loss": 3.0 if n == 12 else 1.3 - 0.02 * n} for n in range(25)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_series(name: str) -> None:
    lines, chance = HEALTHY[name]
    monitor = verdict(lines, chance)
    assert monitor.finding == health.Finding() and not monitor.history


def collapsed(grown: float) -> list[dict[str, Any]]:
    return [{"loss": CHANCE, "health": {**SEEN, "spread": 1e-5, "rank": 2.5, "weights": 10 * grown} if n else SEEN}
            for n in range(20)]  # fmt: skip


FAULTS = {
    "rate with a teacher": (
        [{**teacher(0.01, 0.0, 1 / K), "health": {**SEEN, "weights": 30.0 if n else 10.0}} for n in range(20)], TAUGHT,
        "diverged", "the same 1.0 of 256 prototypes: centring fails, and the weights have grown 3.0 times",
    ),
    "rate without a teacher": (
        [{"loss": 4.14, "gradient_norm": 0.01, "health": {**SEEN, "weights": 50.0}} if n else
         {"loss": 5.2, "gradient_norm": 8.0, "health": SEEN} for n in range(20)],
        PAIRED, "diverged", r"loss has stayed at 4.1400.* weights have grown 5.0 times: the learning rate is too high",
    ),
    "rate that only weights show": (
        [{**teacher(3.0, 2.0, 0.5), "health": {**SEEN, "weights": 100.0 if n == 19 else 10.0}} for n in range(20)],
        TAUGHT, "diverged", "^the weights have grown 10.0 times: the learning rate is too high",
    ),
    "blind": (
        [{"loss": 4.14, "gradient_norm": 0.01 if n else 8.0, "health": SEEN} for n in range(20)], PAIRED,
        "constant_features", "all samples are the same to it",
    ),
    "temperature": ([teacher(CHANCE + 1e-4, CHANCE - 1e-4, 1.0) for _ in range(20)], TAUGHT, "uniform_teacher",
                    r"loss has stayed at 5.54\d\d = ln 256: the teacher is uniform; lower `teacher_temperature`"),
    "centring": ([teacher(0.5, 0.4, 1.6 / K) for _ in range(20)], TAUGHT, "constant_features", "centring"),
    "temperature, and a student that is worse": (
        [teacher(5.8, CHANCE - 1e-3, 1.0) for _ in range(20)], TAUGHT, "uniform_teacher",
        r"answer to every picture has entropy 5.54\d\d of 5.54\d\d = ln 256: the teacher is uniform",
    ),
    "patches without centring": (
        [{**teacher(5.0, 4.9, 0.7), "patch_entropy": 0.2, "patch_use": 1.2 / K} for _ in range(20)], TAUGHT,
        "constant_features", "gives every hidden patch the same 1.2 of 256 prototypes",
    ),
    "patches that say nothing": (
        [{**teacher(5.0, 4.9, 0.7), "patch_entropy": CHANCE - 1e-4, "patch_use": 1.0} for _ in range(20)], TAUGHT,
        "uniform_teacher", "answer to every hidden patch has entropy",
    ),
    "rate": (collapsed(8.0), TAUGHT, "diverged", "grown 8.0 times: the learning rate is too high; lower --lr"),
    "collapse": (collapsed(1.1), TAUGHT, "constant_features", "all pictures get the same features"),
    "above the start": (
        [{"loss": 1.2 + 0.05 * n} for n in range(20)], {}, "diverged", "loss rose to .* from 1.2 untrained: .*--lr",
    ),
    "rise": ([{"loss": 1.3 - 0.1 * min(n, 8) + 0.08 * max(0, n - 8)} for n in range(20)], {}, "diverged", "--lr"),
    "not a number": ([{"loss": 1.0}, {"loss": math.nan}], {}, "diverged", "the loss is no number"),
    "dead features": ([{"loss": 1.0}, {"loss": 1.0, "health": {**SEEN, "rank": None}}], {}, "diverged", "features"),
    "black": ([{"loss": 1.0, "health": {**SEEN, "distinct": 1}}], {}, "constant_features", "1 of 64 pictures looked"),
    "duplicates": ([{"loss": 1.0, "health": {**SEEN, "batch": 64, "batch_distinct": 2}}], {}, "constant_features",
                   "2 of 64 pictures of a batch differ"),
    "few directions": ([{"loss": 1.0, "health": {**SEEN, "rank": 1.4}} for _ in range(20)], {}, "low_rank", "1.4"),
    "slow disk": ([{"loss": 1.0, "data_wait": 0.8} for _ in range(20)], {}, "starved", "80 % .* --workers"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_with_cause_and_knob(name: str) -> None:
    lines, chance, expected, advice = FAULTS[name]
    monitor = verdict(lines, chance)
    assert monitor.finding.verdict == expected
    assert monitor.summary()["verdict"] == expected and monitor.history[-1]["verdict"] == expected
    assert re.search(advice, monitor.finding.advice or ""), monitor.finding.advice


def test_a_head_far_too_wide_is_told_from_a_hot_teacher() -> None:
    lines = FAULTS["temperature"][0]
    assert "far too wide for 200 samples; lower `prototypes`" in str(verdict(lines, samples=200).finding)
    assert "prototypes" not in str(verdict(lines, samples=2000).finding)


def test_nothing_is_judged_in_the_warm_up_and_health_comes_back() -> None:
    ill = teacher(CHANCE, CHANCE, 1.0)
    assert not verdict([ill] * 3).history
    monitor = verdict([ill] * 10 + [teacher(4.0, 3.0, 0.5)] * 30)
    assert [entry["verdict"] for entry in monitor.history] == ["uniform_teacher", "healthy"]


def test_a_few_noisy_steps_are_no_divergence() -> None:
    monitor = Monitor({}, 0, 2000)
    for step, loss in enumerate([3.0, 2.3, 2.1, 2.4, 2.2, 2.9, 3.1, 2.8, 3.3, 2.9], 1):
        monitor.add({"step": step, "loss": loss, "data_wait": 0.0})
    assert not monitor.history


def test_a_run_that_goes_on_comes_to_the_same_verdicts() -> None:
    lines = collapsed(8.0) + [{"loss": CHANCE, "health": SEEN}] * 20
    whole, again = verdict(lines), verdict(lines)
    assert whole.history == again.history and len(whole.history) == 2


def test_rank_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 32, generator=generator)
    assert 28 < health.effective_rank(noise) <= 32
    assert health.effective_rank(noise[:, :1] * torch.ones(32)) == pytest.approx(1.0, abs=1e-6)
    assert health.spread(noise) > 0.9
    assert health.spread(torch.ones(8, 4) + 1e-6 * noise[:8, :4]) < 1e-10


def test_distinct_pictures_are_counted() -> None:
    pictures = torch.stack([Preprocess.at(32)(Pictures(40)[n].pixels) for n in range(40)])
    assert health.distinct(pictures) == 40
    assert health.distinct(pictures[[0, 1, 0, 1, 1, 2]]) == 3
    copies = pictures[:1].int().expand(20, -1, -1, -1) + torch.randint(-1, 2, (20, 3, 32, 32))
    assert health.distinct(copies.clamp(0, 255).to(torch.uint8)) == 1, "re-encoded copies are copies"
    assert health.distinct(torch.zeros(8, 3, 5, 40)) == 1


def test_a_look_is_fixed_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    network = vit.build("vit-ti/8", image_size=16, depth=1, width=48, heads=3, hidden=96)
    encoder = Encoder(network, {}).eval()
    pictures = health.choose(Pictures(30, broken=frozenset({3, 4})), encoder.preprocess, 20)
    assert pictures is not None and 18 <= len(pictures) <= 20
    state = torch.get_rng_state()
    once, again = health.look(encoder, pictures), health.look(encoder, pictures)
    assert once == again and 1 < once["rank"] <= once["most"] == len(pictures) and 0 < once["spread"] < 1
    assert torch.equal(state, torch.get_rng_state()) and not network.training
    with torch.no_grad():
        network.norm.weight.fill_(torch.nan)
    assert health.look(encoder, pictures)["rank"] is None

"""Where the losses of masked distillation are odd: logits out of range, half precision, nothing hidden, few samples,
queues that are still empty, and several ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from saccade import distributed, heads, losses, vit
from saccade.data import Batch
from saccade.errors import SaccadeError
from saccade.recipes import dinov2, ibot

TINY = {"depth": 2, "width": 16, "heads": 2, "hidden": 24}
START = torch.tensor(0.0)
QUEUE = 16


def configure(page: Any, **changes: Any) -> Any:
    settings = {"arch": "vit-ti/4", "image_size": 16, "local_size": 8, "local_crops": 1, "batch": 4, "drop_path": 0.0}
    settings |= {"prototypes": 32, "hidden": 16, "momentum": 1.0}
    if page is dinov2:
        settings |= {"koleo_group": 2, "bottleneck": 8}
    return page.Config(**(settings | changes))


def build(page: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = configure(page, **changes)
    method = page.Method(config, vit.build("vit-ti/4", image_size=16, **TINY, **config.backbone()), {}).double()
    for name, parameter in method.named_parameters():
        if "last_layer" in name or "mlp" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return method


def batch(step: int, samples: slice = slice(0, 4), *, hide: float = 0.4) -> Batch:
    """Crops of some of four samples, view-major; nothing is hidden of the last two samples."""
    generator = torch.Generator().manual_seed(step)
    large = torch.rand(2, 4, 3, 16, 16, dtype=torch.float64, generator=generator)
    small = torch.rand(1, 4, 3, 8, 8, dtype=torch.float64, generator=generator)
    hidden = torch.rand(2, 4, 16, generator=generator) < hide
    hidden[:, 2:] = False
    words = torch.zeros(3, 4, dtype=torch.long)
    made = {"globals": large, "locals": small, "hide": hidden, "drop": words}
    return {name: x[:, samples].flatten(0, 1) for name, x in made.items()}


# Sinkhorn-Knopp out of range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    """Scores without weight norm over a small temperature: exp(200 / 0.04) is beyond any float."""
    torch.manual_seed(0)
    scores = (200 + torch.randn(24, 16)).to(dtype)
    assert not (scores.float() / 0.04).exp().isfinite().any()
    found = losses.sinkhorn_knopp(scores, 0.04)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses.sinkhorn_knopp(scores.double(), 0.04).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, losses.sinkhorn_knopp(scores.double() - 200, 0.04).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(24))


def test_a_sample_far_above_leaves_the_others_their_answers() -> None:
    """With the largest logit of all taken out, the others' would all vanish in float32, and their answers with them."""
    torch.manual_seed(0)
    scores = torch.randn(8, 16)
    scores[0] += 8
    assert not ((scores[1:] - scores.max()) / 0.04).exp().any()
    found = losses.sinkhorn_knopp(scores, 0.04)
    torch.testing.assert_close(found.sum(1), torch.ones(8))
    torch.testing.assert_close(found, losses.sinkhorn_knopp(scores.double(), 0.04).float(), rtol=1e-4, atol=1e-6)


def test_sinkhorn_knopp_uses_prototypes_alike() -> None:
    torch.manual_seed(0)
    found = losses.sinkhorn_knopp(torch.randn(64, 8).double(), 0.5, iterations=50)
    torch.testing.assert_close(found.mean(0), torch.full((8,), 1 / 8).double())


# The queue


def head() -> heads.DINOHead:
    torch.manual_seed(0)
    made = heads.DINOHead(4, 64, hidden=8, bottleneck=6).double()
    torch.nn.init.normal_(made.last_layer.weight)
    return made


def rows(step: int, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.nn.functional.normalize(1 + torch.randn(count, 6, dtype=torch.float64, generator=generator), dim=1)


def assignment(queue: int) -> heads.Assignment:
    return heads.Assignment("sinkhorn", 64, 6, momentum=0.9, queue=queue).double()


TEMPERATURE = torch.tensor(0.07, dtype=torch.float64)


def test_an_empty_queue_changes_nothing() -> None:
    found = assignment(24)(head(), rows(0), TEMPERATURE)
    torch.testing.assert_close(found, assignment(0)(head(), rows(0), TEMPERATURE))
    zeros = losses.sinkhorn_knopp(head().score(rows(0)), TEMPERATURE, torch.zeros(24, 64).double())
    assert (found - zeros).abs().sum(1).mean() > 0.2, "as samples, zeros change much"


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_queue_is_a_larger_batch(steps: int) -> None:
    """Of this step and as many of the last three as there have been."""
    assign, scored = assignment(24), head()
    for step in range(steps):
        for part in rows(step).split(4):  # micro-batches
            assign(scored, part, TEMPERATURE)
        assign.after_step()
    together = torch.cat([rows(step) for step in range(steps, max(-1, steps - 4), -1)])
    found = assign(scored, rows(steps), TEMPERATURE)
    torch.testing.assert_close(found, assignment(0)(scored, together, TEMPERATURE)[:8])
    assert (found - assignment(0)(scored, rows(steps), TEMPERATURE)).abs().max() > 0.01


def test_a_queue_is_scored_by_the_head_of_today() -> None:
    assign, scored = assignment(8), head()
    assign(scored, rows(0), TEMPERATURE)
    assign.after_step()
    torch.nn.init.normal_(scored.last_layer.weight)
    found = assign(scored, rows(1), TEMPERATURE)
    together = torch.cat([rows(1), rows(0)])
    torch.testing.assert_close(found, assignment(0)(scored, together, TEMPERATURE)[:8])


def test_a_queue_is_kept_in_checkpoints_and_a_step_is_not() -> None:
    assert assignment(8).state_dict().keys() == {"past"}
    assert heads.Assignment("centre", 64, 6, momentum=0.9).state_dict().keys() == {"centre"}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"queue": 8}, "--queue"), ({"patch_prototypes": 48}, "--patch-prototypes"), ({"patch_hidden": 9}, "--separate")],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, int], flag: str) -> None:
    """A queue beside a centre, and the sizes of a head that patches do not have."""
    with pytest.raises(SaccadeError, match=flag):
        build(dinov2, **changes)


@pytest.mark.parametrize(("queue", "better"), [(4, 8), (20, 16), (31, 32)])
def test_a_queue_of_parts_of_steps_is_refused(queue: int, better: int) -> None:
    """Which samples of the oldest step it kept would depend on ranks and on accumulation."""
    with pytest.raises(SaccadeError, match=f"--queue {queue} .* 8 large crops") as error:
        build(dinov2, assignment="sinkhorn", queue=queue)
    assert error.value.path == "--queue" and error.value.hint == f"use {better}, or another multiple of 8"
    build(dinov2, assignment="sinkhorn", queue=better)


# KoLeo


def test_koleo_is_taken_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.koleo(x, 8)
        half = losses.koleo(x.bfloat16(), 8)
    assert found.dtype == torch.float32 and torch.equal(found, losses.koleo(x, 8))
    assert torch.equal(half, losses.koleo(x.bfloat16().float(), 8))


def test_koleo_of_equal_samples_is_finite() -> None:
    x = torch.ones(4, 8, requires_grad=True)
    found = losses.koleo(x, 4)
    found.backward()
    assert found.item() == pytest.approx(-math.log(1e-8 * (1 + math.sqrt(8))), rel=1e-3) and x.grad.isfinite().all()


def test_nobody_is_its_own_neighbour() -> None:
    """Not even where the others are on the other side."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.1]]).double()
    assert losses.koleo(x, 2).item() == pytest.approx(-math.log(2), abs=0.01)


def test_groups_of_koleo_see_no_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8).double()
    parts = torch.stack([losses.koleo(part, 4) for part in x.split(4)])
    torch.testing.assert_close(losses.koleo(x, 4), parts.mean())
    assert losses.koleo(x, 16) > losses.koleo(x, 4), "among more samples the nearest is nearer"
    for group in (3, 1):
        with pytest.raises(ValueError, match=f"16 rows do not make groups of {group}"):
            losses.koleo(x, group)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_a_batch_smaller_than_a_group_is_refused(monkeypatch, world: int, accumulate: int) -> None:
    monkeypatch.setattr(distributed, "world", lambda: world)
    sizes = {"batch": 32, "accumulate": accumulate, "koleo_group": 16}
    with pytest.raises(SaccadeError, match="groups of 16, which do not divide micro-batches of 8") as error:
        build(dinov2, **sizes)
    assert error.value.path == "--koleo-group"
    build(dinov2, **(sizes | {"koleo_group": 8}))
    build(dinov2, **(sizes | {"koleo_weight": 0.0}))


def test_without_koleo_there_is_none() -> None:
    loss, metrics = build(dinov2, koleo_weight=0.0, koleo_group=3)(batch(0), START)
    assert "koleo" not in metrics
    torch.testing.assert_close(loss.detach(), metrics["cls_loss"] + metrics["patch_loss"])


# Nothing hidden

PAGES = [
    (ibot, {}),
    (ibot, {"head_norm": True}),
    (dinov2, {}),
    (dinov2, {"head_norm": True}),
    (dinov2, {"assignment": "sinkhorn", "separate_heads": True, "queue": QUEUE}),
    (dinov2, {"separate_heads": True, "head_norm": True}),
]


@pytest.mark.parametrize(("page", "changes"), PAGES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_nothing_hidden_costs_nothing(page: Any, changes: dict[str, Any]) -> None:
    method = build(page, **changes)
    loss, metrics = method(batch(0, hide=0.0), START)
    loss.backward()
    method.after_step(START)
    assert loss.isfinite() and metrics["patch_loss"] == 0
    for name, parameter in method.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(x.isfinite().all() for x in method.state_dict().values())
    if page is dinov2 and "assignment" not in changes:
        assert not method.assign["patch"].centre.any(), "where nothing was seen, nothing moves"


def test_patches_count_as_pictures_and_whole_pictures_as_zero() -> None:
    torch.manual_seed(0)
    hide = torch.tensor([[True, False, False], [False] * 3, [True, True, True], [False] * 3])
    student, teacher = torch.randn(4, 5), torch.randn(4, 5).softmax(-1)
    each = -(teacher * (student / 0.1).log_softmax(-1)).sum(-1)
    found = losses.hidden_patches(student, teacher, hide, 0.1)
    torch.testing.assert_close(found, (each[0] + each[1:].mean()) / 4)


@pytest.mark.parametrize(
    ("page", "changes", "patches"), [(ibot, {}, 32), (dinov2, {"separate_heads": True, "patch_prototypes": 48}, 48)]
)
def test_where_nothing_is_told_apart_metrics_are_at_chance(page: Any, changes: dict[str, Any], patches: int) -> None:
    method = build(page, **changes)
    for name, parameter in method.named_parameters():
        if "last_layer" in name:
            torch.nn.init.ones_(parameter)
    _, metrics = method(batch(0), START)
    chance = method.chance()
    assert chance == {"cls_loss": math.log(32), "teacher_entropy": math.log(32),
                      "patch_loss": math.log(patches) / 2, "patch_entropy": math.log(patches)}  # fmt: skip
    assert {name: metrics[name].item() for name in chance} == pytest.approx(chance)
    for off in ({"masked": 0.0}, {"patch_weight": 0.0}):
        assert list(build(page, **changes, **off).chance()) == ["cls_loss", "teacher_entropy"]


# Ranks

KINDS = {
    "centre": (dinov2, {}),
    "queue": (dinov2, {"assignment": "sinkhorn", "separate_heads": True, "queue": QUEUE}),
    "ibot": (ibot, {}),
}


def two_steps(page: Any, changes: dict[str, Any], rank: int, world: int) -> dict[str, Tensor]:
    """Losses, gradients and buffers after three steps of this rank's samples; of the last two nothing is hidden."""
    method, told = build(page, **changes), []
    accumulate = changes.get("accumulate", 1)
    size = 4 // world // accumulate
    for step in range(3):
        firsts = [rank * 4 // world + part * size for part in range(accumulate)]
        parts = [batch(step, slice(first, first + size)) for first in firsts]
        if page is dinov2 and method.assign.ahead:
            parts = [method(part, START, True)[1] or part for part in parts]
        for part in parts:
            loss, _ = method(part, START)
            (loss / accumulate).backward()
            told.append(loss.detach() / accumulate)
        method.after_step(START)
    found = {"loss": torch.stack(told).sum()}
    found |= {name: p.grad for name, p in method.student.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": x for name, x in method.named_buffers() if "assign" in name or "centres" in name}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {name: two_steps(*kind, rank, 2) for name, kind in KINDS.items()}
    scores = head().score(rows(0, 13))  # ten of them here, three there
    found["sinkhorn"] = losses.sinkhorn_knopp(scores.split([10, 3])[rank], 0.07)
    found["one rank has none"] = losses.sinkhorn_knopp(scores.split([13, 0])[rank], 0.07)
    far = torch.stack([torch.arange(4.0), 200 - torch.arange(4.0)])
    found["far"] = losses.sinkhorn_knopp(far[rank : rank + 1], 0.04)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks find."""
    folder = tmp_path_factory.mktemp("distillation")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_assign_as_one(ranked: list[dict[str, Any]]) -> None:
    scores = head().score(rows(0, 13))
    wanted = losses.sinkhorn_knopp(scores, 0.07)
    for name in ("sinkhorn", "one rank has none"):
        torch.testing.assert_close(torch.cat([found[name] for found in ranked]), wanted)
    assert (losses.sinkhorn_knopp(scores[:10], 0.07) - wanted[:10]).abs().max() > 0.01
    for found in ranked:
        torch.testing.assert_close(found["far"].sum(1), torch.ones(1))


def sorted_rows(x: Tensor) -> Tensor:
    return x[x[:, 0].argsort()] if x.ndim == 2 and len(x) == QUEUE else x


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_as_one(ranked: list[dict[str, Any]], kind: str) -> None:
    """One of them has nothing hidden; gradients are averaged over ranks, centres and queues are the same on both."""
    page, changes = KINDS[kind]
    alone, both = two_steps(page, changes, 0, 1), [found[kind] for found in ranked]
    assert alone.keys() == both[0].keys() == both[1].keys()
    for name, wanted in alone.items():
        if name.startswith("buffer"):
            assert torch.equal(both[0][name], both[1][name])
            found = both[0][name]
        else:
            found = (both[0][name] + both[1][name]) / 2
        # a queue's order does not matter
        torch.testing.assert_close(sorted_rows(found), sorted_rows(wanted), rtol=1e-9, atol=1e-12, msg=name)
    assert kind != "queue" or (alone["buffer assign.cls.past"].norm(dim=1) > 0.99).all(), "it is full"


@pytest.mark.parametrize("kind", KINDS)
def test_accumulating_is_one_batch(kind: str) -> None:
    """Also where answers are evened out within a batch: the teacher looks at all of it first."""
    page, changes = KINDS[kind]
    whole, parts = (two_steps(page, changes | {"accumulate": n}, 0, 1) for n in (1, 2))
    for name, wanted in whole.items():
        torch.testing.assert_close(sorted_rows(parts[name]), sorted_rows(wanted), rtol=1e-9, atol=1e-12, msg=name)

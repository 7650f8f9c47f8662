"""Same weights, pictures and masks as facebookresearch/dinov2 and bytedance/ibot: same losses, gradients and centres
over three steps, and the same pieces one by one. No mutation passes for them.

tests/parity/make_distillation.py made the numbers and says how. What only DINOv3 has is compared with formulas that are
written out here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade import heads, losses, vit
from saccade.recipes import dinov2, ibot

PARITY = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("make_distillation", PARITY / "make_distillation.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
STORED = load_file(PARITY / "distillation.safetensors")
TOLERANCE = 1e-8
UNTIL = 0.5
"""When the teacher's temperature is at its end: the three steps are at 0, a quarter and a half."""


def far(ours: dict[str, Tensor]) -> float:
    """The largest relative difference from what is stored under these names."""
    pairs = [(found.detach().flatten(), STORED[name].flatten()) for name, found in ours.items()]
    return max(((found - wanted).abs().max() / wanted.abs().max()).item() for found, wanted in pairs)


# The whole methods


def configure(kind: str, **changes: Any) -> ibot.Config | dinov2.Config:
    """The reference's settings."""
    settings: dict[str, Any] = {
        "image_size": reference.GEOMETRY["image_size"],
        "local_size": reference.LOCAL_SIZE,
        "local_crops": reference.LOCALS,
        "batch": reference.SAMPLES,
        "prototypes": reference.PROTOTYPES,
        "hidden": reference.HIDDEN,
        "drop_path": 0.0,
        "momentum": 1.0,  # the teacher stays
        "first_temperature": reference.TEMPERATURES[0],
        "teacher_temperature": reference.TEMPERATURES[-1],
        "temperature_warmup": UNTIL,
    }
    if kind == "ibot":
        return ibot.Config(**(settings | changes))
    settings |= {"bottleneck": reference.BOTTLENECK, "koleo_group": reference.SAMPLES, "assignment": kind}
    settings |= {"separate_heads": kind == "sinkhorn", "registers": reference.REGISTERS[kind]}
    return dinov2.Config(**(settings | changes))


def build(kind: str, **changes: Any) -> ibot.Method | dinov2.Method:
    """Our method with the redrawn weights, in float64."""
    config = configure(kind, **changes)
    geometry = {**reference.GEOMETRY, **config.backbone(), "mean": reference.MEAN, "std": reference.STD}
    page = ibot if kind == "ibot" else dinov2
    method = page.Method(config, vit.ViT(vit.ViTConfig(**geometry)), {}).double()
    for who in ("student", "teacher"):
        network = getattr(method, who)
        network["backbone"].reset_buffers()
        reference.redraw_parameters(network, who)
    return method


def three_steps(kind: str, **changes: Any) -> float:
    """How far our losses, gradients and centres are from the reference's."""
    method, told = build(kind, **changes), []
    for step in range(reference.STEPS):
        large, small, hide = reference.inputs(step)
        t = torch.tensor(step * UNTIL / (reference.STEPS - 1), dtype=torch.float64)
        words = torch.zeros(len(large) + len(small), dtype=torch.long)
        loss, _ = method({"globals": large, "locals": small, "hide": hide, "drop": words}, t)
        loss.backward()
        method.after_step(t)
        told.append(loss.detach())
    found = {f"{kind}/{n}": p.grad for n, p in method.student.named_parameters() if p.grad is not None}
    found[f"{kind}/losses"] = torch.stack(told)
    if kind != "sinkhorn":
        centres = method.centres if kind == "ibot" else [method.assign[part].centre for part in ("cls", "patch")]
        found |= {f"{kind}/centre {part}": x for part, x in zip(("cls", "patch"), centres, strict=True)}
    assert found.keys() == {name for name in STORED if name.startswith(f"{kind}/")}
    return far(found)


@pytest.mark.parametrize("kind", ["ibot", *reference.KINDS])
def test_three_steps_are_the_reference_s(kind: str) -> None:
    assert three_steps(kind) < TOLERANCE


@pytest.mark.parametrize("kind", ["ibot", *reference.KINDS])
@pytest.mark.parametrize(
    "changes", [{"student_temperature": 0.11}, {"first_temperature": 0.06}, {"patch_weight": 2.0}], ids=str
)
def test_a_wrong_setting_fails(kind: str, changes: dict[str, float]) -> None:
    assert three_steps(kind, **changes) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ibot", {"centre_momentum": 0.91}),
        ("centre", {"centre_momentum": 0.91}),
        ("centre", {"koleo_weight": 0.2}),
        ("centre", {"koleo_group": 2}),
    ],
    ids=str,
)
def test_a_wrong_setting_of_its_own_fails(kind: str, changes: dict[str, float]) -> None:
    assert three_steps(kind, **changes) > 10 * TOLERANCE


def mean_over_masked_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.hidden_patches
    monkeypatch.setattr(
        losses, "hidden_patches", lambda s, t, hide, T: right(s, t, hide, T) * len(hide) / hide.any(1).sum()
    )


def mean_over_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(student: Tensor, teacher: Tensor, hide: Tensor, temperature: float) -> Tensor:
        return -(teacher * (student / temperature).log_softmax(-1)).sum(-1).mean() / 2

    monkeypatch.setattr(losses, "hidden_patches", wrong)


def own_view_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(student: Tensor, teacher: Tensor, temperature: float, *_: float) -> Tensor:
        return -(teacher.sum(0) * (student / temperature).log_softmax(-1)).sum(-1).mean() / len(teacher)

    monkeypatch.setattr(heads, "cross_view", wrong)


def swapped_views(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.cross_view
    monkeypatch.setattr(heads, "cross_view", lambda student, teacher, *rest: right(student, teacher.flip(0), *rest))


def other_patches_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vit.ViT.forward

    def wrong(self: vit.ViT, images: Tensor, keep: Any = None, hide: Any = None, **other: Any) -> vit.Features:
        return right(self, images, keep, None if hide is None else hide.flip(1), **other)

    monkeypatch.setattr(vit.ViT, "forward", wrong)


@pytest.mark.parametrize("kind", ["ibot", *reference.KINDS])
@pytest.mark.parametrize(
    "mutate", [mean_over_masked_pictures, mean_over_patches, own_view_too, swapped_views, other_patches_hidden]
)
def test_a_mutated_loss_fails(monkeypatch, kind: str, mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    mutate(monkeypatch)
    assert three_steps(kind) > 10 * TOLERANCE


def koleo_of_the_first_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = losses.koleo, []

    def wrong(x: Tensor, group: int) -> Tensor:
        calls.append(0)
        return right(x, group) * (len(calls) % 2)

    monkeypatch.setattr(losses, "koleo", wrong)


def prototypes_of_length_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.DINOHead.score
    monkeypatch.setattr(heads.DINOHead, "score", lambda self, x: right(self, x) / self.gain)


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("mutate", [koleo_of_the_first_crop, prototypes_of_length_one])
def test_a_mutated_dinov2_fails(monkeypatch, kind: str, mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    mutate(monkeypatch)
    assert three_steps(kind) > 10 * TOLERANCE


def test_a_centre_that_moves_before_the_loss_fails(monkeypatch) -> None:
    right = heads.Assignment.forward

    def wrong(self: heads.Assignment, head: heads.DINOHead, x: Tensor, *more: Tensor | None) -> Tensor:
        self.centre.lerp_(head.score(x).mean(0), 1 - self.momentum)
        return right(self, head, x, *more)

    monkeypatch.setattr(heads.Assignment, "forward", wrong)
    assert three_steps("centre") > 10 * TOLERANCE


# Piece by piece


class Scored(heads.DINOHead):
    """A head whose bottlenecks are scores already."""

    def __init__(self) -> None:
        super().__init__(1, 1, hidden=1, bottleneck=1)

    def score(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("name", "rows", "number"), [("scores", 8, 0), ("scores of patches", 21, 1)], ids=["cls", "patch"]
)
def test_sinkhorn_knopp_is_the_reference_s(name: str, rows: int, number: int) -> None:
    scores, kind = reference.logits(name, rows), f"piece/sinkhorn {('cls', 'patch')[number]}"
    temperature = reference.TEMPERATURES[number]
    assert far({kind: losses.sinkhorn_knopp(scores, temperature)}) < TOLERANCE
    for iterations in (2, 4):
        assert far({kind: losses.sinkhorn_knopp(scores, temperature, iterations=iterations)}) > 1e-5
    half = rows // 2  # former samples count as those of this batch
    found = losses.sinkhorn_knopp(scores[:half], temperature, scores[half:])
    torch.testing.assert_close(found, STORED[kind][:half], rtol=1e-8, atol=0)


def test_centring_is_the_reference_s() -> None:
    assign = heads.Assignment("centre", reference.PROTOTYPES, 1, momentum=0.9).double()
    found = {}
    for step in range(reference.STEPS):
        halves = reference.logits(f"scores {step}", 8).split([3, 5])  # micro-batches
        parts = [assign(Scored(), part, torch.tensor(reference.TEMPERATURES[step])) for part in halves]
        found[f"piece/centred {step}"] = torch.cat(parts)
        assign.after_step()
    assert far(found | {"piece/centre": assign.centre}) < TOLERANCE


def test_the_patches_loss_is_the_reference_s() -> None:
    _, _, hide = reference.inputs(0)
    student, teacher = (reference.logits(f"hidden {who}", int(hide.sum())) for who in ("student", "teacher"))
    student.requires_grad_()
    loss = losses.hidden_patches(student, (5 * teacher).softmax(-1), hide, 0.1)
    loss.backward()
    assert far({"piece/patch loss": loss, "piece/patch gradient": student.grad}) < TOLERANCE


@pytest.mark.parametrize("group", [32, 16, 8])
def test_koleo_is_the_reference_s(group: int) -> None:
    x = reference.embeddings().requires_grad_()
    spread = losses.koleo(x, group)
    spread.backward()
    assert far({f"piece/koleo {group}": spread, f"piece/koleo {group} gradient": x.grad}) < TOLERANCE
    assert far({f"piece/koleo {group}": losses.koleo(x, 4)}) > 1e-3


@pytest.mark.parametrize("lengths", ["one", "learned", "free"])
def test_heads_are_what_their_weight_norm_says(lengths: str) -> None:
    """torch's own weight norm, with its gain held, learned, or none at all."""
    ours = heads.DINOHead(8, 12, hidden=10, bottleneck=6, lengths=lengths).double()
    assert ours.gain is None or torch.equal(ours.gain, torch.ones_like(ours.gain))
    reference.redraw_parameters(ours, "student")
    first, second, third = (part for part in ours.mlp if isinstance(part, torch.nn.Linear))
    last = torch.nn.Linear(6, 12, bias=False).double()
    last.weight.data.copy_(ours.last_layer.weight)
    gain = None
    if lengths != "free":
        torch.nn.utils.parametrizations.weight_norm(last)
        gain = last.parametrizations.weight.original0
        gain.data.copy_(torch.ones(12, 1) if lengths == "one" else ours.gain.detach()[:, None])
    x = reference.redraw("x", (5, 8), -1, 1)
    hidden = third(torch.nn.functional.gelu(second(torch.nn.functional.gelu(first(x)))))
    wanted = last(hidden / hidden.square().sum(-1, keepdim=True).sqrt())
    torch.testing.assert_close(ours(x), wanted, rtol=1e-10, atol=1e-12)
    weights = reference.redraw("asked", (5, 12), -1, 1)
    inner = last.weight if lengths == "free" else last.parametrizations.weight.original1
    asked = torch.autograd.grad((ours(x) * weights).sum(), ours.last_layer.weight)[0]
    torch.testing.assert_close(asked, torch.autograd.grad((wanted * weights).sum(), inner, retain_graph=True)[0])
    if lengths == "learned":
        asked = torch.autograd.grad((ours(x) * weights).sum(), ours.gain)[0]
        torch.testing.assert_close(asked, torch.autograd.grad((wanted * weights).sum(), gain)[0][:, 0])


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_small_crops_may_count_less(weight: float) -> None:
    """DINOv3's two terms: 2 of 18 parts of the mean over large pairs, 16 of that over small ones, weighted."""
    student = reference.redraw("student views", (10, 3, 7), -1, 1).requires_grad_()
    teacher = reference.redraw("teacher views", (2, 3, 7), -3, 3).softmax(-1)

    def entropy(u: int, v: int) -> Tensor:
        return -(teacher[u] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean()

    large = torch.stack([entropy(0, 1), entropy(1, 0)]).mean()
    small = torch.stack([entropy(u, v) for u in (0, 1) for v in range(2, 10)]).mean()
    wanted = large * 2 / 18 + weight * small * 16 / 18
    ours = heads.cross_view(student, teacher, 0.1, weight)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_gram_is_the_mean_over_all_pairs_of_patches() -> None:
    """Negative cosines count too, and it is a mean, not a Frobenius norm: DINOv3's weight of 2 is meant for it."""
    student = reference.redraw("gram student", (3, 5, 4), -1, 1).requires_grad_()
    teacher = reference.redraw("gram teacher", (3, 5, 4), -1, 1)
    cosine = torch.nn.functional.cosine_similarity
    terms = [
        (cosine(student[b, i], student[b, j], dim=0) - cosine(teacher[b, i], teacher[b, j], dim=0)).square()
        for b in range(3)
        for i in range(5)
        for j in range(5)
    ]
    wanted, ours = torch.stack(terms).mean(), losses.gram(student, teacher)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(losses.gram(3 * student, 0.2 * teacher), wanted, rtol=1e-10, atol=0)

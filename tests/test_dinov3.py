"""DINOv3's stages: which teacher is the anchor, what is compared with it, and the rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import small, source

import saccade
from saccade import backbone, recipe, vit
from saccade.data import Batch, collate
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.recipes import dinov3
from saccade.run import Run

TINY = {"depth": 2, "width": 48, "heads": 3, "hidden": 96}
SETTINGS = {name: value for name, value in small("dinov3").items() if name != "steps"} | {"local_crops": 2}


def config(**changes: Any) -> dinov3.Config:
    return dinov3.Config(**SETTINGS | changes)


def method(stage: str, **changes: Any) -> dinov3.Method:
    torch.manual_seed(0)
    settings = config(**changes).model_copy(update={"stage": stage})
    network = backbone.build(settings.arch, image_size=settings.image_size, **TINY, **settings.backbone())
    return dinov3.Method(settings, network, {})


def views(stage: str, step: int = 3, **changes: Any) -> Batch:
    pictures = source("dinov3")
    batch = collate([pictures[place] for place in range(8)], [0] * 8, list(range(8)))
    settings = config(**changes).model_copy(update={"stage": stage})
    return dinov3.views(settings, batch, Draws(0, step, batch["key"], batch["seen"], batch["place"]))


def weights(module: torch.nn.Module | None) -> list[Tensor]:
    assert module is not None
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_the_stages_follow_the_paper() -> None:
    stages = dinov3.stages(dinov3.Config())
    ends = [0.15, 0.82, 0.828, 0.836, 0.844, 0.99, 1.0]
    assert [until for until, _ in stages] == pytest.approx(ends)
    assert [c.stage for _, c in stages] == ["first", "kept", "held", "renewed", "renewed", "renewed", "high"]
    assert [c.momentum for _, c in stages] == [0.994] * 2 + [0.999] * 5
    assert [c.gram_weight for _, c in stages] == [2.0] * 6 + [1.5]
    assert [c.stage for _, c in dinov3.stages(dinov3.Config(high=1.0))][-1] == "renewed"


def test_rates_are_constant_and_fall_at_high_resolution() -> None:
    giant = dinov3.giant()
    assert giant.peak() == pytest.approx(4e-4)
    assert [giant.rate(t) for t in (0.04, 0.08, 0.5, 0.9)] == pytest.approx([0.5, 1.0, 1.0, 0.6])
    assert giant.rate(0.99) * giant.peak() == pytest.approx(7.2e-5) and giant.rate(1.0) == pytest.approx(0)


def test_the_anchor_is_an_early_teacher_then_renewed() -> None:
    """`begin` follows `Model.adopt`, which gives a stage the weights of the one before, by name."""
    assert method("first").anchor is None
    for stage, renewed in (("kept", True), ("held", False), ("renewed", True), ("high", True)):
        made = method(stage)
        with torch.no_grad():
            for parameter in made.teacher.parameters():
                parameter.add_(0.1)
        before = weights(made.anchor)
        made.begin()
        assert same(weights(made.anchor), weights(made.teacher["backbone"])) is renewed
        assert same(weights(made.anchor), before) is not renewed
        assert not any(parameter.requires_grad for parameter in made.anchor.parameters())


def test_patches_are_held_to_the_anchor_from_the_third_stage() -> None:
    for stage, held in (("first", False), ("kept", False), ("held", True), ("high", True)):
        metrics = method(stage)(views(stage), torch.tensor(0.3))[1]
        assert ("gram" in metrics) is held, stage


def test_the_weight_of_the_anchor_rises_and_small_crops_lose_half() -> None:
    made, seen = method("held"), views("held")
    at = {
        t: made(seen, torch.tensor(t)) for t in (0.25, 0.2625, 0.5)
    }  # gram 0.25, refresh 0.125: risen in a tenth of it
    base, full = at[0.25][0] - 0 * at[0.25][1]["gram"], at[0.5]
    made.config = made.config.model_copy(update={"gram_weight": 0.0})
    without = made(seen, torch.tensor(0.5))[0]
    torch.testing.assert_close(full[0] - without, 2 * full[1]["gram"])
    torch.testing.assert_close(at[0.2625][0], full[0])  # it has risen
    assert without < base  # half of what small crops cost is gone


def test_chance_is_the_same_in_all_stages() -> None:
    for stage, t in (("first", 0.1), ("held", 0.5)):
        made = method(stage)
        for name, parameter in made.named_parameters():
            if "last_layer" in name:
                torch.nn.init.ones_(parameter)
        _, metrics = made(views(stage), torch.tensor(t))
        for name in ("cls_loss", "teacher_entropy", "patch_entropy"):
            assert metrics[name].item() == pytest.approx(made.chance()[name], rel=1e-4), (stage, name)


def test_the_anchor_sees_the_same_crops_finer_in_their_own_colours() -> None:
    plain = {"colour": 0.0, "grey": 0.0, "blur": 0.0, "solarise": 0.0}
    seen = views("held", **plain)
    assert seen["plain"].shape == (16, 3, 64, 64) and seen["globals"].shape == (16, 3, 32, 32)
    shrunk = torch.nn.functional.interpolate(seen["plain"], size=32, mode="bicubic", antialias=True)
    assert (shrunk - seen["globals"]).abs().mean() < 0.02
    coloured = views("held", colour=1.0)
    assert torch.equal(coloured["plain"], seen["plain"]) and not torch.equal(coloured["globals"], seen["globals"])
    assert "plain" not in views("kept")


def test_its_patches_come_to_the_students_grid() -> None:
    made = method("held")
    images = torch.rand(2, 3, 64, 64)
    found = made.anchored(images, (4, 4))
    patches = made.anchor(images).patches.mT.unflatten(2, (8, 8))
    expected = torch.nn.functional.interpolate(patches, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found, expected.flatten(2).mT)
    assert torch.equal(made.anchored(images[..., :32, :32], (4, 4)), made.anchor(images[..., :32, :32]).patches)


def test_crops_grow_as_often_as_published() -> None:
    sizes = []
    for step in range(300):
        u = float(Draws(0, step, *[torch.zeros(1, dtype=torch.int64)] * 3).step("sizes").shared(1))
        sizes.append(next(n for n in range(1, 6) if u < sum(row[3] for row in dinov3.MIXED[:n]) or n == 5))
    shares = [sizes.count(n) / len(sizes) for n in range(1, 6)]
    assert shares == pytest.approx([0.3, 0.3, 0.3, 0.05, 0.05], abs=0.08)
    found = {(v["globals"].shape[-1], v["locals"].shape[-1], v["plain"].shape[-1]) for v in map(_high, range(12))}
    assert len(found) > 1 and found <= {(64, 16, 96), (96, 16, 144), (96, 24, 144), (96, 32, 144), (96, 48, 144)}


def _high(step: int) -> Batch:
    return views("high", step)


def test_coordinates_are_stretched_anew_in_every_block() -> None:
    made, seen = method("first"), views("first")
    assert set(seen["stretch"][:16].tolist()) != set(seen["stretch"][16:].tolist())
    assert len(set(seen["stretch"].tolist())) == 2
    network, images = made.student["backbone"], seen["globals"]
    none = network(images).patches
    one = network(images, stretch=torch.ones(2)).patches
    torch.testing.assert_close(one, none)
    first, second = (network(images, stretch=torch.tensor(by)).patches for by in ([2.0, 1.0], [1.0, 2.0]))
    assert not torch.allclose(first, none, atol=1e-4) and not torch.allclose(first, second, atol=1e-4)


def test_without_small_crops() -> None:
    made, seen = method("first", local_crops=0), views("first", local_crops=0)
    assert "locals" not in seen and torch.isfinite(made(seen, torch.tensor(0.1))[0])


def test_small_crops_may_have_a_norm_of_their_own() -> None:
    made = method("first", local_norm=True)
    loss, _ = made(views("first"), torch.tensor(0.1))
    loss.backward()
    norm = made.student["local_norm"]
    assert norm.weight.grad is not None and norm.weight.grad.any()
    assert {name for group in made.groups(0.1) for name in group.parameters} >= {"student.local_norm.weight"}


def test_a_run_through_all_stages(tmp_path: Path) -> None:
    out = saccade.pretrain(source("dinov3"), recipe="dinov3", out=tmp_path, workers=0, log_every=1, **small("dinov3"))
    lines = Run.open(out.path).metrics()
    assert ["gram" in line for line in lines] == [False] * 2 + [True] * 6
    with pytest.raises(SaccadeError, match="3 steps leave a stage of dinov3 without one"):
        saccade.pretrain(
            source("dinov3"), recipe="dinov3", out=tmp_path / "short", workers=0, **small("dinov3") | {"steps": 3}
        )


HEADS = ("head", "patch_head")


def test_the_giant_builds_without_memory() -> None:
    page, giant = recipe.configure("dinov3:giant", {})
    with torch.device("meta"):
        network = backbone.build(giant.arch, image_size=giant.image_size, **giant.backbone())
        made = page.method(giant, network, {})
    assert isinstance(network, vit.ViT) and sum(p.numel() for p in network.parameters()) == 6_716_035_072
    shapes = [(made.student[head].mlp[0].out_features, *made.student[head].last_layer.weight.shape) for head in HEADS]
    assert shapes == [(8192, 262_144, 512), (4096, 98_304, 384)], "as released: patches have a narrower head"
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert sum(p.numel() for group in made.groups(0.0) for p in group.parameters.values()) == sum(
        p.numel() for p in made.student.parameters()
    )

"""DINO's parts one by one: what is drawn, which branches are left out, what the loss compares, and who follows whom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import augment, backbone, depth, heads, model, optim, recipe, vit
from saccade.data import Batch
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.recipe import configure as configure_recipe
from saccade.recipes import dino
from saccade.settings import PretrainArguments, checked
from saccade.tour import PICTURES
from saccade.train import pretrain

TINY = {"depth": 3, "width": 16, "heads": 2, "hidden": 24}


def configure(**changes: Any) -> dino.Config:
    settings = {"arch": "vit-ti/4", "image_size": 16, "local_size": 8, "local_crops": 2, "batch": 8, "steps": 4}
    return dino.Config(**(settings | {"prototypes": 32, "hidden": 16} | changes))


def draws(samples: int, step: int = 0) -> Draws:
    rows = torch.arange(samples)
    return Draws(0, step, rows + 100, torch.zeros_like(rows), rows)


def decoded(samples: int, channels: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (samples, 1, channels, 20, 24), dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "size": torch.tensor([[20, 24]]).repeat(samples, 1)}


def build(config: dino.Config) -> dino.Method:
    torch.manual_seed(0)
    switches = {**TINY, **config.backbone()} if config.arch.startswith("vit") else {}
    network = backbone.build(config.arch, image_size=config.image_size, channels=config.channels, **switches)
    return dino.Method(config, network, {})


def seen(samples: int, config: dino.Config, step: int = 0) -> Batch:
    return dino.views(config, decoded(samples, config.channels), draws(samples, step))


# Views


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[int, augment.Views]:
    """What `render` is asked for, by side."""
    found: dict[int, augment.Views] = {}

    def render(pixels: Tensor, views: augment.Views, side: int) -> Tensor:
        found[side] = views
        return torch.zeros(len(views), 3, 1, 1)

    monkeypatch.setattr(augment, "render", render)
    return found


def share(chosen: Tensor) -> float:
    return chosen.float().mean().item()


def test_views_are_those_of_the_paper(rows: dict[int, augment.Views]) -> None:
    n = 2000
    size = torch.tensor([[300, 400]]).repeat(n, 1)
    made = dino.views(dino.Config(), {"pixels": torch.empty(0), "size": size}, draws(n))
    large, small = rows[224], rows[96]
    assert (len(large), len(small), len(made["drop"])) == (2 * n, 8 * n, 10 * n)
    assert torch.equal(large.image, torch.arange(n).repeat(2)) and torch.equal(small.image, torch.arange(n).repeat(8))
    for views, low, high in ((large, 0.4, 1.0), (small, 0.05, 0.4)):
        area = views.box[:, 2:].prod(1) / (300 * 400)
        assert low - 0.01 < area.min() < low + 0.02 and high - 0.02 < area.max() <= high + 0.01
        assert share(views.flip) == pytest.approx(0.5, abs=0.03)
        assert share(views.grey) == pytest.approx(0.2, abs=0.03)
        assert share(views.factors[:, 0] != 1) == pytest.approx(0.8, abs=0.03)
        widest = (views.factors - torch.tensor([1.0, 1.0, 1.0, 0.0])).abs().amax(0)
        torch.testing.assert_close(widest, torch.tensor([0.4, 0.4, 0.2, 0.1]), atol=0.01, rtol=0)
    for views, blurred, solarised in ((large[:n], 1.0, 0.0), (large[n:], 0.1, 0.2), (small, 0.5, 0.0)):
        assert share(views.sigma > 0) == pytest.approx(blurred, abs=0.03)
        assert views.sigma.max() <= 2 and views.sigma[views.sigma > 0].min() >= 0.1
        assert share(views.threshold.isfinite()) == pytest.approx(solarised, abs=0.03)


def test_every_view_is_drawn_by_itself(rows: dict[int, augment.Views]) -> None:
    n = 50
    size = torch.tensor([[300, 400]]).repeat(n, 1)
    made = dino.views(dino.Config(), {"pixels": torch.empty(0), "size": size}, draws(n))
    for views in rows.values():
        for numbers in (views.box.float(), views.factors):
            assert len(numbers.unflatten(0, (-1, n)).mean(1).unique(dim=0)) == len(views) // n
    assert len(made["drop"].unique()) == 10 * n


def test_knobs_turn_off_what_they_name(rows: dict[int, augment.Views]) -> None:
    config = configure(flip=0, colour=0, grey=0, blur=0, solarise=0)
    dino.views(config, decoded(100), draws(100))
    for views in rows.values():
        plain = augment.whole(torch.ones(len(views), 2, dtype=torch.long))
        for name in ("flip", "factors", "grey", "sigma", "threshold"):
            assert torch.equal(getattr(views, name), getattr(plain, name)), name


def test_many_channels_and_no_small_crops() -> None:
    with pytest.raises(SaccadeError, match="13 channels"):
        seen(4, configure(channels=13))
    config = configure(channels=13, colour=0, grey=0, local_crops=0)
    views = seen(4, config)
    assert views.keys() == {"globals", "drop"} and views["globals"].shape == (8, 13, 16, 16)
    loss, _ = build(config)(views, torch.tensor(0.0))
    assert loss.isfinite()


# Stochastic depth


def test_depth_is_dropped_as_often_as_asked_and_keeps_the_mean() -> None:
    rates = [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    factors = depth.stochastic_depth(draws(20000).step("drop").bits(1)[:, 0], rates)
    assert factors is not None and factors.shape == (20000, 6)
    for column, rate in zip(factors.unbind(1), rates, strict=True):
        assert share(column == 0) == pytest.approx(rate, abs=0.015)
        assert column[column > 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
        assert column.mean().item() == pytest.approx(1, abs=0.03)
    assert share((factors[:, 4] == 0) & (factors[:, 5] == 0)) == pytest.approx(0.25, abs=0.015), "each by itself"
    assert depth.stochastic_depth(torch.zeros(3, dtype=torch.long), [0.0] * 6) is None
    assert depth.stochastic_depth(torch.zeros(3, dtype=torch.long), []) is None


@pytest.mark.parametrize("switches", [{}, {"layer_scale": 0.5}, {"cls": False, "pooling": "mean"}, {"pooling": "map"}])
def test_factors_scale_their_own_branch(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = vit.build("vit-ti/4", image_size=16, **TINY, **switches).double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert network.branches == len(network.drop_rates(0.1)) == 6 and network.stride == 4
    assert network.drop_rates(0.1) == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.1])
    plain = network.embedding(network(images))
    torch.testing.assert_close(network.pooled(images), plain)
    torch.testing.assert_close(network.pooled(images, drop=torch.ones(2, 6)), plain)
    for branch in range(6):
        drop = torch.ones(2, 6)
        drop[1, branch] = 0
        one = network.pooled(images, drop=drop)
        torch.testing.assert_close(one, network.embedding(network(images, drop=drop)))
        torch.testing.assert_close(one[0], plain[0])
        assert not torch.allclose(one[1], plain[1])
        block = network.blocks[branch // 2]
        last = (block.attn.proj, block.mlp.fc2)[branch % 2]
        kept = {name: p.detach().clone() for name, p in last.named_parameters()}
        for parameter in last.parameters():  # a branch that says 0 is a branch left out
            torch.nn.init.zeros_(parameter)
        torch.testing.assert_close(network.pooled(images)[1], one[1])
        last.load_state_dict(kept)


def test_depth_runs_under_autocast() -> None:
    network = vit.build("vit-ti/4", image_size=16, **TINY)
    drop = torch.full((2, 6), 2.0, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = network.pooled(torch.rand(2, 3, 16, 16), drop=drop)
    pooled.float().sum().backward()
    assert pooled.isfinite().all()


def test_only_the_student_loses_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    method, asked = build(configure(drop_path=0.5)), []
    right = vit.ViT.pooled

    def pooled(self: vit.ViT, images: Tensor, *, drop: Tensor | None = None) -> Tensor:
        asked.append((self is method.teacher["backbone"], None if drop is None else tuple(drop.shape)))
        return right(self, images, drop=drop)

    monkeypatch.setattr(vit.ViT, "pooled", pooled)
    method(seen(4, method.config), torch.tensor(0.0))
    assert asked == [(True, None), (False, (8, 6)), (False, (8, 6))]


# Head and loss


def test_the_head_gives_cosines() -> None:
    torch.manual_seed(0)
    head, x = heads.DINOHead(16, 32, hidden=24, bottleneck=8), torch.randn(100, 16)
    answers = head(x)
    cosines = torch.nn.functional.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight[None], dim=-1)
    torch.testing.assert_close(answers, cosines)
    with torch.no_grad():
        head.last_layer.weight.mul_(7)
    torch.testing.assert_close(head(x), answers)


@pytest.mark.parametrize(
    ("recipe", "samples", "wanted"),
    [("dino", 1_281_167, 65536), ("dinov3", 100_000_000, 65536), ("ibot", 1_281_167, 8192), ("dinov2", 10_000, 1024),
     ("dino", 1200, 256), ("ibot", 1, 256), ("dinov3:giant", 5000, 262_144)],
)  # fmt: skip
def test_prototypes_are_as_many_as_the_pictures_are_enough_for(recipe: str, samples: int, wanted: int) -> None:
    assert configure_recipe(recipe, {})[1].fitted(samples).prototypes == wanted
    assert configure_recipe(recipe, {"prototypes": 77})[1].fitted(samples).prototypes == 77


def test_a_run_records_how_many_prototypes_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vit.SIZES, "nano", {"width": 16, "depth": 1, "heads": 1, "hidden": 16})
    small = {"arch": "vit-nano/8", "image_size": 16, "local_crops": 0, "batch": 4, "steps": 1, "hidden": 8}
    run = pretrain(PICTURES / "train.tar", recipe="dino", out=tmp_path / "run", workers=0, **small)
    assert run.config["settings"]["prototypes"] == 512, "of some three thousand pictures"
    assert run.summary["health"]["chance"]["loss"] == pytest.approx(math.log(512))


def naive(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    terms = [
        -(teacher[u] * (student[v] / temperature).log_softmax(-1)).sum(-1).mean()
        for u in range(len(teacher))
        for v in range(len(student))
        if u != v
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("views", "of_teacher"), [(10, 2), (2, 2), (3, 1), (5, 4)])
def test_the_loss_is_the_mean_over_pairs(views: int, of_teacher: int) -> None:
    torch.manual_seed(0)
    student = torch.randn(views, 3, 17, dtype=torch.float64, requires_grad=True)
    teacher = (torch.randn(of_teacher, 3, 17, dtype=torch.float64) * 5).softmax(-1)
    results = []
    for loss in (heads.cross_view, naive):
        value = loss(student, teacher, 0.1)
        results.append((value, *torch.autograd.grad(value, student)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_the_loss_wants_pairs() -> None:
    one = torch.ones(1, 3, 4) / 4
    for student, teacher in ((one, one), (one, one.repeat(2, 1, 1)), (one.repeat(2, 1, 1), one[:0])):
        with pytest.raises(ValueError, match="no pair"):
            heads.cross_view(student, teacher, 0.1)


def test_the_loss_is_taken_in_float32_at_least() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 64).clamp(-1, 1), torch.randn(2, 3, 64).softmax(-1)
    half = student.bfloat16()
    assert torch.equal(heads.cross_view(half, teacher, 0.1), heads.cross_view(half.float(), teacher, 0.1))


def test_concentration_knows_the_extremes() -> None:
    uniform, same = torch.full((6, 8), 1 / 8), torch.eye(8)[[3] * 6]
    found = [
        {name: value.item() for name, value in heads.concentration(p).items()} for p in (uniform, same, torch.eye(8))
    ]
    assert found[0] == pytest.approx({"teacher_entropy": math.log(8), "prototype_use": 1})
    assert found[1] == pytest.approx({"teacher_entropy": 0, "prototype_use": 1 / 8})
    assert found[2] == pytest.approx({"teacher_entropy": 0, "prototype_use": 1})


def test_concentration_of_patches_is_apart_and_of_some() -> None:
    whole = torch.full((6, 8), 1 / 8)
    for patches, entropy, use in (
        (torch.full((40, 4), 1 / 4), math.log(4), 1),
        (torch.eye(4)[[3] * 40], 0, 1 / 4),
        (torch.eye(4)[[0, 1] * 3], 0, 1 / 2),
        (torch.empty(0, 4), 0, 1 / 4),  # nothing is hidden
    ):
        found = heads.concentration(whole, patches)
        assert found["teacher_entropy"].item() == pytest.approx(math.log(8))
        assert found["patch_entropy"].item() == pytest.approx(entropy, abs=1e-6)
        assert found["patch_use"].item() == pytest.approx(use)
    many = torch.cat([torch.eye(4)[[0] * 12], torch.eye(4)[[1] * 12]])  # the first ones are not the only ones
    assert heads.concentration(whole, many)["patch_use"].item() == pytest.approx(1 / 2)


def test_a_student_that_tells_nothing_apart_is_at_chance() -> None:
    method = build(configure())
    with torch.no_grad():
        method.student["head"].last_layer.weight.fill_(1.0)
    loss, _ = method(seen(4, method.config), torch.tensor(0.0))
    assert loss.item() == pytest.approx(method.chance()["loss"], rel=1e-5) == pytest.approx(math.log(32), rel=1e-5)


# A step


def trained(monkeypatch: pytest.MonkeyPatch, config: dino.Config, batches: list[Batch]) -> model.Model:
    method = build(config)
    monkeypatch.setattr(model, "build", lambda page, config, init: (method, {}))
    arguments = PretrainArguments(data=("pictures",), recipe="dino", out="run")
    whole = model.Model(recipe.find("dino"), config, arguments, Ranks(0, 1, torch.device("cpu")))
    stream = iter(batches)
    for step in range(len(batches) // config.accumulate):
        whole.step(stream, step / 4)
    return whole


def part(views: Batch, samples: slice, count: int) -> Batch:
    return {name: x.unflatten(0, (-1, count))[:, samples].flatten(0, 1) for name, x in views.items()}


def test_accumulating_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [seen(8, configure(), step) for step in range(3)]
    halves = [part(views, half, 8) for views in whole for half in (slice(0, 4), slice(4, 8))]
    one, other = (
        trained(monkeypatch, configure(accumulate=len(batches) // 3), batches).method.state_dict()
        for batches in (whole, halves)
    )
    assert one["centre"].abs().max() > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=2e-6, msg=name)


def test_the_teacher_follows_and_takes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(momentum=0.9, lr=1.0, warmup=0.0)
    method = build(config)
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in method.student.named_parameters())
    method(seen(4, config), torch.tensor(0.0))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.after_step(torch.tensor(0.5))
    for name, parameter in method.teacher.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.05)
    assert method.encoder() is method.teacher["backbone"] and not method.mean_logits.any()


def test_groups_and_what_they_mean() -> None:
    method = build(configure(layer_decay=0.5, freeze=0.25))
    for t, frozen, decay in ((0.0, True, 0.04), (0.5, False, 0.22)):
        found = {}
        for group in method.groups(t):
            assert group.clip_group is None
            found |= {name: (group, parameter) for name, parameter in group.parameters.items()}
        assert found.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
        for name, (group, parameter) in found.items():
            assert group.frozen == (frozen and name == "student.head.last_layer.weight"), name
            assert group.weight_decay == pytest.approx(decay if parameter.ndim > 1 else 0.0), name
        assert found["student.backbone.blocks.2.attn.qkv.weight"][0].lr_scale == 0.5
        assert found["student.head.mlp.0.weight"][0].lr_scale == 1.0


def test_a_decay_of_nothing_keeps_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    trained(monkeypatch, configure(weight_decay=0.0), [seen(8, configure(), step) for step in range(2)])


def test_each_tensor_is_clipped_by_itself() -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("loud", "quiet", "together", "too")}
    for parameter, size in zip(parameters.values(), (30.0, 0.3, 3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([size, 0.0])
    alone = {name: parameters[name] for name in ("loud", "quiet")}
    shared = {name: parameters[name] for name in ("together", "too")}
    groups = [optim.Group(alone, clip_group=None), optim.Group(shared, clip_group="shared")]
    norm = optim.AdamW(groups, 1e-3, (0.9, 0.95), clip=1.0).clip_gradients()
    found = [parameter.grad[0].item() for parameter in parameters.values()]
    assert found == pytest.approx([1.0, 0.3, 0.6, 0.8], rel=1e-5)
    assert norm.item() == pytest.approx(math.sqrt(30**2 + 0.3**2 + 3**2 + 4**2))


def test_the_learning_rate_ends_where_it_is_told() -> None:
    config = recipe.Training(lr=0.5, batch=256, min_lr=0.1, warmup=0.1)
    assert [config.rate(t) for t in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1.0, 0.6, 0.2])


def test_positions_are_resized_as_asked() -> None:
    torch.manual_seed(0)
    plain, offset = (vit.build("vit-ti/4", image_size=16, position_offset=by, **TINY) for by in (0.0, 0.1))
    offset.load_state_dict(plain.state_dict())
    assert torch.equal(plain.position_table((4, 4)), offset.position_table((4, 4)))
    table = plain.pos_embed[:, 1:].unflatten(1, (4, 4)).movedim(-1, 1)
    for network, to in ((plain, {"size": (2, 3)}), (offset, {"scale_factor": (2.1 / 4, 3.1 / 4)})):
        resized = torch.nn.functional.interpolate(table, mode="bicubic", align_corners=False, **to)
        assert torch.equal(network.position_table((2, 3)), resized.flatten(2).transpose(1, 2))
    sides = range(1, 40)  # no side is lost to rounding
    assert all(offset.position_table((side, side)).shape[1] == side**2 for side in sides)


@pytest.mark.parametrize("arch", ["vit-ti/4", "resnet-10-half/8", "convnext-a/8"])
def test_any_backbone_learns(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    config = configure(arch=arch, image_size=16, local_size=8, drop_path=0.2)
    whole = trained(monkeypatch, config, [seen(8, config, step) for step in range(2)])
    assert all(torch.isfinite(x).all() for x in whole.method.state_dict().values())


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SaccadeError, match="--local-crops"):
        checked(dino.Config, {"local_crops": -1}, owner="recipe dino")
    method = build(configure(local_size=10))
    views = seen(4, method.config)
    with pytest.raises(SaccadeError, match="divisible by patch 4"):
        method(views, torch.tensor(0.0))


def test_a_small_crop_that_patches_do_not_divide_is_named() -> None:
    page, config = recipe.configure("dino:small_machine", {"local_size": 20})
    with pytest.raises(SaccadeError, match="size 20 is not divisible by patch 8") as caught:
        model.build(page, config, None)
    assert caught.value.path == "--local-size"

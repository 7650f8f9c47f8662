"""Distillation: students learn a frozen teacher's prototypes or features, all from one pass of it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import small, teacher
from toys.sources import Pictures

import saccade
from saccade import backbone, cli, heads, losses, optim, recipe, teachers, weights
from saccade.data import Batch, collate
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.frozen import Teacher
from saccade.norm import Standard
from saccade.recipes import dinov2, distil

TINY = {"depth": 2, "width": 48, "heads": 3, "hidden": 96}
NOW = torch.tensor(0.25)
SETTINGS: dict[str, Any] = {"arch": "vit-ti/8", "image_size": 32, "batch": 4, "layer_scale": 0.5, "registers": 0}


def config(**more: Any) -> distil.Config:
    return distil.Config(**SETTINGS | more)


def small_net(arch: str = "vit-ti/8", **more: Any) -> nn.Module:
    tiny = TINY if arch.startswith("vit") else {"blocks": (1, 1), "widths": (16, 24), "stride": 8}
    return backbone.build(arch, image_size=32, **tiny | more)


def frozen(arch: str = "vit-ti/8", with_heads: bool = False, masked: bool = True) -> Teacher:
    """A teacher with random weights; its heads are wide apart, or one where patches were never scored."""
    torch.manual_seed(1)
    network = small_net(arch, width=64, heads=4) if arch.startswith("vit") else small_net(arch)
    if not with_heads:
        return Teacher(network)
    settings = dinov2.Config if masked else recipe.SelfDistillation
    made = {"head": heads.DINOHead(network.config.width, 32, hidden=24, bottleneck=16)}
    if masked:
        made["patch_head"] = heads.DINOHead(network.config.width, 20, hidden=24, bottleneck=16, lengths="free")
    for head in made.values():
        nn.init.normal_(head.last_layer.weight)
    return Teacher(network, made, settings(teacher_temperature=0.05), "sinkhorn")


def method(settings: distil.Config, taught: Teacher, network: nn.Module | None = None) -> distil.Method:
    torch.manual_seed(2)
    return distil.Method(settings, network or small_net(), {"teacher": taught})


def views(settings: distil.Config, samples: int = 4) -> Batch:
    source = Pictures(samples)
    batch = collate([source[n] for n in range(samples)], [0] * samples, list(range(samples)))
    return distil.views(settings, batch, Draws(0, 3, batch["key"], batch["seen"], batch["place"]))


def double(made: distil.Method, batch: Batch) -> Batch:
    """Everything in float64, on the teacher's side too."""
    made.double()
    made.teachers["teacher"].double()
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)


def test_features_are_learned_by_cosine_and_smooth_l1_of_standardised_numbers() -> None:
    made = method(settings := config(patch_weight=0.7), taught := frozen())
    batch = double(made, views(settings))
    loss, metrics = made(batch, NOW)
    images, student = batch["globals"], made.students["vit-ti/8"]
    theirs, ours = taught.backbone(images), student["backbone"](images)

    def distance(answer: Tensor, target: Tensor) -> Tensor:
        rows = target.reshape(-1, target.shape[-1])
        target = (target - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()
        cosine = (answer * target).sum(-1) / answer.norm(dim=-1) / target.norm(dim=-1)
        apart = (answer - target).abs()
        smooth = torch.where(apart < 1, apart.square() / 2, apart - 0.5)
        return 0.5 * (1 - cosine).mean() + 0.5 * smooth.mean()

    cls = distance(student["head"](ours.cls), theirs.cls)
    patch = distance(student["patch_head"](ours.patches), theirs.patches)
    close(loss, cls + 0.7 * patch)
    close(metrics["cls_loss"], cls.detach())
    close(metrics["patch_loss"], patch.detach())


def test_prototypes_are_learned_from_other_views_and_where_patches_are_asked_about() -> None:
    settings = config(learn="heads", local_crops=2, local_size=16, patch_weight=0.5, asked=0.4)
    made = method(settings, taught := frozen(with_heads=True))
    batch = double(made, views(settings))
    loss, metrics = made(batch, NOW)
    images, student, n = batch["globals"], made.students["vit-ti/8"], 4
    theirs, ours = taught.backbone(images), student["backbone"](images)  # nothing is hidden from the student
    asked = heads.some_patches(batch["words"], 16, 0.4)
    assert asked.sum(1).tolist() == [6] * 8

    q = losses.sinkhorn_knopp(taught.heads["head"](theirs.cls), 0.05)
    small_crops = student["backbone"].pooled(batch["locals"])
    p = (student["head"](torch.cat([ours.cls, small_crops])) / 0.1).log_softmax(-1)
    pairs = [(u, v) for u in range(2) for v in range(4) if u != v]
    cls = sum(-(q[u * n : u * n + n] * p[v * n : v * n + n]).sum() for u, v in pairs) / (n * len(pairs))
    r = losses.sinkhorn_knopp(taught.heads["patch_head"](theirs.patches[asked]), 0.05)
    each = -(r * (student["patch_head"](ours.patches[asked]) / 0.1).log_softmax(-1)).sum(-1)
    close(metrics["cls_loss"], cls.detach())
    close(loss, cls + 0.5 * each.mean())
    assert made.chance() == pytest.approx({"cls_loss": math.log(32), "teacher_entropy": math.log(32)})


def test_a_teacher_that_never_scored_patches_teaches_none() -> None:
    settings = config(learn="heads")
    made = method(settings, frozen(with_heads=True, masked=False))
    assert made(views(settings), NOW)[1].keys() == {"cls_loss", "teacher_entropy", "prototype_use"}


@pytest.mark.parametrize("learn", ["features", "heads"])
def test_two_students_share_one_pass_and_the_teacher_never_moves(learn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(learn=learn, students=("conv-3/8",))
    taught = frozen(with_heads=True)
    monkeypatch.setattr(backbone, "build_for", lambda one: small_net(one.arch))
    made = method(settings, taught)
    before, passes = copy.deepcopy(taught.state_dict()), []
    taught.backbone.register_forward_hook(lambda *_: passes.append(1))
    optimizer = optim.AdamW(made.groups(0.0), 1e-2, (0.9, 0.999), 3.0)
    kept = [p.clone() for p in made.encoder().parameters()]
    loss, metrics = made(views(settings), NOW)
    loss.backward()
    optimizer.optimizer.step()
    made.after_step(NOW)
    assert len(passes) == 1
    assert all(torch.equal(x, before[name]) for name, x in taught.state_dict().items())
    assert not any(p.requires_grad for p in taught.parameters()) and not taught.training
    assert not [name for name in made.state_dict() if "teacher" in name], "a checkpoint does not hold it"
    assert {"loss_vit-ti/8", "loss_conv-3/8"} <= metrics.keys()
    each = metrics["loss_vit-ti/8"] + metrics["loss_conv-3/8"]
    torch.testing.assert_close(loss.detach(), each)
    assert list(made.encoders()) == ["conv-3/8"]
    assert not all(torch.equal(*pair) for pair in zip(kept, made.encoder().parameters(), strict=True))


def test_a_student_trains_as_it_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, alone or beside another: the same gradients after clipping."""
    networks = {name: small_net(name) for name in ("vit-ti/8", "conv-3/8")}
    monkeypatch.setattr(backbone, "build_for", lambda one: networks[one.arch])

    def clipped(*students: str) -> list[Tensor]:
        made = method(settings := config(students=students), frozen(), networks["vit-ti/8"])
        for parameter in made.students["vit-ti/8"]["head"].parameters():
            nn.init.constant_(parameter, 0.1)
        for parameter in made.students["vit-ti/8"]["patch_head"].parameters():
            nn.init.constant_(parameter, 0.1)
        made.zero_grad()
        made(views(settings), NOW)[0].backward()
        optimizer = optim.AdamW(made.groups(0.0), 1e-2, (0.9, 0.999), 1e-3)
        optimizer.clip_gradients()
        return [p.grad.clone() for p in made.students["vit-ti/8"].parameters() if p.grad is not None]

    for alone, beside in zip(clipped(), clipped("conv-3/8"), strict=True):
        torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize("arch", ["vit-ti/8", "vit-ti/16", "conv-3/8"])
def test_any_student_of_any_teacher_on_its_own_grid(arch: str) -> None:
    """The teacher's crops are twice as large and do not divide: it sees the nearest size that does."""
    settings = config(arch=arch, teacher_scale=2.1)
    made = method(settings, taught := frozen("conv-3/8"), small_net(arch))
    batch = views(settings)
    assert batch["again"].shape == (8, 3, 67, 67) and batch["globals"].shape == (8, 3, 32, 32)
    assert taught(batch["again"])[1].shape[2:] == (8, 8)
    made(batch, NOW)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


def test_the_teachers_crops_are_the_students_only_larger() -> None:
    batch = views(config(teacher_scale=2.0, blur=0.0))
    shrunk = F.interpolate(batch["again"], size=32, mode="area")
    assert (shrunk - batch["globals"]).abs().mean() < 0.02


def test_pictures_are_read_large_enough_for_the_teachers_crops() -> None:
    """Otherwise a teacher with finer patches would look at what was enlarged."""
    smallest = config().global_scale[0] ** 0.5
    assert config(teacher_scale=2.0).canvas() * smallest >= 2 * 32
    assert config(teacher_scale=0.5).canvas() == config().canvas()


def test_patches_on_another_grid() -> None:
    x = torch.arange(4.0).view(1, 4, 1)  # [[0 1] [2 3]]
    assert heads.regrid(x, (2, 2), (2, 2)) is x
    torch.testing.assert_close(heads.regrid(x, (2, 2), (1, 1)).flatten(), torch.tensor([1.5]))
    assert heads.regrid(x, (2, 2), (4, 4)).view(4, 4)[0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_standardisation_is_by_former_steps_however_a_step_is_cut() -> None:
    torch.manual_seed(0)
    whole, parts, data = Standard(5), Standard(5), [3 * torch.randn(8, 5) + 2 for _ in range(3)]
    for number, x in enumerate(data):
        together, apart = whole(x), torch.cat([parts(half) for half in x.chunk(2)])
        if number:  # the first step has none before it
            torch.testing.assert_close(together, apart)
        whole.after_step()
        parts.after_step()
    torch.testing.assert_close(whole.mean, torch.cat(data).mean(0))
    torch.testing.assert_close(whole.mean, parts.mean)
    expected = torch.stack([x.var(0, unbiased=False) for x in data]).mean(0)
    torch.testing.assert_close(whole.variance, expected)


def test_what_comes_out_is_an_average_with_its_running_statistics() -> None:
    made = method(config(arch="conv-3/8"), frozen(), small_net("conv-3/8"))
    live, kept = made.students["conv-3/8"]["backbone"], made.encoder()
    made(views(config()), NOW)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(1.0)
    start, counted = [p.clone() for p in kept.parameters()], {name: x.clone() for name, x in kept.named_buffers()}
    made.after_step(NOW)  # the first: nine tenths of the way
    for old, now in zip(start, kept.parameters(), strict=True):
        torch.testing.assert_close(now - old, torch.full_like(old, 0.9))
    running = [name for name in counted if name.endswith(("running_mean", "running_var"))]
    assert running
    for name in running:
        old, now, to = counted[name], kept.get_buffer(name), live.get_buffer(name)
        assert not torch.equal(old, to)
        torch.testing.assert_close(now, old + 0.9 * (to - old))
    made.steps.fill_(10_000)
    before = [p.clone() for p in kept.parameters()]
    made.after_step(NOW)
    for old, now, to in zip(before, kept.parameters(), live.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.006 * (to - old))


def test_heads_come_from_the_runs_last_checkpoint() -> None:
    """Bit for bit what that run's own teacher answers."""
    run = saccade.Run.open(teacher())
    page, asked = recipe.configure(run.config["recipe"], run.config["settings"])
    found, record = teachers.load(distil.Config(teacher=str(run.path)))
    taught = found["teacher"]
    assert record["teachers"]["teacher"]["heads_of_step"] == 2 and taught.assignment == "sinkhorn"
    assert list(taught.heads) == ["head", "patch_head"] and taught.config is not None
    assert taught.config.teacher_temperature == asked.teacher_temperature
    whole = page.method(asked, copy.deepcopy(taught.backbone), {})
    from saccade import distributed

    entries = distributed.metadata(run.checkpoints / "2").state_dict_metadata.items()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    distributed.load_tensors(tensors, run.checkpoints / "2", distributed.Ranks(0, 1, torch.device("cpu")))
    whole.load_state_dict(
        {name.removeprefix("method/"): x for name, x in tensors.items() if name.startswith("method/")}
    )
    images = torch.rand(2, 3, 32, 32)
    whole.teacher.eval()
    with torch.no_grad():
        for ours, theirs in zip(taught.heads.values(), ("head", "patch_head"), strict=True):
            vectors = whole.teacher["backbone"](images).cls
            assert torch.equal(ours(taught(images)[0]), whole.teacher[theirs](vectors))


def test_a_published_backbone_or_a_folder_has_none_and_says_so() -> None:
    folder = str(Path(teacher()) / "backbone")
    with pytest.raises(SaccadeError, match=r"no heads.*\[--learn\].*features"):
        method(config(learn="heads"), teachers.load(config(teacher=folder))[0]["teacher"])


def test_a_run_of_adapt_teaches_by_what_it_handed_over_alone(tmp_path: Path) -> None:
    """Its checkpoints hold another method than the recipe's, and may not be of what was handed over."""
    shutil.copytree(teacher(), tmp_path / "run")
    asked = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(asked | {"verb": "adapt"}))
    found, record = teachers.load(config(teacher=str(tmp_path / "run")))
    assert not found["teacher"].heads and "heads_of_step" not in record["teachers"]["teacher"]


def test_mistakes_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match=r"needs --teacher"):
        teachers.load(config())
    with pytest.raises(SaccadeError, match=r"looks at 3 channels, not at 4.*\[--teacher\]"):
        teachers.load(config(teacher=teacher(), channels=4))
    with pytest.raises(SaccadeError, match=r"there is no backbone"):
        teachers.load(config(teacher=str(tmp_path / "nothing")))
    with pytest.raises(SaccadeError, match=r"need heads.*--learn heads"):
        method(config(local_crops=2), frozen())
    with pytest.raises(SaccadeError, match=r"whole batches.*\[--accumulate\]"):
        method(config(learn="heads", accumulate=2), frozen(with_heads=True))
    with pytest.raises(SaccadeError, match=r"not of whole steps.*use 8"):
        method(config(learn="heads", queue=5), frozen(with_heads=True))
    for twice in (("vit-ti/8",), ("conv-3/8", "conv-3/8")):  # the first is what --arch says
        with pytest.raises(SaccadeError, match=r"named twice.*\[--students\]"):
            method(config(students=twice), frozen())
    with pytest.raises(SaccadeError, match=r"there is no architecture 'vit-z/8'"):
        method(config(students=("vit-z/8",)), frozen())
    with pytest.raises(SaccadeError, match=r"--out"):
        saccade.pretrain(Pictures(8), recipe="distil", out=teacher(), teacher=teacher(), steps=1)


def test_a_teacher_that_changed_is_noticed() -> None:
    known = {"teachers": {"teacher": {"path": "runs/big", "hash": "a"}}}
    assert teachers.unchanged({}, known) is known and teachers.unchanged(known, known) is known
    with pytest.raises(SaccadeError, match=r"runs/big is not the one.*\[--teacher\]"):
        teachers.unchanged(known, {"teachers": {"teacher": {"path": "runs/big", "hash": "b"}}})


def test_a_run_gives_every_student_and_carries_the_teachers_licence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From the command line, from a backbone whose weights derive from somebody's with terms."""
    origin = {"family": "dinov3", "licence": "dinov3-license", "terms": "terms of Meta", "name": "dinov3", "hash": "1"}
    weights.save_backbone(tmp_path / "big", small_net(), {"arch": "vit-ti/8", "derived_from": [origin]})
    run = saccade.pretrain(
        Pictures(8), recipe="distil", out=tmp_path / "run", teacher=str(tmp_path / "big"), students=("vit-ti/16",),
        steps=1, workers=0, **SETTINGS,
    )  # fmt: skip
    assert "smaller than its student" in capsys.readouterr().err
    assert "teacher" not in json.dumps(sorted(path.name for path in run.path.iterdir()))
    for folder, arch, patches in (("backbone", "vit-ti/8", 16), ("backbones/vit-ti-16", "vit-ti/16", 4)):
        encoder = saccade.load(run.path / folder)
        assert encoder.record["arch"] == arch and encoder.record["derived_from"] == [origin]
        assert encoder(torch.zeros(1, 3, 32, 32)).patches.shape[1] == patches
    assert cli.main(["pretrain", "--recipe", "distil", "--help"]) == 0
    assert "--teacher" in capsys.readouterr().out


@pytest.mark.slow  # trains six times
def test_accumulation_changes_nothing_in_features(tmp_path: Path) -> None:
    taught = {**small("distil"), "learn": "features", "local_crops": 0, "queue": 0, "log_every": 1}
    runs = [
        saccade.pretrain(Pictures(16), recipe="distil", out=tmp_path / str(n), workers=0, **taught, accumulate=n)
        for n in (1, 2)
    ]
    found = [[entry["loss"] for entry in run.metrics()] for run in runs]
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-4)

"""Same weights, pictures and depths as facebookresearch/dino: same loss and gradients, and after eight steps of our
loop the same student, teacher and centre. No mutation passes for it.

tests/parity/make_dino.py made the numbers and says how.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saccade import depth, heads, model, optim, recipe, vit
from saccade.data import Batch
from saccade.distributed import Ranks
from saccade.recipes import dino
from saccade.settings import PretrainArguments

PARITY = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("make_dino", PARITY / "make_dino.py")
make_dino = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_dino)
TOLERANCE = 1e-8
START = torch.tensor(0.0)


def configure(**changes) -> dino.Config:
    """The reference's settings, for eight steps."""
    settings = {
        "image_size": make_dino.GEOMETRY["image_size"],
        "local_size": make_dino.LOCAL_SIZE,
        "local_crops": make_dino.LOCALS,
        "batch": 256,  # the learning rate as it is
        "steps": make_dino.STEPS,
        "lr": make_dino.LR,
        "min_lr": make_dino.MIN_LR,
        "warmup": 0.0,
        "weight_decay": make_dino.DECAY,
        "weight_decay_end": make_dino.LAST_DECAY,
        "clip": make_dino.CLIP,
        "momentum": make_dino.MOMENTUM,
        "drop_path": make_dino.DROP,
        "first_temperature": make_dino.FIRST_TEMPERATURE,
        "teacher_temperature": make_dino.TEMPERATURE,
        "temperature_warmup": (make_dino.WARM - 1) / make_dino.STEPS,
        "freeze": 1 / make_dino.STEPS,
        **make_dino.HEAD,
    }
    return dino.Config(**(settings | changes))


def build(config: dino.Config, **switches) -> dino.Method:
    """Our method with the redrawn weights, in float64."""
    geometry = {**make_dino.GEOMETRY, **config.backbone(), **switches}
    backbone = vit.ViT(vit.ViTConfig(mean=make_dino.MEAN, std=make_dino.STD, **geometry))
    method = dino.Method(config, backbone, {}).double()
    method.centre.copy_(make_dino.centre())
    for who in ("student", "teacher"):
        network = getattr(method, who)
        network["backbone"].reset_buffers()
        trained = [parameter.requires_grad for parameter in network.parameters()]
        make_dino.redraw_parameters(network, who)
        assert trained == [who == "student"] * len(trained)
    return method


def batch(step: int) -> Batch:
    """What `views` would hand over."""
    large, small, words = make_dino.inputs(step)
    return {"globals": large, "locals": small, "drop": words}


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


def reference(*kinds: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in load_file(PARITY / "dino.safetensors").items() if name.partition("/")[0] in kinds}


def first(method: dino.Method, kind: str = "plain") -> float:
    """How far the first loss and its gradients are from the reference's."""
    loss, _ = method(batch(0), START)
    loss.backward()
    ours = {f"{kind}/{name.removeprefix('student.')}": p.grad for name, p in method.named_parameters()}
    left_out = {f"normed/{name.removesuffix('_v')}" for name in make_dino.LEFT_OUT}
    ours = {name: gradient for name, gradient in ours.items() if gradient is not None and name not in left_out}
    return far({f"{kind}/loss": loss.detach(), **ours}, reference(kind))


def trained(monkeypatch: pytest.MonkeyPatch, method: dino.Method) -> float:
    """How far losses, weights and centre are from the reference's after its eight steps, taken by our loop."""
    monkeypatch.setattr(model, "build", lambda page, config, init: (method, {}))
    arguments = PretrainArguments(data=("pictures",), recipe="dino", out="run")
    ours = model.Model(recipe.find("dino"), method.config, arguments, Ranks(0, 1, torch.device("cpu")))
    steps = range(make_dino.STEPS)
    told = [ours.step(iter([batch(step)]), step / make_dino.STEPS)["loss"] for step in steps]
    found = {"losses": torch.stack(told), "centre": method.centre}
    for who in ("student", "teacher"):
        found |= {f"{who}/{name}": p.detach() for name, p in getattr(method, who).named_parameters()}
    return far(found, reference("losses", "centre", "student", "teacher"))


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_loss_and_gradients_are_the_reference_s(kind):
    assert first(build(configure(head_norm=kind == "normed")), kind) < TOLERANCE


def test_eight_steps_of_the_loop_are_the_reference_s(monkeypatch):
    assert trained(monkeypatch, build(configure())) < TOLERANCE


def swapped_views(monkeypatch: pytest.MonkeyPatch) -> None:
    right = heads.cross_view
    monkeypatch.setattr(heads, "cross_view", lambda student, teacher, t: right(student, teacher.flip(0), t))


def own_view_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return -(teacher.sum(0) * (student / temperature).log_softmax(-1)).sum(-1).mean() / len(teacher)

    monkeypatch.setattr(heads, "cross_view", wrong)


def no_bottleneck_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads.DINOHead, "forward", lambda self, x: self.last_layer(self.mlp(x)))


def depth_for_all_samples_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    right = depth.stochastic_depth
    monkeypatch.setattr(depth, "stochastic_depth", lambda rows, rates: right(rows[:1].expand(len(rows)), rates))


def depth_without_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = depth.stochastic_depth
    monkeypatch.setattr(depth, "stochastic_depth", lambda rows, rates: right(rows, rates).sign())


@pytest.mark.parametrize(
    "mutate", [swapped_views, own_view_too, no_bottleneck_norm, depth_for_all_samples_alike, depth_without_scale]
)
def test_a_mutated_loss_fails(monkeypatch, mutate: Callable[[pytest.MonkeyPatch], None]):
    mutate(monkeypatch)
    assert first(build(configure())) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [{"student_temperature": 1.0}, {"first_temperature": 0.04}, {"drop_path": 0.0}, {"drop_path": 0.4}],
    ids=str,
)
def test_a_wrong_setting_of_the_loss_fails(changes):
    assert first(build(configure(**changes))) > 10 * TOLERANCE


@pytest.mark.parametrize("switches", [{"position_offset": 0.0}, {"eps": 1e-5}, {"activation": "gelu_tanh"}], ids=str)
def test_a_wrong_switch_of_the_backbone_fails(switches):
    assert first(build(configure(), **switches)) > 10 * TOLERANCE


def centre_before_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dino.Method.target

    def wrong(self: dino.Method, images: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        right(self, images, t)
        self.centre.lerp_(self.mean_logits, 1 - self.config.centre_momentum)
        answer = right(self, images, t)
        self.mean_logits.copy_(self.centre)
        return answer

    monkeypatch.setattr(dino.Method, "target", wrong)


def _groups(monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    right = dino.Method.groups
    monkeypatch.setattr(dino.Method, "groups", lambda self, t: [replace(group, **changes) for group in right(self, t)])


def one_norm_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(monkeypatch, clip_group="all")


def prototypes_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(monkeypatch, frozen=False)


def decay_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(monkeypatch, weight_decay=0.1)


def teacher_keeps_a_constant_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "cosine", lambda t, start, end: torch.as_tensor(start))


@pytest.mark.parametrize(
    "mutate",
    [
        centre_before_the_loss,
        one_norm_for_all,
        prototypes_not_frozen,
        decay_on_all,
        teacher_keeps_a_constant_part,
    ],
)
def test_a_mutated_step_fails(monkeypatch, mutate: Callable[[pytest.MonkeyPatch], None]):
    mutate(monkeypatch)
    assert trained(monkeypatch, build(configure())) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.03},
        {"clip": None},
        {"min_lr": 0.0},
        {"weight_decay_end": 0.04},
        {"momentum": 0.991},
        {"centre_momentum": 0.91},
        {"teacher_temperature": 0.0625},
        {"temperature_warmup": 3 / make_dino.STEPS},
        {"freeze": 2 / make_dino.STEPS},
        {"beta2": 0.95},
    ],
    ids=str,
)
def test_a_wrong_setting_of_the_step_fails(monkeypatch, changes):
    assert trained(monkeypatch, build(configure(**changes))) > 10 * TOLERANCE

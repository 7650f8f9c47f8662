"""SimCLR's loss is the paper's and lightly's, over one rank or several, in one batch or accumulated."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade import distributed, losses, recipe
from saccade.data import Batch
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.model import Model, build
from saccade.recipes import simclr
from saccade.settings import PretrainArguments

PARITY = Path(__file__).parent / "parity"
_spec = importlib.util.spec_from_file_location("make_simclr", PARITY / "make_simclr.py")
make_simclr = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_simclr)
TOLERANCE = 1e-12


def formula(pairs: Tensor, temperature: float) -> Tensor:
    """Equation 1 and algorithm 1 of the paper, term by term: views 2k and 2k + 1 are a pair."""
    z = pairs.flatten(0, 1)
    n = len(z)

    def s(i: int, j: int) -> Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm())

    def ell(i: int, j: int) -> Tensor:
        others = sum((s(i, k) / temperature).exp() for k in range(n) if k != i)
        return -((s(i, j) / temperature).exp() / others).log()

    return sum(ell(k, k + 1) + ell(k + 1, k) for k in range(0, n, 2)) / n


def worst(case: str) -> float:
    """The largest relative difference from the paper's formula and from lightly, over the loss and its gradient."""
    temperature = make_simclr.CASES[case][2]
    stored = load_file(PARITY / "simclr.safetensors")
    ours, paper = make_simclr.pairs(case).requires_grad_(), make_simclr.pairs(case).requires_grad_()
    loss, reference = losses.info_nce(ours, temperature), formula(paper, temperature)
    loss.backward()
    reference.backward()
    found = []
    for value, gradient in ((reference, paper.grad), (stored[f"{case}/loss"], stored[f"{case}/gradient"])):
        found.append((loss - value).abs() / value)
        found.append((ours.grad - gradient).abs().max() / gradient.abs().max())
    return max(found).item()


@pytest.mark.parametrize("case", make_simclr.CASES)
def test_the_loss_is_the_paper_s_and_lightly_s(case):
    assert worst(case) < TOLERANCE


def nobody_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "fill_", lambda self, value: self)


def others_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "first_row", lambda rows: 1)


def no_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses.F, "normalize", lambda x, dim: x / 10)


def no_gradient_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda rows: rows.detach())


def other_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    before = losses.info_nce
    monkeypatch.setattr(losses, "info_nce", lambda pairs, temperature: before(pairs, temperature * (1 + 1e-9)))


@pytest.mark.parametrize(
    "mutate", [nobody_left_out, others_left_out, no_cosines, no_gradient_to_others, other_temperature]
)
def test_a_mutated_loss_fails(mutate, monkeypatch):
    mutate(monkeypatch)
    assert worst("usual") > 10 * TOLERANCE


def test_the_loss_is_float32_under_autocast():
    pairs = make_simclr.pairs("usual").float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.info_nce(pairs, 0.5)
        low = losses.info_nce(pairs.bfloat16(), 0.5)
    assert loss.dtype == low.dtype == torch.float32
    assert torch.equal(loss, losses.info_nce(pairs, 0.5))
    assert torch.equal(low, losses.info_nce(pairs.bfloat16().float(), 0.5))


def test_chance_is_the_loss_of_views_that_are_all_alike():
    method, _ = build(recipe.find("simclr"), simclr.small_machine().model_copy(update={"batch": 6}), None)
    loss = losses.info_nce(torch.ones(6, 2, 4), 0.1)
    assert method.chance() == {"loss": pytest.approx(loss.item(), rel=1e-6)} == {"loss": math.log(11)}


# Steps: the same on one rank or two, whole or accumulated


class Shallow(simclr.Config):
    def backbone(self) -> dict[str, Any]:
        return {"depth": 2} if self.arch.startswith("vit") else {}


SHAPE = {"arch": "vit-ti/8", "image_size": 16, "hidden": 24, "projection": 8}
CONFIG = Shallow(**SHAPE, batch=12, lr=0.01, temperature=0.2, clip=0.5)
ALONE = Ranks(0, 1, torch.device("cpu"))
CONVNET = CONFIG.model_copy(update={"arch": "resnet-8/8", "image_size": 32})


class Plain(simclr.Method):
    """With a projector that has no batch norm: a batch in parts is then the whole batch."""

    def __init__(self, config: simclr.Config, backbone: Any, teachers: dict[str, nn.Module]):
        super().__init__(config, backbone, teachers)
        self.projector = nn.Linear(backbone.config.width, config.projection)


def whole_batch(config: simclr.Config, step: int) -> Tensor:
    """Two views of each sample, [2 B C S S]; what both share is what there is to learn."""
    draw = torch.Generator().manual_seed(step)
    shape = (config.batch, 3, config.image_size, config.image_size)
    shared = torch.rand(shape, generator=draw)
    return torch.cat([0.7 * shared + 0.3 * torch.rand(shape, generator=draw) for _ in range(2)])


def parts_of(images: Tensor, parts: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """The micro-batches of a rank, both views of each sample together."""
    samples = images.unflatten(0, (2, -1)).chunk(parts * world, 1)
    return [{"images": part.flatten(0, 1)} for part in samples[rank::world]]


def trained(
    config: simclr.Config,
    method: type[recipe.Method],
    ranks: Ranks = ALONE,
    scale: float | None = None,
    **arguments: Any,
) -> Tensor:
    """Loss, alignment and gradient norm of three steps: from the second on they depend on what was learnt."""
    page = replace(recipe.find("simclr"), method=method)
    model = Model(page, config, PretrainArguments(data=("-",), recipe="simclr", out="-", **arguments), ranks)
    if scale is not None:
        model.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    said = []
    for step in range(3):
        parts = iter(parts_of(whole_batch(config, step), config.accumulate, ranks.rank, ranks.world))
        metrics = model.step(parts, (step + 1) / 8)
        assert next(parts, None) is None
        said.append(ranks.mean([metrics[name].item() for name in ("loss", "alignment", "gradient_norm")]))
    return torch.tensor(said)


def differ(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference."""
    return ((found - expected).abs() / expected.abs()).max().item()


@pytest.fixture(scope="module")
def at_once() -> Tensor:
    """One rank, the whole batch."""
    return trained(CONFIG, Plain)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_replayed_parts_are_the_whole_batch(at_once, parts):
    found = trained(CONFIG.model_copy(update={"accumulate": parts}), Plain)
    assert differ(found, at_once) < 1e-5


def test_a_scaled_loss_is_replayed_alike(at_once):
    found = trained(CONFIG.model_copy(update={"accumulate": 3}), Plain, scale=1024.0)
    assert differ(found, at_once) < 1e-5


def test_accumulating_losses_of_parts_would_be_another_loss(at_once, monkeypatch):
    monkeypatch.setattr("saccade.model.Coupled", type("Never", (), {}))
    found = trained(CONFIG.model_copy(update={"accumulate": 3}), Plain)
    assert differ(found, at_once) > 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replay_with_batch_norm_has_the_gradients_of_one_graph(precision):
    """The parts' embeddings, each with its own statistics, in one loss; running statistics follow each part once."""
    config = CONVNET.model_copy(update={"accumulate": 3})
    page = recipe.find("simclr")
    model = Model(page, config, PretrainArguments(data=("-",), recipe="simclr", out="-", precision=precision),
                  ALONE)  # fmt: skip
    reference = Model(page, config, PretrainArguments(data=("-",), recipe="simclr", out="-"), model.ranks).method
    parts, now = parts_of(whole_batch(config, 0), 3), torch.tensor(0.5)
    metrics = model._replay(parts, now)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = reference.couple(torch.cat([reference.embed(part, now) for part in parts]), now)
    loss.backward()
    torch.testing.assert_close(metrics["loss"], loss.detach())
    found, expected = ({name: p.grad for name, p in m.named_parameters()} for m in (model.method, reference))
    # in bf16 one graph adds the parts' gradients in bf16, the replay adds them in float32
    for name, gradient in expected.items():
        off = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert off.nan_to_num() < (1e-2 if precision == "bf16" else 1e-5), name
    assert dict(reference.named_buffers())["projector.1.num_batches_tracked"] == 3
    for (name, buffer), other in zip(model.method.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name


# Ranks

WAYS = [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 3)]
"""Sharding and parts."""


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in range(max(2, rank + 1), 4):
        dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
        pairs = make_simclr.pairs("sharp").chunk(world)[rank].clone().requires_grad_()
        loss = losses.info_nce(pairs, 0.1)
        loss.backward()
        found: dict[Any, Tensor] = {"loss": loss.detach(), "gradient": pairs.grad}
        if world == 2:
            ranks = Ranks(rank, world, torch.device("cpu"))
            for sharding, parts in WAYS:
                config = CONFIG.model_copy(update={"accumulate": parts})
                found[sharding, parts] = trained(config, Plain, ranks, sharding=sharding)
            found["convnet"] = trained(CONVNET, simclr.Method, ranks)
        torch.save(found, f"{folder}/{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Tensor]]]:
    """What two ranks and three find."""
    folder = tmp_path_factory.mktemp("simclr")
    mp.spawn(_rank, (str(folder),), nprocs=3)
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (2, 3)}


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_over_ranks_is_that_of_all_samples(ranked, world):
    """Losses average to it; the ranks' gradients are those of their sum, which the wrappers average."""
    stored = load_file(PARITY / "simclr.safetensors")
    loss = sum(found["loss"] for found in ranked[world]) / world
    gradient = torch.cat([found["gradient"] for found in ranked[world]]) / world
    torch.testing.assert_close(loss, stored["sharp/loss"], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(gradient, stored["sharp/gradient"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS, ids=[f"{sharding}-{parts}" for sharding, parts in WAYS])
def test_two_ranks_learn_as_one_whole_or_in_parts(ranked, at_once, way):
    for found in ranked[2]:
        assert differ(found[way], at_once) < 1e-5


def test_two_ranks_learn_as_one_with_batch_norm(ranked):
    expected = trained(CONVNET, simclr.Method)
    assert all(differ(found["convnet"], expected) < 1e-4 for found in ranked[2])


# Views


def batch(count: int = 64) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 3, 24, 24), dtype=torch.uint8, generator=generator)
    rows = torch.arange(count)
    return {"pixels": pixels, "size": torch.full((count, 2), 24)}, Draws(0, 0, rows, rows, rows)


def test_knobs_of_the_views():
    still = {"min_scale": 1.0, "flip": 0, "colour": 0, "grey": 0, "blur": 0}
    shown = {}
    for name, value in {"none": 0, "flip": 1, "colour": 1.0, "grey": 1, "blur": 1, "min_scale": 0.1}.items():
        settings = still if name == "none" else {**still, name: value}
        pictures, draws = batch(8)
        config = simclr.Config(arch="vit-ti/8", image_size=24, **settings)
        shown[name] = simclr.views(config, pictures, draws)["images"]
        assert shown[name].shape == (16, 3, 24, 24)
    plain = (pictures["pixels"][:, 0] / 255).repeat(2, 1, 1, 1)
    whole = [view for view in range(16) if torch.allclose(shown["none"][view], plain[view])]
    assert whole, "nothing is left but the crop, and some crops are whole"
    torch.testing.assert_close(shown["flip"][whole], shown["none"][whole].flip(3))
    assert (shown["grey"].amax(1) == shown["grey"].amin(1)).all()
    for name in ("colour", "blur", "min_scale"):
        assert not torch.allclose(shown[name], shown["none"]), name
    assert not torch.allclose(shown["min_scale"][:8], shown["min_scale"][8:]), "the two views differ"


@pytest.mark.parametrize("config", [simclr.small_pictures(), simclr.small_machine()], ids=lambda config: config.arch)
def test_variants_build_and_take_a_step(config):
    method, _ = build(recipe.find("simclr"), config, None)
    pictures, draws = batch(4)
    loss, metrics = method(simclr.views(config, pictures, draws), torch.tensor(0.0))
    loss.backward()
    assert loss.isfinite() and -1 <= metrics["alignment"] <= 1
    assert all(parameter.grad is not None for parameter in method.parameters())

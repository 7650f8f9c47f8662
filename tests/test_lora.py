"""Low-rank deltas: nothing at first, nothing but them learns, and what is handed over holds them as plain weights."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import knobs, tiny
from toys.sources import Pictures

from saccade import adapt, backbone, cli, distributed, load, lora, recipe, vit, weights
from saccade.anchor import Anchored, anchored
from saccade.distributed import Ranks
from saccade.errors import SaccadeError
from saccade.model import build
from saccade.settings import AdaptArguments

CASES = ["mae", "dino", "simclr-on-a-convnet"]
NETWORKS = ["vit-nano/8", "resnet-50/8", "convnext-a/8", "conv-4/16"]
RANK = 2
page_of_adapt = importlib.import_module("saccade.adapt")  # the name in the package is the verb
QUIET = {"workers": 0, "log_every": 1}


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    """A network that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.SIZES, "nano", {"width": 48, "depth": 2, "heads": 3, "hidden": 96})
        yield


def gentle(case: str) -> dict[str, Any]:
    """Of a short run whose backbone moves for most of it, and far."""
    more = {"steps": 4, "warm": 0.25, "backbone_rate": 1.0, "anchor_patches": 0.0, "anchor_token": 0.0}
    return {**knobs(case), **QUIET, **more}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbones as the recipes build them, by case."""
    folder = tmp_path_factory.mktemp("starts")
    for case in CASES:
        name, settings = case.partition("-")[0], tiny(case)
        network = filled(lambda: backbone.build_for(recipe.configure(name, settings)[1]))  # noqa: B023 called at once
        weights.save_backbone(folder / case, network, {"recipe": name, "arch": settings["arch"]})
    return {case: folder / case for case in CASES}


def kind(arch: str) -> Any:
    """A network of each family with random weights."""
    widths = {"resnet": (8, 8, 8, 8), "convnext": (8, 8, 8, 8), "conv": (8, 8, 8, 8)}.get(arch.partition("-")[0])
    return filled(lambda: backbone.build(arch, image_size=32, **({"widths": widths} if widths else {})))


def filled(build: Callable[[], Any]) -> Any:
    """A network of one seed, all of whose blocks let something through."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:  # of norms and scales of layers, some of which let nothing through at first
            nn.init.constant_(parameter, 0.5)
    return network


def moved(network: nn.Module) -> nn.Module:
    """Deltas that are something."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, lora.LowRank):
                part.b += 0.1 * torch.randn(part.b.shape, generator=random)
    return network


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    directory = run / "checkpoints" / str(step)
    entries: dict[str, Any] = dict(distributed.metadata(directory).state_dict_metadata)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    distributed.load_tensors(tensors, directory, Ranks(0, 1, torch.device("cpu")))
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arch", NETWORKS)
def test_it_begins_as_the_start_and_ends_as_plain_weights(arch: str) -> None:
    plain, images = kind(arch), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    network = copy.deepcopy(plain)
    lora.add(network, RANK, 0)
    with torch.no_grad():
        assert torch.equal(network.pooled(images), plain.pooled(images)), "the start, bit for bit"
        assert same(lora.merged(network.state_dict()), dict(plain.state_dict()))
        learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert learned and all(name.endswith((".0.a", ".0.b")) for name in learned)
        other = copy.deepcopy(moved(network))  # as teachers are made
        expected = other.pooled(images)
        assert not torch.allclose(expected, plain.pooled(images), atol=1e-3)
        plain.load_state_dict(lora.merged(other.state_dict()))
        assert torch.allclose(plain.pooled(images), expected, atol=1e-6)
        lora.merge(other)
        assert same(dict(other.state_dict()), dict(plain.state_dict())) and type(other) is type(plain)


def test_attention_and_both_layers_of_each_mlp_have_deltas() -> None:
    network = kind("vit-nano/8")
    lora.add(network, RANK, 0)
    parts = {name.partition(".parametrizations")[0] for name, p in network.named_parameters() if p.requires_grad}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert parts == {f"blocks.{block}.{layer}" for block in range(2) for layer in layers}


def test_a_step_moves_a_matrix_as_far_whatever_the_rank() -> None:
    """As far as Adam's on the matrix itself, whose elements would move by 1 here."""
    for rank in (1, 4, 16):
        delta = lora.LowRank(torch.zeros(64, 64), rank, torch.Generator().manual_seed(0))
        with torch.no_grad():
            delta.b += torch.randn(delta.b.shape, generator=torch.Generator().manual_seed(1)).sign()
            assert delta(torch.zeros(64, 64)).square().mean().sqrt() == pytest.approx(1, rel=0.3)


def test_what_has_no_matrices_and_too_high_a_rank_are_refused(starts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SaccadeError, match="no matrices in blocks") as mistake:
        lora.add(nn.Sequential(nn.Linear(4, 4)), RANK, 0)
    assert mistake.value.path == "--lora"
    with pytest.raises(SaccadeError, match="has rank 48, less than 49") as mistake:
        adapt(Pictures(16), start=starts["mae"], out=tmp_path / "run", lora=49, **gentle("mae"))
    assert mistake.value.path == "--lora" and "48" in str(mistake.value.hint)
    assert cli.main(["adapt", "x", "--from", str(starts["mae"]), "--out", "run", "--lora", "0"]) == cli.WRONG_USE


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_deltas_alone_and_hands_over_plain_weights(
    case: str, starts: dict[str, Path], tmp_path: Path
) -> None:
    run = adapt(Pictures(16), start=starts[case], out=tmp_path / "run", lora=RANK, save_every="1", **gentle(case))
    first, last = state(run.path, 3), state(run.path, 4)
    held = {name for name in last if ".anchor." not in name and not name.startswith("optimizer/")}
    changed = {name for name in held if not torch.equal(first[name], last[name])}
    inside = {name for name in held if lora._INSIDE in name}
    assert {name for name in inside & changed if name.endswith(".original")} == set()
    assert {name for name in inside if name.endswith((".a", ".b"))} <= changed
    found, recipes = recipe.configure(case.partition("-")[0], tiny(case))
    asked = AdaptArguments(data=("x",), start="x", out="x", lora=RANK)
    method, _ = build(anchored(found, asked, load(starts[case])), recipes, None)
    assert isinstance(method, Anchored)
    network = {id(parameter): name for name, parameter in method._trained[0].named_parameters()}
    names = [name for name, p in method.named_parameters() if id(p) in network]
    assert {name for name in names if f"method/{name}" in changed} == {n for n in names if n.endswith((".a", ".b"))}
    moments = {f"inner.{name.split('/')[1]}" for name in last if name.startswith("optimizer/")}
    assert moments & set(names) == {n for n in names if n.endswith((".a", ".b"))}
    start, kept = load(starts[case]), load(run.path)
    assert kept.backbone.config == start.backbone.config
    assert load_file(run.path / "best" / "model.safetensors").keys() == start.backbone.state_dict().keys()
    before, after = start.backbone.state_dict(), kept.backbone.state_dict()
    own = {name for name in after if not torch.equal(before[name], after[name])}
    assert own and own == {n.partition(lora._INSIDE)[0] + ".weight" for n in network.values() if n.endswith(".a")}
    assert run.config["gently"]["lora"] == RANK and run.summary["estimate"]["learned"] == method.moving[0]
    assert method.moving[0] < 0.3 * method.moving[1]
    assert "could not be shown" not in (run.path / "report.html").read_text()


class Requests(dict[str, bool]):
    """A stop is requested at this step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def __getitem__(self, name: str) -> bool:
        self.step -= 1
        return self.step == 0


def test_a_run_that_was_stopped_ends_the_same(
    starts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, out = "dino", tmp_path / "run"
    whole = adapt(Pictures(16), start=starts[case], out=tmp_path / "whole", lora=RANK, **gentle(case))
    with monkeypatch.context() as once:
        once.setattr(page_of_adapt, "stop_requests", lambda: contextlib.nullcontext(Requests(3)))
        with pytest.raises(SaccadeError, match="stopped on request at step 3"):
            adapt(Pictures(16), start=starts[case], out=out, lora=RANK, **gentle(case))
    with pytest.raises(SaccadeError, match="lora was 2"):
        adapt(Pictures(16), start=starts[case], out=out, lora=3, **gentle(case))
    run = adapt(Pictures(16), start=starts[case], out=out, lora=RANK, **gentle(case))
    assert same(state(out, 4), state(whole.path, 4))
    assert same(dict(load(out).backbone.state_dict()), dict(load(whole.path).backbone.state_dict()))
    assert same(dict(load(out / "best").backbone.state_dict()), dict(load(whole.path / "best").backbone.state_dict()))
    record, other = (json.loads((one.path / "record.json").read_text()) for one in (run, whole))
    assert [record[name] for name in ("before", "after", "gate", "best")] == [
        other[name] for name in ("before", "after", "gate", "best")
    ]

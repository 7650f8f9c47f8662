"""Losses of pairs: the plain formulas in float64, in tiles, over ranks and in parts; doubles are no negatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from saccade import distributed, pair_losses, recipe, weights
from saccade.data import Batch
from saccade.distributed import Ranks
from saccade.errors import SaccadeError
from saccade.model import Model, build
from saccade.reading import fitted
from saccade.settings import PretrainArguments, Worded
from saccade.tokenizer import Tokenizer

CPU = torch.device("cpu")
TOLERANCE = 1e-12
LOSSES = ("contrast", "sigmoid")


def inputs(count: int = 24, doubles: bool = True) -> tuple[list[Tensor], Tensor]:
    """Pairs, factor and offset in float64, and what is the same."""
    draw = torch.Generator().manual_seed(count)
    pairs = torch.randn(count, 2, 8, dtype=torch.float64, generator=draw)
    numbers = torch.arange(2 * count).view(count, 2)
    if doubles:
        numbers[1::5, 1], numbers[2::9, 0] = 1000, 2000
    leaves = [pairs, torch.tensor([9.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)]
    return leaves, numbers


def formula(kind: str, leaves: list[Tensor], numbers: Tensor) -> Tensor:
    """The papers' pseudo-code, pair by pair; what is the same is left out."""
    pairs, scale, bias = leaves
    n, terms = len(pairs), []
    image, text = (side / side.norm(dim=1, keepdim=True) for side in pairs.unbind(1))
    logits = scale * image @ text.T
    out = [[i != j and bool((numbers[i] == numbers[j]).any()) for j in range(n)] for i in range(n)]
    for i in range(n):
        if kind == "sigmoid":
            signs = torch.tensor([1.0 if i == j else -1.0 for j in range(n)], dtype=torch.float64)
            each = -(1 / (1 + (-signs * (logits[i] + bias)).exp())).log()
            terms.append(sum(each[j] for j in range(n) if not out[i][j]) / n)
        else:
            for row in (logits[i], logits[:, i]):
                terms.append((sum(row[j].exp() for j in range(n) if not out[i][j]).log() - row[i]) / (2 * n))
    return sum(terms)


def ours(kind: str, leaves: list[Tensor], numbers: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    pairs, scale, bias = leaves
    if kind == "sigmoid":
        return pair_losses.sigmoid(pairs, scale, bias, numbers, **more)
    return pair_losses.contrast(pairs, scale, numbers)


def worst(kind: str, doubles: bool = True, **more: Any) -> float:
    """The largest relative difference from the formula, over the loss and every gradient."""
    leaves, numbers = inputs(doubles=doubles)
    sides = []
    for loss_of in (lambda *args: ours(*args, **more)[0], formula):
        live = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = loss_of(kind, live, numbers)
        wanted = live if kind == "sigmoid" else live[:2]
        sides.append([loss.detach(), *torch.autograd.grad(3 * loss, wanted)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize("doubles", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_are_the_papers(kind, doubles):
    assert worst(kind, doubles) < TOLERANCE


@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (7, 24), (24, 5), (100, 3)])
def test_tiles_change_nothing(tile):
    assert worst("sigmoid", tile=tile) < TOLERANCE


def nothing_is_the_same(monkeypatch):
    monkeypatch.setattr(pair_losses, "_same", lambda a, b: torch.zeros(len(a), len(b), dtype=torch.bool))


def wrong_sigmoid(monkeypatch):
    monkeypatch.setattr(Tensor, "sigmoid_", lambda self: self.copy_((1.0001 * self).sigmoid()))


@pytest.mark.parametrize("mutate", [nothing_is_the_same, wrong_sigmoid])
def test_a_mutated_sigmoid_fails(mutate, monkeypatch):
    mutate(monkeypatch)
    assert worst("sigmoid") > 1e-6


@pytest.mark.parametrize("kind", LOSSES)
def test_doubles_are_counted_and_leave_the_loss(kind):
    leaves, numbers = inputs()
    same = sum(
        bool((numbers[i] == numbers[j]).any()) for i in range(len(numbers)) for j in range(len(numbers)) if i != j
    )
    loss, left_out = ours(kind, leaves, numbers)
    whole, none = ours(kind, leaves, torch.arange(48).view(24, 2))
    assert left_out == same > 0 and none == 0
    assert loss < whole


def test_every_pair_the_same_leaves_each_picture_its_own_text():
    leaves, _ = inputs(6)
    loss, left_out = ours("contrast", leaves, torch.zeros(6, 1, dtype=torch.long))
    assert left_out == 30 and loss == pytest.approx(0, abs=1e-12)
    loss, _ = ours("sigmoid", leaves, torch.zeros(6, 1, dtype=torch.long))
    assert loss.isfinite()


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_float32_under_autocast(kind):
    leaves, numbers = inputs()
    low = [leaf.float() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(kind, low, numbers)[0]
        half = ours(kind, [low[0].bfloat16(), *low[1:]], numbers)[0]
    assert loss.dtype == half.dtype == torch.float32
    assert torch.equal(loss, ours(kind, low, numbers)[0])


def test_no_tile_of_the_sigmoid_is_as_large_as_the_matrix(monkeypatch):
    """Memory grows with the batch, not with its square: no tensor that is made has as many numbers as a tile of it."""
    largest = 0
    plain = torch.addmm

    def noted(*args: Any, **more: Any) -> Tensor:
        nonlocal largest
        made = plain(*args, **more)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(torch, "addmm", noted)
    leaves, _ = inputs(200, doubles=False)
    ours("sigmoid", leaves, torch.arange(400).view(200, 2), tile=(16, 32))
    assert 0 < largest <= 16 * 32


@pytest.mark.parametrize(("kind", "name"), [("contrast", "CLIP"), ("sigmoid", "Siglip")])
def test_parity_with_transformers(kind, name):
    """The loss that its models return, of the embeddings that they return."""
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 40, "max_position_embeddings": 6, "projection_size": 16, "eos_token_id": 39}
    text, picture = {**shared, **words}, {**shared, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=picture, projection_dim=16)
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    torch.nn.init.constant_(model.logit_scale, 1.5)
    bias = torch.zeros(1).double()
    if kind == "sigmoid":
        bias = torch.nn.init.constant_(model.logit_bias, -2.0)
    images, tokens = torch.rand(5, 3, 16, 16).double(), torch.randint(0, 40, (5, 6))
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=images, return_loss=True)
    pairs = torch.stack([found.image_embeds, found.text_embeds], 1)
    loss, _ = ours(kind, [pairs, model.logit_scale.exp(), bias], torch.arange(5)[:, None])
    torch.testing.assert_close(loss, found.loss, rtol=1e-8, atol=0)


# Steps: the same on one rank or two, whole or in parts, also for what the loss itself learns

SHAPE = {"arch": "vit-ti/8", "image_size": 16, "vocabulary": 600, "length": 6, "text_width": 24, "text_depth": 1}
ALONE = Ranks(0, 1, CPU)


def small(name: str, accumulate: int = 1) -> Worded:
    page, config = recipe.configure(
        name, {**SHAPE, "text_heads": 2, "batch": 16, "accumulate": accumulate, "lr": 0.02, "steps": 9, "warmup": 0.0}
    )

    class Shallow(page.config):
        def backbone(self) -> dict[str, Any]:
            return {**super().backbone(), "depth": 1, "width": 24, "heads": 2, "hidden": 48}

    return Shallow(**config.model_dump())


def parts_of(config: Worded, step: int, rank: int, world: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(step)
    images = torch.rand(16, 3, 16, 16, generator=draw)
    tokens = torch.randint(3, 60, (16, 6), generator=draw)
    tokens[:, -1] = config.special[1]
    same = torch.arange(32).view(16, 2)
    same[::5, 1] = 99
    parts = [part.chunk(config.accumulate * world) for part in (images, tokens, same)]
    rows = [dict(zip(("images", "tokens", "same"), part, strict=True)) for part in zip(*parts, strict=True)]
    return rows[rank * config.accumulate : (rank + 1) * config.accumulate]


def trained(name: str, accumulate: int, ranks: Ranks = ALONE, **arguments: Any) -> Tensor:
    """Loss, gradient norm, and what the loss itself learns, of three steps."""
    config = small(name, accumulate)
    model = Model(recipe.find(name), config, PretrainArguments(data=("-",), recipe=name, out="-", **arguments), ranks)
    said = []
    for step in range(3):
        batches = iter(parts_of(config, step, ranks.rank, ranks.world))
        metrics = model.step(batches, (step + 1) / 8)
        live = distributed.whole(dict(model.method.words().state_dict()))
        learned = [live[key].item() for key in ("scale", "bias") if key in live]
        said.append([*ranks.mean([metrics[key].item() for key in ("loss", "gradient_norm")]), *learned])
    return torch.tensor(said, dtype=torch.float64)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_what_is_learned_of_texts_is_kept_and_read_again(name, tmp_path):
    tokenizer = Tokenizer.train(["a red one", "a blue one"], 600)
    config = fitted(small(name), tokenizer)
    method, _ = build(recipe.find(name), config, None)
    folder = tmp_path / "backbone"
    weights.save_backbone(folder, method.encoder(), {"recipe": name}, method.words().pairing(tokenizer))
    encoder = weights.load(folder)
    tokens = tokenizer.encode(["a red one"], config.length).tokens
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        pairs = F.normalize(method.words()(method.encoder().eval().pooled(images), tokens.expand(2, -1)), dim=2)
        torch.testing.assert_close(encoder.text(["a red one"]), pairs[:1, 1])
        torch.testing.assert_close(encoder.pair(images), pairs[:, 0])
    assert encoder.text.logit_scale == method.words().scale[0]
    assert name == "clip" or encoder.text.logit_bias == method.words().bias[0]
    (folder / "text" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SaccadeError, match="is damaged"):
        weights.load(folder)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def whole(request) -> tuple[str, Tensor]:
    return request.param, trained(request.param, 1)


def test_a_step_in_four_parts_is_the_step(whole):
    name, at_once = whole
    torch.testing.assert_close(trained(name, 4), at_once, rtol=1e-5, atol=0)
    start = small(name)
    first = [1 / start.temperature if name == "clip" else start.scale]
    assert abs(at_once[-1, 2].exp() - first[0]) > 1e-2, "the temperature learns"


def test_without_its_own_gradient_the_temperature_would_stand_still(whole, monkeypatch):
    name, at_once = whole
    forward = recipe.Coupled.forward
    monkeypatch.setattr(recipe.Coupled, "forward", lambda self, batch, t, gradient=None, own=None: forward(self, batch, t, gradient))  # fmt: skip # noqa: E501
    assert (trained(name, 4)[-1, 2:] - at_once[-1, 2:]).abs().max() > 1e-3


WAYS = [("ddp", 1), ("ddp", 4), ("fsdp", 1), ("fsdp", 2)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    leaves, numbers = inputs()
    for kind in LOSSES:
        live = [leaf.clone().requires_grad_() for leaf in (leaves[0].chunk(2)[rank], *leaves[1:])]
        loss, left_out = ours(kind, live, numbers.chunk(2)[rank])
        gradients = torch.autograd.grad(loss, live if kind == "sigmoid" else live[:2])
        found[kind] = [loss.detach(), left_out, *gradients]
    for name in ("clip", "siglip"):
        for sharding, parts in WAYS:
            found[name, sharding, parts] = trained(name, parts, Ranks(rank, 2, CPU), sharding=sharding)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("pairs")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", LOSSES)
def test_two_ranks_have_the_loss_of_all(ranked, kind):
    leaves, numbers = inputs()
    live = [leaf.clone().requires_grad_() for leaf in leaves]
    loss, left_out = ours(kind, live, numbers)
    pairs, *others = torch.autograd.grad(loss, live if kind == "sigmoid" else live[:2])
    sides = [found[kind] for found in ranked]
    torch.testing.assert_close((sides[0][0] + sides[1][0]) / 2, loss.detach(), rtol=TOLERANCE, atol=0)
    assert sides[0][1] + sides[1][1] == left_out
    torch.testing.assert_close(torch.cat([side[2] for side in sides]) / 2, pairs, rtol=0, atol=TOLERANCE)
    for number, other in enumerate(others, 3):
        torch.testing.assert_close((sides[0][number] + sides[1][number]) / 2, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=[f"{sharding}-{parts}" for sharding, parts in WAYS])
def test_two_ranks_learn_as_one_whole_or_in_parts(ranked, whole, way):
    name, at_once = whole
    for found in ranked:
        torch.testing.assert_close(found[(name, *way)], at_once, rtol=1e-5, atol=0)

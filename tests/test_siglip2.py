"""SigLIP 2: its decoder and losses against plain forms, its stages, its teacher, and pictures of their own aspect."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_published_naflex import PATCH, SIZES, network, said, saved  # noqa: F401
from torch import Tensor, nn
from toys import small, source

import saccade
from saccade import heads, losses, naflex, reading, recipe, vit, weights
from saccade.augment import flip, whole
from saccade.caption import Captioner
from saccade.data import Batch, collate
from saccade.distributed import Ranks
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.model import Model
from saccade.run import Run
from saccade.settings import PretrainArguments, Worded

CPU = torch.device("cpu")
T = torch.tensor(0.5)
PAGE = recipe.find("siglip2")
SMALL = {**small("siglip2"), "head_norm": False}


class Shallow(PAGE.config):
    """The recipe's settings with a tiny tower."""

    def backbone(self) -> dict[str, Any]:
        return {**super().backbone(), "depth": 2, "width": 24, "heads": 2, "hidden": 48}


def config_of(**settings: Any) -> Any:
    _, found = recipe.configure("siglip2", {**SMALL, **settings})
    tokenizer = reading.tokenizer_for(source("siglip2"), found)
    return reading.fitted(Shallow(**found.model_dump()), tokenizer), reading.Reading(tokenizer, found.length)


CONFIG, READ = config_of()


def batch_of(places: range) -> Batch:
    return collate([source("siglip2")[place] for place in places], [0] * len(places), list(places), READ)


def views_of(config: Any, places: range, step: int = 0) -> Batch:
    batch = batch_of(places)
    return PAGE.views(config, batch, Draws(0, step, batch["key"], batch["seen"], batch["place"]))


def stages_of(**settings: Any) -> dict[str, tuple[float, Any]]:
    config = CONFIG.model_copy(update=settings)
    return {stage.stage: (until, stage) for until, stage in PAGE.stages(config)}


def model_of(config: Any) -> Model:
    arguments = PretrainArguments(data=("-",), recipe="siglip2", out="-")
    return Model(PAGE, config, arguments, Ranks(0, 1, CPU))


def step(model: Model, number: int) -> dict[str, Tensor]:
    """A step over eight samples, in as many parts as the model's settings say."""
    part = 8 // model.config.accumulate
    parts = (views_of(model.config, range(first, first + part), number) for first in range(0, 8, part))
    return model.step(iter(list(parts)), 0.5)


# The decoder

WORDS = Worded(vocabulary=600, length=9, text_width=24, text_depth=4, text_heads=3, special=(1, 2, 0))


def captioner() -> tuple[Captioner, Tensor, Tensor]:
    """A decoder in float64 with every tensor redrawn, texts and patches."""
    torch.manual_seed(0)
    made = Captioner(WORDS, 24).double()
    for tensor in made.parameters():
        nn.init.normal_(tensor, std=0.3)
    tokens = torch.randint(3, 600, (4, 9))
    tokens[:, 0], tokens[0, 5], tokens[1, 8], tokens[2, 3], tokens[3, 7] = 1, 2, 2, 2, 2
    tokens[0, 6:], tokens[2, 4:], tokens[3, 8:] = 0, 0, 0
    return made, tokens, torch.randn(4, 7, 24).double()


def oracle(ours: Captioner) -> nn.TransformerDecoder:
    """torch's own decoder with the same weights."""
    layer = nn.TransformerDecoderLayer(
        24, 3, 96, 0.0, lambda x: F.gelu(x, approximate="tanh"), 1e-6, batch_first=True, norm_first=True
    )
    theirs = nn.TransformerDecoder(layer, len(ours.blocks), nn.LayerNorm(24, 1e-6)).double()
    theirs.norm.load_state_dict(ours.norm.state_dict())
    for block, one in zip(ours.blocks, theirs.layers, strict=True):
        for name, attention in (("self_attn", block.attn), ("multihead_attn", block.cross)):
            parts = (attention.q, attention.kv) if name == "multihead_attn" else (attention.qkv,)
            there = getattr(one, name)
            there.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
            there.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
            there.out_proj.load_state_dict(attention.proj.state_dict())
        for number in (1, 2, 3):
            getattr(one, f"norm{number}").load_state_dict(getattr(block, f"norm{number}").state_dict())
        one.linear1.load_state_dict(block.mlp.fc1.state_dict())
        one.linear2.load_state_dict(block.mlp.fc2.state_dict())
    return theirs


def test_the_decoder_is_half_as_deep_and_agrees_with_torch_s():
    ours, tokens, patches = captioner()
    assert len(ours.blocks) == 2
    at_once, seen = torch.tensor([True, False, True, False]), torch.ones(4, 7, dtype=torch.bool)
    seen[1, 5:] = False
    found = ours(tokens, patches, at_once, seen)
    theirs = oracle(ours)
    for row in range(4):
        before = torch.cat([torch.zeros(1, dtype=torch.long), tokens[row, :-1]])
        words = torch.full((9,), 600) if at_once[row] else before
        x = (ours.token_embed.weight[words] + ours.pos_embed[0])[None]
        mask = None if at_once[row] else torch.ones(9, 9).triu(1).bool()
        wanted = theirs(x, patches[row : row + 1], tgt_mask=mask, memory_key_padding_mask=~seen[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-8, atol=1e-8)


def test_a_text_said_at_once_is_not_seen_and_one_said_in_turn_as_far_as_it_is_said():
    ours, tokens, patches = captioner()
    other = tokens.clone()
    other[:, 4] = 77
    for at_once in (True, False):
        chosen = torch.full((4,), at_once)
        moved = (ours(tokens, patches, chosen) - ours(other, patches, chosen)).abs().amax((0, 2))
        assert not moved[:5].any(), "nobody sees the word that is asked for"
        assert bool(moved[5:].all()) != at_once
    assert (ours(tokens, patches, chosen) - ours(tokens, patches.flip(0), chosen)).abs().amin() > 0


def test_the_words_up_to_the_end_count_alike_and_every_text_too():
    ours, tokens, patches = captioner()
    at_once = torch.tensor([True, False, False, True])
    logits = ours.word(ours(tokens, patches, at_once))
    each = F.cross_entropy(logits.mT, tokens, reduction="none")
    wanted = sum(each[row, 1 : last + 1].mean() for row, last in enumerate((5, 8, 3, 7))) / 4
    torch.testing.assert_close(ours.loss(tokens, patches, at_once), wanted, rtol=1e-10, atol=0)
    ended = torch.tensor([[5, 6, 1, 1]])
    ours.begin, ours.end, ours.pad = -1, 1, 1  # as SigLIP's tokenizer: what ends is what fills up
    assert ours.counted(ended).tolist() == [[True, True, True, False]]


def _leaves() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape).double().requires_grad_() for shape in ((11, 6), (40, 6), (40,))]


@pytest.mark.parametrize("rows", [1, 4, 11, 100, None])
def test_the_loss_over_a_vocabulary_in_parts_is_the_plain_one(rows):
    target, share = torch.arange(11) * 3, torch.rand(11).double()
    sides = []
    for kind in ("ours", "plain"):
        x, weight, bias = leaves = _leaves()
        if kind == "ours":
            loss = losses.vocabulary(x, weight, bias, target, share, rows)
        else:
            loss = (F.cross_entropy(x @ weight.T + bias, target, reduction="none") * share).sum()
        sides.append([loss, *torch.autograd.grad(3 * loss, leaves)])
    for ours, plain in zip(*sides, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_under_autocast_the_loss_over_a_vocabulary_stays_float32():
    leaves = [leaf.detach().float().requires_grad_() for leaf in _leaves()]
    target, share = torch.arange(11), torch.full((11,), 1 / 11)
    wanted = torch.autograd.grad(losses.vocabulary(*leaves, target, share), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.vocabulary(*leaves, target, share, 4)
    found = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in found)
    assert max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)) < 0.03


# Self-distillation


def test_the_losses_of_crops_and_hidden_patches_are_the_plain_ones():
    config = stages_of()["distil"][1]
    method, batch = model_of(config).method, views_of(config, range(4))
    for part in method.average.parameters():
        nn.init.normal_(part, std=0.3)
    local, patch, _ = method.average(method.backbone, batch)
    assert len(batch["globals"]) == 4 and len(batch["locals"]) == 2 * 4 and (batch["hide"].sum(1) == 8).all()
    teacher, student = method.average.teacher, method.average.student
    seen = teacher["backbone"](batch["globals"])
    q = (teacher["head"](teacher["backbone"].embedding(seen)) / 0.04).softmax(-1)
    q_patch = (teacher["patch_head"](seen.patches.flatten(0, 1)) / 0.04).softmax(-1).unflatten(0, (4, 16))
    crops = batch["locals"].unflatten(0, (2, 4))
    each = [-(q * (student["head"](method.backbone.pooled(crop)) / 0.1).log_softmax(-1)).sum(-1) for crop in crops]
    torch.testing.assert_close(local, torch.stack(each).mean(), rtol=1e-5, atol=0)
    guess = method.backbone(batch["globals"], hide=batch["hide"]).patches
    guess = (student["patch_head"](guess.flatten(0, 1)) / 0.1).log_softmax(-1).unflatten(0, (4, 16))
    each = -(q_patch * guess).sum(-1)[batch["hide"]].unflatten(0, (4, 8)).mean(1)
    torch.testing.assert_close(patch, each.mean(), rtol=1e-5, atol=0)


def test_answers_are_those_of_another_view():
    student, teacher = torch.randn(3, 5, 7).double(), torch.randn(5, 7).double().softmax(-1)
    pairs = [-(teacher[b] * (student[v, b] / 0.1).log_softmax(-1)).sum() for v in range(3) for b in range(5)]
    torch.testing.assert_close(heads.seen_by_another(student, teacher, 0.1), torch.stack(pairs).mean())


@pytest.mark.parametrize(
    ("size", "given", "factor"),
    [("b", None, 0.25), ("l", None, 0.5), ("so400m", None, 1.0), ("g", None, 0.5), ("ti", None, 0.25), ("b", 2.0, 2.0)],
)
def test_all_losses_together_with_their_weights(size, given, factor):
    defaults = PAGE.config()
    config = stages_of(factor=given, arch=f"vit-{size}/16")["distil"][1]
    weights_of = (config.caption_weight, config.local_weight, config.patch_weight)
    assert weights_of == (1.0, 1.0, 0.25) and (defaults.local_crops, defaults.masked, defaults.distil) == (8, 0.5, 0.8)
    assert defaults.batch == 32768 and defaults.at_once == 0.5 and defaults.lr * 32768 / 256 == pytest.approx(1e-3)
    method = model_of(CONFIG.model_copy(update={"stage": "distil"})).method
    batch = views_of(method.config, range(8))
    method.config = config
    loss, metrics = method(batch, T)
    parts = {name: metrics[f"{name}_loss"] for name in ("cls", "caption", "local", "patch")}
    wanted = parts["cls"] + parts["caption"] + factor * (parts["local"] + 0.25 * parts["patch"])
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=0)
    assert method.chance().keys() <= metrics.keys()
    assert metrics["left_out"] > 0, "texts that occur twice are no negatives"


def test_the_teacher_begins_as_the_student_and_follows_at_one_pace():
    (_, first), (_, second), (_, third) = (stages_of()[name] for name in ("pairs", "distil", "fixed"))
    model = model_of(first)
    step(model, 0)
    later = model_of(second)
    assert not _same(later.method.average.teacher["backbone"], model.method.backbone)
    later.adopt(model)
    later.method.begin()
    average = later.method.average
    assert _same(average.teacher["backbone"], later.method.backbone)
    assert all(_same(average.teacher[name], average.student[name]) for name in ("head", "patch_head"))
    for number in (1, 2):
        before = copy.deepcopy(average.teacher)
        step(later, number)
        for name, old in before.items():
            student = later.method.backbone if name == "backbone" else average.student[name]
            for a, b, now in zip(
                old.parameters(), student.parameters(), average.teacher[name].parameters(), strict=True
            ):
                torch.testing.assert_close(now, a.lerp(b, 1 - 0.996), rtol=1e-6, atol=1e-8)
    last = model_of(third)
    last.adopt(later)
    kept = copy.deepcopy(last.method.average.teacher)
    last.method.begin()
    assert _same(kept, last.method.average.teacher), "the tail does not begin anew"
    assert not _same(kept["backbone"].blocks, last.method.backbone.blocks)


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = dict(other.named_parameters())
    return all(name not in pairs or torch.equal(tensor, pairs[name]) for name, tensor in one.named_parameters())


# Stages

CROPS = {"globals", "locals", "hide"}
ALWAYS = {"tokens", "same", "at_once"}


def test_what_each_stage_sees_and_holds():
    held = {"none": ("pairs", "distil"), "fixed": ("pairs", "distil", "fixed"), "naflex": ("pairs", "distil", "naflex")}
    sees = {
        "pairs": {"images"},
        "distil": {"images"} | CROPS,
        "fixed": {"images"} | CROPS,
        "naflex": {"patches", "grid"},
    }
    for tail, names in held.items():
        found = stages_of(tail=tail)
        assert tuple(found) == names
        for name, (_, config) in found.items():
            assert views_of(config, range(2)).keys() == ALWAYS | sees[name]
            method = model_of(config).method
            assert (method.average is None) == (name in ("pairs", "naflex"))
            assert (method.backbone.mask_token is None) == (method.average is None)
            assert config.image_size == (40 if name == "fixed" else 32)
    at = {tail: [until for until, _ in PAGE.stages(PAGE.config(tail=tail))] for tail in held}
    assert at == {"none": [0.8, 1.0], "fixed": [0.8, 0.95, 1.0], "naflex": [0.8, 0.9, 1.0]}
    assert PAGE.config(tail="naflex", stage="naflex").canvas() >= 32 * 16 > PAGE.config(arch="vit-b/8").image_size


def test_crops_are_beside_the_picture_that_captions_keep():
    pairs, distil = (views_of(stages_of()[name][1], range(4)) for name in ("pairs", "distil"))
    assert all(torch.equal(pairs[name], distil[name]) for name in pairs)


@pytest.mark.parametrize("size", [40, 24])
def test_larger_squares_begin_with_the_positions_resized(size):
    before, after = (model_of(stages_of(tail_size=size)[name][1]) for name in ("distil", "fixed"))
    after.adopt(before)
    for old, new in (
        (before.method.backbone, after.method.backbone),
        (before.method.average.teacher["backbone"], after.method.average.teacher["backbone"]),
    ):
        table = old.pos_embed.unflatten(1, (4, 4)).movedim(-1, 1)
        wanted = F.interpolate(table, size=(size // 8,) * 2, mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(new.pos_embed, wanted.flatten(2).mT)
        images = torch.rand(2, 3, size, size)
        torch.testing.assert_close(new(images).patches, old(images).patches)


def test_a_run_comes_out_at_the_size_of_its_tail(tmp_path: Path):
    run = saccade.pretrain(source("siglip2"), recipe="siglip2", out=tmp_path, workers=0, log_every=1, **SMALL)
    encoder = saccade.load(tmp_path)
    assert encoder.grid == (5, 5) and encoder.text is not None
    assert encoder.logits(torch.rand(2, 3, 40, 40), ["red green"]).shape == (2, 1)
    logged = [set(entry) for entry in run.metrics()]
    assert ["local_loss" in entry for entry in logged] == [False, False, True, True, True, True]
    assert all({"caption_loss", "cls_loss", "left_out"} <= entry for entry in logged)


@pytest.mark.parametrize("stage", ["pairs", "distil", "naflex"])
def test_a_step_in_parts_is_the_step(stage):
    config = stages_of(tail="naflex", lengths=(9, 16))[stage][1]
    said_of, first = {}, {}
    for parts in (1, 4):
        model = model_of(config.model_copy(update={"accumulate": parts, "lr": 0.002}))
        said_of[parts] = [step(model, 0)]
        first[parts] = {name: moment.clone() for name, moment in model.optimizer.state().items() if "exp_avg" in name}
        said_of[parts] += [step(model, number) for number in (1, 2)]
    for name, moment in first[1].items():
        torch.testing.assert_close(first[4][name], moment, rtol=1e-3, atol=1e-4 * moment.abs().max().item(), msg=name)
    for whole_step, in_parts in zip(*said_of.values(), strict=True):
        assert whole_step.keys() == in_parts.keys()
        for name in ("loss", "gradient_norm", "caption_loss", "cls_loss", "left_out"):
            torch.testing.assert_close(in_parts[name], whole_step[name], rtol=2e-5, atol=0, msg=name)


def test_without_what_is_learned_alone_a_step_in_parts_is_another(monkeypatch):
    model = model_of(CONFIG.model_copy(update={"accumulate": 4}))
    before = copy.deepcopy(model.method.captioner)
    forward = recipe.Coupled.forward

    def coupled_alone(self, *args: Any) -> Any:
        loss, metrics = forward(self, *args)
        return loss, {name: value for name, value in metrics.items() if name != "alone"}

    monkeypatch.setattr(recipe.Coupled, "forward", coupled_alone)
    step(model, 0)
    assert _same(model.method.captioner, before)


# Pictures of their own aspect


def tower() -> vit.ViT:
    torch.manual_seed(0)
    shape = {"depth": 2, "width": 24, "heads": 2, "hidden": 48, "patch": 8, "image_size": 32}
    switches = {"cls": False, "pooling": "map", "position_linear": True, "position_antialias": True}
    made = vit.ViT(vit.ViTConfig(**shape, **switches)).eval()
    nn.init.normal_(made.pos_embed)
    return made


def packed(pictures: list[Tensor], length: int, filling: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pictures [C H W] of whole patches as rows of one length, and their grids."""
    cells = [vit.patchify(picture[None], PATCH) for picture in pictures]
    grids = torch.tensor([tuple(one.shape[1:3]) for one in cells])
    rows = [F.pad(one.flatten(3).flatten(1, 2)[0], (0, 0, 0, length - grid.prod()), value=filling)
            for one, grid in zip(cells, grids, strict=True)]  # fmt: skip
    return torch.stack(rows), grids


@torch.no_grad()
def test_one_forward_over_mixed_aspects_is_each_alone():
    ours, pictures = tower(), [torch.rand(3, *size) for size in SIZES]
    for filling in (0.0, 100.0):
        patches, grids = packed(pictures, 70, filling)
        tokens, seen = naflex.forward(ours, patches, grids)
        pooled = naflex.embedding(ours, tokens, seen)
        assert seen.sum(1).tolist() == grids.prod(1).tolist()
        for row, picture in enumerate(pictures):
            alone = ours(picture[None])
            torch.testing.assert_close(tokens[row, seen[row]], alone.patches[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pooled[row], ours.embedding(alone)[0], rtol=1e-5, atol=1e-5)
    look = naflex.look(ours, {"patches": patches, "grid": grids})
    assert torch.equal(look[1], pooled) and naflex.look(ours, {"images": pictures[0][None]})[2] is None


@torch.no_grad()
def test_mixed_aspects_in_one_batch_are_transformers_own(saved: Path, network: Any):  # noqa: F811
    backbone, pictures = weights.load(saved).backbone, [torch.rand(3, *size) for size in SIZES]
    tokens, seen = naflex.forward(backbone, *packed(pictures, 80))
    pooled = naflex.embedding(backbone, tokens, seen)
    for row, theirs in enumerate(said(network, pictures)):
        torch.testing.assert_close(tokens[row, seen[row]], theirs["patches"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[row], theirs["pooled"][0], rtol=1e-4, atol=1e-5)


def test_pictures_are_rendered_near_their_aspect():
    pixels = torch.randint(0, 256, (2, 1, 3, 40, 90), dtype=torch.uint8)
    rows = whole(torch.tensor([[40, 90], [33, 17]]))
    patches, grids = naflex.render(pixels, rows, 8, 20)
    for row, (height, width) in enumerate([(40, 90), (33, 17)]):
        size = naflex.natural_size(height, width, 8, 20)
        assert [8 * n for n in grids[row].tolist()] == size and grids[row].prod() <= 20
        resized = F.interpolate(
            pixels[row, :, :, :height, :width].float() / 255, size=size, mode="bilinear", antialias=True
        )
        wanted, _ = packed([resized[0]], 20)
        torch.testing.assert_close(patches[row], wanted[0])
    turned = replace(flip(rows, Draws(0, 0, *[torch.arange(2)] * 3).sample("flip"), 1.0))
    mirrored, _ = naflex.render(pixels.flip(-1)[..., :90], turned, 8, 20)
    torch.testing.assert_close(mirrored[0], patches[0])
    with pytest.raises(SaccadeError, match="clips"):
        naflex.render(pixels.repeat(1, 2, 1, 1, 1), rows, 8, 20)


def test_a_tower_with_other_tokens_is_refused():
    with pytest.raises(SaccadeError, match="a ViT of patches alone"):
        naflex.forward(
            vit.ViT(vit.ViTConfig(width=24, heads=2, depth=1, hidden=48)),
            torch.zeros(1, 4, 768),
            torch.ones(1, 2).long(),
        )


def test_the_tail_s_lengths_are_those_stated_and_the_same_for_all_ranks():
    assert PAGE.config().lengths == (128, 256, 576, 784, 1024)
    config = stages_of(tail="naflex", lengths=(4, 9, 12))["naflex"][1]
    drawn = []
    for number in range(24):
        sides = [views_of(config, places, number)["patches"].shape[1] for places in (range(2), range(2, 4))]
        assert sides[0] == sides[1]
        drawn.append(sides[0])
    assert {drawn.count(length) > 2 for length in (4, 9, 12)} == {True} and len(set(drawn)) == 3


def test_a_run_with_a_naflex_tail(tmp_path: Path):
    settings = {**SMALL, "tail": "naflex", "naflex": 0.65, "lengths": (9, 16)}
    saccade.pretrain(source("siglip2"), recipe="siglip2", out=tmp_path, workers=0, log_every=1, **settings)
    assert ["local_loss" in entry for entry in Run.open(tmp_path).metrics()] == [False] * 2 + [True] * 2 + [False] * 2
    encoder = saccade.load(tmp_path)
    assert encoder.grid == (4, 4) and encoder.backbone.mask_token is None
    assert encoder(torch.rand(1, 3, 16, 48)).grid == (2, 6)

"""The ViT: any switch, any size, any part of the patches, and only the work that is read."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from saccade import depth, vit
from saccade.errors import SaccadeError
from saccade.linear import _MATRIX, Linear, linear, packing

POSITIONS = ["learned", "sincos", "sincos_y_first", "rope", "none"]
FAMILIES = {
    "mae": {"position": "sincos", "init": "xavier"},
    "dinov2": {"registers": 4, "layer_scale": 0.5, "mask_token": True},
    "dinov3": {"registers": 4, "layer_scale": 0.5, "position": "rope", "eps": 1e-5, "qkv_bias": "k_masked"},
    "swiglu": {"activation": "swiglu", "qkv_bias": "none", "position": "rope"},
    "siglip": {"cls": False, "pooling": "map", "activation": "gelu_tanh"},
    "clip": {"activation": "gelu_quick", "pre_norm": True, "patch_bias": False, "eps": 1e-5},
    "ijepa": {"cls": False, "pooling": "mean", "position": "sincos"},
    "registers without a class token": {"cls": False, "registers": 2, "pooling": "mean", "cls_position": False},
    "class token without a position": {"cls_position": False},
    "clips": {"patch_time": 2, "frames": 4, "position": "rope"},
}


def small(**switches) -> vit.ViT:
    """A little ViT in float64 in which no tensor is constant."""
    torch.manual_seed(0)
    geometry = {"width": 24, "depth": 3, "heads": 2, "hidden": 40, "patch": 4, "image_size": 16}
    model = vit.ViT(vit.ViTConfig(**(geometry | switches)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.double().reset_buffers()
    return model


def pictures(model: vit.ViT, height: int = 16, width: int = 24) -> torch.Tensor:
    torch.manual_seed(1)
    frames = () if model.config.patch_time is None else (6,)
    return torch.rand(2, *frames, model.config.channels, height, width, dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_of_features(family):
    model = small(**FAMILIES[family])
    images = pictures(model)
    features = model(images)
    count = math.prod(features.grid)
    assert features.grid[-2:] == (4, 6) and features.patches.shape == (2, count, 24)
    assert (features.cls is None) == (not model.config.cls) and features.registers.shape == (
        2,
        model.config.registers,
        24,
    )
    assert features.positions.shape == (2, count, len(features.grid))
    assert features.positions[0, -1].tolist() == [n - 1 for n in features.grid]
    assert model.embedding(features).shape == (2, 24)
    model.embedding(features).square().sum().backward()
    unread = {name for name, p in model.named_parameters() if p.grad is None}
    assert unread == ({"mask_token"} if model.config.mask_token else set())
    assert vit.ViTConfig.model_validate_json(model.config.model_dump_json()) == model.config


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_the_last_block_are_those_of_the_whole(family):
    model = small(**FAMILIES[family])
    images = pictures(model)
    whole = model(images)
    patches = model(images, tokens="patches")
    assert close(patches.patches, whole.patches) and patches.cls is None
    if not model.config.cls:
        with pytest.raises(ValueError, match="no class token"):
            model(images, tokens="cls")
        return
    cls = model(images, tokens="cls")
    assert close(cls.cls, whole.cls) and cls.patches.shape[1] == 0
    rows = torch.tensor([[3, 0, 7], [5, 5, 1]])
    some = model(images, tokens=rows)
    assert close(some.cls, whole.cls) and close(some.patches, vit.take(whole.patches, rows))
    assert torch.equal(some.positions, vit.take(whole.positions, rows))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_permuted_keep_permutes_the_features(position):
    model = small(position=position, registers=2, pre_norm=True)
    images = pictures(model)
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    whole, kept = model(images), model(images, keep=order)
    assert close(kept.cls, whole.cls) and close(kept.patches, vit.take(whole.patches, order))
    assert torch.equal(kept.positions, vit.take(whole.positions, order))


def test_patches_outside_keep_are_never_looked_at():
    model = small(position="rope")
    images, keep = pictures(model), torch.tensor([[0, 7], [23, 7]])
    pixels = images.clone()
    patches = vit.patchify(pixels, 4)
    seen = torch.zeros(2, 24, dtype=torch.bool).scatter(1, keep, True).unflatten(1, (4, 6))
    patches[~seen] = float("nan")
    assert close(model(pixels, keep=keep).patches, model(images, keep=keep).patches)
    embedded = []
    model.patch_embed.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0].shape[1]))
    model(images, keep=keep)
    assert embedded == [2]


def test_hidden_patches_become_the_mask_token_and_keep_their_place():
    model = small(mask_token=True)
    images = pictures(model, 16, 16)
    hide = torch.zeros(2, 16, dtype=torch.bool)
    hide[0, 3] = hide[1, 0] = True
    other = images.clone()
    vit.patchify(other, 4)[hide.unflatten(1, (4, 4))] = 0.5
    assert close(model(images, hide=hide).patches, model(other, hide=hide).patches)
    assert not close(model(images).patches, model(other).patches)
    keep = torch.tensor([[3, 1], [2, 0]])
    assert close(model(images, keep=keep, hide=hide).patches, model(other, keep=keep, hide=hide).patches)
    with pytest.raises(ValueError, match="mask_token=True"):
        small()(images, hide=hide)


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_matter_and_none_does_not(position):
    model = small(position=position)
    images = pictures(model, 16, 16)
    shifted = images.roll(4, 3)
    same = close(model(images).patches.unflatten(1, (4, 4)).roll(1, 2).flatten(1, 2), model(shifted).patches)
    assert same == (position == "none")


def test_sincos_against_its_formula():
    table = vit.sincos((3, 5), 16)
    omega = [10000 ** (-i / 4) for i in range(4)]
    for row in range(3):
        for column in range(5):
            x = [f(column * o) for f in (math.sin, math.cos) for o in omega]
            y = [f(row * o) for f in (math.sin, math.cos) for o in omega]
            assert torch.allclose(table[row * 5 + column], torch.tensor(x + y, dtype=torch.float64))
            assert torch.allclose(vit.sincos((3, 5), 16, x_first=False)[row * 5 + column], torch.tensor(y + x).double())
    assert vit.sincos((2, 3, 3), 20).shape == (18, 20)


def test_rope_against_its_formula():
    """Every pair (k, k + half a head) turns by 2 pi coordinate / period; the class token does not turn."""
    rotation = vit.Rotation(8, 2).double()
    rotation.reset_buffers()
    x = torch.rand(1, 1, 1 + 2 * 3, 8, dtype=torch.float64)
    turned = vit.rotate(x, rotation((2, 3), 1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    for row in range(2):
        for column in range(3):
            y, c = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
            angles = [2 * math.pi * at / 100 ** (k / 2) for at in (y, c) for k in range(2)]
            before, after = x[0, 0, 1 + row * 3 + column], turned[0, 0, 1 + row * 3 + column]
            for k, angle in enumerate(angles):
                pair = complex(before[k], before[k + 4]) * complex(math.cos(angle), math.sin(angle))
                assert abs(pair - complex(after[k], after[k + 4])) < 1e-12


def test_the_three_kinds_of_gelu():
    """At 1: by the normal distribution, by its tanh approximation, by a logistic curve."""
    values = {"gelu": 0.8413447, "gelu_tanh": 0.8411920, "gelu_quick": 0.8457958}
    for kind, value in values.items():
        mlp = vit.MLP(1, 1, kind)
        for layer in (mlp.fc1, mlp.fc2):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        assert abs(mlp(torch.ones(1, 1)).item() - value) < 1e-6


def test_keys_have_no_bias_where_it_is_masked():
    model = small(position="rope", qkv_bias="k_masked")
    images = pictures(model)
    before = model(images).patches
    model.blocks[0].attn.qkv.bias.data[24:48] += 1
    assert close(model(images).patches, before)
    model.blocks[0].attn.qkv.bias.data[:24] += 1
    assert not close(model(images).patches, before)


def test_pictures_may_be_bytes_and_normalisation_is_inside():
    model = small(channels=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5, 0.4, 0.3, 0.2, 0.1))
    pixels = torch.randint(0, 256, (2, 16, 16, 5), dtype=torch.uint8).permute(0, 3, 1, 2)
    images = pixels.double() / 255
    assert close(model(pixels).patches, model(images).patches)
    plain = small(channels=5, mean=(0.0,) * 5, std=(1.0,) * 5)
    mean, std = torch.tensor(model.config.mean), torch.tensor(model.config.std)
    assert torch.allclose(
        plain((images - mean[:, None, None]) / std[:, None, None]).patches, model(images).patches, 1e-5
    )


def test_the_learned_table_is_resized_and_untouched_at_its_own_size():
    model = small()
    with torch.no_grad():  # a table that is linear in the place stays so
        model.pos_embed[0, 1:] = torch.arange(16).remainder(4)[:, None].double()
    table = model.position_table((4, 4))
    assert torch.equal(table, model.pos_embed[:, 1:])
    wide = model.position_table((4, 8)).unflatten(1, (4, 8))[0, :, :, 0]
    assert wide.shape == (4, 8) and torch.allclose(wide, wide[:1].expand(4, -1)) and wide[0].diff().min() > -0.1


def test_intermediate_blocks_end_with_the_last():
    model = small(registers=1)
    images = pictures(model)
    first, last = model.intermediate(images, [0, -1])
    assert close(last.patches, model(images).patches) and close(last.cls, model(images).cls)
    assert not close(first.patches, last.patches)


@pytest.mark.parametrize("shape", [(2, 5), (7,), (2, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_is_the_library_s_with_its_gradients(shape, biased):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, 24), torch.randn(40, 24), torch.randn(40) if biased else None]
    results = []
    for layer, kind in ((linear, torch.float32), (torch.nn.functional.linear, torch.float64)):
        leaves = [None if x is None else x.clone().to(kind).detach().requires_grad_() for x in inputs]
        out = layer(*leaves)
        (out * torch.arange(40).sin()).sum().backward()
        results.append([out, *(x.grad for x in leaves if x is not None)])
    for own, exact in zip(*results, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", vit.SIZES)
def test_every_size_builds_on_the_meta_device(name):
    millions = {"ti": 5.5, "s": 21.6, "s+": 28.7, "b": 85.6, "l": 303.1, "so400m": 411.2, "h": 630.4, "h+": 840.5}
    millions |= {"xs": 1.285, "g": 1134.9, "7b": 6715.4}
    with torch.device("meta"):
        model = vit.build(f"vit-{name}/16", image_size=224, position="sincos", layer_scale=1e-5)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert all(p.is_meta for p in model.parameters()) and abs(count / millions[name] - 1) < 0.005, count


def test_a_model_from_the_meta_device_can_be_filled():
    with torch.device("meta"):
        model = vit.build("vit-ti/4", image_size=16, position="sincos")
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    torch.manual_seed(0)
    other = vit.build("vit-ti/4", image_size=16, position="sincos")
    other.reset_parameters()
    assert torch.equal(model.pos_embed, other.pos_embed) and torch.equal(model.mean, other.mean)
    assert model(torch.rand(1, 3, 16, 16)).cls.isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: vit.build("vit-ti/4", image_size=50), "50 is not divisible by patch 4.*use 48 or 52"),
        (lambda: vit.build("vit-tiny/4", image_size=48), "no architecture.*did you mean 'vit-ti/4'"),
        (lambda: vit.build("resnet50", image_size=48), "no architecture.*vit-SIZE/PATCH"),
        (lambda: vit.build("vit-ti/4", image_size=48, register=4), "no switch.*did you mean 'registers'"),
        (lambda: vit.build("vit-ti/4", image_size=48, cls=False), "cls pooling needs a class token"),
        (lambda: vit.build("vit-ti/4", image_size=48)(torch.rand(1, 3, 48, 50)), "50 is not divisible by patch 4"),
        (lambda: vit.build("vit-ti/4", image_size=48)(torch.rand(1, 1, 48, 48)), "reads 3 channels, not 1"),
    ],
)
def test_mistakes_name_the_way_out(call, says):
    with pytest.raises(SaccadeError) as caught:
        call()
    assert re.search(says, str(caught.value)), str(caught.value)


COMPILED = """
import torch
from saccade import vit
from saccade.linear import linear

images, keep = torch.rand(2, 3, 16, 16), torch.stack([torch.randperm(16)[:4] for _ in range(2)])
for switches in ({"position": "sincos"}, {"position": "rope", "registers": 4, "qkv_bias": "k_masked"}):
    model = vit.build("vit-ti/4", image_size=16, depth=2, **switches)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, keep=keep).patches, model(images, keep=keep).patches)
    torch.testing.assert_close(compiled(images, tokens="cls").cls, model(images).cls)
    assert "mkldnn" not in str(torch.export.export(model, (images,)).graph)
"""


@pytest.mark.slow  # a process of its own: the hook that checks shapes in tests cannot be compiled
def test_one_graph_without_breaks_and_an_export_of_plain_operations():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "gelu_quick", "swiglu"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_packed_weights_say_the_same_and_are_dropped(activation: str, position: str) -> None:
    switches = {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "activation": activation, "position": position}
    model = vit.build("vit-ti/4", image_size=16, **switches)
    images = torch.rand(3, 3, 16, 16)
    expected = model(images)  # with gradients: nothing is packed, nothing fused
    with torch.inference_mode(), packing(model):
        found = model(images)
        only = model(images, tokens="cls")
        if _MATRIX is not None:
            assert all(block.attn.qkv.packed is not None for block in model.blocks)
    for one, other in ((found.cls, expected.cls), (found.patches, expected.patches), (only.cls, expected.cls)):
        torch.testing.assert_close(one, other.detach(), atol=1e-6, rtol=1e-6)
    assert not any(part.packed is not None for part in model.modules() if isinstance(part, Linear))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert not torch.allclose(model(images).cls, found.cls)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("asked", ["all", "cls", "some"])
def test_depth_is_computed_where_it_is_kept(
    asked: str, position: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the plain formula, sample by sample; a branch that nobody keeps has gradients of 0."""
    torch.manual_seed(0)
    switches = {"position": position, "layer_scale": 0.5, "registers": 2}
    network = vit.build("vit-ti/4", image_size=16, depth=3, width=24, heads=2, hidden=32, **switches).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, keep = torch.rand(5, 3, 16, 16, dtype=torch.float64), torch.rand(5, 16).argsort(1)[:, :9]
    tokens = torch.rand(5, 9).argsort(1)[:, :4] if asked == "some" else asked
    drop = depth.stochastic_depth(torch.arange(5) * 7919 + 3, [0.5] * 6)
    assert drop is not None and 0 < (drop == 0).sum() < drop.numel()
    drop[:, 2] = 0.0
    rows = []
    hook = network.blocks[2].mlp.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    seen = network(images, keep, tokens=tokens, drop=drop)
    hook.remove()
    assert rows == [5 if compiling else int((drop[:, 5] != 0).sum())]

    def alone(number: int) -> torch.Tensor:
        x, rope, *_ = network._enter(images[number : number + 1], keep[number : number + 1], None)
        for block, (first, second) in zip(network.blocks, drop[number].unflatten(0, (3, 2)), strict=True):
            x = x + first * block.ls1(block.attn(block.norm1(x), rope))
            x = x + second * block.ls2(block.mlp(block.norm2(x)))
        return network.norm(x)[0]

    plain = torch.stack([alone(number) for number in range(5)])
    torch.testing.assert_close(seen.cls, plain[:, 0])
    if asked != "cls":
        patches = plain[:, 3:]
        torch.testing.assert_close(seen.patches, patches if asked == "all" else vit.take(patches, tokens))
    loss = seen.cls.square().sum() + seen.patches.square().sum()
    expected = plain[:, 0].square().sum()
    expected = expected + (vit.take(plain[:, 3:], tokens) if asked == "some" else plain[:, 3:]).square().sum() * (
        asked != "cls"
    )
    named = dict(network.named_parameters())
    ours = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    theirs = torch.autograd.grad(expected, list(named.values()))
    for name, one, other in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert not ours[list(named).index("blocks.1.attn.proj.weight")].any()

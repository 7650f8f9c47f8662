"""Numbers of the reference DINO for tests/test_dino_parity.py: a loss and its gradients, then eight steps of training.

    python tests/parity/make_dino.py CHECKOUT tests/parity/dino.safetensors

CHECKOUT is a clone of github.com/facebookresearch/dino (Apache-2.0; nothing of it is kept here). An environment of its
own needs torch, numpy, pillow and safetensors. Its own `train_one_epoch` runs, in float64 on a CPU, an epoch being one
step; inputs and weights come from Python's `random`, random depth from SplitMix64 (see `uniform`).
"""

from __future__ import annotations

import functools
import math
import random
import sys
import tempfile
import types

import torch
from torch import Tensor, nn

GEOMETRY = {"image_size": 16, "patch": 4, "width": 8, "depth": 3, "heads": 2, "hidden": 32}
HEAD = {"prototypes": 12, "hidden": 12}
BOTTLENECK = 256  # the reference's default is ours
SAMPLES, LOCALS, LOCAL_SIZE, STEPS = 3, 3, 8, 8
MEAN, STD = (0.5, 0.375, 0.25), (0.25, 0.5, 0.125)  # exact in binary, as the temperatures are
LR, MIN_LR, DECAY, LAST_DECAY, CLIP, MOMENTUM, DROP = 0.02, 0.004, 0.04, 0.4, 0.03125, 0.996, 0.5
FIRST_TEMPERATURE, TEMPERATURE, WARM = 0.0625, 0.125, 3
"""The teacher's temperature rises over the first WARM steps: 0.0625, 0.09375, 0.125, and stays."""
LEFT_OUT = ("backbone.norm.bias", "head.mlp.0.bias", "head.mlp.3.bias", "head.last_layer.weight_v")
"""With batch norm: biases that it takes away, whose gradient is rounding, and what is large and checked without it."""


def redraw(name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Numbers that follow from the name alone, no two of them alike."""
    draw = random.Random(name)
    return torch.tensor([draw.uniform(low, high) for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape)


def redraw_parameters(network: nn.Module, who: str) -> None:
    """Every tensor but the held gain non-constant: norms and biases too. `who` is student or teacher."""
    for name, parameter in network.named_parameters():
        name = name.replace("weight_v", "weight")
        if not name.endswith("weight_g"):
            low, high = (0.5, 1.5) if "norm" in name and name.endswith("weight") else (-0.4, 0.4)
            parameter.data = redraw(f"{who} {name}", tuple(parameter.shape), low, high)


def centre() -> Tensor:
    """Where the centre starts."""
    return redraw("centre", (HEAD["prototypes"],), -0.1, 0.1)


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Large crops [2B C S S], small crops, view-major, in [0, 1]; and a random word for each of them."""
    side = GEOMETRY["image_size"]
    large = redraw(f"large {step}", (2 * SAMPLES, 3, side, side), 0, 1)
    small = redraw(f"small {step}", (LOCALS * SAMPLES, 3, LOCAL_SIZE, LOCAL_SIZE), 0, 1)
    draw = random.Random(f"words {step}")
    words = [draw.getrandbits(64) - (1 << 63) for _ in range((2 + LOCALS) * SAMPLES)]
    return large, small, torch.tensor(words)


def uniform(word: int, number: int) -> float:
    """The n-th number in [0, 1) of a random word: 24 bits of SplitMix64."""
    mask = (1 << 64) - 1
    value = (word + (number + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return ((value ^ (value >> 31)) >> 40) * 2.0**-24


class Depth:
    """In the place of torch.rand: which residual branches are dropped, asked for block by block and size by size.

    The first block is never dropped and does not ask, so a call's branch is 2 and up.
    """

    def __init__(self, words: list[int]):
        branches = range(2, 2 * GEOMETRY["depth"])
        sizes = (words[: 2 * SAMPLES], words[2 * SAMPLES :])
        self.calls = [[uniform(word, branch) for word in size] for size in sizes for branch in branches]

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(self.calls.pop(0), dtype=dtype).reshape(shape)


class Wrapped(nn.Module):
    """What the reference expects of a student: its `.module`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, crops: list[Tensor]) -> Tensor:
        return self.module(crops)


def prepare(checkout: str) -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """The reference's pages, on a machine without GPU and torchvision."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules["torchvision"], name.rpartition(".")[2], sys.modules[name])
    sys.path.insert(0, checkout)
    torch.Tensor.cuda = lambda self, **_: self
    torch.cuda.synchronize = lambda: None
    torch.hub.list = lambda _: []
    import main_dino
    import utils
    import vision_transformer

    utils.MetricLogger.synchronize_between_processes = lambda self: None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    return main_dino, utils, vision_transformer


def network(utils: types.ModuleType, page: types.ModuleType, who: str, norm: bool = False) -> nn.Module:
    """A backbone and a head, redrawn."""
    backbone = page.VisionTransformer(
        img_size=[GEOMETRY["image_size"]], patch_size=GEOMETRY["patch"], embed_dim=GEOMETRY["width"],
        depth=GEOMETRY["depth"], num_heads=GEOMETRY["heads"], mlp_ratio=4, qkv_bias=True,
        drop_path_rate=DROP if who == "student" else 0.0, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    sizes = {"hidden_dim": HEAD["hidden"], "bottleneck_dim": BOTTLENECK}
    head = page.DINOHead(GEOMETRY["width"], HEAD["prototypes"], use_bn=norm, **sizes)
    whole = utils.MultiCropWrapper(backbone, head).double()
    redraw_parameters(whole, who)
    return whole.requires_grad_(who == "student") if who == "teacher" else whole


def crops(step: int) -> list[Tensor]:
    """The reference's list: one normalised tensor a view."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    large, small, _ = inputs(step)
    return [(view - mean) / std for part in (large, small) for view in part.split(SAMPLES)]


def main(checkout: str, path: str) -> None:
    from safetensors.torch import save_file

    main_dino, utils, page = prepare(checkout)
    loss = main_dino.DINOLoss(HEAD["prototypes"], 2 + LOCALS, FIRST_TEMPERATURE, TEMPERATURE, WARM, STEPS).double()
    loss.center = centre()[None]
    rand, numbers = torch.rand, {}

    for kind in ("normed", "plain"):  # the second goes on
        student, teacher = (network(utils, page, who, kind == "normed") for who in ("student", "teacher"))
        torch.rand = Depth(inputs(0)[2].tolist())
        loss.center = centre()[None]
        value = loss(student(crops(0)), teacher(crops(0)[:2]), 0)
        value.backward()
        numbers[f"{kind}/loss"] = value.detach()
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and not (kind == "normed" and name in LEFT_OUT):
                numbers[f"{kind}/" + name.replace("weight_v", "weight")] = parameter.grad.clone()
    student.zero_grad()
    loss.center = centre()[None]

    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    schedules = [utils.cosine_scheduler(first, last, STEPS, 1) for first, last in
                 ((LR, MIN_LR), (DECAY, LAST_DECAY), (MOMENTUM, 1))]  # fmt: skip
    settings = types.SimpleNamespace(epochs=STEPS, clip_grad=CLIP, freeze_last_layer=1)
    told = []
    for step in range(STEPS):
        torch.rand = Depth(inputs(step)[2].tolist())
        batch = [(crops(step), None)]
        said = main_dino.train_one_epoch(
            Wrapped(student), teacher, teacher, loss, batch, optimizer, *schedules, step, None, settings
        )
        told.append(said["loss"])
        assert not torch.rand.calls, "every branch was asked for"
    torch.rand = rand
    numbers["losses"] = torch.tensor(told, dtype=torch.float64)
    numbers["centre"] = loss.center[0]
    for who, whole in (("student", student), ("teacher", teacher)):
        for name, parameter in whole.named_parameters():
            if not name.endswith("weight_g"):
                numbers[f"{who}/" + name.replace("weight_v", "weight")] = parameter.detach()
    save_file({name: number.contiguous() for name, number in numbers.items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

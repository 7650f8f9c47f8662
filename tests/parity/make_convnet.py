"""Numbers of reference convnets for tests/test_convnet.py: features, gradients and batch statistics, in float64.

    python tests/parity/make_convnet.py tests/parity/convnet.safetensors

An environment of its own needs torch, torchvision, timm and safetensors (made with torchvision 0.28.0, timm 1.0.31).
Every tensor is redrawn, none constant; of each gradient its length and its product with a probe are kept.
"""

from __future__ import annotations

import math
import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = (40, 72)
SAMPLES = 3
MEAN, STD = (0.5, 0.375, 0.25), (0.25, 0.5, 0.125)  # exact in binary
CASES = ("resnet-18/32", "resnet-50/32", "resnet-18/8", "resnet-18/16", "convnext-t/32")


def redraw(name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Numbers that follow from the name alone, no two of them alike: a Weyl sequence, the same bits everywhere."""
    step = random.Random(name).uniform(0.1, 0.9)
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) * step % 1
    return (low + (high - low) * places).reshape(shape)


def redraw_all(network: nn.Module) -> None:
    """Every weight, and the running statistics, non-constant; branches as strong as what they are added to."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        gain = name.endswith(("gamma", "running_var")) or (tensor.ndim == 1 and name.endswith("weight"))
        bound = 0.4 if tensor.ndim == 1 else math.sqrt(3 / tensor[0].numel())
        tensor.data = redraw(name, tuple(tensor.shape), *((0.5, 1.5) if gain else (-bound, bound)))


def inputs() -> Tensor:
    """Pictures in [0, 1]."""
    return redraw("images", (SAMPLES, 3, *SIZE), 0, 1)


def summary(name: str, tensor: Tensor) -> Tensor:
    """Length of a tensor, and its product with a probe of length 1."""
    probe = redraw(f"probe of {name}", tuple(tensor.shape), -1, 1)
    return torch.stack([tensor.norm(), (tensor * probe).sum() / probe.norm()])


def numbers(network: nn.Module, patches: Tensor) -> dict[str, Tensor]:
    """All that is compared, once the patches [B N D] are known."""
    (patches * redraw("loss", tuple(patches.shape), -1, 1)).sum().backward()
    found = {"patches": patches.detach().flatten()[::101].clone()}
    found |= {f"gradient {name}": summary(name, p.grad) for name, p in network.named_parameters()}
    running = {name: b for name, b in network.named_buffers() if "running" in name}
    return found | {name: summary(name, buffer) for name, buffer in running.items()}


def reference(case: str) -> tuple[nn.Module, dict[str, str]]:
    """The reference network, and its names that are not ours."""
    import timm
    import torchvision

    if case.startswith("convnext"):
        return timm.create_model("convnext_tiny", num_classes=0), {
            "stem.": "downsample_layers.0.", "conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2",
            "head.norm": "norm", ".blocks.": ".",
            **{f"stages.{stage}.downsample": f"downsample_layers.{stage}" for stage in (1, 2, 3)},
        }  # fmt: skip
    network = {"18": torchvision.models.resnet18, "50": torchvision.models.resnet50}[case[7:9]]()
    network.fc = nn.Identity()
    if not case.endswith("/32"):
        network.conv1 = nn.Conv2d(3, 64, 3, 1 if case.endswith("/8") else 2, 1, bias=False)
        network.maxpool = nn.Identity()
    return network, {}


class Renamed(nn.Module):
    """A network whose tensors have our names."""

    def __init__(self, network: nn.Module, names: dict[str, str]):
        super().__init__()
        self.network, self.names = network, names

    def ours(self, name: str) -> str:
        for theirs, ours in self.names.items():
            name = name.replace(theirs, ours)
        return name

    def state_dict(self, **settings) -> dict[str, Tensor]:
        return {self.ours(name): x for name, x in self.network.state_dict(**settings).items()}

    def named_parameters(self):
        return [(self.ours(name), x) for name, x in self.network.named_parameters()]

    def named_buffers(self):
        return [(self.ours(name), x) for name, x in self.network.named_buffers()]


def forward(network: nn.Module, images: Tensor) -> Tensor:
    """The cells of the last map: of a ConvNeXt through the norm that it has for the pooled ones."""
    if "stem" in dict(network.named_children()):
        cells = network.forward_features(images).permute(0, 2, 3, 1)
        norm = network.head.norm
        return F.layer_norm(cells, cells.shape[-1:], norm.weight, norm.bias, norm.eps).flatten(1, 2)
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
    return x.flatten(2).transpose(1, 2)


def main(path: str) -> None:
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    for case in CASES:
        for mode in ("eval",) if case.startswith("convnext") else ("train", "eval")[: 1 + case.endswith("/32")]:
            network, names = reference(case)
            network = Renamed(network.double().train(mode == "train"), names)
            redraw_all(network)
            images = (inputs() - mean) / std
            found = numbers(network, forward(network.network, images))
            kept |= {f"{case} {mode}/{name}": value.contiguous() for name, value in found.items()}
    save_file(kept, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

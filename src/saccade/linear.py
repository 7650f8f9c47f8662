"""The linear layer and attention, by the faster of two libraries where a CPU has both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _onednn_matrix() -> Any:
    """oneDNN's x @ weight.T + bias for float32 on a CPU, or None where the default library is no slower.

    F.linear goes to MKL, which leaves AVX-512 unused on AMD: 115 GFLOP/s a core on Zen 5, where oneDNN does 250.
    It depends on the processor alone, never on a timing: the same machine gives the same bits.
    """
    able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if able else None


_MATRIX = _onednn_matrix()

Activation = Literal["none", "gelu", "gelu_tanh", "gelu_quick"]
"""What may follow a linear layer: nothing, GELU by erf, GELU by tanh, x * sigmoid(1.702 x)."""

_FUSED = {"none": ("none", [], ""), "gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh")}


class _OneDNNLinear(torch.autograd.Function):
    """A linear layer and its three gradients, all by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _MATRIX(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _MATRIX(rows, weight.t(), None, "none", [], "").view(x.shape) if to_x else None,
            _MATRIX(rows.t(), x.reshape(-1, x.shape[-1]).t(), None, "none", [], "") if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of every element."""
    if activation == "none":
        return x
    if activation == "gelu_quick":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear(
    x: Float[Tensor, "... i"],
    weight: Float[Tensor, "o i"],
    bias: Tensor | None,
    activation: Activation = "none",
    packed: Tensor | None = None,
) -> Float[Tensor, "... o"]:
    """`F.linear` and an activation, by the faster library where there is a choice.

    `packed` is the same weight in the order in which that library reads it (`packing`); it is not for gradients.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel()
    if _MATRIX is None or plain or torch.compiler.is_exporting():
        return activate(F.linear(x, weight, bias), activation)
    if torch.is_grad_enabled():
        return activate(_OneDNNLinear.apply(x, weight, bias), activation)
    if activation not in _FUSED:
        return activate(_MATRIX(x, weight if packed is None else packed, bias, "none", [], ""), activation)
    return _MATRIX(x, weight if packed is None else packed, bias, *_FUSED[activation])


class Linear(nn.Linear):
    """`nn.Linear`, by the faster library where there is a choice."""

    packed: Tensor | None = None

    def forward(self, x: Float[Tensor, "... i"], activation: Activation = "none") -> Float[Tensor, "... o"]:
        return linear(x, self.weight, self.bias, activation, self.packed)


def attend(
    query: Float[Tensor, "b h q e"], key: Float[Tensor, "b h n e"], value: Float[Tensor, "b h n e"]
) -> Float[Tensor, "b h q e"]:
    """`F.scaled_dot_product_attention`; on one thread without gradients by oneDNN, 1.2 to 1.5 times as fast.

    oneDNN's batched product is out of reach from Python, but a convolution of one pixel with a group for each head is
    the same. More threads would wait for each other in every such product; few tokens are not worth the calls, and
    for very many the scores would not fit into a cache.
    """
    _, heads, count, width = key.shape
    plain = (
        torch.compiler.is_compiling()
        or key.device.type != "cpu"
        or key.dtype != torch.float32
        or torch.is_grad_enabled()
    )
    plain = plain or torch.is_autocast_enabled("cpu") or torch.get_num_threads() > 1
    if _MATRIX is None or plain or query.shape != key.shape or width < 32 or not 192 <= count <= 1536:
        return F.scaled_dot_product_attention(query, key, value)
    queries = (query * width**-0.5).transpose(1, 2).flatten(2)  # [B N heads*E]
    found = []
    for one, keys, values in zip(queries, key, value, strict=True):
        scores = _by_groups(one, keys.reshape(-1, width), heads).unflatten(1, (heads, count)).softmax(-1)
        found.append(_by_groups(scores.flatten(1), values.mT.reshape(-1, count), heads))
    return torch.stack(found).unflatten(-1, (heads, width)).transpose(1, 2)


def _by_groups(x: Float[Tensor, "n i"], weight: Float[Tensor, "o e"], groups: int) -> Float[Tensor, "n o"]:
    """Equal parts of each row of `x` times equal parts of the rows of `weight`."""
    image = x[None, :, None].permute(0, 3, 1, 2)  # [1 i N 1], channels last by its strides: another way is slower
    convolve = torch.ops.mkldnn._convolution_pointwise
    found = convolve(image, weight[..., None, None], None, [0, 0], [1, 1], [1, 1], groups, "none", [], "")
    return found[0, :, :, 0].mT


@contextlib.contextmanager
def packing(network: nn.Module) -> Iterator[None]:
    """Weights on a CPU are kept a second time, in the order in which they are read, and must not change meanwhile."""
    layers = [part for part in network.modules() if isinstance(part, Linear) and _packable(part.weight)]
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _packable(weight: Tensor) -> bool:
    return _MATRIX is not None and weight.device.type == "cpu" and weight.dtype == torch.float32

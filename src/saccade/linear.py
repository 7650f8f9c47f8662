"""The linear layer, by the faster of two libraries where a CPU has both."""

from __future__ import annotations

from typing import Any

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


def linear(x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Tensor | None) -> Float[Tensor, "... o"]:
    """`F.linear`, by the faster library where there is a choice."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel()
    if _MATRIX is None or plain or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, by the faster library where there is a choice."""

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return linear(x, self.weight, self.bias)

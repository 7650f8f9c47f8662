"""Mean and spread taken out: of pictures as a family wants it, of a batch on however many ranks it lies."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from saccade import distributed


class Normalised(nn.Module):
    """A network of pictures in [0, 1] or uint8, which takes out the mean and spread that its config names itself."""

    config: Any
    mean: Tensor
    std: Tensor

    def reset_buffers(self) -> None:
        """Fill what follows from the config and is in no checkpoint."""
        for buffer, values in ((self.mean, self.config.mean), (self.std, self.config.std)):
            buffer.copy_(torch.tensor(values))

    def normalise(self, images: Shaped[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        """Pictures in [0, 1] or uint8 with mean and spread taken out; channels on the second axis."""
        scale = 1.0 if images.is_floating_point() else 255.0
        shape = (-1,) + (1,) * (images.ndim - 2)
        return (images.to(self.mean.dtype) - (self.mean * scale).view(shape)) / (self.std * scale).view(shape)


class BatchNorm(nn.Module):
    """Each channel of [N C] or [N C H W] to mean 0 and spread 1 over the batch (arXiv 1502.03167), then scaled.

    Over several ranks the batch is that of all of them, and every rank must have an equal share of it, as ours have;
    gradients pass between ranks, so that their mean over ranks is that of one process. Names in `state_dict` are
    torch's. Statistics are as precise as the buffers, float32 also where the input is not; memory format is kept.
    """

    def __init__(self, width: int, *, affine: bool = True, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.width, self.eps, self.momentum = width, eps, momentum
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As if no batch had been seen: also what a module made on the meta device needs."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.width}, affine={self.weight is not None}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Float[Tensor, "n {self.width} *size"]) -> Float[Tensor, "n {self.width} *size"]:
        """By the statistics of the batch in training, which the running ones then follow; by those in evaluation."""
        if self.training:
            self.num_batches_tracked.add_(1)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        mean, variance, count = _gathered_statistics(x.detach(), self.running_mean.dtype)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return _Normalise.apply(x, mean, variance, count, self.weight, self.bias, self.eps)


def _gathered_statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance of each channel over all ranks, the same bits on each, and how many values there are.

    Ranks may have different numbers of rows, also none: hidden patches differ from rank to rank.
    """
    count = x.numel() // x.shape[1]
    own = x.new_zeros(3, x.shape[1], dtype=dtype)
    if count:
        # it would also update running statistics; given some, it computes in their precision
        unused = torch.zeros_like(own)
        own[:2] = torch.stack(torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0))
    own[2] = count
    parts = own.new_empty(dist.get_world_size(), *own.shape)
    dist.all_gather(list(parts), own)
    means, variances, counts = parts.unbind(1)
    total = counts.sum(0)
    share = counts / total
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total


class _Normalise(torch.autograd.Function):
    """Normalised by given statistics, which the gradient takes for those of all ranks' x together.

    Both ways torch's own kernels for constant statistics do the work: what the statistics add to the gradient of x,
    -weight / spread * (mean(dy) + y * mean(dy * y)) with y the normalised x, is itself a batch norm of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, variance, count, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, variance, count, weight = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, scale, mean, variance, None, None, False, ctx.eps, [ctx.needs_input_grad[0], True, True]
        )
        if dx is not None:
            sums = torch.stack([dweight, dbias])
            dist.all_reduce(sums)
            factor = -scale * (variance + ctx.eps).rsqrt() / count
            dx += F.batch_norm(x, mean, variance, factor * sums[0], factor * sums[1], False, 0.0, ctx.eps)
        if weight is None:
            dweight = dbias = None
        return dx, None, None, None, dweight, dbias, None


class Standard(nn.Module):
    """Each channel [... D] to mean 0 and spread 1 by what former steps saw: for targets, of which no gradient is asked.

    All batches of a step, on all ranks, are treated alike, so accumulation and ranks change nothing; those of the first
    step, which has no former one, by their own statistics. `momentum` is what mean and variance keep a step.
    """

    def __init__(self, width: int, *, momentum: float = 0.99, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.zeros(width))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(2, width), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """In the precision of the buffers, float32."""
        rows = x.to(self.mean.dtype).flatten(0, -2)
        sums = distributed.total(torch.stack([rows.sum(0), rows.square().sum(0)]))
        count = len(rows) * distributed.world()  # every rank has an equal share
        self.sums += sums
        self.count += count
        first = self.steps == 0
        mean = torch.where(first, sums[0] / count, self.mean)
        variance = torch.where(first, sums[1] / count - mean.square(), self.variance)
        return ((rows - mean) * (variance.clamp(min=0) + self.eps).rsqrt()).view(x.shape)

    @torch.no_grad()
    def after_step(self) -> None:
        """Takes this step's statistics in: all of them at first, then an ever smaller part."""
        self.steps += 1
        part = torch.clamp(1 / self.steps, min=1 - self.momentum)
        mean, square = self.sums / self.count.clamp(min=1)
        self.variance.lerp_(square - mean.square(), part)
        self.mean.lerp_(mean, part)
        self.sums.zero_()
        self.count.zero_()

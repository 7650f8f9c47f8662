"""The one Vision Transformer (arXiv 2010.11929), with the few switches that the published families need.

Parameter names are those of the official checkpoints: cls_token, pos_embed, patch_embed.proj, register_tokens,
mask_token, blocks.N.{norm1, attn.qkv, attn.proj, ls1.gamma, norm2, mlp.{fc1, fc2 | w1, w2, w3}, ls2.gamma}, norm;
attn.qkv holds rows [q; k; v]. Tokens stand in the order class token, registers, patches.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn

from saccade.depth import Kept, kept
from saccade.errors import SaccadeError, nearest
from saccade.linear import Linear, attend, linear
from saccade.norm import Normalised
from saccade.settings import Settings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SIZES: dict[str, dict[str, Any]] = {
    "xs": {"width": 128, "depth": 6, "heads": 2, "hidden": 512},  # ours: minutes on two cores
    "ti": {"width": 192, "depth": 12, "heads": 3, "hidden": 768},
    "s": {"width": 384, "depth": 12, "heads": 6, "hidden": 1536},
    "s+": {"width": 384, "depth": 12, "heads": 6, "hidden": 1536, "activation": "swiglu"},
    "b": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "l": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    "so400m": {"width": 1152, "depth": 27, "heads": 16, "hidden": 4304},
    "h": {"width": 1280, "depth": 32, "heads": 16, "hidden": 5120},
    "h+": {"width": 1280, "depth": 32, "heads": 20, "hidden": 5120, "activation": "swiglu"},
    "g": {"width": 1536, "depth": 40, "heads": 24, "hidden": 4096, "activation": "swiglu"},
    "7b": {"width": 4096, "depth": 40, "heads": 32, "hidden": 8192, "activation": "swiglu", "qkv_bias": "none"},
}

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "swiglu"]
QKVBias = Literal["all", "none", "k_masked"]
Initial = Literal["trunc_normal", "xavier"]
Rows = slice | Tensor | None
"""Which tokens of a sequence are computed: all (None), a run of them, or [B K] of them by index."""
Rope = tuple[Tensor, Tensor] | None
"""Sines and cosines by which queries and keys are turned: [1 or B, N, E]."""


class Features(NamedTuple):
    """What an encoder says. `patches` are in the order of `positions`: (row, column), or (time, row, column) for clips.

    `cls` is None where a family has no class token or it was not asked for; what was not asked for has no rows.
    """

    cls: Float[Tensor, "b d"] | None
    registers: Float[Tensor, "b r d"]
    patches: Float[Tensor, "b n d"]
    positions: Int[Tensor, "b n axes"]
    grid: tuple[int, ...]


class ViTConfig(Settings):
    """Every switch of a ViT. Raises `SaccadeError` when two of them do not fit."""

    width: int = Field(768, ge=1, description="width of a token")
    depth: int = Field(12, ge=1, description="number of blocks")
    heads: int = Field(12, ge=1, description="attention heads")
    hidden: int = Field(3072, ge=1, description="width inside the MLP (of each branch, for swiglu)")
    patch: int = Field(16, ge=1, description="side of a patch in pixels")
    patch_time: int | None = Field(None, ge=1, description="frames in a patch; None: pictures, not clips")
    image_size: int = Field(224, ge=1, description="native side in pixels; any other size works too")
    frames: int = Field(1, ge=1, description="native length of a clip")
    channels: int = Field(3, ge=1, description="channels of a picture")
    mean: tuple[float, ...] = Field(IMAGENET_MEAN, description="subtracted from each channel of a picture in [0, 1]")
    std: tuple[float, ...] = Field(IMAGENET_STD, description="each channel is divided by it")
    eps: float = Field(1e-6, gt=0, description="of every layer norm")
    activation: Activation = Field(
        "gelu", description="of the MLP: GELU by erf, by tanh, x*sigmoid(1.702x), or a SiLU gate"
    )
    qkv_bias: QKVBias = Field("all", description="bias of queries, keys and values; k_masked: none for keys")
    layer_scale: float | None = Field(
        None, gt=0, description="initial factor of each residual branch; None: no factors"
    )
    pre_norm: bool = Field(False, description="a layer norm before the first block (CLIP)")
    patch_bias: bool = Field(True, description="bias of the patch embedding")
    cls: bool = Field(True, description="a class token")
    registers: int = Field(0, ge=0, description="register tokens; they have no position")
    mask_token: bool = Field(False, description="a learned token that stands in for hidden patches")
    position: Literal["learned", "sincos", "sincos_y_first", "rope", "none"] = Field(
        "learned",
        description="sincos: first half of the width says the column (MAE); sincos_y_first: the row (MoCo v3)",
    )
    cls_position: bool = Field(True, description="the learned table has a row for the class token")
    position_offset: float = Field(0.0, ge=0, lt=1, description="added to the sides that a learned table is resized to")
    position_antialias: bool = Field(False, description="a learned table is resized with antialiasing")
    position_linear: bool = Field(False, description="a learned table is resized linearly, not bicubically (NaFlex)")
    rope_rounded: bool = Field(False, description="RoPE's periods are rounded to bfloat16 (DINOv3)")
    pooling: Literal["cls", "mean", "map"] = Field(
        "cls", description="the one vector: class token, mean patch, attention"
    )
    init: Initial = Field("trunc_normal", description="how matrices start")

    @model_validator(mode="after")
    def _fits(self) -> ViTConfig:
        axes = len(self.grid)
        if self.width % self.heads:
            raise SaccadeError(f"width {self.width} is not divisible by {self.heads} heads", path="heads")
        if self.position == "rope" and (self.width // self.heads) % 2:
            raise SaccadeError(f"RoPE needs an even width per head, not {self.width // self.heads}", path="heads")
        if self.position.startswith("sincos") and self.width < 2 * axes:
            raise SaccadeError(f"width {self.width} cannot hold {axes} sincos axes", path="width")
        if not len(self.mean) == len(self.std) == self.channels:
            raise SaccadeError(f"{self.channels} channels need as many means and spreads", path="mean")
        if self.pooling == "cls" and not self.cls:
            raise SaccadeError("cls pooling needs a class token", path="pooling", hint="use pooling mean or map")
        return self

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis at the native size."""
        if self.patch_time is None:
            return grid_of((self.image_size, self.image_size), self.patch)
        return grid_of((self.frames, self.image_size, self.image_size), self.patch, self.patch_time)


def grid_of(size: tuple[int, ...], patch: int, patch_time: int | None = None) -> tuple[int, ...]:
    """Patches along each axis of a picture (height, width) or a clip (frames, height, width).

    Raises `SaccadeError` that names the sizes which would do.
    """
    steps = (patch, patch) if patch_time is None else (patch_time, patch, patch)
    for side, step in zip(size, steps, strict=True):
        if side % step:
            fitting = " or ".join(str(n) for n in (side // step * step, side // step * step + step) if n)
            what = "length" if step is not patch else "size"
            raise SaccadeError(
                f"{what} {side} is not divisible by patch {step}", path="--image-size", hint=f"use {fitting}"
            )
    return tuple(side // step for side, step in zip(size, steps, strict=True))


def parse(arch: str) -> tuple[str, int]:
    """The size and the patch of `vit-SIZE/PATCH`. Raises `SaccadeError` with the nearest right name."""
    family, _, rest = arch.lower().partition("-")
    size, _, patch = rest.partition("/")
    if family != "vit" or not patch.isdigit() or int(patch) < 1:
        hint = "written vit-SIZE/PATCH, e.g. vit-s/16; sizes: " + " ".join(SIZES)
        raise SaccadeError(f"there is no architecture {arch!r}", path="--arch", hint=hint)
    if size not in SIZES:
        hint = nearest(f"vit-{size}/{patch}", [f"vit-{name}/{patch}" for name in SIZES])
        raise SaccadeError(f"there is no architecture {arch!r}", path="--arch", hint=hint)
    return size, int(patch)


def build(arch: str, *, image_size: int, channels: int = 3, **switches: Any) -> ViT:
    """A fresh ViT by name, e.g. `build("vit-s/16", image_size=224)`; `switches` are fields of `ViTConfig`.

    Raises `SaccadeError` for an unknown name or switch and for a size that the patch does not divide.
    """
    size, patch = parse(arch)
    for name in switches:
        if name not in ViTConfig.model_fields:
            raise SaccadeError(f"a ViT has no switch {name!r}", path=name, hint=nearest(name, ViTConfig.model_fields))
    grid_of((image_size, image_size), patch)
    settings: dict[str, Any] = SIZES[size] | {"patch": patch, "image_size": image_size, "channels": channels}
    if channels != 3:  # no family's numbers apply
        settings |= {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return ViT(ViTConfig(**(settings | switches)))


def patchify(images: Shaped[Tensor, "b c *size"], patch: int, patch_time: int | None = None) -> Shaped[Tensor, "b ..."]:
    """A view of pictures [B C H W] as [B h w C p p], or of clips [B C T H W] as [B t h w C s p p]."""
    steps = (patch, patch) if patch_time is None else (patch_time, patch, patch)
    for axis in range(len(steps), 0, -1):  # from the last axis, so that the others keep their places
        images = images.unflatten(axis + 1, (-1, steps[axis - 1]))
    axes = range(2, 2 + 2 * len(steps))
    return images.permute(0, *axes[::2], 1, *axes[1::2])


def places(grid: tuple[int, ...], device: torch.device | None = None) -> Int[Tensor, "n axes"]:
    """The position of each patch, the last axis fastest."""
    axes = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def sincos(grid: tuple[int, ...], width: int, x_first: bool = True, device: torch.device | None = None) -> Tensor:
    """Fixed positions [N D]: an equal part of the width for each axis, sines before cosines, periods up to 10000.

    `x_first` puts the fastest axis first (MAE), otherwise the slowest (MoCo v3). What does not divide ends in zeros.
    """
    part = width // (2 * len(grid))
    omega = 10000.0 ** (-torch.arange(part, dtype=torch.float64, device=device) / part)
    position = places(grid, device).double()
    angles = (position.flip(-1) if x_first else position)[..., None] * omega  # [N axes part]
    table = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return F.pad(table, (0, width - table.shape[-1]))


def take(x: Shaped[Tensor, "b n ..."], rows: Rows) -> Shaped[Tensor, "b k ..."]:
    """The chosen tokens of each sample."""
    if rows is None:
        return x
    if isinstance(rows, slice):
        return x[:, rows]
    batch, length = x.shape[:2]
    flat = rows + torch.arange(batch, device=rows.device)[:, None] * length
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, rows.shape)


def initialise(module: nn.Module, kind: Initial) -> None:
    """Set the matrices, biases and norms below `module`: truncated normal of 0.02 (ViT, DINO) or Xavier uniform (MAE).

    Xavier takes a fused qkv as one matrix. A patch embedding starts as a convolution does, or as a matrix for Xavier.
    """
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            bound = 1 / math.sqrt(part.weight[0].numel())
            if kind == "xavier":
                nn.init.xavier_uniform_(part.weight.data.flatten(1))
            elif isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
            else:
                nn.init.uniform_(part.weight, -bound, bound)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class Scale(nn.Module):
    """One learned factor a channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, width: int, start: float):
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, activation: Activation):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, self.activation))


class SwiGLU(nn.Module):
    """A SiLU gate `w1` on a value `w2`, then `w3` (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Rotation(nn.Module):
    """Axial RoPE as in DINOv3: positions in [-1, 1] on each axis, periods from 1 to 100, rotating halves of a head."""

    def __init__(self, head: int, axes: int, rounded: bool = False):
        super().__init__()
        self.head, self.axes, self.rounded = head, axes, rounded
        self.register_buffer("periods", torch.empty(head // (2 * axes)))

    def reset_buffers(self) -> None:
        """Published checkpoints bring rounded periods of their own, which is why they are saved."""
        count = self.periods.shape[0]
        steps = torch.arange(count, dtype=torch.float64, device=self.periods.device)
        periods = 100.0 ** (steps / count)
        self.periods.copy_(periods.bfloat16() if self.rounded else periods)

    def forward(
        self, grid: tuple[int, ...], still: int, stretch: Float[Tensor, ""] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sines, those of the first half negative, and cosines [1 still+N head]; the first `still` are not turned.

        `stretch`: a factor of all coordinates.
        """
        device, dtype = self.periods.device, self.periods.dtype
        sides = torch.tensor(grid, device=device, dtype=dtype)
        coordinates = (places(grid, device).to(dtype) + 0.5) / sides * 2 - 1
        coordinates = coordinates if stretch is None else coordinates * stretch
        angles = (2 * math.pi * coordinates[..., None] / self.periods).flatten(1)  # [N axes*count]
        angles = F.pad(angles, (0, self.head // 2 - angles.shape[1], still, 0))[None]
        sine, cosine = angles.sin(), angles.cos()
        return torch.cat([-sine, sine], -1), torch.cat([cosine, cosine], -1)


def rotate(x: Float[Tensor, "b h n e"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "b h n e"]:
    """Turn queries or keys by their positions; `rope` as from `Rotation`, [1 or B, N, E]."""
    sine, cosine = (part[:, None] for part in rope)
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cosine, torch.cat([second, first], -1), sine).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values; only the queries of `rows` are computed.

    `causal`: a token attends to itself and those before it.
    """

    def __init__(self, width: int, heads: int, bias: QKVBias, causal: bool = False):
        super().__init__()
        self.heads, self.masked, self.causal = heads, bias == "k_masked", causal
        self.qkv = Linear(width, 3 * width, bias=bias != "none")
        self.proj = Linear(width, width)

    def _bias(self) -> Tensor | None:
        if not self.masked:
            return self.qkv.bias
        query, key, value = self.qkv.bias.chunk(3)
        return torch.cat([query, key * 0, value])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _project(self, x: Float[Tensor, "b n d"], rope: Rope, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the chosen tokens, keys and values of all: [B heads N D/heads]."""
        width, bias = x.shape[-1], self._bias()
        if rows is None:
            query, key, value = linear(x, self.qkv.weight, bias, packed=self.qkv.packed).split(width, -1)
        else:
            weight = self.qkv.weight
            query = linear(take(x, rows), weight[:width], None if bias is None else bias[:width])
            key, value = linear(x, weight[width:], None if bias is None else bias[width:]).split(width, -1)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if rope is not None:
            turned = rope if rows is None else tuple(take(part.expand(x.shape[0], -1, -1), rows) for part in rope)
            query, key = rotate(query, turned), rotate(key, rope)
        return query, key, value

    def _seen(self, x: Float[Tensor, "b n d"], rows: Rows) -> Bool[Tensor, "_ 1 k n"]:
        """Which tokens the chosen ones attend to, where attention is causal."""
        places = torch.arange(x.shape[1], device=x.device)
        chosen = rows if isinstance(rows, Tensor) else (places if rows is None else places[rows])[None]
        return (places <= chosen[..., None])[:, None]

    def forward(
        self, x: Float[Tensor, "b n d"], rope: Rope = None, rows: Rows = None, seen: Tensor | None = None
    ) -> Tensor:
        heads = self._project(x, rope, rows)
        seen = self._seen(x, rows) if self.causal and seen is None else seen
        x = attend(*heads) if seen is None else F.scaled_dot_product_attention(*heads, attn_mask=seen)
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Float[Tensor, "b n d"], rope: Rope = None, rows: Rows = None) -> Float[Tensor, "b h k n"]:
        """How much each (chosen) token attends to each, which `forward` never writes down."""
        query, key, _ = self._project(x, rope, rows)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return (scores.masked_fill(~self._seen(x, rows), -torch.inf) if self.causal else scores).softmax(-1)


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to what came in. Decoders and predictors are made of it too."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        qkv_bias: QKVBias = "all",
        layer_scale: float | None = None,
        eps: float = 1e-6,
        causal: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, qkv_bias, causal)
        self.ls1 = nn.Identity() if layer_scale is None else Scale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = SwiGLU(width, hidden) if activation == "swiglu" else MLP(width, hidden, activation)
        self.ls2 = nn.Identity() if layer_scale is None else Scale(width, layer_scale)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Rope = None,
        rows: Rows = None,
        drop: tuple[Kept, Kept] = (None, None),
        seen: Bool[Tensor, "_ 1 _ n"] | None = None,
    ) -> Tensor:
        """With `rows`, only those tokens come out: [B K D]. `drop`: which samples each of the two branches is for.
        `seen`: which tokens each one attends to; not together with `drop`.
        """
        some = None if drop[0] is None else drop[0][0]
        turned = None if rope is None else tuple(part if len(part) == 1 else _some(part, some) for part in rope)
        asked = _some(rows, some) if isinstance(rows, Tensor) else rows
        branch = self.ls1(self.attn(self.norm1(_some(x, some)), turned, asked, seen))
        x = self._add(take(x, rows), branch, drop[0])
        some = None if drop[1] is None else drop[1][0]
        return self._add(x, self.ls2(self.mlp(self.norm2(_some(x, some)))), drop[1])

    @staticmethod
    def _add(x: Tensor, branch: Tensor, drop: Kept) -> Tensor:
        if drop is None:
            return x + branch
        some, factors = drop
        factors = factors[:, None, None].to(branch.dtype)
        if some is None:
            return torch.addcmul(x, branch, factors)
        return x.index_add(0, some, (branch * factors).to(x.dtype))


def _some(x: Shaped[Tensor, "b ..."], samples: Tensor | None) -> Shaped[Tensor, "k ..."]:
    return x if samples is None else x.index_select(0, samples)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then an MLP (the MAP head of big_vision)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q, self.kv, self.proj = Linear(width, width), Linear(width, 2 * width), Linear(width, width)
        self.norm = nn.LayerNorm(width, config.eps)
        self.mlp = MLP(width, config.hidden, "gelu" if config.activation == "swiglu" else config.activation)

    def forward(self, x: Float[Tensor, "b n d"], seen: Bool[Tensor, "b 1 1 n"] | None = None) -> Float[Tensor, "b d"]:
        query = self.q(self.latent).expand(x.shape[0], -1, -1)
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, *self.kv(x).chunk(2, -1))]
        x = F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2).flatten(2)
        x = self.proj(x)[:, 0]
        return x + self.mlp(self.norm(x))


class PatchEmbed(nn.Module):
    """Holds the convolution whose weight embeds a patch; it is applied as a matrix, to the patches that are seen."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        clip = config.patch_time is not None
        kernel = (config.patch_time, config.patch, config.patch) if clip else (config.patch, config.patch)
        kind = nn.Conv3d if clip else nn.Conv2d
        self.proj = kind(config.channels, config.width, kernel, kernel, bias=config.patch_bias)

    def forward(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n d"]:
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(Normalised):
    """A Vision Transformer: pictures in [0, 1] or uint8 to `Features`. `vit.config` says all about it."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        width, count, axes = config.width, math.prod(config.grid), len(config.grid)
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.cls else None
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, width)) if config.mask_token else None
        if config.position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, count + self._table_prefix, width))
        elif config.position.startswith("sincos"):
            self.register_buffer("pos_embed", torch.empty(1, count, width), persistent=False)
        rope = config.position == "rope"
        self.rope_embed = Rotation(width // config.heads, axes, config.rope_rounded) if rope else None
        self.norm_pre = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        switches = config.model_dump(include={"activation", "qkv_bias", "layer_scale", "eps"})
        blocks = (Block(width, config.heads, config.hidden, **switches) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, config.eps)
        self.attn_pool = AttentionPool(config) if config.pooling == "map" else None
        self.register_buffer("mean", torch.empty(config.channels), persistent=False)
        self.register_buffer("std", torch.empty(config.channels), persistent=False)
        self.reset_parameters()

    @property
    def _table_prefix(self) -> int:
        return int(self.config.cls and self.config.cls_position)

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.config.patch

    @property
    def branches(self) -> int:
        """How many residual branches stochastic depth may drop: attention, then MLP, of each block."""
        return 2 * self.config.depth

    def drop_rates(self, rate: float) -> list[float]:
        """How often each branch is dropped: from 0 in the first block to `rate` in the last, in equal steps."""
        return [rate * block / max(1, self.config.depth - 1) for block in range(self.config.depth) for _ in range(2)]

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches."""
        return int(self.config.cls) + self.config.registers

    def reset_parameters(self) -> None:
        """Fresh weights from torch's generator, and the buffers: also what a model made on the meta device needs."""
        initialise(self, self.config.init)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        if self.config.position == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.attn_pool is not None:
            nn.init.trunc_normal_(self.attn_pool.latent, std=self.config.width**-0.5)
        for part in self.modules():
            if isinstance(part, Scale):
                nn.init.constant_(part.gamma, part.start)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill what follows from the config and is not in a checkpoint."""
        super().reset_buffers()
        if self.config.position.startswith("sincos"):
            self.pos_embed.copy_(self._sincos(self.config.grid, None)[None])
        if self.rope_embed is not None:
            self.rope_embed.reset_buffers()

    def _sincos(self, grid: tuple[int, ...], device: torch.device | None) -> Tensor:
        return sincos(grid, self.config.width, self.config.position == "sincos", device)

    def picture(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b c h w"]:
        """Pictures in [0, 1] from normalised patches of the native size, values in the order row, column, channel."""
        config = self.config
        patches = patches.unflatten(2, (config.patch, config.patch, config.channels)) * self.std + self.mean
        return patches.unflatten(1, config.grid).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).clamp(0, 1)

    def position_table(self, grid: tuple[int, ...]) -> Tensor | None:
        """Additive positions [1 N D] of a grid, resized from the learned table where it is another."""
        if self.config.position in ("rope", "none"):
            return None
        native = grid == self.config.grid
        if self.config.position != "learned":
            return (
                self.pos_embed if native else self._sincos(grid, self.pos_embed.device).to(self.pos_embed.dtype)[None]
            )
        table = self.pos_embed[:, self._table_prefix :]
        if native:
            return table
        table = table.unflatten(1, self.config.grid).movedim(-1, 1)
        offset, sides = self.config.position_offset, zip(grid, self.config.grid, strict=True)
        to = {"scale_factor": [(n + offset) / native for n, native in sides]} if offset else {"size": grid}
        plane = "bilinear" if self.config.position_linear else "bicubic"
        mode, smooth = plane if len(grid) == 2 else "trilinear", self.config.position_antialias
        table = F.interpolate(table, mode=mode, antialias=smooth, align_corners=False, **to)
        return table.flatten(2).transpose(1, 2)

    def _embed(
        self, images: Tensor, keep: Tensor | None, hide: Tensor | None, grid: tuple[int, ...]
    ) -> Float[Tensor, "b k d"]:
        """Patch tokens with their positions; patches outside `keep` are never looked at."""
        axes = len(grid)
        patches = patchify(images, self.config.patch, self.config.patch_time)
        patches = take(patches.flatten(axes + 1).flatten(1, axes), keep)  # [B K C*p*p]
        patches = self.normalise(patches.unflatten(-1, (self.config.channels, -1)).transpose(1, 2)).transpose(1, 2)
        x = self.patch_embed(patches.flatten(2))
        if hide is not None:
            if self.mask_token is None:
                raise ValueError("`hide` needs a mask token: build the ViT with mask_token=True")
            hidden = hide if keep is None else hide.gather(1, keep)
            x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        table = self.position_table(grid)
        if table is None:
            return x
        return x + (table if keep is None else table[0][keep])

    def _prefix(self, batch: int) -> list[Tensor]:
        """Class token, with its own position where it has one, and registers."""
        tokens = []
        if self.cls_token is not None:
            placed = self.config.position == "learned" and self._table_prefix
            cls = self.cls_token + self.pos_embed[:, :1] if placed else self.cls_token
            tokens.append(cls.expand(batch, -1, -1))
        if self.register_tokens is not None:
            tokens.append(self.register_tokens.expand(batch, -1, -1))
        return tokens

    def _enter(
        self, images: Tensor, keep: Tensor | None, hide: Tensor | None
    ) -> tuple[Tensor, Rope, Tensor, tuple[int, ...]]:
        """Tokens before the first block, their rotations, the patches' positions [B K axes], and the grid."""
        config = self.config
        images = images if config.patch_time is None else images.transpose(1, 2)  # [B C T H W], as convolutions have it
        if images.shape[1] != config.channels:
            hint = f"--channels {images.shape[1]} makes it read them"
            raise SaccadeError(
                f"this ViT reads {config.channels} channels, not {images.shape[1]}", path="--channels", hint=hint
            )
        grid = grid_of(tuple(images.shape[2:]), config.patch, config.patch_time)
        x = torch.cat([*self._prefix(images.shape[0]), self._embed(images, keep, hide, grid)], 1)
        positions = places(grid, images.device)
        positions = positions.expand(images.shape[0], -1, -1) if keep is None else positions[keep]
        return self.norm_pre(x), self._rope(grid, keep), positions, grid

    def _rope(self, grid: tuple[int, ...], keep: Tensor | None, stretch: Tensor | None = None) -> Rope:
        """The rotations of all tokens, or of those that are kept, where there are any."""
        if self.rope_embed is None:
            return None
        rope = self.rope_embed(grid, self.prefix, stretch)
        if keep is None:
            return rope
        rows = torch.cat([torch.arange(self.prefix, device=keep.device).expand(len(keep), -1), keep + self.prefix], 1)
        return rope[0][0][rows], rope[1][0][rows]

    def _leave(self, x: Tensor, positions: Tensor, grid: tuple[int, ...]) -> Features:
        """All tokens of a sequence, normed, as features."""
        cls, registers, patches = self.norm(x).split(
            [int(self.config.cls), self.config.registers, positions.shape[1]], 1
        )
        return Features(cls[:, 0] if self.config.cls else None, registers, patches, positions, grid)

    def forward(
        self,
        images: Shaped[Tensor, "b ..."],
        keep: Int[Tensor, "b k"] | None = None,
        hide: Bool[Tensor, "b n"] | None = None,
        *,
        tokens: Literal["all", "cls", "patches"] | Int[Tensor, "b q"] = "all",
        drop: Float[Tensor, "b branches"] | None = None,
        stretch: Float[Tensor, " blocks"] | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Features:
        """Features of pictures [B C H W], or clips [B T C H W], of any size that the patch divides.

        keep: patches that are seen, by index into the grid; the others cost nothing.
        hide: patches that become the mask token.
        tokens: what the last block computes: everything, one kind, or the class token and these patches by index.
        drop: factors of each sample's residual branches, two a block (`stochastic_depth`); best on the CPU (`kept`).
        stretch: factors of RoPE's coordinates, one a block (DINOv3's augmentation in training).
        norm: stands for the last norm where only the class token is computed (DINOv3's, of small crops in training).
        """
        x, rope, positions, grid = self._enter(images, keep, hide)
        branches = [None] * self.branches if drop is None else kept(drop, x.device)
        drops = list(zip(branches[::2], branches[1::2], strict=True))
        ropes = [rope] * len(self.blocks) if stretch is None else [self._rope(grid, keep, by) for by in stretch]
        for block, turned, dropped in zip(self.blocks[:-1], ropes, drops, strict=False):
            x = block(x, turned, drop=dropped)
        last = functools.partial(self.blocks[-1], x, ropes[-1], drop=drops[-1])
        if isinstance(tokens, str) and tokens == "all":
            return self._leave(last(), positions, grid)
        if isinstance(tokens, str) and tokens == "patches":
            patches = self.norm(last(slice(self.prefix, None)))
            return Features(None, patches[:, :0], patches, positions, grid)
        if self.cls_token is None:
            raise ValueError('this ViT has no class token: ask for tokens="patches" or "all"')
        if isinstance(tokens, str):
            rows, positions = slice(0, 1), positions[:, :0]
        else:
            rows = torch.cat([tokens.new_zeros(len(tokens), 1), tokens + self.prefix], 1)
            positions = take(positions, tokens)
        x = (self.norm if norm is None else norm)(last(rows))
        cls, patches = x.split([1, positions.shape[1]], 1)
        return Features(cls[:, 0], patches[:, :0], patches, positions, grid)

    def intermediate(self, images: Shaped[Tensor, "b ..."], blocks: list[int]) -> list[Features]:
        """Features after the chosen blocks (negative from the end), each through the final norm: for linear probes."""
        wanted = [number % len(self.blocks) for number in blocks]
        x, rope, positions, grid = self._enter(images, None, None)
        found: dict[int, Features] = {}
        for number, block in enumerate(self.blocks):
            if number > max(wanted):
                break
            x = block(x, rope)
            if number in wanted:
                found[number] = self._leave(x, positions, grid)
        return [found[number] for number in wanted]

    def attention(self, images: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b heads n"]:
        """How the class token attends to each patch in the last block; what is missing to 1 went to other tokens."""
        if self.cls_token is None:
            raise ValueError("this ViT has no class token whose attention could be asked for")
        x, rope, *_ = self._enter(images, None, None)
        *body, last = self.blocks
        for block in body:
            x = block(x, rope)
        return last.attn.weights(last.norm1(x), rope, slice(0, 1))[:, :, 0, self.prefix :]

    def pooled(self, images: Shaped[Tensor, "b ..."], *, drop: Tensor | None = None) -> Float[Tensor, "b d"]:
        """The embedding of pictures, and nothing that it does not need."""
        return self.embedding(self(images, tokens="cls" if self.config.pooling == "cls" else "patches", drop=drop))

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The one vector that this family pools."""
        if self.config.pooling == "cls":
            return features.cls
        return features.patches.mean(1) if self.config.pooling == "mean" else self.attn_pool(features.patches)

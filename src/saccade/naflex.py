"""Pictures at their own aspect in one batch: rows of patches, filled up to one length, and a ViT that sees no filling.

NaFlex (arXiv 2502.14786): a picture is resized to whole patches, at most so many, near its own aspect; positions are
resized to its grid as the ViT's switches say.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saccade import vit
from saccade.augment import Views
from saccade.data import Batch
from saccade.errors import SaccadeError


def natural_size(height: int, width: int, patch: int, patches: int) -> list[int]:
    """The largest height and width near this aspect that are whole patches, at most so many (NaFlex, arXiv 2502.14786).

    By bisection of one scale for both sides, in the authors' bounds: elsewhere it would end a patch apart.
    """

    def sides(scale: float) -> list[int]:
        return [max(patch, math.ceil(side * scale / patch) * patch) for side in (height, width)]

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(sides(middle)) <= patches * patch**2 else (low, middle)
    return sides(low)


@torch.no_grad()
def render(
    pixels: Shaped[Tensor, "b *t c h w"], views: Views, patch: int, patches: int
) -> tuple[Float[Tensor, "v n p"], Int[Tensor, "v 2"]]:
    """The boxes of views, flipped or not, as `patches` rows of numbers in [0, 1] each, and their grids.

    A patch's numbers are in the order channel, row, column; what is no patch of a picture is zero. Grids are on the
    CPU, which lays out positions by them. Raises `SaccadeError` for clips.
    """
    pixels = pixels[:, 0] if pixels.ndim == 5 and pixels.shape[1] == 1 else pixels
    if pixels.ndim != 4:
        raise SaccadeError("clips have no aspect of their own here", hint="give pictures")
    scale = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(pixels.dtype, 1.0)
    out = torch.zeros(len(views), patches, pixels.shape[1] * patch**2, device=pixels.device)
    grids = torch.zeros(len(views), 2, dtype=torch.long)
    boxes = zip(views.image.tolist(), views.box.tolist(), views.flip.tolist(), strict=True)
    for view, (image, (top, left, height, width), flipped) in enumerate(boxes):
        size = natural_size(height, width, patch, patches)
        part = pixels[image : image + 1, :, top : top + height, left : left + width].float() / scale
        part = F.interpolate(part, size=size, mode="bilinear", antialias=True, align_corners=False)
        cells = vit.patchify((part.flip(-1) if flipped else part).clamp(0, 1), patch)
        grids[view] = torch.tensor(cells.shape[1:3])
        out[view, : cells.shape[1] * cells.shape[2]] = cells.flatten(3).flatten(1, 2)[0]
    return out, grids


def forward(
    network: vit.ViT, patches: Float[Tensor, "b n p"], grids: Int[Tensor, "b 2"]
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """A ViT's patches of pictures of several grids, normed, and which of them there are; the others are filling.

    Raises `SaccadeError` for a ViT with other tokens than patches, or without a table of positions.
    """
    if network.prefix or network.config.position != "learned":
        raise SaccadeError(
            "pictures of their own aspect need a ViT of patches alone with learned positions",
            path="--arch",
            hint="such as siglip's: no class token, no registers, no rotations",
        )
    channels, grids = network.config.channels, grids.cpu()
    x = network.normalise(patches.unflatten(2, (channels, -1)).transpose(1, 2)).transpose(1, 2)
    length, sides = patches.shape[1], [tuple(grid) for grid in grids.tolist()]
    tables = {grid: F.pad(network.position_table(grid)[0], (0, 0, 0, length - math.prod(grid))) for grid in set(sides)}
    x = network.norm_pre(network.patch_embed(x.flatten(2)) + torch.stack([tables[grid] for grid in sides]))
    seen = (torch.arange(length) < grids.prod(1, keepdim=True)).to(x.device)
    for block in network.blocks:
        x = block(x, seen=seen[:, None, None])
    return network.norm(x), seen


def embedding(network: vit.ViT, tokens: Float[Tensor, "b n d"], seen: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    """The one vector a picture that the ViT pools of the patches that there are."""
    if network.attn_pool is not None:
        return network.attn_pool(tokens, seen[:, None, None])
    return (tokens * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)


def look(
    network: vit.ViT, batch: Batch
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d"], Bool[Tensor, "b n"] | None]:
    """A picture's patches, its one vector, and which patches are no filling: of `patches` and `grid`, else of `images`.

    None of the last: all.
    """
    if "grid" in batch:
        tokens, seen = forward(network, batch["patches"], batch["grid"])
        return tokens, embedding(network, tokens, seen), seen
    features = network(batch["images"], tokens="patches")
    return features.patches, network.embedding(features), None

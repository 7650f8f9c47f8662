"""What a method learns of texts: a tower, the way into the space shared with pictures, and how the two are compared."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from saccade.linear import Linear
from saccade.settings import Worded
from saccade.text import Pairing, TextConfig, TextEncoder
from saccade.tokenizer import Tokenizer

NAMES = {"scale": "logit_scale", "bias": "logit_bias"}
"""Parameters that are called otherwise where texts and pictures are compared for use."""


class Words(nn.Module):
    """A text tower beside pictures' embeddings of this width.

    `clip`: as in CLIP, a causal tower, and both sides have a projection into a shared space; as in SigLIP otherwise,
    where texts come to the pictures. `scale` is the logarithm of the factor of cosines, `bias` is added to every logit.
    Both have one element and an axis, since FSDP2 shards nothing without one.
    """

    def __init__(self, config: Worded, width: int, *, clip: bool = False, scale: float, bias: float | None = None):
        super().__init__()
        begin, end, pad = config.special
        self.tower = TextEncoder(
            TextConfig(
                width=config.text_width,
                depth=config.text_depth,
                heads=config.text_heads,
                hidden=4 * config.text_width,
                vocabulary=config.vocabulary,
                length=config.length,
                causal=clip,
                pooling="end" if clip else "last",
                activation="gelu_quick" if clip else "gelu_tanh",
                eps=1e-5 if clip else 1e-6,
                projection=config.text_width if clip else width,
                projection_bias=not clip,
                begin=None if begin < 0 else begin,
                end=end,
                pad=pad,
            )
        )
        self.projection = Linear(width, config.text_width, bias=False) if clip else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self, pictures: Float[Tensor, "b w"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b 2 d"]:
        """Both sides in the shared space: pictures' embeddings, and texts. Their length means nothing."""
        pictures = pictures if self.projection is None else self.projection(pictures)
        return torch.stack([pictures, self.tower.pooled(tokens).to(pictures.dtype)], 1)

    @torch.no_grad()
    def limit(self, factor: float = 100.0) -> None:
        """Keeps the factor of cosines from growing beyond this, after a step (CLIP, arXiv 2103.00020)."""
        own = self.scale.to_local() if isinstance(self.scale, DTensor) else self.scale
        own.clamp_(max=math.log(factor))

    def pairing(self, tokenizer: Tokenizer) -> Pairing:
        """The same for use: the same weights, by the names and shapes that a `Pairing` has them."""
        with torch.device("meta"):
            tower = TextEncoder(self.tower.config)
            width = None if self.projection is None else self.projection.in_features
            made = Pairing(tower, tokenizer, width, bias=self.bias is not None)
        shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
        own = {NAMES.get(name, name): tensor for name, tensor in self.state_dict().items()}
        made.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in own.items()}, assign=True)
        return made

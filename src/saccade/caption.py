"""A decoder that says a picture's text from its patches (CapPa, arXiv 2306.07915; LocCa, arXiv 2403.19596, less boxes).

A text is said word by word, each token seeing those before it, or all at once: every token is then the mask token,
which sees the places of the others and the picture, but no word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saccade import losses, vit
from saccade.linear import Linear
from saccade.settings import Worded


class CrossAttention(nn.Module):
    """Tokens attend to others of another width, such as a picture's patches."""

    def __init__(self, width: int, heads: int, theirs: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = Linear(width, width), Linear(theirs, 2 * width), Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b l w"], patches: Float[Tensor, "b n d"], seen: Bool[Tensor, "b 1 1 n"] | None
    ) -> Float[Tensor, "b l w"]:
        """`seen`: which of the others there are; None: all."""
        parts = (self.q(x), *self.kv(patches).chunk(2, -1))
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        return self.proj(F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2).flatten(2))


class CaptionBlock(nn.Module):
    """Attention to the text so far, to the picture, and an MLP, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int, theirs: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.attn = vit.Attention(width, heads, "all")
        self.cross = CrossAttention(width, heads, theirs)
        self.mlp = vit.MLP(width, hidden, "gelu_tanh")

    def forward(
        self,
        x: Float[Tensor, "b l w"],
        patches: Float[Tensor, "b n d"],
        before: Bool[Tensor, "b 1 l l"],
        seen: Bool[Tensor, "b 1 1 n"] | None,
    ) -> Float[Tensor, "b l w"]:
        """`before`: which tokens each one attends to; `seen`: which patches there are."""
        x = x + self.attn(self.norm1(x), seen=before)
        x = x + self.cross(self.norm2(x), patches, seen)
        return x + self.mlp(self.norm3(x))


class Captioner(nn.Module):
    """The decoder: as wide as the text tower and half as deep, with words of its own.

    `width` is that of a picture's patches. Names: token_embed (its last row is the mask token), pos_embed, blocks.N,
    norm, word (the way to a vocabulary's logits).
    """

    def __init__(self, config: Worded, width: int):
        super().__init__()
        wide, (self.begin, self.end, self.pad) = config.text_width, config.special
        self.mask = config.vocabulary
        self.token_embed = nn.Embedding(config.vocabulary + 1, wide)
        self.pos_embed = nn.Parameter(torch.empty(1, config.length, wide))
        blocks = (CaptionBlock(wide, config.text_heads, 4 * wide, width) for _ in range(max(1, config.text_depth // 2)))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(wide, 1e-6)
        self.word = Linear(wide, config.vocabulary)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights from torch's generator."""
        vit.initialise(self, "trunc_normal")
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        patches: Float[Tensor, "b n d"],
        at_once: Bool[Tensor, " b"],
        seen: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b l w"]:
        """What `word` makes logits of: at each place those of the token that stands there, which it has not seen.

        `at_once`: whose words are all predicted in parallel; `seen`: which patches are no padding, None: all.
        """
        so_far = F.pad(tokens[:, :-1], (1, 0), value=self.pad)
        x = self.token_embed(torch.where(at_once[:, None], self.mask, so_far)) + self.pos_embed[:, : tokens.shape[1]]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        before = (places <= places[:, None]) | at_once[:, None, None, None]
        patches_seen = None if seen is None else seen[:, None, None]
        for block in self.blocks:
            x = block(x, patches, before, patches_seen)
        return self.norm(x)

    def loss(
        self,
        tokens: Int[Tensor, "b l"],
        patches: Float[Tensor, "b n d"],
        at_once: Bool[Tensor, " b"],
        seen: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of a text's words and its end, meant over them and then over texts."""
        counted = self.counted(tokens)
        share = (counted.double() / (counted.sum(1, keepdim=True).clamp(min=1) * len(tokens)))[counted]
        x = self(tokens, patches, at_once, seen)[counted]
        return losses.vocabulary(x, self.word.weight, self.word.bias, tokens[counted], share)

    def counted(self, tokens: Int[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """Which tokens are to be said: not the begin, and nothing after the first end."""
        ends = tokens == self.end
        return (ends.cumsum(1) - ends.long() == 0) & (tokens != self.begin)

"""Text towers (CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343) from the ViT's block, and what makes pairs of them.

Parameter names: token_embed, pos_embed [1 L W], blocks.N.* as in `vit`, norm, head (the way into the space shared with
pictures). SigLIP's towers look both ways and pool the last token, padding too; CLIP's look back only and pool the
end-of-text token, so that what follows it does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.linear import Linear
from saccade.settings import Settings
from saccade.tokenizer import Encoded, Tokenizer
from saccade.vit import Activation, Block, Features, initialise


class TextFeatures(NamedTuple):
    """What a text tower says: one vector a text, in the shared space where there is a head, and all tokens, normed."""

    pooled: Float[Tensor, "b d"]
    tokens: Float[Tensor, "b l w"]


class TextConfig(Settings):
    """Every switch of a text tower. Raises `SaccadeError` when two of them do not fit."""

    width: int = Field(512, ge=1, description="width of a token")
    depth: int = Field(12, ge=1, description="number of blocks")
    heads: int = Field(8, ge=1, description="attention heads")
    hidden: int = Field(2048, ge=1, description="width inside the MLP")
    vocabulary: int = Field(49408, ge=1, description="rows of the table of tokens")
    length: int = Field(77, ge=1, description="tokens of a text, the longest it reads")
    causal: bool = Field(False, description="a token sees those before it only (CLIP)")
    pooling: Literal["last", "end"] = Field("last", description="the one vector: last token, or first end-of-text")
    activation: Activation = Field("gelu_tanh", description="of the MLP, as in a ViT")
    eps: float = Field(1e-6, gt=0, description="of every layer norm")
    projection: int | None = Field(None, ge=1, description="width of the shared space; None: no head")
    projection_bias: bool = Field(True, description="bias of the head")
    begin: int | None = Field(None, ge=0, description="token before every text; None: there is none")
    end: int = Field(1, ge=0, description="token after every text")
    pad: int = Field(0, ge=0, description="token that fills up to the length")

    @model_validator(mode="after")
    def _fits(self) -> TextConfig:
        if self.width % self.heads:
            raise SaccadeError(f"width {self.width} is not divisible by {self.heads} heads", path="heads")
        for name in ("begin", "end", "pad"):
            token = getattr(self, name)
            if token is not None and token >= self.vocabulary:
                raise SaccadeError(f"token {token} is not among {self.vocabulary}", path=name)
        return self

    @property
    def out(self) -> int:
        """Width of the one vector."""
        return self.width if self.projection is None else self.projection


class TextEncoder(nn.Module):
    """A text tower: tokens to `TextFeatures`. `tower.config` says all about it; it can be built on the meta device."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocabulary, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.length, config.width))
        switches = config.model_dump(include={"activation", "eps", "causal"})
        blocks = (Block(config.width, config.heads, config.hidden, **switches) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width, config.eps)
        out = config.projection
        self.head = None if out is None else Linear(config.width, out, config.projection_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights from torch's generator: also what a tower made on the meta device needs."""
        initialise(self, "trunc_normal")
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def forward(self, tokens: Int[Tensor, "b l"]) -> TextFeatures:
        """One vector a text and every token. Raises `SaccadeError` for more tokens than there are positions."""
        x = self._enter(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return TextFeatures(self._head(x.gather(1, self._rows(tokens)[..., None].expand(-1, -1, x.shape[2]))), x)

    def pooled(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """The one vector a text, and nothing that it does not need."""
        x = self._enter(tokens)
        for block in self.blocks[:-1]:
            x = block(x)
        return self._head(self.norm(self.blocks[-1](x, rows=self._rows(tokens))))

    def _enter(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l w"]:
        length = tokens.shape[1]
        if length > self.config.length:
            raise SaccadeError(
                f"a text of {length} tokens is longer than the {self.config.length} that this tower reads",
                path="tokens",
                hint="encode(texts, length) cuts",
            )
        return self.token_embed(tokens) + self.pos_embed[:, :length]

    def _rows(self, tokens: Int[Tensor, "b l"]) -> Int[Tensor, "b 1"]:
        """Which token of a text stands for it."""
        if self.config.pooling == "last":
            return torch.full_like(tokens[:, :1], tokens.shape[1] - 1, dtype=torch.long)
        return (tokens == self.config.end).to(torch.int32).argmax(1, keepdim=True)

    def _head(self, x: Float[Tensor, "b 1 w"]) -> Float[Tensor, "b d"]:
        return (x if self.head is None else self.head(x))[:, 0]


class Reader(nn.Module):
    """A text tower alone: tokens to `Features`, whose class token is the mean of the words, as `config` tells them."""

    def __init__(self, tower: TextEncoder):
        super().__init__()
        self.tower, self.config = tower, tower.config

    def forward(self, tokens: Int[Tensor, "b l"]) -> Features:
        """The words are the patches, in one row."""
        x = self.tower(tokens).tokens
        special = torch.tensor([self.config.end, self.config.pad, self.config.begin or self.config.end])
        word = ~torch.isin(tokens, special.to(tokens))[..., None]
        place = torch.arange(x.shape[1], device=x.device)
        positions = torch.stack([torch.zeros_like(place), place], 1).expand(len(x), -1, -1)
        return Features((x * word).sum(1) / word.sum(1).clamp(min=1), x[:, :0], x, positions, (1, x.shape[1]))

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The one vector of each text."""
        assert features.cls is not None
        return features.cls

    def pairing(self, tokenizer: Tokenizer) -> Pairing:
        """The same weights as they lie on disk, with no pictures to compare them to."""
        with torch.device("meta"):
            tower = TextEncoder(self.config)
        tower.load_state_dict(self.tower.state_dict(), assign=True)
        return Pairing(tower, tokenizer)


class Pairing(nn.Module):
    """What makes an image encoder one of pictures and words: text tower, tokenizer, and how the two are compared.

    `projection` takes pictures' embeddings into the shared space (CLIP; None: they are in it), `logit_scale` is the
    logarithm of the inverse temperature, `logit_bias` is added to every logit (SigLIP; None: nothing is).
    """

    def __init__(
        self,
        tower: TextEncoder,
        tokenizer: Tokenizer | None = None,
        projection: int | None = None,
        bias: bool = False,
    ):
        """`projection`: width of pictures' embeddings where they have a way of their own into the shared space."""
        super().__init__()
        self.tower, self.tokenizer = tower, tokenizer
        self.projection = None if projection is None else Linear(projection, tower.config.out, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if bias else None

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Texts as tokens, where the tower lives. Raises `SaccadeError` without a tokenizer."""
        return self._encoded(texts).tokens.to(self.logit_scale.device)

    def cut(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Which of these texts are longer than the tower reads. Raises `SaccadeError` without a tokenizer."""
        return self._encoded(texts).cut

    def _encoded(self, texts: Sequence[str]) -> Encoded:
        if self.tokenizer is None:
            raise SaccadeError(
                "this text tower has no tokenizer",
                path="tokenizer",
                hint="put its tokenizer.json (or spiece.model, or vocab.json and merges.txt) beside the weights",
            )
        return self.tokenizer.encode(texts, self.tower.config.length)

    def forward(self, texts: Sequence[str] | Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Texts, or their tokens, as vectors of length 1 in the shared space."""
        tokens = texts if isinstance(texts, Tensor) else self.tokens(texts)
        return F.normalize(self.tower.pooled(tokens), dim=-1)

    def images(self, embeddings: Float[Tensor, "b w"]) -> Float[Tensor, "b d"]:
        """Embeddings of pictures as vectors of length 1 in the shared space."""
        return F.normalize(embeddings if self.projection is None else self.projection(embeddings), dim=-1)

    def logits(self, images: Float[Tensor, "b d"], texts: Float[Tensor, "c d"]) -> Float[Tensor, "b c"]:
        """How well each picture and each text fit, from their vectors: for softmax (CLIP) or sigmoid (SigLIP)."""
        logits = images @ texts.mT * self.logit_scale.exp()
        return logits if self.logit_bias is None else logits + self.logit_bias

"""Masked words: hide some words of a text, and guess them from all others.  BERT, arXiv 1810.04805

Without BERT's second task, which asks whether two sentences follow each other. Of every text as large a part is hidden,
and every text weighs alike, so that the loss is the same on any number of ranks and micro-batches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from saccade import recipe
from saccade.data import Batch
from saccade.draws import Draws
from saccade.errors import SaccadeError
from saccade.text import Reader, TextConfig, TextEncoder


class Config(recipe.Worded):
    """BERT-base on pieces of 128 words, as in nine tenths of its training."""

    arch: str = Field("text", description="none: what is built is said by text_width, text_depth and text_heads")
    batch: int = Field(256, ge=1, description="pieces an optimizer step, over all ranks and accumulation together")
    steps: int | None = Field(1_000_000, ge=1, description="length in optimizer steps")
    lr: float = Field(1e-4, gt=0, description="learning rate at batch 256; scaled linearly with the batch")
    warmup: float = Field(0.01, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay, on matrices only")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
    vocabulary: int = Field(30000, ge=516, description="words of a tokenizer that is trained; a given one has its own")
    length: int = Field(128, ge=3, description="tokens of a piece")
    text_width: int = Field(768, ge=1, description="width of a text's token")
    text_heads: int = Field(12, ge=1, description="attention heads of the text tower")
    hidden: float = Field(0.15, gt=0, lt=1, description="part of a text's tokens that is to be guessed")
    masked: float = Field(0.8, ge=0, le=1, description="part of these that is hidden")
    exchanged: float = Field(0.1, ge=0, le=1, description="part of these that is any other token; the rest is shown")

    def pieces(self) -> int:
        """Four letters a word; a piece reads on where that does not fill it."""
        return 4 * self.length

    def chosen(self) -> int:
        """How many tokens of a whole piece are guessed."""
        return max(1, round(self.hidden * (self.length - 2)))


def small_machine() -> Config:
    """A few CPU cores: short pieces, few words, a small tower."""
    text: dict[str, Any] = {"vocabulary": 2048, "length": 64, "text_width": 128, "text_depth": 2, "text_heads": 4}
    return Config(**text, batch=32, steps=None, epochs=30, lr=8e-3, beta2=0.98, warmup=0.05)


def views(config: Config, batch: Batch, draws: Draws) -> Batch:
    """Tokens [B L] of which some are hidden, the `places` [B K] of these, and what stood there (-100: no word)."""
    tokens = batch["text"].long()
    begin, end, pad = config.special
    word = (tokens != begin) & (tokens != end) & (tokens != pad)
    count = config.chosen()
    order = draws.sample("hide").order(config.length).to(tokens.device)
    order = order.gather(1, (~word).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))  # words first
    places = order[:, :count]
    wanted = (config.hidden * word.sum(1)).round().clamp(min=1, max=count)
    guessed = (torch.arange(count, device=tokens.device) < wanted[:, None]) & word.gather(1, places)
    truth = tokens.gather(1, places)
    chance = draws.sample("how").uniform(count).to(tokens.device)
    other = draws.sample("word").integers(count, config.vocabulary).to(tokens.device)
    shown = torch.where(chance < config.masked, config.mask, truth)
    shown = torch.where((chance >= config.masked) & (chance < config.masked + config.exchanged), other, shown)
    seen = tokens.scatter(1, places, torch.where(guessed, shown, truth))
    return {"tokens": seen, "places": places, "truth": truth.where(guessed, -100)}


class Method(recipe.Method):
    """A text tower that looks both ways, and a head that ends in the table of words itself."""

    def __init__(self, config: Config, backbone: None, teachers: dict[str, Any]):
        super().__init__(config, backbone, teachers)
        if config.mask < 0:
            raise SaccadeError("this tokenizer has no word for what is hidden", path="--tokenizer",
                               hint="leave it out: one is trained")  # fmt: skip
        begin, end, pad = config.special
        width = config.text_width
        shape = {"width": width, "hidden": 4 * width, "depth": config.text_depth, "heads": config.text_heads}
        special = {"begin": None if begin < 0 else begin, "end": end, "pad": pad}
        table = {"vocabulary": config.vocabulary, "length": config.length, "activation": "gelu"}
        self.reader = Reader(TextEncoder(TextConfig(**shape, **special, **table)))
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width, 1e-6)
        nn.init.trunc_normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    def encoder(self) -> Reader:
        """Texts to `Features`."""
        return self.reader

    def words(self) -> Reader:
        """The tower is all that comes out."""
        return self.reader

    def chance(self) -> dict[str, float]:
        """Any word as likely as another."""
        return {"loss": math.log(len(self.bias))}

    def guess(self, tokens: Int[Tensor, "b l"], places: Int[Tensor, "b k"]) -> Float[Tensor, "b k v"]:
        """Logits of what stands at these places."""
        x = self.reader.tower(tokens).tokens
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return self.norm(F.gelu(self.transform(x))) @ self.reader.tower.token_embed.weight.T + self.bias

    def forward(self, batch: Batch, t: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy of hidden words, meant over a text's, then over texts; and how many are guessed, in percent."""
        logits, truth = self.guess(batch["tokens"], batch["places"]), batch["truth"]
        asked = truth >= 0
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        share = asked.to(exact.dtype) / (asked.sum(1, keepdim=True).clamp(min=1) * len(truth))
        loss = F.cross_entropy(exact, truth.flatten(), reduction="none", ignore_index=-100)
        right = (logits.detach().argmax(2) == truth) * share
        return (loss * share.flatten()).sum(), {"accuracy": 100 * right.sum()}

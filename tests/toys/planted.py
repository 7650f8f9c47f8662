"""An encoder whose text tower knows colours: it says of a word what the image tower makes of that colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from saccade import vit
from saccade.encoder import Encoder
from saccade.text import Pairing, TextConfig, TextEncoder
from saccade.tokenizer import Tokenizer

COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210), "white": (250, 250, 250),
    "black": (5, 5, 5), "yellow": (230, 220, 20), "pink": (250, 130, 200),
}  # fmt: skip


class Planted(Pairing):
    """Knows the colours that stand in a text, and nothing else of it; without one it says the same of every text."""

    def __init__(self, vectors: dict[str, Tensor], tokenizer: Tokenizer):
        config = TextConfig(
            width=8, depth=1, heads=1, hidden=8, vocabulary=tokenizer.vocabulary, length=64, end=tokenizer.end,
            pad=tokenizer.pad,
        )  # fmt: skip
        super().__init__(TextEncoder(config), tokenizer)
        self.vectors, self.seen = vectors, list[str]()

    def forward(self, tokens: Any) -> Tensor:
        texts = self.tokenizer.decode(tokens)
        self.seen += texts
        return F.normalize(torch.stack([self._of(text) for text in texts]), dim=-1)

    def _of(self, text: str) -> Tensor:
        known = [vector for word, vector in self.vectors.items() if word in text]
        return torch.stack(known).sum(0) if known else torch.ones_like(next(iter(self.vectors.values())))


def planted(wrong: dict[str, str] | None = None) -> Encoder:
    """The encoder; `wrong` are words that it takes for others."""
    torch.manual_seed(0)
    encoder = Encoder(vit.build("vit-ti/4", image_size=16, width=32, depth=1, heads=2, hidden=32), {}).eval()
    with torch.no_grad():
        images = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 16, 16)
        vectors = F.normalize(encoder.backbone.pooled(images), dim=-1)
    said = dict(zip(COLOURS, vectors, strict=True))
    said |= {word: said[other] for word, other in (wrong or {}).items()}
    tokenizer = Tokenizer.train([f"a photo of {word}" for word in COLOURS] * 3, 600)
    encoder.text = Planted(said, tokenizer)
    return encoder


def plain(path: Path, colour: str) -> Path:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 18), COLOURS[colour]).save(path)
    return path

"""What a method learns of texts: a tower, the way into the space shared with pictures, and how the two are compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from saccade.errors import SaccadeError
from saccade.linear import Linear
from saccade.settings import Worded
from saccade.text import Pairing, TextConfig, TextEncoder
from saccade.tokenizer import Tokenizer

FORMAT = "saccade text 1"


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

    def pairing(self, tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> Pairing:
        """The same for use, with these weights: those of this module, gathered."""
        with torch.device("meta"):
            tower = TextEncoder(self.tower.config)
            width = None if self.projection is None else self.projection.in_features
            made = Pairing(tower, tokenizer, width, bias=self.bias is not None)
        named = {"scale": "logit_scale", "bias": "logit_bias"}
        own = {named.get(name, name): x.reshape(()) if name in named else x for name, x in tensors.items()}
        made.load_state_dict(own, assign=True)
        return made


def save_words(folder: Path, pairing: Pairing, record: dict[str, Any]) -> None:
    """Writes model.safetensors, config.json and the tokenizer's files. `record` is that of the pictures' backbone."""
    assert pairing.tokenizer is not None
    folder.mkdir(parents=True, exist_ok=True)
    pairing.tokenizer.save(folder)
    new = folder / "model.safetensors.new"
    save_file({name: x.detach().cpu().contiguous() for name, x in pairing.state_dict().items()}, new)
    config = {
        "format": FORMAT,
        "text": pairing.tower.config.model_dump(mode="json"),
        "projection": None if pairing.projection is None else pairing.projection.in_features,
        "bias": pairing.logit_bias is not None,
        "weights": {"blake3": blake3(new.read_bytes()).hexdigest(), "bytes": new.stat().st_size},
        "record": record,
    }
    (folder / "config.json.new").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(new, folder / "model.safetensors")
    os.replace(folder / "config.json.new", folder / "config.json")


def load_words(folder: Path) -> Pairing:
    """What `save_words` wrote. Raises `SaccadeError` for what is missing, damaged, or no such folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content = (folder / "model.safetensors").read_bytes()
        if config["format"] != FORMAT or config["weights"]["blake3"] != blake3(content).hexdigest():
            raise ValueError("it is not what was saved")
        with torch.device("meta"):
            tower = TextEncoder(TextConfig(**config["text"]))
            made = Pairing(tower, Tokenizer.load(folder), config["projection"], bias=config["bias"])
        made.load_state_dict(load(content), assign=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise SaccadeError(f"{folder} holds no readable text tower: {error}", path=folder) from None
    return made.eval()

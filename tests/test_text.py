"""Text towers: what they see, what they pool, and the pairing with an image encoder."""

from __future__ import annotations

import pytest
import torch

from saccade import vit
from saccade.errors import SaccadeError
from saccade.text import Pairing, TextConfig, TextEncoder
from saccade.tokenizer import Tokenizer

SHAPE = {"width": 32, "depth": 2, "heads": 4, "hidden": 48, "vocabulary": 50, "length": 8}
CLIP = {"causal": True, "pooling": "end", "begin": 48, "end": 49, "pad": 49, "projection_bias": False}


def _tower(**changes: object) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(**(SHAPE | {"projection": 16} | changes))).double()


def _tokens() -> torch.Tensor:
    tokens = torch.randint(2, 48, (3, 8), generator=torch.Generator().manual_seed(1))
    tokens[0, 3:], tokens[1, 7], tokens[2, 1:] = 49, 49, 49
    return tokens


def test_the_blocks_are_the_vit_s() -> None:
    assert all(isinstance(block, vit.Block) for block in _tower().blocks)


def test_on_the_meta_device_and_from_a_seed() -> None:
    with torch.device("meta"):
        hollow = TextEncoder(TextConfig(**SHAPE, projection=16))
    assert all(tensor.is_meta for tensor in hollow.parameters())
    hollow.to_empty(device="cpu")
    torch.manual_seed(0)
    hollow.reset_parameters()
    torch.manual_seed(0)
    again = TextEncoder(TextConfig(**SHAPE, projection=16))
    again.reset_parameters()
    torch.manual_seed(0)
    again.reset_parameters()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, hollow.state_dict()[name]), name


@torch.no_grad()
def test_a_causal_tower_does_not_see_what_follows() -> None:
    tower, tokens = _tower(**CLIP), _tokens()
    before = tower(tokens)
    other = tokens.clone()
    other[:, 5] = 7
    after = tower(other)
    torch.testing.assert_close(after.tokens[:, :5], before.tokens[:, :5])
    assert (after.tokens[:, 5:] - before.tokens[:, 5:]).abs().amin((1, 2)).gt(0).all()
    torch.testing.assert_close(after.pooled[[0, 2]], before.pooled[[0, 2]])  # their texts end before
    assert (after.pooled[1] - before.pooled[1]).abs().max() > 1e-3
    both = _tower(**(CLIP | {"causal": False}))
    assert (both(other).tokens[:, 0] - both(tokens).tokens[:, 0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("switches", [{}, CLIP, {"projection": None}, CLIP | {"pooling": "last"}])
def test_pooled_alone_is_pooled(switches: dict[str, object]) -> None:
    tower, tokens = _tower(**switches), _tokens()
    features = tower(tokens)
    torch.testing.assert_close(tower.pooled(tokens), features.pooled, atol=1e-12, rtol=0)
    assert features.tokens.shape == (3, 8, 32) and features.pooled.shape == (3, tower.config.out)
    row = {"end": torch.tensor([3, 7, 1]), "last": torch.tensor([7, 7, 7])}[tower.config.pooling]
    pooled = features.tokens[torch.arange(3), row]
    torch.testing.assert_close(pooled if tower.head is None else tower.head(pooled), features.pooled)


@torch.no_grad()
def test_causal_attention_says_its_weights() -> None:
    attention, x = _tower(**CLIP).blocks[0].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    weights = attention.weights(x)
    assert weights.triu(1).abs().max() == 0 and torch.allclose(weights.sum(-1), torch.ones(2, 4, 5).double())
    torch.testing.assert_close(attention.weights(x, rows=slice(2, 3)), weights[:, :, 2:3])
    value = x @ attention.qkv.weight[64:].T + attention.qkv.bias[64:]
    mixed = (weights @ value.unflatten(-1, (4, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(mixed), attention(x))


def test_every_parameter_is_reached() -> None:
    pairing = Pairing(_tower(), projection=24, bias=True).double()
    images = pairing.images(torch.randn(2, 24, dtype=torch.float64))
    pairing.logits(images, pairing(_tokens())).square().sum().backward()
    assert not [name for name, tensor in pairing.named_parameters() if tensor.grad is None]


@torch.no_grad()
def test_a_pairing_compares_directions() -> None:
    pairing = Pairing(_tower(), bias=True).double()
    pairing.logit_scale.fill_(2.0)
    pairing.logit_bias.fill_(-3.0)
    texts = pairing(_tokens())
    logits = pairing.logits(pairing.images(texts * 7), texts)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3).double())
    torch.testing.assert_close(logits.diagonal(), torch.full((3,), 2.0).double().exp() - 3)


def test_mistakes_are_named() -> None:
    with pytest.raises(SaccadeError, match="not divisible by 5 heads"):
        TextConfig(**(SHAPE | {"heads": 5}))
    with pytest.raises(SaccadeError, match="token 50 is not among 50"):
        TextConfig(**SHAPE, end=50)
    with pytest.raises(SaccadeError, match="9 tokens is longer than the 8"):
        _tower()(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(SaccadeError, match="no tokenizer"):
        Pairing(_tower())(["a cat"])


@torch.no_grad()
def test_texts_go_in_as_words() -> None:
    tokenizer = Tokenizer.train(["a cat", "a dog"], vocabulary=600)
    tower = _tower(vocabulary=600, begin=tokenizer.begin, end=tokenizer.end, pad=tokenizer.pad, pooling="end")
    pairing = Pairing(tower, tokenizer)
    found = pairing(["a cat", "a dog", "a cat"])
    assert torch.equal(found[0], found[2]) and (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(found, pairing(tokenizer.encode(["a cat", "a dog", "a cat"], 8).tokens))

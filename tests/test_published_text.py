"""Text towers of CLIP, SigLIP and SigLIP 2 NaFlex against transformers' own networks with every tensor redrawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_clip import MEAN_STD, NUMBERS, _apart, _images, _redrawn, _saved
from test_tokenizer import _clip_files
from torch import Tensor

from saccade import pair_losses, pairing, published, weights
from saccade.errors import SaccadeError
from saccade.published import texts
from saccade.text import TextConfig

transformers = pytest.importorskip("transformers")

FAMILIES = ["clip", "siglip", "siglip2-naflex"]
TOWER = {name: NUMBERS[name] for name in list(NUMBERS)[:4]} | {"vocab_size": 99, "max_position_embeddings": 8}
TOWER |= {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3}
PARITY = Path(__file__).parent / "parity"


def _model(family: str, **text: Any) -> Any:
    """A whole network, its text tower of another width, depth and number of heads than the image tower."""
    if family == "clip":
        config = transformers.CLIPConfig(
            vision_config=dict(NUMBERS), text_config=TOWER | {"eos_token_id": 98} | text, projection_dim=16
        )
        network = transformers.CLIPModel(config)
    elif family == "siglip":
        # the two meet in the width of pictures
        config = transformers.SiglipConfig(
            vision_config=dict(NUMBERS), text_config=TOWER | {"projection_size": 32} | text
        )
        network = transformers.SiglipModel(config)
    else:
        vision = {name: value for name, value in NUMBERS.items() if name != "image_size"} | {"num_patches": 16}
        config = transformers.Siglip2Config(vision_config=vision, text_config=TOWER | {"projection_size": 32} | text)
        network = transformers.Siglip2Model(config)
    _redrawn(network)
    with torch.no_grad():
        network.logit_scale.fill_(1.3)
        if family != "clip":
            network.logit_bias.fill_(-2.1)
    return network


def _tokens() -> Tensor:
    """Texts with their end in several places, and more ends behind it, as CLIP is padded."""
    tokens = torch.randint(2, 98, (4, 8), generator=torch.Generator().manual_seed(2))
    tokens[0, 3:], tokens[1, 7], tokens[2, 1:], tokens[3, 5] = 98, 98, 98, 98
    return tokens


@torch.no_grad()
def _theirs(family: str, network: Any, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    mean, std = (
        torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in MEAN_STD[family.partition("2-")[0]]
    )
    pixels = {"pixel_values": (images - mean) / std}
    if family == "siglip2-naflex":
        cells = pixels["pixel_values"].reshape(len(images), 3, 4, 8, 4, 8)
        pixels["pixel_values"] = torch.einsum("bcrpsq->brspqc", cells).reshape(len(images), 16, -1)
        pixels["pixel_attention_mask"] = torch.ones(len(images), 16)
        pixels["spatial_shapes"] = torch.full((len(images), 2), 4)
    out = network(input_ids=tokens, **pixels)
    return {
        "logits": out.logits_per_image,
        "texts": out.text_embeds,
        "images": out.image_embeds,
        "tokens": out.text_model_output.last_hidden_state,
    }


@torch.no_grad()
def _ours(encoder: Any, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    return {
        "logits": encoder.logits(images, tokens),
        "texts": encoder.text(tokens),
        "images": encoder.pair(images),
        "tokens": encoder.text.tower(tokens).tokens,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str, tmp_path: Path) -> None:
    network = _model(family)
    encoder = weights.load(_saved(network, tmp_path / family))
    theirs = _theirs(family, network, _images(), _tokens())
    assert theirs["logits"].std() > 0.05 and theirs["texts"].std(0).max() > 0.05
    assert _apart(_ours(encoder, _images(), _tokens()), theirs) < 1e-5
    said = encoder.record["text"]
    assert (encoder.record["family"], said["naming"]) == (family, "transformers")
    assert said["matched"] == sum("vision_model" not in name for name in network.state_dict())
    assert (said["missing"], said["unexpected"], said["tokenizer"]) == ([], [], None)
    assert (said["width"], said["depth"], said["heads"], said["vocabulary"], said["length"]) == (24, 3, 3, 99, 8)
    json.dumps(encoder.record)


@pytest.mark.parametrize("family", FAMILIES)
def test_and_in_float64(family: str, tmp_path: Path) -> None:
    """The image towers' mean and spread are kept in float32, which is exact for SigLIP alone."""
    network = _model(family)
    encoder = weights.load(_saved(network, tmp_path / family)).double()
    network.double()
    theirs = _theirs(family, network, _images().double(), _tokens())
    for buffer, values in zip((encoder.backbone.mean, encoder.backbone.std), MEAN_STD.get(family, ()), strict=False):
        buffer.copy_(torch.tensor(values, dtype=torch.float64))
    ours = _ours(encoder, _images().double(), _tokens())
    assert theirs["logits"].dtype == torch.float64
    assert _apart(ours, theirs) < (1e-8 if family != "siglip2-naflex" else 1e-6)  # whose positions are float32's


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_loss_of_a_batch_and_every_gradient_are_transformers(family: str, tmp_path: Path) -> None:
    """Its model with `return_loss`, in float64; gradients come to our names as tensors do."""
    network = _model(family)
    encoder = weights.load(_saved(network, tmp_path / family)).double()
    network.double()
    mean, std = (buffer.view(3, 1, 1) for buffer in (encoder.backbone.mean, encoder.backbone.std))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    found = network(input_ids=_tokens(), pixel_values=(images - mean) / std, return_loss=True)
    found.loss.backward()
    pairs, scale = torch.stack([encoder.pair(images), encoder.text(_tokens())], 1), encoder.text.logit_scale.exp()
    if family == "clip":
        loss, _ = pair_losses.contrast(pairs, scale, torch.arange(4)[:, None])
    else:
        loss, _ = pair_losses.sigmoid(pairs, scale, encoder.text.logit_bias, torch.arange(4)[:, None])
    loss.backward()
    torch.testing.assert_close(loss, found.loss, rtol=1e-8, atol=0)
    gradients = {name: tensor.grad for name, tensor in network.named_parameters()}
    image = published.families()[family].namings["transformers"]
    right = {f"backbone.{name}": each for name, each in published.to_ours(image, gradients, "vision_model.").items()}
    text = published.to_ours(texts.TOWERS[family].namings["transformers"], gradients)
    right |= {f"text.{name}": each for name, each in text.items()}
    own = dict(encoder.named_parameters())
    assert own.keys() == right.keys() and len(own) > 60
    for name, wanted in right.items():
        torch.testing.assert_close(own[name].grad, wanted, rtol=1e-8, atol=1e-8 * max(1e-4, wanted.abs().max().item()))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensors_exchanged_give_other_texts(family: str, tmp_path: Path) -> None:
    network = _model(family)
    encoder = weights.load(_saved(network, tmp_path / family))
    tensors = load_file(tmp_path / family / "model.safetensors")
    naming = texts.TOWERS[family].namings["transformers"]
    right = _theirs(family, network, _images(), _tokens())
    some = sorted(
        (tensors[name].shape, name) for name in tensors if name.startswith("text_model.") and ".1." not in name
    )
    swapped = 0
    for step in (1, 2, 3):
        for (shape, one), (other_shape, other) in zip(some, some[step:], strict=False):
            if shape != other_shape:
                continue
            exchanged = tensors | {one: tensors[other], other: tensors[one]}
            encoder.text.load_state_dict(published.to_ours(naming, exchanged))
            found = _ours(encoder, _images(), _tokens())
            assert _apart({"t": found["texts"]}, {"t": right["texts"]}) > 1e-3, (one, other)
            swapped += 1
    assert swapped > 24
    encoder.text.load_state_dict(published.to_ours(naming, tensors))
    assert _apart(_ours(encoder, _images(), _tokens()), right) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_naming_is_a_round_trip(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = published.families()["siglip"]
    monkeypatch.setitem(known.sizes, "tiny", published.Size(24, 3, 3, 48, 8, 32, 0))  # big_vision asks for its heads
    encoder = weights.load(_saved(_model(family), tmp_path / family))
    ours = encoder.text.state_dict()
    for name, naming in texts.TOWERS[family].namings.items():
        for prefix in naming.prefixes:
            theirs = published.to_theirs(naming, ours, prefix)
            again = published.to_ours(naming, theirs, prefix)
            assert again.keys() == ours.keys(), name
            assert all(torch.equal(again[key], ours[key]) for key in ours)
            assert not published.sort(naming, published.unstacked(naming, theirs), prefix).unexpected
            found = published.Recognised(published.families()[family], "any", None, {}, None)  # type: ignore[arg-type]
            said = {"text_config": {"num_attention_heads": 3, "eos_token_id": 98}, "model_type": "any"}
            tower, record = pairing.find(found, theirs, said, tmp_path)
            assert tower is not None, record
            assert record["naming"] == name and torch.equal(tower(_tokens()), encoder.text(_tokens()))
            missing = dict(theirs)
            del missing[next(key for key in theirs if "ln_final" in key or "final_layer" in key or "r_norm" in key)]
            tower, record = pairing.find(found, missing, said, tmp_path)
            assert tower is None and record["missing"] and "not whole" in record["refused"]


def _official(tensors: dict[str, Tensor], before: str = "") -> dict[str, Tensor]:
    """transformers' text tower as OpenAI names it, written from the fact sheet."""
    inside = {name.removeprefix("text_model."): x for name, x in tensors.items() if name.startswith("text_model.")}
    out = {
        f"{before}token_embedding.weight": inside["embeddings.token_embedding.weight"],
        f"{before}positional_embedding": inside["embeddings.position_embedding.weight"],
        "logit_scale": tensors["logit_scale"].reshape(()),
    }
    for kind in ("weight", "bias"):
        out[f"{before}ln_final.{kind}"] = inside[f"final_layer_norm.{kind}"]
        for n in range(3):
            ours, theirs = f"{before}transformer.resblocks.{n}", f"encoder.layers.{n}"
            parts = [inside[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            out[f"{ours}.attn.in_proj_{kind}"] = torch.cat(parts)
            out[f"{ours}.attn.out_proj.{kind}"] = inside[f"{theirs}.self_attn.out_proj.{kind}"]
            out[f"{ours}.ln_1.{kind}"] = inside[f"{theirs}.layer_norm1.{kind}"]
            out[f"{ours}.ln_2.{kind}"] = inside[f"{theirs}.layer_norm2.{kind}"]
            out[f"{ours}.mlp.c_fc.{kind}"] = inside[f"{theirs}.mlp.fc1.{kind}"]
            out[f"{ours}.mlp.c_proj.{kind}"] = inside[f"{theirs}.mlp.fc2.{kind}"]
    return out


@pytest.mark.parametrize("before", ["", "text."])
def test_an_official_clip_file(before: str, tmp_path: Path) -> None:
    network = _model("clip", eos_token_id=2)  # which means the last of the vocabulary
    tensors = network.state_dict()
    naming = published.families()["clip"].namings
    encoder = weights.load(_saved(network, tmp_path / "theirs"))
    visual = published.to_theirs(naming["official"], encoder.backbone.state_dict(), "visual.")
    visual |= {"visual.proj": tensors["visual_projection.weight"].T.contiguous()}
    out = _official(tensors, before) | {f"{before}text_projection": tensors["text_projection.weight"].T.contiguous()}
    folder = tmp_path / "given"
    folder.mkdir()
    config = {"num_attention_heads": 4, "text_config": {"num_attention_heads": 3}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(visual | out | {"context_length": torch.tensor(8)}, folder / "ViT-B-32.pt")
    again = weights.load(folder / "ViT-B-32.pt")
    assert again.record["text"]["naming"] == ("open_clip" if before else "official")
    theirs = _theirs("clip", network, _images(), _tokens())
    assert _apart(_ours(encoder, _images(), _tokens()), theirs) < 1e-5
    assert _apart(_ours(again, _images(), _tokens()), theirs) < 1e-5


def _big_vision(tensors: dict[str, Tensor], heads: int = 3) -> dict[str, np.ndarray]:
    """transformers' text tower as big_vision keeps it, layers apart, written from the fact sheet."""
    inside = {name.removeprefix("text_model."): x.numpy() for name, x in tensors.items() if "text_model." in name}
    out = {
        "Embed_0/embedding": inside["embeddings.token_embedding.weight"],
        "pos_embedding": inside["embeddings.position_embedding.weight"][None],
        "Encoder_0/encoder_norm/scale": inside["final_layer_norm.weight"],
        "Encoder_0/encoder_norm/bias": inside["final_layer_norm.bias"],
        "head/kernel": inside["head.weight"].T,
        "head/bias": inside["head.bias"],
    }
    for n in range(3):
        ours, theirs = f"Encoder_0/encoderblock_{n}", f"encoder.layers.{n}"
        for number, norm in ((0, "layer_norm1"), (1, "layer_norm2")):
            out[f"{ours}/LayerNorm_{number}/scale"] = inside[f"{theirs}.{norm}.weight"]
            out[f"{ours}/LayerNorm_{number}/bias"] = inside[f"{theirs}.{norm}.bias"]
            dense = f"{ours}/MlpBlock_0/Dense_{number}"
            out[f"{dense}/kernel"] = inside[f"{theirs}.mlp.fc{number + 1}.weight"].T
            out[f"{dense}/bias"] = inside[f"{theirs}.mlp.fc{number + 1}.bias"]
        for part, word in (("q", "query"), ("k", "key"), ("v", "value")):
            kernel, bias = (inside[f"{theirs}.self_attn.{part}_proj.{kind}"] for kind in ("weight", "bias"))
            mixer = f"{ours}/MultiHeadDotProductAttention_0"
            out[f"{mixer}/{word}/kernel"] = kernel.T.reshape(24, heads, -1)
            out[f"{mixer}/{word}/bias"] = bias.reshape(heads, -1)
        kernel, bias = (inside[f"{theirs}.self_attn.out_proj.{kind}"] for kind in ("weight", "bias"))
        out[f"{mixer}/out/kernel"], out[f"{mixer}/out/bias"] = kernel.T.reshape(heads, -1, 24), bias
    scalars = {"params/t": tensors["logit_scale"].numpy(), "params/b": tensors["logit_bias"].numpy()}
    return {f"params/txt/{name}": array for name, array in out.items()} | scalars


@pytest.mark.parametrize("stacked", [False, True])
def test_the_authors_own_siglip_file(stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published.families()["siglip"].sizes, "tiny", published.Size(32, 2, 4, 48, 8, 32, 0))
    network = _model("siglip")
    encoder = weights.load(_saved(network, tmp_path / "theirs"))
    naming = published.families()["siglip"].namings["big_vision"]
    image = published.to_theirs(naming, encoder.backbone.state_dict(), "params/img/")
    arrays = _big_vision(network.state_dict()) | {name: tensor.numpy() for name, tensor in image.items()}
    if stacked:
        arrays = _stack(arrays)
    (tmp_path / "given").mkdir()
    config = {"num_attention_heads": 4, "text_config": {"num_attention_heads": 3}}
    (tmp_path / "given" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    np.savez(tmp_path / "given" / "siglip.npz", **arrays)
    again = weights.load(tmp_path / "given" / "siglip.npz")
    assert again.record["text"]["naming"].startswith("big_vision")
    theirs = _theirs("siglip", network, _images(), _tokens())
    assert _apart(_ours(again, _images(), _tokens()), theirs) < 1e-5


def _stack(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All layers in one array each, as SigLIP 2's files."""
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        folder, found, rest = name.partition("encoderblock_")
        number, _, inside = rest.partition("/")
        if found:
            out.setdefault(f"{folder}encoderblock/{inside}", {})[int(number)] = array
        else:
            out[name] = array
    return {
        name: np.stack([each[n] for n in sorted(each)]) if isinstance(each, dict) else each
        for name, each in out.items()
    }


def test_open_clip_s_siglip(tmp_path: Path) -> None:
    network = _model("siglip")
    tensors = network.state_dict()
    encoder = weights.load(_saved(network, tmp_path / "theirs"))
    naming = published.families()["siglip"].namings["timm"]
    out = published.to_theirs(naming, encoder.backbone.state_dict(), "visual.trunk.") | _official(tensors, "text.")
    out |= {f"text.text_projection.{kind}": tensors[f"text_model.head.{kind}"] for kind in ("weight", "bias")}
    out["logit_bias"] = tensors["logit_bias"].reshape(())
    (tmp_path / "siglip").mkdir()
    config = {"num_attention_heads": 4, "text_config": {"num_attention_heads": 3}}
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, tmp_path / "siglip" / "model.safetensors")
    again = weights.load(tmp_path / "siglip")
    assert again.record["text"]["naming"] == "open_clip"
    theirs = _theirs("siglip", network, _images(), _tokens())
    assert _apart(_ours(again, _images(), _tokens()), theirs) < 1e-5


def test_another_activation_of_the_texts_is_believed(tmp_path: Path) -> None:
    network = _model("clip", hidden_act="gelu")
    encoder = weights.load(_saved(network, tmp_path / "given"))
    assert encoder.text.tower.config.activation == "gelu" and encoder.backbone.config.activation == "gelu_quick"
    theirs = _theirs("clip", network, _images(), _tokens())
    assert _apart(_ours(encoder, _images(), _tokens()), theirs) < 1e-5


def test_words_go_in_where_the_tokenizer_lies_beside(tmp_path: Path) -> None:
    files = _clip_files(tmp_path / "clip")
    network = _model("clip", vocab_size=521, eos_token_id=520)
    encoder = weights.load(_saved(network, files))
    said = encoder.record["text"]["tokenizer"]
    assert said["kind"] == "clip" and said["vocabulary"] == 521
    assert set(said["sha256"]) == {"vocab.json", "merges.txt"}
    theirs = transformers.CLIPTokenizer.from_pretrained(files)
    words = ["A photo of a cat", "dogs", ""]
    tokens = theirs(words, padding="max_length", truncation=True, max_length=8, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = _theirs("clip", network, _images(), tokens)
        assert (encoder.logits(_images(), words) - wanted["logits"]).abs().max() < 1e-5
        assert (encoder.text(words) - wanted["texts"]).abs().max() < 1e-5


def test_a_siglip_with_its_sentencepiece(tmp_path: Path) -> None:
    network = _model("siglip")
    folder = _saved(network, tmp_path / "given")
    (folder / "spiece.model").write_bytes((PARITY / "spiece.model").read_bytes())
    encoder = weights.load(folder)
    assert (encoder.text.tower.config.end, encoder.text.tower.config.pad) == (1, 1)
    one, other = encoder.text(["A photo of a cat!", "a photo of a cat"]).detach()
    assert torch.equal(one, other)


def test_a_tokenizer_of_other_weights_names_both(tmp_path: Path) -> None:
    network = _model("siglip", vocab_size=72)
    folder = _saved(network, tmp_path / "given")
    (folder / "spiece.model").write_bytes((PARITY / "spiece.model").read_bytes())
    with pytest.raises(SaccadeError, match=r"spiece\.model has 73 words, the table of .*given only 72"):
        weights.load(folder)
    clip = _clip_files(tmp_path / "clip")
    _saved(_model("clip", vocab_size=600, eos_token_id=599), clip)
    with pytest.raises(SaccadeError, match=r"ends a text with token 520, the weights in .*clip with 599"):
        weights.load(clip)


def test_half_a_text_tower_does_not_keep_the_image_tower_out(tmp_path: Path) -> None:
    network = _model("siglip")
    folder = _saved(network, tmp_path / "given")
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor for name, tensor in tensors.items() if "text_model.encoder.layers.2.mlp" not in name}
    save_file(cut, folder / "model.safetensors")
    encoder = weights.load(folder)
    assert encoder.text is None and encoder.record["family"] == "siglip"
    assert "not whole" in encoder.record["text"]["refused"] and encoder.record["text"]["missing"]
    with pytest.raises(SaccadeError, match=r"has no text tower: .* not whole"):
        encoder.logits(_images(), ["a cat"])
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_file(tensors | {name: tensors[name] * torch.nan}, folder / "model.safetensors")
    assert "NaN" in weights.load(folder).record["text"]["refused"]
    alone = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**NUMBERS))
    encoder = weights.load(_saved(alone, tmp_path / "alone"))
    assert encoder.text is None and "text" not in encoder.record
    with pytest.raises(SaccadeError, match="has no text tower"):
        encoder.pair(_images())


def test_a_run_s_backbone_keeps_its_texts(tmp_path: Path) -> None:
    encoder = weights.load(_saved(_model("clip", vocab_size=521, eos_token_id=520), _clip_files(tmp_path / "clip")))
    weights.save_backbone(tmp_path / "run" / "backbone", encoder.backbone, {"recipe": "pairs"}, encoder.text)
    again = weights.load(tmp_path / "run")
    words = ["a photo of a cat", "it's two dogs"]
    with torch.no_grad():
        assert torch.equal(again.logits(_images(), words), encoder.logits(_images(), words))
    assert again.record["text"]["tokenizer"]["kind"] == "clip" and again.record["text"]["matched"] > 20
    file = tmp_path / "run" / "backbone" / "text" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(SaccadeError, match="damaged"):
        weights.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("family", "vocabulary", "width", "length", "out", "whole"),
    [
        ("clip", 49408, 512, 77, 512, 151_277_313),
        ("siglip", 32000, 768, 64, 768, 203_155_970),
        ("siglip2-naflex", 256000, 768, 64, 768, 375_234_050),
    ],
)
def test_published_sizes(family: str, vocabulary: int, width: int, length: int, out: int, whole: int) -> None:
    """Base towers of 12 blocks: with the image tower, as many parameters as the published models have."""
    from saccade.text import TextEncoder

    facts = texts.TOWERS[family]
    with torch.device("meta"):
        tower = TextEncoder(
            TextConfig(
                **facts.switches, width=width, depth=12, heads=width // 64, hidden=4 * width,
                vocabulary=vocabulary, length=length, projection=out,
            )
        )  # fmt: skip
    size = {"clip": "vit-b/32", "siglip": "vit-b/16", "siglip2-naflex": "vit-b/16"}[family]
    images = published.families()[family].sizes[size].parameters
    further = 768 * 512 + 1 if family == "clip" else 2
    assert images + further + sum(tensor.numel() for tensor in tower.parameters()) == whole

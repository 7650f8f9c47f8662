"""MAE goes on with its decoder: same masks as transformers' own, same reconstruction, same loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import anchor, errors, model, published, recipe, vit, weights
from saccade.errors import SaccadeError
from saccade.published import mae
from saccade.settings import AdaptArguments

transformers = pytest.importorskip("transformers")

ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128,
}
FACTS = {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
CONFIG = {"arch": "vit-ti/8", "image_size": 32, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit-ti as small as their network here."""
    monkeypatch.setitem(vit.SIZES, "ti", {"width": 64, "depth": 2, "heads": 4, "hidden": 96})


def theirs(**changes: Any) -> Any:
    """transformers' network, every tensor but the fixed positions redrawn."""
    network = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**{**ENCODER, **DECODER, **FACTS, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "pos" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise * (0.1 if tensor.ndim > 1 else 0.3) + ("norm" in name and name.endswith("weight")))
        network.vit.embeddings.position_embeddings[0, 1:] = vit.sincos((4, 4), 64)  # as in every released file
        network.decoder.decoder_pos_embed[0, 1:] = vit.sincos((4, 4), 32)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> Any:
    return theirs()


@pytest.fixture
def saved(network: Any, tmp_path: Path) -> Path:
    network.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def as_released(folder: Path) -> Path:
    """transformers 5 writes other names of the decoder's layers than the files that were released have."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("decoder_encoder.layer", "decoder_layers"): tensor for name, tensor in tensors.items()}
    save_file(renamed, path)
    return folder


def build(place: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    page = recipe.find("mae")
    return model.build(page, page.config(**{**CONFIG, **changes}), str(place))


def compare(method: Any, network: Any) -> tuple[float, float]:
    """How far our reconstruction of the hidden patches and our loss are from theirs, for one drawing of masks."""
    generator = torch.Generator().manual_seed(2)
    images, noise = torch.rand(3, 3, 32, 32, generator=generator), torch.rand(3, 16, generator=generator)
    order = noise.argsort(1)
    keep, hidden = order.tensor_split([method.kept], 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in published.IMAGENET.values())
    with torch.no_grad():
        said = network((images - mean) / std, noise=noise)
        logits = said.logits.gather(1, hidden[..., None].expand(-1, -1, said.logits.shape[-1]))
        loss, _ = method({"images": images, "order": order}, torch.tensor(0.0))
        return float((method.predict(images, keep, hidden) - logits).abs().max()), abs(float(loss - said.loss))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_reconstruction_and_loss_are_transformers(normalised: bool, released: bool, saved: Path, network: Any) -> None:
    if released:
        as_released(saved)
    method, record = build(saved, normalise_target=normalised)
    network.config.norm_pix_loss = normalised
    assert max(compare(method, network)) < 1e-5
    assert (
        record["family"] == "mae"
        and record["decoder"]["matched"] == len(mae.DECODER.namings[0].rules[2:]) - 12 + 24 + 1
    )
    assert "raw pixels" in record["decoder"]["note"]
    network.config.norm_pix_loss = not normalised
    assert compare(method, network)[1] > 1e-2
    network.config.norm_pix_loss = False


def official(saved: Path) -> dict[str, Tensor]:
    """The authors' names, by a hand that is not the one under test."""
    out: dict[str, Tensor] = {}
    tensors = load_file(as_released(saved) / "model.safetensors")
    for name, tensor in tensors.items():
        where = name.replace("vit.embeddings.", "").replace("vit.encoder.layer", "blocks").replace("vit.", "")
        where = where.replace("decoder.decoder_layers", "decoder_blocks").replace("decoder.", "")
        for old, new in (
            ("patch_embeddings.projection", "patch_embed.proj"),
            ("position_embeddings", "pos_embed"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("layernorm", "norm"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            where = where.replace(old, new)
        if "attention.attention.query" in where:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            out[where.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        elif "attention.attention" not in where:
            out[where] = tensor
    return out


@pytest.mark.parametrize("nested", [True, False])
def test_the_authors_file(nested: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mae.FAMILY.sizes, "vit-ti/8", published.Size(64, 2, 4, 96, 8, 32, 0))
    tensors = official(saved)
    torch.save({"model": tensors} if nested else tensors, tmp_path / "mae_visualize_vit_tiny.pth")
    sixteen = theirs(decoder_num_attention_heads=16)
    method, record = build(tmp_path / "mae_visualize_vit_tiny.pth", decoder_heads=16, normalise_target=False)
    assert record["naming"] == "official" and record["decoder"]["matched"]
    assert max(compare(method, sixteen)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder_width": 64}, "reshaped (decoder_blocks.0.attn.proj.bias"),
        ({"decoder_depth": 1}, "12 unexpected (decoder_blocks.1."),
        ({"decoder_depth": 3}, "12 missing (decoder_blocks.2."),
        ({"decoder_heads": 8}, "it has 4 heads"),
    ],
)
def test_another_decoder_starts_afresh_and_it_is_said(
    changes: dict[str, int], said: str, saved: Path, network: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    errors.say.cache_clear()
    method, record = build(saved, **changes, normalise_target=False)
    assert record["decoder"]["matched"] == 0 and said in record["decoder"]["reason"]
    assert said in capfd.readouterr().err
    assert min(compare(method, network)) > 1e-3
    if changes != {"decoder_heads": 8}:
        return
    loaded = load_file(saved / "model.safetensors")["decoder.decoder_norm.bias"]
    assert not torch.equal(method.decoder_norm.bias, loaded)


@pytest.mark.parametrize("rank", [None, 2])
def test_who_adapts_goes_on_with_it(rank: int | None, saved: Path, network: Any) -> None:
    asked = AdaptArguments(data=("x",), start=str(saved), out="x", lora=rank)
    page = anchor.anchored(recipe.find("mae"), asked, weights.load(saved))
    method, record = model.build(page, page.config(**CONFIG, normalise_target=False), str(saved))
    assert record["decoder"]["matched"]
    assert max(compare(method.bare(), network)) < 1e-5


def test_other_positions_and_nan_are_seen(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"decoder.decoder_pos_embed": tensors["decoder.decoder_pos_embed"].flip(1)}, path)
    assert build(saved)[1]["decoder"]["reason"] == "its positions are not the fixed ones"
    save_file(tensors | {"decoder.mask_token": torch.full((1, 1, 32), float("nan"))}, path)
    assert weights.load(saved).record["family"] == "mae"  # of no concern to an encoder
    with pytest.raises(SaccadeError, match="NaN or infinite values: mask_token"):
        build(saved)


def test_an_encoder_alone_and_another_recipe_have_none(saved: Path, tmp_path: Path) -> None:
    tensors = {name: x for name, x in load_file(saved / "model.safetensors").items() if name.startswith("vit.")}
    save_file(tensors, saved / "model.safetensors")
    assert "decoder" not in build(saved)[1]
    weights.save_backbone(tmp_path / "ours", weights.load(saved).backbone, {"recipe": "x"})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["record"] == {"recipe": "x"}
    page = recipe.find("simclr")
    config = page.config(arch="vit-ti/8", image_size=32)
    assert "decoder" not in model.build(page, config, str(saved))[1]

"""SigLIP 2 NaFlex against transformers' own network, which takes padded patches, their shapes and a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_published_clip import NUMBERS, _apart, _images, _ours, _redrawn
from torch import Tensor

from saccade import published, vit, weights
from saccade.naflex import natural_size

transformers = pytest.importorskip("transformers")
theirs_page = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")

PATCH = 8
SIZES = [(32, 32), (32, 48), (24, 16), (64, 64), (8, 80)]


@pytest.fixture(scope="module")
def network() -> Any:
    numbers = {name: value for name, value in NUMBERS.items() if name != "image_size"}
    return _redrawn(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**numbers, num_patches=16)))


@pytest.fixture
def saved(network: Any, tmp_path: Path) -> Path:
    network.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def said(network: Any, pictures: list[Tensor], padding: int = 3) -> list[dict[str, Tensor]]:
    """Patches and pooled vector of each picture [C H W]; they go in as one padded batch of flattened patches."""
    grids = [(picture.shape[1] // PATCH, picture.shape[2] // PATCH) for picture in pictures]
    most = max(rows * columns for rows, columns in grids) + padding
    values, mask = torch.full((len(pictures), most, 3 * PATCH**2), 7.0), torch.zeros(len(pictures), most)
    for number, (picture, (rows, columns)) in enumerate(zip(pictures, grids, strict=True)):
        cells = ((picture - 0.5) / 0.5).reshape(3, rows, PATCH, columns, PATCH)
        values[number, : rows * columns] = torch.einsum("crpsq->rspqc", cells).reshape(rows * columns, -1)
        mask[number, : rows * columns] = 1
    out = network(pixel_values=values, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids))
    return [
        {"patches": out.last_hidden_state[n : n + 1, : rows * columns], "pooled": out.pooler_output[n : n + 1]}
        for n, (rows, columns) in enumerate(grids)
    ]


def test_every_shape_says_what_transformers_says(saved: Path, network: Any) -> None:
    encoder = weights.load(saved)
    record = encoder.record
    assert (record["family"], record["naming"], record["size"]) == ("siglip2-naflex", "transformers", 32)
    assert record["pooling"] == "map" and record["matched"] == len(encoder.backbone.state_dict())
    pictures = [_images(size)[0] for size in SIZES]
    for picture, theirs in zip(pictures, said(network, pictures), strict=True):
        assert _apart(_ours(encoder, picture[None]), theirs) < 1e-5, picture.shape


@pytest.mark.parametrize("switch", ["position_linear", "position_antialias"])
def test_positions_are_resized_linearly_and_smoothed(switch: str, saved: Path, network: Any) -> None:
    encoder, picture = weights.load(saved), _images((24, 16))[0]
    encoder.backbone.config = encoder.backbone.config.model_copy(update={switch: False})
    assert _apart(_ours(encoder, picture[None]), said(network, [picture])[0]) > 1e-2


def test_rows_before_columns_before_channels(saved: Path, network: Any) -> None:
    """The same matrix with its numbers in the order of a convolution is another network."""
    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("patch_embedding.weight"))
    tensors[name] = tensors[name].unflatten(1, (3, PATCH, PATCH)).permute(0, 2, 3, 1).flatten(1).contiguous()
    save_file(tensors, saved / "model.safetensors")
    assert _apart(_ours(weights.load(saved), _images()), _stacked(said(network, list(_images())))) > 1e-2


def _stacked(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}


def test_with_texts_only_the_image_tower_is_taken(network: Any, tmp_path: Path) -> None:
    text = {name: NUMBERS[name] for name in list(NUMBERS)[:4]} | {"vocab_size": 99, "eos_token_id": 2}
    config = transformers.Siglip2Config(vision_config=network.config.to_dict(), text_config=text)
    whole = _redrawn(transformers.Siglip2Model(config))
    whole.save_pretrained(tmp_path / "whole")
    encoder = weights.load(tmp_path / "whole")
    assert any(name.startswith("text_model.") for name in encoder.record["ignored"])
    assert _apart(_ours(encoder, _images()), _stacked(said(whole.vision_model, list(_images())))) < 1e-5


def test_every_naming_is_a_round_trip_and_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    family = published.families()["siglip2-naflex"]
    heads = published.Size(32, 2, 4, 48, 8, 32, 0)
    monkeypatch.setitem(family.sizes, "tiny", heads)
    monkeypatch.setitem(published.families()["siglip"].sizes, "tiny", heads)  # whose heads big_vision's names ask for
    config = vit.ViTConfig(**heads.numbers, **family.switches)
    ours = {name: torch.randn(tensor.shape) for name, tensor in vit.ViT(config).state_dict().items()}
    for name, naming in family.namings.items():
        theirs = published.to_theirs(naming, ours, naming.prefixes[0])
        again = published.to_ours(naming, theirs, naming.prefixes[0])
        assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)
        found = published.recognise({key: tuple(tensor.shape) for key, tensor in theirs.items()})
        assert (found.family.name, found.naming, found.size) == ("siglip2-naflex", name, "tiny")
        shapes = {key.rpartition("params/img/")[2]: tuple(tensor.shape) for key, tensor in theirs.items()}
        if name == "timm":
            assert shapes["embeds.proj.weight"] == (32, 192) and shapes["embeds.pos_embed"] == (1, 4, 4, 32)
        if name.startswith("big_vision"):
            assert shapes["embedding/kernel"] == (192, 32) and shapes["pos_embedding"] == (4, 4, 32)


@pytest.mark.parametrize("size", ["vit-b/16", "vit-so400m/16"])
def test_published_sizes(size: str) -> None:
    family = published.families()["siglip2-naflex"]
    facts = family.sizes[size]
    with torch.device("meta"):
        network = vit.ViT(vit.ViTConfig(**facts.numbers, **family.switches))
    assert sum(tensor.numel() for tensor in network.parameters()) == facts.parameters
    theirs = published.to_theirs(family.namings["timm"], network.state_dict())
    found = published.recognise({key: tuple(tensor.shape) for key, tensor in theirs.items()})
    assert (found.family, found.size) == (family, size)
    assert found.config["position_linear"] and found.config["image_size"] == 256


def test_sizes_that_keep_the_aspect() -> None:
    rule = theirs_page.get_image_size_for_max_num_patches
    draw = np.random.default_rng(0)
    sides = [(256, 256), (1, 1), (1, 4000), (4000, 3), (480, 640), (16, 16), (257, 255), (65000, 65000)]
    sides += [tuple(draw.integers(1, 5000, 2).tolist()) for _ in range(200)]
    for height, width in sides:
        for patch, patches in ((16, 256), (16, 1024), (8, 16), (14, 100)):
            found = natural_size(height, width, patch, patches)
            assert tuple(found) == rule(height, width, patch, patches), (height, width)
            assert found[0] * found[1] <= patches * patch**2


def test_a_picture_at_its_own_aspect_or_squeezed(saved: Path, network: Any) -> None:
    encoder = weights.load(saved)
    array = np.random.default_rng(0).integers(0, 256, (60, 133, 3), np.uint8)
    natural, square = encoder.natural(Image.fromarray(array)), encoder.preprocess(Image.fromarray(array))

    assert list(natural.shape[1:]) == natural_size(60, 133, PATCH, 16) and square.shape == (3, 32, 32)
    assert natural.shape[2] > natural.shape[1]
    resized = Image.fromarray(array).resize(natural.shape[:0:-1], Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(resized).astype(int) - natural.permute(1, 2, 0).numpy()).max() <= 2
    theirs = said(network, [natural / 255])[0]
    assert _apart(_ours(encoder, natural[None]), theirs) < 1e-5
    assert weights.load(saved, image_size=64).natural(Image.fromarray(array)).numel() > natural.numel()

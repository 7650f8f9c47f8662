"""Other projects' checkpoints: transformers' own MAE is the oracle; every file is loaded whole or refused by name."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import backbone, errors, initial, published, vit, weights
from saccade.cli import main
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.published import mae

transformers = pytest.importorskip("transformers", reason="the oracle")

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FACTS = {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "mask_ratio": 0.0}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def redraw(module: torch.nn.Module) -> Any:
    """Every tensor non-constant, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (0.8 if "norm" in name else 0.1))
    return module.eval()


@pytest.fixture(scope="module")
def oracle() -> Any:
    return redraw(transformers.ViTMAEModel(transformers.ViTMAEConfig(**SHAPE, **FACTS, **DECODER)))


@pytest.fixture
def saved(oracle: Any, tmp_path: Path) -> Path:
    oracle.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def said(oracle: Any, images: Tensor) -> Tensor:
    """Class token and patches in their order: equal noise that rises keeps it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in published.IMAGENET.values())
    count = images.shape[2] * images.shape[3] // 64
    noise = torch.arange(count).float().expand(len(images), -1)
    with torch.no_grad():
        return oracle((images - mean) / std, noise=noise, interpolate_pos_encoding=True).last_hidden_state


def difference(encoder: Encoder, oracle: Any, size: tuple[int, int] = (32, 32)) -> float:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = encoder(images)
    theirs = said(oracle, images)
    apart = [features.cls - theirs[:, 0], features.patches - theirs[:, 1:]]
    apart.append(encoder.embedding(features) - theirs[:, 0])
    return max(part.abs().max().item() for part in apart)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (48, 48)], ids=["native", "not square", "another"])
def test_mae_says_what_transformers_says(saved: Path, oracle: Any, size: tuple[int, int]) -> None:
    encoder = weights.load(saved)
    assert difference(encoder, oracle, size) < 1e-5
    record = encoder.record
    assert (record["family"], record["naming"], record["size"], record["pooling"]) == ("mae", "transformers", 32, "cls")
    assert record["matched"] == len(encoder.backbone.state_dict())
    assert record["missing"] == record["unexpected"] == record["ignored"] == []
    assert record["licence"] == "CC-BY-NC-4.0" and record["terms"] and len(record["hash"]) == 64
    assert record["reshaped"] == [f"blocks.{n}.attn.qkv.{kind}" for n in (0, 1) for kind in ("bias", "weight")]
    assert encoder.preprocess.crop == 32 and not encoder.training


def test_mae_with_its_decoder(tmp_path: Path, saved: Path, oracle: Any) -> None:
    whole = redraw(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SHAPE, **FACTS, **DECODER)))
    whole.vit.load_state_dict(oracle.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    encoder = weights.load(tmp_path / "whole")
    assert difference(encoder, oracle) < 1e-5
    assert encoder.record["ignored"] and all(name.startswith("decoder.") for name in encoder.record["ignored"])
    assert encoder.record["matched"] == weights.load(saved).record["matched"]


def test_eps_is_the_authors(saved: Path, oracle: Any) -> None:
    """transformers' default is 1e-12; what the networks were trained with is 1e-6 (pitfall 4)."""
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-12}))
    assert weights.load(saved).backbone.config.eps == 1e-6


PAIRS = [
    ("layernorm_before.weight", "layernorm_after.weight"),
    ("layernorm_before.bias", "layernorm_after.bias"),
    ("attention.attention.query.weight", "attention.attention.key.weight"),
    ("attention.attention.key.weight", "attention.attention.value.weight"),
    ("attention.attention.query.bias", "attention.attention.value.bias"),
    ("attention.output.dense.bias", "output.dense.bias"),
    ("attention.output.dense.bias", "layernorm_after.bias"),
]


@pytest.mark.parametrize("pair", [*PAIRS, ("embeddings.cls_token", None), ("layernorm.bias", "layernorm.weight")])
def test_a_swapped_pair_is_seen(saved: Path, oracle: Any, pair: tuple[str, str | None]) -> None:
    tensors = load_file(saved / "model.safetensors")
    before = "" if pair[0].startswith(("embeddings", "layernorm.")) else "encoder.layer.1."
    first = before + pair[0]
    if pair[1] is None:
        tensors[first] = tensors[first].flip(-1)
    else:
        tensors[first], tensors[before + pair[1]] = tensors[before + pair[1]], tensors[first]
    save_file(tensors, saved / "model.safetensors")
    assert difference(weights.load(saved), oracle) > 1e-3


def official(saved: Path) -> dict[str, Tensor]:
    ours = published.to_ours(mae.TRANSFORMERS, load_file(saved / "model.safetensors"))
    return published.to_theirs(mae.OFFICIAL, ours)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny network as one of MAE's published sizes: official files do not say how many heads there are."""
    monkeypatch.setitem(mae.FAMILY.sizes, "vit-tiny/8", published.Size(32, 2, 2, 64, 8, 32, 0))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("known")
def test_an_official_file(tmp_path: Path, saved: Path, oracle: Any, nested: bool) -> None:
    path = tmp_path / "mae_pretrain_vit_tiny.pth"
    tensors: dict[str, Any] = official(saved)
    tensors |= {"decoder_pos_embed": torch.zeros(1, 17, 16), "mask_token": torch.zeros(1, 1, 16)}
    torch.save({"model": tensors, "epoch": 3} if nested else tensors, path)
    encoder = weights.load(path)
    assert difference(encoder, oracle) < 1e-5
    assert encoder.record["naming"] == "official" and encoder.record["arch"] == "vit-tiny/8"
    assert [name.split(".")[-1] for name in encoder.record["ignored"]] == ["decoder_pos_embed", "mask_token"]


@pytest.mark.parametrize("naming", mae.FAMILY.namings.values(), ids=list(mae.FAMILY.namings))
def test_a_naming_round_trips_bit_for_bit(naming: published.Naming) -> None:
    config = vit.ViTConfig(width=32, depth=12, heads=2, hidden=64, patch=8, image_size=32, **_switches(mae.FAMILY))
    ours = {key: torch.randn(x.shape) for key, x in vit.ViT(config).state_dict().items()}
    theirs = published.to_theirs(naming, ours)
    again = published.to_ours(naming, theirs)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)
    back = published.to_theirs(naming, again)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)
    with pytest.raises(SaccadeError, match=r"no place for norm_pre\.bias"):
        published.to_theirs(naming, {**ours, "norm_pre.bias": ours["norm.bias"]})


def _switches(family: published.Family) -> dict[str, Any]:
    return {**family.switches, "pooling": family.pooling}


def test_sizes_have_the_parameters_that_are_said() -> None:
    for size in mae.FAMILY.sizes.values():
        with torch.device("meta"):
            network = vit.ViT(vit.ViTConfig(**{**_switches(mae.FAMILY), **size.numbers, **size.switches}))
        assert sum(x.numel() for x in network.parameters()) == size.parameters


def refusal(place: Path) -> str:
    with pytest.raises(SaccadeError) as caught:
        weights.load(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(saved: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(saved / "model.safetensors")), saved / "model.safetensors")


def test_half_a_state_dict_is_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: {name: x for name, x in tensors.items() if ".layer.1." not in name})
    text = refusal(saved)
    assert "nearest is mae (transformers names): 22 matched, 16 missing" in text and "encoder.layer.1." in text
    rewrite(saved, lambda tensors: {name: x for name, x in tensors.items() if "query.weight" not in name})
    assert "missing" in refusal(saved) and "query.weight" in refusal(saved)


def test_one_tensor_too_many_or_of_another_shape_is_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors | {"encoder.layer.0.gate.weight": torch.zeros(3)})
    assert "1 unexpected (encoder.layer.0.gate.weight)" in refusal(saved)
    rewrite(
        saved,
        lambda tensors: {n: x for n, x in tensors.items() if "gate" not in n} | {"layernorm.bias": torch.zeros(31)},
    )
    assert "1 unexpected (norm.bias (31,) for (32,))" in refusal(saved)


def test_another_model_s_keys_are_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: {f"h.{number}.weight": x for number, x in enumerate(tensors.values())})
    assert "none of its 38 tensors has a name of a family" in refusal(saved)


def test_a_model_type_newer_than_we_know_is_refused(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "vit_mae2"}))
    text = refusal(saved)
    assert "'vit_mae2' is of no family" in text and "did you mean 'vit_mae'" in text


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(saved: Path, number: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["encoder.layer.1.attention.attention.key.bias"][3] = number
        return tensors

    rewrite(saved, poison)
    text = refusal(saved)
    assert "1 tensors with NaN or infinite values: encoder.layer.1.attention.attention.key.bias" in text


def test_quantised_tensors_are_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: {name: x.to(torch.float8_e4m3fn) for name, x in tensors.items()})
    assert "float8_e4m3fn" in refusal(saved)


def test_half_precision_is_read_as_fp32(saved: Path, oracle: Any) -> None:
    rewrite(saved, lambda tensors: {name: x.bfloat16() for name, x in tensors.items()})
    encoder = weights.load(saved)
    assert encoder.backbone.norm.weight.dtype == torch.float32
    assert 0 < difference(encoder, oracle) < 1


@pytest.mark.parametrize("header", [2**63, 10**9, 4000])
def test_an_oversized_header_is_refused(tmp_path: Path, header: int) -> None:
    path = tmp_path / "mae.safetensors"
    path.write_bytes(struct.pack("<Q", header) + b'{"a":' + b" " * 100)
    assert "says that its header has" in refusal(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.usefixtures("known")
def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path: Path, saved: Path, kind: str) -> None:
    path, sprung = tmp_path / "mae_tiny.pth", tmp_path / "sprung"
    content = {"model": official(saved), "args": Trap(sprung)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"args": Trap(sprung)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    text = refusal(path)
    assert ("holds posix.system" if kind != "pickle" else "reader cannot read") in text
    assert "nothing of it was run" in text
    assert not sprung.exists()
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:100])
    assert "nothing of it was run" in refusal(tmp_path / "cut.pth")


@pytest.mark.usefixtures("known")
def test_a_container_that_holds_itself(tmp_path: Path, saved: Path) -> None:
    content: dict[str, Any] = {"model": official(saved)}
    content["again"] = content
    torch.save(content, tmp_path / "mae.pth")
    assert weights.load(tmp_path / "mae.pth").record["family"] == "mae"


def test_shards_are_one_checkpoint(saved: Path, oracle: Any) -> None:
    oracle.save_pretrained(saved / "parts", max_shard_size="20KB")
    encoder = weights.load(saved / "parts")
    assert len(list((saved / "parts").glob("*.safetensors"))) > 1
    assert difference(encoder, oracle) < 1e-5
    index = saved / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "names no files of tensors beside it" in refusal(saved / "parts")


def test_families_of_like_tensors_are_told_apart_by_name_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    sizes = {"vit-tiny/8": published.Size(32, 2, 2, 64, 8, 32, 0)}
    other = published.Family(
        **{**vars(mae.FAMILY), "name": "other", "licence": "MIT", "terms": None, "signs": ("eam",), "sizes": sizes}
    )
    one = published.Family(**{**vars(mae.FAMILY), "sizes": sizes})
    monkeypatch.setattr(published, "families", lambda: {"mae": one, "other": other})
    network = vit.ViT(vit.ViTConfig(width=32, depth=2, heads=2, hidden=64, patch=8, image_size=32))
    for name in ("x_mae", "x_eam", "x"):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    assert weights.load(tmp_path / "x_mae.safetensors").record["licence"] == "CC-BY-NC-4.0"
    assert weights.load(tmp_path / "x_eam.safetensors").record["licence"] == "MIT"
    assert "these tensors may be of" in refusal(tmp_path / "x.safetensors")


def test_terms_are_said_once(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    errors.say.cache_clear()
    weights.load(saved), weights.load(saved)
    assert capfd.readouterr().err.count("CC-BY-NC-4.0, for non-commercial use only") == 1


def test_training_goes_on_from_mae(tmp_path: Path, oracle: Any) -> None:
    """A recipe with fixed positions takes a table that holds just them, and no other."""
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SHAPE, **FACTS, **DECODER)).eval()
    model.embeddings.position_embeddings.data[0, 1:] = vit.sincos((4, 4), 32)
    oracle.save_pretrained(tmp_path / "learned")
    model.save_pretrained(tmp_path / "fixed")
    encoder = weights.load(tmp_path / "fixed")
    sizes = {"width": 32, "depth": 2, "hidden": 64}
    switches = {"position": "sincos", **sizes, **initial.switches(encoder)}
    network = backbone.build("vit-ti/8", image_size=48, **switches)
    record = initial.load_state(network, encoder)
    assert record["family"] == "mae" and record["licence"] == "CC-BY-NC-4.0"
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(network(images).patches, encoder(images).patches, rtol=0, atol=1e-4)
    with pytest.raises(SaccadeError, match="pos_embed"):
        initial.load_state(network, weights.load(tmp_path / "learned"))


def test_models(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--facebook--vit-mae-large" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--facebook--vit-mae-large" / "snapshots" / "abc" / "model.safetensors").touch()
    assert main(["models", "vit-mae", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows.keys() == {"facebook/vit-mae-base", "facebook/vit-mae-large", "facebook/vit-mae-huge"}
    assert rows["facebook/vit-mae-large"]["cached"] and not rows["facebook/vit-mae-base"]["cached"]
    assert rows["facebook/vit-mae-base"]["licence"] == "CC-BY-NC-4.0"
    assert all({"name", "family", "parameters", "licence", "data", "cached"} <= row.keys() for row in rows.values())
    assert main(["models", "vit-mea-base", "--json"]) == 2
    assert "did you mean 'facebook/vit-mae-base'" in json.loads(capsys.readouterr().out)["hint"]
    assert main(["models", "zzz", "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["hint"]) < 300, "families, not every name"
    assert main(["models", "--json"]) == 0
    every = json.loads(capsys.readouterr().out)["models"]
    assert {row["family"] for row in every} == set(published.families())
    assert {row["name"] for row in every if not row["hub"]} >= {"ibot/vit-b/16", "resnet50-1x.pth"}
    assert all(row["hub"] for row in every if row["name"].startswith("facebook/"))
    assert main(["evaluate", "ibot/vit-b/16", str(tmp_path), "--json"]) == 2
    assert "on their own server" in json.loads(capsys.readouterr().out)["hint"]


def test_families_are_listed_without_torch() -> None:
    code = "import sys; from saccade.published import listing; assert listing(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Backbones on disk: what is saved comes back, what is not ours is refused in one line, pickles are never opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from saccade import encoder as encoder_page
from saccade import initial, vit, weights
from saccade.encoder import Preprocess, untrained
from saccade.errors import SaccadeError

TINY = {"width": 16, "depth": 2, "heads": 2, "hidden": 32}


def tiny(image_size: int = 16, **switches: object) -> vit.ViT:
    return vit.build("vit-ti/4", image_size=image_size, **{**TINY, **switches})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    weights.save_backbone(tmp_path / "run" / "backbone", tiny(), {"recipe": "x", "licence": "CC0-1.0"})
    return tmp_path / "run"


@pytest.mark.parametrize(
    "switches", [{}, {"position": "sincos"}, {"position": "rope"}, {"cls": False, "pooling": "map"}]
)
def test_a_backbone_comes_back(tmp_path: Path, switches: dict[str, object]) -> None:
    model = tiny(**switches)
    weights.save_backbone(tmp_path, model, {"licence": "CC0-1.0"})
    images = torch.rand(2, 3, 16, 16)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        encoder = weights.load(place)
        assert not encoder.training
        torch.testing.assert_close(encoder(images).patches, model(images).patches, rtol=0, atol=0)
        torch.testing.assert_close(encoder.embedding(encoder(images)), model.embedding(model(images)), rtol=0, atol=0)
    assert encoder.record["licence"] == "CC0-1.0"
    assert encoder.record["matched"] == len(model.state_dict()) and encoder.record["missing"] == []
    assert encoder.record["size"] == 16 and len(encoder.record["mean"]) == 3 and len(encoder.record["hash"]) == 64


def test_a_run_directory_is_its_backbone(saved: Path) -> None:
    (saved / "config.json").write_text("{}")  # what was asked of the run; not the backbone's
    assert weights.load(saved).record["recipe"] == "x"


def refusal(place: Path | str) -> SaccadeError:
    with pytest.raises(SaccadeError) as caught:
        weights.load(place)
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_such_backbone(saved: Path) -> None:
    assert "did you mean 'run'" in str(refusal(saved.parent / "rum"))
    assert "no published one" in str(refusal("dinov9-vits")) and "did you mean" in str(refusal("vit-mae-bas"))
    assert "no backbone in" in str(refusal(saved.parent))
    (saved.parent / "young" / "checkpoints").mkdir(parents=True)
    assert "no backbone yet" in str(refusal(saved.parent / "young"))


def test_another_architecture(saved: Path) -> None:
    path = saved / "backbone" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vit": config["vit"] | {"depth": 3, "registers": 2, "hidden": 64}}))
    text = str(refusal(saved))
    assert (
        "another architecture" in text
        and "13 missing (blocks.2" in text
        and "reshaped (blocks.0.mlp.fc1.bias [32]" in text
    )
    path.write_text(json.dumps(config | {"vit": config["vit"] | {"deepth": 3}}))
    assert "describes no backbone" in str(refusal(saved))
    path.write_text(json.dumps(config | {"format": "saccade-backbone-2"}))
    assert "a newer saccade may have written it" in str(refusal(saved))
    path.write_text("[1]")
    assert "no JSON object" in str(refusal(saved))
    path.unlink()
    assert "not a whole encoder of any family" in str(refusal(saved))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_found(saved: Path, damage: str) -> None:
    path = saved / "backbone" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # loads silently without the hash
    path.write_bytes(content if damage == "flip" else content[:-8])
    assert "damaged" in str(refusal(saved))


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["backbone/model.safetensors", "model.pth", "odd.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_pickle_is_refused_and_never_opened(saved: Path, name: str, kind: str) -> None:
    sprung, path = saved / "sprung", saved / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Trap(sprung)}))
    else:
        torch.save({"model": Trap(sprung)}, path, _use_new_zipfile_serialization=kind == "zip")
    (saved / "backbone" / "config.json").unlink()
    error = refusal(saved if name.startswith("backbone") else path)
    assert "is a pickle" in error.error and "safetensors" in (error.hint or "")
    if name == "model.pth":
        assert "nothing of it was run" in error.error and ("holds getattr" in error.error) == (kind != "pickle")
    assert not sprung.exists()


def test_init_from_a_backbone_of_another_size(saved: Path) -> None:
    larger = tiny(24)
    record = initial.load_state(larger, weights.load(saved))
    theirs = weights.load(saved).backbone
    assert record["licence"] == "CC0-1.0"
    torch.testing.assert_close(larger.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight, rtol=0, atol=0)
    torch.testing.assert_close(larger.pos_embed[:, 0], theirs.pos_embed[:, 0], rtol=0, atol=0)
    images = torch.rand(1, 3, 24, 24)
    torch.testing.assert_close(larger(images).cls, theirs(images).cls)
    with pytest.raises(SaccadeError, match="another architecture"):
        initial.load_state(tiny(depth=1), weights.load(saved))


def test_preprocess_is_the_same_for_file_picture_and_pixels(saved: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    preprocess = weights.load(saved).preprocess
    one = preprocess(tmp_path / "a.png")
    assert one.shape == (3, 16, 16) and one.dtype == torch.uint8
    assert torch.equal(one, preprocess(Image.open(tmp_path / "a.png")))
    assert torch.equal(one, preprocess(torch.from_numpy(noise).permute(2, 0, 1)))
    reference = Image.fromarray(noise).resize((16, 21), Image.Resampling.BICUBIC).crop((0, 2, 16, 18))
    apart = np.abs(np.asarray(reference).astype(int) - one.permute(1, 2, 0).numpy())
    assert apart.max() <= 2


def test_preprocess_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Preprocess.at(224) == Preprocess(256, 224)
    assert Preprocess.at(32).resize == 32  # small pictures keep their border
    enlarged, resized = [], encoder_page.resized
    monkeypatch.setattr(
        encoder_page, "resized", lambda pixels, *how: enlarged.append(pixels.shape) or resized(pixels, *how)
    )
    strip = torch.zeros(3, 2, 4000, dtype=torch.uint8)
    assert Preprocess.at(224)(strip).shape == (3, 224, 224)
    assert max(enlarged[0]) <= 8  # a strip enlarged whole would take gigabytes
    deep = torch.full((1, 3, 8, 8), 65535, dtype=torch.int32).to(torch.uint16)
    assert Preprocess.at(16)(deep).amax() == 1.0


def test_untrained_depends_on_the_seed_alone(saved: Path) -> None:
    encoder = weights.load(saved)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = untrained(encoder, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(
        first.backbone.blocks[0].attn.qkv.weight, untrained(encoder, 3).backbone.blocks[0].attn.qkv.weight
    )


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    weights.save_backbone(tmp_path / "again", weights.load(saved).backbone, {"recipe": "x", "licence": "CC0-1.0"})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / "backbone" / name).read_bytes()
    tensors = load_file(saved / "backbone" / "model.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")  # without config.json beside it
    assert "not a whole encoder" in str(refusal(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("content", [b"junk", b"hello, this is a letter", b"\x80\x02}q\x00", b""])
def test_what_is_no_pickle_at_all_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(SaccadeError, match="nothing of it was run or loaded") as caught:
        weights.load(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_one_picture_without_a_batch_axis_is_told(saved: Path) -> None:
    encoder = weights.load(saved)
    with pytest.raises(SaccadeError, match=r"reads batches.*encoder\(picture\[None\]\)"):
        encoder(torch.zeros(3, 16, 16))


def test_init_of_another_architecture_names_the_right_one(saved: Path) -> None:
    encoder = weights.load(saved)
    encoder.record["arch"] = "vit-ti/4"
    with pytest.raises(SaccadeError, match="it is vit-ti/4: give --arch"):
        initial.load_state(tiny(depth=1), encoder)

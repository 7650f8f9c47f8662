"""Files of other kinds: big_vision's .npz, OpenAI's TorchScript archives, training checkpoints; and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_clip import _apart, _images, _model, _official_clip, _ours, _plain, _theirs
from torch import Tensor, nn

from saccade import initial, published, vit, weights
from saccade.errors import SaccadeError
from saccade.tensors import read_tensors

HEADS, LAYERS = 4, 2


def refusal(place: Path) -> str:
    with pytest.raises(SaccadeError) as caught:
        weights.load(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def known(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The tiny network as a published size: these files do not say how many heads there are."""
    monkeypatch.setitem(published.families()[family].sizes, "tiny", published.Size(32, 2, HEADS, 48, 8, 32, 0))


def big_vision(tensors: dict[str, Tensor], stacked: bool) -> dict[str, np.ndarray]:
    """transformers' SigLIP as big_vision keeps it, written from the fact sheet with einsum and reshape alone."""
    given = {name: tensor.numpy() for name, tensor in tensors.items()}
    out: dict[str, np.ndarray] = {}

    def attention(before: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], last: str) -> None:
        for name, (weight, bias) in parts.items():
            out[f"{before}{name}/kernel"] = np.einsum("hed->dhe", weight.reshape(HEADS, -1, weight.shape[1]))
            out[f"{before}{name}/bias"] = bias.reshape(HEADS, -1)
        weight = given[f"{last}.weight"]
        out[f"{before}out/kernel"] = np.einsum("ohe->heo", weight.reshape(len(weight), HEADS, -1))
        out[f"{before}out/bias"] = given[f"{last}.bias"]

    def dense(ours: str, theirs: str) -> None:
        out[f"{ours}/kernel"], out[f"{ours}/bias"] = (
            np.swapaxes(given[f"{theirs}.weight"], 0, 1),
            given[f"{theirs}.bias"],
        )

    def norm(ours: str, theirs: str) -> None:
        out[f"{ours}/scale"], out[f"{ours}/bias"] = given[f"{theirs}.weight"], given[f"{theirs}.bias"]

    out["embedding/kernel"] = np.einsum("dcij->ijcd", given["embeddings.patch_embedding.weight"])
    out["embedding/bias"] = given["embeddings.patch_embedding.bias"]
    out["pos_embedding"] = given["embeddings.position_embedding.weight"][None]
    mixer = "MultiHeadDotProductAttention_0/"
    for n in range(LAYERS):
        here, there = f"Transformer/encoderblock_{n}/", f"encoder.layers.{n}."
        parts = {
            name: (given[f"{there}self_attn.{letter}_proj.weight"], given[f"{there}self_attn.{letter}_proj.bias"])
            for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
        }
        attention(here + mixer, parts, f"{there}self_attn.out_proj")
        for number in (0, 1):
            norm(f"{here}LayerNorm_{number}", f"{there}layer_norm{number + 1}")
            dense(f"{here}MlpBlock_0/Dense_{number}", f"{there}mlp.fc{number + 1}")
    norm("Transformer/encoder_norm", "post_layernorm")
    packed = np.split(given["head.attention.in_proj_weight"], 3), np.split(given["head.attention.in_proj_bias"], 3)
    attention(
        f"MAPHead_0/{mixer}",
        dict(zip(("query", "key", "value"), zip(*packed, strict=True), strict=True)),
        "head.attention.out_proj",
    )
    norm("MAPHead_0/LayerNorm_0", "head.layernorm")
    for number in (0, 1):
        dense(f"MAPHead_0/MlpBlock_0/Dense_{number}", f"head.mlp.fc{number + 1}")
    out["MAPHead_0/probe"] = given["head.probe"]
    if stacked:
        for name in [name for name in out if "encoderblock_0/" in name]:
            layers = [out.pop(name.replace("encoderblock_0/", f"encoderblock_{n}/")) for n in range(LAYERS)]
            out[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(layers)
    return {f"params/img/{name}": np.ascontiguousarray(array) for name, array in out.items()}


TEXTS = {
    "params/txt/Embed_0/embedding": np.ones((9, 32), np.float32),
    "params/txt/Encoder_0/encoderblock/LayerNorm_0/scale": np.ones((2, 32), np.float32),
    "params/t": np.ones(1, np.float32),
}


@pytest.mark.parametrize("stacked", [False, True], ids=["siglip", "siglip2"])
def test_big_vision_s_own_file(stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, "siglip")
    network = _model("siglip")
    network.save_pretrained(tmp_path / "theirs")
    arrays = big_vision(load_file(tmp_path / "theirs" / "model.safetensors"), stacked)
    np.savez(tmp_path / "webli_en.npz", **arrays, **TEXTS)
    encoder = weights.load(tmp_path / "webli_en.npz")
    record = encoder.record
    assert (record["family"], record["naming"]) == ("siglip", "big_vision stacked" if stacked else "big_vision")
    assert record["pooling"] == "map" and any(name.startswith("params/txt/") for name in record["ignored"])
    assert not record["missing"] and not record["unexpected"]
    for size in ((32, 32), (32, 48)):
        assert _apart(_ours(encoder, _images(size)), _theirs("siglip", network, _images(size))) < 1e-5
    naming = published.families()["siglip"].namings[record["naming"]]
    back = published.to_theirs(naming, encoder.backbone.state_dict(), "params/img/")
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name].numpy(), arrays[name]) for name in arrays)


@pytest.mark.parametrize("change", ["query", "LayerNorm_0", "Dense_0", "embedding"])
def test_a_big_vision_array_of_another_order_is_seen(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be read as silently as the right one: another axis first, and two that are exchanged."""
    known(monkeypatch, "siglip")
    network = _model("siglip")
    network.save_pretrained(tmp_path / "theirs")
    arrays = big_vision(load_file(tmp_path / "theirs" / "model.safetensors"), stacked=False)
    block = "params/img/Transformer/encoderblock_1/"
    if change == "query":
        name = f"{block}MultiHeadDotProductAttention_0/query/kernel"
        arrays[name] = np.ascontiguousarray(arrays[name].transpose(0, 2, 1)).reshape(arrays[name].shape)
    elif change == "embedding":
        arrays["params/img/embedding/kernel"] = np.ascontiguousarray(
            arrays["params/img/embedding/kernel"].swapaxes(0, 1)
        )
    elif change == "LayerNorm_0":
        one, other = f"{block}LayerNorm_0/scale", f"{block}LayerNorm_1/scale"
        arrays[one], arrays[other] = arrays[other], arrays[one]
    else:
        arrays[f"{block}MlpBlock_0/Dense_0/kernel"] = arrays[f"{block}MlpBlock_0/Dense_0/kernel"][::-1].copy()
    np.savez(tmp_path / "webli.npz", **arrays)
    assert _apart(_ours(weights.load(tmp_path / "webli.npz"), _images()), _theirs("siglip", network, _images())) > 1e-3


def test_half_a_big_vision_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, "siglip")
    arrays = big_vision(load_file(_saved("siglip", tmp_path)), stacked=False)
    np.savez(tmp_path / "half.npz", **{name: array for name, array in arrays.items() if "encoderblock_1" not in name})
    assert "nearest is siglip (big_vision names)" in refusal(tmp_path / "half.npz")
    np.savez(tmp_path / "less.npz", **{name: array for name, array in arrays.items() if not name.endswith("out/bias")})
    text = refusal(tmp_path / "less.npz")
    assert "3 missing" in text and "params/img/MAPHead_0/MultiHeadDotProductAttention_0/out/bias" in text


def _saved(family: str, folder: Path) -> Path:
    _model(family).save_pretrained(folder / "theirs")
    return folder / "theirs" / "model.safetensors"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_objects_and_damage_in_an_npz_are_refused(tmp_path: Path) -> None:
    path, sprung = tmp_path / "webli.npz", tmp_path / "sprung"
    np.savez(path, **{"params/img/pos_embedding": np.array([Trap(sprung)], dtype=object)})
    assert "'params/img/pos_embedding'" in refusal(path) and "nothing of it was run" in refusal(path)
    assert not sprung.exists()
    np.savez(path, a=np.ones(999))
    path.write_bytes(path.read_bytes()[:500])
    assert "cannot be read at 'its list'" in refusal(path)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    assert "nothing of it was run" in refusal(path)
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 999), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("params/img/pos_embedding.npy", header)
    assert "'params/img/pos_embedding'" in refusal(path)
    assert not sprung.exists()


def test_bfloat16_in_an_npz(tmp_path: Path) -> None:
    """numpy has no such type: flax's arrays come as two bytes without a meaning."""
    values = torch.randn(5).bfloat16()
    np.savez(tmp_path / "a.npz", x=values.view(torch.int16).numpy().view("V2"), y=np.arange(3, dtype=">i4"))
    read = read_tensors(tmp_path / "a.npz")
    assert torch.equal(read["x"], values) and read["y"].tolist() == [0, 1, 2]


class Part(nn.Module):
    """A module with nothing but what is put into it, which a script can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def script(tensors: dict[str, Tensor], path: Path) -> Path:
    """An archive as torch.jit.save writes it, whose modules' attributes have these names."""
    whole = Part()
    for name, tensor in tensors.items():
        *folders, last = name.split(".")
        here: nn.Module = whole
        for folder in folders:
            if folder not in dict(here.named_children()):
                here.add_module(folder, Part())
            here = here.get_submodule(folder)
        here.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    torch.jit.save(torch.jit.script(whole), path)
    return path


scripted = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")


@scripted
def test_openai_s_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, "clip")
    network = _model("clip")
    network.half().float()
    network.save_pretrained(tmp_path / "theirs")
    tensors = {name: tensor.half() for name, tensor in _official_clip(network.state_dict()).items()}
    tensors |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(32)}
    path = script(tensors, tmp_path / "ViT-B-32.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    read = read_tensors(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    encoder = weights.load(path)
    assert (encoder.record["family"], encoder.record["naming"], encoder.record["prefix"]) == (
        "clip",
        "official",
        "visual.",
    )
    assert encoder.backbone.norm.weight.dtype == torch.float32
    assert "visual.proj" in encoder.record["ignored"]
    assert _apart(_ours(encoder, _images((32, 48))), _theirs("clip", network, _images((32, 48)))) < 1e-5


def rewritten(path: Path, name: str, content: bytes, packed: bool = False) -> None:
    """The zip again, with another content in one of its files."""
    with zipfile.ZipFile(path) as archive:
        files = {file: archive.read(file) for file in archive.namelist()}
    name = next(file for file in files if file.endswith(name))
    with zipfile.ZipFile(path, "w") as archive:
        for file, bytes_ in (files | {name: content}).items():
            archive.writestr(file, bytes_, zipfile.ZIP_DEFLATED if packed and file == name else zipfile.ZIP_STORED)


def storage(numel: int, size: tuple[int, ...], stride: tuple[int, ...], root: str = "__torch__") -> bytes:
    """A pickle of one module with one tensor on the storage `0`, as TorchScript writes it."""
    out = io.BytesIO()

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value == "the storage" else None

    pickler = Pickler(out, protocol=2)
    pickler.proto = 2
    out.write(b"\x80\x02c" + f"{root}\nM\n".encode() + b")\x81}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(")
    for value in ("the storage", 0, size, stride, False, {}):
        pickler.save(value)
    out.write(b"tRsb.")
    return out.getvalue()


@scripted
def test_a_hostile_archive_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    path, sprung = tmp_path / "ViT-B-32.pt", tmp_path / "sprung"
    script({"visual.proj": torch.ones(3)}, path)
    good = storage(3, (3,), (1,))
    rewritten(path, "/data.pkl", good)
    assert read_tensors(path)["x"].tolist() == [1, 1, 1]
    for content, said in (
        (pickle.dumps(Trap(sprung)), "posix.system"),
        (pickle.dumps({"x": Trap(sprung)}, protocol=0), "posix.system"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "builtins.eval"),
        (b"ctorch\nload\n(X\x01\x00\x00\x001tR.", "torch.load"),
        (b"c__torch__\nM\n)\x81}X\x04\x00\x00\x00evil" + pickle.dumps(Trap(sprung), 2)[2:-1] + b"sb.", "posix.system"),
        (storage(9, (1 << 40,), (1,)), "out of bounds"),
        (storage(3, (4,), (1,)), "out of bounds"),
        (storage(3, (3,), (1,), "torch"), "torch.M"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "memory for 4294967295 objects"),
        (b"\x80\x02(((", "cannot be read"),
        (good.replace(b"FloatStorage", b"FlaatStorage"), "torch.FlaatStorage"),
    ):
        rewritten(path, "/data.pkl", content)
        text = refusal(path)
        assert said in text and "nothing of it was run" in text, text
    rewritten(path, "/data.pkl", good, packed=True)
    assert "packed form" in refusal(path)
    rewritten(path, "/data.pkl", good)
    rewritten(path, "/byteorder", b"big")
    assert "big-endian" in refusal(path)
    assert not sprung.exists()


ODD: dict[str, dict[str, Any]] = {
    "a list for a name": {"model_type": ["vit_mae"]},
    "a family of another": {"model_type": "dinov2"},
    "a billion blocks": {"num_hidden_layers": 10**9},
    "words for numbers": {"num_hidden_layers": "two", "num_attention_heads": "four"},
    "no heads": {"num_attention_heads": 0},
    "less than none": {"num_attention_heads": -4, "num_hidden_layers": -2},
    "heads that do not fit": {"num_attention_heads": 5},
    "a number for a part": {"vision_config": 3},
}


@pytest.mark.parametrize("case", ODD)
def test_a_config_json_that_says_what_cannot_be(case: str, tmp_path: Path) -> None:
    """Refused by name, at once, and nothing of it believed."""
    path = _saved("siglip", tmp_path).parent / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ODD[case]))
    assert "saved" not in refusal(path.parent)


@pytest.mark.parametrize("settings", [{"pretrained_cfg": 7}, {"pretrained_cfg": {"mean": 3}}, {"architecture": [1]}])
def test_what_timm_says_may_be_nonsense(settings: dict[str, Any], tmp_path: Path) -> None:
    tensors = _plain(load_file(_saved("timm-vit", tmp_path)))
    (tmp_path / "vit_given").mkdir()
    (tmp_path / "vit_given" / "config.json").write_text(json.dumps({"num_attention_heads": 4} | settings))
    save_file(tensors, tmp_path / "vit_given" / "model.safetensors")
    if "architecture" in settings:
        assert weights.load(tmp_path / "vit_given").record["family"] == "timm-vit"
    else:
        refusal(tmp_path / "vit_given")


def test_a_name_that_asks_for_a_billion_blocks(tmp_path: Path) -> None:
    save_file({"blocks.999999999.norm1.weight": torch.ones(3)}, tmp_path / "dino.safetensors")
    assert "not a whole encoder" in refusal(tmp_path / "dino.safetensors")
    tensors = _plain(load_file(_saved("timm-vit", tmp_path)))
    save_file(tensors | {"blocks.999999999.norm1.weight": torch.ones(32)}, tmp_path / "dino.safetensors")
    assert "1000000000 blocks" in refusal(tmp_path / "dino.safetensors")
    np.savez(tmp_path / "a.npz", **{"params/img/Transformer/encoderblock/LayerNorm_0/scale": np.ones((10**9, 0))})
    assert "not a whole encoder" in refusal(tmp_path / "a.npz") or "none of its" in refusal(tmp_path / "a.npz")


def test_what_is_refused_leaves_a_network_as_it_was(tmp_path: Path) -> None:
    encoder = weights.load(_saved("timm-vit", tmp_path).parent.rename(tmp_path / "vit_given"))
    network = vit.ViT(encoder.backbone.config.model_copy(update={"depth": 3}))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(SaccadeError, match="12 missing"):
        initial.load_state(network, encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def checkpoint(kind: str, wanted: dict[str, Tensor]) -> tuple[dict[str, Any], str]:
    """A training checkpoint as its authors' code writes it, and what stands before the names that are to be taken."""
    other = {name: torch.full_like(tensor, 0.5) for name, tensor in wanted.items()}

    def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}

    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_g": torch.ones(3, 1)}
    rest = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 7}
    student = below("module.", below("backbone.", other) | head)
    if kind == "dino":
        return {"student": student, "teacher": below("backbone.", wanted) | head, **rest}, "teacher.backbone."
    if kind == "ibot":
        teacher = below("module.", below("backbone.", wanted) | head)
        return {"student": student, "teacher": teacher, **rest}, "teacher.module.backbone."
    if kind == "ibot alone":
        return {"state_dict": wanted}, "state_dict."
    if kind == "ibot student":
        return {"student": wanted}, "student."
    if kind == "mae":
        decoder = {"mask_token": torch.ones(1, 1, 3), "decoder_blocks.0.norm1.weight": torch.ones(3)}
        return {"model": wanted | decoder, **rest}, "model."
    if kind == "ijepa":
        file = {"encoder": below("module.", other), "target_encoder": below("module.", wanted)}
        return file | {"predictor": {"module.mask_token": torch.ones(1, 1, 3)}, **rest}, "target_encoder.module."
    return {"encoder": below("module.", wanted), **rest}, "encoder.module."


@pytest.mark.parametrize("kind", ["dino", "ibot", "ibot alone", "ibot student", "mae", "ijepa", "ijepa encoder"])
def test_of_a_training_checkpoint_the_right_network_is_taken(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says which by what stands before its names (pitfall 23)."""
    family = kind.partition(" ")[0]
    known(monkeypatch, family)
    like = "ijepa" if family == "ijepa" else "timm-vit"
    wanted = _plain(load_file(_saved(like, tmp_path)))
    if family == "ibot":
        wanted["masked_embed"] = torch.randn(1, 32)
    content, prefix = checkpoint(kind, wanted)
    torch.save(content, tmp_path / f"{family}.pth")
    encoder = weights.load(tmp_path / f"{family}.pth")
    assert (encoder.record["family"], encoder.record["prefix"]) == (family, prefix)
    assert torch.equal(encoder.backbone.blocks[1].attn.qkv.weight, wanted["blocks.1.attn.qkv.weight"])
    assert torch.equal(encoder.backbone.norm.bias, wanted["norm.bias"])
    if family == "ibot":
        assert torch.equal(encoder.backbone.mask_token, wanted["masked_embed"])
    taken = {f"{prefix}{name}" for name in wanted}
    assert not taken & set(encoder.record["ignored"]) and encoder.record["matched"] == len(wanted)

"""ONNX: what goes out is the same in onnxruntime at every size, and what comes in is what the file says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

import saccade
from saccade import backbone, published
from saccade.data import Sample, Source
from saccade.embed import embed
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate import evaluate
from saccade.initial import load_state
from saccade.onnx import check, files, quantise, write, writing
from saccade.onnx import matrices as int8_matrices
from saccade.onnx.int8 import agreement, prepared
from saccade.vit import Features, ViTConfig
from saccade.weights import load, save_backbone

TINY = {"depth": 1, "width": 24, "heads": 2, "hidden": 32, "image_size": 32}
QUICK: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("vit-ti/8", {**TINY, "position_offset": 0.1, "pooling": "map", "mask_token": True}),
    "rope": (
        "vit-ti/8",
        {**TINY, "position": "rope", "rope_rounded": True, "qkv_bias": "k_masked", "registers": 2, "layer_scale": 1.0},
    ),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("vit-ti/8", {**TINY, "cls": False, "pooling": "map", "activation": "gelu_tanh"}),
    "mae": ("vit-ti/8", {**TINY, "pooling": "mean"}),
    "registers": ("vit-ti/8", {**TINY, "position_antialias": True, "registers": 2}),
    "naflex": ("vit-ti/8", {**TINY, "position_antialias": True, "position_linear": True}),
    "both": ("vit-ti/8", {**TINY, "position_antialias": True, "position_offset": 0.1}),
    "clip": ("vit-ti/8", {**TINY, "pre_norm": True, "activation": "gelu_quick", "patch_bias": False}),
    "swiglu": ("vit-ti/8", {**TINY, "position": "rope", "activation": "swiglu"}),
    "sincos": ("vit-ti/8", {**TINY, "position": "sincos"}),
    "mocov3": ("vit-ti/8", {**TINY, "position": "sincos_y_first"}),
    "tokenless": ("vit-ti/8", {**TINY, "position": "none", "cls_position": False}),
    "bands": ("vit-ti/8", {**TINY, "channels": 5}),
    "resnet-8": ("resnet-8/16", {"image_size": 32}),
    "resnet-50": ("resnet-50/32", {"image_size": 64}),
    "conv": ("conv-4/16", {"image_size": 32}),
    "convnext-cls": ("convnext-a/32", {"image_size": 64, "pooled_cls": True}),
    "convnext": ("convnext-a/32", {"image_size": 64}),
}


def drawn(kind: str) -> Encoder:
    """A tiny encoder of a kind with every tensor redrawn, so that none is without effect."""
    arch, switches = (QUICK | SLOW)[kind]
    network = backbone.build(arch, **switches)
    generator = torch.Generator().manual_seed(0)
    formula = {"pos_embed"} if str(switches.get("position", "")).startswith("sincos") else set()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name in formula or not tensor.is_floating_point() or name in ("mean", "std") or name.endswith("periods"):
            continue
        matrix = tensor.ndim > 1 and name != "pos_embed"
        spread = tensor[0].numel() ** -0.5 if matrix else 0.3
        around = 1.0 if name.endswith(("norm.weight", "gamma", "running_var")) or ".bn" in name else 0.0
        around = 1.0 if not matrix and "norm" in name and name.endswith("weight") else around
        values = around + spread * torch.randn(tensor.shape, generator=generator)
        tensor.data.copy_(values.abs() if name.endswith("running_var") else values)
    return Encoder(network, {"family": "saccade", "licence": "MIT", "recipe": kind}).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Encoder, Path]]:
    """An encoder of a kind and the folder with its model.onnx; each is exported once."""
    made: dict[str, tuple[Encoder, Path]] = {}

    def make(kind: str) -> tuple[Encoder, Path]:
        if kind not in made:
            encoder, folder = drawn(kind), tmp_path_factory.mktemp(kind)
            assert write(encoder, folder) == [folder / "model.onnx"]
            assert [path.name for path in folder.iterdir()] == ["model.onnx"]
            made[kind] = encoder, folder
        return made[kind]

    return make


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_onnxruntime_gives_the_same_features(written: Any, kind: str) -> None:
    """Slow: torch takes seconds for an export, whatever the size of the network."""
    encoder, folder = written(kind)
    assert check(encoder, folder) < (3e-5 if kind == "conv" else 1e-5)  # its last map is far from 1
    graph = onnx.load(folder / "model.onnx").graph
    operators = {node.op_type for inner in files._graphs(graph) for node in inner.node}
    assert not operators & {"If", "Loop", "Scan", "Resize"}
    shapes = {value.name: files_axes(value) for value in [*graph.input, *graph.output]}
    config = encoder.backbone.config
    assert shapes.pop("images") == ["batch", config.channels, "height", "width"]
    assert shapes.pop("patches") == ["batch", "patches", config.width]
    assert shapes.pop("embedding") == ["batch", config.width]
    assert shapes == ({"cls": ["batch", config.width]} if config.cls else {})


def files_axes(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_check_sees_another_network(written: Any) -> None:
    _, folder = written("rope")
    other = drawn("rope")
    with torch.no_grad():
        other.backbone.blocks[0].mlp.fc2.bias[3] += 0.01
    assert check(other, folder) > 1e-3


def test_what_is_written_says_what_it_is_and_nothing_of_this_machine(written: Any) -> None:
    _, folder = written("rope")
    data = (folder / "model.onnx").read_bytes()
    assert b"site-packages" not in data and b"/saccade/" not in data
    said = {prop.key: prop.value for prop in onnx.load(folder / "model.onnx").metadata_props}
    assert said["licence"] == "MIT" and json.loads(said["saccade"])["record"]["recipe"] == "rope"


def test_the_eager_network_is_left_as_it_was(written: Any) -> None:
    encoder, _ = written("rope")
    assert type(encoder.backbone).__name__ == "ViT"


@pytest.mark.parametrize("kind", QUICK)
def test_ours_comes_back(written: Any, kind: str) -> None:
    encoder, folder = written(kind)
    again = load(folder)
    assert again.record["licence"] == "MIT" and again.record["recipe"] == kind and len(again.record["hash"]) == 64
    assert (again.preprocess, again.grid, again.device) == (encoder.preprocess, encoder.grid, encoder.device)
    assert again.backbone.config == encoder.backbone.config
    bytes_ = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    for images in (bytes_, bytes_ / 255):
        with torch.inference_mode():
            ours, theirs = encoder(images), again(images)
            assert isinstance(theirs, Features) and theirs.grid == ours.grid
            assert torch.equal(theirs.positions, ours.positions)
            assert (theirs.cls is None) == (ours.cls is None)
            torch.testing.assert_close(theirs.patches, ours.patches, atol=2e-5, rtol=0)
            torch.testing.assert_close(again.embedding(theirs), encoder.embedding(ours), atol=2e-5, rtol=0)
            torch.testing.assert_close(
                again.backbone.pooled(images), encoder.backbone.pooled(images), atol=2e-5, rtol=0
            )


def test_it_answers_and_does_not_learn(written: Any, tmp_path: Path) -> None:
    _, folder = written("rope")
    again = saccade.load(folder / "model.onnx")
    for attempt in (
        lambda: again.train(),
        lambda: again.backbone(torch.rand(1, 3, 32, 32), drop=torch.ones(1, 2)),
        lambda: save_backbone(tmp_path, again.backbone, {}),
        lambda: load_state(drawn("rope").backbone, again),
        lambda: write(again, tmp_path),
    ):
        with pytest.raises(SaccadeError):
            attempt()
    with pytest.raises(SaccadeError, match="channels"):
        again(torch.rand(1, 4, 32, 32))
    with pytest.raises(SaccadeError, match="divisible"):
        again(torch.rand(1, 3, 30, 32))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes: red and green."""
    place, generator = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number in range(2 * count):
            folder = place / split / ("green" if number % 2 else "red")
            folder.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 128, (40, 40, 3), dtype=np.uint8)
            noise[..., number % 2] += 127
            Image.fromarray(noise).save(folder / f"{number}.png")
    return place


def test_ours_can_be_evaluated_embedded_and_searched(written: Any, labelled: Path, tmp_path: Path) -> None:
    encoder, folder = written("rope")
    theirs = evaluate(folder, labelled, tasks=("knn",))
    ours = evaluate(encoder, labelled, tasks=("knn",))
    assert theirs["knn"] == ours["knn"] and theirs["baselines"] == ours["baselines"]
    index = embed(folder, labelled / "test", out=tmp_path / "index")
    assert index.search(next((labelled / "test" / "red").iterdir()), k=1)[0].score == pytest.approx(1, abs=1e-4)


def foreign(
    path: Path, *, last: bool, kind: int = TensorProto.UINT8, side: int | None = None, domain: str = ""
) -> Path:
    """A graph of somebody else: the mean of each channel's values, and their sum, as a vector of 6."""
    sides: list[Any] = ["h", "w"] if side is None else [side, side]
    picture = helper.make_tensor_value_info("picture", kind, ["n", *sides, 3] if last else ["n", 3, *sides])
    vector = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["n", "d"])
    axes = numpy_helper.from_array(np.array([1, 2] if last else [2, 3]), "axes")
    mix = numpy_helper.from_array(np.arange(18, dtype=np.float32).reshape(3, 6), "mix")
    nodes = [
        helper.make_node("Cast", ["picture"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "mix"], ["vector"], domain=domain),
    ]
    graph = helper.make_graph(nodes, "g", [picture], [vector], [axes, mix])
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("last", [False, True])
def test_a_graph_of_others_is_fed_as_it_declares(tmp_path: Path, last: bool) -> None:
    encoder = load(foreign(tmp_path / "theirs.onnx", last=last))
    images = torch.randint(0, 256, (2, 3, 30, 50), dtype=torch.uint8)
    wanted = images.float().mean((2, 3)) @ torch.arange(18.0).view(3, 6)
    for pictures in (images, images / 255):
        features = encoder(pictures)
        torch.testing.assert_close(encoder.embedding(features), wanted)
        assert features.patches.shape == (2, 0, 6) and encoder.backbone.config.width == 6
    assert encoder.record["family"] == "onnx" and encoder.record["licence"] == "unknown"


def test_floats_need_a_word_on_their_normalisation(tmp_path: Path) -> None:
    path = foreign(tmp_path / "theirs.onnx", last=False, kind=TensorProto.FLOAT, side=20)
    with pytest.raises(SaccadeError, match="how they are normalised"):
        load(path)
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    encoder = load(path)
    images = torch.rand(2, 3, 20, 20)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in said.values())
    wanted = ((images - mean) / std).mean((2, 3)) @ torch.arange(18.0).view(3, 6)
    torch.testing.assert_close(encoder.embedding(encoder(images)), wanted, atol=1e-4, rtol=1e-5)
    assert encoder.preprocess.crop == 20
    with pytest.raises(SaccadeError, match=r"\[20\] pixels only, not 24"):
        load(path, image_size=24)


def test_one_vector_is_evaluated_without_patches_and_network(tmp_path: Path, labelled: Path) -> None:
    path = foreign(tmp_path / "theirs.onnx", last=True)
    result = evaluate(path, labelled, tasks=("knn",), image_size=32)
    assert result["knn"] == 100 and "untrained" not in result["baselines"]
    assert embed(path, labelled / "test", out=tmp_path / "index", image_size=32).state["dim"] == 6
    with pytest.raises(SaccadeError, match="no patches"):
        embed(path, labelled / "test", out=tmp_path / "other", tokens=("mean",), image_size=32)


def test_what_is_no_graph_or_reaches_outside_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\xff\x00no graph")
    with pytest.raises(SaccadeError, match="no readable ONNX file"):
        load(damaged)
    with pytest.raises(SaccadeError, match=r"not onnxruntime's own: their\.own"):
        load(foreign(tmp_path / "custom.onnx", last=True, domain="their.own"))
    path = foreign(tmp_path / "theirs.onnx", last=True)
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret").write_bytes(bytes(72))
    for location in ("../secret", str(tmp_path / "secret"), "gone"):
        model = onnx.load(path)
        model.graph.initializer[1].ClearField("raw_data")
        model.graph.initializer[1].data_location = TensorProto.EXTERNAL
        model.graph.initializer[1].external_data.add(key="location", value=location)
        (tmp_path / "inner" / "reaching.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(SaccadeError, match="no file beside it"):
            load(tmp_path / "inner" / "reaching.onnx")


def test_weights_beside_the_file_are_read_and_count_for_its_hash(tmp_path: Path) -> None:
    path = foreign(tmp_path / "theirs.onnx", last=True)
    onnx.save(onnx.load(path), path, save_as_external_data=True, size_threshold=64, location="theirs.data")
    before = load(path).record["hash"]
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert load(path).embedding(load(path)(images)).shape == (1, 6)
    data = (tmp_path / "theirs.data").read_bytes()
    (tmp_path / "theirs.data").write_bytes(data[:-1] + b"\x40")
    assert load(path).record["hash"] != before


def test_a_graph_that_says_too_little_is_refused(tmp_path: Path) -> None:
    model = onnx.load(foreign(tmp_path / "theirs.onnx", last=True))
    model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)
    (tmp_path / "map.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SaccadeError, match="does not give one vector"):
        load(tmp_path / "map.onnx")


def test_weights_of_a_known_family_are_read_out_of_a_graph(tmp_path: Path) -> None:
    """Matrices lie transposed under numbers, the position table in two pieces, as torch's exporter leaves them."""
    family = published.families()["dinov2"]
    size = family.sizes["vit-s/14"]
    config = {**family.switches, **size.numbers, "depth": 12, "mask_token": False, "position_offset": 0.1}
    network = backbone.FAMILIES["vit"].network(backbone.FAMILIES["vit"].config(**config)).eval()
    named = published.to_theirs(family.namings["transformers"], network.state_dict(), "backbone.")
    path = tmp_path / "vit_s.onnx"
    onnx.save(anonymous(named), path)
    encoder = load(path)
    assert encoder.record["family"] == "dinov2" and encoder.record["naming"] == "transformers"
    assert encoder.backbone.config.position_offset == 0  # this graph resizes to exact sides
    for name, tensor in network.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[name], tensor), name


def anonymous(named: dict[str, torch.Tensor]) -> Any:
    """Tensors as they lie in a graph: a node each, in the places that an exporter names nodes by."""
    nodes, stored = [], []

    def keep(values: torch.Tensor, name: str) -> str:
        stored.append(numpy_helper.from_array(values.detach().numpy().copy(), name))
        return name

    for number, (name, tensor) in enumerate(named.items()):
        place = "/" + name.rpartition(".")[0].replace(".", "/").replace("layer/", "layer.")
        if name.endswith("position_embeddings"):
            for operator, part in (("Concat", tensor[:, :1]), ("Reshape", tensor[:, 1:])):
                piece = keep(part, f"onnx::{operator}_{number}{len(stored)}")
                nodes.append(helper.make_node(operator, ["x", piece], [piece + "_out"], name=f"{place}/{operator}"))
        elif name.endswith("weight") and tensor.ndim == 2:
            matrix, out = keep(tensor.T.contiguous(), f"onnx::MatMul_{number}"), f"{name}_out"
            nodes.append(helper.make_node("MatMul", ["x", matrix], [out], name=f"{place}/MatMul"))
            if number % 2:  # with its bias, or by its place alone
                bias = name.removesuffix("weight") + "bias"
                nodes.append(helper.make_node("Add", [bias, out], [out + "_sum"], name=f"{place}/Add"))
        else:
            keep(tensor, name)
    nodes.append(helper.make_node("Resize", ["x", "", "", "sizes"], ["resized"], mode="cubic"))
    vector = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [vector], [vector], stored))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_the_matrices_of_resizing_are_torchs(linear: bool, antialias: bool) -> None:
    table = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    config = ViTConfig(position_linear=linear, position_antialias=antialias)
    for to in ((3, 9), (6, 5), (11, 2)):
        down, across = (
            writing._resizing(n, side, config, torch.tensor(False)) for n, side in zip(to, (6, 5), strict=True)
        )
        mode = "bilinear" if linear else "bicubic"
        wanted = nn.functional.interpolate(table, size=to, mode=mode, antialias=antialias)
        torch.testing.assert_close(down @ table @ across.T, wanted, atol=1e-5, rtol=0)


class Colours(Source):
    """Plain pictures, each of a colour of its own with some noise, and a note of which were read."""

    def __init__(self, count: int):
        self.count, self.read = count, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        drawn = np.random.default_rng(index)
        pixels = drawn.integers(0, 200, (1, 3, 1, 1)) + drawn.integers(0, 56, (1, 3, 32, 32))
        return Sample(f"{index}", torch.from_numpy(pixels.astype(np.uint8)))


@pytest.mark.parametrize("kind", ["rope", pytest.param("conv", marks=pytest.mark.slow)])
def test_int8_that_keeps_the_neighbours_is_written(written: Any, tmp_path: Path, kind: str) -> None:
    encoder, folder = written(kind)
    shutil.copy(folder / "model.onnx", tmp_path)
    pictures = Colours(170)
    found = quantise(tmp_path, pictures, least=0.5)
    assert found["file"] == "model_int8.onnx" and 0.5 < found["overlap"] < 1 and 0 < found["top1"] <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model_int8.onnx"]
    assert len(set(pictures.read)) == len(pictures.read)  # what calibrates does not judge
    assert found["pictures"] == {"gate": 106, "calibration": 64} and found["kept"] == "nothing"
    assert {"fp32", "int8", "ratio"} == found["images_per_second"].keys()
    again = load(tmp_path / "model_int8.onnx")
    assert again.record["int8"]["overlap"] == found["overlap"] and again.record["recipe"] == kind
    stored = onnx.load(tmp_path / "model_int8.onnx").graph.initializer
    assert any(tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1 for tensor in stored)
    images = torch.stack([Colours(1)[n].pixels[0] for n in range(4)])
    with torch.inference_mode():
        ours, theirs = encoder.backbone.pooled(images), again.backbone.pooled(images)
    assert not torch.equal(ours, theirs) and nn.functional.cosine_similarity(ours, theirs).min() > 0.95


def test_int8_that_loses_neighbours_is_not_written(written: Any, tmp_path: Path) -> None:
    shutil.copy(written("rope")[1] / "model.onnx", tmp_path)
    with pytest.raises(SaccadeError, match=r"keeps \d\d\.\d% of the 10 nearest neighbours, and 100% are asked"):
        quantise(tmp_path, Colours(164), least=1.0)
    with pytest.raises(SaccadeError, match="163 pictures are too few"):
        quantise(tmp_path, Colours(163))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_activations_are_scaled_and_nothing_changes(written: Any, tmp_path: Path) -> None:
    """Before anything is rounded the network is the same, and every channel of a norm has about the same range."""
    encoder, folder = written("rope")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    graph_file = prepared(folder / "model.onnx", tmp_path)
    model = onnx.load(graph_file)
    found = int8_matrices.matrices(model.graph, encoder.backbone.config)
    assert len(found) == sum(isinstance(part, nn.Linear) for part in encoder.backbone.blocks.modules())
    seen = int8_matrices.look(graph_file, found, [images])
    scales = int8_matrices._smooth(model.graph, found, seen)
    onnx.save(model, graph_file)
    before, after = (
        files.session(file).run(None, {"images": images.numpy()}) for file in (folder / "model.onnx", graph_file)
    )
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) < 1e-5
    norms = [one for one in found if one.reads in scales and one.shape[0] < one.shape[1]]
    assert norms and all(
        (seen[one.reads].largest / scales[one.reads]).log().std() < 0.8 * seen[one.reads].largest.log().std()
        for one in norms
    )


def test_rounding_minds_what_the_matrix_meets() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, 8, generator=generator) @ torch.randn(8, 150, generator=generator)  # few directions
    weight = torch.randn(150, 20, generator=generator)
    steps = weight.abs().amax(0) / 127
    rounded = int8_matrices._round(weight, steps, tokens.T @ tokens)
    nearest = (weight / steps).round()
    assert rounded.dtype == torch.int8
    worse, better = ((tokens @ (whole * steps - weight)).square().mean() for whole in (nearest, rounded))
    assert better < worse / 10


def test_agreement_counts_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, others = torch.randn(2, 400, 16, generator=generator)
    assert agreement(vectors, 3 * vectors) == (1, 1)
    overlap, top1 = agreement(vectors, others)
    assert overlap == pytest.approx(10 / 399, abs=0.01) and top1 < 0.02
    swapped = vectors.clone()
    swapped[[0, 1]] = vectors[[1, 0]]  # two change places: theirs are all wrong, and a few of others'
    assert 0.98 < agreement(vectors, swapped)[0] < 1


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SaccadeError, match=r"saccade\[onnx\]"):
        write(drawn("conv"), tmp_path)


def test_clips_are_refused(tmp_path: Path) -> None:
    network = backbone.build("vit-ti/8", **TINY, patch_time=2, frames=4)
    with pytest.raises(SaccadeError, match="clips"):
        write(Encoder(network, {}), tmp_path)

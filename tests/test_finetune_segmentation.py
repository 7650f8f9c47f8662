"""The class of every pixel: heads, windows, views that crop masks alike, files, bad masks, and what must be beaten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from saccade import convnet, export, predict, vit
from saccade.draws import Draws
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.evaluate.masked import VOID, Classes
from saccade.finetune import cropping, finetune, maps, paint, pixelwise, task, tuned
from saccade.finetune.tasks import segmentation
from saccade.finetune.windows import Frame, slide

COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [128, 128, 128], [250, 20, 250]], dtype=np.uint8)
QUICK: dict[str, Any] = {"decoder_steps": 12}


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    config = vit.ViTConfig(width=32, depth=2, heads=2, hidden=32, patch=4, image_size=16, position="rope")
    return Encoder(vit.ViT(config), {"family": "saccade", "arch": "vit-test/4"}).eval()


def plant(root: Path, part: str, name: str, classes: list[int], size: tuple[int, int] = (16, 24)) -> None:
    """A picture of tiles of 8 pixels, each the colour of its class; class 3 is ignored."""
    tiles = np.resize(np.array(classes, dtype=np.uint8), (size[0] // 8, size[1] // 8))
    mask = tiles.repeat(8, axis=0).repeat(8, axis=1)
    for inner in ("images", "masks"):
        (root / part / inner).mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[mask]).save(root / part / "images" / f"{name}.png")
    Image.fromarray(mask * 2).save(root / part / "masks" / f"{name}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "masks"
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for number in range(count):
            plant(root, part, f"{number}", [*generator.integers(0, 3, 5).tolist(), 3])
    (root / "classes.txt").write_text("0 red\n2 green\n4 blue\n6 grey(ignore)\n")
    return root


def test_a_head_is_learned_examined_saved_and_used(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    run = finetune(encoder, data, task="segmentation", out=tmp_path / "run", **QUICK)
    summary = run.summary
    test = summary["test"]
    assert test["miou"] > 60  # colours are the classes, and the first block sees them
    assert set(test["classes"]) == {"red", "green", "blue"}
    assert set(test["baselines"]) == {"pixels", "untrained"} and test["baselines"]["pixels"]["miou"] > 90
    assert test["difference"]["against"] in test["baselines"]
    assert set(summary["chosen"]["heads"]) == {"linear", "decoder"}
    lines = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and "_counts" not in lines[0]
    with Image.open(run.path / lines[0]["mask"]) as mask, Image.open(data / lines[0]["key"]) as picture:
        assert mask.mode == "P" and mask.size == picture.size
        assert set(np.unique(np.array(mask)).tolist()) <= {0, 2, 4}  # the values that masks have, not places in a list
    assert (run.path / lines[0]["overlay"]).is_file()
    report = (run.path / "report.html").read_text()
    assert "could not be shown" not in report and "of pixels right" in report and "IoU in percent" in report
    again = predict(run, data / "test", out=tmp_path / "said")
    assert again["scores"]["miou"] == pytest.approx(test["miou"])
    assert (tmp_path / "said" / "masks" / "images" / "0.png").is_file()
    bare = predict(run, data / "test" / "images", out=tmp_path / "bare")
    assert bare["pictures"] == 4 and "scores" not in bare


def test_the_linear_head_is_the_probe_of_evaluate(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    from saccade.evaluate import segmentation as probe

    run = finetune(encoder, data, task="segmentation", head="linear", out=tmp_path / "run")
    expected = probe.evaluate(encoder, data, baselines=False)["segmentation"]
    assert run.summary["test"]["miou"] == pytest.approx(expected["miou"], abs=3)  # other pixels are drawn
    assert run.summary["chosen"]["heads"]["linear"]["penalty"] == expected["penalty"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_backbone_may_move(data: Path, encoder: Encoder, tmp_path: Path, mode: str) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    settings: dict[str, Any] = {"steps": 3, "batch": 4, "head": "linear", "workers": 0, "lr": 0.05}
    settings |= {"rank": 2} if mode == "lora" else {}
    run = finetune(encoder, data, task="segmentation", mode=mode, out=tmp_path / mode, **settings)
    assert run.summary["test"]["miou"] > 0
    assert {"miou"} <= run.metrics()[-1]["eval"].keys()
    moved = tuned.load(run.path).encoder.backbone.state_dict()
    best = run.record["best"]["step"]
    assert any(not torch.equal(before[name], moved[name]) for name in before) == (best > 1)  # the first step has rate 0
    assert all(line["gradient_norm"] > 0 for line in run.metrics())
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.backbone.state_dict().items())


def test_from_scratch(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    run = finetune(
        encoder, data, task="segmentation", mode="full", from_scratch=True, steps=2, batch=4, workers=0, **QUICK,
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.summary["chosen"]["steps"] == 2


def test_bad_masks_are_named_counted_and_nothing_is_lost(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    masks = data / "train" / "masks"
    (masks / "0.png").unlink()
    Image.new("L", (9, 9)).save(masks / "1.png")
    Image.fromarray(np.full((16, 24), 37, dtype=np.uint8)).save(masks / "2.png")
    Image.fromarray(np.full((16, 24), 6, dtype=np.uint8)).save(masks / "3.png")
    (data / "train" / "images" / "4.png").write_bytes(b"\x89PNG no")
    run = finetune(encoder, data, task="segmentation", head="linear", out=tmp_path / "run")
    told = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text().splitlines()]
    said = {line["key"]: line["reason"] for line in told}
    for name, words in enumerate(("no mask", "9x9", "value 37", "no pixel", "")):
        assert words in said[f"train/images/{name}.png"]
    split = run.summary["split"]
    assert len(said) == 5 and split["train"] + split["held"] == 5 and split["test"] == 4


def test_classes_that_one_side_lacks_are_said(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    (data / "classes.txt").write_text("0 red\n2 green\n4 blue\n5 violet\n6 grey(ignore)\n8 pink\n")
    plant(data, "test", "pink", [4, 0, 4, 0])
    run = finetune(encoder, data, task="segmentation", head="linear", out=tmp_path / "run")
    said = " ".join(run.summary["warnings"])
    assert "'violet'" in said and "'pink', which is never predicted; test has it" in said
    assert run.summary["test"]["classes"]["pink"] == 0 and run.summary["test"]["classes"]["violet"] is None


def test_one_class_only(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    for path in (data / "train" / "masks").glob("*.png"):
        Image.fromarray(np.full((16, 24), 2, dtype=np.uint8)).save(path)
    with pytest.raises(SaccadeError, match="only the class 'green'"):
        finetune(encoder, data, task="segmentation", out=tmp_path / "run")


def test_groups_are_never_split(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    for number in range(10):
        plant(data, "train", f"scene{number % 5}-{number}", [number % 3, 1, 2, 0])
    plant(data, "test", "scene3-again", [0, 1, 2, 0])
    settings: dict[str, Any] = {"head": "linear", "group_by": r"(scene\d+)", "out": tmp_path / "run"}
    run = finetune(encoder, data, task="segmentation", **settings)
    aside = {one["key"]: one["reason"] for one in run.summary["set_aside"]}
    assert set(aside) == {f"train/images/scene3-{number}.png" for number in (3, 8)}
    assert all("its group is in test" in reason for reason in aside.values())


def test_a_picture_in_one_window_is_one_forward_and_others_are_means() -> None:
    calls: list[tuple[int, ...]] = []

    def outputs(window: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        calls.append(tuple(window.shape))
        return F.interpolate(window[:, :1].float(), size=size, mode="bilinear", align_corners=False)

    frame = Frame(side=16, stride=4)
    images = torch.rand(2, 3, 16, 32)
    found = slide(images, frame, outputs, (40, 80))
    torch.testing.assert_close(found, F.interpolate(images[:, :1], size=(40, 80), mode="bilinear"))
    assert calls == [(2, 3, 16, 32)]
    long = torch.rand(1, 3, 16, 100)
    torch.testing.assert_close(slide(long, frame, outputs, (16, 100)), long[:, :1])  # every pixel is seen, and once
    assert len(calls) > 3 and all(call[3] == 32 for call in calls)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (19, 83), (300, 17)])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_windows_cover_every_pixel(height: int, width: int, scale: float | None) -> None:
    frame = Frame(side=16, stride=4, scale=scale, overlap=0.5)
    sized = frame.sized(height, width)
    assert all(side % 4 == 0 for side in sized)
    seen = torch.zeros(sized)
    high, wide = frame.window(sized)
    for top, left in frame.corners(sized):
        assert top % 4 == left % 4 == 0
        seen[top : top + high, left : left + wide] += 1
    assert seen.min() >= 1
    if scale is None:
        assert min(sized) == 16 and max(high, wide) <= 32


def test_the_answer_does_not_depend_on_windows(encoder: Encoder) -> None:
    """A linear head on a backbone that looks at each patch alone says the same in whichever window it stands."""
    torch.manual_seed(1)
    network = convnet.build("conv-4/16", image_size=64, channels=3)
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # only the middle is left
    lone = Encoder(network.eval(), {"family": "test"})
    said: dict[str, Any] = {"classes": ["a", "b"], "values": [0, 1], "kind": "linear", "widths": [256], "outputs": 2,
                            "channels": 3}  # fmt: skip
    narrow = segmentation.Head(**said, scale=1.0, overlap=0.5).eval()
    wide = segmentation.Head(**said, scale=None, overlap=0.0).eval()
    wide.load_state_dict(narrow.state_dict())
    picture = torch.rand(3, 64, 128)
    one = wide.outputs(lone, picture[None], (4, 8))  # 64 x 128 is one window here, and three squares there
    many = narrow.outputs(lone, picture[None], (4, 8))
    assert len(narrow.frame(lone).corners((64, 128))) == 3 and len(wide.frame(lone).corners((64, 128))) == 1
    torch.testing.assert_close(one[..., 1:3, 1], many[..., 1:3, 1], atol=2e-2, rtol=1e-2)


def test_views_crop_the_mask_as_the_picture(encoder: Encoder) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randint(0, 200, size, generator=generator, dtype=torch.uint8) for size in ((5, 8), (6, 6))]
    masks = [mask.repeat_interleave(64, 0).repeat_interleave(64, 1) for mask in masks]
    canvas = torch.zeros(2, 1, 3, 384, 512, dtype=torch.uint8)
    for n, mask in enumerate(masks):
        canvas[n, 0, :, : mask.shape[0], : mask.shape[1]] = mask
    sizes = torch.tensor([list(mask.shape) for mask in masks])
    batch = {"pixels": canvas, "size": sizes, "key": torch.tensor([1, 2])}
    for place in range(4):
        draws = Draws(place, 0, batch["key"], torch.zeros(2, dtype=torch.int64), torch.arange(2))
        settings = segmentation.Settings(colour=0.0)
        found = cropping.views(settings, batch, draws, 64, masks)
        # at the middle of a tile the picture shows what the mask says, whatever the crop, the size, and the mirror
        shown, said = (found["images"][:, 0] * 255).round(), found["targets"].float()
        flat = F.max_pool2d(said[:, None], 7, 1, 3)[:, 0] == -F.max_pool2d(-said[:, None], 7, 1, 3)[:, 0]
        assert flat.float().mean() > 0.05
        assert ((shown - said).abs()[flat] <= 2).all()
    rows = cropping.boxes(settings, sizes, draws, 64)
    assert rows.flip.any() or rows.box[:, 2:].unique().numel() > 1


def test_void_and_weights_in_the_loss() -> None:
    facts = {"classes": ["a", "b"], "pixels": [90, 10]}
    logits = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[0, 1], [VOID, 0]]], dtype=torch.uint8)
    plain = segmentation.loss(logits, mask, segmentation.Settings(), facts)
    each = F.cross_entropy(logits, torch.where(mask == VOID, 0, mask).long(), reduction="none")[0].flatten()
    assert float(plain) == pytest.approx(float(each[[0, 1, 3]].mean()))
    even = segmentation.loss(logits, mask, segmentation.Settings(balance=1.0), facts)
    expected = (each[0] / 0.9 + each[1] / 0.1 + each[3] / 0.9) / (1 / 0.9 + 1 / 0.1 + 1 / 0.9)
    assert float(even) == pytest.approx(float(expected))
    nothing = segmentation.loss(logits, torch.full_like(mask, VOID), segmentation.Settings(), facts)
    assert float(nothing) == 0.0


def test_rare_classes_may_count_more(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    from saccade.evaluate.segmentation import solve

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 1, generator=generator)
    labels = (rows[:, 0] + torch.randn(2000, generator=generator) > 1.9).long()
    held = torch.arange(2000) % 5 == 0
    share = labels.double().mean()
    plain, even = (
        solve(rows, labels, 2, held, weights) for weights in (None, torch.tensor([1 / (1 - share), 1 / share]))
    )
    said = [(layer.weights.predict(layer.standard(rows)) == 1).double().mean() for layer in (plain, even)]
    assert said[1] > 2 * said[0]


def test_maps_of_blocks_and_of_stages(encoder: Encoder) -> None:
    images = torch.rand(2, 3, 16, 24)
    seen = maps.look(encoder.backbone, images, several=True)
    plain = encoder(images).patches.mT.unflatten(2, (4, 6))
    assert [tuple(x.shape) for x in seen.maps] == [(2, 32, 4, 6)] * 2  # it has two blocks
    torch.testing.assert_close(seen.maps[-1], plain)
    assert maps.taps(12) == [2, 5, 8, 11] and maps.taps(3) == [0, 1, 2] and maps.taps(1) == [0]
    for arch in ("resnet-10/32", "conv-4/16", "convnext-a/32"):
        network = convnet.build(arch, image_size=64, channels=3).eval()
        images = torch.rand(1, 3, 64, 96)
        found = maps.look(network, images, several=True).maps
        features = network(images)
        torch.testing.assert_close(found[-1], features.patches.mT.unflatten(2, features.grid))
        assert [part.shape[2] for part in found] == sorted((part.shape[2] for part in found), reverse=True)
        assert len({part.shape[2] for part in found}) == len(found) == 4


def test_pieces_come_back_as_they_went(encoder: Encoder) -> None:
    frame = Frame(side=16, stride=4, scale=1.0)
    target = torch.arange(20 * 36).reshape(20, 36).to(torch.float32)
    image = torch.randint(0, 255, (3, 20, 36), dtype=torch.uint8)
    pieces = pixelwise.Pieces()
    cut = list(pixelwise.cut(lambda window: maps.look(encoder.backbone, window, several=True), frame, image, target))
    for piece in cut:
        pieces.add(7, piece)
    for number, piece in enumerate(cut):
        back = pieces[number]
        assert torch.equal(back.image, piece.image) and torch.equal(back.target, piece.target)
        torch.testing.assert_close(back.maps[0].float(), piece.maps[0].detach(), atol=2e-3, rtol=2e-3)
    assert set(torch.cat([piece.target.flatten() for piece in cut]).tolist()) == set(range(720))  # no pixel is lost


def test_chosen_points_are_pixels_of_the_enlarged_map(encoder: Encoder) -> None:
    frame, grid = Frame(side=16, stride=4), torch.randn(5, 4, 6)
    target = torch.zeros(17, 29)
    image = torch.zeros(3, *frame.sized(17, 29), dtype=torch.uint8)
    (piece,) = pixelwise.cut(lambda window: maps.Maps((grid[None],), window), frame, image, target)
    where = pixelwise.points(piece, torch.arange(17 * 29))
    found = pixelwise.at(grid[None], where[None])[0]
    enlarged = F.interpolate(grid[None], size=(17, 29), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, enlarged.flatten(1).T)


def test_classes_know_their_values(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3 a\n9 b\n4 void\n200 c\n")
    assert Classes.read(tmp_path / "classes.txt").values == [3, 9, 200]


def test_colours_of_values() -> None:
    colours = paint.palette()
    assert colours.shape == (256, 3) and len({tuple(colour) for colour in colours[:30].tolist()}) == 30
    ends = paint.heat(torch.tensor([[-5.0, 0.0, 10.0, 50.0]]), 0, 10)[0]
    assert (ends[0] == ends[1]).all() and (ends[2] == ends[3]).all() and (ends[0] != ends[3]).any()


def test_a_vector_has_no_map(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    encoder.grid = (0, 0)
    with pytest.raises(SaccadeError, match="no patches"):
        finetune(encoder, data, task="segmentation", out=tmp_path / "run")


def test_what_is_held_out_is_not_learned_where_it_is_to_judge() -> None:
    from saccade.evaluate.linear import Standard, fit
    from saccade.evaluate.segmentation import solve

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 3, generator=generator)
    labels = (rows[:, 0] > 0).long()
    held = torch.arange(400) % 4 == 0
    apart = solve(rows, torch.where(held, 1 - labels, labels), 2, held, None, False)
    standard = Standard.of(rows[~held])
    expected = fit(standard(rows[~held]), labels[~held], 2, apart.penalty)
    torch.testing.assert_close(apart.weights.weight, expected.weight, atol=1e-3, rtol=1e-3)
    assert torch.equal(apart.standard.mean, standard.mean)


_SLOW = pytest.mark.slow(reason="ten seconds of export each")


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("vit", "decoder"),
        pytest.param("vit", "linear", marks=_SLOW),
        pytest.param("resnet", "decoder", marks=_SLOW),
        pytest.param("convnext", "decoder", marks=_SLOW),
    ],
)
def test_encoder_and_head_in_onnxruntime(arch: str, kind: str, encoder: Encoder, tmp_path: Path) -> None:
    torch.manual_seed(3)
    if arch != "vit":
        name = {"resnet": "resnet-10-half/16", "convnext": "convnext-a/32"}[arch]
        network = convnet.build(name, image_size=64, channels=3)
        encoder = Encoder(network.eval(), {"family": "saccade", "arch": name})
    settings = segmentation.Settings(head=kind)  # type: ignore[arg-type]
    facts = {"classes": ["a", "b", "c"], "values": [0, 1, 2]}
    head = segmentation._head(pixelwise.unlearned(encoder, 3, settings), encoder, facts, settings)
    model = tuned.Tuned(encoder, head, task.find("segmentation"), facts)
    model.save(tmp_path / "run")
    said = export(tmp_path / "run", to="onnx", out=tmp_path / "out")
    assert said["outputs"] == ["probabilities"] and said["checked"]["max_abs_difference"] < 1e-4

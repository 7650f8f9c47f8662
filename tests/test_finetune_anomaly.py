"""Anomalies from normal pictures alone: every formula against a slow one, the pages, and what bad data do."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from saccade import cli, weights
from saccade.embed import examining
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.export import export
from saccade.finetune import curves, finetune, heatmap, memory, predict, task
from saccade.finetune.curves import Pixels, Threshold
from saccade.finetune.normal import read_normal
from saccade.finetune.tasks import anomaly
from saccade.settings import FinetuneArguments
from saccade.vit import ViT, ViTConfig

GUIDE = Path(__file__).parents[1] / "docs" / "anomaly.md"
SIDE = 32


def random(*address: int) -> np.random.Generator:
    return np.random.default_rng((8, *address))


def test_auroc_and_average_precision_are_what_they_say() -> None:
    for seed in range(4):
        draw = random(seed)
        scores, odd = draw.integers(0, 12, 40).astype(float), draw.random(40) < 0.4  # with ties
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[odd] for b in scores[~odd]]
        assert curves.auroc(scores, odd)[0] == pytest.approx(100 * np.mean(pairs))
        precise, before = 0.0, 0.0
        for level in sorted(set(scores.tolist()), reverse=True):
            above = scores >= level
            recall = (odd & above).sum() / odd.sum()
            precise += (recall - before) * (odd & above).sum() / above.sum()
            before = recall
        assert curves.average_precision(scores, odd)[0] == pytest.approx(100 * precise)
        times = draw.integers(0, 4, 40)
        again = np.repeat(np.arange(40), times)
        weighted = curves.auroc(scores, odd, times[None].astype(float))[0]
        assert weighted == pytest.approx(curves.auroc(scores[again], odd[again])[0])
        weighted = curves.average_precision(scores, odd, times[None].astype(float))[0]
        assert weighted == pytest.approx(curves.average_precision(scores[again], odd[again])[0])


def test_measures_of_one_kind_alone_are_not_defined() -> None:
    drawn = curves.resampled(["a", "b", "c"], 0)
    odd = np.zeros(3, dtype=bool)
    for measure in (curves.auroc, curves.average_precision):
        value, between = curves.bounded(functools.partial(measure, np.arange(3.0), odd), drawn)
        assert value is None and between is None


def _flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Regions by flooding, one after the other."""
    left, found = {(y, x) for y, x in np.argwhere(mask).tolist()}, []
    while left:
        region, ahead = set(), [next(iter(left))]
        while ahead:
            y, x = ahead.pop()
            if (y, x) in left:
                left.remove((y, x))
                region.add((y, x))
                ahead += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        found.append(region)
    return found


def test_regions_are_those_of_flooding() -> None:
    for seed in range(6):
        mask = random(1, seed).random((17, 23)) < 0.1 + 0.08 * seed
        numbers = curves.regions(mask)
        found = [{(y, x) for y, x in np.argwhere(numbers == n).tolist()} for n in range(1, numbers.max() + 1)]
        assert sorted(map(sorted, found)) == sorted(map(sorted, _flooded(mask)))
        assert ((numbers > 0) == mask).all()


def test_pixel_auroc_and_per_region_overlap_are_what_they_say() -> None:
    draw, pictures = random(2), []
    for _ in range(3):
        mask = draw.random((20, 24)) < 0.15
        pictures.append((draw.normal(size=mask.shape) + 0.8 * mask, mask))
    low, high = (
        bound(bound(s.min() for s, _ in pictures), bound(s.max() for s, _ in pictures)) for bound in (min, max)
    )
    pixels = Pixels(low, high)
    for scores, mask in pictures:
        pixels.add(scores, mask)
    once = np.ones((1, 3))
    scores, odd = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*pictures, strict=True))
    assert pixels.auroc(once)[0] == pytest.approx(curves.auroc(scores, odd)[0], abs=0.02)

    regions = [(s, region) for s, m in pictures for region in _flooded(m)]
    points = [(0.0, 0.0)]
    for level in np.sort(scores)[::-1]:
        overlap = np.mean([np.mean([s[y, x] >= level for y, x in region]) for s, region in regions])
        points.append((float((scores[~odd] >= level).mean()), float(overlap)))
        if points[-1][0] > curves.LIMIT:
            break
    (x0, y0), (x1, y1) = points[-2:]
    points[-1] = (curves.LIMIT, y0 + (curves.LIMIT - x0) / (x1 - x0) * (y1 - y0))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert pixels.pro(once)[0] == pytest.approx(100 * area / curves.LIMIT, abs=0.05)
    doubled = Pixels(low, high)
    for place in (0, 0, 2):
        doubled.add(*pictures[place])
    for measure in ("auroc", "pro"):
        weighted = getattr(pixels, measure)(np.array([[2.0, 0.0, 1.0]]))
        assert weighted == pytest.approx(getattr(doubled, measure)(once))


def test_the_bound_of_a_rate_is_exact() -> None:
    for k, n, level in ((0, 50, 0.95), (3, 40, 0.975), (3, 40, 0.025), (12, 13, 0.9)):
        p = curves.rate_at(k, n, level)
        tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert tail == pytest.approx(1 - level, abs=1e-9)
    assert curves.rate_at(5, 5, 0.95) == 1.0
    assert curves.needed(0.01) == 299  # the smallest n with 0.99 ** n <= 0.05
    assert 0.99**299 <= 0.05 < 0.99**298


def test_a_threshold_keeps_its_rate_and_says_what_it_cannot() -> None:
    rates, draw = [], random(3)
    for _ in range(400):
        threshold = Threshold.of(draw.normal(size=99), 0.05)
        rates.append(0.5 * math.erfc(threshold.value / math.sqrt(2)))
    assert np.mean(rates) == pytest.approx(0.05, abs=0.004)
    low, high = (x / 100 for x in threshold.report()["between"])  # type: ignore[union-attr]
    inside = np.mean([low <= rate <= high for rate in rates])
    assert 0.92 < inside < 0.98
    few = Threshold.of(draw.normal(size=50), 0.01).report()
    assert (
        not few["vouched"] and few["above"] == 0 and few["at_most"] == pytest.approx(100 * (1 - 0.05 ** (1 / 50)), 1e-3)
    )
    assert "299 would do" in str(few["said"])
    assert Threshold.of(draw.normal(size=2000), 0.02).report()["at_most"] > 2  # expected 2, not vouched at 95 %
    assert Threshold.of(draw.normal(size=400), 0.01).report()["held_out"] == 400
    grouped = Threshold.of(draw.normal(size=400), 0.05, [str(n % 20) for n in range(400)]).report()
    assert grouped["groups"] == 20 and float(str(grouped["at_most"])) > 14  # 20 patients say no more


def test_the_core_set_is_the_greedy_one() -> None:
    draw = torch.Generator().manual_seed(4)
    for count, width in ((40, 8), (160, 8), (30, 200)):
        points = torch.randn(500, width, generator=draw)
        rows = memory.core_set(points, count, 5)
        assert len(set(rows.tolist())) == count
        flat = memory._projected(points, 5).double()
        chosen = [int(rows[0])]
        for _ in range(count - 1):
            chosen.append(int(torch.cdist(flat, flat[chosen]).amin(dim=1).argmax()))
        assert rows.tolist() == chosen
    with pytest.MonkeyPatch.context() as patch:  # the farthest is found among few candidates too
        patch.setattr(memory, "_CANDIDATES", 7)
        points = torch.randn(500, 8, generator=draw)
        few = memory.core_set(points, 60, 5)
    assert few.tolist() == memory.core_set(points, 60, 5).tolist()


def test_the_core_set_holds_no_copies() -> None:
    points = torch.randn(6, 16).repeat(20, 1)
    assert len(memory.core_set(points, 50, 0)) == 6
    assert memory.core_set(points, 500, 0).tolist() == list(range(120))


def test_the_nearest_is_the_nearest() -> None:
    rows, kept = (torch.nn.functional.normalize(torch.randn(n, 12), dim=1) for n in (30, 50))
    slow = torch.stack([torch.stack([1 - torch.dot(a, b) for b in kept]) for a in rows])
    assert torch.allclose(memory.nearest(rows, kept, chunk=7), slow.amin(dim=1), atol=1e-5)
    assert torch.allclose(memory.nearest(rows, kept, 3), slow.sort(dim=1).values[:, :3].mean(dim=1), atol=1e-5)


def test_the_gaussian_is_that_of_ledoit_and_wolf() -> None:
    x = torch.randn(60, 5, dtype=torch.float64) @ torch.diag(torch.tensor([3.0, 1, 1, 0.2, 0.1], dtype=torch.float64))
    mean, whitening = memory.gaussian(x.float())
    centred = (x - x.mean(0)).numpy()
    covariance = sum(np.outer(row, row) for row in centred) / 60
    scale = np.trace(covariance) / 5
    noise = sum(((np.outer(row, row) - covariance) ** 2).sum() for row in centred) / 60**2
    share = min(1.0, noise / ((covariance - scale * np.eye(5)) ** 2).sum())
    shrunk = (1 - share) * covariance + share * scale * np.eye(5)
    row = centred[7]
    length = float(np.sqrt(row @ np.linalg.inv(shrunk) @ row))
    assert float(((x[7].float() - mean) @ whitening).norm()) == pytest.approx(length, rel=1e-4)
    assert 0 < share < 1


def test_a_heatmap_is_bilinear_smooth_and_a_file(tmp_path: Path) -> None:
    scores = torch.rand(4, 5, generator=torch.Generator().manual_seed(6))
    whole = heatmap.enlarged(scores, (40, 60))
    assert whole.shape == (40, 60) and scores.min() <= whole.min() and whole.max() <= scores.max()
    bilinear = torch.nn.functional.interpolate(scores[None, None], size=(40, 60), mode="bilinear")[0, 0]
    kernel = {}
    for axis, spread in ((0, heatmap.BLUR * 10), (1, heatmap.BLUR * 12)):
        reach = round(3 * spread)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
        kernel[axis] = (reach, weights / weights.sum())
    y, x, total = 22, 30, 0.0
    for dy, a in zip(range(-kernel[0][0], kernel[0][0] + 1), kernel[0][1], strict=True):
        for dx, b in zip(range(-kernel[1][0], kernel[1][0] + 1), kernel[1][1], strict=True):
            total += a * b * float(bilinear[y + dy, x + dx])
    assert float(whole[y, x]) == pytest.approx(total, abs=1e-5)
    heatmap.write(tmp_path / "a" / "b.png", whole, unit=0.5)
    with Image.open(tmp_path / "a" / "b.png") as image:
        values = np.array(image)
    assert values.dtype == np.uint16 and abs(values[y, x] - total / 0.5 * heatmap.MIDDLE) <= 1
    assert heatmap.name_of("../../etc/x.png") == "etc/x.png.png"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    config = ViTConfig(image_size=SIDE, patch=8, width=32, depth=2, heads=2)
    return Encoder(ViT(config), {"family": "test"}).eval()


def picture(path: Path, *address: int, spot: bool = False, side: int = 40) -> np.ndarray:
    """Soft stripes, the same but for a phase and noise; a bright checkered spot where asked. Gives the spot's mask."""
    draw = random(9, *address)
    y, x = np.mgrid[:side, :side]
    grey = 120 + 40 * np.sin((x + y) / 4 + draw.random()) + draw.normal(0, 4, (side, side))
    mask = np.zeros((side, side), dtype=bool)
    if spot:
        top, left = draw.integers(4, side - 18, 2)
        mask[top : top + 12, left : left + 12] = True
        grey[mask] = (255 * ((y + x) % 2))[mask]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)).save(path)
    return mask


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In MVTec's layout: 24 good ones to learn from, 12 good and 8 spotted ones to be examined."""
    root = tmp_path_factory.mktemp("pack")
    for n in range(24):
        picture(root / f"train/good/p{n % 8}_{n}.png", 0, n)
    for n in range(12):
        picture(root / f"test/good/q{n}.png", 1, n)
    for n in range(8):
        mask = picture(root / f"test/spot/s{n}.png", 2, n, spot=True)
        place = root / f"ground_truth/spot/s{n}_mask.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * mask).astype(np.uint8)).save(place)
    return root


def asked(data: Path, **more: Any) -> FinetuneArguments:
    return FinetuneArguments(backbone="b", data=str(data), task="anomaly", out="o", **more)


def examined(encoder: Encoder, data: Path, folder: Path | None = None, **flags: Any) -> Any:
    """What the verb does with a page, as far as the page is concerned."""
    settings = anomaly.Settings(**flags)
    examples = anomaly.read(str(data), encoder, asked(data), settings)
    seen = anomaly.see(encoder, examples, settings, asked(data))
    with torch.inference_mode():
        fitted = anomaly.fit(seen, examples, settings)
    head, told = fitted.head, []
    with examining(encoder) as look:
        for row in examples.test.tolist():
            pixels = examples.source[row].pixels[0]
            one = task.Picture(examples.keys[row], tuple(pixels.shape[1:]), examples.targets[row])
            told += head.told(head.look(look, [pixels]), [one], folder)
    with torch.inference_mode():
        return examples, fitted, told, anomaly.measure(told, seen, examples, settings)


def test_spots_are_found_by_normal_pictures_alone(encoder: Encoder, pack: Path, tmp_path: Path) -> None:
    examples, fitted, told, found = examined(encoder, pack, tmp_path, memory=100)
    assert examples.split == {
        "train": 24, "test": 20, "of_test": {"good": 12, "spot": 8}, "with_masks": 8,
    }  # fmt: skip
    assert found["examined"] == 20 and found["auroc"] > 90 and found["pixel_auroc"] > 80 and found["pro"] > 50
    assert found["recall"] > 50 and found["auroc_between"][0] <= found["auroc"] <= found["auroc_between"][1]
    assert set(found["baselines"]) == {"untrained", "colour", "pixels"}
    assert set(found["differences"]["auroc"]) == {"mean", "two_standard_errors", "verdict", "against"}
    assert fitted.chosen["memory"] == 100 and not fitted.chosen["false_alarms"]["vouched"]
    assert "cannot be vouched for with 24" in examples.warnings[0]
    for one in told:
        assert one["predicted"] == ("anomalous" if one["_score"] > one["threshold"] else "normal")
        with Image.open(tmp_path / one["heatmap"]) as image:
            assert image.size == (40, 40) and image.mode == "I;16"
    head = anomaly.Head(**fitted.head.config())  # as it comes back from disk
    head.load_state_dict(fitted.head.state_dict())
    with torch.inference_mode():
        seen = head.features(encoder.backbone, torch.zeros(1, 3, SIDE, SIDE))
        again = head(seen)
        assert torch.equal(again, fitted.head(seen))
        score, distances = head.answer(again)
    assert score.shape == (1,) and distances.shape == (1, 4, 4)


def test_every_picture_held_out_is_scored_without_its_group(encoder: Encoder, pack: Path) -> None:
    settings = anomaly.Settings(score="patches", baselines=False)
    examples = anomaly.read(str(pack), encoder, asked(pack, group_by=r"/(p\d)_"), settings)
    seen = anomaly.see(encoder, examples, settings, asked(pack))
    names = examples.names(np.array(seen.train_rows))
    assert len(set(names)) == 8
    twice = [*seen.train[anomaly.PRETRAINED], *seen.train[anomaly.PRETRAINED]]  # every picture has its copy
    with torch.inference_mode():
        apart, _ = anomaly.learn(twice, [*names, *names], settings, 0, grouped=True)
        torn, _ = anomaly.learn(twice, [str(n) for n in range(48)], settings, 0, grouped=False)
    assert float(torn.usual[0, 0]) < 0.8 * float(apart.usual[0, 0])  # a copy in the memory is very near


def test_several_depths_stand_side_by_side(encoder: Encoder, pack: Path) -> None:
    assert anomaly.blocks_of(encoder.backbone, 1) == ()
    assert anomaly.blocks_of(encoder.backbone, 4) == (0, 1)  # of two blocks
    twelve = ViT(ViTConfig(image_size=SIDE, patch=8, width=32, depth=12, heads=2))
    assert anomaly.blocks_of(twelve, 3) == (5, 8, 11)
    _, fitted, _, found = examined(encoder, pack, depths=3, memory=50, baselines=False)
    assert found["auroc"] > 90 and fitted.head.config()["width"] == 64
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        seen = fitted.head.features(encoder.backbone, images)
        each = encoder.backbone.intermediate(images, [0, 1])
    for one, part in zip(each, seen.patches.split(32, dim=-1), strict=True):
        assert torch.allclose(torch.nn.functional.normalize(one.patches, dim=-1), part, atol=1e-6)


@pytest.mark.parametrize("score", ["patches", "vector", "both"])
def test_every_flag_is_read(encoder: Encoder, pack: Path, score: str) -> None:
    settings = anomaly.Settings(score=score, depths=1, smooth=3, neighbours=2, top=0.5, memory=50, baselines=False)
    examples = anomaly.read(str(pack), encoder, asked(pack), settings)
    seen = anomaly.see(encoder, examples, settings, asked(pack))
    with torch.inference_mode():
        head = anomaly.fit(seen, examples, settings).head
        features = encoder(torch.rand(2, 3, SIDE, SIDE), tokens="patches")
        outputs = head(features)
        x = torch.nn.functional.avg_pool2d(
            features.patches.mT.unflatten(2, (4, 4)), 3, 1, 1, count_include_pad=False
        ).flatten(2).mT  # fmt: skip
        x = torch.nn.functional.normalize(x, dim=-1)
        near = (1 - x @ head.memory.T).sort(dim=-1).values[..., :2].mean(dim=-1)
    assert isinstance(head, anomaly.Head) and len(head.memory) == 50
    assert torch.allclose(outputs[:, 0].flatten(1), near, atol=1e-5)
    local = near.sort(dim=1, descending=True).values[:, :8].mean(dim=1)
    away = ((torch.nn.functional.normalize(features.patches.mean(1), dim=-1) - head.mean) @ head.whitening).norm(dim=1)
    z = torch.maximum((local - head.usual[0, 0]) / head.usual[0, 1], (away - head.usual[1, 0]) / head.usual[1, 1])
    want = {"patches": local, "vector": away, "both": z}[score]
    assert torch.allclose(head.scores(outputs), want, rtol=1e-3, atol=1e-4)


def read(data: Path, **more: Any) -> task.Examples:
    return read_normal(data, **{"normal": None, "pictures": 2000, "group_by": None, "channels": 3} | more)


def test_what_cannot_take_part_is_named(encoder: Encoder, tmp_path: Path) -> None:
    for n in range(6):
        picture(tmp_path / f"train/good/{n}.png", 3, n)
        picture(tmp_path / f"test/good/{n}.png", 4, n)
    picture(tmp_path / "train/scratch/0.png", 5)
    picture(tmp_path / "val/good/0.png", 5)
    (tmp_path / "train/good/broken.png").write_bytes(b"\x89PNG nothing")
    for n in range(2):
        mask = picture(tmp_path / f"test/spot/{n}.png", 6, n, spot=True)
        (tmp_path / "test/masks/spot").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask[: 40 - 8 * n]).save(tmp_path / f"test/masks/spot/{n}.png")
    examples, _, told, found = examined(encoder, tmp_path, baselines=False)
    assert {one[0]: one[1] for one in examples.aside}.keys() == {"train/scratch/0.png", "val/good/0.png"}
    assert "not of the normal class 'good'" in dict(examples.aside)["train/scratch/0.png"]
    assert len(told) == 8 and found["examined_by_pixel"] == 7
    assert [one["key"] for one in found["masks_set_aside"]] == ["test/spot/1.png"]
    assert "40x32, its picture 40x40" in found["masks_set_aside"][0]["reason"]
    seen = anomaly.see(encoder, examples, anomaly.Settings(baselines=False), asked(tmp_path))
    assert [key for _, key, _ in seen.failures] == ["train/good/broken.png"] and len(seen.train_rows) == 6


def test_one_kind_alone_in_test_is_said(encoder: Encoder, tmp_path: Path) -> None:
    for n in range(6):
        picture(tmp_path / f"train/{n}.png", 3, n)
        picture(tmp_path / f"test/good/{n}.png", 4, n)
    examples, _, _, found = examined(encoder, tmp_path, baselines=False)
    assert "normal pictures only: AUROC and average precision are not defined" in examples.warnings[0]
    assert found["auroc"] is None and found["recall"] is None and found["false_alarms"] is not None


def test_a_mask_alone_says_what_is_wrong(tmp_path: Path) -> None:
    for n in range(4):
        picture(tmp_path / f"train/images/{n}.png", 3, n)
        mask = picture(tmp_path / f"test/images/{n}.png", 4, n, spot=n > 1)
        (tmp_path / "test/masks").mkdir(parents=True, exist_ok=True)
        if n:
            Image.fromarray(mask).save(tmp_path / f"test/masks/{n}.png")
    examples = read(tmp_path)
    assert [examples.targets[row].anomalous for row in examples.test.tolist()] == [False, True, True]
    assert dict(examples.aside) == {"test/images/0.png": "neither a class nor a mask says whether it is normal"}


def test_groups_are_never_split(tmp_path: Path) -> None:
    for n in range(12):
        picture(tmp_path / f"flat/fine/g{n % 6}_{n}.png", 3, n)
        picture(tmp_path / f"flat/ill/g{n % 6}_{n}.png", 4, n, spot=True)
        picture(tmp_path / f"given/train/fine/g{n % 6}_{n}.png", 3, n)
        picture(tmp_path / f"given/test/ill/g{n % 2}_{n}.png", 4, n, spot=True)
    for data in ("flat", "given"):
        examples = read(tmp_path / data, normal="fine", group_by=r"(g\d)_")
        sides = [set(examples.names(rows)) for rows in (examples.train, examples.test)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
        assert examples.aside and all("no group is split" in reason for _, reason in examples.aside)
    flat = read(tmp_path / "flat", normal="fine")
    assert len(flat.train) + len(flat.test) == 24 and not flat.aside
    assert len(read(tmp_path / "flat", normal="fine", pictures=5).train) == 5


def test_what_is_normal_must_be_known(tmp_path: Path, encoder: Encoder) -> None:
    for name in ("red", "blue"):
        picture(tmp_path / f"two/train/{name}/0.png", 1)
    picture(tmp_path / "one/train/good/0.png", 1)
    with pytest.raises(SaccadeError, match=r"which class .* is normal is not said") as error:
        read(tmp_path / "two")
    assert error.value.hint is not None and "blue, red" in error.value.hint
    with pytest.raises(SaccadeError, match="did you mean 'blue'"):
        read(tmp_path / "two", normal="blu")
    with pytest.raises(SaccadeError, match="1 normal picture to learn from"):
        read(tmp_path / "one")
    with pytest.raises(SaccadeError, match="odd number"):
        anomaly.read(str(tmp_path / "one"), encoder, asked(tmp_path), anomaly.Settings(smooth=2))


def test_the_verbs_from_a_folder_to_heatmaps(encoder: Encoder, pack: Path, tmp_path: Path) -> None:
    run = finetune(encoder, pack, out=tmp_path / "run", task="anomaly", memory=100, false_alarms=0.2)
    found = run.summary
    assert found["test"]["auroc"] > 90 and found["chosen"]["false_alarms"]["asked"] == 20
    assert any("cannot be vouched for" in line for line in found["warnings"])
    lines = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and all((run.path / line["heatmap"]).is_file() for line in lines)
    assert "AUROC by picture" in (run.path / "report.html").read_text()
    again = predict(run, pack / "test", out=tmp_path / "said")
    assert again["predicted"].keys() == {"normal", "anomalous"}
    said = [json.loads(line) for line in (tmp_path / "said/predictions.jsonl").read_text().splitlines()]
    assert {f"test/{line['key']}": line["score"] for line in said} == pytest.approx(
        {line["key"]: line["score"] for line in lines}, abs=1e-4
    )
    assert again["scores"]["auroc"] == pytest.approx(found["test"]["auroc"])
    assert (tmp_path / "said" / said[0]["heatmap"]).is_file()
    assert predict(run, pack)["scores"]["examined"] == 20  # neither what was learned from nor masks
    alone = predict(run, pack / "test/spot")  # nothing there is known to be normal
    assert "scores" not in alone and alone["pictures"] == 8
    with pytest.raises(SaccadeError, match="cannot move a backbone: it learns from normal pictures alone"):
        finetune(encoder, pack, out=tmp_path / "other", task="anomaly", mode="full")


def test_the_guide_runs(
    encoder: Encoder, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/anomaly.md: its commands run, in their order, with two blocks for the published backbone."""
    monkeypatch.chdir(tmp_path)
    weights.save_backbone("start", encoder.backbone, {"recipe": "test"})
    shutil.copytree(pack, "parts")
    shutil.copytree(pack / "test", "new")
    commands = re.findall(r"^saccade (.+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.replace("facebook/dinov2-small", "start").replace("--image-size 448", ""))
        assert cli.main([*words, "--json"]) == cli.DONE, command
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert words[0] == "finetune" or said["predicted"]
    assert Path("verdicts/heatmaps/spot/s0.png.png").is_file()


def test_the_farthest_are_counted() -> None:
    x = torch.rand(3, 30, generator=torch.Generator().manual_seed(7))
    ordered = x.sort(dim=1, descending=True).values
    for top, count in ((0.01, 1), (0.05, 2), (0.1, 3), (0.5, 15), (1.0, 30)):  # half a patch counts
        assert torch.allclose(anomaly.farthest(x, top), ordered[:, :count].mean(dim=1))


@pytest.mark.parametrize("score", ["both", "patches"])
def test_the_model_leaves_as_one_graph(encoder: Encoder, pack: Path, tmp_path: Path, score: str) -> None:
    """Compared with onnxruntime by `export` itself, at several batches and sizes."""
    flags = {"task": "anomaly", "memory": 60, "baselines": False, "score": score}
    run = finetune(encoder, pack, out=tmp_path / "run", **flags)
    found = export(str(run.path), to="onnx", out=tmp_path / "graph")
    assert found["outputs"] == ["score", "map"]
    graph = onnxruntime.InferenceSession(str(tmp_path / "graph/model.onnx"))
    with Image.open(pack / "test/spot/s0.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    images = encoder.preprocess.sized(pixels, [SIDE, SIDE])[None].float() / 255
    score_, _ = graph.run(None, {"images": images.numpy()})
    said = predict(run, pack / "test/spot", out=tmp_path / "said")
    first = json.loads((tmp_path / "said/predictions.jsonl").read_text().splitlines()[0])
    assert said["pictures"] == 8 and float(score_[0]) == pytest.approx(first["score"], rel=0.02, abs=0.02)

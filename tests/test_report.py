"""The report: what is in it, what it leaves out, and how it looks in a browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import RECIPES, small
from toys.sources import Bands, Clips, Pictures, Texts

import saccade.recipes
from saccade import recipe, report
from saccade.backbone import build as build_backbone
from saccade.data import Sample, Source
from saccade.encoder import Encoder
from saccade.model import build
from saccade.report import charts, pictures, sections
from saccade.report.charts import Line
from saccade.report.page import Charts
from saccade.run import Run, environment
from saccade.search import Hit
from saccade.vit import Features

SMALL = {"arch": "vit-ti/8", "image_size": 32, "batch": 8, "steps": 60, "decoder_width": 48, "decoder_depth": 2,
         "decoder_heads": 3}  # fmt: skip
SCORES = {
    "knn": 42.0,
    "few_label": {"10": {"mean": 31.0, "std": 1.5, "draws": 20}},
    "baselines": {
        "pixels": {"knn": 30.0, "few_label": {"10": {"mean": 22.0, "std": 1.0, "draws": 20}}},
        "untrained": {"knn": 33.0, "few_label": {"10": {"mean": 24.0, "std": 2.0, "draws": 20}}},
        "border": {"knn": 11.0},
        "majority": 10.0,
    },
    "differences": {
        "knn": {"mean": 9.0, "two_standard_errors": 2.0, "verdict": "better", "against": "untrained/cls"},
        "few_label": {
            "10": {"mean": 7.0, "two_standard_errors": 1.0, "verdict": "better", "against": "untrained/mean"}
        },
    },
    "split": {"train": 40, "test": 8, "classes": 2},
    "warnings": ["<b>small</b> data"],
}
RESULT = {
    "seconds": 250.0,
    "peak_memory_gb": 1.25,
    "images": 48,
    "labels_per_class": 10,
    "knn": {"pixels": 30.0, "untrained": 33.0, "pretrained": 42.0},
    "few_label": {
        "pixels": {"mean": 22.0, "std": 1.0},
        "untrained": {"mean": 24.0, "std": 2.0},
        "pretrained": {"mean": 31.0, "std": 1.5},
    },
    "verdict": {"knn": "gained 9.0 ± 2.0 points against the same network, untrained", "few_label": "no difference"},
}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saccade.recipes, "__path__", [*saccade.recipes.__path__, RECIPES])


def finished(place: Path, name: str = "mae", settings: dict[str, Any] | None = None) -> Run:
    """A run as training leaves it, of made-up numbers."""
    _, config = recipe.configure(name, SMALL if settings is None else settings)
    run = Run.claim(place, {"verb": "pretrain", "recipe": name, "data": ["<toys>"], "settings": config.model_dump()})
    health = {"verdict": "low_rank", "advice": "few directions: raise --batch", "rank": 3.0, "spread": 0.2,
              "chance": {"loss": 1.7, "teacher_entropy": 2.5}, "history": []}  # fmt: skip
    for step in range(1, 601):
        entry: dict[str, Any] = {"step": step, "loss": 1 + 1 / step + 0.02 * math.sin(step), "gradient_norm": 1 + step}
        entry |= {"images_per_second": 100.0, "data_wait": 0.1 / step, "memory_gb": 0.5, "seconds": step, "apart": 0.1}
        if step % 60 == 0:
            entry["health"] = {"rank": step / 60, "spread": 0.3, "teacher_entropy": 2.0, "prototype_use": 0.5}
            if name == "dinov3":
                entry |= {"cls_loss": 2.0, "patch_loss": 1.0, "gram": 0.1, "patch_entropy": 2.0, "patch_use": 0.4}
            entry["eval"] = {"knn": 30 + step / 60, "linear": 35 + step / 60}
        run.log(entry)
    run.note(
        data={"fingerprint": "ab" * 32, "samples": 16}, sessions=[environment()], steps=600,
        initial={"weights": "random", "seed": 0}, best={"step": 600, "measure": "linear", "value": 45.0},
        summary={"loss": 1.0, "seconds": 600, "images_per_second": 100.0, "data_wait": 0.01, "health": health,
                 "eval": [{"step": 600, "knn": 40.0, "linear": 45.0, "part": "test"}]},
    )  # fmt: skip
    return run


def shown(run: Run, source: Source) -> dict[str, Tensor]:
    page, config = recipe.configure(run.config["recipe"], run.config["settings"])
    return report.shown_by(page, config, source, build(page, config, None)[0].state_dict())


def encoder(arch: str = "vit-ti/8", size: int = 32, **switches: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(build_backbone(arch, image_size=size, **switches), {}).eval()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything."""
    source = Pictures(40, frozenset({3, 5}))
    run = finished(tmp_path_factory.mktemp("report") / "run")
    return report.write_run(run, shown=shown(run, source), encoder=encoder(), source=source, scores=SCORES)


@pytest.fixture(scope="module")
def tour(page: Path) -> Path:
    test = Pictures(12)
    searches = [[Hit(f"picture {n}", 1.0), *(Hit(f"picture {m}", 0.9) for m in range(4, 9))] for n in (0, 1)]
    return report.write_tour(
        page.with_name("tour.html"), result=RESULT, scores=SCORES, run=Run.open(page.parent), searches=searches,
        train=Pictures(40, frozenset({3})), test=test, story=["look", "hide & seek"],
    )  # fmt: skip


class Reader(HTMLParser):
    """Tags, their attributes, and the text under each heading; raises where tags do not close as they opened."""

    EMPTY = frozenset({"meta", "img", "link", "br", "rect", "line", "path", "circle"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


EVERYTHING = ["Health", "Training", "What the features know", "Evaluation", "What the method makes of a picture",
              "Views", "What the features see", "Nearest neighbours", "Record"]  # fmt: skip


def test_a_run_shows_everything(page: Path) -> None:
    read = Reader(page.read_text())
    assert read.headings == EVERYTHING and page.name == "report.html"
    assert "could not be shown" not in read.text
    for said in ("Few directions: raise --batch", "ab" * 32, "random, seed 0", "45.0", "+9.0 ± 2.0", "was step 600"):
        assert said in read.text, said
    charts_there = [figure for tag, figure in read.tags if tag == "svg"]
    assert len(charts_there) == 4 + 1 + 4 + 2  # training with what the method logs, health, evaluation
    for name in ("seen", "rebuilt", "original", "patch features", "attention", "head 3", "query"):
        assert name in read.text
    assert "Rebuilt: each patch with its true mean and spread." in read.text


def test_what_was_wrong_with_texts_is_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    faults = {"duplicate": 1200, "empty": 2, "latin-1": 1, "missing": 3, "over-long": 1, "without a picture": 1}
    first = {fault: [f"{fault} {n}.jpg" for n in range(min(5, count))] for fault, count in faults.items()}
    found = {"samples": 30_000, "covered": 20_000, "with_texts": 19_995, "texts": 99_975, "faults": faults,
             "first": first, "tokenizer": {"kind": "own"}}  # fmt: skip
    run.note(texts=found)
    read = Reader(report.write_run(run, shown={}, encoder=None, source=Pictures(3), scores=None).read_text())
    assert "Texts" in read.headings and "could not be shown" not in read.text
    assert "99,975 texts of 19,995 samples, among 20,000 of 30,000 that were looked at" in read.text
    for said in ("1,200", "duplicate 0.jpg, duplicate 1.jpg, duplicate 2.jpg", "missing 2.jpg", "read as Latin-1",
                 "more than 10,000 characters: cut there", "belongs to nothing: not used"):  # fmt: skip
        assert said in read.text, said
    assert "duplicate 3.jpg" not in read.text.split("Everything recorded")[0]
    run.note(texts=found | {"covered": 30_000, "faults": {}, "first": {}})
    clean = sections.texts(run)
    assert clean is not None and "nothing was wrong" in clean.lede and "looked at" not in clean.lede
    assert sections.texts(finished(tmp_path / "other")) is None


def test_stages_and_chance_are_marked(tmp_path: Path) -> None:
    run = finished(tmp_path, "dinov3", small("dinov3"))
    training, health = sections.training(run), sections.health(run)
    assert training is not None and health is not None
    assert "a stage begins (after step 78, 150, 225, 300, 375, 528)" in training.lede
    drawn = {chart.title: chart.svg for section in (training, health) for block in section.blocks
             if isinstance(block, Charts) for chart in block.charts}  # fmt: skip
    assert {svg.count('class="begin"') for svg in drawn.values()} == {6}
    level = {title for title, svg in drawn.items() if "tells nothing apart" in svg}
    assert level == {"Loss", "Entropy of the teacher"}
    assert {"Patch loss", "Gram", "Entropy of the teacher, patches", "Prototypes in use, patches"} <= set(drawn)
    one = sections.training(finished(tmp_path / "mae"))
    assert one is not None and "stage" not in one.lede and 'class="begin"' not in str(one.blocks)


@pytest.mark.parametrize("which", ["page", "tour"])
def test_it_is_one_file_that_asks_for_nothing(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which).read_text()
    read = Reader(text)
    assert not [name for name in ("script", "link", "iframe", "object", "form") if read.all(name)]
    assert "://" not in text and "@import" not in text and not re.search(r"url\(", text)
    assert all((image["src"] or "").startswith("data:image/") for image in read.all("img"))
    assert all((link["href"] or "").startswith("#") for link in read.all("a"))
    anchors = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(anchors)) == len(anchors) >= 9
    assert {link["href"] for link in read.all("a")} == {f"#{anchor}" for anchor in anchors}
    assert len(text) < 3_000_000
    assert all(image["alt"] for image in read.all("img")) and all(chart["aria-label"] for chart in read.all("svg"))


def test_text_is_escaped(page: Path, tour: Path) -> None:
    assert "&lt;b&gt;small&lt;/b&gt; data" in page.read_text() and "<toys>" not in page.read_text()
    assert "hide &amp; seek" in tour.read_text()


def test_large_pictures_fit(tmp_path: Path) -> None:
    """Photographs do not make the page heavy: noise is the worst that can come."""

    class Noise(Pictures):
        def make(self, index: int, generator: torch.Generator) -> Sample:
            pixels = torch.randint(0, 256, (1, 3, 256, 320), generator=generator, dtype=torch.uint8)
            return Sample(f"{index}", pixels)

    run = finished(tmp_path / "run", settings={**SMALL, "arch": "vit-ti/16", "image_size": 224})
    path = report.write_run(run, shown=shown(run, Noise(8)), encoder=encoder("vit-ti/16", 224), source=Noise(8))
    assert Reader(path.read_text()).headings == [name for name in EVERYTHING if name != "Evaluation"]
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize(("name", "source", "left"), [
    ("texts", Texts(16), {"Views", "What the features see", "Nearest neighbours"}),
    ("bands", Bands(16), set()),
    ("clips", Clips(16), {"What the features see", "Nearest neighbours"}),
])  # fmt: skip
def test_what_cannot_be_shown_is_left_out(name: str, source: Source, left: set[str], tmp_path: Path) -> None:
    run = finished(tmp_path / "run", name, {"steps": 6, "batch": 8})
    page, config = recipe.configure(name, run.config["settings"])
    network = build(page, config, None)[0].encoder()
    path = report.write_run(
        run, shown={}, encoder=None if name == "texts" else Encoder(network, {}), source=source, scores=SCORES
    )
    read = Reader(path.read_text())
    assert "could not be shown" not in read.text
    left = left | {"What the method makes of a picture"}
    assert read.headings == [heading for heading in EVERYTHING if heading not in left]


def test_a_convnet_has_no_attention(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    path = report.write_run(run, shown={}, encoder=encoder("resnet-18/8"), source=Pictures(12))
    read = Reader(path.read_text())
    assert "What the features see" in read.headings and "patch features" in read.text
    assert "Attention: " not in read.text and "could not be shown" not in read.text
    assert not [image for image in read.all("img") if "attention" in (image["alt"] or "")]
    path = report.write_run(run, shown={}, encoder=encoder("resnet-18/32"), source=Pictures(12))  # one patch
    assert "What the features see" not in Reader(path.read_text()).headings


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = Run.claim(tmp_path / "run", {"recipe": "mae", "data": ["x"], "settings": {**SMALL}})
    read = Reader(report.write_run(run, shown={}, encoder=None, source=Pictures(8)).read_text())
    assert read.headings == ["Views", "Record"]


def test_what_fails_is_named_in_its_place(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    path = report.write_run(run, shown={}, encoder=encoder(), source=Pictures(8, frozenset(range(8))))
    read = Reader(path.read_text())
    assert "This could not be shown: none of the samples that were tried can be read" in read.text
    assert {"Health", "Training", "Views", "Record"} <= set(read.headings)


def test_a_tour_tells_the_story_and_shows_the_run(tour: Path, page: Path) -> None:
    read = Reader(tour.read_text())
    assert read.headings[:5] == ["The story", "What was gained", "The pictures", "Search", "Evaluation"]
    assert read.headings[5:] == [heading for heading in EVERYTHING if heading != "Evaluation"]
    assert "it beat the same network, untrained, by 7.0 ± 1.0 points" in " ".join(read.text.split())
    marks = [figure["class"] for figure in read.all("figure") if "tile" in (figure["class"] or "")]
    assert marks.count("tile same") == 3 + 2 and marks.count("tile query") == 2 + 6  # labels are index % 2
    text = tour.read_text().replace(page.read_text(), "")
    widths = [float(width) for width in re.findall(r'class="bar \w+" style="width: ([\d.]+)%', text)]
    assert widths == pytest.approx([55, 60, 77.5, 60, 66, 84])


def test_a_tour_is_honest() -> None:
    from saccade.report import tours

    worse = {"10": {"mean": -2.0, "two_standard_errors": 1.0, "verdict": "worse", "against": "pixels"}}
    assert tours.said({"differences": {"few_label": worse}}, 10) == "fell 2.0 ± 1.0 points short of raw pixels"
    none = {"10": {"mean": 2.0, "two_standard_errors": 3.0, "verdict": "no difference", "against": "pixels"}}
    assert tours.said({"differences": {"few_label": none}}, 10) == "did no better than raw pixels"


# curves


def points_of(svg: str) -> list[tuple[float, float]]:
    paths = re.findall(r'<path class="curve[^"]*" d="M([^"]*)"', svg)
    return [tuple(map(float, point.split())) for path in paths for point in path.split("L")]  # type: ignore[misc]


CURVES = {
    "falling": [1 / n for n in range(1, 2000)],
    "two": [1.0, 2.0],
    "constant": [0.3] * 5,
    "zero": [0.0, 0.0],
    "negative": [-3.0, -1.0, -2.0],
    "holes": [1.0, math.nan, 2.0, math.inf, 3.0],
    "tiny": [1e-9, 2e-9, 1.5e-9],
    "wild": [1e-3, 1.0, 1e30],
}


@pytest.mark.parametrize("floor", [None, 0.0])
@pytest.mark.parametrize("name", CURVES)
def test_curves_stay_inside_their_axes(name: str, floor: float | None) -> None:
    values = CURVES[name]
    drawn = charts.chart("c", Line(range(1, len(values) + 1), values), floor=floor)
    assert drawn is not None
    root = ElementTree.fromstring(drawn.svg)
    frame = next(part.attrib for part in root if part.get("class") == "frame")
    left, top = float(frame["x"]), float(frame["y"])
    right, bottom = left + float(frame["width"]), top + float(frame["height"])
    points = points_of(drawn.svg)
    assert 2 <= len(points) <= 1000
    assert all(left - 0.1 <= x <= right + 0.1 and top - 0.1 <= y <= bottom + 0.1 for x, y in points)
    assert points[0][0] == left and points[-1][0] == right
    texts = [part.text for part in root if part.tag == "text" and part.get("text-anchor") == "end"]
    assert len(set(texts)) == len(texts) >= 3, texts  # every number on the axis says something else
    assert ("2 values that are not finite" in drawn.note) == (name == "holes")


def test_curves_of_one_point_and_of_none() -> None:
    drawn = charts.chart("c", Line([7], [2.5]))
    assert drawn is not None and drawn.latest == "2.50" and 'class="dot c0"' in drawn.svg
    assert charts.chart("c", Line([1], [math.nan])) is None and charts.chart("c", Line([], [])) is None


def test_axes_have_round_numbers() -> None:
    assert charts.ticks(0, 1) == pytest.approx([0, 0.5, 1])
    for low, high in ((0.31, 0.92), (17, 1234), (-5, 3), (1e-7, 9e-7)):
        marks = charts.ticks(low, high)
        assert marks[0] <= low and marks[-1] >= high and 3 <= len(marks) <= 8
    assert [charts.number(value) for value in (12345.6, 0.5, 3, 99.95, 1e-5, 0)] == [
        "12,346", "0.500", "3", "100.0", "1.0e-05", "0"]  # fmt: skip


# pictures


def test_mae_rebuilds_what_was_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    page, config = recipe.configure("mae", SMALL)
    for normalised in (True, False):
        method, _ = build(page, config.model_copy(update={"normalise_target": normalised}), None)
        _, batch = report.glimpse(page, config, Pictures(12))
        monkeypatch.setattr(
            method, "predict", lambda images, keep, hidden, method=method: method.target(images, hidden)
        )
        parts = method.show(batch)  # of a prediction without fault
        seen, rebuilt, original = parts.values()
        assert list(parts) == [
            "seen",
            "rebuilt" + " (each patch with its true mean and spread)" * normalised,
            "original",
        ]
        torch.testing.assert_close(original, batch["images"], atol=1e-4, rtol=0)
        torch.testing.assert_close(rebuilt, original, atol=1e-4, rtol=0)
        same = (seen - original).abs().amax(1).unfold(1, 8, 8).unfold(2, 8, 8).amax((3, 4)) < 1e-4
        kept = torch.zeros(len(seen), 16, dtype=torch.bool).scatter(1, batch["order"][:, : method.kept], True)
        assert (same.flatten(1) >= kept).all() and same.float().mean() < 0.5
        monkeypatch.setattr(
            method, "predict", lambda images, keep, hidden, method=method: 0 * method.target(images, hidden)
        )
        assert (list(method.show(batch).values())[1] - original).abs().amax() > 0.05


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_is_what_the_block_uses(registers: int) -> None:
    network = encoder(registers=registers).backbone
    images = torch.rand(2, 3, 32, 32)
    found = network.attention(images)
    assert found.shape == (2, 3, 16) and (found > 0).all() and (found.sum(-1) < 1).all()
    kept: dict[str, Tensor] = {}
    last = network.blocks[-1].attn
    handle = last.register_forward_hook(lambda module, inputs, output: kept.update(x=inputs[0], y=output))
    network(images)
    handle.remove()
    value = last._project(kept["x"], None, None)[2]
    mixed = last.proj((last.weights(kept["x"]) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, kept["y"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, last.weights(kept["x"])[:, :, 0, 1 + registers :], atol=1e-6, rtol=1e-4)


def test_principal_components_colour_what_is_alike() -> None:
    kinds = torch.randint(2, (3, 16), generator=torch.Generator().manual_seed(0))
    patches = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))[kinds] * 5
    patches = patches + 0.01 * torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(2))
    features = Features(None, patches[:, :0], patches, torch.zeros(3, 16, 2, dtype=torch.int64), (4, 4))
    red = pictures.principal(features)[:, 0].flatten(1).float()
    means = [red[kinds == kind] for kind in (0, 1)]
    assert abs(means[0].mean() - means[1].mean()) > 200 and max(part.std() for part in means) < 20
    assert pictures.principal(features._replace(patches=patches[:, :2], grid=(1, 2))) is None


def test_neighbours_find_copies() -> None:
    class Copies(Pictures):
        def make(self, index: int, generator: torch.Generator) -> Sample:
            sample = super().make(index // 2, torch.Generator().manual_seed(index // 2))
            return Sample(f"{index // 2} of {index}", sample.pixels)

    source = Copies(20, frozenset({4}))
    gallery = pictures.gather(source, encoder().preprocess, 20)
    assert len(gallery.keys) == 19
    section = sections.neighbours(encoder(), gallery)
    for card in section.blocks[0].cards:
        query, first, *_ = card.tiles
        pair, key = query.alt.split()[1], query.alt.removeprefix("query: ")
        assert not [tile for tile in card.tiles[1:] if f"{key}," in tile.alt]  # nobody is its own neighbour
        assert first.alt.startswith(f"neighbour {pair} of") == (pair != "2"), (query.alt, first.alt)


def test_pixels_of_any_kind_become_visible() -> None:
    for shape, dtype in (((1, 3, 8, 9), torch.uint8), ((4, 3, 8, 9), torch.uint8), ((13, 8, 9), torch.float32),
                         ((1, 8, 9), torch.float32), ((2, 8, 9), torch.uint8)):  # fmt: skip
        pixels = (torch.rand(shape) * 200).to(dtype)
        seen = pictures.visible(pixels)
        assert (
            seen.shape == (3 if shape[-3] >= 3 else 1, 8, 9) and seen.dtype == torch.uint8 and seen.float().std() > 20
        )
        image = Image.open(io.BytesIO(base64.b64decode(pictures.uri(seen).partition(",")[2])))
        assert image.size == (9, 8)
    assert (pictures.visible(torch.full((3, 4, 4), 0.5)) == 128).all()  # what is in [0, 1] is shown as it is


# in a browser


class Browser:
    """Headless Chromium behind chromedriver, spoken to over HTTP."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update")  # fmt: skip

    def __init__(self, home: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.ask("GET", "/status")
                break
            time.sleep(0.1)
        wanted = {
            "goog:chromeOptions": {"args": [*self.FLAGS, f"--user-data-dir={home}"]},
            "goog:loggingPrefs": {"performance": "ALL"},
        }
        self.url += f"/session/{self.ask('POST', '/session', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def ask(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def tell(self, command: str, **parameters: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def run(self, script: str) -> Any:
        return self.ask("POST", "/execute/sync", script=script, args=[])

    def show(self, page: Path, width: int, scheme: str, media: str = "screen") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tell("Emulation.setEmulatedMedia", media=media, features=features)
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("POST", "/url", url=page.absolute().as_uri())

    def screenshot(self) -> Image.Image:
        data = self.tell("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("L")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not found (Debian: apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get("SACCADE_BROWSER") == "required" else pytest.skip)(reason)
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


OUTSIDE = """
const wide = document.documentElement.clientWidth, found = [];
if (document.documentElement.scrollWidth > wide) found.push("the page is wider than the window");
for (const part of document.querySelectorAll("body *")) {
  const box = part.getBoundingClientRect();
  const beyond = box.width > 2 && box.right > wide + 1 && !part.closest(".wide, .unseen");
  if (beyond) found.push(part.outerHTML.slice(0, 120));
}
return found;
"""
CURVES_OUTSIDE = """
const found = [];
for (const chart of document.querySelectorAll("svg")) {
  const frame = chart.querySelector(".frame").getBBox(), whole = chart.getBoundingClientRect();
  const curves = [...chart.querySelectorAll(".curve, .dot")];
  if (!curves.length) found.push("an empty chart");
  for (const part of curves) {
    const box = part.getBBox();
    const inside = box.x >= frame.x - 3 && box.y >= frame.y - 3 &&
      box.x + box.width <= frame.x + frame.width + 3 && box.y + box.height <= frame.y + frame.height + 3;
    if (!inside || box.width + box.height == 0) found.push(part.outerHTML.slice(0, 120));
  }
  for (const text of chart.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    const inside = box.left >= whole.left - 1 && box.right <= whole.right + 1 && box.bottom <= whole.bottom + 1;
    if (!inside) found.push(text.textContent);
  }
}
return found;
"""
FAINT = """
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], 0);
const behind = part => {
  for (; part; part = part.parentElement) {
    const colour = numbers(getComputedStyle(part).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  throw new Error("no background");
};
const found = [];
for (const part of document.querySelectorAll("body *")) {
  const own = [...part.childNodes].some(node => node.nodeType == 3 && node.textContent.trim());
  if (!own || ["STYLE", "title"].includes(part.tagName)) continue;
  const style = getComputedStyle(part), svg = part.closest("svg");
  const pair = [light(numbers(svg ? style.fill : style.color)), light(behind(svg ? svg.parentElement : part))];
  const contrast = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
  if (contrast < 4.5) found.push([contrast.toFixed(2), part.outerHTML.slice(0, 120)]);
}
return found;
"""


@pytest.mark.parametrize("which", ["page", "tour"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_right(browser: Browser, which: str, width: int, scheme: str, request: pytest.FixtureRequest) -> None:
    browser.show(request.getfixturevalue(which), width, scheme)
    assert browser.run("return innerWidth") == width
    assert browser.run("return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length") == 0
    assert browser.run("return document.images.length") > 60
    assert browser.run("return [...document.images].every(i => i.getBoundingClientRect().width >= 24)")
    assert browser.run(OUTSIDE) == []
    assert browser.run(CURVES_OUTSIDE) == []
    assert browser.run(FAINT) == []
    looks = browser.screenshot()
    shades = torch.tensor(list(looks.tobytes()), dtype=torch.float32)
    assert looks.size == (width, 900) and shades.std() > 10
    assert (shades.median() > 200) == (scheme == "light") and (shades.median() < 60) == (scheme == "dark")


def test_it_asks_the_network_for_nothing(browser: Browser, tour: Path) -> None:
    browser.ask("POST", "/se/log", type="performance")  # what came before
    browser.show(tour, 1280, "light")
    lines = [json.loads(line["message"])["message"] for line in browser.ask("POST", "/se/log", type="performance")]
    asked = [line["params"]["request"]["url"] for line in lines if line["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("data:", "chrome:"))] == [tour.absolute().as_uri()]


def test_it_can_be_printed(browser: Browser, page: Path) -> None:
    browser.show(page, 800, "dark", media="print")
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("return getComputedStyle(document.querySelector('h1')).color") == "rgb(30, 34, 38)"
    assert browser.run(OUTSIDE) == []
    pdf = base64.b64decode(browser.tell("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000

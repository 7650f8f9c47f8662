"""Anomalies from normal pictures alone: real weights, the untrained network, colours and raw pixels, seed by seed.

    python benchmarks/anomaly.py BACKBONE --out DIR [--tomato PACK] [--malaria PACK] [--camvid PACK] [--seeds 3]
        [--threads 1] [--cells tomato/healthy,malaria,planted/tomato,…] [-- flags, as --score patches --image-size 112]

Cells: `tomato/CLASS`, that class normal and the other nine anomalous; `malaria`, uninfected cells normal, by patient
(PACK as benchmarks/adapt.py divides it: no patient in both parts); `planted/tomato` and `planted/camvid`, defects put
into ordinary pictures by the seed, with exact masks: scratches, spots, patches of other pictures in the colours of the
place, and blur. A seed draws which normal pictures are learned from, the defects and the untrained weights. Each cell
is an ordinary run of `saccade finetune --task anomaly`, and a JSON file: the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from saccade.finetune import curves

KINDS = ("scratch", "spot", "patch", "blur")
SHOWN = ("auroc", "average_precision", "pixel_auroc", "pro", "recall", "false_alarms")
LEARNED, EXAMINED = 600, 250  # malaria: normal cells learned from, and cells of each kind examined
NORMAL_OUT = 40  # planted: normal pictures examined, and as many with a defect, each kind in turn


def pictures(folder: Path) -> list[Path]:
    """Picture files below a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))


def drawn(paths: list[Path], count: int, *address: Any) -> list[Path]:
    """So many of them, by the address."""
    generator = np.random.default_rng([ord(c) for c in "/".join(map(str, address))])
    return [paths[n] for n in generator.permutation(len(paths))[:count]]


def listed(rows: list[tuple[Path, str, str]], path: Path) -> Path:
    """A list with label and split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows((str(one.absolute()), label, part) for one, label, part in rows)
    return path


def tomato(pack: Path, normal: str, seed: int, out: Path) -> Path:
    """A quarter of the normal class, whichever part it is from, is examined; of the others the test side."""
    usual = pictures(pack / "train" / normal) + pictures(pack / "test" / normal)
    mixed = drawn(usual, len(usual), "tomato", normal, seed)
    rows = [(path, normal, "test" if n < len(mixed) // 4 else "train") for n, path in enumerate(mixed)]
    rows += [(path, path.parent.name, "test") for path in pictures(pack / "test") if path.parent.name != normal]
    return listed(rows, out / "list.csv")


def malaria(pack: Path, seed: int, out: Path) -> Path:
    """Uninfected cells of patients of train; of other patients both kinds are examined."""
    rows = [(path, "uninfected", "train") for path in drawn(pictures(pack / "train/uninfected"), LEARNED, "l", seed)]
    for kind in ("uninfected", "parasitized"):
        rows += [(path, kind, "test") for path in drawn(pictures(pack / "test" / kind), EXAMINED, kind, seed)]
    return listed(rows, out / "list.csv")


def soft(mask: np.ndarray, spread: float) -> np.ndarray:
    """A mask with soft edges, 0 to 1."""
    image = Image.fromarray((255 * mask).astype(np.uint8)).filter(ImageFilter.GaussianBlur(spread))
    return np.asarray(image, dtype=np.float64)[..., None] / 255


def ellipse(size: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """Which pixels of a picture of this height and width lie in it."""
    y, x = np.mgrid[: size[0], : size[1]]
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1


def scratch(picture: np.ndarray, other: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A thin bent line, lighter or darker than what it crosses."""
    height, width = picture.shape[:2]
    side = min(height, width)
    points = [draw.uniform(0.2, 0.8, 2) * (width, height)]
    angle = draw.uniform(0, 2 * np.pi)
    for _ in range(3):
        angle += draw.normal(0, 0.4)
        points.append(points[-1] + draw.uniform(0.08, 0.16) * side * np.array([np.cos(angle), np.sin(angle)]))
    image = Image.new("L", (4 * width, 4 * height))
    thick = max(4, round(4 * 0.015 * side))
    ImageDraw.Draw(image).line([tuple(4 * point) for point in points], fill=255, width=thick, joint="curve")
    cover = np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float64)[..., None] / 255
    return picture + draw.choice([-1, 1]) * 35 * cover, cover[..., 0] > 0.3


def spot(picture: np.ndarray, other: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A soft stain in a colour that another picture has somewhere."""
    height, width = picture.shape[:2]
    side = min(height, width)
    centre = (draw.uniform(0.2, 0.8) * height, draw.uniform(0.2, 0.8) * width)
    mask = ellipse((height, width), centre, tuple(draw.uniform(0.03, 0.07, 2) * side))
    colour = other[draw.integers(other.shape[0]), draw.integers(other.shape[1])]
    cover = 0.6 * soft(mask, 0.012 * side)
    return picture * (1 - cover) + colour * cover, mask


def patch(picture: np.ndarray, other: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A piece of another picture, with mean and spread of the colours of the place where it is put."""
    height, width = picture.shape[:2]
    side = min(height, width)
    tall, wide = (round(part * side) for part in draw.uniform(0.1, 0.2, 2))
    top, left = (round(draw.uniform(0.15, 0.85 - n / total) * total) for n, total in ((tall, height), (wide, width)))
    y, x = (int(draw.integers(0, total - n)) for n, total in ((tall, other.shape[0]), (wide, other.shape[1])))
    place, piece = picture[top : top + tall, left : left + wide], other[y : y + tall, x : x + wide]
    spread = place.std(axis=(0, 1)) / np.maximum(piece.std(axis=(0, 1)), 1)
    whole, mask = picture.copy(), np.zeros((height, width), dtype=bool)
    matched = (piece - piece.mean(axis=(0, 1))) * np.minimum(spread, 3) + place.mean(axis=(0, 1))
    whole[top : top + tall, left : left + wide] = matched
    mask[top : top + tall, left : left + wide] = True
    cover = soft(mask, 0.008 * side)
    return picture * (1 - cover) + whole * cover, mask


def blur(picture: np.ndarray, other: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Out of focus, in one of ten places: the one with most to lose."""
    height, width = picture.shape[:2]
    side = min(height, width)
    smooth = np.asarray(
        Image.fromarray(picture.astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.02 * side)), dtype=np.float64
    )
    radius = draw.uniform(0.08, 0.13) * side
    places = [(draw.uniform(0.2, 0.8) * height, draw.uniform(0.2, 0.8) * width) for _ in range(10)]
    masks = [ellipse((height, width), centre, (radius, radius)) for centre in places]
    mask = max(masks, key=lambda one: float(np.abs(picture - smooth)[one].mean()))
    cover = soft(mask, 0.01 * side)
    return picture * (1 - cover) + smooth * cover, mask


def planted(ordinary: list[Path], seed: int, out: Path) -> Path:
    """Ordinary pictures in MVTec's layout: some with a defect, an exact mask beside each."""
    whole = out / "planted"
    if (whole / "done").exists():
        return whole
    paths = drawn(ordinary, len(ordinary), "planted", seed)
    out_of = paths[: 2 * NORMAL_OUT]
    for place, path in enumerate(paths[len(out_of) :][:300]):
        write(whole / f"train/good/{place:03}.png", opened(path))
    for place, path in enumerate(out_of):
        kind = "good" if place % 2 == 0 else KINDS[place // 2 % len(KINDS)]
        draw = np.random.default_rng((seed, place))
        picture, other = opened(path), opened(paths[len(out_of) + int(draw.integers(len(paths) - len(out_of)))])
        if kind != "good":
            make = {"scratch": scratch, "spot": spot, "patch": patch, "blur": blur}[kind]
            picture, mask = make(picture, other, draw)
            write(whole / f"ground_truth/{kind}/{place:03}_mask.png", 255.0 * mask)
        write(whole / f"test/{kind}/{place:03}.png", picture)
    (whole / "done").touch()
    return whole


def opened(path: Path) -> np.ndarray:
    """A picture's colours, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def write(path: Path, values: np.ndarray) -> None:
    """A PNG of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(path)


def data_of(cell: str, seed: int, asked: argparse.Namespace) -> tuple[Path, list[str]]:
    """What a cell learns from, and which flags it needs."""
    kind, _, what = cell.partition("/")
    out = asked.out / "data" / f"{cell.replace('/', '-')}-{seed}"
    if kind == "tomato":
        return tomato(asked.tomato, what, seed, out), ["--normal", what]
    if kind == "malaria":
        return malaria(asked.malaria, seed, out), ["--normal", "uninfected", "--group-by", r"(C\d+)P"]
    folders = {"tomato": [asked.tomato / part / "healthy" for part in ("train", "test")],
               "camvid": [asked.camvid / part / "images" for part in ("train", "val")]}  # fmt: skip
    return planted([path for folder in folders[what] for path in pictures(folder)], seed, out), []


def cell_of(cell: str, seed: int, asked: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """What the verb says of it; from a file if it was asked before. Ends the study where it fails."""
    answer = asked.out / "cells" / f"{cell.replace('/', '-')}-{seed}.json"
    if not answer.exists():
        data, own = data_of(cell, seed, asked)
        run = asked.out / "runs" / answer.stem
        words = [sys.executable, "-m", "saccade", "finetune", asked.backbone, str(data), "--task", "anomaly", "--out",
                 str(run), "--seed", str(seed), "--threads", str(asked.threads), "--json", *own, *flags]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:] + done.stdout[-500:])
        said = json.loads(done.stdout.strip().splitlines()[-1])
        lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        answer.parent.mkdir(parents=True, exist_ok=True)
        answer.write_text(json.dumps({"test": said["test"], "chosen": said["chosen"], "split": said["split"],
                                      "seconds": said["seconds"], "kinds": by_kind(lines)}))  # fmt: skip
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def by_kind(lines: list[dict[str, Any]]) -> dict[str, float]:
    """AUROC of each anomalous class against all normal pictures."""
    normal = [line["score"] for line in lines if not line["anomalous"]]
    found = {}
    for kind in sorted({line["label"] for line in lines if line["anomalous"]}):
        scores = np.array([*normal, *(line["score"] for line in lines if line["label"] == kind)])
        found[kind] = float(curves.auroc(scores, np.arange(len(scores)) >= len(normal))[0])
    return found


def spoken(values: list[float | None]) -> str:
    """Mean and two standard errors over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    bound = f" ± {2 * statistics.stdev(known) / len(known) ** 0.5:.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{bound}"


def tell(found: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each cell and contestant; then how often each kind of anomaly is told from normal."""
    print(f"| cell | features | {' | '.join(name.replace('_', ' ') for name in SHOWN)} |")
    print(f"|---|---|{'---|' * len(SHOWN)}")
    for cell, runs in found.items():
        contestants = {"this backbone": [run["test"] for run in runs]}
        for who in runs[0]["test"].get("baselines", {}):
            contestants[who] = [run["test"]["baselines"][who] for run in runs]
        for who, tests in contestants.items():
            columns = [spoken([test.get(name) for test in tests]) for name in SHOWN]
            print(f"| {cell} | {who} | {' | '.join(columns)} |")
    for cell, runs in found.items():
        kinds = [f"{kind} {spoken([run['kinds'].get(kind) for run in runs])}" for kind in runs[0]["kinds"]]
        seconds = statistics.mean(run["seconds"]["total"] for run in runs)
        print(f"{cell}: {', '.join(kinds)}; {runs[0]['split']}; {seconds:.0f} s a run")


def main() -> None:
    """The study and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tomato", type=Path, default=Path("/work/data/tomato"))
    parser.add_argument("--malaria", type=Path, default=Path("/work/tmp/malp"))
    parser.add_argument("--camvid", type=Path, default=Path("/work/data/camvid"))
    parser.add_argument("--cells", default="tomato/healthy,tomato/Late_blight,malaria,planted/tomato,planted/camvid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"{asked.threads} threads, {' '.join(flags) or 'no flags'}")  # fmt: skip
    cells = asked.cells.split(",")
    found: dict[str, list[dict[str, Any]]] = {cell: [] for cell in cells}
    for seed in range(asked.seeds):
        for cell in cells:
            found[cell].append(cell_of(cell, seed, asked, flags))
            print(f"{cell} {seed}: {found[cell][-1]['test']['auroc']}", file=sys.stderr, flush=True)
    tell(found)


if __name__ == "__main__":
    main()

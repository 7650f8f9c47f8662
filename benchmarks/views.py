"""From JPEG bytes to ten normalised DINO views (2 x 224, 8 x 96, the whole recipe): ours beside the peers'.

    python benchmarks/views.py CHECKOUT [--pictures FOLDER] [--rounds 9] [--device cuda]
    python benchmarks/views.py --parts [--pictures FOLDER]     what each of our views costs, and the fast colour mode

CHECKOUT is a clone of github.com/facebookresearch/dino (Apache-2.0), whose `DataAugmentationDINO` is called as it is.
torchvision (its v2 transforms on tensors), lightly and albumentations take part where they are installed. Pictures are
the JPEGs of FOLDER, else made-up ones of 500x375 (benchmarks/feed.py). On a CPU: one thread, one process for each
contender; they take turns, and CPU seconds count; the ratio is the median over rounds. On a GPU ours and torchvision's
views are made there, one process each, and seconds on the clock count.

Where the work is not the same: ours and torchvision blur by a true Gaussian, facebookresearch/dino and lightly by
Pillow's three boxes; OpenCV resizes without antialiasing, which is less work.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from feed import MEAN, SPREAD, machine, normalise_, photo, take_turns
from PIL import Image
from torch import Tensor

from saccade import augment
from saccade.augment import Views
from saccade.data import Sample, collate, keep_memory
from saccade.decode import decode
from saccade.draws import Draws
from saccade.recipes import dino

FLOOR, AIM = 1.5, 4.0
Work = Callable[[int], object]
CONFIG = dino.Config()
BATCH, HEIGHT, WIDTH = 32, 429, 572


def jpegs(folder: str | None, count: int) -> list[bytes]:
    if folder is None:
        return [photo(seed, 28.0) for seed in range(count)]
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return [path.read_bytes() for path in paths[:: max(1, len(paths) // count)][:count]]


def ours(files: list[bytes], device: str) -> Work:
    """What a worker and the recipe do, and the encoder's normalisation."""
    keep_memory()  # as `loader` does

    def work(number: int) -> list[Tensor]:
        samples = [Sample(str(n), decode(data, short_side=CONFIG.canvas())) for n, data in enumerate(files)]
        batch = collate(samples)
        draws = Draws(0, number, batch["key"], batch["seen"] + number, batch["place"])
        batch["pixels"] = batch["pixels"].to(device)
        made = dino.views(CONFIG, batch, draws)
        return [normalise_(made[name]) for name in ("globals", "locals")]

    return work


def each(files: list[bytes], view: Callable[[bytes], list[Tensor]]) -> Work:
    """Ten views of one picture after the other, and the batches they are collated to."""

    def work(number: int) -> list[Tensor]:
        rows = [view(data) for data in files]
        return [torch.stack([row[crop] for row in rows]) for crop in range(len(rows[0]))]

    return work


def facebookresearch(files: list[bytes], device: str) -> Work:
    import main_dino

    transform = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    return each(files, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def lightly(files: list[bytes], device: str) -> Work:
    from lightly.transforms import DINOTransform

    transform = DINOTransform(n_local_views=8)
    return each(files, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def torchvision(files: list[bytes], device: str) -> Work:
    """Its v2 transforms on uint8 tensors, decoded by its own decoder."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    def view(side: int, scale: tuple[float, float], blur: float, solarise: float) -> Callable[[Tensor], Tensor]:
        steps = [
            v2.RandomResizedCrop(side, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),  # 13: three sigma of the largest
            v2.RandomSolarize(128, p=solarise),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN.flatten().tolist(), SPREAD.flatten().tolist()),
        ]
        return v2.Compose(steps)

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2), *[view(96, (0.05, 0.4), 0.5, 0.0)] * 8]

    def one(data: bytes) -> list[Tensor]:
        raw = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))
        picture = decode_jpeg(raw, mode=ImageReadMode.RGB).to(device)
        return [make(picture) for make in views]

    return each(files, one)


def albumentations(files: list[bytes], device: str) -> Work:
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)

    def view(side: int, scale: tuple[float, float], blur: float, solarise: float) -> Callable[..., dict]:
        steps = [
            A.RandomResizedCrop((side, side), scale=scale, interpolation=cv2.INTER_CUBIC),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=(13, 13), sigma_limit=(0.1, 2.0), p=blur),
            A.Solarize(threshold_range=(128 / 255, 128 / 255), p=solarise),
            A.Normalize(MEAN.flatten().tolist(), SPREAD.flatten().tolist()),
            ToTensorV2(),
        ]
        return A.Compose(steps)

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2), *[view(96, (0.05, 0.4), 0.5, 0.0)] * 8]

    def one(data: bytes) -> list[Tensor]:
        picture = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return [make(image=picture)["image"] for make in views]

    return each(files, one)


CONTENDERS = {
    "saccade": ("saccade", ours),
    "facebookresearch/dino": ("torchvision", facebookresearch),  # the package it needs
    "torchvision v2": ("torchvision", torchvision),
    "lightly": ("lightly", lightly),
    "albumentations": ("albumentations", albumentations),
}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def contest(files: list[bytes], rounds: int, device: str, checkout: str | None) -> dict[str, dict[str, float]]:
    """Pictures a second of every contender that can run here, and our speed beside each."""
    makes = {name: make for name, (package, make) in CONTENDERS.items() if name == "saccade" or version(package)}
    if checkout is None:
        makes.pop("facebookresearch/dino", None)
    if device == "cuda":
        seconds = clocked(
            {name: makes[name](files, device) for name in ("saccade", "torchvision v2") if name in makes}, rounds
        )
    else:
        seconds = take_turns({name: (lambda make=make: make(files, device)) for name, make in makes.items()}, rounds)
    result = {}
    kilobytes = sum(map(len, files)) / len(files) / 1000
    print(f"\nJPEG ({kilobytes:.0f} kB) to ten views, {len(files)} pictures a round, {rounds} rounds, {device}")
    for name, taken in seconds.items():
        ratio = statistics.median(their / own for their, own in zip(taken, seconds["saccade"], strict=True))
        rate = len(files) / statistics.median(taken)
        result[name] = {"images_per_second": rate, "ratio": ratio}
        print(f"  {name:22s} {rate:8.1f} images/s   saccade is {ratio:5.2f}x as quick", flush=True)
    if "facebookresearch/dino" in result:
        ratio = result["facebookresearch/dino"]["ratio"]
        verdict = "not met" if ratio < FLOOR else "aim met" if ratio >= AIM else "floor met"
        print(f"  against facebookresearch/dino: floor {FLOOR}x, aim {AIM}x: {verdict}")
    return result


def clocked(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds on the clock of each round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 2):
        for name, work in works.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            work(number)
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[2:] for name, taken in seconds.items()}


def canvas(folder: str | None) -> Tensor:
    """A decoded batch as workers leave it: uint8, channels last in memory, the short side 429."""
    pixels = torch.empty(BATCH, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    for row, data in zip(pixels, jpegs(folder, BATCH), strict=True):
        row.copy_(torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB").resize((WIDTH, HEIGHT)))))
    return pixels.permute(0, 3, 1, 2)


def milliseconds(work: Callable[[], object], repeats: int = 9) -> float:
    """The median a view, of CPU time."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return round(statistics.median(seconds) / BATCH * 1e3, 3)


def rows(draws: Draws, size: Tensor, scale: tuple[float, float], blurred: float, solarised: float) -> Views:
    views = augment.random_resized_crop(draws.sample("crop"), size, scale=scale)
    views = augment.flip(views, draws.sample("flip"))
    views = augment.jitter(
        views, draws.sample("jitter"), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8
    )
    views = augment.grey(views, draws.sample("grey"), probability=0.2)
    views = augment.blur(views, draws.sample("blur"), probability=blurred)
    return augment.solarise(views, draws.sample("solarise"), probability=solarised)


def difference(pixels: Tensor, views: Views) -> dict[str, float]:
    """Of the matrix mode from the steps, in levels of 255."""
    off = (augment.render(pixels, views, 224) - augment.render(pixels, views, 224, colour="matrix")).abs() * 255
    return {"mean": round(off.mean().item(), 2), "p99": round(off.flatten()[::97].quantile(0.99).item(), 1),
            "max": round(off.max().item(), 1)}  # fmt: skip


def parts(folder: str | None) -> dict[str, object]:
    """What a view costs on one thread, and what the fast colour mode costs in accuracy."""
    torch.set_num_threads(1)
    keep_memory()
    pixels = canvas(folder)
    size = torch.tensor([[HEIGHT, WIDTH]]).repeat(BATCH, 1)
    draws = Draws(0, 0, torch.arange(BATCH) * 7919, torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH))
    mae = augment.random_resized_crop(draws.sample("crop"), size, scale=(0.2, 1.0))
    mae = augment.flip(mae, draws.sample("flip"))
    first, second = rows(draws, size, (0.4, 1.0), 1.0, 0.0), rows(draws, size, (0.4, 1.0), 0.1, 0.2)
    local = rows(draws, size, (0.05, 0.4), 0.5, 0.0)
    jittered = replace(first, sigma=torch.zeros(BATCH))
    turned = replace(jittered, factors=jittered.factors * torch.tensor([0.0, 0, 0, 1]) + torch.tensor([1.0, 1, 1, 0]))
    return {
        "milliseconds a view, one thread": {
            "drawing": milliseconds(lambda: rows(draws, size, (0.4, 1.0), 1.0, 0.0)),
            "MAE 224": milliseconds(lambda: augment.render(pixels, mae, 224)),
            "DINO global 1, 224": milliseconds(lambda: augment.render(pixels, first, 224)),
            "DINO global 1, 224, matrix": milliseconds(lambda: augment.render(pixels, first, 224, colour="matrix")),
            "DINO global 2, 224": milliseconds(lambda: augment.render(pixels, second, 224)),
            "DINO local, 96": milliseconds(lambda: augment.render(pixels, local, 96)),
        },
        "matrix against steps, levels of 255": {
            "jitter and grey": difference(pixels, jittered),
            "hue alone": difference(pixels, turned),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", help="a clone of facebookresearch/dino")
    parser.add_argument("--pictures", help="a folder of JPEGs")
    parser.add_argument("--parts", action="store_true", help="measure each of our views instead")
    parser.add_argument("--images", type=int, default=32, help="pictures a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if arguments.checkout:
        sys.path.insert(0, arguments.checkout)
    packages = {name: version(name) for name in ("torchvision", "lightly", "albumentations") if version(name)}
    about = machine() | packages
    if arguments.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(about))
    if arguments.parts:
        print(json.dumps(parts(arguments.pictures), indent=1))
        return
    files = jpegs(arguments.pictures, arguments.images)
    print(json.dumps(contest(files, arguments.rounds, arguments.device, arguments.checkout)))


if __name__ == "__main__":
    main()

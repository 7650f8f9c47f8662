"""From files to views: pictures a second a core, and what a folder of a million entries costs to open.

    python benchmarks/feed.py             JPEG to the uint8 canvas; JPEG to the MAE view, against the reference's work
    python benchmarks/feed.py --million   seconds to open a million paths, memory of each worker

The pictures are synthetic (500x375, quality 90): noise with the 1/f spectrum of photos, its colours correlated, at two
contrasts: 80 kB a file, as photos have (27 to 87 kB in those at hand), and 106 kB. One thread, one process for each
contender; they take turns, and CPU seconds count, those of the median round; the ratio is the median over rounds. The
reference is the training transform of facebookresearch/mae: by torchvision itself where that imports, else the same
work by the same libraries (Pillow decodes, crops and resizes; torch converts and normalises), named as such.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import torch
import torch.multiprocessing
from PIL import Image
from torch import Tensor

from saccade import augment
from saccade.data import Sample, Source, collate, fingerprint, keep_memory
from saccade.decode import decode
from saccade.draws import Draws
from saccade.sources import open_source

MEAN, SPREAD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SHORT_SIDE = (
    429  # the smallest crop, a fifth of the area of a square picture with this side, still has 192 pixels a side
)
FLOOR, AIM, FLOOR_RATIO = 500, 900, 2.0


def photo(seed: int, contrast: float, height: int = 375, width: int = 500) -> bytes:
    """A JPEG whose spectrum falls with the frequency, as that of photos does."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((4, height, width))) / frequency**1.1, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    pixels = 128 + contrast * (planes[:1] + 0.3 * planes[1:]).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def canvas(files: list[bytes]) -> None:
    for data in files:
        decode(data, short_side=SHORT_SIDE)


def mae_views(files: list[bytes], step: int) -> Tensor:
    """What a worker and the recipe do: decode, collate, one cropped and flipped view each, normalised."""
    samples = [Sample(str(n), decode(data, short_side=SHORT_SIDE)) for n, data in enumerate(files)]
    batch = collate(samples)
    draws = Draws(0, step, batch["key"], batch["seen"] + step, batch["place"])
    views = augment.random_resized_crop(draws.sample("crop"), batch["size"], scale=(0.2, 1.0))
    views = augment.flip(views, draws.sample("flip"))
    return normalise_(augment.render(batch["pixels"], views, 224))


def normalise_(views: Tensor) -> Tensor:
    return views.sub_(MEAN.to(views.device)).div_(SPREAD.to(views.device))


def reference() -> tuple[str, Callable[[Image.Image], Tensor]]:
    """facebookresearch/mae's training transform, and by whom."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError):  # it does not import beside the CPU torch
        return "the same work with Pillow and torch (torchvision does not import here)", _reference_by_hand
    return "torchvision", transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN.flatten().tolist(), SPREAD.flatten().tolist()),
        ]
    )


def _reference_by_hand(image: Image.Image) -> Tensor:
    """Random crop of 0.2 to 1 of the area, bicubic to 224, flip, to floats in [0, 1], normalise."""
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area, aspect = random.uniform(0.2, 1.0) * width * height, math.exp(random.uniform(-1, 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    image = image.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(MEAN).div_(SPREAD)


def contend(pipe: Connection, prepare: Callable[[], Callable[[int], object]]) -> None:
    """One contender: for each number that comes, a round; its CPU seconds go back."""
    torch.set_num_threads(1)
    work = prepare()
    for number in iter(pipe.recv, None):
        start = time.process_time()
        work(number)
        pipe.send(time.process_time() - start)


def take_turns(contenders: dict[str, Callable[[], Callable[[int], object]]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round of each contender: a process each, and only one works at a time.

    A contender is what its process calls once, which gives what it calls every round, with the round's number.
    """
    context = torch.multiprocessing.get_context("fork")
    pipes, processes = {}, []
    for name, prepare in contenders.items():
        pipes[name], there = context.Pipe()
        processes.append(context.Process(target=contend, args=(there, prepare), daemon=True))
        processes[-1].start()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name in list(pipes)[:: -1 if number % 2 else 1]:
            pipes[name].send(number)
            seconds[name].append(pipes[name].recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()
    return {name: taken[2:] for name, taken in seconds.items()}  # two rounds warm up


def feed_contenders(files: list[bytes]) -> dict[str, Callable[[], Callable[[int], object]]]:
    def ours() -> Callable[[int], object]:
        keep_memory()  # as `loader` does; the reference keeps the memory policy that its users have
        return lambda number: mae_views(files, number)

    def decoding() -> Callable[[int], object]:
        keep_memory()
        return lambda number: canvas(files)

    def theirs() -> Callable[[int], object]:
        _, transform = reference()
        return lambda number: torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])

    return {"canvas": decoding, "view": ours, "reference": theirs}


def feed(count: int, rounds: int) -> dict[str, object]:
    result: dict[str, object] = {}
    by, _ = reference()
    for name, contrast in (("photo-like", 28.0), ("rich", 50.0)):
        files = [photo(seed, contrast) for seed in range(count)]
        seconds = take_turns(feed_contenders(files), rounds)
        rates = {who: count / statistics.median(taken) for who, taken in seconds.items()}
        ratio = statistics.median(a / b for a, b in zip(seconds["reference"], seconds["view"], strict=True))
        size = sum(map(len, files)) / count / 1000
        print(f"\n{name}, {size:.0f} kB a file")
        verdict = "below the floor" if rates["canvas"] < FLOOR else "aim met" if rates["canvas"] >= AIM else "floor met"
        print(f"  JPEG to uint8 canvas    {rates['canvas']:7.0f} images/s a core   floor {FLOOR}, aim {AIM}: {verdict}")
        print(f"  JPEG to MAE view        {rates['view']:7.0f} images/s a core")
        print(f"  reference: {by}\n                          {rates['reference']:7.0f} images/s a core")
        verdict = "met" if ratio >= FLOOR_RATIO else "not met"
        print(f"  ratio                   {ratio:7.2f}                     floor {FLOOR_RATIO}: {verdict}")
        result[name] = {"kilobytes": size, **rates, "ratio": ratio, "reference_by": by}
    return result


def memory(process: str = "self") -> dict[str, float]:
    """Megabytes of a process: all it maps, and what is its own."""
    fields = dict(line.split()[:2] for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    own = int(fields["Private_Clean:"]) + int(fields["Private_Dirty:"])
    return {"proportional": int(fields["Pss:"]) / 1000, "own": own / 1000}


def visit(pipe: Connection, source: Source | None) -> None:
    """A worker that asks for 100,000 keys all over the source, then says what memory is its own."""
    if source is not None:
        for index in range(0, len(source), max(1, len(source) // 100_000)):
            source.key(index)
    pipe.send(memory())
    pipe.recv()


def worker_memory(method: str, source: Source | None, workers: int = 2) -> float:
    """Megabytes of its own that a worker has after using the source."""
    context = torch.multiprocessing.get_context(method)
    pipes, processes = [], []
    for _ in range(workers):
        here, there = context.Pipe()
        processes.append(context.Process(target=visit, args=(there, source)))
        processes[-1].start()
        pipes.append(here)
    own = [pipe.recv()["own"] for pipe in pipes]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return statistics.mean(own)


def million(count: int) -> dict[str, object]:
    """Open a folder of a million pictures in 1,000 folders: seconds, and the memory of workers."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="saccade-feed-", dir=place))
    try:
        for folder in range(1000):
            (root / f"class{folder:04d}").mkdir()
            for number in range(count // 1000):
                os.close(os.open(root / f"class{folder:04d}" / f"picture_{number:08d}.jpg", os.O_CREAT | os.O_WRONLY))
        before, start = memory()["own"], time.perf_counter()
        source = open_source(root)
        opened = time.perf_counter() - start
        grown = memory()["own"] - before
        assert len(source) == count
        start = time.perf_counter()
        fingerprint(source)
        result: dict[str, object] = {"paths": count, "open_seconds": opened, "main_megabytes": grown}
        result["fingerprint_seconds"] = time.perf_counter() - start
        print(f"\n{count} paths, empty files, on {root.parent}")
        print(f"  open_source             {opened:7.2f} s, {grown:.0f} MB in the main process")
        print(f"  fingerprint             {result['fingerprint_seconds']:7.2f} s")
        for method in ("fork", "spawn"):
            extra = worker_memory(method, source) - worker_memory(method, None)
            result[f"{method}_worker_megabytes"] = extra
            print(f"  a {method}ed worker        {extra:7.1f} MB of its own more than without the source")
        return result
    finally:
        shutil.rmtree(root)


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", action="store_true", help="measure a folder of many entries instead")
    parser.add_argument("--paths", type=int, default=1_000_000, help="entries of that folder")
    parser.add_argument("--images", type=int, default=64, help="pictures a round")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(json.dumps(machine()))
    result = million(arguments.paths) if arguments.million else feed(arguments.images, arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

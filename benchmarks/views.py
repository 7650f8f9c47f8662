"""What a view costs on one thread, and what the fast colour mode costs in accuracy.

python benchmarks/views.py [FOLDER]      # photographs; without one, made-up pictures
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from saccade import augment
from saccade.augment import Views
from saccade.draws import Draws

BATCH, HEIGHT, WIDTH = 32, 429, 572


def pictures(folder: str | None) -> torch.Tensor:
    """A decoded batch as workers leave it: uint8, channels last in memory, the short side 429."""
    canvas = torch.empty(BATCH, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    if folder is None:
        coarse = torch.rand(BATCH, 3, 9, 12, generator=torch.Generator().manual_seed(0))
        fine = torch.rand(BATCH, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
        made = F.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic") + 0.1 * fine
        canvas.copy_((made.clamp(0, 1) * 255).permute(0, 2, 3, 1))
        return canvas.permute(0, 3, 1, 2)
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for row, path in zip(canvas, files[:: max(1, len(files) // BATCH)], strict=False):
        row.copy_(torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((WIDTH, HEIGHT)))))
    return canvas.permute(0, 3, 1, 2)


def dino(draws: Draws, size: torch.Tensor, scale: tuple[float, float], blurred: float, solarised: float) -> Views:
    views = augment.random_resized_crop(draws.sample("crop"), size, scale=scale)
    views = augment.flip(views, draws.sample("flip"))
    views = augment.jitter(
        views, draws.sample("jitter"), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8
    )
    views = augment.grey(views, draws.sample("grey"), probability=0.2)
    views = augment.blur(views, draws.sample("blur"), probability=blurred)
    return augment.solarise(views, draws.sample("solarise"), probability=solarised)


def milliseconds(work: Callable[[], object], repeats: int = 9) -> float:
    """The median a view."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return round(sorted(seconds)[repeats // 2] / BATCH * 1e3, 3)


def difference(pixels: torch.Tensor, views: Views) -> dict[str, float]:
    """Of the matrix mode from the steps, in levels of 255."""
    off = (augment.render(pixels, views, 224) - augment.render(pixels, views, 224, colour="matrix")).abs() * 255
    return {"mean": round(off.mean().item(), 2), "p99": round(off.flatten()[::97].quantile(0.99).item(), 1),
            "max": round(off.max().item(), 1)}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    pixels = pictures(sys.argv[1] if len(sys.argv) > 1 else None)
    size = torch.tensor([[HEIGHT, WIDTH]]).repeat(BATCH, 1)
    draws = Draws(0, 0, torch.arange(BATCH) * 7919, torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH))
    mae = augment.random_resized_crop(draws.sample("crop"), size, scale=(0.2, 1.0))
    mae = augment.flip(mae, draws.sample("flip"))
    first, second = dino(draws, size, (0.4, 1.0), 1.0, 0.0), dino(draws, size, (0.4, 1.0), 0.1, 0.2)
    local = dino(draws, size, (0.05, 0.4), 0.5, 0.0)
    jittered = replace(first, sigma=torch.zeros(BATCH))
    turned = replace(jittered, factors=jittered.factors * torch.tensor([0.0, 0, 0, 1]) + torch.tensor([1.0, 1, 1, 0]))
    result = {
        "milliseconds a view, one thread": {
            "drawing": milliseconds(lambda: dino(draws, size, (0.4, 1.0), 1.0, 0.0)),
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
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Our DINO views beside facebookresearch/dino's: what is drawn, what comes out, and the same numbers through both.

    python benchmarks/statistics_of_views.py CHECKOUT [--pictures FOLDER] [--draws 2000]

CHECKOUT is a clone of github.com/facebookresearch/dino; the environment holds torchvision. Pictures are 100 JPEGs of
FOLDER, else made-up ones of 500x375 (benchmarks/feed.py). Tables in Markdown:

- what is drawn, and what comes out: mean of ours and of the reference over as many draws each, and the
  Kolmogorov-Smirnov distance of the two samples. Beside it stands the distance that one table's rows together exceed
  by chance in one of a hundred runs (each row at 1 % over the number of rows). Histograms of some of them.
- the same numbers through our renderer and through Pillow and torchvision as the reference calls them: the difference
  in levels of 255, of each step by itself and of all together.
- the blur's kernel: its standard deviation, from the picture of an edge.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
from collections import defaultdict
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from feed import MEAN, SPREAD, machine
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from views import jpegs

from saccade import augment
from saccade.augment import Views
from saccade.data import Sample, collate
from saccade.decode import decode
from saccade.draws import Draws
from saccade.recipes import dino

KINDS = ("large 1", "large 2", "small")
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])
Numbers = dict[str, dict[str, list[float]]]  # by kind of view, by what is measured


def measures(views: Tensor) -> dict[str, Tensor]:
    """Of pictures [n 3 h w] in [0, 1]: brightness, contrast, saturation and hue of the mean colour, and sharpness."""
    grey = (views * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    colour = views.mean((2, 3))
    top, low = colour.amax(1), colour.amin(1)
    red, green, blue = colour.unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    spread = grey.std((1, 2))
    return {
        "brightness": grey.mean((1, 2)),
        "contrast": spread,
        "saturation": ((views.amax(1) - views.amin(1)) / views.amax(1).clamp(min=1e-3)).mean((1, 2)),
        "hue": torch.where(top - low > 0.01, hue, torch.nan),  # of colours that have one
        "sharpness": grey.diff(dim=2).abs().mean((1, 2)) / spread.clamp(min=1e-3),
    }


def drawn(views: Views, size: Tensor) -> dict[str, Tensor]:
    """The numbers of our rows."""
    height, width = size[views.image].unbind(1)
    jittered = (views.factors != NEUTRAL).any(1)
    names = ("brightness factor", "contrast factor", "saturation factor", "hue turn")
    return {
        "area": views.box[:, 2] * views.box[:, 3] / (height * width),
        "log aspect": (views.box[:, 3] / views.box[:, 2]).log(),
        "top": views.box[:, 0] / (height - views.box[:, 2]).clamp(min=1),
        "left": views.box[:, 1] / (width - views.box[:, 3]).clamp(min=1),
        "jittered": jittered.float(),
        **{name: column[jittered] for name, column in zip(names, views.factors.unbind(1), strict=True)},
        "first step": views.order[jittered, 0].float(),
        "mirrored": views.flip.float(),
        "grey": views.grey.float(),
        "blurred": (views.sigma > 0).float(),
        "sigma": views.sigma[views.sigma > 0],
        "solarised": views.threshold.isfinite().float(),
    }


def ours(files: list[bytes], visits: int) -> tuple[Numbers, Numbers, Tensor, list[Views]]:
    """What the recipe draws, what comes out of it, one decoded batch, and the rows of one visit."""
    config = dino.Config(local_crops=1)
    batch = collate([Sample(str(n), decode(data)) for n, data in enumerate(files)])
    numbers: Numbers = {kind: defaultdict(list) for kind in KINDS}
    results: Numbers = {kind: defaultdict(list) for kind in KINDS}
    render, rows = augment.render, []

    def noted(pixels: Tensor, views: Views, side: int) -> Tensor:
        made = render(pixels, views, side)
        kinds = KINDS[:2] if len(views) > len(files) else KINDS[2:]
        for kind, part, pictures in zip(kinds, chunks(views, len(files)), made.split(len(files)), strict=True):
            note(numbers[kind], drawn(part, batch["size"]))
            note(results[kind], measures(pictures))
            rows.append(part)
        return made

    with mock.patch.object(augment, "render", noted):
        for visit in range(visits):
            draws = Draws(0, visit, batch["key"], batch["seen"] + visit, batch["place"])
            dino.views(config, {**batch, "pixels": batch["pixels"]}, draws)
    return numbers, results, batch["pixels"], rows[:3]


def chunks(views: Views, length: int) -> list[Views]:
    return [views[start : start + length] for start in range(0, len(views), length)]


def note(into: dict[str, list[float]], found: dict[str, Tensor]) -> None:
    for name, values in found.items():
        # rounded: undoing the reference's normalisation leaves 1e-8, which would set its greys apart
        into[name] += [round(value, 5) for value in values.tolist() if not math.isnan(value)]


class Asked:
    """In a picture's place: what a transform of the reference asks of it."""

    sigma = 0.0

    def filter(self, blur: ImageFilter.GaussianBlur) -> Asked:
        self.sigma = blur.radius
        return self


def reference(files: list[bytes], visits: int) -> tuple[Numbers, Numbers]:
    """What facebookresearch/dino draws, transform by transform, and what comes out of it."""
    import main_dino

    augmentation = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1)
    transforms = (augmentation.global_transfo1, augmentation.global_transfo2, augmentation.local_transfo)
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    numbers: Numbers = {kind: defaultdict(list) for kind in KINDS}
    results: Numbers = {kind: defaultdict(list) for kind in KINDS}
    for _ in range(visits):
        for kind, transform in zip(KINDS, transforms, strict=True):
            made = torch.stack([transform(picture) for picture in pictures]) * SPREAD + MEAN
            note(results[kind], measures(made))
            for picture in pictures:
                _draw(transform, picture, numbers[kind])
    return numbers, results


def _draw(transform: object, picture: Image.Image, into: dict[str, list[float]]) -> None:
    """Each of the reference's random choices once more, by the methods that its transforms draw with."""
    crop, colours, blur, *more = transform.transforms
    top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
    into["area"].append(height * width / (picture.height * picture.width))
    into["log aspect"].append(math.log(width / height))
    into["top"].append(top / max(1, picture.height - height))
    into["left"].append(left / max(1, picture.width - width))
    mirror, jitter, grey = colours.transforms
    chosen = jitter.p >= torch.rand(1)
    into["jittered"].append(float(chosen))
    if chosen:
        (steps,) = jitter.transforms
        order, *factors = steps.get_params(steps.brightness, steps.contrast, steps.saturation, steps.hue)
        for name, factor in zip(
            ("brightness factor", "contrast factor", "saturation factor", "hue turn"), factors, strict=True
        ):
            into[name].append(float(factor))
        into["first step"].append(float(order[0]))
    into["mirrored"].append(float(torch.rand(1) < mirror.p))
    into["grey"].append(float(torch.rand(1) < grey.p))
    asked = Asked()
    blur(asked)
    into["blurred"].append(float(asked.sigma > 0))
    if asked.sigma > 0:
        into["sigma"].append(asked.sigma)
    solarise = more[0].p if len(more) == 2 else 0.0
    into["solarised"].append(float(random.random() < solarise))


def distance(a: list[float], b: list[float]) -> float:
    """Kolmogorov-Smirnov, of two samples."""
    x, y = np.sort(a), np.sort(b)
    both = np.concatenate([x, y])
    gaps = np.searchsorted(x, both, side="right") / len(x) - np.searchsorted(y, both, side="right") / len(y)
    return float(np.abs(gaps).max())


def compare(title: str, own: Numbers, theirs: Numbers) -> list[dict[str, object]]:
    """A table: means, the distance, and the distance that chance gives."""
    named = [(kind, name) for kind in KINDS for name in own[kind] if len(set(own[kind][name] + theirs[kind][name])) > 1]
    found = []
    print(
        f"\n{title}\n\n| view | what | ours | reference | distance | by chance below | |\n|---|---|--:|--:|--:|--:|---|"
    )
    for kind, name in named:
        a, b = own[kind][name], theirs[kind][name]
        level = 0.01 / len(named)
        bound = math.sqrt(-math.log(level / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))
        far = distance(a, b)
        verdict = "differs" if far > bound else ""
        print(
            f"| {kind} | {name} | {np.mean(a):.4f} | {np.mean(b):.4f} | {far:.3f} | {bound:.3f} | {verdict} |",
            flush=True,
        )
        found.append({"view": kind, "what": name, "distance": far, "bound": bound, "differs": far > bound})
    return found


def histograms(own: tuple[Numbers, Numbers], theirs: tuple[Numbers, Numbers]) -> None:
    """Parts of a hundred in eight equal bins between the smallest and the largest of both."""
    print("\nHistograms, parts of a hundred in eight equal bins\n\n| view | what | from to | whose |" + " |" * 8)
    print("|---|---|---|---|" + "--:|" * 8)
    drawn_rows = [("large 1", name) for name in ("area", "log aspect", "brightness factor", "hue turn", "sigma")]
    rows = [(0, *row) for row in [*drawn_rows, ("small", "area")]]
    rows += [(1, kind, name) for kind in ("large 1", "small") for name in ("brightness", "hue", "sharpness")]
    for table, kind, name in rows:
        samples = [numbers[table][kind][name] for numbers in (own, theirs)]
        low, high = min(map(min, samples)), max(map(max, samples))
        for who, sample in zip(("ours", "reference"), samples, strict=True):
            shares = 100 * np.histogram(sample, 8, (low, high))[0] / len(sample)
            cells = " | ".join(f"{share:.1f}" for share in shares)
            print(f"| {kind} | {name} | {low:.2f} {high:.2f} | {who} | {cells} |", flush=True)


def by_pillow(picture: Image.Image, views: Views, row: int, side: int) -> Image.Image:
    """One of our rows by the functions that the reference's transforms call."""
    from torchvision.transforms import functional

    top, left, height, width = views.box[row].tolist()
    view = picture.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    view = ImageOps.mirror(view) if views.flip[row] else view
    steps = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for kind in views.order[row].tolist():
        factor = views.factors[row, kind].item()
        view = steps[kind](view, factor) if factor != NEUTRAL[kind] else view
    view = functional.rgb_to_grayscale(view, 3) if views.grey[row] else view
    view = view.filter(ImageFilter.GaussianBlur(views.sigma[row].item())) if views.sigma[row] > 0 else view
    return ImageOps.solarize(view) if views.threshold[row].isfinite() else view


def through_both(files: list[bytes], pixels: Tensor, rows: list[Views]) -> list[dict[str, object]]:
    """The same numbers through both renderers, each step by itself and all together."""
    first, second, small = rows
    n = len(first)
    plain = replace(first, factors=NEUTRAL.expand(n, 4), grey=torch.zeros(n, dtype=torch.bool), sigma=torch.zeros(n))
    turned = NEUTRAL.repeat(n, 1)
    turned[:, 3] = torch.linspace(-0.1, 0.1, n)
    cases = {
        "crop, resize, mirror": (plain, 224),
        "hue": (replace(plain, factors=turned), 224),
        "jitter": (replace(plain, factors=first.factors), 224),
        "grey": (replace(plain, grey=torch.ones(n, dtype=torch.bool)), 224),
        "blur": (replace(plain, sigma=first.sigma), 224),
        "solarise": (replace(plain, threshold=torch.full((n,), 128 / 255)), 224),
        "large 1, all": (first, 224),
        "large 2, all": (second, 224),
        "small, all": (small, 96),
    }
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    found = []
    print("\nThe same numbers through both, levels of 255\n")
    print("| what | mean | 99 of 100 within | mean of the view, ours less theirs |\n|---|--:|--:|--:|")
    for name, (views, side) in cases.items():
        own = augment.render(pixels, views, side) * 255
        theirs = [np.asarray(by_pillow(pictures[views.image[row]], views, row, side)) for row in range(len(views))]
        other = torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2).float()
        off = (own - other).abs()
        shift = (own.mean((1, 2, 3)) - other.mean((1, 2, 3))).mean().item()
        spread = off.flatten()[::37].quantile(0.99).item()
        print(f"| {name} | {off.mean():.2f} | {spread:.1f} | {shift:+.2f} |", flush=True)
        found.append({"what": name, "mean": off.mean().item(), "p99": spread, "shift": shift})
    return found


def kernels() -> list[dict[str, float]]:
    """The standard deviation of each blur, from what it makes of an edge."""
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 255
    place = np.arange(63) - 31.0
    found = []
    print("\nThe blur's standard deviation\n\n| sigma asked | ours | Pillow's boxes |\n|--:|--:|--:|")
    for sigma in (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        views = replace(augment.whole(torch.tensor([[64, 64]])), sigma=torch.tensor([sigma]))
        own = augment.render(torch.from_numpy(edge).permute(2, 0, 1)[None], views, 64)[0, 0, 32].numpy()
        boxes = np.asarray(Image.fromarray(edge).filter(ImageFilter.GaussianBlur(sigma)))[32, :, 0] / 255
        spreads = [math.sqrt(max(0.0, float((np.diff(line) * place**2).sum()))) for line in (own, boxes)]
        print(f"| {sigma} | {spreads[0]:.3f} | {spreads[1]:.3f} |", flush=True)
        found.append({"sigma": sigma, "ours": spreads[0], "pillow": spreads[1]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="a clone of facebookresearch/dino")
    parser.add_argument("--pictures", help="a folder of JPEGs")
    parser.add_argument("--draws", type=int, default=2000)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.checkout)
    torch.manual_seed(0)
    random.seed(0)
    print(json.dumps(machine()))
    files = jpegs(arguments.pictures, 100)
    visits = math.ceil(arguments.draws / len(files))
    numbers, results, pixels, rows = ours(files, visits)
    their_numbers, their_results = reference(files, visits)
    result = {
        "draws": visits * len(files),
        "drawn": compare(f"What is drawn, {visits * len(files)} draws", numbers, their_numbers),
        "rendered": compare(f"What comes out, {visits * len(files)} views", results, their_results),
    }
    histograms((numbers, results), (their_numbers, their_results))
    result |= {"through both": through_both(files, pixels, rows), "kernels": kernels()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

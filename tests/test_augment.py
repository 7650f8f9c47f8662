"""Views against Pillow, colorsys and plain formulas; one renderer against the other; rows by their address."""

from __future__ import annotations

import colorsys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from saccade import augment
from saccade.augment import Views
from saccade.draws import Draws
from saccade.errors import SaccadeError

RENDERERS = [augment.crop_each, augment.crop_batched]
BOXES = [(10, 20, 80, 90), (0, 0, 120, 150), (30, 50, 20, 24), (5, 5, 96, 13), (119, 149, 1, 1)]


def photos(n: int = 2, height: int = 120, width: int = 150, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Pictures with large forms, edges and a little noise, uint8, channels last in memory."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 6, 7, generator=generator)
    fine = torch.rand(n, channels, height, width, generator=generator)
    picture = F.interpolate(coarse, size=(height, width), mode="bilinear") * 1.3 - 0.15 + 0.06 * fine
    picture[..., height // 3 : height // 2, width // 4 : width // 2] = coarse[..., :1, :1]
    return (picture.clamp(0, 1) * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def pillow(picture: Image.Image, width: int, height: int, mode: str) -> Image.Image:
    """Resized across, then down, as every Pillow did until 12; newer ones take the cheaper order, off by a rounding."""
    filter = getattr(Image.Resampling, mode.upper())
    return picture.resize((width, picture.height), filter).resize((width, height), filter)


def draws(n: int, seed: int = 0, first: int = 0) -> Draws:
    keys = torch.arange(first, first + n) * 0x9E3779B97F4A7C1 + 12345
    return Draws(seed, 0, keys, torch.zeros(n, dtype=torch.int64), torch.arange(n))


def sizes(n: int, height: int = 120, width: int = 150) -> torch.Tensor:
    return torch.tensor([[height, width]]).repeat(n, 1)


def dino(draw: Draws, size: torch.Tensor, count: int = 1) -> Views:
    views = augment.random_resized_crop(draw.sample("crop"), size, scale=(0.2, 1.0), count=count)
    views = augment.flip(views, draw.sample("flip"))
    views = augment.jitter(
        views, draw.sample("jitter"), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8
    )
    views = augment.grey(views, draw.sample("grey"), 0.2)
    views = augment.blur(views, draw.sample("blur"), sigma=(0.1, 2.0), probability=0.5)
    return augment.solarise(views, draw.sample("solarise"), probability=0.2)


def boxes(rows: list[tuple[int, int, int, int]], flipped: bool = False) -> Views:
    """The first picture, seen through each of these boxes."""
    views = augment.whole(torch.ones(len(rows), 2, dtype=torch.int64))
    n = len(rows)
    return replace(
        views, image=torch.zeros(n, dtype=torch.int64), box=torch.tensor(rows), flip=torch.full((n,), flipped)
    )


def numbers(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def bytes_of(view: torch.Tensor) -> np.ndarray:
    return (view * 255).round().permute(1, 2, 0).numpy().astype(int)


# geometry


@pytest.mark.parametrize("crop", RENDERERS)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_is_pillows_crop_then_resize(crop, mode, flipped):
    pixels = photos()
    views = crop(pixels, boxes(BOXES, flipped), 32, mode)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    off = []
    for view, (top, left, height, width) in zip(views, BOXES, strict=True):
        part = picture.crop((left, top, left + width, top + height))
        part = pillow(part, 32, 32, mode)
        want = numbers(ImageOps.mirror(part) if flipped else part)
        off.append(np.abs(bytes_of(view) - want))
    assert np.max(off) <= 1
    assert np.mean(np.stack(off) > 0) < 0.01


@pytest.mark.parametrize("crop", RENDERERS)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_pictures_of_floats_and_16_bits_are_not_rounded(crop, mode):
    picture = photos(1, channels=5).float().add(0.3) / 256
    views = crop(picture, boxes(BOXES), 32, mode)
    deep = (picture * 65535).round()
    assert torch.allclose(crop(deep.to(torch.uint16), boxes(BOXES), 32, mode), views, atol=2e-5)
    for view, (top, left, height, width) in zip(views, BOXES, strict=True):
        for channel in range(5):
            part = Image.fromarray(picture[0, channel, top : top + height, left : left + width].numpy())
            want = np.asarray(part.resize((32, 32), getattr(Image.Resampling, mode.upper()))).clip(0, 1)
            assert np.abs(view[channel].numpy() - want).max() < 2e-5


@pytest.mark.parametrize("crop", RENDERERS)
def test_evaluation_resizes_the_short_side_and_takes_the_centre(crop):
    pixels = photos(1)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    (view,) = crop(pixels, augment.centre_crop(sizes(1), 32, 41), 32, "bicubic")
    long = 41 * 150 // 120
    top, left = round((41 - 32) / 2), round((long - 32) / 2)
    want = pillow(picture, long, 41, "bicubic").crop((left, top, left + 32, top + 32))
    assert np.abs(bytes_of(view) - numbers(want)).max() <= 1
    (view,) = crop(pixels, augment.whole(sizes(1)), 32, "bicubic")
    assert np.abs(bytes_of(view) - numbers(pillow(picture, 32, 32, "bicubic"))).max() <= 1
    with pytest.raises(SaccadeError, match="does not fit"):
        augment.centre_crop(sizes(1), 224, 200)


@pytest.mark.parametrize("crop", RENDERERS)
def test_padding_is_never_seen(crop):
    pixels = photos(2)
    padded = F.pad(pixels, (0, 30, 0, 40), value=255)
    views = augment.random_resized_crop(draws(2).sample("crop"), sizes(2), scale=(0.9, 1.0), count=8)
    assert torch.equal(crop(padded, views, 24, "bicubic"), crop(pixels, views, 24, "bicubic"))


def test_both_renderers_give_the_same_pixels():
    pixels, views = photos(6), dino(draws(6), sizes(6), count=4)
    one = augment.render(pixels, views, 40)
    other = augment.crop_batched(pixels, views, 40, "bicubic")
    augment.recolour(other, views, "steps", block=len(views))
    off = (one - other).abs() * 255
    assert off.max() < 3  # one level of rounding, and what contrast, saturation and hue make of it
    assert (off > 0.5).float().mean() < 0.01


def test_the_batched_renderer_may_work_in_blocks(monkeypatch):
    pixels, views = photos(3), dino(draws(3), sizes(3), count=3)
    at_once = augment.crop_batched(pixels, views, 24, "bicubic")
    monkeypatch.setattr(augment, "_BLOCK", 3 * 120 * 150 * 2)
    assert torch.allclose(augment.crop_batched(pixels, views, 24, "bicubic"), at_once, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_a_gpu_gives_the_cpus_pixels(precision, dtype):
    pixels, views = photos(6), dino(draws(6), sizes(6), count=4)
    pixels = {torch.uint8: pixels, torch.uint16: (pixels.int() * 257).to(dtype), torch.float32: pixels / 255}[dtype]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        off = (augment.render(pixels.cuda(), views, 40).cpu() - augment.render(pixels, views, 40)).abs() * 255
    finally:
        torch.set_float32_matmul_precision(before)
    if dtype == torch.uint8:
        assert off.max() < 3
        assert (off > 0.5).float().mean() < 0.01
    else:
        assert (off > 0.05).float().mean() < 0.001  # solarise may fall to either side of its threshold


# rows


def test_a_view_needs_no_company():
    """A batch of one gives the row that the whole batch gives, numbers and pixels."""
    pixels, size = photos(5), sizes(5)
    views = dino(draws(5), size, count=2)
    together = augment.render(pixels, views, 24)
    for image in range(5):
        alone = dino(draws(1, first=image), size[:1], count=2)
        for column in fields(Views):
            if column.name != "image":
                assert torch.equal(getattr(alone, column.name), getattr(views[[image, 5 + image]], column.name))
        assert torch.equal(augment.render(pixels[image : image + 1], alone, 24), together[[image, 5 + image]])


def test_views_are_indexed_joined_and_independent_of_their_number():
    views, more = dino(draws(4), sizes(4)), dino(draws(4), sizes(4), count=3)
    assert len(more) == 12
    assert more.image.tolist() == [0, 1, 2, 3] * 3
    again = augment.concatenate([more[:4], more[4:]])
    for column in fields(Views):
        assert torch.equal(getattr(views, column.name), getattr(more[:4], column.name)), column.name
        assert torch.equal(getattr(again, column.name), getattr(more, column.name)), column.name
    assert not torch.equal(more.box[:4], more.box[4:8])
    with pytest.raises(ValueError, match="whole number"):
        augment.flip(more[:3], draws(2).sample("flip"))


def test_every_frame_of_a_clip_is_seen_alike():
    clips = photos(6).unflatten(0, (2, 3))
    views = dino(draws(2), sizes(2), count=2)
    rendered = augment.render(clips, views, 24)
    assert rendered.shape == (4, 3, 3, 24, 24)
    for frame in range(3):
        assert torch.equal(rendered[:, frame], augment.render(clips[:, frame], views, 24))
    assert augment.render(clips[:, :1], views, 24).shape == (4, 3, 24, 24)


def test_boxes_have_the_areas_and_ratios_asked_for():
    n = 4000
    size = sizes(n, 400, 500)
    box = augment.random_resized_crop(draws(n).sample("crop"), size, scale=(0.2, 0.6)).box.double()
    area = box[:, 2] * box[:, 3] / (400 * 500)
    aspect = (box[:, 3] / box[:, 2]).log()
    for values, low, high in ((area, 0.2, 0.6), (aspect, np.log(3 / 4), np.log(4 / 3))):
        assert abs(values.min() - low) < 0.02
        assert abs(values.max() - high) < 0.02
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * n)  # uniform: four sigma
        assert abs(values.std() - (high - low) / np.sqrt(12)) < 0.01
    wide = augment.random_resized_crop(draws(n).sample("crop"), size, scale=(0.2, 0.3), ratio=(1.5, 2.0)).box
    assert (abs(wide[:, 3] / wide[:, 2] - 1.75) < 0.27).all()  # width over height
    place = box[:, :2] / (torch.tensor([400, 500]) - box[:, 2:] + 1)
    assert (box[:, :2] >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= size).all()
    assert (place.mean(dim=0) - 0.5).abs().max() < 4 / np.sqrt(12 * n)


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [(10, 300, [0, 143, 10, 13]), (300, 10, [143, 0, 13, 10]), (1, 1, [0, 0, 1, 1]), (1, 40, [0, 19, 1, 1])],
)
def test_where_no_box_fits_the_centre_is_taken(height, width, want):
    views = augment.random_resized_crop(draws(3).sample("crop"), sizes(3, height, width), scale=(0.9, 1.0))
    assert views.box.tolist() == [want] * 3


def test_colour_is_drawn_from_the_ranges_asked_for():
    n = 4000
    views = dino(draws(n), sizes(n))
    neutral = (views.factors == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(dim=1)
    assert abs(neutral.float().mean() - 0.2) < 0.03
    spread = torch.tensor([0.4, 0.4, 0.2, 0.1])
    moved = (views.factors[~neutral] - torch.tensor([1.0, 1.0, 1.0, 0.0])) / spread
    assert (moved.abs() <= 1.00001).all()
    assert (moved.abs().amax(dim=0) > 0.99).all()
    assert (moved.mean(dim=0).abs() < 0.05).all()
    first = torch.bincount(views.order[:, 0], minlength=4) / n
    assert (first - 0.25).abs().max() < 0.03
    assert (views.order.sort(dim=1).values == torch.arange(4)).all()
    for chosen, part in (
        (views.grey, 0.2),
        (views.flip, 0.5),
        (views.sigma > 0, 0.5),
        (views.threshold == np.float32(128 / 255), 0.2),
    ):
        assert abs(chosen.float().mean() - part) < 0.03
    blurred = views.sigma[views.sigma > 0]
    assert 0.1 <= blurred.min() < 0.11
    assert 1.99 < blurred.max() <= 2.0
    wild = augment.jitter(views, draws(n).sample("wild"), brightness=3.0)
    assert 0 <= wild.factors[:, 0].min() < 0.01  # a factor is never negative
    assert (wild.factors[:, 1:] == torch.tensor([1.0, 1.0, 0.0])).all()


# colour


LUMA = np.array([0.2989, 0.587, 0.114])


def stepped(picture: np.ndarray, kind: int, factor: float) -> np.ndarray:
    """One step of colour on [H W 3], by the formulas."""
    if kind == 3:
        turned = [
            colorsys.hsv_to_rgb((h + factor) % 1.0, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in picture.reshape(-1, 3).tolist())
        ]
        return np.array(turned).reshape(picture.shape)
    grey = (picture @ LUMA)[..., None]
    base = (np.zeros(1), grey.mean(), grey)[kind]
    return (factor * picture + (1 - factor) * base).clip(0, 1)


def coloured(n: int) -> torch.Tensor:
    """Small pictures with black, white, greys and pure colours in them, where hue and clipping are delicate."""
    pixels = torch.rand(n, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    corners = torch.tensor([[r, g, b] for r in (0.0, 1.0) for g in (0.0, 1.0) for b in (0.0, 1.0)])
    pixels[:, :, 0] = corners.T
    pixels[:, :, 1] = torch.linspace(0, 1, 8)
    return pixels


@pytest.mark.parametrize("kind", [0, 1, 2, 3], ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_step_of_colour_is_its_formula(kind, block):
    pixels = coloured(4)
    views = augment.whole(sizes(4, 6, 8))
    factors = views.factors.clone()
    factors[:, kind] = torch.tensor([0.2, 1.7, -0.35, 0.5] if kind == 3 else [0.3, 1.8, 1.0, 0.0])
    out = pixels.clone()
    augment.recolour(out, replace(views, factors=factors), "steps", block)
    for image in range(4):
        want = stepped(pixels[image].permute(1, 2, 0).double().numpy(), kind, float(factors[image, kind]))
        assert np.abs(out[image].permute(1, 2, 0).numpy() - want).max() < 2e-6


def test_steps_follow_each_rows_order_and_clip_after_every_one():
    pixels, views = coloured(24), augment.whole(sizes(24, 6, 8))
    orders = torch.tensor([[a, b, c, 6 - a - b - c] for a in range(4) for b in range(4) for c in range(4)
                           if len({a, b, c}) == 3])  # fmt: skip
    factors = torch.tensor([1.7, 1.6, 1.8, 0.3]).repeat(24, 1)
    grey = torch.arange(24) % 5 == 0
    out = pixels.clone()
    augment.recolour(out, replace(views, order=orders, factors=factors, grey=grey), "steps", block=24)
    for image, order in enumerate(orders.tolist()):
        want = pixels[image].permute(1, 2, 0).double().numpy()
        for kind in order:
            want = stepped(want, kind, float(factors[image, kind]))
        if grey[image]:
            want = np.repeat((want @ LUMA)[..., None], 3, axis=2)
        assert np.abs(out[image].permute(1, 2, 0).numpy() - want).max() < 1e-5


@pytest.mark.parametrize("block", [1, 2])
def test_a_factor_of_zero_leaves_one_colour(block):
    pixels, views = coloured(2), augment.whole(sizes(2, 6, 8))
    factors = torch.tensor([[0.0, 1.7, 1.8, 0.2], [1.0, 0.0, 1.8, 0.2]])
    out = pixels.clone()
    augment.recolour(out, replace(views, factors=factors, grey=torch.tensor([False, True])), "steps", block)
    assert out[0].abs().max() < 1e-6
    mean = float((pixels[1].mean((1, 2)) * torch.from_numpy(LUMA)).sum()) * LUMA.sum()
    assert (out[1] - mean).abs().max() < 1e-3
    assert (out[1] - out[1, 0, 0, 0]).abs().max() < 1e-6


def test_all_at_once_is_one_by_one():
    views = dino(draws(8), sizes(8), count=3)
    one = augment.crop_each(photos(8), views, 32, "bicubic")
    many = one.clone()
    augment.recolour(one, views, "steps", block=1)
    augment.recolour(many, views, "steps", block=24)
    assert torch.allclose(one, many, atol=1e-6)


@pytest.mark.parametrize("block", [1, 3])
def test_blur_is_a_gaussian_with_its_edges_repeated(block):
    pixels = photos(3, 40, 50).float() / 255
    sigma = torch.tensor([0.4, 0.0, 2.0])
    out = pixels.clone()
    augment.recolour(out, replace(augment.whole(sizes(3)), sigma=sigma), "steps", block)
    assert torch.equal(out[1], pixels[1])
    for image in (0, 2):
        reach = np.arange(-20, 21)
        kernel = np.exp(-0.5 * (reach / float(sigma[image])) ** 2)
        kernel /= kernel.sum()
        want = np.pad(pixels[image].numpy().astype(float), ((0, 0), (20, 20), (20, 20)), mode="edge")
        for axis in (1, 2):
            want = np.apply_along_axis(np.convolve, axis, want, kernel, mode="valid")
        assert np.abs(out[image].numpy() - want).max() < 0.5 / 255  # what lies beyond three sigma


@pytest.mark.parametrize("block", [1, 2])
def test_solarise_is_pillows(block):
    pixels = photos(2)
    views = replace(augment.whole(sizes(2)), threshold=torch.tensor([128 / 255, float("inf")]))
    out = pixels.float().div(255)
    augment.recolour(out, views, "steps", block)
    want = ImageOps.solarize(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), threshold=128)
    assert np.array_equal(bytes_of(out[0]), numbers(want))
    assert np.array_equal(bytes_of(out[1]), pixels[1].permute(1, 2, 0).numpy())


def test_what_needs_rgb_refuses_other_pictures():
    views = dino(draws(2), sizes(2))
    plain = replace(views, factors=torch.tensor([[1.5, 0.5, 1.0, 0.0]] * 2), grey=torch.zeros(2, dtype=torch.bool))
    many = photos(2, channels=13)
    for bad in (
        replace(plain, grey=torch.tensor([True, False])),
        replace(plain, factors=torch.tensor([[1.0, 1.0, 1.0, 0.1]] * 2)),
        replace(plain, factors=torch.tensor([[1.0, 1.0, 0.5, 0.0]] * 2)),
    ):
        with pytest.raises(SaccadeError, match="13 channels"):
            augment.render(many, bad, 24)
    assert augment.render(many, plain, 24).shape == (2, 13, 24, 24)
    with pytest.raises(SaccadeError, match="float64"):
        augment.render(many.double(), plain, 24)
    one = photos(2, channels=1)
    same = replace(views, factors=views.factors * torch.tensor([1.0, 1.0, 0, 0]) + torch.tensor([0, 0, 1.0, 0]))
    assert torch.equal(
        augment.render(one, views, 24), augment.render(one, replace(same, grey=torch.zeros_like(same.grey)), 24)
    )


def test_the_matrix_is_the_steps_where_nothing_clips():
    pixels = photos(8).float().div(255) * 0.3 + 0.3
    views = augment.jitter(
        augment.whole(sizes(8)), draws(8).sample("jitter"), brightness=0.2, contrast=0.2, saturation=0.8
    )
    views.factors[:, 3] = torch.tensor([0, 1 / 3, -1 / 3, 0] * 2)  # a third of a circle is a matrix: it swaps channels
    sigma = torch.tensor([0, 1.0] * 4)  # what follows the matrix is the same
    views = replace(views, grey=torch.arange(8) == 5, sigma=sigma)
    steps, matrix = augment.render(pixels, views, 24), augment.render(pixels, views, 24, colour="matrix")
    assert steps.min() > 0
    assert steps.max() < 1
    assert torch.allclose(steps, matrix, atol=1e-5)
    assert (steps - augment.render(pixels, augment.whole(sizes(8)), 24)).abs().amax(dim=(1, 2, 3)).min() > 0.02


def test_the_cost_of_the_matrix_is_known():
    """The fast mode turns the hue the same way, exactly by a third, else roughly (benchmarks/views.py: on photos)."""
    pixels = photos(16).float().div(255) * 0.5 + 0.25
    turned = augment.whole(sizes(16)).factors.clone()
    turned[:, 3] = torch.tensor([-1 / 3, -0.1, 0.1, 1 / 3]).repeat_interleave(4)
    views = replace(augment.whole(sizes(16)), factors=turned)
    steps = augment.render(pixels, views, 32)
    off = (steps - augment.render(pixels, views, 32, colour="matrix")).abs()
    moved = (steps - augment.render(pixels, augment.whole(sizes(16)), 32)).abs()
    assert off[:4].max() < 1e-5
    assert off[12:].max() < 1e-5
    assert 0.3 < off[4:12].mean() / moved[4:12].mean() < 0.8  # a matrix comes no nearer

"""Views: what a model sees of a picture. A view is a row of numbers, drawn first and rendered later, in batch.

Draw. Every function takes a `draws.Stream` of its own name, one row an image, and gives a new, frozen `Views`:

    size = batch["size"]                                                        # true height and width, [B 2]
    views = random_resized_crop(draws.sample("crop"), size, scale=(0.2, 1.0))   # count=2: two views an image
    views = flip(views, draws.sample("flip"))                                   # MAE ends here
    views = jitter(views, draws.sample("jitter"), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
                   probability=0.8)
    views = grey(views, draws.sample("grey"), probability=0.2)
    views = blur(views, draws.sample("blur"), sigma=(0.1, 2.0), probability=0.5)
    views = solarise(views, draws.sample("solarise"), probability=0.2)

With `count=n` the rows are view-major, [n B]: `views[:len(size)]` is the first view of every image, and no view's
numbers depend on how many are drawn. `views[index]` and `concatenate([...])` give views again. Evaluation uses
`centre_crop(size, side, resize)` and `whole(size)`.

Render. `render(pixels, views, side)` turns decoded pixels [B C H W] or [B T C H W] (uint8, uint16, or float32 in
[0, 1]) into Float[V C S S] in [0, 1] (Float[V T C S S] for T > 1: every frame of a clip by the same row). `views.image`
says which picture a row looks at, so ten views of a picture are made from one decoded batch. Keep rows and sizes on the
CPU: rendering plans there, and rows that lie on a GPU cost one wait for it.

Rounding. Geometry follows Pillow (and torch): crop, then antialiased resize, across before down, by a filter that never
reads beyond the crop; uint8 pictures are rounded to 8 bits after each of the two passes. Colour follows torchvision's
float tensors: no 8-bit rounding, clipping after every step. The order is fixed: crop, flip, jitter (its four steps in
each row's own order), grey, blur, solarise. A picture of one channel has no colour to change; with other numbers of
channels than 1 and 3, saturation, hue and grey are an error, and contrast turns about the mean of all channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saccade.data import Batch
from saccade.draws import Draws, Stream
from saccade.errors import SaccadeError
from saccade.settings import Captioned, MultiCrop

Interpolation = Literal["bicubic", "bilinear"]
Colour = Literal["steps", "matrix"]

_LUMA = (0.2989, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_ATTEMPTS = 10
_BLOCK = 1 << 26  # floats that the batched renderer holds at once


@dataclass(frozen=True)
class Views:
    """V rows, one for each view. What is not wanted is neutral: factors (1, 1, 1, 0), sigma 0, threshold infinite."""

    image: Int[Tensor, " v"]
    """Which picture of the batch."""
    box: Int[Tensor, "v 4"]
    """Top, left, height, width in pixels: the part of the picture that is read."""
    window: Float[Tensor, "v 4"]
    """Top, left, height, width as parts of the resized box: what is kept of it. (0, 0, 1, 1) keeps all."""
    flip: Bool[Tensor, " v"]
    order: Int[Tensor, "v 4"]
    """The order of brightness (0), contrast (1), saturation (2) and hue (3)."""
    factors: Float[Tensor, "v 4"]
    """Of brightness, contrast and saturation, and the turn of the hue in whole circles."""
    grey: Bool[Tensor, " v"]
    sigma: Float[Tensor, " v"]
    """Of the Gaussian blur, in pixels of the view."""
    threshold: Float[Tensor, " v"]
    """Pixels at or above it are inverted."""

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Views:
        return self._each(lambda column: column[index])

    def to(self, device: torch.device | str) -> Views:
        """The same rows on another device."""
        waits = torch.device(device).type == "cpu"  # an unfinished copy to the CPU would be read too early
        return self._each(lambda column: column.to(device, non_blocking=not waits))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Views:
        return Views(*(change(getattr(self, column.name)) for column in fields(self)))


def concatenate(parts: Sequence[Views]) -> Views:
    """All rows of several views of the same batch."""
    return Views(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(Views)))


def whole(size: Int[Tensor, "b 2"]) -> Views:
    """Each picture whole, squeezed to a square."""
    n, device = len(size), size.device
    return Views(
        image=torch.arange(n, device=device),
        box=torch.cat([torch.zeros_like(size), size], dim=1),
        window=torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(n, 4),
        flip=torch.zeros(n, dtype=torch.bool, device=device),
        order=torch.arange(4, device=device).expand(n, 4),
        factors=torch.tensor(_NEUTRAL, device=device).expand(n, 4),
        grey=torch.zeros(n, dtype=torch.bool, device=device),
        sigma=torch.zeros(n, device=device),
        threshold=torch.full((n,), float("inf"), device=device),
    )


WHOLE_BELOW = 192
"""From this side up pictures are framed as the published families do it."""


def resized_for(side: int) -> int:
    """Short side from which a central square of `side` is cut.

    From 192 pixels up: the 256 / 224 of the published families, which leaves out a margin of photographs. Below, the
    whole short side: small pictures (cells, icons, CIFAR) are framed tightly, and enlarging them to cut the enlargement
    off again loses their border.
    """
    return side if side < WHOLE_BELOW else round(side * 256 / 224)


def centre_crop(size: Int[Tensor, "b 2"], side: int, resize: int) -> Views:
    """The short side resized to `resize` pixels, then the central square of `side`: evaluation's preprocessing.

    Render it at this very `side`. Raises `SaccadeError` when `resize` is below `side`.
    """
    if resize < side:
        raise SaccadeError(
            f"a centre crop of {side} does not fit a short side of {resize}", hint=f"resize to {side} or more"
        )
    full = resize * size // size.amin(dim=1, keepdim=True)
    corner = ((full - side) / 2).round()
    return replace(whole(size), window=torch.cat([corner / full, side / full], dim=1))


def random_resized_crop(
    stream: Stream,
    size: Int[Tensor, "b 2"],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    count: int = 1,
) -> Views:
    """`count` boxes an image: part of the area uniform in `scale`, width over height log-uniform in `ratio`.

    Ten attempts at a box that fits, then the largest central one within `ratio` (Szegedy et al. 2015, as in
    torchvision).
    """
    size = size.repeat(count, 1)
    rows = replace(whole(size), image=torch.arange(len(size), device=size.device) % (len(size) // count))
    u = _uniform(stream, rows, 2 * _ATTEMPTS + 2).double()
    height, width = size.double().unbind(1)
    area = (height * width)[:, None] * _between(u[:, :_ATTEMPTS], *scale)
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    aspect = _between(u[:, _ATTEMPTS:-2], low, high).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h >= 1) & (w >= 1) & (h <= height[:, None]) & (w <= width[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)  # the first attempt that fits
    found = fits.any(dim=1)
    h = torch.where(found, h.gather(1, first)[:, 0], torch.minimum(height, (width / ratio[0]).round()).clamp(min=1))
    w = torch.where(found, w.gather(1, first)[:, 0], torch.minimum(width, (height * ratio[1]).round()).clamp(min=1))
    top = torch.where(found, (u[:, -2] * (height - h + 1)), (height - h) / 2).floor()
    left = torch.where(found, (u[:, -1] * (width - w + 1)), (width - w) / 2).floor()
    return replace(rows, box=torch.stack([top, left, h, w], dim=1).long())


def flip(views: Views, stream: Stream, probability: float = 0.5) -> Views:
    """Mirrored left to right with this probability."""
    return replace(views, flip=_uniform(stream, views, 1)[:, 0] < probability)


def jitter(
    views: Views,
    stream: Stream,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Views:
    """Colour jitter with this probability: factors uniform in [max(0, 1 - x), 1 + x], hue in [-x, x], in any order."""
    u = _uniform(stream, views, 9)
    strength = u.new_tensor([brightness, contrast, saturation, hue])
    neutral = u.new_tensor(_NEUTRAL)
    low = neutral - strength
    low[:_HUE].clamp_(min=0)
    factors = _between(u[:, 4:8], low, neutral + strength)
    order = torch.argsort(u[:, :4], dim=1, stable=True)
    return replace(views, order=order, factors=torch.where(u[:, 8:] < probability, factors, neutral))


def grey(views: Views, stream: Stream, probability: float = 0.2) -> Views:
    """Without colour, with this probability."""
    return replace(views, grey=_uniform(stream, views, 1)[:, 0] < probability)


def blur(views: Views, stream: Stream, *, sigma: tuple[float, float] = (0.1, 2.0), probability: float = 0.5) -> Views:
    """Blurred with this probability, by a Gaussian whose sigma is uniform in this range, in pixels of the view."""
    u = _uniform(stream, views, 2)
    return replace(views, sigma=torch.where(u[:, 1] < probability, _between(u[:, 0], *sigma), 0.0))


def solarise(views: Views, stream: Stream, *, threshold: float = 128 / 255, probability: float = 0.2) -> Views:
    """Pixels at or above the threshold inverted, with this probability."""
    chosen = _uniform(stream, views, 1)[:, 0] < probability
    return replace(views, threshold=torch.where(chosen, threshold, float("inf")))


def _between(u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return low + (high - low) * u


def _uniform(stream: Stream, views: Views, n: int) -> Float[Tensor, "v n"]:
    """`n` numbers for each of the view-major rows."""
    images = len(stream.bits(1))
    count, rest = divmod(len(views), images)
    if rest:
        raise ValueError(f"{len(views)} rows are not a whole number of views of {images} images")
    return stream.uniform(n * count).reshape(images, count, n).transpose(0, 1).reshape(len(views), n)


def captioned(config: Captioned, batch: Batch, draws: Draws) -> tuple[Views, Batch]:
    """A view of each picture, whole or a crop, its text's `tokens`, and the numbers of what is the `same`.

    These are of picture and text: a sample that shares one with another is no negative of it.
    """
    rows = whole(batch["size"])
    if config.min_scale < 1:
        rows = random_resized_crop(draws.sample("crop"), batch["size"], scale=(config.min_scale, 1.0))
    same = torch.stack([batch["key"], batch["text_key"]], 1).to(batch["pixels"].device)
    return flip(rows, draws.sample("flip"), config.flip), {"tokens": batch["text"].long(), "same": same}


@torch.no_grad()
def multi_crop(
    config: MultiCrop,
    batch: Batch,
    draws: Draws,
    *,
    blurred: tuple[float, float, float],
    large: Literal[1, 2] = 2,
    plain: int | None = None,
    again: int | None = None,
    stretch: bool = False,
) -> Batch:
    """Crops `globals` [2B C S S], or [B C S S] of one `large`, small `locals`, and `drop`: words for stochastic depth.

    These stay on the CPU, which thereby knows how much is left in (`depth.kept`).

    `blurred`: the method's rates of blur for the first and the second large crop and for small ones. `plain`: also the
    large crops in this size and in their own colours, as `plain` [2B C P P]. `again`: also, where it is another size
    than theirs, the same views in this one, as `again` [2B C A A]. `stretch`: also words for RoPE, the same for all
    large crops of a step and for all small ones. Every first axis is view-major.
    """
    size, few, many = batch["size"], config.local_crops, large * len(batch["size"])
    wide = random_resized_crop(draws.sample("globals"), size, scale=config.global_scale, count=large)
    small = random_resized_crop(draws.sample("locals"), size, scale=config.local_scale, count=max(1, few))
    seen = flip(concatenate([wide, small]), draws.sample("flip"), config.flip)
    made = {} if plain is None else {"plain": render(batch["pixels"], seen[:many], plain)}
    largest = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    change = {name: config.colour * value for name, value in largest.items()}
    seen = jitter(seen, draws.sample("jitter"), **change, probability=0.8)
    seen = grey(seen, draws.sample("grey"), config.grey)
    first, second, small = seen[: len(size)], seen[len(size) : many], seen[many:]
    first = blur(first, draws.sample("blur 1"), probability=blurred[0] * config.blur)
    second = blur(second, draws.sample("blur 2"), probability=blurred[1] * config.blur)
    second = solarise(second, draws.sample("solarise"), probability=config.solarise)
    made["globals"] = render(batch["pixels"], concatenate([first, second]), config.image_size)
    if again not in (None, config.image_size):
        scaled = concatenate([first, second])
        scaled = replace(scaled, sigma=scaled.sigma * (again / config.image_size))  # it is in pixels
        made["again"] = render(batch["pixels"], scaled, again)
    if few:
        small = blur(small, draws.sample("blur"), probability=blurred[2] * config.blur)
        made["locals"] = render(batch["pixels"], small, config.local_size)
    if stretch:
        words = draws.step("stretch").shared(2).mul(2**24).long()
        made["stretch"] = words[[0] * large + [1] * few].repeat_interleave(len(size)).to(batch["pixels"].device)
    return made | {"drop": draws.step("drop").bits(large + few).T.flatten()}


def render(
    pixels: Shaped[Tensor, "b *t c h w"],
    views: Views,
    side: int,
    *,
    interpolation: Interpolation = "bicubic",
    colour: Colour = "steps",
) -> Float[Tensor, "v *frames c s s"]:
    """The views as floats in [0, 1], on the device of the pixels; T = 1 is dropped.

    `colour="matrix"` composes jitter and grey to one affine map and clips once: an approximation whose gain
    and cost benchmarks/views.py measures. Raises `SaccadeError` for other pixel types, and for hue, saturation or grey
    of what is neither grey nor RGB.
    """
    views = views.to("cpu")
    _check(pixels, views)
    if pixels.ndim == 5 and pixels.shape[1] > 1:
        frames = pixels.shape[1]
        clip = views[torch.arange(len(views)).repeat_interleave(frames)]
        clip = replace(clip, image=clip.image * frames + torch.arange(frames).repeat(len(views)))
        still = render(pixels.flatten(0, 1), clip, side, interpolation=interpolation, colour=colour)
        return still.unflatten(0, (len(views), frames))
    if pixels.ndim == 5:
        pixels = pixels[:, 0]
    on_cpu = pixels.device.type == "cpu"
    with torch.autocast(pixels.device.type, enabled=False):
        out = (crop_each if on_cpu else crop_batched)(pixels, views, side, interpolation)
        recolour(out, views, colour, block=1 if on_cpu else len(views))
    return out


def _check(pixels: Tensor, views: Views) -> None:
    if pixels.dtype not in (torch.uint8, torch.uint16, torch.float32):
        raise SaccadeError(f"views cannot be made of {pixels.dtype} pixels", hint="decode to uint8, uint16 or float32")
    channels = pixels.shape[-3]
    asked = bool(views.grey.any() or (views.factors[:, _SATURATION:] != torch.tensor(_NEUTRAL[_SATURATION:])).any())
    if channels not in (1, 3) and asked:
        raise SaccadeError(
            f"saturation, hue and grey need RGB, and these pictures have {channels} channels",
            hint="set saturation, hue and grey to 0 (recipes: --colour 0 --grey 0); all else works on any channels",
        )


def _scale(pixels: Tensor) -> float:
    """The value that stands for 1."""
    return {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}[pixels.dtype]


def _canvas(views: Views, side: int) -> tuple[Tensor, Tensor]:
    """Height and width to which each box is resized, and where in that the view begins; both Int[V 2]."""
    full = (side / views.window[:, 2:]).round().long()
    return full, (views.window[:, :2] * full).round().long()


def crop_each(
    pixels: Shaped[Tensor, "b c h w"], views: Views, side: int, interpolation: Interpolation
) -> Float[Tensor, "v c s s"]:
    """Crop, resize and flip on a CPU: one view after the other, by torch's 8-bit resizer where pixels are uint8."""
    scale, channels = _scale(pixels), pixels.shape[1]
    out = torch.empty(len(views), channels, side, side)
    canvas, corner = _canvas(views, side)
    rows = zip(
        views.image.tolist(), views.box.tolist(), canvas.tolist(), corner.tolist(), views.flip.tolist(), strict=True
    )
    for view, (image, (top, left, height, width), full, (down, right), flipped) in enumerate(rows):
        # A slice, not an index: by the stride of the batch axis torch sees that the memory is channels last.
        part = pixels[image : image + 1, :, top : top + height, left : left + width]
        if pixels.dtype != torch.uint8:
            part = part.float()
        part = F.interpolate(part, size=full, mode=interpolation, antialias=True, align_corners=False)
        if full != [side, side]:
            part = part[:, :, down : down + side, right : right + side]
        out[view : view + 1].copy_(part.flip(-1) if flipped else part).div_(scale)
        if pixels.dtype != torch.uint8:
            out[view].clamp_(0, 1)
    return out


def crop_batched(
    pixels: Shaped[Tensor, "b c h w"], views: Views, side: int, interpolation: Interpolation
) -> Float[Tensor, "v c s s"]:
    """Crop, resize and flip for a GPU: a filter matrix for each view and axis, and batched products.

    Views of like size go together, so that a block reads little more than its crops.
    """
    scale, whole_numbers = _scale(pixels), pixels.dtype == torch.uint8
    channels, device = pixels.shape[1], pixels.device
    out = torch.empty(len(views), channels, side, side, device=device)
    canvas, corner = _canvas(views, side)
    order = torch.argsort(views.box[:, 2:].prod(dim=1), descending=True)
    while len(order):
        tallest, widest = views.box[order, 2:].amax(dim=0).tolist()
        block, order = order.tensor_split([max(1, _BLOCK // (channels * tallest * widest))])
        rows, full, start = views[block].to(device), canvas[block].to(device), corner[block].to(device)
        tallest, widest = views.box[block, 2:].amax(dim=0).tolist()
        y = (rows.box[:, :1] + torch.arange(tallest, device=device)).clamp(max=pixels.shape[2] - 1)
        x = (rows.box[:, 1:2] + torch.arange(widest, device=device)).clamp(max=pixels.shape[3] - 1)
        # uint16 has no gather of its own on a GPU
        source = pixels if pixels.dtype != torch.uint16 else pixels.int()
        part = source[rows.image[:, None, None], :, y[:, :, None], x[:, None, :]]  # [v h w C]
        part = part.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        across = _filter(rows.box[:, 3], full[:, 1], start[:, 1], side, widest, rows.flip, interpolation)
        part = _product(part.flatten(1, 2), across.mT, whole_numbers).unflatten(1, (channels, tallest))
        down = _filter(
            rows.box[:, 2], full[:, 0], start[:, 0], side, tallest, torch.zeros_like(rows.flip), interpolation
        )
        part = _product(part.mT.flatten(1, 2), down.mT, whole_numbers).unflatten(1, (channels, side)).mT
        out.index_copy_(0, block.to(device), part.div_(scale).clamp_(0, 1))
    return out


def _product(x: Float[Tensor, "v m k"], weights: Float[Tensor, "v k s"], whole_numbers: bool) -> Float[Tensor, "v m s"]:
    """The batched product, exact enough to round even where products are TF32: factors are split into two of 11 bits.

    `whole_numbers`: x are pixels of 8 bits, exact as they are, and so is the result, as Pillow leaves it after a pass.
    """
    high = _leading_bits(weights)
    if whole_numbers:
        return (x @ high).add_(x @ (weights - high)).add_(0.5).floor_().clamp_(0, 255)  # Pillow rounds a half up
    lead = _leading_bits(x)
    return (lead @ high).add_(lead @ (weights - high)).add_((x - lead) @ high)


def _leading_bits(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def _filter(
    length: Int[Tensor, " v"],
    full: Int[Tensor, " v"],
    start: Int[Tensor, " v"],
    side: int,
    longest: int,
    mirrored: Bool[Tensor, " v"],
    interpolation: Interpolation,
) -> Float[Tensor, "v s k"]:
    """The weights with which `length` pixels resized to `full` give the `side` from `start` on; a row sums to 1."""
    place = torch.arange(side, device=length.device)
    place = torch.where(mirrored[:, None], side - 1 - place, place) + start[:, None]
    step = length.double() / full
    centre = (place + 0.5) * step[:, None]  # [v s]
    pixel = torch.arange(longest, device=length.device)
    distance = (pixel + 0.5 - centre[:, :, None]) / step.clamp(min=1)[:, None, None]
    weights = _kernel(distance.float().abs_(), interpolation)
    weights = weights.masked_fill_(pixel >= length[:, None, None], 0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    """The filter at a distance x >= 0; bicubic with a = -0.5 as Pillow and torch's antialiasing have it (Keys 1981)."""
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def recolour(out: Float[Tensor, "v c h w"], views: Views, colour: Colour, block: int) -> None:
    """Jitter, grey, blur and solarise in place, `block` views at a time: one on a CPU, for its cache, all on a GPU."""
    jittered = (views.factors != torch.tensor(_NEUTRAL)).any(dim=1) | views.grey
    if colour == "matrix" and out.shape[1] == 3:
        _on(out, _where(jittered), _compose, views.order, views.factors, views.grey)
        jittered = torch.zeros_like(jittered)
        views = replace(views, factors=torch.tensor(_NEUTRAL).expand(len(views), 4), grey=jittered)
    if block == 1 and out.device.type == "cpu":
        changed = jittered | (views.sigma > 0) | views.threshold.isfinite()
        columns = (views.order, views.factors, views.grey, views.sigma, views.threshold)
        numbers = list(zip(*(column.tolist() for column in columns), strict=True))
        for view in _where(changed):
            _recolour_one(out[view : view + 1], *numbers[view])
        return
    for first in range(0, len(views), max(1, block)):
        rows, x = views[first : first + block], out[first : first + block]
        if jittered[first : first + block].any():
            _step_by_step(x, rows)
        _on(x, _where(rows.sigma > 0), _gaussian, rows.sigma)
        _on(x, _where(rows.threshold.isfinite()), _invert_above, rows.threshold)


def _recolour_one(
    x: Float[Tensor, "1 c h w"], order: list[int], factors: list[float], grey: bool, sigma: float, threshold: float
) -> None:
    """One view on a CPU, by the steps of `_step_by_step`.

    The colours are `gain * x + lift`: what only scales and shifts touches no pixel, and a step is clipped only where
    it can leave [0, 1], which is by a factor above 1.
    """
    gain, lift, luma = 1.0, 0.0, sum(_LUMA) if x.shape[1] == 3 else 1.0  # luma: what the grey of white is
    for kind in order:
        factor = factors[kind]
        if factor == _NEUTRAL[kind] or (x.shape[1] == 1 and kind in (_SATURATION, _HUE)):
            continue
        if kind == _HUE:
            _turn(x, factor)
            continue
        if kind == _SATURATION:
            colourless = _luma(x)
            x.mul_(factor).add_(colourless, alpha=1 - factor)
            lift *= factor + (1 - factor) * luma
        else:
            about = gain * _grey_of(x.mean(dim=(2, 3))[0].tolist()) if kind == _CONTRAST else 0.0  # lift is still 0
            gain, lift = factor * gain, factor * lift + (1 - factor) * about
        if gain < 1e-3:  # nearly one colour: bounds of x would be far away
            x.mul_(gain).add_(lift)
            gain, lift = 1.0, 0.0
        if factor > 1:
            x.clamp_(-lift / gain, (1 - lift) / gain)
    if grey and x.shape[1] != 1:
        _to_grey(x)
        lift *= luma
    if sigma > 0:
        _gaussian_one(x, sigma)
    if threshold < float("inf"):
        above = x.clone().ge_((threshold - lift) / gain)
        x.addcmul_(above, (1 - 2 * lift) / gain - 2 * x)
    if (gain, lift) != (1.0, 0.0):
        x.mul_(gain).add_(lift).clamp_(0, 1)


def _grey_of(channels: list[float]) -> float:
    """`_luma` of one colour."""
    weights = _LUMA if len(channels) == 3 else [1 / len(channels)] * len(channels)
    return sum(weight * channel for weight, channel in zip(weights, channels, strict=True))


def _turn(x: Float[Tensor, "1 3 h w"], turn: float) -> None:
    """Hue in HSV turned by a part of a circle, without its coordinates.

    By thirds of a circle the channels change places. The rest, d sixths, moves a channel along its ramp: with m and M
    the smallest and the largest channel, c = M - m, n the channel that follows and o the third one, x becomes
    x - n + m + d c, and c - 2 d c more where n >= o, held within m and M. For d < 0 n and o change places.
    """
    thirds = round(3 * turn)
    part = 6 * turn - 2 * thirds
    if thirds % 3:
        x.copy_(x.roll(thirds, dims=1))
    low, top = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    chroma = top - low
    step = -1 if part > 0 else 1
    over = x - x.roll(step, dims=1)
    falls = over.roll(step, dims=1).ge_(0)  # a mask as numbers: a choice by bool costs several times a product
    over.addcmul_(falls, chroma, value=1 - 2 * abs(part)).add_(torch.add(low, chroma, alpha=abs(part)))
    torch.minimum(torch.maximum(over, low, out=over), top, out=x)


def _gaussian_one(x: Float[Tensor, "1 c h w"], sigma: float) -> None:
    """`_gaussian` of one view."""
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(reach + 1)]
    total = 2 * sum(weights) - 1
    for axis, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        wide = F.pad(x, pad, mode="replicate")
        taps = wide.as_strided((2 * reach + 1, *x.shape), (wide.stride(axis), *wide.stride())).unbind()
        torch.mul(taps[reach], weights[0] / total, out=x)
        for tap in range(1, reach + 1):
            weight = weights[tap] / total
            x.add_(taps[reach - tap], alpha=weight).add_(taps[reach + tap], alpha=weight)


def _where(chosen: Bool[Tensor, " v"]) -> list[int]:
    return chosen.nonzero()[:, 0].tolist()


def _on(x: Tensor, chosen: list[int], change: Callable[..., object], *columns: Tensor) -> None:
    """Changes the chosen views in place; `columns` are their numbers, one row a view. Views not chosen cost nothing."""
    if not chosen:
        return
    if len(chosen) == len(x):
        change(x, *(column.to(x.device, non_blocking=True) for column in columns))
        return
    index = torch.tensor(chosen)
    numbers = [column[index].to(x.device, non_blocking=True) for column in columns]
    index = index.to(x.device, non_blocking=True)
    part = x[index]
    change(part, *numbers)
    x.index_copy_(0, index, part)


def _step_by_step(x: Tensor, rows: Views) -> None:
    """Each row's colour steps in its own order, every one of them clipped; then grey."""
    steps = (_brightness, _contrast, _saturation, _hue)
    chosen: list[list[list[int]]] = [[[] for _ in steps] for _ in steps]
    for view, (order, factors) in enumerate(zip(rows.order.tolist(), rows.factors.tolist(), strict=True)):
        for place, kind in enumerate(order):
            if factors[kind] != _NEUTRAL[kind]:
                chosen[place][kind].append(view)
    for place in range(len(steps)):
        for kind, step in enumerate(steps):
            _on(x, chosen[place][kind], step, rows.factors[:, kind])
    _on(x, _where(rows.grey), _to_grey)


def _luma(x: Tensor) -> Tensor:
    """The grey of RGB [n 1 H W]; of other pictures, the mean of their channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor[:, None, None, None]).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(x.mean(dim=(2, 3), keepdim=True))  # the mean of the grey is the grey of the mean
    factor = factor[:, None, None, None]
    x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    if x.shape[1] == 1:
        return
    factor = factor[:, None, None, None]
    colourless = _luma(x).mul_(1 - factor)
    x.mul_(factor).add_(colourless).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> None:
    """Hue in HSV, turned by a part of a circle.

    With m the smallest channel, c = largest - m and h the hue in sixths of a circle, a channel is m + c * t: t is
    |h - 3| - 1 for red, 2 - |h - 2| for green, 2 - |h - 4| for blue, held within [0, 1] (Smith 1978).
    """
    if x.shape[1] == 1:
        return
    red, green, blue = x.unbind(1)
    top, low = x.amax(dim=1), x.amin(dim=1)
    chroma = top - low
    # Masks as numbers: on a CPU a choice by bool costs several times a product.
    is_red, is_green = red.clone().eq_(top), green.clone().eq_(top)
    h = (red - green).add_(chroma, alpha=4)
    h.lerp_((blue - red).add_(chroma, alpha=2), is_green)
    h.lerp_(green - blue, is_red)
    h.div_(chroma.clamp(min=1e-12)).div_(6).add_(turn[:, None, None])
    h.sub_(h.floor()).mul_(6)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        part = (h - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(low, chroma, part, out=x[:, channel])


def _to_grey(x: Tensor) -> None:
    if x.shape[1] != 1:
        x.copy_(_luma(x).expand_as(x))


def _compose(x: Tensor, order: Tensor, factors: Tensor, colourless: Tensor) -> None:
    """Jitter and grey as one affine map of RGB a view, clipped once: the named fast mode.

    It differs from the steps where these clip, and in hue, which turns about the axis of the greys: no matrix comes
    nearer to the turn in HSV (least squares over photographs), while one in YIQ is a third further off.
    """
    n, identity = len(x), torch.eye(3, device=x.device)
    luma = torch.tensor(_LUMA, device=x.device)
    to_grey = luma.expand(3, 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=x.device) / 3**0.5
    scale = factors[:, :_HUE, None, None]
    angle = 2 * torch.pi * factors[:, _HUE, None, None]
    turn = angle.cos() * identity + angle.sin() * across + (1 - angle.cos()) / 3  # Rodrigues
    saturate = scale[:, _SATURATION] * identity + (1 - scale[:, _SATURATION]) * to_grey
    maps = torch.stack([scale[:, _BRIGHTNESS] * identity, scale[:, _CONTRAST] * identity, saturate, turn], dim=1)
    linear, shift = identity.repeat(n, 1, 1), torch.zeros(n, 3, 1, device=x.device)
    start = x.mean(dim=(2, 3))[:, :, None]
    each = torch.arange(n, device=x.device)
    for kind in order.unbind(1):
        mean = luma @ (linear @ start + shift)  # [n 1], of the grey at this point
        lift = torch.where(kind == _CONTRAST, 1 - factors[:, _CONTRAST], 0.0)[:, None] * mean
        step = maps[each, kind]
        linear, shift = step @ linear, step @ shift + lift[:, :, None]
    last = torch.where(colourless[:, None, None], to_grey, identity)
    x.copy_(torch.baddbmm(last @ shift, last @ linear, x.flatten(2)).view_as(x)).clamp_(0, 1)


def _gaussian(x: Tensor, sigma: Tensor) -> None:
    """A true Gaussian, cut at three sigma (rounded up), edges repeated. Pillow's, which DINO used, is three boxes.

    Taps are shifted sums: on a CPU half the time of a convolution, and a GPU adds in the same order.
    """
    reach = (3 * sigma).ceil()
    radius = int(reach.max())
    tap = torch.arange(radius + 1, device=x.device)
    weights = (-0.5 * (tap / sigma[:, None]) ** 2).exp() * (tap <= reach[:, None])
    weights = weights / (2 * weights.sum(dim=1, keepdim=True) - 1)  # tap 0 has weight 1 and stands alone
    weights = weights.T[:, :, None, None, None]
    for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        length = x.shape[axis]
        wide = F.pad(x, pad, mode="replicate")
        torch.mul(wide.narrow(axis, radius, length), weights[0], out=x)
        for k in range(1, radius + 1):
            x.addcmul_(wide.narrow(axis, radius - k, length), weights[k])
            x.addcmul_(wide.narrow(axis, radius + k, length), weights[k])


def _invert_above(x: Tensor, threshold: Tensor) -> None:
    above = x.clone().ge_(threshold[:, None, None, None])  # 0 or 1
    x.addcmul_(above, 1 - 2 * x)

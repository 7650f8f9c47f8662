"""Bytes to pixels: JPEG through simplejpeg with scaled decoding, everything else through Pillow, under stated limits.

What comes out of a picture file, by what is in it:

- 8 bits and fewer, palettes, CMYK: uint8. Transparency is composited on white (the colour under alpha 0 is garbage).
- 16-bit grey: uint16, as stored. Pillow cuts 48-bit colour and 16-bit grey with alpha to 8 bits, so these are uint8.
- float and 32-bit integer grey: float32, as stored; NaN or infinity is unreadable.
- The first frame of what moves; upright where EXIF gives an orientation. Colour profiles are not applied.

Limits: a file of `FILE_LIMIT` bytes, a picture of `PIXEL_LIMIT` pixels, checked in the header before anything is
allocated; decoding then takes at most 16 bytes a pixel (1.4 GB). With `short_side` the long side that comes out is at
most `ASPECT_LIMIT` times it: longer strips are shrunk as a whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch
from jaxtyping import Shaped
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from saccade.errors import Unreadable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff"))
FILE_LIMIT = 1 << 29
PIXEL_LIMIT = 89_478_485  # where Pillow begins to warn; its own error comes only at twice this
ASPECT_LIMIT = 8
_SCANS = 16  # work a progressive JPEG may ask for, in full scans of a picture at the pixel limit

# Without a handler Python prints Pillow's complaints on stderr; ours are the reasons of `Unreadable`.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    data: bytes, *, key: str = "", short_side: int | None = None, channels: int = 3, pixel_limit: int = PIXEL_LIMIT
) -> Shaped[Tensor, "1 c h w"]:
    """The upright picture as [1 C H W] over HWC memory; uint8, uint16 or float32.

    `short_side` allows shrinking: by whole factors, as long as the short side keeps that many pixels. `channels` is 3
    (grey becomes RGB) or 1 (RGB becomes grey). Raises `Unreadable` with a reason for whatever cannot be decoded.
    """
    if len(data) > FILE_LIMIT:
        raise Unreadable(key, f"file of {len(data)} bytes, the limit is {FILE_LIMIT}")
    try:
        array = _jpeg(data, short_side, channels, pixel_limit) if data[:2] == b"\xff\xd8" else None
        if array is None:
            array = _picture(data, short_side, channels, pixel_limit)
    except _Refused as refusal:
        raise Unreadable(key, str(refusal)) from None
    except MemoryError:
        raise Unreadable(key, "not enough memory to decode it") from None
    except Exception as error:  # decoders raise anything on hostile bytes: struct.error, TypeError, KeyError, ...
        raise Unreadable(key, _reason(data, error)) from None
    return torch.from_numpy(array).permute(2, 0, 1)[None]


class _Refused(Exception):
    """Ours to refuse: the message is the reason."""


def _check(width: int, height: int, pixel_limit: int) -> None:
    if width * height > pixel_limit:
        raise _Refused(f"{width}x{height} pixels, the limit is {pixel_limit}")


def _factor(short: int, short_side: int | None) -> int:
    """The largest whole factor that leaves the short side at least `short_side` pixels."""
    return 1 if short_side is None else max(1, short // short_side)


def _jpeg(data: bytes, short_side: int | None, channels: int, pixel_limit: int) -> np.ndarray | None:
    """HWC uint8, or None where simplejpeg does not want the file and Pillow should judge."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check(width, height, pixel_limit)
    if width * height > 1 << 20 and data.count(b"\xff\xda") * width * height > _SCANS * pixel_limit:
        raise _Refused("progressive JPEG with more scans than a picture needs")
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    # The transform scales cheaply by 2, 4 and 8 only; factors between are slower than decoding in full.
    factor = next(f for f in (8, 4, 2, 1) if f <= _factor(min(height, width), short_side))
    least = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
    try:
        array = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **least)
    except ValueError:
        return None
    turn = _TURNS.get(_jpeg_orientation(data))
    if turn is None and _fits(array.shape[1], array.shape[0], short_side):
        return array
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    return pixels_of(image if turn is None else image.transpose(turn), short_side, channels)


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none or it is damaged."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], (data[at + 2] << 8) | data[at + 3]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + length])
        if marker == 0xDA or length < 2:
            break
        at += 2 + length
    return 1


def _tiff_orientation(block: bytes) -> int:
    """The orientation tag of the first directory of a TIFF block."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", block, at)
            if tag == _ORIENTATION and kind == 3:
                return struct.unpack_from(order + "H", block, at + 8)[0]
    except struct.error:
        pass
    return 1


def _picture(data: bytes, short_side: int | None, channels: int, pixel_limit: int) -> np.ndarray:
    """HWC of any picture that Pillow reads, from an explicit list of formats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bombs are refused by our limit; damaged EXIF is no reason to refuse pixels
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(*image.size, pixel_limit)
            if isinstance(image, TiffImageFile):  # a tile is allocated whole, whatever the size of the picture
                _check(image.tag_v2.get(322, 1), image.tag_v2.get(323, 1), pixel_limit)
            factor = _factor(min(image.size), short_side)
            if image.format == "JPEG" and factor > 1:
                image.draft(None, (-(-image.width // factor), -(-image.height // factor)))
            with _silence() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()
            turn = _TURNS.get(_orientation(image))
            return pixels_of(image if turn is None else image.transpose(turn), short_side, channels)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """libtiff writes a line to the process's stderr for every odd tag, a thousand for a hostile file."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block raises anything
        return 1


def pixels_of(image: Image.Image, short_side: int | None, channels: int) -> np.ndarray:
    """A loaded picture to HWC: shrunk where that is allowed, composited, with the channels that are wanted."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.asarray(image).astype(np.int32))  # the mode "I" can be reduced, "I;16" cannot
        array = np.asarray(_shrink(image, short_side)).astype(np.uint16)
    elif image.mode in ("I", "F"):
        array = np.array(_shrink(image, short_side), dtype=np.float32)
        if not np.isfinite(array).all():
            raise _Refused("has NaN or infinite values")
    else:
        array = np.array(_colours(image, short_side).convert("L" if channels == 1 else "RGB"))
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] < channels:
        array = np.repeat(array, channels, axis=2)
    return np.ascontiguousarray(array)


def _colours(image: Image.Image, short_side: int | None) -> Image.Image:
    """RGB or grey of any 8-bit picture, transparency composited on white, shrunk where that is allowed."""
    if image.has_transparency_data:
        image = _shrink(image.convert("RGBA"), short_side)
        paper = Image.new("RGB", image.size, (255, 255, 255))
        paper.paste(image, mask=image.getchannel("A"))
        return paper
    return _shrink(
        image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB"), short_side
    )


def _fits(width: int, height: int, short_side: int | None) -> bool:
    """Whether nothing needs to be shrunk."""
    if short_side is None:
        return True
    return min(width, height) < 2 * short_side and max(width, height) <= ASPECT_LIMIT * short_side


def _shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    """Shrink by a whole factor (the mean of each block), and strips further until they keep `ASPECT_LIMIT`."""
    if _fits(*image.size, short_side):
        return image
    assert short_side is not None
    factor = _factor(min(image.size), short_side)
    if factor > 1:
        image = image.reduce(factor)
    scale = ASPECT_LIMIT * short_side / max(image.size)
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    return image


_TELLTALES = (
    (rb"version https://git-lfs", "a git-LFS pointer, not the picture: run `git lfs pull`"),
    (rb"\s*<(!doctype|html|head|body)", "an HTML page, not a picture"),
    (rb"\s*<(\?xml|svg)", "XML or SVG, which is not read"),
    (rb"\0\x05\x16\x07", "a macOS resource fork, not a picture"),
    (rb"P[1-7]\s", "a PPM picture, which is not read"),
    (rb"....ftyp", "an AVIF, HEIF or MP4 file, which is not read"),
    (rb"\0\0\0\x0cjP  ", "a JPEG 2000 picture, which is not read"),
    (rb"\0\0\x01\0", "an icon, which is not read"),
    (rb"\x01\xda", "an SGI picture, which is not read"),
    (rb"[\s\x20-\x7e]{32}", "text, not a picture"),
)
_STARTS = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)


def _reason(data: bytes, error: Exception) -> str:
    """Why a picture cannot be read, in words that help."""
    if not data:
        return "empty file"
    if isinstance(error, Image.DecompressionBombError):
        return re.sub(r"^Image size \((\d+) pixels\).*", r"\1 pixels, far over the limit", str(error), flags=re.DOTALL)
    name = next((name for start, name in _STARTS if data.startswith(start)), None)
    if isinstance(error, Image.UnidentifiedImageError):
        if name == "TIFF":
            return "a damaged TIFF, or one that Pillow cannot read (colour in floats, more than 4 channels)"
        told = (reason for pattern, reason in _TELLTALES if re.match(pattern, data[:64], re.DOTALL | re.IGNORECASE))
        return (
            f"damaged or cut {name} header" if name else next(told, f"none of the formats read: {', '.join(FORMATS)}")
        )
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or cut {name or 'picture'}: {text}"

"""Bytes to pixels: every mode and format, the limits, and the whole hostile pack."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from saccade.decode import ASPECT_LIMIT, decode
from saccade.errors import Unreadable

HOSTILE = Path("/work/shared/data/hostile_images.tar")


def photo(height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth picture that no symmetry maps to itself."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * x * y / (width * height)], -1).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def hwc(data: bytes, **options) -> np.ndarray:
    pixels = decode(data, **options)
    assert pixels.ndim == 4 and pixels.shape[0] == 1
    assert pixels.permute(0, 2, 3, 1).is_contiguous()
    return pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_formats(format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(format, {})
    error = np.abs(hwc(encode(photo(), format, **options)).astype(int) - photo()).max()
    assert error <= {"GIF": 40, "JPEG": 6}.get(format, 0)  # GIF: the palette; JPEG: the transform


def test_jpeg_is_the_decoder_that_everybody_has():
    data = encode(photo(), "JPEG", quality=90)
    assert np.abs(hwc(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_become_the_channels_asked_for(mode, channels):
    image = Image.fromarray(photo()).convert(mode)
    out = hwc(encode(image, "TIFF"), channels=channels)
    expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(60, 80, channels)
    assert out.dtype == np.uint8
    assert np.abs(out.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_jpegs(channels):
    for source in ("L", "RGB", "CMYK"):
        image = Image.fromarray(photo()).convert(source)
        out = hwc(encode(image, "JPEG", quality=95), channels=channels)
        expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(60, 80, channels)
        assert np.abs(out.astype(int) - expected).mean() < 3, source


def test_transparency_is_composited_on_white():
    rgba = np.dstack([photo(), np.zeros((60, 80), np.uint8)])
    assert (hwc(encode(rgba)) == 255).all(), "the colour hidden under alpha 0 shows"
    half = np.dstack([np.zeros((60, 80, 3), np.uint8), np.full((60, 80), 128, np.uint8)])
    for data in (encode(half), encode(Image.fromarray(half).convert("LA"))):
        assert np.abs(hwc(data).astype(int) - 127).max() <= 1
    palette = Image.fromarray(photo()).quantize(8)
    hidden = np.asarray(palette) == 3
    out = hwc(encode(palette, transparency=3))
    assert (out[hidden] == 255).all() and (out[~hidden] == np.asarray(palette.convert("RGB"))[~hidden]).all()
    colour_key = hwc(encode(Image.new("RGB", (4, 4), (10, 20, 30)), transparency=(10, 20, 30)))
    assert (colour_key == 255).all()


def test_transparency_does_not_bleed_when_shrunk():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, ::2] = (0, 200, 0, 255)  # green columns between transparent black ones
    out = hwc(encode(rgba), short_side=16)
    assert out.shape == (16, 16, 3)
    assert np.abs(out.astype(int) - (127, 227, 127)).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_and_floats_stay_what_they_are(channels):
    grey = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    for data in (encode(grey), encode(grey, "TIFF"), encode(Image.fromarray(grey.astype(">u2")), "TIFF")):
        out = hwc(data, channels=channels)
        assert out.dtype == np.uint16 and (out == grey[..., None]).all()
    real = grey.astype(np.float32) / 7 - 100
    out = hwc(encode(real, "TIFF"), channels=channels)
    assert out.dtype == np.float32 and (out == real[..., None]).all()
    real[3, 3] = np.nan
    with pytest.raises(Unreadable, match="NaN"):
        decode(encode(real, "TIFF"))


def test_sixteen_bits_are_shrunk_by_their_mean():
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    mean = grey.reshape(16, 4, 16, 4).mean((1, 3))
    assert np.abs(hwc(encode(grey), short_side=16, channels=1)[..., 0] - mean).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation(orientation, format):
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = np.ascontiguousarray(undo[orientation](photo()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    if format == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        options["tiffinfo"] = tags
    else:
        options["exif"] = exif
    out = hwc(encode(stored, format, **options))
    assert out.shape == (60, 80, 3), orientation
    assert np.abs(out.astype(int) - photo()).max() <= (6 if format == "JPEG" else 0)


def test_damaged_exif_is_no_reason_to_refuse():
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0")
    assert hwc(data).shape == (60, 80, 3)


def test_the_first_frame_of_what_moves():
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (10, 200)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(hwc(data).astype(int) - 10).max() <= 2, format


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (1000, 3000), (431, 429), (64, 64)])
@pytest.mark.parametrize("short_side", [60, 100, 429])
def test_short_side(format, height, width, short_side):
    out = hwc(encode(photo(height, width), format), short_side=short_side)
    assert min(out.shape[:2]) >= min(short_side, height, width)
    assert min(out.shape[:2]) < 2 * short_side
    assert abs(np.log(out.shape[1] / out.shape[0]) - np.log(width / height)) < 0.02
    rows = np.linspace(0, height - 1, out.shape[0]).astype(int)
    columns = np.linspace(0, width - 1, out.shape[1]).astype(int)
    assert np.abs(out - photo(height, width)[rows][:, columns].astype(int)).mean() < 6, "not the same picture"


def test_a_jpeg_far_too_large_is_shrunk_beyond_the_transform():
    out = hwc(encode(photo(1600, 1600), "JPEG"), short_side=20)
    assert 20 <= min(out.shape[:2]) < 40


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(1, 10_000), (10_000, 1), (3, 4000), (100, 9000)])
def test_strips_do_not_blow_the_canvas(format, height, width):
    out = hwc(encode(photo(height, width), format), short_side=64)
    assert max(out.shape[:2]) <= ASPECT_LIMIT * 64
    assert (out.shape[0] > out.shape[1]) == (height > width)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_the_pixel_limit_is_ours(format):
    data = encode(photo(100, 100), format)
    assert decode(data, pixel_limit=10_000).shape[-2:] == (100, 100)
    with pytest.raises(Unreadable, match="100x100 pixels, the limit is 9999") as caught:
        decode(data, key="a.x", pixel_limit=9_999)
    assert caught.value.key == "a.x"


def test_a_tile_larger_than_the_limit_is_refused():
    tile = zlib.compress(bytes(64))
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 16_000, 323: 16_000, 324: 200, 325: len(tile)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)).ljust(200, b"\0") + tile
    with pytest.raises(Unreadable, match="16000x16000"):
        decode(data)


def test_a_jpeg_of_endless_scans_is_refused():
    data = encode(photo(3000, 3000), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(Unreadable, match="scans"):
        decode(data[:-2] + scan * 2000 + data[-2:])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"just some words that somebody saved as a picture", "text"),
        (b"\xff\xd8\xff", "damaged or cut JPEG"),
        (b"P6 2 2 255 " + bytes(12), "PPM"),
        (bytes(300), "none of the formats"),
        (encode(photo(), "JPEG")[:-500], "cut JPEG"),
        (encode(photo())[:-100], "cut PNG"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(Unreadable, match=reason):
        decode(data, key="x")


def test_random_damage_decodes_or_is_unreadable():
    draw = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encode(photo(), format), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[draw.integers(0, min(len(whole), 400), 5)] = draw.integers(0, 256, 5)
            with contextlib.suppress(Unreadable):
                assert max(decode(damaged.tobytes(), short_side=64).shape[-2:]) <= ASPECT_LIMIT * 64


# What cannot be decoded, beside what Pillow itself cannot: our limits, formats that are not on our list, NaN.
REFUSED = {
    "bomb/bomb_13000x13000_rgb_warning_only.png": "the limit",
    "modes/float32_nan.tif": "NaN",
    "formats/rgb.ppm": "PPM", "formats/rgb.tga": "none of the formats", "formats/rgb.jp2": "JPEG 2000",
    "formats/icon.ico": "icon", "formats/rgb.pcx": "none of the formats", "formats/rgb.avif": "AVIF",
    "broken/png_bad_crc.png": "damaged or cut PNG", "collected/broken_data_stream.png": "damaged or cut PNG",
}  # fmt: skip

CHILD = """
import json, resource, sys, tarfile, time
from saccade.decode import decode
from saccade.errors import Unreadable
for member in tarfile.open(sys.argv[1]):
    if not member.isfile() or member.name.endswith("manifest.jsonl"):
        continue
    data = tarfile.open(sys.argv[1]).extractfile(member).read()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        pixels = decode(data, key=member.name, short_side=429)
        outcome = {"shape": list(pixels.shape), "dtype": str(pixels.dtype)}
    except Unreadable as error:
        outcome = {"reason": error.reason}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    outcome |= {"file": member.name, "seconds": time.perf_counter() - start, "peak": peak}
    print(json.dumps(outcome), flush=True)
"""


@pytest.mark.skipif(not HOSTILE.exists(), reason="needs the hostile pack of the shared data")
def test_the_hostile_pack():
    """Each file decodes or is set aside with its reason; none takes a second or 200 MB more than the process had."""
    with tarfile.open(HOSTILE) as pack:
        name = next(name for name in pack.getnames() if name.endswith("manifest.jsonl"))
        lines = pack.extractfile(name).read().decode().splitlines()
    manifest = {record["file"]: record for record in map(json.loads, lines)}
    start = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(HOSTILE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stderr == "", "a library wrote to stderr"
    assert time.monotonic() - start < 60
    outcomes = {record["file"].removeprefix("./"): record for record in map(json.loads, child.stdout.splitlines())}
    assert outcomes.keys() == manifest.keys() and len(outcomes) == 110
    for file, outcome in outcomes.items():
        record = manifest[file]
        assert outcome["seconds"] < 2 and outcome["peak"] < 200_000, outcome
        if file in REFUSED:
            assert REFUSED[file] in outcome.get("reason", ""), outcome
        elif record["pillow"] == "ok":
            assert "shape" in outcome, outcome
            width, height = record["size"]
            if record.get("exif_orientation", 1) >= 5:
                width, height = height, width
            if file != "collected/g4_orientation_5.tif" and max(width, height) <= 429 * ASPECT_LIMIT and height < 858:
                assert outcome["shape"][-2:] == [height, width], outcome
            assert max(outcome["shape"][-2:]) <= 429 * ASPECT_LIMIT
        else:
            assert len(outcome.get("reason", "")) > 5, outcome


@pytest.mark.skipif(not HOSTILE.exists(), reason="needs the hostile pack of the shared data")
def test_hostile_orientations_show_one_picture():
    with tarfile.open(HOSTILE) as pack:
        prefix = next(name for name in pack.getnames() if name.endswith("exif/orientation_1.jpg"))[:-5]
        pictures = [decode(pack.extractfile(f"{prefix}{n}.jpg").read()).float() for n in range(1, 9)]
    for picture in pictures[1:]:
        assert (picture - pictures[0]).abs().mean() < 4


def test_decoding_needs_no_more_than_it_states():
    """16 bytes a pixel: a transparent PNG at a limit of 16 megapixels, in a process with that much room and no more."""
    code = """
import io, resource
import numpy as np
from PIL import Image
from saccade.decode import decode
file = io.BytesIO(); Image.new("RGBA", (4000, 4000)).save(file, "PNG", compress_level=1); data = file.getvalue()
decode(data, short_side=100, pixel_limit=10**9)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 4000 * 4000, used + 16 * 4000 * 4000))
print(tuple(decode(data).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "(1, 3, 4000, 4000)", done.stderr[-500:]


def test_decoding_is_the_same_twice():
    data = encode(photo(300, 400), "JPEG")
    assert torch.equal(decode(data, short_side=100), decode(data, short_side=100))

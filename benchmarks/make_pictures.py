"""Make the pictures that ship inside the package (`src/saccade/pictures/`): scraps of printed pages, by writing system.

A picture is a 48-pixel scrap of a page of printed words; its class is the writing system. Typefaces, words and pages
are never on both sides: train is set in sans-serif faces, test in serif ones (Naskh for Arabic), with other words.

    apt-get install fonts-noto-core          # 20201225-1, SIL Open Font License 1.1
    pip install babel==2.18.0 pillow numpy   # words: Unicode CLDR (Unicode License v3); a Pillow that has raqm
    python benchmarks/make_pictures.py --out src/saccade/pictures

The same versions give the same tars, byte for byte; the README beside them holds their hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from babel import Locale
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

SIDE = 48  # pixels of a picture
PAGE = 300  # pixels of a page, after the margin that hides the turned corners is cut off
MARGIN = 60
QUALITY = 75  # of the WebP
TRAIN_PAGES, TRAIN_SCRAPS = 84, 3  # per class: 252 pictures
TEST_PAGES, TEST_SCRAPS = 60, 1  # one scrap a page, so that the test pictures are independent


@dataclass(frozen=True)
class Script:
    """A writing system: the languages whose words are set, the word in its characters' names, its two typefaces."""

    languages: tuple[str, ...]
    character: str
    train: str
    test: str


def _noto(character: str, *languages: str) -> Script:
    name = character.capitalize()
    return Script(languages, character, f"NotoSans{name}", f"NotoSerif{name}")


SCRIPTS = {
    "arabic": Script(("ar", "fa"), "ARABIC", "NotoSansArabic", "NotoNaskhArabic"),
    "devanagari": _noto("DEVANAGARI", "hi", "mr", "ne"),
    "ethiopic": _noto("ETHIOPIC", "am"),
    "georgian": _noto("GEORGIAN", "ka"),
    "greek": Script(("el",), "GREEK", "NotoSans", "NotoSerif"),
    "hebrew": _noto("HEBREW", "he"),
    "khmer": _noto("KHMER", "km"),
    "latin": Script(("de", "en", "it", "nl"), "LATIN", "NotoSans", "NotoSerif"),
    "myanmar": _noto("MYANMAR", "my"),
    "tamil": _noto("TAMIL", "ta"),
    "telugu": _noto("TELUGU", "te"),
    "thai": _noto("THAI", "th"),
}


def words(script: Script) -> list[str]:
    """The words of more than two characters in the names of countries and languages, written in this script."""
    found = set()
    for language in script.languages:
        locale = Locale.parse(language)
        for name in (*locale.territories.values(), *locale.languages.values()):
            for word in name.replace("(", " ").replace(")", " ").replace("-", " ").split():
                if len(word) > 2 and all(_belongs(character, script) for character in word):
                    found.add(word)
    return sorted(found)


def _belongs(character: str, script: Script) -> bool:
    return script.character in unicodedata.name(character, "") or unicodedata.category(character).startswith("M")


def page(draws: np.random.Generator, vocabulary: list[str], face: Path) -> np.ndarray:
    """A page [PAGE PAGE 3] in 0..1: words in one face, size, ink and paper, a little turned, unevenly lit."""
    side = PAGE + 2 * MARGIN
    size = int(draws.integers(24, 36))
    font = ImageFont.truetype(str(face), size, layout_engine=ImageFont.Layout.RAQM)
    lead = int(size * draws.uniform(1.25, 1.7))
    sheet = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(sheet)
    for y in range(-10, side, lead):
        line = " ".join(vocabulary[draws.integers(len(vocabulary))] for _ in range(8))
        pen.text((-10 - int(draws.integers(60)), y), line, fill=255, font=font)
    turned = sheet.rotate(draws.uniform(-6, 6), Image.Resampling.BICUBIC)
    ink_here = np.asarray(turned, np.float32)[MARGIN:-MARGIN, MARGIN:-MARGIN, None] / 255 * draws.uniform(0.75, 1)
    paper = draws.uniform(0.75, 1) * np.sort(draws.uniform(0.86, 1, 3))[::-1]  # never bluer than it is red: old paper
    ink = draws.uniform(0, 0.25) + draws.uniform(0, 0.15, 3)
    return (paper * (1 - ink_here) + ink * ink_here) * _light(draws)[..., None]


def _light(draws: np.random.Generator) -> np.ndarray:
    """How bright each place of the page is: a slope, and stains as wide as a few letters."""
    slope = draws.normal(size=2) * 0.12
    y, x = np.mgrid[-1 : 1 : PAGE * 1j, -1 : 1 : PAGE * 1j]
    coarse = Image.fromarray(draws.normal(0, 1, (9, 9)).astype(np.float32))
    stains = np.asarray(coarse.resize((PAGE, PAGE), Image.Resampling.BICUBIC)) * draws.uniform(0, 0.06)
    return 1 + slope[0] * y + slope[1] * x + stains


def scrap(draws: np.random.Generator, sheet: np.ndarray) -> bytes:
    """A WebP of a square cut out of the page anywhere, resized, a little blurred and noisy."""
    side = int(draws.integers(84, 104))
    top, left = draws.integers(0, PAGE - side, 2)
    cut = (sheet[top : top + side, left : left + side].clip(0, 1) * 255).astype(np.uint8)
    small = Image.fromarray(cut).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    blurred = small.filter(ImageFilter.GaussianBlur(draws.uniform(0, 0.6)))
    noisy = np.asarray(blurred, np.float32) + draws.normal(0, draws.uniform(1, 5), (SIDE, SIDE, 1))
    written = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(written, "WEBP", quality=QUALITY, method=6)
    return written.getvalue()


def write(tar: Path, members: list[tuple[str, bytes]]) -> None:
    """A plain tar of these members with nothing of the day or the machine in it."""
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    print(f"{tar.name}: {len(members)} pictures, {tar.stat().st_size} bytes, sha256 {_sha256(tar)}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(out: Path, fonts: Path, seed: int) -> None:
    """Write `train.tar` and `test.tar`. A member is `CLASS/CLASS-PAGE-SCRAP.webp`; its group is the page."""
    draws = np.random.default_rng(seed)
    train, test = [], []
    for name, script in SCRIPTS.items():
        vocabulary = words(script)
        draws.shuffle(vocabulary)
        cut = len(vocabulary) * 3 // 4
        for members, share, family, numbers, scraps in (
            (train, vocabulary[:cut], script.train, range(TRAIN_PAGES), TRAIN_SCRAPS),
            (test, vocabulary[cut:], script.test, range(TRAIN_PAGES, TRAIN_PAGES + TEST_PAGES), TEST_SCRAPS),
        ):
            for number in numbers:
                weight = "Bold" if number % 2 else "Regular"
                sheet = page(draws, share, fonts / f"{family}-{weight}.ttf")
                for piece in range(scraps):
                    members.append((f"{name}/{name}-{number:03d}-{piece}.webp", scrap(draws, sheet)))
        print(f"{name}: {cut} words for train, {len(vocabulary) - cut} for test")
    write(out / "train.tar", train)
    write(out / "test.tar", test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src" / "saccade" / "pictures")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype/noto"))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if not features.check("raqm"):
        parser.error("this Pillow has no raqm, which joins and stacks the letters of most of these scripts")
    make(chosen.out, chosen.fonts, chosen.seed)


if __name__ == "__main__":
    main()

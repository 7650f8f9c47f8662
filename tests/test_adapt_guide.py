"""docs/adapt.md: its commands run, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saccade import cli, pretrain, vit

GUIDE = Path(__file__).parents[1] / "docs" / "adapt.md"
SMALL = {"evaluate": "", "embed": "", "adapt": " --batch 8 --decoder-width 48 --decoder-depth 1 --decoder-heads 3"}


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a backbone of two blocks for the published one, and four steps."""
    monkeypatch.setitem(vit.SIZES, "nano", {"width": 48, "depth": 2, "heads": 3, "hidden": 96})
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for folder, count in (("pictures/a", 16), ("labelled/train/x", 12), ("labelled/train/y", 12),
                          ("labelled/test/x", 4), ("labelled/test/y", 4)):  # fmt: skip
        Path(folder).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 200, (32, 32, 3)) + 50 * folder.endswith("x")
            Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/{number}.png")
    shape = {"arch": "vit-nano/8", "image_size": 32, "decoder_width": 48, "decoder_depth": 1, "decoder_heads": 3}
    pretrain("pictures", recipe="mae", out="start", batch=8, steps=1, workers=0, **shape)
    commands = re.findall(r"^saccade (.+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(re.sub(r" --(steps|minutes) \d+", "", command).replace("facebook/dinov2-small", "start"))
        more = SMALL[words[0]] + (" --steps 3 --looks 3 --workers 0" if words[0] == "adapt" else "")
        assert cli.main([*words, *more.split(), "--json"]) == cli.DONE, command
        capsys.readouterr()
    assert Path("runs/mine/report.html").is_file() and Path("index").is_dir()

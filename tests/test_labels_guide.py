"""docs/labels.md: its commands run, in their order."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import cli, coverage, vit, weights

GUIDE = Path(__file__).parents[1] / "docs" / "labels.md"


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a backbone of two blocks, and twelve pictures where the guide says fifty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coverage, "SAME", 1e-6)  # to a network that never learned everything is alike
    torch.manual_seed(0)
    weights.save_backbone(Path("start"), vit.build("vit-ti/4", image_size=16, width=16, depth=2, heads=2), {})
    random = np.random.default_rng(0)
    for folder, count in (("pictures", 40), ("labelled/train/x", 8), ("labelled/train/y", 8), ("labelled/test/x", 6),
                          ("labelled/test/y", 6)):  # fmt: skip
        Path(folder).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            pixels[..., 0] = 255 * (number % 2 if folder == "pictures" else folder.endswith("x"))
            Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/{number:02}.png")
    commands = re.findall(r"^saccade (.+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["label-next", "label-next", "evaluate"]
    for command in commands:
        words = shlex.split(command.replace("facebook/dinov2-small", "start").replace("-n 50", "-n 12"))
        assert cli.main([*words, "--json"]) == cli.DONE, command
        capsys.readouterr()
        if "first.csv" in words and "--labels" not in words:
            with open("first.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            assert rows
            with open("first.csv", "w", newline="") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows({**row, "label": "xy"[int(row["key"][:2]) % 2]} for row in rows)
    scores = json.loads(Path("scores.json").read_text())
    assert list(scores["label_curve"]["fitted"]) == ["1", "2", "3", "4", "5", "6", "7", "8"]
    assert list(scores["label_curve"]["at"]) == ["16", "32"]
    assert Path("second.html").is_file() and Path("vectors").is_dir()

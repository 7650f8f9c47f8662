"""docs/finetune.md: its commands run, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade import backbone, cli, vit, weights

GUIDE = Path(__file__).parents[1] / "docs" / "finetune.md"


@pytest.mark.slow  # a dozen verbs, half a minute
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a backbone of two blocks for the published one, and one epoch."""
    monkeypatch.setitem(vit.SIZES, "nano", {"width": 32, "depth": 2, "heads": 2, "hidden": 64})
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    names = []
    for folder, count in (("pictures", 3), ("labelled/train/x", 20), ("labelled/train/y", 20),
                          ("labelled/test/x", 4), ("labelled/test/y", 4)):  # fmt: skip
        Path(folder).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 200, (32, 32, 3)) + 20 * folder.endswith("x")
            Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/{number}.png")
            names.append(f"{folder}/{number}.png,{'even' if number % 2 else 'odd;late'},{number}")
    Path("cells.csv").write_text("path,label,age\n" + "\n".join(names) + "\n")
    torch.manual_seed(0)
    weights.save_backbone("start", backbone.build("vit-nano/8", image_size=32), {"arch": "vit-nano/8", "recipe": None})
    commands = re.findall(r"^saccade (.+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 12
    for command in commands:
        words = shlex.split(re.sub(r" --epochs \d+", " --epochs 1", command).replace("facebook/dinov2-small", "start"))
        more = ["--batch", "8", "--workers", "0"] if "--mode" in words else []
        assert cli.main([*words, *more, "--json"]) == cli.DONE, (command, capsys.readouterr().out)
        capsys.readouterr()
    assert Path("exported/model.onnx").is_file() and Path("said/predictions.jsonl").is_file()

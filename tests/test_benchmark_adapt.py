"""benchmarks/gate.py and benchmarks/adapt.py, with a few runs and a few steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from saccade import pretrain, vit
from saccade.evaluate import gate as page_of_gate


def benchmark(name: str) -> ModuleType:
    place = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gate_is_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of 20 equal, jittered checkpoints, by features; and a gain is seen."""
    monkeypatch.setattr(page_of_gate, "DRAWS", 1000)
    script = benchmark("gate")
    assert script.passes(30, 0.0, seed=1) <= 4
    assert script.passes(10, 0.15, seed=1) >= 7


def test_the_study_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vit.SIZES, "nano", {"width": 48, "depth": 2, "heads": 3, "hidden": 96})
    random = np.random.default_rng(0)
    for part, count in (("train", 32), ("test", 8)):
        for number in range(count):
            place = tmp_path / "pack" / part / "xy"[number % 2] / f"P{number // 4}_{part}{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 200, (32, 32, 3)) + 50 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(place)
    decoder = {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 3}
    start, out = tmp_path / "start", tmp_path / "out"
    pretrain(str(tmp_path / "pack" / "train"), recipe="mae", out=start, arch="vit-nano/8", image_size=32, batch=8,
             steps=1, workers=0, **decoder)  # fmt: skip
    script = benchmark("adapt")
    words = [str(start), str(out), "--pack", rf"toy={tmp_path / 'pack'}@(P\d+)_", "--seeds", "0", "--batch", "8"]
    words += ["--ways", "naive,adapt", "--steps", "3", "--looks", "2", "--image-size", "32"]
    monkeypatch.setattr("sys.argv", ["adapt.py", *words])
    script.main()
    cells = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert cells.keys() == {"toy-start.json", "toy-naive-0.json", "toy-adapt-0.json"}
    assert cells["toy-adapt-0.json"]["gate"]["handed_over"] in ("start", "candidate")
    capsys.readouterr()
    script.main()
    assert not capsys.readouterr().out, "what is there is not done again"
    monkeypatch.setattr("sys.argv", ["adapt.py", "--table", str(out)])
    script.main()
    said = capsys.readouterr().out
    assert "| toy | naive | 1 |" in said and "| toy | adapt | 1 |" in said

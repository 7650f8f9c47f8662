"""Faults that are injected, against the verdicts that name them; and healthy runs, which must be called healthy.

    python benchmarks/health.py [--faults] [--healthy] [--only WORDS] [--out FILE.json]

Tiny networks on the pictures that come with the package, at 32 pixels. A fault must be named within 200 steps after
the warm-up; of 50 healthy runs at most one may be called ill at any moment. Some forty minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from saccade import convnet, heads, vit, watch
from saccade.data import Sample, Source
from saccade.errors import SaccadeError
from saccade.health import Finding
from saccade.recipes import dino, dinov2, ibot
from saccade.run import Run
from saccade.sources import open_source
from saccade.tour import PICTURES
from saccade.train import pretrain

vit.SIZES["nano"] = {"width": 64, "depth": 3, "heads": 2, "hidden": 128}
convnet.RESNETS["nano"] = {"kind": "basic", "blocks": (1, 1, 1), "widths": (16, 32, 64)}

STEPS, WARMUP, LIMIT = 240, 24, 200
SHARED: dict[str, Any] = {
    "image_size": 32, "batch": 32, "steps": STEPS, "warmup": WARMUP / STEPS, "workers": 0, "save_every": "1000",
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"arch": "vit-nano/8", "lr": 8e-3, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "dino": {"arch": "resnet-nano/8", "lr": 1e-3, "local_crops": 0, "prototypes": 256, "hidden": 128, "blur": 1.0,
             "momentum": 0.98, "first_temperature": 0.02, "teacher_temperature": 0.02},
    "simclr": {"arch": "resnet-nano/8", "lr": 8e-3, "hidden": 128, "projection": 32, "temperature": 0.2, "blur": 0.0},
}  # fmt: skip
MASKED: dict[str, Any] = {
    "arch": "vit-nano/8", "batch": 16, "local_crops": 0, "local_size": 16, "prototypes": 256, "hidden": 64,
    "head_norm": True, "blur": 0.0, "momentum": 0.98, "first_temperature": 0.02, "teacher_temperature": 0.02,
    "drop_path": 0.0, "log_every": 5,
}  # fmt: skip
SPREAD: dict[str, Any] = {**MASKED, "bottleneck": 64, "layer_scale": 0.1, "layer_decay": 1.0, "koleo_group": 8}
SMALL |= {
    "ibot": {**MASKED, "lr": 8e-3},
    "dinov2": {**SPREAD, "lr": 8e-3},
    # all stages: the anchor, the patches held to it, three times renewed, and large crops
    "dinov3": {**SPREAD, "lr": 8e-3, "local_crops": 2, "queue": 256, "anchor": 0.2, "gram": 0.5, "refresh": 0.1,
               "high": 0.95},
}  # fmt: skip
FIRST = ("mae", "dino", "simclr")
TAUGHT = ("ibot", "dinov2", "dinov3")


class Memory(Source):
    """Pictures that were decoded once."""

    def __init__(self, pictures: list[torch.Tensor]):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{index}", self._pictures[index])


class Duplicates(Memory):
    """One picture under many names."""

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{index}", self._pictures[0])


class Black(Memory):
    """Every picture is black."""

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{index}", torch.zeros_like(self._pictures[index]))


class Slow(Memory):
    """A disk that is never there in time."""

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.02)
        return super().__getitem__(index)


def uncentred(page: Any, name: str, row: int | None = None) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A centre of this recipe's stays at zero, or a row of it."""

    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        before = page.Method.after_step

        def after_step(self: Any, t: torch.Tensor) -> None:
            before(self, t)
            centre = self.get_buffer(name)
            (centre if row is None else centre[row]).zero_()

        page.Method.after_step = after_step
        try:
            yield
        finally:
            page.Method.after_step = before

    return broken


@contextlib.contextmanager
def uneven_patches() -> Iterator[None]:
    """Answers to hidden patches are a plain softmax: no Sinkhorn-Knopp."""
    before = heads.Assignments.answers

    def answers(self: Any, teacher: Any, images: Any, hide: Any, temperature: Any) -> Any:
        cls, _ = before(self, teacher, images, hide, temperature)
        head = teacher[self.last]
        return cls, (head(teacher["backbone"](images).patches[hide]) / temperature).softmax(-1)

    heads.Assignments.answers = answers  # type: ignore[method-assign]
    try:
        yield
    finally:
        heads.Assignments.answers = before  # type: ignore[method-assign]


@dataclass(frozen=True)
class Case:
    """A run, the verdict that names what is wrong with it, and words that its advice must hold."""

    name: str
    recipe: str
    verdict: str
    words: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    source: type[Memory] = Memory
    broken: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def named(self, finding: Finding) -> bool:
        """Whether this is the verdict, with what its advice must say."""
        return finding.verdict == self.verdict and self.words in (finding.advice or "")


@contextlib.contextmanager
def ended_when_named(case: Case) -> Iterator[list[int]]:
    """A run ends as soon as its fault is named; the step at which it was."""
    before, steps = watch.Watch.judge, list[int]()

    def judge(self: Any, entry: dict[str, Any]) -> None:
        before(self, entry)
        self.run.note(health=self.monitor.summary())
        if case.verdict != "healthy" and case.named(self.monitor.finding):
            steps.append(entry["step"])
            raise SaccadeError("named")

    watch.Watch.judge = judge  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        watch.Watch.judge = before  # type: ignore[method-assign]


HOT, PAPER = ({f"{name}_temperature": t for name in ("first", "teacher")} for t in (1.0, 0.04))
BARE = {"head_norm": False, "steps": 120}
FAULTS = [
    Case("teacher temperature too high", "dino", "uniform_teacher", "teacher_temperature", HOT),
    *(Case("rate too high", recipe, "diverged", "--lr", {"lr": 8.0}) for recipe in FIRST),
    Case("no centring", "dino", "constant_features", "centring", broken=uncentred(dino, "centre")),
    *(Case("duplicates", recipe, "constant_features", "the same", {"steps": 60}, Duplicates) for recipe in FIRST),
    Case("head far too wide", "dino", "uniform_teacher", "too wide", {"prototypes": 16384, **PAPER}),
    *(Case("black pictures", recipe, "constant_features", "the same", {"steps": 60}, Black) for recipe in FIRST),
    Case("slow disk", "mae", "starved", "--workers", source=Slow),
    *(Case("teacher temperature too high", recipe, "uniform_teacher", "teacher_temperature", {**HOT, "steps": 120})
      for recipe in TAUGHT),
    *(Case("rate too high", recipe, "diverged", "--lr", {"lr": 8.0, "steps": 120}) for recipe in TAUGHT),
    *(Case("duplicates", recipe, "constant_features", "the same", {"steps": 60}, Duplicates) for recipe in TAUGHT),
    Case("no centring of patches", "ibot", "constant_features", "hidden patch", BARE,
         broken=uncentred(ibot, "centres", 1)),
    Case("no centring of patches", "dinov2", "constant_features", "hidden patch", BARE | {"separate_heads": True},
         broken=uncentred(dinov2, "assign.patch.centre")),
    Case("patches not evened out", "dinov3", "constant_features", "hidden patch", BARE, broken=uneven_patches),
]  # fmt: skip


def healthy() -> list[Case]:
    """Fifty runs of three recipes that differ in seed, rate, batch and network; and fifty of those that hide."""
    cases = []
    for number in range(100):
        recipe, turn = (FIRST if number < 50 else TAUGHT)[(number - 50 * (number >= 50)) % 3], number // 3
        settings = {"seed": number, "lr": SMALL[recipe]["lr"] * (0.25, 0.5, 1.0)[turn % 3]}
        settings |= {"batch": (24, 32, 48)[turn // 3 % 3] if recipe in FIRST else (16, 24)[turn % 2]}
        if recipe == "dinov3":
            settings |= {"queue": 8 * settings["batch"]}
        if turn % 2 and recipe in ("dino", "simclr"):
            settings |= {"arch": "vit-nano/8"}
        cases.append(Case(f"healthy {number}", recipe, "healthy", "", settings))
    return cases


def run(case: Case, pictures: list[torch.Tensor], out: Path) -> dict[str, Any]:
    """What the run's monitor said: its verdicts by step, and the last one."""
    settings, began = {**SHARED, **SMALL[case.recipe], **case.settings}, time.monotonic()
    with (
        case.broken(),
        ended_when_named(case) as named,
        contextlib.suppress(SaccadeError),
    ):  # a run that diverges ends so
        pretrain(case.source(pictures), recipe=case.recipe, out=out, **settings)
    record = Run(out).record
    found = record["summary"]["health"] if "summary" in record else record["health"]
    right = not found["history"] if case.verdict == "healthy" else bool(named) and named[0] <= WARMUP + LIMIT
    return {"name": case.name, "recipe": case.recipe, "right": right, "step": named[0] if named else None,
            "seconds": round(time.monotonic() - began, 1), **found}  # fmt: skip


def main() -> None:
    """Runs the cases and prints a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", action="store_true", help="only the faults")
    parser.add_argument("--healthy", action="store_true", help="only the healthy runs")
    parser.add_argument("--only", default="", help="only cases whose name and recipe hold these words")
    parser.add_argument("--out", type=Path, help="JSON file; the runs are kept beside it")
    said = parser.parse_args()
    source = open_source(PICTURES / "train.tar", short_side=64, channels=3)
    pictures = [source[index].pixels for index in range(0, len(source), 2)]
    cases = (FAULTS if not said.healthy else []) + (healthy() if not said.faults else [])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            if said.only not in f"{case.name} {case.recipe}":
                continue
            place = said.out.with_suffix("") / str(number) if said.out else Path(folder) / str(number)
            found = run(case, [picture for picture in pictures if picture is not None], place)
            results.append(found)
            verdicts = ", ".join(f"{entry['step']} {entry['verdict']}" for entry in found["history"]) or "healthy"
            mark = "right" if found["right"] else "WRONG"
            print(f"{mark}  {case.name:30} {case.recipe:8} {found['seconds']:6} s  {verdicts}", flush=True)
            if said.out:
                said.out.write_text(json.dumps(results, indent=1) + "\n")
    wrong = sum(not found["right"] for found in results)
    print(f"{len(results) - wrong} of {len(results)} right")


if __name__ == "__main__":
    main()

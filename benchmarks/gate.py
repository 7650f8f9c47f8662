"""Is the gate honest? The best of 20 equal checkpoints, chosen on one part, is judged on another, again and again.

    python benchmarks/gate.py [--runs 60] [--gain 0.0] [--seed 0]

Synthetic features: classes a little apart, pictures of a group alike, and of each checkpoint a jitter of its own. With
--gain 0 all checkpoints are equal to the start, so nothing should be handed over; at most one run in twenty is. With a
gain (how much further apart the classes are) the line says how often a real one is seen.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from saccade.evaluate import gate, knn
from saccade.evaluate.splits import set_apart

CLASSES, GROUPS, PICTURES, WIDTH, CHECKPOINTS = 4, 60, 10, 32, 20
APART, ALIKE, JITTER = 0.45, 0.6, 0.5


def null_run(random: np.random.Generator, gain: float) -> bool:
    """Whether the best of the checkpoints passes."""
    groups = np.repeat(np.arange(GROUPS), PICTURES)
    names = [f"group {number}" for number in groups]
    labels = random.integers(CLASSES, size=len(groups))
    classes = random.standard_normal((CLASSES, WIDTH))
    seen = ALIKE * random.standard_normal((GROUPS, WIDTH))[groups] + random.standard_normal((len(groups), WIDTH))

    def features(gain: float) -> torch.Tensor:
        found = seen + (APART + gain) * classes[labels] + JITTER * random.standard_normal(seen.shape)
        return torch.from_numpy(found).float()

    judges = set_apart(names, gate.GATE, "gate")
    rest = np.flatnonzero(~judges)
    chosen = set_apart([names[row] for row in rest], gate.WATCH, "hold-out")
    learned, watched, judged = rest[~chosen], rest[chosen], np.flatnonzero(judges)

    def right(vectors: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        known = torch.from_numpy(labels[learned])
        return knn.predict(vectors[learned], known, vectors[rows], CLASSES).numpy() == labels[rows]

    start = features(0.0)
    best = max((features(gain) for _ in range(CHECKPOINTS)), key=lambda vectors: right(vectors, watched).mean())
    before, after = right(start, judged), right(best, judged)
    return bool(gate.judge(before, after, [names[row] for row in judged])["passed"])


def passes(runs: int, gain: float, seed: int) -> int:
    """How many of so many runs hand over."""
    return sum(null_run(np.random.default_rng((seed, run)), gain) for run in range(runs))


def main() -> None:
    """One JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--gain", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    asked, began = parser.parse_args(), time.process_time()
    found = passes(asked.runs, asked.gain, asked.seed)
    said = {"runs": asked.runs, "gain": asked.gain, "seed": asked.seed, "handed_over": found}
    print(json.dumps(said | {"cpu_seconds": round(time.process_time() - began, 1)}))


if __name__ == "__main__":
    main()

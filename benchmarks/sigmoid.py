"""The sigmoid loss of pairs, in tiles against the plain formula: seconds and peak memory of loss and gradient.

python benchmarks/sigmoid.py [--pairs 4096 16384] [--width 512] [--repeat 3]

Each measurement is a process of its own, whose peak memory is then that of one way; both ways take turns. One thread on
a CPU. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import pair_losses


def plain(pairs: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2303.15343, as it is written there."""
    image, text = F.normalize(pairs, dim=2).unbind(1)
    logits = image @ text.T * scale + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def measure(way: str, count: int, width: int, repeat: int) -> dict[str, float]:
    """Seconds of one loss with its gradient, and the memory that it took beyond what was there before, in MB."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    pairs = torch.randn(count, 2, width, device=device, requires_grad=True)
    scale, bias = (torch.tensor([value], device=device, requires_grad=True) for value in (10.0, -10.0))
    identity = torch.arange(count, device=device)[:, None]
    small = torch.randn(64, 2, width, device=device, requires_grad=True)
    times, loss = [], torch.zeros(())
    for number in range(repeat + 1):
        these = small if number == 0 else pairs  # the first one warms up
        before = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = before if number < 2 else held
        start = time.perf_counter()
        same = identity[: len(these)]
        loss = plain(these, scale, bias) if way == "plain" else pair_losses.sigmoid(these, scale, bias, same)[0]
        torch.autograd.grad(loss, (these, scale, bias))
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"loss": loss.item(), "seconds": min(times[1:]), "megabytes": (peak - held) / 1e6}


def main() -> None:
    """Both ways in turn, at each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=["plain", "tiles"], help="one measurement, in this process")
    arguments = parser.parse_args()
    if arguments.way:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.way, arguments.pairs[0], arguments.width, arguments.repeat)))
        return
    for count in arguments.pairs:
        found: dict[str, list[dict[str, float]]] = {"plain": [], "tiles": []}
        for way in ("plain", "tiles", "tiles", "plain"):
            command = [sys.executable, __file__, "--way", way, "--pairs", str(count), "--width", str(arguments.width)]
            said = subprocess.run(
                [*command, "--repeat", str(arguments.repeat)], capture_output=True, text=True, check=True
            )
            found[way].append(json.loads(said.stdout))
        line: dict[str, object] = {"pairs": count, "width": arguments.width}
        for way, runs in found.items():
            middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            line[way] = {name: round(value, 4) for name, value in middle.items()}
        ratio = statistics.median(run["seconds"] for run in found["plain"])
        line["times faster"] = round(ratio / statistics.median(run["seconds"] for run in found["tiles"]), 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

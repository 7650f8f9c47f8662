"""Pictures to class tokens: images/s beside transformers, timm and OpenVINO, the same ViT-S/16 of 224 px in float32.

    python benchmarks/embed.py [--family dino dinov3] [--batch 16] [--threads 1] [--rounds 9] [--int8]

An environment of its own holds torch, transformers, timm with its torchvision, openvino and what saccade needs (for
`--int8` also onnxruntime, onnx and onnxscript); saccade is found by PYTHONPATH=src, and a contender that is not
installed is left out.

transformers' model is made with random weights and saved by itself; saccade loads that folder as any published
checkpoint, and OpenVINO converts the model: the three must say the same. transformers attends by SDPA, timm is compiled
(it has random weights of its own), OpenVINO is told float32 (it would take bfloat16 where a CPU has it) and gets a
share of the batch for each thread, saccade runs as `saccade embed` does and gets uint8; the others get floats that are
normalised already. int8: what `saccade.export(to="onnx")` writes of the same model and `saccade.onnx.matrices` makes of
that in each of its ways, in onnxruntime, from floats. Random weights have no neighbours to keep, so the gate is not
asked here; which of the ways it lets pass with real weights is in docs/log.md.

The contenders take turns within every round, so that what else the machine does hits all alike. A ratio is the median
over rounds of their time to ours. Seconds are of the CPU with one thread, else on the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from saccade.data import keep_memory
from saccade.embed import examining

Step = Callable[[], Any]
SIDE, WIDTH, HEADS, HIDDEN = 224, 384, 6, 1536


def transformers_model(family: str) -> nn.Module:
    """ViT-S/16 as the family was released, with random weights."""
    import transformers

    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN, "image_size": SIDE}
    if family == "dino":
        config, kind = transformers.ViTConfig(**shape, layer_norm_eps=1e-6), transformers.ViTModel
        return kind(config, add_pooling_layer=False).eval()
    config = transformers.DINOv3ViTConfig(**shape, num_register_tokens=4)
    return transformers.DINOv3ViTModel(config).eval()


TOLERANCE = {"dino": 1e-4, "dinov3": 1e-3}  # transformers' angles of RoPE are rounded otherwise
TIMM = {"dino": "vit_small_patch16_224", "dinov3": "vit_small_patch16_dinov3"}


class ClassToken(nn.Module):
    """What every contender is asked for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).last_hidden_state[:, 0]


def openvino_step(model: nn.Module, images: Tensor, threads: int) -> Step:
    import openvino

    converted = openvino.convert_model(ClassToken(model), example_input=images)
    share = len(images) // threads
    converted.reshape([share, *images.shape[1:]])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(threads)]
    parts = [part.numpy() for part in images.split(share)]

    def step() -> Tensor:
        for request, part in zip(requests, parts, strict=True):
            request.start_async([part])
        for request in requests:
            request.wait()
        return torch.cat([torch.from_numpy(request.get_output_tensor().data) for request in requests])

    return step


def int8_steps(encoder: Any, pictures: Tensor, folder: Path) -> dict[str, Step]:
    """Every way to int8, calibrated on noise: the values do not matter to the speed."""
    from saccade.onnx.files import opened, session
    from saccade.onnx.int8 import prepared
    from saccade.onnx.matrices import look, matrices, quantise_matrices, schemes

    saccade.export(encoder, to="onnx", out=folder)
    graph_file = prepared(folder / "model.onnx", folder)
    found = matrices(opened(graph_file).graph, encoder.backbone.config)
    seen = look(graph_file, found, [pictures])
    ready = (pictures.float() / 255).numpy()
    steps: dict[str, Step] = {}
    for name, chosen in zip(("int8", "int8 from 1/4 on", "int8 from 1/2 on"), schemes(found).values(), strict=True):
        file = folder / "int8.onnx"
        quantise_matrices(graph_file, file, chosen, seen)
        steps[name] = functools.partial(_embedding, session(file), ready)
    return steps


def _embedding(run: Any, images: Any) -> Any:
    return run.run(["embedding"], {"images": images})[0]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def contenders(family: str, batch: int, threads: int, int8: bool, stack: contextlib.ExitStack) -> dict[str, Step]:
    """One step each, all of them warm; those that can be compared are."""
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)
    model = transformers_model(family)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"{family}-vits16"
        model.save_pretrained(folder)
        encoder = saccade.load(folder)
        quantised = int8_steps(encoder, pictures, Path(place) / "onnx") if int8 else {}
    images = encoder.backbone.normalise(pictures)
    look = stack.enter_context(examining(encoder))
    ready: dict[str, Step] = {
        "saccade": lambda: look(pictures, tokens="cls").cls,
        "transformers sdpa": lambda: model(images).last_hidden_state[:, 0],
    }
    if installed("timm"):
        import timm

        other = timm.create_model(TIMM[family], num_classes=0).eval()
        compiled = torch.compile(other)
        ready["timm compiled"] = lambda: compiled(images)
    if installed("openvino"):
        ready["openvino f32"] = openvino_step(model, images, threads)
    ready |= quantised
    ours = ready["saccade"]()
    for who, step in ready.items():
        said = torch.as_tensor(step())
        if who in ("transformers sdpa", "openvino f32"):
            difference = float((said - ours).abs().max())
            assert difference < TOLERANCE[family], f"{who} differs by {difference}"
    return ready


def seconds(step: Step, threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def measure(title: str, ready: dict[str, Step], batch: int, threads: int, rounds: int) -> None:
    times: dict[str, list[float]] = {who: [] for who in ready}
    for turn in range(rounds):
        for who in list(ready) if turn % 2 else list(reversed(ready)):
            times[who].append(seconds(ready[who], threads))
    print(f"\n{title}, batch {batch}, threads {threads}, {rounds} rounds")
    for who, taken in times.items():
        ratios = {
            other: statistics.median(b / a for a, b in zip(taken, times[other], strict=True))
            for other in ("saccade", "transformers sdpa")
        }
        ours, theirs = 1 / ratios["saccade"], ratios["transformers sdpa"]
        rate = batch / statistics.median(taken)
        print(f"  {who:18s} {rate:7.1f} images/s   saccade is {ours:5.2f}x   {theirs:5.2f}x transformers", flush=True)


def machine() -> str:
    """The processor, and the versions of all that takes part."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    names = [name for name in ("torch", "transformers", "timm", "openvino", "onnxruntime") if installed(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=sorted(TIMM), default=sorted(TIMM))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--int8", action="store_true", help="int8 in onnxruntime too, written in passing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()  # `saccade embed` does, and it helps all
    print(machine())
    for family in arguments.family:
        with contextlib.ExitStack() as stack, torch.inference_mode():
            ready = contenders(family, arguments.batch, arguments.threads, arguments.int8, stack)
            measure(f"{family} ViT-S/16 {SIDE}", ready, arguments.batch, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()

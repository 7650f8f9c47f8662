"""One MAE training step beside its peers': forward, backward and AdamW on ready pictures, the same geometry and work.

    python benchmarks/step.py CHECKOUT [--rounds 7] [--only s16] [--device cpu] [--compile]

CHECKOUT is a clone of github.com/facebookresearch/mae. An environment of its own holds torch with the torchvision that
fits, timm, lightly, transformers and what saccade needs; saccade is found by PYTHONPATH=src. The contenders take turns
within every round, so that what else the machine does hits all alike; the ratio is the median over rounds of theirs to
ours. Each peer has the optimizer of its own script: AdamW as torch makes it (facebookresearch/mae, lightly) or fused
(transformers' Trainer). Ours normalises the pictures inside the step; the peers get them normalised. On a GPU all run
under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import optim, vit
from saccade.draws import Draws
from saccade.recipes import mae

LR, BETAS, DECAY = 1.5e-4, (0.9, 0.95), 0.05


@dataclass(frozen=True)
class Case:
    """A geometry and a batch."""

    size: str
    patch: int
    image_size: int
    batch: int
    decoder: tuple[int, int, int]  # width, depth, heads

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2


CASES = {
    "s16": Case("s", 16, 224, 16, (512, 8, 16)),  # the paper's decoder
    "ti4": Case("ti", 4, 32, 128, (192, 4, 6)),  # the recipe's small_pictures
}
Step = Callable[[], Tensor]


def two_groups(model: nn.Module) -> list[dict]:
    """Decay on matrices only, as every one of the scripts has it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    return [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": DECAY},
    ]


def ours(case: Case, images: Tensor, compiled: bool) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    width, depth, heads = case.decoder
    config = mae.Config(
        arch=f"vit-{case.size}/{case.patch}",
        image_size=case.image_size,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
    )
    backbone = vit.build(config.arch, image_size=case.image_size, **config.backbone())
    method = mae.Method(config, backbone, {}).to(images.device)
    groups = optim.default_groups(method, backbone, DECAY, 1.0)
    optimizer = optim.AdamW(groups, LR, BETAS, None)
    optimizer.set(groups, 1.0, DECAY)
    t = torch.zeros((), device=images.device)
    rows = torch.arange(len(images), device=images.device)
    forward = torch.compile(method) if compiled else method

    def loss() -> Tensor:
        order = Draws(0, 0, rows, rows, rows).sample("mask").order(case.patches)
        return forward({"images": images, "order": order}, t)[0]

    return method, optimizer.optimizer, loss


def facebookresearch(case: Case, images: Tensor, compiled: bool) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    import models_mae
    from timm.models.vision_transformer import Block

    models_mae.Block = lambda *values, qk_scale, **settings: Block(*values, **settings)  # written for timm 0.3.2
    size, (width, depth, heads) = vit.SIZES[case.size], case.decoder
    model = models_mae.MaskedAutoencoderViT(
        img_size=case.image_size,
        patch_size=case.patch,
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    ).to(images.device)
    forward = torch.compile(model) if compiled else model
    return model, torch.optim.AdamW(two_groups(model), LR, BETAS), lambda: forward(images, 0.75)[0]


def transformers(case: Case, images: Tensor, compiled: bool) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size, (width, depth, heads) = vit.SIZES[case.size], case.decoder
    config = ViTMAEConfig(
        hidden_size=size["width"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["heads"],
        intermediate_size=size["hidden"],
        image_size=case.image_size,
        patch_size=case.patch,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    model = ViTMAEForPreTraining(config).to(images.device).train()
    forward = torch.compile(model) if compiled else model
    return model, torch.optim.AdamW(two_groups(model), LR, BETAS, fused=True), lambda: forward(images).loss


def lightly(case: Case, images: Tensor, compiled: bool) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """Its example predicts hidden patches only, of pixels that are not normalised by patch: a little less work."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    size, (width, depth, heads) = vit.SIZES[case.size], case.decoder
    encoder = VisionTransformer(
        img_size=case.image_size,
        patch_size=case.patch,
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        num_classes=0,
    )
    backbone = MaskedVisionTransformerTIMM(vit=encoder)
    decoder = MAEDecoderTIMM(case.patches, case.patch, 3, size["width"], width, depth, heads)
    model = nn.ModuleDict({"backbone": backbone, "decoder": decoder}).to(images.device)

    def forward(images: Tensor) -> Tensor:
        length = case.patches + 1
        keep, hidden = utils.random_token_mask((len(images), length), mask_ratio=0.75, device=images.device)
        seen = decoder.embed(backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), length))
        tokens = decoder.decode(utils.set_at_index(tokens, keep, seen.type_as(tokens)))
        prediction = decoder.predict(utils.get_at_index(tokens, hidden))
        return F.mse_loss(prediction, utils.get_at_index(utils.patchify(images, case.patch), hidden - 1))

    run = torch.compile(forward) if compiled else forward
    return model, torch.optim.AdamW(two_groups(model), LR, BETAS), lambda: run(images)


CONTENDERS = {
    "saccade": ours,
    "facebookresearch/mae": facebookresearch,
    "transformers": transformers,
    "lightly": lightly,
}


def seconds(optimizer: torch.optim.Optimizer, loss: Step, steps: int, device: str) -> float:
    """The time of one step, over a few of them."""
    synchronise = torch.cuda.synchronize if device == "cuda" else contextlib.nullcontext
    synchronise()
    start = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronise()
    return (time.perf_counter() - start) / steps


def measure(name: str, case: Case, rounds: int, device: str, compiled: bool) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(case.batch, 3, case.image_size, case.image_size, device=device)
    mean, std = torch.tensor(vit.IMAGENET_MEAN, device=device), torch.tensor(vit.IMAGENET_STD, device=device)
    normalised = (pictures - mean[:, None, None]) / std[:, None, None]
    ready = {
        who: make(case, pictures if who == "saccade" else normalised, compiled) for who, make in CONTENDERS.items()
    }
    times: dict[str, list[float]] = {who: [] for who in ready}
    one = max(seconds(optimizer, loss, 2, device) for _, optimizer, loss in ready.values())  # warm-up
    steps = max(1, round(1.0 / one))
    for turn in range(rounds):
        order = list(ready) if turn % 2 else list(reversed(ready))
        for who in order:
            _, optimizer, loss = ready[who]
            times[who].append(seconds(optimizer, loss, steps, device))
    print(f"\n{name}: vit-{case.size}/{case.patch}, {case.image_size} px, batch {case.batch}, {rounds} rounds")
    for who, (model, _, _) in ready.items():
        median = statistics.median(times[who])
        ratio = statistics.median(theirs / own for theirs, own in zip(times[who], times["saccade"], strict=True))
        size = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        rate = case.batch / median
        print(f"  {who:22s} {median * 1e3:8.1f} ms {rate:8.1f} images/s {ratio:6.2f}x  {size:.2f} M", flush=True)


def processor() -> str:
    """The CPU's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)

    import lightly as lightly_package
    import numpy
    import timm
    import transformers as transformers_package

    numpy.float = float  # facebookresearch/mae was written for numpy 1.19
    sys.path.insert(0, arguments.checkout)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    print(
        f"{machine}, {torch.get_num_threads()} threads, {platform.python_implementation()} {platform.python_version()}"
    )
    packages = (torch, timm, lightly_package, transformers_package)
    print(", ".join(f"{package.__name__} {package.__version__}" for package in packages))
    for name, case in CASES.items():
        if arguments.only in (None, name):
            measure(
                name,
                replace(case, batch=arguments.batch or case.batch),
                arguments.rounds,
                arguments.device,
                arguments.compile,
            )


if __name__ == "__main__":
    main()

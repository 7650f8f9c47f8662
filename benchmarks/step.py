"""One training step beside its peers': forward, backward, optimizer on ready pictures, the same geometry and work.

    python benchmarks/step.py CHECKOUT [--recipe mae] [--only s16] [--rounds 7] [--device cpu] [--compile]
    python benchmarks/step.py CHECKOUT --recipe dino [--batch 8]
    python benchmarks/step.py --recipe dinov2 [--batch 4] [--drop-path 0.3] [--threads 1]

CHECKOUT is a clone of github.com/facebookresearch/mae, or of github.com/facebookresearch/dino. An environment of its
own holds torch with the torchvision that fits, timm, lightly, for MAE transformers, and what saccade needs; saccade is
found by PYTHONPATH=src. The contenders take turns within every round, so that what else the machine does hits all
alike; the ratio is the median over rounds of theirs to ours. Seconds are of the CPU with one thread, else on the clock.
On a GPU all run under bfloat16 autocast. Ours normalises the pictures inside the step; the peers get them normalised.

MAE: each peer has the optimizer of its own script: AdamW as torch makes it (facebookresearch/mae, lightly) or fused
(transformers' Trainer).

DINO: ViT-S/16, two crops of 224 and eight of 96, 65536 prototypes, stochastic depth 0.1 in every student. Ours is the
step that `saccade pretrain` takes. facebookresearch/dino: its MultiCropWrapper, DINOHead, DINOLoss, clipping of each
tensor, teacher update, check that the loss is finite and AdamW, without DDP. lightly: its example, which forwards each
view by itself and clips nothing, with the backbone that it names for ViTs (facebookresearch/dino's), the same head, and
AdamW instead of Adam.

DINOv2: the same crops and prototypes, one head for class token and patches, centring, KoLeo over the batch, and the
same masks, made beforehand, on half of the large crops. Ours is again the step that `saccade pretrain` takes. lightly:
its example, with timm's ViT-S/16, which computes the branches that stochastic depth then leaves out, and clips nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import distributed, masking, optim, recipe, vit
from saccade.draws import Draws
from saccade.model import Model
from saccade.recipes import dino, dinov2, mae
from saccade.settings import PretrainArguments

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
Step = Callable[[], object]
Contender = tuple[nn.Module, Step]


def two_groups(model: nn.Module) -> list[dict]:
    """Decay on matrices only, as every one of the scripts has it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    return [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": DECAY},
    ]


def plain_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], device: torch.device) -> Step:
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(case: Case, images: Tensor, compiled: bool) -> Contender:
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

    return method, plain_step(optimizer.optimizer, loss, images.device)


def facebookresearch(case: Case, images: Tensor, compiled: bool) -> Contender:
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
    optimizer = torch.optim.AdamW(two_groups(model), LR, BETAS)
    return model, plain_step(optimizer, lambda: forward(images, 0.75)[0], images.device)


def transformers(case: Case, images: Tensor, compiled: bool) -> Contender:
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
    optimizer = torch.optim.AdamW(two_groups(model), LR, BETAS, fused=True)
    return model, plain_step(optimizer, lambda: forward(images).loss, images.device)


def lightly(case: Case, images: Tensor, compiled: bool) -> Contender:
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
    return model, plain_step(torch.optim.AdamW(two_groups(model), LR, BETAS), lambda: run(images), images.device)


CONTENDERS = {
    "saccade": ours,
    "facebookresearch/mae": facebookresearch,
    "transformers": transformers,
    "lightly": lightly,
}

GLOBALS, LOCALS, SMALL, PROTOTYPES, DROP = 2, 8, 96, 65536, 0.1
DINO_LR, DINO_DECAY, MOMENTUM, CLIP = 5e-4 / 32, 0.04, 0.996, 3.0


def dino_ours(crops: list[Tensor], compiled: bool) -> Contender:
    """Half way through training, where the prototypes move, by the step of `saccade pretrain`."""
    batch = len(crops[0])
    config = dino.Config(batch=batch, prototypes=PROTOTYPES, drop_path=DROP, local_size=SMALL, local_crops=LOCALS)
    arguments = PretrainArguments(data=("none",), recipe="dino", out="none", compile=compiled)
    model = Model(recipe.find("dino"), config, arguments, distributed.Ranks(0, 1, crops[0].device))
    model.method.train()
    rows = torch.arange(batch, device=crops[0].device)
    large, small = torch.cat(crops[:GLOBALS]), torch.cat(crops[GLOBALS:])

    def step() -> None:
        drop = Draws(0, 0, rows, rows, rows).step("drop").bits(len(crops)).T.flatten()
        model.step(iter([{"globals": large, "locals": small, "drop": drop}]), 0.5)

    return model.method, step


def dino_network() -> tuple[nn.Module, nn.Module]:
    """facebookresearch/dino's ViT-S/16, as a student and as its teacher."""
    import vision_transformer

    return vision_transformer.vit_small(16, drop_path_rate=DROP), vision_transformer.vit_small(16)


def dino_facebookresearch(crops: list[Tensor], compiled: bool) -> Contender:
    import main_dino
    import utils

    device = crops[0].device
    (student, teacher), epochs = dino_network(), 100
    student = utils.MultiCropWrapper(student, main_dino.DINOHead(student.embed_dim, PROTOTYPES)).to(device)
    teacher = utils.MultiCropWrapper(teacher, main_dino.DINOHead(teacher.embed_dim, PROTOTYPES)).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = main_dino.DINOLoss(PROTOTYPES, len(crops), 0.04, 0.07, 30, epochs).to(device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student), DINO_LR, weight_decay=DINO_DECAY)
    forward = torch.compile(student) if compiled else student

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            seen = teacher(crops[:GLOBALS])
            loss = criterion(forward(crops), seen, epochs // 2)
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, CLIP)
        optimizer.step()
        with torch.no_grad():
            for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * new.detach().data)

    return student, step


def dino_lightly(crops: list[Tensor], compiled: bool) -> Contender:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device = crops[0].device
    network, teacher = (net.to(device) for net in dino_network())
    head = DINOProjectionHead(network.embed_dim, 2048, 256, PROTOTYPES, freeze_last_layer=1).to(device)
    teacher.load_state_dict(network.state_dict())
    teacher_head = DINOProjectionHead(network.embed_dim, 2048, 256, PROTOTYPES).to(device)
    teacher_head.load_state_dict(head.state_dict())
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_head)
    student = nn.ModuleDict({"backbone": network, "head": head})
    criterion = DINOLoss(PROTOTYPES, warmup_teacher_temp_epochs=5).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), DINO_LR, weight_decay=DINO_DECAY)
    backbone = torch.compile(network) if compiled else network

    def step() -> None:
        update_momentum(network, teacher, m=MOMENTUM)
        update_momentum(head, teacher_head, m=MOMENTUM)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            seen = [teacher_head(teacher(crop)) for crop in crops[:GLOBALS]]
            loss = criterion(seen, [head(backbone(crop)) for crop in crops], epoch=50)
        loss.backward()
        head.cancel_last_layer_gradients(current_epoch=50)
        optimizer.step()
        optimizer.zero_grad()

    return student, step


DINO_CONTENDERS = {
    "saccade": dino_ours,
    "facebookresearch/dino": dino_facebookresearch,
    "lightly": dino_lightly,
}


def dinov2_config(batch: int, drop: float) -> dinov2.Config:
    return dinov2.Config(arch="vit-s/16", batch=batch, drop_path=drop, prototypes=PROTOTYPES, koleo_group=batch)


def hidden(batch: int, device: torch.device) -> Tensor:
    """What both sides hide of the large crops [2B 196]."""
    rows = torch.arange(batch)
    crops = torch.empty(GLOBALS * batch, 3, 224, 224)
    draws = Draws(0, 0, rows, rows, rows)
    return masking.block_masks(dinov2_config(batch, 0.0), draws, crops, spread=True, fill=False).to(device)


def dinov2_ours(crops: list[Tensor], compiled: bool, drop: float) -> Contender:
    """Half way through training, by the step of `saccade pretrain`."""
    batch, device = len(crops[0]), crops[0].device
    arguments = PretrainArguments(data=("none",), recipe="dinov2", out="none", compile=compiled)
    model = Model(recipe.find("dinov2"), dinov2_config(batch, drop), arguments, distributed.Ranks(0, 1, device))
    model.method.train()
    rows, steps = torch.arange(batch), iter(range(1_000_000))
    views = {"globals": torch.cat(crops[:GLOBALS]), "locals": torch.cat(crops[GLOBALS:]), "hide": hidden(batch, device)}

    def step() -> None:
        words = Draws(0, next(steps), rows, rows, rows).step("drop").bits(len(crops)).T.flatten()
        model.step(iter([views | {"drop": words}]), 0.5)

    return model.method, step


def dinov2_lightly(crops: list[Tensor], compiled: bool, drop: float) -> Contender:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_drop_path_rate, update_momentum
    from timm.models.vision_transformer import vit_small_patch16_224

    batch, device = len(crops[0]), crops[0].device

    def build() -> nn.ModuleDict:
        network = vit_small_patch16_224(pos_embed="learn", dynamic_img_size=True, init_values=1e-5, num_classes=0)
        network = MaskedVisionTransformerTIMM(network, antialias=False, pos_embed_initialization="skip")
        head = DINOv2ProjectionHead(network.vit.embed_dim, output_dim=PROTOTYPES)
        return nn.ModuleDict({"backbone": network, "head": head}).to(device)

    student, teacher = build(), build().requires_grad_(False).eval()
    teacher.load_state_dict(student.state_dict())
    update_drop_path_rate(student["backbone"].vit, drop, mode="uniform")
    cls_loss, patch_loss = DINOLoss(PROTOTYPES).to(device), IBOTPatchLoss(PROTOTYPES).to(device)
    koleo = KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), DINO_LR, weight_decay=DINO_DECAY)
    large, small, hide = torch.cat(crops[:GLOBALS]), torch.cat(crops[GLOBALS:]), hidden(batch, device)
    mask = F.pad(hide, (1, 0))
    encode = student["backbone"].encode
    encode = torch.compile(encode) if compiled else encode

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                seen = teacher["backbone"].encode(large)
                cls_target, patch_target = teacher["head"](seen[:, 0]), teacher["head"](seen[mask])
            whole = encode(large, mask=mask)
            patches = student["head"](whole[mask])
            scores = torch.cat([student["head"](whole[:, 0]), student["head"](encode(small)[:, 0])])
            loss = cls_loss(cls_target.chunk(GLOBALS), scores.chunk(len(crops)), teacher_temp=0.07)
            loss = loss + patch_loss(patch_target, patches, hide.unflatten(1, (14, 14)), teacher_temp=0.07)
            loss = loss + 0.1 * sum(koleo(crop) for crop in whole[:, 0].chunk(GLOBALS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for part in student:
            update_momentum(student[part], teacher[part], m=MOMENTUM)

    return student, step


DINOV2_CONTENDERS = {"saccade": dinov2_ours, "lightly": dinov2_lightly}


def seconds(step: Step, steps: int, device: str) -> float:
    """The time of one step, over a few of them."""
    synchronise = torch.cuda.synchronize if device == "cuda" else contextlib.nullcontext
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronise()
    start = clock()
    for _ in range(steps):
        step()
    synchronise()
    return (clock() - start) / steps


def measure(title: str, ready: dict[str, Contender], batch: int, rounds: int, device: str) -> None:
    times: dict[str, list[float]] = {who: [] for who in ready}
    one = max(seconds(step, 1, device) for _ in range(2) for _, step in ready.values())  # warm-up
    steps = max(1, round(1.0 / one))
    for turn in range(rounds):
        order = list(ready) if turn % 2 else list(reversed(ready))
        for who in order:
            times[who].append(seconds(ready[who][1], steps, device))
    print(f"\n{title}, batch {batch}, {rounds} rounds")
    for who, (model, _) in ready.items():
        median = statistics.median(times[who])
        ratios = sorted(theirs / own for theirs, own in zip(times[who], times["saccade"], strict=True))
        size = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        ratio = f"{statistics.median(ratios):6.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {who:22s} {median * 1e3:8.1f} ms {batch / median:8.1f} images/s {ratio}  {size:.2f} M", flush=True)


def normalised(pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pictures.device) for values in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    return (pictures - mean[:, None, None]) / std[:, None, None]


def measure_mae(name: str, case: Case, rounds: int, device: str, compiled: bool) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(case.batch, 3, case.image_size, case.image_size, device=device)
    ready = {
        who: make(case, pictures if who == "saccade" else normalised(pictures), compiled)
        for who, make in CONTENDERS.items()
    }
    title = f"{name}: MAE, vit-{case.size}/{case.patch}, {case.image_size} px"
    measure(title, ready, case.batch, rounds, device)


def measure_crops(
    title: str, makers: dict[str, Callable[..., Contender]], batch: int, rounds: int, device: str, *more: object
) -> None:
    """Contenders that look at large and small crops."""
    torch.manual_seed(0)
    crops = [torch.rand(batch, 3, side, side, device=device) for side in [224] * GLOBALS + [SMALL] * LOCALS]
    plain = [normalised(crop) for crop in crops]
    ready = {
        who: make([crop.clone() for crop in (crops if who == "saccade" else plain)], *more)
        for who, make in makers.items()
    }
    title = f"{title}, vit-s/16, {GLOBALS}x224 + {LOCALS}x{SMALL}, {PROTOTYPES} prototypes"
    measure(title, ready, batch, rounds, device)


def measure_dino(batch: int, rounds: int, device: str, compiled: bool) -> None:
    place = Path(tempfile.mkdtemp()) / "store"  # the reference's centre is reduced over ranks
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(place), 1), rank=0, world_size=1)
    measure_crops("DINO", DINO_CONTENDERS, batch, rounds, device, compiled)
    torch.distributed.destroy_process_group()


def processor() -> str:
    """The CPU's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?")
    parser.add_argument("--recipe", choices=["mae", "dino", "dinov2"], default="mae")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=CASES, help="one geometry of MAE")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--drop-path", type=float, default=0.3, help="DINOv2's: how often a branch is left out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.checkout is None and arguments.recipe != "dinov2":
        parser.error("give the CHECKOUT of the reference")
    sys.path[:0] = [arguments.checkout] if arguments.checkout else []
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    print(f"{machine}, {torch.get_num_threads()} threads, Python {platform.python_version()}")
    packages = ["torch", "lightly", *{"mae": ["timm", "transformers"], "dinov2": ["timm"]}.get(arguments.recipe, [])]
    print(", ".join(f"{package} {metadata.version(package)}" for package in packages), flush=True)
    if arguments.recipe == "dino":
        measure_dino(arguments.batch or 8, arguments.rounds, arguments.device, arguments.compile)
        return
    if arguments.recipe == "dinov2":
        drop, compiled = arguments.drop_path, arguments.compile
        title = f"DINOv2, drop path {drop}"
        measure_crops(
            title, DINOV2_CONTENDERS, arguments.batch or 8, arguments.rounds, arguments.device, compiled, drop
        )
        return
    import numpy

    numpy.float = float  # facebookresearch/mae was written for numpy 1.19
    for name, case in CASES.items():
        if arguments.only in (None, name):
            case = replace(case, batch=arguments.batch or case.batch)
            measure_mae(name, case, arguments.rounds, arguments.device, arguments.compile)


if __name__ == "__main__":
    main()

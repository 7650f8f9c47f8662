"""Numbers of the reference iBOT and DINOv2 for tests/test_distillation_parity.py and tests/test_masking.py: losses and
gradients over three steps, Sinkhorn-Knopp and KoLeo by themselves, and what their masks look like.

    python tests/parity/make_distillation.py DINOV2 IBOT tests/parity/distillation.safetensors

DINOV2 and IBOT are clones of github.com/facebookresearch/dinov2 and bytedance/ibot (both Apache-2.0; nothing of them is
kept here). An environment of its own needs torch, numpy, pillow and safetensors. Their own networks, heads, losses and
mask generators run, in float64 on a CPU, on inputs and weights from Python's `random`; what they want of other
libraries (xformers, FSDP, torchvision, timm) is replaced by what does the same on one CPU.
"""

from __future__ import annotations

import importlib
import math
import os
import random
import sys
import tempfile
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

GEOMETRY = {"image_size": 16, "patch": 4, "width": 8, "depth": 2, "heads": 2, "hidden": 32}
SAMPLES, LOCALS, LOCAL_SIZE, STEPS = 4, 3, 8, 3
PROTOTYPES, HIDDEN, BOTTLENECK = 12, 10, 6
IBOT_BOTTLENECK = 256  # the reference's default is ours
MEAN, STD = (0.5, 0.375, 0.25), (0.25, 0.5, 0.125)  # exact in binary, as the temperatures are
TEMPERATURES = (0.0625, 0.09375, 0.125)
KINDS = ("centre", "sinkhorn")
"""DINOv2 with a shared head and centring; with two heads, registers and Sinkhorn-Knopp."""
REGISTERS = {"centre": 0, "sinkhorn": 2}

MASKS = 3000
GRIDS = ((6, 6), (14, 14), (16, 16), (37, 37))
RATIOS = (0.1, 0.25, 0.5)


def redraw(name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Numbers that follow from the name alone, no two of them alike."""
    draw = random.Random(name)
    return torch.tensor([draw.uniform(low, high) for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape)


def canonical(name: str) -> str:
    """The reference's name of a parameter as ours."""
    for theirs, ours in (("dino_head", "head"), ("ibot_head", "patch_head"), ("last_layer.weight_g", "gain"),
                         ("weight_v", "weight"), ("masked_embed", "mask_token")):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def redraw_parameters(network: nn.Module, who: str) -> None:
    """Every tensor non-constant: norms, biases and gains too, but for a gain that is held. `who`: student, teacher."""
    for name, parameter in network.named_parameters():
        name = canonical(name)
        around_one = ("norm" in name and name.endswith("weight")) or name.endswith(("gain", "gamma"))
        low, high = (0.5, 1.5) if around_one else (-0.4, 0.4)
        parameter.data = redraw(f"{who} {name}", tuple(parameter.shape), low, high)


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Large crops [2B C S S] and small ones, view-major, in [0, 1]; and what is hidden [2B N] of half the large."""
    side = GEOMETRY["image_size"]
    large = redraw(f"large {step}", (2 * SAMPLES, 3, side, side), 0, 1)
    small = redraw(f"small {step}", (LOCALS * SAMPLES, 3, LOCAL_SIZE, LOCAL_SIZE), 0, 1)
    patches, draw = (side // GEOMETRY["patch"]) ** 2, random.Random(f"hide {step}")
    hide = torch.zeros(2 * SAMPLES, patches, dtype=torch.bool)
    for crop in draw.sample(range(2 * SAMPLES), SAMPLES):
        hide[crop, draw.sample(range(patches), draw.randint(2, patches // 2))] = True
    return large, small, hide


def logits(name: str, rows: int) -> Tensor:
    """A teacher's scores, for Sinkhorn-Knopp and centring by themselves."""
    return redraw(name, (rows, PROTOTYPES), -1, 1)


def embeddings() -> Tensor:
    """What KoLeo spreads."""
    return redraw("koleo", (32, 5), -1, 1)


def shape_of(masks: Tensor) -> dict[str, Tensor]:
    """What masks [V H W] look like: how many patches, where, and in how ragged and how flat pieces."""
    masks = masks.double()
    height, width = masks.shape[1:]
    down, across = torch.arange(height)[:, None], torch.arange(width)
    ring = torch.minimum(torch.minimum(down, height - 1 - down), torch.minimum(across, width - 1 - across))
    share = [masks[:, ring == depth].mean(1) for depth in range(int(ring.max()) + 1)]
    upright = (masks[:, 1:] != masks[:, :-1]).double().sum((1, 2))
    sideways = (masks[:, :, 1:] != masks[:, :, :-1]).double().sum((1, 2))
    uneven = (upright - sideways).abs() / (upright + sideways).clamp(min=1)
    count = masks.sum((1, 2))
    told = {"count": count, "spread": (count - count.mean()).square(), "edges": upright + sideways, "uneven": uneven}
    return told | {f"ring {depth}": values for depth, values in enumerate(share)}


def moments(values: dict[str, Tensor]) -> Tensor:
    """Mean and its squared standard error, for each statistic in order: [S 2]."""
    return torch.stack([torch.stack([x.mean(), x.var() / len(x)]) for x in values.values()])


# The references


class _Lists:
    """xformers' way to run a head once on several lists of tokens."""

    def __init__(self, sizes: list[int]):
        self.sizes = sizes

    @classmethod
    def from_tensor_list(cls, parts: list[Tensor]) -> tuple[_Lists, Tensor]:
        return cls([part.shape[1] for part in parts]), torch.cat(parts, 1)

    def split(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self.sizes, 1))


class _Anything:
    """A base class or decorator of a library that is not here."""

    def __getitem__(self, index: int) -> tuple[list[Tensor]]:
        side = self.side  # what ImageFolder gives: a list of views
        return ([torch.empty(3, *side)],)


def _module(name: str, folder: str | None = None, **contents: Any) -> None:
    """In the place of a module; with its folder, in the place of what importing the package would do."""
    module = types.ModuleType(name)
    module.__path__ = [] if folder is None else [folder]
    vars(module).update(contents)
    sys.modules[name] = module


def prepare(dinov2: str, ibot: str) -> None:
    """Both checkouts can be imported on a machine without GPU, and compute in float64."""
    warnings.simplefilter("ignore")
    os.environ["XFORMERS_DISABLED"] = "1"
    _module("xformers")
    _module("xformers.ops", fmha=types.SimpleNamespace(BlockDiagonalMask=_Lists))
    names = ("get_fsdp_wrapper", "ShardedGradScaler", "get_fsdp_modules", "reshard_fsdp_model", "FSDPCheckpointer")
    _module("dinov2.fsdp", **dict.fromkeys(names, lambda *_: None))
    for name in ("train", "data"):
        _module(f"dinov2.{name}", f"{dinov2}/dinov2/{name}")
    _module("torchvision", datasets=None, transforms=None, models=types.SimpleNamespace())
    _module("torchvision.datasets", ImageFolder=_Anything)
    _module("timm")
    _module("timm.models")
    _module("timm.models.registry", register_model=lambda function: function)
    _module("tensorboardX", SummaryWriter=None)
    _module("evaluation")
    _module("evaluation.unsupervised")
    _module("evaluation.unsupervised.unsup_cls", eval_pred=None)
    swin = ("SwinTransformer", "swin_tiny", "swin_small", "swin_base", "swin_large")
    _module("models.swin_transformer", **dict.fromkeys(swin))
    sys.path[:0] = [dinov2, ibot]
    torch.Tensor.cuda = lambda self, **_: self
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)  # its weights of masked patches too
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)


def normalised(crops: Tensor) -> Tensor:
    """What the reference's loader hands over."""
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    return (crops - mean) / std


def gradients(student: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Of all steps together, by our names."""
    return {f"{prefix}/{canonical(n)}": p.grad.flatten() for n, p in student.named_parameters() if p.grad is not None}


def dinov2_method(kind: str) -> dict[str, Tensor]:
    """Loss and gradients of its whole method, and where the centres are after it."""
    page = importlib.import_module("dinov2.train.ssl_meta_arch")
    transformer = importlib.import_module("dinov2.models.vision_transformer")
    collate = importlib.import_module("dinov2.data.collate")
    smooth = REGISTERS[kind] > 0

    def network() -> nn.Module:
        made = transformer.DinoVisionTransformer(
            img_size=GEOMETRY["image_size"], patch_size=GEOMETRY["patch"], embed_dim=GEOMETRY["width"],
            depth=GEOMETRY["depth"], num_heads=GEOMETRY["heads"], init_values=1e-5, block_chunks=0,
            num_register_tokens=REGISTERS[kind], interpolate_antialias=smooth,
            interpolate_offset=0.0 if smooth else 0.1,
        )  # fmt: skip
        made.forward_features_list = lambda images, masks: [
            made.forward_features(x, m) for x, m in zip(images, masks, strict=True)
        ]
        return made

    page.build_model_from_cfg = lambda cfg: (network(), network(), GEOMETRY["width"])
    head = {"head_n_prototypes": PROTOTYPES, "head_bottleneck_dim": BOTTLENECK, "head_hidden_dim": HIDDEN}
    head |= {"head_nlayers": 3, "loss_weight": 1.0}
    masked = {"mask_ratio_min_max": (0.1, 0.5), "mask_sample_probability": 0.5, "separate_head": kind == "sinkhorn"}
    space = types.SimpleNamespace
    centring = {"centre": "centering", "sinkhorn": "sinkhorn_knopp"}[kind]
    method = page.SSLMetaArch(space(
        compute_precision=space(grad_scaler=False), student=space(pretrained_weights="", arch="tiny"),
        dino=space(**head, koleo_loss_weight=0.1), ibot=space(**head, **masked),
        crops=space(local_crops_number=LOCALS), train=space(centering=centring),
    )).double()  # fmt: skip
    method.need_to_synchronize_fsdp_streams = False
    redraw_parameters(method.student, "student")
    redraw_parameters(method.teacher, "teacher")
    method.teacher.requires_grad_(False)
    told: list[Tensor] = []
    method.backprop_loss = lambda loss: (told.append(loss.detach()), loss.backward())
    random.shuffle = lambda _: None
    for step in range(STEPS):
        large, small, hide = inputs(step)
        views = (normalised(large).unflatten(0, (2, -1)), normalised(small).unflatten(0, (LOCALS, -1)))
        samples = [({"global_crops": views[0][:, n], "local_crops": views[1][:, n]},) for n in range(SAMPLES)]
        ordered = iter([*hide[hide.any(1)], *hide[~hide.any(1)]])  # the collation asks for masked ones first
        back = torch.cat([hide.any(1).nonzero(), (~hide.any(1)).nonzero()]).flatten().argsort().tolist()
        random.shuffle = lambda masks, back=back: masks.__setitem__(slice(None), [masks[n] for n in back])
        made = collate.collate_data_and_cast(
            samples, (0.1, 0.5), 0.5, torch.float64, n_tokens=hide.shape[1], mask_generator=lambda _, o=ordered: next(o)
        )
        assert torch.equal(made["collated_masks"], hide)
        made["upperbound"] = int(hide.sum()) + 2  # its buffer has rows to spare, as in training
        method.forward_backward(made, TEMPERATURES[step])
    found = {f"{kind}/losses": torch.stack(told), **gradients(method.student, kind)}
    if kind == "centre":
        for name, loss in (("cls", method.dino_loss), ("patch", method.ibot_patch_loss)):
            loss.apply_center_update()
            found[f"{kind}/centre {name}"] = loss.center.flatten()
    return found


def ibot_method() -> dict[str, Tensor]:
    """Loss and gradients of its whole method, and where the centres are after it."""
    page = importlib.import_module("main_ibot")
    utils = importlib.import_module("utils")
    transformer = importlib.import_module("models.vision_transformer")

    def network(who: str) -> nn.Module:
        backbone = transformer.VisionTransformer(
            img_size=[GEOMETRY["image_size"]], patch_size=GEOMETRY["patch"], embed_dim=GEOMETRY["width"],
            depth=GEOMETRY["depth"], num_heads=GEOMETRY["heads"], qkv_bias=True, return_all_tokens=True,
            masked_im_modeling=who == "student",
        )  # fmt: skip
        head = page.iBOTHead(GEOMETRY["width"], PROTOTYPES, hidden_dim=HIDDEN, shared_head=True)
        whole = utils.MultiCropWrapper(backbone, head).double()
        held = head.last_layer.weight_g
        redraw_parameters(whole, who)
        held.data.fill_(1)
        return whole

    student, teacher = network("student"), network("teacher").requires_grad_(False)
    steps = (TEMPERATURES[0], TEMPERATURES[-1], STEPS)
    loss = page.iBOTLoss(
        PROTOTYPES, PROTOTYPES, 2, LOCALS, *steps[:2], *steps[:2], warmup_teacher_temp_epochs=STEPS, nepochs=STEPS
    ).double()
    told = []
    for step in range(STEPS):
        large, small, hide = inputs(step)
        side = GEOMETRY["image_size"] // GEOMETRY["patch"]
        masks = list(hide.unflatten(1, (side, side)).chunk(2))
        crops, locals_ = list(normalised(large).chunk(2)), list(normalised(small).chunk(LOCALS))
        answers, targets = student(crops, mask=masks), teacher(crops)
        student.backbone.masked_im_modeling = False
        few = student(locals_)[0]
        student.backbone.masked_im_modeling = True
        parts = loss(answers, targets, few, masks, step)
        parts["loss"].backward()
        told.append(parts["loss"].detach())
    found = {"ibot/losses": torch.stack(told), **gradients(student, "ibot")}
    return found | {"ibot/centre cls": loss.center.flatten(), "ibot/centre patch": loss.center2.flatten()}


def pieces() -> dict[str, Tensor]:
    """Sinkhorn-Knopp of class tokens and of patches, centring, the patches' loss and KoLeo."""
    page = importlib.import_module("dinov2.loss")
    cls, patch, koleo = page.DINOLoss(PROTOTYPES).double(), page.iBOTPatchLoss(PROTOTYPES).double(), page.KoLeoLoss()
    found = {"piece/sinkhorn cls": cls.sinkhorn_knopp_teacher(logits("scores", 8), TEMPERATURES[0])}
    rows = logits("scores of patches", 21)
    found["piece/sinkhorn patch"] = patch.sinkhorn_knopp_teacher(rows, TEMPERATURES[1], torch.tensor(len(rows)))
    for step in range(STEPS):
        scores = logits(f"scores {step}", 8)
        found[f"piece/centred {step}"] = cls.softmax_center_teacher(scores, TEMPERATURES[step])
        cls.update_center(scores)
    cls.apply_center_update()
    found["piece/centre"] = cls.center[0]
    _, _, hide = inputs(0)
    student, teacher = (logits(f"hidden {who}", int(hide.sum())) for who in ("student", "teacher"))
    student.requires_grad_()
    loss = patch.forward_masked(student, (5 * teacher).softmax(-1), hide)
    loss.backward()
    found |= {"piece/patch loss": loss.detach(), "piece/patch gradient": student.grad}
    for group in (32, 16, 8):
        x = embeddings().requires_grad_()
        spread = torch.stack([koleo(part) for part in x.split(group)]).mean()
        spread.backward()
        found |= {f"piece/koleo {group}": spread.detach(), f"piece/koleo {group} gradient": x.grad}
    return found


def masks() -> dict[str, Tensor]:
    """What the references' masks look like at given targets, for every grid."""
    generator = importlib.import_module("dinov2.data.masking").MaskingGenerator
    loader = importlib.import_module("loader")
    found = {}
    for grid in GRIDS:
        height, width = grid
        dinov2 = generator(input_size=grid, max_num_patches=0.5 * height // 1 * width)
        ibot = object.__new__(loader.ImageFolderMask)
        ibot.psz, ibot.side, ibot.pred_shape, ibot.pred_start_epoch = 1, grid, "block", 0
        ibot.log_aspect_ratio, ibot.pred_ratio_var = (math.log(0.3), -math.log(0.3)), 0
        for ratio in RATIOS:
            count = int(height * width * ratio)
            ibot.pred_ratio = (count + 1e-6) / (height * width)
            for who in ("dinov2", "ibot"):
                random.seed(f"{who} {grid} {ratio}")
                made = [dinov2(count) if who == "dinov2" else ibot[0][-1][0] for _ in range(MASKS)]
                drawn = torch.stack([torch.from_numpy(mask) for mask in made])
                found[f"masks/{who} {height}x{width} {ratio}"] = moments(shape_of(drawn))
    return found


def main(dinov2: str, ibot: str, path: str) -> None:
    """Writes the numbers."""
    from safetensors.torch import save_file

    shuffle = random.shuffle
    prepare(dinov2, ibot)
    numbers: dict[str, Tensor] = {}
    for kind in KINDS:
        numbers |= dinov2_method(kind)
    random.shuffle = shuffle
    numbers |= ibot_method() | pieces() | masks()
    save_file({name: number.detach().clone().contiguous() for name, number in numbers.items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

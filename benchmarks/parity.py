"""Every published size against another library's network of that size, every tensor of it redrawn: docs/parity.md.

    python benchmarks/parity.py [FAMILY ...] --out docs/parity.md [--work DIRECTORY] [--again] [--seconds N]
    python benchmarks/parity.py --seconds 0 --out docs/parity.md --join ONE.md OTHER.md --missing "why"

FAMILY may be a pattern (`dino*`), or FAMILY/SIZE. A row is written when it is measured; the same command goes on with
those that are not there. A row: transformers builds its network from a config, all parameters and statistics are drawn
anew, it writes itself, `saccade.load` reads that, and the features of both are compared in float32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import platform
import re
import resource
import shutil
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import saccade
from saccade import naming, published
from saccade.backbone import FAMILIES

Features = Mapping[str, Tensor]

FLOOR, SEEN = 1e-4, 1e-3
LARGEST = 2_000_000_000
"""More parameters than that are compared by names and shapes alone, and as a narrow copy."""
SMALL, LARGE = 100_000_000, 500_000_000
"""Up to so many parameters the way back is run; above so many only one picture, and namings in bfloat16."""
NARROW = {"width": 256, "depth": 4, "heads": 2, "hidden": 512}
"""The 7B's shape by a sixteenth: heads of 128, a hidden width of twice the width, a tenth of its depth."""
COLUMNS = (
    "family", "size", "published as", "parameters", "oracle", "native", "not square", "other", "spread", "unpatched",
    "mutations seen", "namings there and back", "way back",
)  # fmt: skip
OURS_ONLY = {
    "ibot": "transformers has no iBOT: ViTModel with a mask token, written under the authors' names by hand",
    "mocov3": "transformers has no MoCo v3: ViTModel, written under the authors' names by hand",
}
RESNETS = ("dino-resnet", "swav", "barlow-twins", "vicreg", "simclr", "mocov3-resnet", "augnet")
OURS_ONLY |= dict.fromkeys(
    RESNETS, "transformers has no such checkpoint: ResNetModel, written under torchvision's names by hand"
)
STANDS_IN = ", which stands in (below)"
UNPATCHED = {
    "dino": "resizes positions to exactly n cells, the authors by (n + 0.1) / N",
    "ibot": "as DINO",
    "dinov2": "resizes positions to exactly n cells, the authors by (n + 0.1) / N",
    "dinov3": "computes RoPE's periods in float32, the released ones are rounded to bfloat16",
}
BACKWARD_ONLY = {"official in chunks"}
"""Nothing says where the chunks would end."""
FOLDED = {"timm registers", "timm giant registers"}
"""They add the class token's position to it, which cannot be taken apart again."""


class Job(NamedTuple):
    """One row: the family, a published size and its name; `narrow` where a smaller network stands for it."""

    family: published.Family
    title: str
    size: Any
    narrow: bool = False

    @property
    def switches(self) -> dict[str, Any]:
        """The fields of our config, those that tensors tell included."""
        common = {**self.family.switches, **self.size.numbers, **self.size.switches}
        if self.family.network != "vit":
            return common | {"image_size": self.size.image_size}
        if self.family.name == "dinov3":
            common |= {"qkv_bias": "none" if self.title.startswith("vit-7b") else "k_masked"}
        return {"pooling": self.family.pooling} | common

    @property
    def resized_otherwise(self) -> bool:
        """Whether the authors do something that transformers does not."""
        return self.family.name in UNPATCHED and not self.switches.get("registers", 0) * (self.family.name == "dinov2")

    @property
    def folder(self) -> str:
        """A name that says which it is, as those of published files do."""
        name = self.size.names[0].replace("/", "-") if self.size.names else f"{self.family.name}-{self.title}"
        return name.replace("/", "-") if name.startswith(self.family.name) else f"{self.family.name}-{name}"


def wanted_by(job: Job) -> tuple[str, dict[str, Any]]:
    """Transformers' model type and what its config must say: ours wherever one is ours to write, else by hand here."""
    if job.family.name == "timm-convnext":  # ours goes out as DINOv3's, which computes the same
        facts = {"hidden_sizes": list(job.size.widths), "depths": list(job.size.blocks), "layer_norm_eps": 1e-6}
        return "convnext", facts | {"image_size": job.size.image_size}
    target = naming.transformers(FAMILIES[job.family.network].config(**job.switches), job.family.name)
    facts = {name: value for name, value in target.facts.items() if name != "architectures"}
    if job.family.name == "siglip2-naflex":  # ours goes out as SigLIP's, with a convolution
        facts["num_patches"] = (facts.pop("image_size") // job.size.patch) ** 2
        return "siglip2_vision_model", facts
    return target.architecture, facts


def built(job: Job) -> nn.Module:
    """Transformers' network, as it makes it."""
    kind, facts = wanted_by(job)
    config = transformers.AutoConfig.for_model(kind, **facts)
    if kind == "vit":
        return transformers.ViTModel(config, add_pooling_layer=False, use_mask_token=job.family.name == "ibot").eval()
    return transformers.AutoModel.from_config(config).eval()


_DRAWS = (
    (r"num_batches_tracked", None),
    (r"lambda|gamma|layer_scale", (0.4, 0.2)),
    (r"token|probe|class_embedding", (0.0, 1.0)),
    (r"position_embedding", (0.0, 0.5)),
    (r"bias|running", (0.0, 0.2)),
)
"""Mean and spread by what is in a name; of the others vectors are scales of norms, and the rest matrices."""


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """No tensor stays as it was made: the numbers of a healthy network, so that features have a spread near one."""
    residual = isinstance(model, transformers.ResNetModel)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        numbers = next((numbers for part, numbers in _DRAWS if re.search(part, name)), ())
        if numbers is None:
            tensor.fill_(7)
        elif not tensor.is_floating_point() or "inv_freq" in name:
            continue
        elif numbers:
            tensor.normal_(generator=draw).mul_(numbers[1]).add_(numbers[0])
        elif tensor.ndim == 1:
            tensor.normal_(generator=draw).mul_(0.3).add_(1.0)
        else:
            halved = residual and not re.search("shortcut|embedder", name)  # by the ReLU before it
            tensor.normal_(generator=draw).mul_(((2.0 if halved else 1.0) / tensor[0].numel()) ** 0.5)
    if residual:
        _settle(model)


def _settle(model: Any) -> None:
    """A trained ResNet's statistics are those of what it sees, and a branch adds only a part to the stream."""
    last = 2 if model.config.layer_type == "bottleneck" else 1
    for name, tensor in model.named_parameters():
        if re.search(rf"layer\.{last}\.normalization\.(weight|bias)", name):
            tensor.mul_(0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    draw = torch.Generator().manual_seed(1)
    for norm in norms:
        norm.momentum = 1.0
    model.train()((torch.rand(4, 3, 224, 224, generator=draw) - 0.45) / 0.225)
    model.eval()
    for norm in norms:
        norm.running_var.mul_(torch.rand(norm.num_features, generator=draw) * 0.4 + 0.8)
        norm.running_mean.add_(torch.randn(norm.num_features, generator=draw) * 0.1 * norm.running_var.sqrt())
        norm.num_batches_tracked.fill_(7)


def constants(model: nn.Module) -> list[str]:
    """Parameters that hold one number, which a swap would not show."""
    return [name for name, tensor in model.named_parameters() if tensor.numel() > 1 and tensor.min() == tensor.max()]


def as_the_authors(job: Job, model: Any) -> None:
    """Tells transformers to resize and to turn as the authors do."""
    if job.family.name == "dinov3":
        model.rope_embeddings.inv_freq = 1 / (1 / model.rope_embeddings.inv_freq).bfloat16().float()
    elif job.resized_otherwise:
        table = model.embeddings.position_embeddings
        model.embeddings.interpolate_pos_encoding = partial(_with_offset, table, job.size.patch, job.size.image_size)


def _with_offset(table: Tensor, patch: int, native: int, _: Tensor, height: int, width: int) -> Tensor:
    """As the authors of DINO and DINOv2: 0.1 more cells than there are, which moves where the table is read."""
    if (height, width) == (native, native):
        return table
    cells = native // patch
    grid = table[:, 1:].unflatten(1, (cells, cells)).permute(0, 3, 1, 2)
    factors = tuple((side // patch + 0.1) / cells for side in (height, width))
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


@torch.inference_mode()
def asked(job: Job, model: Any, pictures: Tensor) -> Features:
    """Class token, patches and the one vector, by transformers' network."""
    mean, std = (torch.tensor(job.switches[name]).view(3, 1, 1) for name in ("mean", "std"))
    images, kind = (pictures - mean) / std, model.config.model_type
    extra: dict[str, Any] = {}
    if kind in ("vit", "ijepa", "vit_mae", "clip_vision_model", "siglip_vision_model"):
        extra["interpolate_pos_encoding"] = True
    if kind == "vit_mae":
        count = (images.shape[2] // job.size.patch) * (images.shape[3] // job.size.patch)
        extra["noise"] = torch.arange(count).float().expand(len(images), -1)
    output = model(**_flattened(images, job.size.patch)) if kind.startswith("siglip2") else model(images, **extra)
    tokens = output.last_hidden_state
    if tokens.ndim == 4:
        tokens, pooled = tokens.flatten(2).transpose(1, 2), output.pooler_output.flatten(1)
        return {"patches": tokens, "pooled": pooled} if kind == "resnet" else {
            "class": pooled, "patches": model.layernorm(tokens), "pooled": pooled,
        }  # fmt: skip
    if kind == "clip_vision_model":  # its last norm is given to the class token alone
        tokens = model.post_layernorm(tokens)
    if not job.switches.get("cls", True):
        return {"patches": tokens, "pooled": tokens.mean(1) if kind == "ijepa" else output.pooler_output}
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    pooled = tokens[:, 0] if kind in ("vit", "vit_mae") else output.pooler_output
    return {"class": tokens[:, 0], "patches": tokens[:, first:], "pooled": pooled}


def _flattened(images: Tensor, patch: int) -> dict[str, Tensor]:
    """What NaFlex reads: the numbers of each patch by row, column and channel, a mask and the shapes."""
    batch, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    cells = torch.einsum("bcrpsq->brspqc", images.reshape(batch, 3, rows, patch, columns, patch))
    values = cells.reshape(batch, rows * columns, -1)
    shapes = torch.tensor([[rows, columns]]).expand(batch, 2)
    return {"pixel_values": values, "pixel_attention_mask": torch.ones(values.shape[:2]), "spatial_shapes": shapes}


@torch.inference_mode()
def ours(encoder: saccade.Encoder, pictures: Tensor) -> Features:
    """The same three of ours."""
    features = encoder(pictures)
    found = {"patches": features.patches, "pooled": encoder.embedding(features)}
    return found if features.cls is None else {"class": features.cls, **found}


def apart(one: Features, other: Features) -> dict[str, float]:
    """The largest difference of each."""
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    assert all(one[name].shape == other[name].shape for name in one)
    return {
        name: float((one[name] - other[name]).abs().max()) for name in ("class", "patches", "pooled") if name in one
    }


def pictures_of(job: Job) -> dict[str, Tensor]:
    """Native, not square, another, and a small one for the mutations."""
    stride = job.size.patch if job.family.network == "vit" else 32
    native = job.size.image_size

    def side(part: float) -> int:
        return round(native * part / stride) * stride

    other = side(1.25) if native <= 256 else side(0.5)
    sizes = {"native": (native, native), "not square": (side(0.75), side(1.25)), "other": (other, other)}
    sizes["small"] = (3 * stride, 4 * stride)
    count = 1 if job.size.parameters > LARGE else 2
    draw = torch.Generator().manual_seed(5)
    return {name: torch.rand(count, 3, *size, generator=draw) for name, size in sizes.items()}


def write(job: Job, model: Any, folder: Path) -> None:
    """By transformers itself, or under the authors' names where it has no such checkpoint."""
    model.save_pretrained(folder)
    if job.family.name not in OURS_ONLY:
        return
    state = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    folder.mkdir()
    prefix = {"mocov3": "module.base_encoder.", "mocov3-resnet": "module.base_encoder.", "augnet": "module.pre."}
    renamed = as_torchvision(state) if job.family.network == "resnet" else as_timm(state)
    named = {prefix.get(job.family.name, "") + name: tensor.contiguous() for name, tensor in renamed.items()}
    save_file(named, folder / "model.safetensors")


def as_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors as its authors call them, by a hand that is not the one under test."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, by in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.mask_token", "masked_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("layernorm", "norm"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
        ):
            name = name.replace(theirs, by)
        found[name] = tensor[0] if name == "masked_embed" else tensor
    for name in [name for name in found if "attention.query" in name]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return found


def as_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors as torchvision calls them, by a hand that is not the one under test."""
    found = {}
    for name, tensor in state.items():
        name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        name = re.sub(r"encoder\.stages\.(\d)", lambda stage: f"layer{int(stage[1]) + 1}", name)
        name = re.sub(r"\.layers\.(\d+)", r".\1", name)
        for part, ours_part in (("convolution", "conv"), ("normalization", "bn")):
            name = re.sub(rf"\.layer\.(\d)\.{part}", lambda n, part=ours_part: f".{part}{int(n[1]) + 1}", name)
        name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        found[name] = tensor
    return found


def file_of(folder: Path) -> dict[str, Tensor]:
    """All tensors that were written."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def pairs_of(names: published.Sorted, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Tensors of one shape in a block and outside the blocks, and each of that block with the next block's."""
    inside = re.compile(r"(blocks|stages\.2|layer3)\.1\.")
    near = [
        name
        for ours_names, theirs, _ in names.found
        for name in theirs
        if inside.match(ours_names[0]) or not re.match(r"(blocks|stages|layer)[.\d]", ours_names[0])
    ]
    near = [name for name in near if tensors[name].is_floating_point() and not name.endswith(("mask", "periods"))]
    alike = sorted(near, key=lambda name: (str(tensors[name].shape), name))
    for step in (1, 2):
        for one, other in zip(alike, alike[step:], strict=False):
            if tensors[one].shape == tensors[other].shape:
                yield one, other
    for ours_names, theirs, _ in names.found:
        if inside.match(ours_names[0]):
            for name in theirs:
                other = re.sub(r"(layers?|blocks|stages\.2|layer3|resblocks)\.1\.", r"\1.2.", name, count=1)
                constant = re.search(r"(key|k_proj)\.bias$", name)  # the softmax takes out what all keys have
                if other in tensors and other != name and not constant and tensors[name].is_floating_point():
                    yield name, other


def mutations(job: Job, encoder: saccade.Encoder, folder: Path, pictures: Tensor, wanted: Features) -> str:
    """How many swaps show more than a thousandth against the oracle, and the least of them."""
    tensors = file_of(folder)
    rules = job.family.namings[str(encoder.record["naming"])]
    names = published.sort(rules, tensors, str(encoder.record["prefix"]))
    entries = {name: entry for entry in names.found for name in entry[1]}
    shown = []
    for one, other in dict.fromkeys(pairs_of(names, tensors)):
        swapped = {one: tensors[other], other: tensors[one]}
        both = [entries[one], entries[other]]
        for change in (swapped, {}):
            state = {
                name: tensor
                for ours_names, theirs, way in both
                for name, tensor in zip(
                    ours_names, way.ours([(change.get(n, tensors[n])) for n in theirs]), strict=True
                )
            }
            encoder.backbone.load_state_dict(state, strict=False)
            if change:
                shown.append((max(apart(ours(encoder, pictures), wanted).values()), one, other))
    assert max(apart(ours(encoder, pictures), wanted).values()) < FLOOR
    hidden = [swap for swap in shown if swap[0] <= SEEN]
    for swap in hidden:
        print("  NOT SEEN", *swap, flush=True)
    return f"{len(shown) - len(hidden)} of {len(shown)}, least {number(min(shown)[0])}"


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Names, shapes and every bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def round_trips(job: Job, state: Mapping[str, Tensor]) -> str:
    """Every naming that has these tensors: ours to theirs and back, and theirs to ours and back, bit for bit."""
    good, bad = [], []
    for name, rules in job.family.namings.items():
        if name in BACKWARD_ONLY:
            continue
        try:
            theirs = published.to_theirs(rules, state)
        except saccade.SaccadeError:  # a naming of the family's other networks
            continue
        again = published.to_ours(rules, theirs)
        kept = {key: state[key] for key in again if not (name in FOLDED and key in ("cls_token", "pos_embed"))}
        lost = [key for key in ("mask_token",) if key in state and key not in again]
        whole = same(published.to_theirs(rules, again), theirs) and same({key: again[key] for key in kept}, kept)
        whole &= {key for key in state if key not in again} <= {"mask_token", "rope_embed.periods"}
        remark = "".join(
            [" (class token with its position)" * (name in FOLDED), *(f" (without {key})" for key in lost)]
        )
        (good if whole else bad).append(name + remark)
    one_way = [name for name in job.family.namings if name in BACKWARD_ONLY]
    said = f"{len(good)} of {len(good) + len(bad)}: {', '.join(good)}"
    return said + (f"; NOT {', '.join(bad)}" if bad else "") + (f"; {', '.join(one_way)}: read only" if one_way else "")


def way_back(encoder: saccade.Encoder, place: Path) -> str:
    """What transformers makes of our export."""
    found = saccade.export(encoder, to="hf", out=place)
    shutil.rmtree(place)
    return f"{number(found['checked']['max_abs_difference'])} ({found['architecture']})"


def number(value: float) -> str:
    return f"{value:.1e}"


def three(found: Mapping[str, float]) -> str:
    """Class token, patches, pooled."""
    return " / ".join(number(found[name]) if name in found else "-" for name in ("class", "patches", "pooled"))


def measured(job: Job, work: Path) -> dict[str, str]:
    """One row."""
    place = work / job.folder
    pictures = pictures_of(job)
    wanted, plain, oracle, spread = theirs(job, place, pictures)
    release()
    said = {name: job.switches[name] for name in ("mean", "std") if job.narrow}  # of a size that nobody published
    encoder = saccade.load(place, **said)
    record = encoder.record
    assert record["family"] == job.family.name and not record["missing"] and not record["unexpected"], record
    assert job.narrow or job.size.numbers == published.families()[job.family.name].sizes[record["arch"]].numbers
    parameters = sum(tensor.numel() for tensor in encoder.backbone.parameters())
    extra = job.size.parameters - parameters  # a mask token, which a file need not have
    assert job.narrow or abs(extra) in (0, job.switches.get("width", 0)), (parameters, job.size.parameters)
    got = {name: ours(encoder, pictures[name]) for name in wanted}
    row = {name: three(apart(got[name], wanted[name])) for name in ("native", "not square", "other")}
    row |= {"oracle": oracle, "spread": spread, "parameters": f"{job.size.parameters:,}"}
    unpatched = {name: max(apart(got[name], features).values()) for name, features in plain.items()}
    row["unpatched"] = ", ".join(f"{name} {number(value)}" for name, value in unpatched.items()) or "-"
    smallest = min(size.parameters for size in job.family.sizes.values())
    modest = job.narrow or job.size.parameters == smallest or job.size.parameters < SMALL
    mutated = job.narrow or job.size.parameters == smallest or job.size.parameters < SMALL / 3
    row["mutations seen"] = (
        mutations(job, encoder, place, pictures["small"], wanted["small"]) if mutated else "at the smallest size"
    )
    shutil.rmtree(place)
    row["way back"] = way_back(encoder, work / "export") if modest else "at smaller sizes"
    if job.size.parameters > LARGE:
        encoder.backbone.bfloat16()
    row["namings there and back"] = round_trips(job, encoder.backbone.state_dict())
    return row


def theirs(
    job: Job, place: Path, pictures: Mapping[str, Tensor]
) -> tuple[dict[str, Features], dict[str, Features], str, str]:
    """Transformers' features as the authors would have them and as they are, its name, and the spread of patches."""
    model: Any = built(job)
    redraw(model)
    assert not constants(model), constants(model)
    write(job, model, place)
    plain = {}
    if job.resized_otherwise:
        resized = ("native", "not square", "other") if job.family.name == "dinov3" else ("not square", "other")
        plain = {name: asked(job, model, pictures[name]) for name in resized}
    as_the_authors(job, model)
    wanted = {name: asked(job, model, images) for name, images in pictures.items()}
    spread = f"{float(wanted['native']['patches'].std()):.2f}"
    return wanted, plain, type(model).__name__, spread


def without_memory(job: Job) -> str:
    """What the meta device tells of a network that does not fit: it is recognised, and has as many parameters."""
    kind, facts = wanted_by(job)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **facts))
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = published.recognise(shapes, {"model_type": kind, **facts}, job.folder)
    assert (found.family.name, found.size) == (job.family.name, job.title), found
    assert not found.names.missing and not found.names.unexpected
    network = FAMILIES[job.family.network]
    with torch.device("meta"):
        hollow = network.network(network.config(**found.config))
    count, own = (sum(tensor.numel() for tensor in net.parameters()) for net in (model, hollow))
    assert count == own, (count, own)
    return f"{len(shapes)} names and shapes, {count:,} parameters"


def release() -> None:
    """Gives freed memory back to the machine."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def departures(family: published.Family) -> str:
    """What the configs say beside numbers of size that transformers' default config does not."""
    numbers = re.compile("size|num_hidden|num_att|depths|mlp_ratio|architectures|num_patches|num_channels|layer_type")
    found: dict[str, str] = {}
    for title, size in family.sizes.items():
        kind, facts = wanted_by(Job(family, title, size))
        default = transformers.AutoConfig.for_model(kind).to_dict()
        for name, value in facts.items():
            if not numbers.search(name) and default.get(name) != value:
                found.setdefault(f"`{name}` {value!r} (transformers' default {default.get(name)!r})", kind)
    return ", ".join(found) or "none"


def cost(job: Job) -> float:
    """Parameters by patches: what decides how long a row takes."""
    stride = job.size.patch if job.family.network == "vit" else 32
    return float(min(job.size.parameters, LARGEST) * (job.size.image_size / stride) ** 2)


def jobs() -> list[Job]:
    """Every published size."""
    return [
        Job(family, title, size) for family in published.families().values() for title, size in family.sizes.items()
    ]


def key_of(job: Job) -> tuple[str, str]:
    return job.family.name, job.title


def read_rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows that are there and were measured on this machine with these versions."""
    if not out.is_file() or machine() not in out.read_text(encoding="utf-8"):
        return {}
    rows = [
        line.strip().strip("|").split(" | ") for line in out.read_text(encoding="utf-8").splitlines() if "|" in line
    ]
    cells = [dict(zip(COLUMNS, map(str.strip, row), strict=True)) for row in rows if len(row) == len(COLUMNS)]
    return {
        (row["family"], row["size"]): row for row in cells if row["oracle"] not in ("oracle", "---", "not run here")
    }


def machine() -> str:
    """Where this was measured."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{platform.system()} {platform.machine()}, CPU, float32; {versions}"


def page(rows: Mapping[tuple[str, str], Mapping[str, str]], missing: str) -> str:
    """The whole of docs/parity.md."""
    lines = [INTRODUCTION.format(machine=machine(), rows=len(rows), sizes=len(jobs())), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for job in jobs():
        row = rows.get(key_of(job)) or {"oracle": "not run here", "native": f"({missing})"}
        whole = {"family": job.family.name, "size": job.title, "published as": ", ".join(job.size.names) or "-", **row}
        whole.setdefault("parameters", f"{job.size.parameters:,}")
        if job.family.name in OURS_ONLY and key_of(job) in rows:
            whole["oracle"] = f"{whole['oracle'].removesuffix(STANDS_IN)}{STANDS_IN}"
        lines.append(f"| {' | '.join(whole.get(column, '-') for column in COLUMNS)} |")
    lines += ["", "## Why an oracle is told to do as the authors do", ""]
    lines += [f"- **{name}**: transformers {reason}." for name, reason in UNPATCHED.items()]
    lines += ["", "## Where transformers has no such checkpoint", ""]
    lines += [f"- **{name}**: {reason}." for name, reason in OURS_ONLY.items()]
    lines += ["", "## What our pages make the oracle's config say, other than transformers' defaults", ""]
    lines += [f"- **{family.name}**: {departures(family)}" for family in published.families().values()]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Parity: every published size

Written by `python benchmarks/parity.py --out docs/parity.md`; {rows} of {sizes} published sizes measured.
{machine}.

A row is one published size: transformers' network is built from a config of that size, **every** tensor is drawn anew
(weights, biases, norms, scales, tokens, positions, statistics; none is constant), it writes itself with
`save_pretrained`, `saccade.load(folder)` reads that, and both look at the same random pictures. The draw is that of a
healthy network: matrices with a spread of 1/√inputs (√2 times that after a ReLU), norms 1 ± 0.3, layer scales 0.4 ±
0.2, biases ± 0.2, tokens ± 1, positions ± 0.5. A ResNet's statistics are those of what it sees, within a fifth, and the
last norm of each branch is scaled by 0.1. *Spread* is the standard deviation of the oracle's patches at the native
size: what a difference is to be judged against.

- *native*, *not square*, *other*: the largest absolute difference of class token / patches / pooled vector; the floor
  is 1e-4, the aim 1e-5. Not square is ¾ by 1¼ of the native side, other 1¼ of it (½ above 256 pixels).
- *unpatched*: the largest difference to transformers as it is, where the authors do something else (below).
- *mutations seen*: two tensors of one shape change places in the file that we read (norms, queries and keys, biases,
  scales, tokens, and each tensor of a block with the next block's): how many differ from the oracle by more than 1e-3.
  A key's bias is not exchanged with the next block's: the softmax takes it out.
- *namings there and back*: ours to theirs to ours and theirs to ours to theirs change no bit, in every naming that has
  the network. For more than 5e8 parameters in bfloat16.
- *way back*: `saccade.export(…, to="hf")`, loaded by transformers' AutoModel: the largest difference of class token,
  patches and pooled vector at the native size, and the network that it is.
- A network of more than 2e9 parameters does not fit: its names, shapes and number of parameters are compared on the
  meta device, and a narrow copy (width 256, 2 heads of 128, depth 4, the same switches) is measured."""


def one(job: Job, work: Path) -> dict[str, str]:
    """The row of a size, or of its narrow copy where it does not fit."""
    if job.size.parameters <= LARGEST:
        return measured(job, work)
    hollow = without_memory(job)
    narrow = replace(job.size, **NARROW)
    row = measured(Job(job.family, job.title, narrow, narrow=True), work)
    return row | {"oracle": f"{row['oracle']}: on the meta device {hollow}; figures of a narrow copy"}


def chosen(patterns: Iterable[str]) -> list[Job]:
    """Sizes that are asked for, small ones first."""
    called = {job.family.name + "/" + job.title: job for job in jobs()}
    wanted = [pattern if "/" in pattern else f"{pattern}/*" for pattern in patterns]
    return sorted((job for name, job in called.items() if any(fnmatch(name, p) for p in wanted)), key=cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["*"], help="patterns of FAMILY or FAMILY/SIZE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where folders are written")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="tables of other processes, to take rows from")
    parser.add_argument("--missing", default="not reached", help="why rows are missing")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(machine(), flush=True)
    start = time.monotonic()
    joined = {key: row for table in [arguments.out, *arguments.join] for key, row in read_rows(table).items()}
    arguments.out.write_text(page(joined, arguments.missing), encoding="utf-8")
    for job in chosen(arguments.families):
        if not arguments.again and key_of(job) in read_rows(arguments.out):
            continue
        if time.monotonic() - start > arguments.seconds:
            break
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="parity-") as work:
            try:
                row = one(job, Path(work))
            except (AssertionError, RuntimeError, ValueError, saccade.SaccadeError):  # the others go on
                print(*key_of(job), "FAILED", traceback.format_exc(), flush=True)
                continue
        release()
        rows = {**read_rows(arguments.out), key_of(job): row}
        arguments.out.write_text(page(rows, arguments.missing), encoding="utf-8")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(*key_of(job), f"{time.monotonic() - began:.0f} s, {peak:.1f} GiB", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

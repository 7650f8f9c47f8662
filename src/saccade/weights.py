"""Backbones on disk, ours and other projects', and the encoder that comes out of them.

Ours are safetensors with a config.json that says what they are; of others the names and shapes say it (`published`).
Nothing here runs what a file says: a pickle is read for its tensors and plain containers, or refused by name.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pickle
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from jaxtyping import Float, Shaped
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import published
from saccade.backbone import FAMILIES, Backbone, family_of
from saccade.decode import decode, pixels_of
from saccade.errors import SaccadeError, nearest
from saccade.published import Prepared, Recognised
from saccade.sources.files import read
from saccade.vit import Features, ViT, sincos

FORMAT = "saccade-backbone-1"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHARDS, BIN = f"{WEIGHTS}.index.json", "pytorch_model.bin"
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")
_LARGEST_HEADER = 100_000_000
_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLE_BELOW = 192


@dataclass(frozen=True)
class Preprocess:
    """A picture to what an encoder reads: short side to `resize` (antialiased), then the centre `crop`².

    `square`: both sides to `crop` instead, whatever the aspect.
    """

    resize: int
    crop: int
    channels: int = 3
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    square: bool = False

    @classmethod
    def at(cls, size: int, channels: int = 3) -> Preprocess:
        """The convention for a native size.

        From 192 pixels up: the 256 / 224 of the published families, which leaves out a margin of photographs. Below,
        the whole short side: small pictures (cells, icons, CIFAR) are framed tightly, and enlarging them to cut the
        enlargement off again loses their border.
        """
        return cls(size if size < _WHOLE_BELOW else round(size * 256 / 224), size, channels)

    @classmethod
    def of(cls, facts: Prepared, size: int, channels: int = 3) -> Preprocess:
        """As a published family does it, at any size."""
        resize = size if facts.square else round(size * facts.resize / facts.crop)
        return cls(resize, size, channels, facts.interpolation, facts.square)

    @property
    def canvas(self) -> int:
        """Short side to which decoding may shrink a picture: twice what is needed, so that antialiasing stays ours."""
        return 2 * self.resize

    def __call__(self, picture: Image.Image | str | Path | Shaped[Tensor, "*t c h w"]) -> Shaped[Tensor, "c s s"]:
        """The picture as uint8, or as float in [0, 1] where it has more than 8 bits.

        Takes a Pillow picture, a file, or pixels [C H W] (or [1 C H W], as a `Sample` has them). Raises `Unreadable`
        for a file that cannot be decoded.
        """
        if isinstance(picture, str | Path):
            pixels = decode(
                read(str(picture), str(picture)), key=str(picture), short_side=self.canvas, channels=self.channels
            )
        elif isinstance(picture, Image.Image):
            array = pixels_of(ImageOps.exif_transpose(picture), None, self.channels)
            pixels = torch.from_numpy(array).permute(2, 0, 1)
        else:
            pixels = picture
        pixels = pixels[0] if pixels.ndim == 4 else pixels
        if pixels.dtype == torch.uint16:
            pixels = pixels.to(torch.float32) / 65535
        if self.square:
            return _interpolated(pixels, [self.crop, self.crop], self.interpolation)
        whole = _centre(pixels, 4 * min(pixels.shape[1:]))
        return _centre(resized(whole, self.resize, self.interpolation), self.crop)


def _centre(pixels: Shaped[Tensor, "c h w"], side: int) -> Shaped[Tensor, "c _ _"]:
    """At most `side` pixels each way, from the middle."""
    height, width = pixels.shape[1:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def resized(pixels: Shaped[Tensor, "c h w"], short: int, interpolation: str = "bicubic") -> Shaped[Tensor, "c _ _"]:
    """The picture with this short side; the same memory where it has it already."""
    height, width = pixels.shape[1:]
    size = [max(short, round(side * short / min(height, width))) for side in (height, width)]
    return pixels if min(height, width) == short else _interpolated(pixels, size, interpolation)


def _interpolated(pixels: Shaped[Tensor, "c h w"], size: list[int], interpolation: str) -> Shaped[Tensor, "c _ _"]:
    out = F.interpolate(pixels[None], size=size, mode=interpolation, antialias=True, align_corners=False)[0]
    return out.clamp(0, 1) if pixels.is_floating_point() and pixels.amin() >= 0 and pixels.amax() <= 1 else out


class Encoder(nn.Module):
    """Pictures to `Features`: `Float[B C H W]` in [0, 1] or `UInt8[B C H W]`; normalisation happens inside.

    `preprocess` turns any one picture into what goes in; `record` says where the weights come from: family, size, mean,
    std, hash, licence, and which tensors matched, were missing or unexpected; `grid` how many patches there are along
    each axis of what `preprocess` makes.
    """

    def __init__(
        self,
        backbone: Backbone,
        record: dict[str, Any],
        image_size: int | None = None,
        preprocess: Preprocess | None = None,
    ):
        super().__init__()
        self.backbone, self.record = backbone, record
        size = backbone.config.image_size if image_size is None else image_size
        self.grid: tuple[int, ...] = backbone.config.model_copy(update={"image_size": size}).grid
        self.preprocess = preprocess or Preprocess.at(size, backbone.config.channels)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return next(self.parameters()).device

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Features:
        return self.backbone(images)

    def embedding(self, features: Features) -> Float[Tensor, "b d"]:
        """The one vector that this family pools."""
        return self.backbone.embedding(features)


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same network with fresh weights, which depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = FAMILIES[family_of(encoder.backbone)].network(encoder.backbone.config)
    record = {"family": "untrained", "seed": seed}
    return Encoder(fresh, record, encoder.preprocess.crop, encoder.preprocess).eval()


def save_backbone(directory: str | Path, backbone: Backbone, record: dict[str, Any]) -> None:
    """Writes model.safetensors and config.json, what `load` reads. `record`: recipe, arch, data, licence, …"""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / f"{WEIGHTS}.new"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}, new)
    config = {
        "format": FORMAT,
        family_of(backbone): backbone.config.model_dump(mode="json"),
        "weights": {"blake3": _hash(new), "bytes": new.stat().st_size},
        "record": record,
    }
    (directory / f"{CONFIG}.new").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(new, directory / WEIGHTS)
    os.replace(directory / f"{CONFIG}.new", directory / CONFIG)


def load(backbone: str | Path, *, image_size: int | None = None) -> Encoder:
    """The encoder of a run, a backbone folder, a transformers folder, a .safetensors or an official .pth, on the CPU.

    `image_size` is what `preprocess` makes, the native size if None. Terms of use that are not free are said on stderr.
    Raises `SaccadeError` for what does not exist, is damaged, holds more than tensors, or is no whole encoder.
    """
    folder, files = _find(backbone)
    config = _config(folder / CONFIG)
    if config.get("format") is None:
        return _load_published(Path(backbone).expanduser(), files, config, image_size)
    if config["format"] != FORMAT or not isinstance(config.get("weights"), dict):
        raise SaccadeError(
            f"{folder / CONFIG} has format {config['format']!r}, which this version does not know",
            path=folder / CONFIG,
            hint=f"it reads {FORMAT!r}; a newer saccade may have written it",
        )
    network = _empty(config, folder / CONFIG)
    tensors, digest = _read(files[0], config["weights"])
    _into(network, tensors, files[0])
    record = {
        "family": "saccade",
        **config.get("record", {}),
        "size": network.config.image_size,
        "mean": list(network.config.mean),
        "std": list(network.config.std),
        "hash": digest,
        "matched": len(tensors),
        "missing": [],
        "unexpected": [],
        "path": str(Path(backbone).absolute()),
    }
    return Encoder(network, {"licence": None, **record}, image_size).eval()


def _load_published(place: Path, files: list[Path], config: dict[str, Any], image_size: int | None) -> Encoder:
    """The encoder of another project's tensors. Raises `SaccadeError`, before any network is there."""
    tensors = {name: tensor for file in files for name, tensor in _tensors(file).items()}
    found = published.recognise(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, _called(place, config)
    )
    family, names = found.family, found.names
    _refuse_numbers({name: tensors[name] for name in tensors if name.startswith(names.prefix)}, place)
    ours = published.to_ours(family.namings[found.naming], tensors, names.prefix)
    network = _network(family.network, FAMILIES[family.network].config(**found.config))
    own = network.state_dict()
    tables = {name: own[name] for name, _ in network.named_buffers() if name in own}  # not in every naming: RoPE's
    _into(network, tables | ours, place)
    record = _record(found, network, len(ours)) | {"hash": _hash(*files), "path": str(place.absolute())}
    if family.terms:
        _say(f"saccade: {family.name} weights: {family.licence}, {family.terms}; {family.licence_url}")
    size = network.config.image_size if image_size is None else image_size
    preprocess = Preprocess.of(family.preprocess, size, network.config.channels)
    return Encoder(network, record, image_size, preprocess).eval()


def _record(found: Recognised, network: Backbone, matched: int) -> dict[str, Any]:
    """What is said of a published encoder; `size` is its native side in pixels, `arch` the published size's name."""
    family = found.family
    return {
        "family": family.name,
        "arch": found.size,
        "naming": found.naming,
        "size": network.config.image_size,
        "pooling": network.config.pooling,
        "mean": list(network.config.mean),
        "std": list(network.config.std),
        "licence": family.licence,
        "licence_url": family.licence_url,
        "terms": family.terms,
        "data": (found.size and family.sizes[found.size].data) or family.data,
        "matched": matched,
        "missing": [],
        "unexpected": [],
        "reshaped": sorted(name for ours, _, way in found.names.found if way is not published.SAME for name in ours),
        "ignored": found.names.ignored,
    }


@functools.cache
def _say(line: str) -> None:
    """To stderr, once a process, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _called(place: Path, config: dict[str, Any]) -> str:
    """What tells apart families of like tensors: the names of file and folder, and timm's own in config.json."""
    timm = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), dict) else {}
    said = [place.absolute().parent.name, place.name, config.get("architecture", ""), (timm or {}).get("tag", "")]
    return " ".join(str(word) for word in said if word)


def _refuse_numbers(tensors: Mapping[str, Tensor], place: Path) -> None:
    """Raises `SaccadeError` for tensors that are quantised, NaN or infinite, before anything is made of them."""
    strange = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype not in _READABLE]
    if strange:
        raise SaccadeError(
            f"{place} holds {str(tensors[strange[0]].dtype).removeprefix('torch.')} tensors ({strange[0]})",
            path=place,
            hint="quantised checkpoints cannot be loaded: take the float one",
        )
    wild = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if wild:
        listed = ", ".join(wild[:3]) + (", …" if len(wild) > 3 else "")
        raise SaccadeError(
            f"{place} has {len(wild)} tensors with NaN or infinite values: {listed}",
            path=place,
            hint="it was saved before it was whole (DINOv3's bias_mask is NaN until it is loaded); nothing was loaded",
        )


def _empty(config: dict[str, Any], path: Path) -> Backbone:
    """The network that a config.json describes, its weights not yet there."""
    family = next((name for name in FAMILIES if name in config), None)
    if family is None:
        raise SaccadeError(f"{path} describes no backbone of ours", path=path, hint=f"ours are: {', '.join(FAMILIES)}")
    try:
        settings = FAMILIES[family].config(**config[family])
    except (ValidationError, TypeError) as error:
        raise SaccadeError(f"{path} describes no backbone of ours: {str(error).splitlines()[0]}", path=path) from None
    return _network(family, settings)


def _network(family: str, settings: Any) -> Backbone:
    """A network whose buffers are filled and whose weights are not."""
    with torch.device("meta"):
        network = FAMILIES[family].network(settings)
    network.to_empty(device="cpu").reset_buffers()
    return network


_KEPT = (
    "heads", "eps", "activation", "qkv_bias", "layer_scale", "pre_norm", "patch_bias", "cls", "cls_position",
    "registers", "mean", "std", "position_offset", "position_antialias", "rope_rounded",
)  # fmt: skip
"""Switches that a published ViT keeps wherever its weights go on: with others they would be another function."""


def switches(encoder: Encoder) -> dict[str, Any]:
    """What a network must be built with, beside its architecture and size, to go on from a published encoder."""
    if encoder.record["family"] == "saccade" or not isinstance(encoder.backbone, ViT):
        return {}
    return {name: getattr(encoder.backbone.config, name) for name in _KEPT}


def load_state(network: Backbone, encoder: Encoder) -> dict[str, Any]:
    """Puts an encoder's weights into a network of the same shapes and returns the encoder's record (hash, licence, …).

    A ViT's learned position table of another size is resized. Raises `SaccadeError` when names or shapes differ.
    """
    theirs, tensors = encoder.backbone, encoder.backbone.state_dict()
    if isinstance(network, ViT) and isinstance(theirs, ViT):
        _fit(network, theirs, tensors)
    _into(network, tensors, Path(encoder.record["path"]))
    return encoder.record


def _fit(vit: ViT, theirs: ViT, tensors: dict[str, Tensor]) -> None:
    """The position table resized or left to the formula, and the mask token there or not, as the new ViT has them."""
    if vit.config.position == theirs.config.position == "learned" and vit.config.grid != theirs.config.grid:
        patches = theirs.position_table(vit.config.grid)
        assert patches is not None
        prefix = tensors["pos_embed"][:, : -math.prod(theirs.config.grid)]
        tensors["pos_embed"] = torch.cat([prefix, patches.detach()], dim=1)
    if vit.config.position.startswith("sincos") and theirs.config.position == "learned":
        table = sincos(theirs.config.grid, theirs.config.width, vit.config.position == "sincos").float()
        stored = tensors["pos_embed"][0]
        if torch.allclose(stored[-len(table) :], table, atol=1e-4) and not stored[: -len(table)].any():
            del tensors["pos_embed"]  # the very numbers that the formula gives
    if vit.mask_token is not None and theirs.mask_token is None:  # it has nothing to do with what was learned
        tensors["mask_token"] = vit.mask_token.detach()
    if vit.mask_token is None:
        tensors.pop("mask_token", None)


def _find(backbone: str | Path) -> tuple[Path, list[Path]]:
    """The folder with config.json, and the files of tensors."""
    place = Path(backbone).expanduser()
    if not place.exists():
        raise _no_such(str(backbone), place)
    if place.is_file():
        return place.parent, [place]
    for folder in (place / "backbone", place):
        if (folder / WEIGHTS).is_file():
            return folder, [folder / WEIGHTS]
    if (place / SHARDS).is_file():
        return place, _shards(place / SHARDS)
    if (place / CONFIG).is_file() and (place / BIN).is_file():
        return place, [place / BIN]
    if (place / "checkpoints").is_dir() or (place / "metrics.jsonl").is_file():
        raise SaccadeError(
            f"the run {place} has no backbone yet", path=place, hint="let it finish: the same command goes on"
        )
    others = sorted(path for path in place.iterdir() if path.suffix in (".safetensors", *_PICKLES))
    if others:
        raise SaccadeError(
            f"{place} has no {WEIGHTS}, but {others[0].name}", path=place, hint=f"name the file: {others[0]}"
        )
    raise SaccadeError(
        f"there is no backbone in {place}", path=place, hint=f"a run, or a folder with {WEIGHTS} and {CONFIG}"
    )


def _shards(path: Path) -> list[Path]:
    """The files that an index names, all beside it. Raises `SaccadeError`."""
    said = _json(path).get("weight_map")
    names = sorted({str(name) for name in said.values()}) if isinstance(said, dict) else []
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise SaccadeError(f"{path} names {name}, which is not there", path=path, hint="copy the whole folder")
    if not names:
        raise SaccadeError(f"{path} names no files", path=path)
    return [path.parent / name for name in names]


def _no_such(name: str, place: Path) -> SaccadeError:
    if os.sep not in name and not place.suffix:
        hint = "published names cannot be fetched yet; name a run, a folder or a file: .safetensors or an official .pth"
        return SaccadeError(f"there is no backbone {name!r} here", path=name, hint=hint)
    siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
    hint = nearest(place.name, siblings[:1000]) if 0 < len(siblings) <= 1000 else f"look at {place.parent}"
    return SaccadeError(f"there is no backbone {place}", path=place, hint=hint if len(hint) < 300 else None)


def _config(path: Path) -> dict[str, Any]:
    """What config.json says; nothing where there is none. Raises `SaccadeError`."""
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaccadeError(f"{path} cannot be read: {error}", path=path, hint="copy it again") from None
    if not isinstance(found, dict):
        raise SaccadeError(f"{path} is no JSON object", path=path, hint="copy it again")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, those in nested dictionaries by joined names. Raises `SaccadeError`."""
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _safe(path, start)
    try:
        # settings that some keep beside their tensors; and what torch warns of, the restricted reader refuses by itself
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start[:4] == b"PK\x03\x04")
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError) as error:
        raise _refused_pickle(path, f"{error}".strip()) from None
    if not isinstance(content, Mapping):
        raise SaccadeError(f"{path} holds a {type(content).__name__}, not tensors by name", path=path)
    return _flat(content)


def _flat(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors by joined names. A container that stands in several places, or in itself, is looked at once."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    seen = {id(content)}
    while waiting:
        before, inside = waiting.pop()
        for key, value in inside.items():
            if isinstance(value, Tensor) and value.layout == torch.strided:
                found[f"{before}{key}"] = value.detach()
            elif isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{before}{key}.", value))
    return found


def _refused_pickle(path: Path, reason: str) -> SaccadeError:
    """Why torch's restricted reader stopped, in one line: the name of what is neither tensor nor plain container."""
    words = reason.split()
    named = next((words[i + 1] for i, word in enumerate(words[:-1]) if word in ("GLOBAL", "global")), None)
    what = f"holds {named}, neither tensor nor plain container" if named else "the restricted reader cannot read"
    return SaccadeError(
        f"{path} is a pickle that {what}: nothing of it was run or loaded",
        path=path,
        hint="ask for safetensors, or for a file that holds the state dict alone",
    )


def _safe(path: Path, start: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `SaccadeError` for a pickle of that name and for a damaged file."""
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        raise SaccadeError(
            f"{path} is named safetensors but is a pickle, which can run code when it is opened: it was not",
            path=path,
            hint="ask for real safetensors; an official .pth is read under its own name",
        )
    header, size = int.from_bytes(start[:8], "little"), path.stat().st_size
    if len(start) < 8 or header > min(_LARGEST_HEADER, size - 8):
        raise SaccadeError(
            f"{path} is no safetensors file: it has {size} bytes and says that its header has {header}",
            path=path,
            hint="copy it again",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SaccadeError(
            f"{path} is no readable safetensors file: {' '.join(str(error).split())}", path=path, hint="copy it again"
        ) from None


def _read(path: Path, expected: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors and the hash of a file. Raises `SaccadeError` for a damaged file."""
    digest, hint = _hash(path), "copy it again, or take an older checkpoint of the run"
    if expected.get("blake3") not in (None, digest):
        size = path.stat().st_size
        what = (
            f"it has {size} bytes, not {expected.get('bytes')}"
            if size != expected.get("bytes")
            else "its hash is another"
        )
        raise SaccadeError(
            f"{path} is damaged or not the file that its {CONFIG} describes: {what}", path=path, hint=hint
        )
    return _tensors(path), digest


def _into(network: Backbone, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into a backbone. Raises `SaccadeError` when names or shapes differ."""
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = [
        f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    differences = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("reshaped", sorted(reshaped)))
        if names
    ]
    if differences:
        raise SaccadeError(
            f"{path} is a checkpoint of another architecture: {'; '.join(differences)}",
            path=path,
            hint="give the --arch and --image-size that it was trained with",
        )
    network.load_state_dict(tensors)


def _hash(*files: Path) -> str:
    """Of one file; of several, of their hashes."""
    each = [blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest() for path in files]
    return each[0] if len(each) == 1 else blake3("".join(each).encode()).hexdigest()

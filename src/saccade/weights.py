"""Backbones on disk: safetensors and a config.json that says what they are, and the encoder that comes out of them.

Nothing here opens a pickle: a checkpoint that can run code is recognised by its first bytes and refused.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from jaxtyping import Float, Shaped
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbone import FAMILIES, Backbone, family_of
from saccade.decode import decode, pixels_of
from saccade.errors import SaccadeError, nearest
from saccade.sources.files import read
from saccade.vit import Features, ViT

FORMAT = "saccade-backbone-1"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")
_WHOLE_BELOW = 192


@dataclass(frozen=True)
class Preprocess:
    """A picture to what an encoder reads: short side to `resize` (bicubic, antialiased), then the centre `crop`²."""

    resize: int
    crop: int
    channels: int = 3

    @classmethod
    def at(cls, size: int, channels: int = 3) -> Preprocess:
        """The convention for a native size.

        From 192 pixels up: the 256 / 224 of the published families, which leaves out a margin of photographs. Below,
        the whole short side: small pictures (cells, icons, CIFAR) are framed tightly, and enlarging them to cut the
        enlargement off again loses their border.
        """
        return cls(size if size < _WHOLE_BELOW else round(size * 256 / 224), size, channels)

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
        return _centre(resized(_centre(pixels, 4 * min(pixels.shape[1:])), self.resize), self.crop)


def _centre(pixels: Shaped[Tensor, "c h w"], side: int) -> Shaped[Tensor, "c _ _"]:
    """At most `side` pixels each way, from the middle."""
    height, width = pixels.shape[1:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def resized(pixels: Shaped[Tensor, "c h w"], short: int) -> Shaped[Tensor, "c _ _"]:
    """The picture with this short side; the same memory where it has it already."""
    height, width = pixels.shape[1:]
    if min(height, width) == short:
        return pixels
    size = [max(short, round(side * short / min(height, width))) for side in (height, width)]
    out = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    return out.clamp(0, 1) if pixels.is_floating_point() and pixels.amin() >= 0 and pixels.amax() <= 1 else out


class Encoder(nn.Module):
    """Pictures to `Features`: `Float[B C H W]` in [0, 1] or `UInt8[B C H W]`; normalisation happens inside.

    `preprocess` turns any one picture into what goes in; `record` says where the weights come from: family, size, mean,
    std, hash, licence, and which tensors matched, were missing or unexpected; `grid` how many patches there are along
    each axis of what `preprocess` makes.
    """

    def __init__(self, backbone: Backbone, record: dict[str, Any], image_size: int | None = None):
        super().__init__()
        self.backbone, self.record = backbone, record
        size = backbone.config.image_size if image_size is None else image_size
        self.grid: tuple[int, ...] = backbone.config.model_copy(update={"image_size": size}).grid
        self.preprocess = Preprocess.at(size, backbone.config.channels)

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
    return Encoder(fresh, {"family": "untrained", "seed": seed}, encoder.preprocess.crop).eval()


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
    """The encoder of a run directory, a backbone folder or a .safetensors file with its config.json beside, on the CPU.

    `image_size` is what `preprocess` makes, the native size if None. Raises `SaccadeError` for what does not exist, is
    a pickle, is damaged, or is of another architecture.
    """
    folder, path = _find(backbone)
    _refuse_pickle(path)
    config = _config(folder / CONFIG)
    network = _empty(config, folder / CONFIG)
    tensors, digest = _read(path, config["weights"])
    _into(network, tensors, path)
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


def _empty(config: dict[str, Any], path: Path) -> Backbone:
    """The network that a config.json describes, its weights not yet there."""
    family = next((name for name in FAMILIES if name in config), None)
    if family is None:
        raise SaccadeError(f"{path} describes no backbone of ours", path=path, hint=f"ours are: {', '.join(FAMILIES)}")
    try:
        settings = FAMILIES[family].config(**config[family])
    except (ValidationError, TypeError) as error:
        raise SaccadeError(f"{path} describes no backbone of ours: {str(error).splitlines()[0]}", path=path) from None
    with torch.device("meta"):
        network = FAMILIES[family].network(settings)
    network.to_empty(device="cpu").reset_buffers()
    return network


def load_state(network: Backbone, backbone: str | Path) -> dict[str, Any]:
    """Puts a backbone's weights into one of the same shapes and returns the backbone's record (hash, licence, …).

    A ViT's learned position table of another size is resized. Raises `SaccadeError` as `load` does.
    """
    encoder = load(backbone)
    theirs, tensors = encoder.backbone, encoder.backbone.state_dict()
    if isinstance(network, ViT) and isinstance(theirs, ViT):
        _fit(network, theirs, tensors)
    _into(network, tensors, Path(backbone))
    return encoder.record


def _fit(vit: ViT, theirs: ViT, tensors: dict[str, Tensor]) -> None:
    """The position table resized, and the mask token there or not, as the new ViT has them."""
    if vit.config.position == theirs.config.position == "learned" and vit.config.grid != theirs.config.grid:
        patches = theirs.position_table(vit.config.grid)
        assert patches is not None
        prefix = tensors["pos_embed"][:, : -math.prod(theirs.config.grid)]
        tensors["pos_embed"] = torch.cat([prefix, patches.detach()], dim=1)
    if vit.mask_token is not None and theirs.mask_token is None:  # it has nothing to do with what was learned
        tensors["mask_token"] = vit.mask_token.detach()
    if vit.mask_token is None:
        tensors.pop("mask_token", None)


def _find(backbone: str | Path) -> tuple[Path, Path]:
    """The folder with config.json, and the file of tensors."""
    place = Path(backbone).expanduser()
    if not place.exists():
        raise _no_such(str(backbone), place)
    if place.is_file():
        return place.parent, place
    for folder in (place / "backbone", place):
        if (folder / WEIGHTS).is_file():
            return folder, folder / WEIGHTS
    if (place / "checkpoints").is_dir() or (place / "metrics.jsonl").is_file():
        raise SaccadeError(
            f"the run {place} has no backbone yet", path=place, hint="let it finish: the same command goes on"
        )
    others = sorted(path for path in place.iterdir() if path.suffix in (".safetensors", *_PICKLES))
    if others:
        _refuse_pickle(others[0])
        raise SaccadeError(
            f"{place} has no {WEIGHTS}, but {others[0].name}", path=place, hint=f"name the file: {others[0]}"
        )
    raise SaccadeError(
        f"there is no backbone in {place}", path=place, hint=f"a run, or a folder with {WEIGHTS} and {CONFIG}"
    )


def _no_such(name: str, place: Path) -> SaccadeError:
    if os.sep not in name and not place.suffix:
        hint = "published names cannot be loaded yet; name a run directory, a backbone folder or a .safetensors file"
        return SaccadeError(f"there is no backbone {name!r} here", path=name, hint=hint)
    siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
    hint = nearest(place.name, siblings[:1000]) if 0 < len(siblings) <= 1000 else f"look at {place.parent}"
    return SaccadeError(f"there is no backbone {place}", path=place, hint=hint if len(hint) < 300 else None)


def _config(path: Path) -> dict[str, Any]:
    hint = "a run's backbone/ folder has one; published formats cannot be loaded yet"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SaccadeError(f"there is no {CONFIG} beside the weights in {path.parent}", path=path, hint=hint) from None
    except (OSError, ValueError) as error:
        raise SaccadeError(f"{path} cannot be read: {error}", path=path, hint=hint) from None
    if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("weights"), dict):
        raise SaccadeError(f"{path} is not a {CONFIG} of saccade", path=path, hint=hint)
    return config


def _refuse_pickle(path: Path) -> None:
    """By the first bytes, whatever the name says. Raises `SaccadeError`; nothing of the file is executed."""
    with path.open("rb") as file:
        start = file.read(16)
    pickled = start[:1] == b"\x80" and start[1:2] <= b"\x05"
    if pickled or start[:4] == b"PK\x03\x04" or (path.suffix in _PICKLES and start[8:9] != b"{"):
        kind = (
            "a zip of pickles (torch.save)" if start[:2] == b"PK" else "a pickle" if pickled else "a pickle by its name"
        )
        raise SaccadeError(
            f"{path} is {kind}, which can run code when it is opened: it was not",
            path=path,
            hint="ask for safetensors; or, where you trust the author, read it with torch.load(…, weights_only=True) "
            "and write the tensors with safetensors.torch.save_file",
        )


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
    try:
        return load_file(path), digest
    except (SafetensorError, OSError, ValueError) as error:
        raise SaccadeError(f"{path} is no readable safetensors file: {error}", path=path, hint=hint) from None


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


def _hash(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()

"""Backbones on disk, ours and other projects', and the encoder that comes out of them.

Ours are safetensors with a config.json that says what they are; of others the names and shapes say it (`published`).
Nothing here runs what a file says: a pickle is read for its tensors and plain containers, or refused by name.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from saccade import published, resize
from saccade.backbone import FAMILIES, Backbone, family_of
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError, nearest
from saccade.published import Prepared, Recognised
from saccade.resize import Other
from saccade.tensors import PICKLES, hash_of, read_tensors
from saccade.vit import ViT

FORMAT = "saccade-backbone-1"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ONNX = "model.onnx"
SHARDS, BIN = f"{WEIGHTS}.index.json", "pytorch_model.bin"
_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_backbone(directory: str | Path, backbone: Backbone, record: dict[str, Any]) -> None:
    """Writes model.safetensors and config.json, what `load` reads. `record`: recipe, arch, data, licence, …"""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / f"{WEIGHTS}.new"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}, new)
    config = {
        "format": FORMAT,
        family_of(backbone): backbone.config.model_dump(mode="json"),
        "weights": {"blake3": hash_of(new), "bytes": new.stat().st_size},
        "record": record,
    }
    (directory / f"{CONFIG}.new").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(new, directory / WEIGHTS)
    os.replace(directory / f"{CONFIG}.new", directory / CONFIG)


def load(
    backbone: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    bands: tuple[int, ...] | None = None,
    patch: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Encoder:
    """The encoder of a run, a folder (ours, transformers'), a .safetensors, an official .pth or a .onnx, on the CPU.

    `image_size` is what `preprocess` makes, the native size if None; `channels` and `patch` are others than the
    encoder was trained with (`resize` says how that is done). `bands`: which of `channels` are red, green and blue,
    from 0; the others are not looked at. `mean` and `std` normalise pixels instead of the encoder's own. Terms of use
    that are not free are said on stderr. Raises `SaccadeError` for what does not exist, is damaged, holds more than
    tensors, or is no whole encoder.
    """
    other = Other(channels, bands, patch, mean, std)
    folder, files = _find(backbone)
    if files[0].suffix == ".onnx":
        return _load_onnx(files[0], image_size, other)
    config = _config(folder / CONFIG)
    if config.get("format") is None:
        return _load_published(Path(backbone).expanduser(), files, config, image_size, other)
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
    return _finish(network, {"licence": None, **record}, image_size, other)


def _load_onnx(path: Path, image_size: int | None, other: Other) -> Encoder:
    """In torch where a file of others holds the weights of a family, else in onnxruntime."""
    from saccade.onnx import reading

    if not reading.weights_of_a_family(path):
        if other != Other():
            raise SaccadeError(
                f"{path} runs as it is: its channels, patches and normalisation cannot be changed", path=path,
                hint="load what it was written from",
            )  # fmt: skip
        return reading.load(path, image_size)
    encoder = _load_published(path, [path], {}, image_size, other)
    encoder.record["hash"] = hash_of(*reading.beside(path))
    if reading.exact_resizing(path) and isinstance(encoder.backbone, ViT):
        encoder.backbone.config = encoder.backbone.config.model_copy(update={"position_offset": 0.0})
    return encoder


def _load_published(
    place: Path, files: list[Path], config: dict[str, Any], image_size: int | None, other: Other
) -> Encoder:
    """The encoder of another project's tensors. Raises `SaccadeError`, before any network is there."""
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
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
    record = _record(found, network, len(ours)) | {"hash": hash_of(*files), "path": str(place.absolute())}
    if family.terms:
        _say(f"saccade: {family.name} weights: {family.licence}, {family.terms}; {family.licence_url}")
    return _finish(network, record, image_size, other, family.preprocess)


def _finish(
    network: Backbone, record: dict[str, Any], image_size: int | None, other: Other, prepared: Prepared | None = None
) -> Encoder:
    """The encoder of a network, or of another that it becomes. `prepared`: how a published family makes pictures."""
    before, config = network.config, resize.wanted(network.config, other, image_size)
    asked = other.asked()
    given = {name: tuple(asked[name]) for name in ("mean", "std") if name in asked}
    last = type(config)(**(config.model_dump(mode="python") | given))
    if last != before or other.bands is not None:
        changed = _network(family_of(network), last)
        tensors, own = resize.fitted(network, changed, config=config, bands=other.bands), network.state_dict()
        reshaped = [name for name, tensor in tensors.items() if name not in own or tensor.shape != own[name].shape]
        _into(changed, tensors, Path(record["path"]))
        network, facts = changed, {"size": last.image_size, "mean": list(last.mean), "std": list(last.std)}
        record = record | facts | {"asked": asked, "reshaped": sorted({*record.get("reshaped", []), *reshaped})}
    record |= resize.said(before, config, other, image_size)
    size, seen = config.image_size if image_size is None else image_size, config.channels
    preprocess = Preprocess.at(size, seen) if prepared is None else Preprocess.of(prepared, size, seen)
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
    network.to_empty(device="cpu")
    for _, buffer in network.named_buffers():
        buffer.zero_()  # what a file may leave out: how many batches a norm has seen
    network.reset_buffers()
    return network


_NUMBERS = (
    "width", "depth", "hidden", "patch", "patch_time", "image_size", "frames", "channels",
    "kind", "blocks", "widths", "stride",
)  # fmt: skip
_CHOSEN = (*_NUMBERS, "mask_token", "pooling", "init")
"""Numbers and sizes, which --arch and other settings say, and what a recipe decides."""


def switches(encoder: Encoder) -> dict[str, Any]:
    """What a network must be built with, beside its architecture and size, to go on from an encoder.

    With others it would be another function. A table of positions is not among it: a recipe may prefer the formula
    where the table holds just its numbers.
    """
    config = encoder.backbone.config.model_dump(mode="python")
    return {
        name: value
        for name, value in config.items()
        if name not in _CHOSEN and not (name == "position" and value == "learned")
    }


def load_state(network: Backbone, encoder: Encoder) -> dict[str, Any]:
    """Puts an encoder's weights into a network of its family and returns the encoder's record (hash, licence, …).

    Channels, patches and positions that are others are made to fit, recorded and said on stderr. Raises `SaccadeError`
    when names or shapes differ otherwise.
    """
    _into(network, resize.fitted(encoder.backbone, network), Path(encoder.record["path"]))
    found = resize.said(encoder.backbone.config, network.config)
    record = encoder.record | found
    for name in ("channels", "patch"):
        if name in record:
            what = record[name]
            _say(f"saccade: {record['path']}: {name} from {what['from']} to {what['to']}: {what['how']}")
    return record


def _find(backbone: str | Path) -> tuple[Path, list[Path]]:
    """The folder with config.json, and the files of tensors."""
    place = Path(backbone).expanduser()
    if not place.exists():
        raise _no_such(str(backbone), place)
    if place.is_file():
        return place.parent, [place]
    for folder in (place / "backbone", place):
        for name in (WEIGHTS, ONNX):
            if (folder / name).is_file():
                return folder, [folder / name]
    if (place / SHARDS).is_file():
        return place, _shards(place / SHARDS)
    if (place / CONFIG).is_file() and (place / BIN).is_file():
        return place, [place / BIN]
    if (place / "checkpoints").is_dir() or (place / "metrics.jsonl").is_file():
        raise SaccadeError(
            f"the run {place} has no backbone yet", path=place, hint="let it finish: the same command goes on"
        )
    others = sorted(path for path in place.iterdir() if path.suffix in (".safetensors", ".onnx", *PICKLES))
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


def _read(path: Path, expected: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors and the hash of a file. Raises `SaccadeError` for a damaged file."""
    digest, hint = hash_of(path), "copy it again, or take an older checkpoint of the run"
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
    return read_tensors(path), digest


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

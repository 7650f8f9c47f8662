"""Backbones on disk, ours and other projects', and the encoder that comes out of them.

Ours are safetensors with a config.json that says what they are; of others the names and shapes say it (`published`).
Nothing here runs what a file says: a pickle is read for its tensors and plain containers, or refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade import hub, naming, pairing, published, resize
from saccade.backbone import FAMILIES, Backbone, family_of
from saccade.checkpoint import config_of, find
from saccade.encoder import Encoder, Preprocess
from saccade.errors import SaccadeError, say
from saccade.hub import CONFIG, WEIGHTS
from saccade.own import Own, OwnConfig
from saccade.provenance import described, origins
from saccade.published import Prepared, Recognised
from saccade.resize import Other
from saccade.tensors import hash_of, read_tensors
from saccade.text import Pairing
from saccade.vit import ViT

FORMAT = "saccade-backbone-1"
EXPORTED = "saccade"
"""Where the config.json of an export says what the network is, beside what another library reads there."""
_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_backbone(
    directory: str | Path, backbone: Backbone, record: dict[str, Any], text: Pairing | None = None
) -> None:
    """Writes model.safetensors and config.json, what `load` reads, and in a folder `text` the text tower if any.

    `record`: recipe, arch, data, licence, …
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if text is not None:
        pairing.save(directory / pairing.FOLDER, text)
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
    revision: str | None = None,
    token: str | None = None,
    network: Own | nn.Module | None = None,
) -> Encoder:
    """The encoder of a run, a backbone folder, a transformers folder, a .safetensors, an official .pth, a .onnx or a
    published name, on the CPU.

    A name may pin a `revision` (`name@revision` is the same), and `token` stands before HF_TOKEN. `image_size` is what
    `preprocess` makes, the family's own if None; `channels` and `patch` are others than the encoder was trained with
    (`resize` says how that is done). `bands`: which of `channels` are red, green and blue, from 0; the others are not
    looked at. `mean` and `std` normalise pixels instead of the encoder's own. `network`: for a run of a network of your
    own, one of the same class, which is copied and given the weights. Terms of use that are not free are said
    on stderr; `encoder.record` says what it is (`provenance.KEYS`). Raises `SaccadeError` for what does not exist, is
    damaged, holds more than tensors, or is not whole.
    """
    other = Other(channels, bands, patch, mean, std)
    fetched = hub.find(backbone, revision, token)
    place, name = (backbone, None) if fetched is None else (fetched.folder, fetched.name)
    encoder = _load(place, name, image_size, other, network)
    if fetched is not None:
        path = f"{fetched.name}@{fetched.revision}"
        encoder.record |= {"name": fetched.name, "revision": fetched.revision, "sha256": fetched.sha256, "path": path}
    for origin in origins(encoder.record):
        if origin.get("terms"):
            own = "" if encoder.record["family"] != "saccade" else f"{backbone} derives from "
            named = f"{origin['licence']}, " if origin["licence"] not in (None, "unknown") else ""
            about = [f"{named}{origin['terms']}", *filter(None, [origin.get("licence_url")])]
            say(f"saccade: {own}{origin['family']} weights: {'; '.join(about)}")
    return encoder


def _load(
    backbone: str | Path, name: str | None, image_size: int | None, other: Other, own: Own | nn.Module | None
) -> Encoder:
    """The encoder of what lies on this disk; `name` is what it is published as."""
    folder, files = find(backbone)
    if files[0].suffix == ".onnx" and own is None:
        return _load_onnx(files[0], image_size, other)
    config = config_of(folder / CONFIG)
    if own is not None and "own" not in config:
        raise SaccadeError(
            f"{backbone} is no network of your own", path="network", hint="leave it out: it loads without"
        )
    if isinstance(config.get(EXPORTED), dict):
        return _load_exported(Path(backbone).expanduser(), files, config, image_size, other)
    if config.get("format") is None:
        place = Path(backbone).expanduser()
        return _load_published(place, files, config, image_size, other, _called(Path(name or place), config))
    if config["format"] != FORMAT or not isinstance(config.get("weights"), dict):
        raise SaccadeError(
            f"{folder / CONFIG} has format {config['format']!r}, which this version does not know",
            path=folder / CONFIG,
            hint=f"it reads {FORMAT!r}; a newer saccade may have written it",
        )
    network = (
        _own(config, folder / CONFIG, own, image_size, other) if "own" in config else _empty(config, folder / CONFIG)
    )
    tensors, digest = _read(files[0], config["weights"])
    into(network, tensors, files[0], *([f"give the {config['own']['network']} that it was made with"] if own else []))
    said = {"hash": digest, "matched": len(tensors), "path": str(Path(backbone).absolute())}
    record = described(network.config, **{"family": "saccade", **config.get("record", {}), **said})
    encoder = _finish(network, record, image_size, other)
    if (folder / pairing.FOLDER).is_dir():
        encoder.text, encoder.record["text"] = pairing.load(folder / pairing.FOLDER)
    return encoder


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
    encoder = _load_published(path, [path], {}, image_size, other, _called(path, {}))
    encoder.record["hash"] = hash_of(*reading.beside(path))
    if reading.exact_resizing(path) and isinstance(encoder.backbone, ViT):
        encoder.backbone.config = encoder.backbone.config.model_copy(update={"position_offset": 0.0})
    return encoder


def _load_published(
    place: Path, files: list[Path], config: dict[str, Any], image_size: int | None, other: Other, called: str
) -> Encoder:
    """The encoder of another project's tensors. Raises `SaccadeError`, before any network is there."""
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    found = published.recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, called)
    family, names = found.family, found.names
    refuse_numbers({name: tensors[name] for name in tensors if name.startswith(names.prefix)}, place)
    ours = published.to_ours(family.namings[found.naming], tensors, names.prefix)
    network = _network(family.network, FAMILIES[family.network].config(**found.config))
    own = network.state_dict()
    tables = {name: own[name] for name, _ in network.named_buffers() if name in own}  # not in every naming: RoPE's
    into(network, tables | ours, place)
    record = _record(found, network, hash=hash_of(*files), matched=len(ours), path=str(place.absolute()))
    encoder = _finish(network, record, image_size, other, family.preprocess)
    encoder.text, said = pairing.find(found, tensors, config, files[0].parent)
    if said is not None:
        encoder.record["text"] = said
    return encoder


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
        into(changed, tensors, Path(record["path"]))
        network, facts = changed, {"size": last.image_size, "mean": list(last.mean), "std": list(last.std)}
        record = record | facts | {"asked": asked, "reshaped": sorted({*record.get("reshaped", []), *reshaped})}
    record |= resize.said(before, config, other, image_size)
    usual = prepared.side if prepared is not None and prepared.side is not None else config.image_size
    size = usual if image_size is None else image_size
    preprocess = None if prepared is None else Preprocess.of(prepared, size, network.config.channels)
    return Encoder(network, record, size, preprocess).eval()


def _load_exported(
    place: Path, files: list[Path], config: dict[str, Any], image_size: int | None, other: Other
) -> Encoder:
    """The encoder of an export, also after another library trained it on. Raises `SaccadeError`."""
    said, path = config[EXPORTED], place / CONFIG
    try:
        kind, page, table = (str(said[name]) for name in ("network", "page", "naming"))
        settings, prepared = FAMILIES[kind].config(**said["config"]), Preprocess(**said["preprocess"])
        record = dict(said["record"])
    except (LookupError, TypeError, ValueError) as error:
        raise SaccadeError(
            f"{path} does not say what was exported: {str(error).splitlines()[0]}", path=path, hint="copy it again"
        ) from None
    _agrees(config, settings, path)
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    rules = naming.naming(page, table)
    names = max((published.sort(rules, tensors, prefix) for prefix in rules.prefixes), key=lambda one: one.matched)
    if names.missing or names.unexpected:
        raise SaccadeError(
            f"{place} is not what its {CONFIG} describes: {published.counts(names)}", path=place, hint="copy it again"
        )
    refuse_numbers(tensors, place)
    try:
        settings, ours = naming.unfold(settings, published.to_ours(rules, tensors, names.prefix))
    except (RuntimeError, ValueError, IndexError) as error:
        raise SaccadeError(f"{place} has tensors of other shapes: {error}", path=place, hint="copy it again") from None
    network = _network(kind, settings)
    own = network.state_dict()
    into(network, {name: own[name] for name in rules.optional if name in own} | ours, place)
    file = {"hash": hash_of(*files), "matched": len(ours), "ignored": names.ignored, "path": str(place.absolute())}
    record = described(network.config, **{**record, "naming": table, **file})
    facts = Prepared(prepared.resize, prepared.crop, prepared.interpolation, prepared.square)
    return _finish(network, record, prepared.crop if image_size is None else image_size, other, facts)


def _agrees(config: dict[str, Any], settings: Any, path: Path) -> None:
    """Raises `SaccadeError` where what transformers reads in a config.json was changed and what we read was not."""
    if "model_type" not in config:
        return
    facts = naming.transformers(settings, "").facts
    for name in ("hidden_act", "layer_norm_eps", "num_attention_heads"):
        if name in config and name in facts and config[name] != facts[name]:
            raise SaccadeError(
                f"{path} says {name} {config[name]!r}, but the network that was exported has {facts[name]!r}",
                path=path,
                hint=f"put it back, or take out the key {EXPORTED!r} if the network is another now",
            )


def _record(found: Recognised, network: Backbone, **file: Any) -> dict[str, Any]:
    """What is said of a published encoder. `prefix` stood before the names that were taken: which network of a file."""
    family = found.family
    return described(
        network.config,
        family=family.name,
        arch=found.size,
        naming=found.naming,
        prefix=found.names.prefix,
        licence=family.licence,
        licence_url=family.licence_url,
        terms=family.terms,
        data=(found.size and family.sizes[found.size].data) or family.data,
        reshaped=sorted(name for ours, _, way in found.names.found if way is not published.SAME for name in ours),
        ignored=found.names.ignored,
        preprocess=asdict(family.preprocess),
        **file,
    )


def _called(place: Path, config: dict[str, Any]) -> str:
    """What tells apart families of like tensors: the names of file and folder, and timm's own in config.json."""
    timm = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), dict) else {}
    said = [place.absolute().parent.name, place.name, config.get("architecture", ""), (timm or {}).get("tag", "")]
    return " ".join(str(word) for word in said if word)


def refuse_numbers(tensors: Mapping[str, Tensor], place: Path) -> None:
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


def _own(
    config: dict[str, Any], path: Path, given: Own | nn.Module | None, image_size: int | None, other: Other
) -> Backbone:
    """The user's own network that a config.json describes, in the module that was given. Raises `SaccadeError`."""
    try:
        settings = OwnConfig(**config["own"])
    except (ValidationError, TypeError) as error:
        raise SaccadeError(f"{path} describes no backbone of ours: {str(error).splitlines()[0]}", path=path) from None
    if given is None:
        raise SaccadeError(
            f"{path.parent} is of a network of the user's own, of the class {settings.network}", path=path,
            hint=f"in Python: saccade.load(…, network={settings.network}()), which evaluate and embed take",
        )  # fmt: skip
    if other != Other():
        raise SaccadeError(
            "a network of your own reads what it was made for", path=path, hint="it takes image_size alone"
        )
    return cast(Backbone, Own.of(given).again(settings, image_size))


def _network(family: str, settings: Any) -> Backbone:
    """A network whose buffers are filled and whose weights are not."""
    with torch.device("meta"):
        network = FAMILIES[family].network(settings)
    network.to_empty(device="cpu")
    for _, buffer in network.named_buffers():
        buffer.zero_()  # what a file may leave out: how many batches a norm has seen
    network.reset_buffers()
    return network


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


def into(
    network: Backbone,
    tensors: dict[str, Tensor],
    path: Path,
    hint: str = "give the --arch and --image-size that it was trained with",
) -> None:
    """Copies tensors into a backbone. Raises `SaccadeError` with this hint when names or shapes differ."""
    if unlike := differences(network.state_dict(), tensors):
        raise SaccadeError(
            f"{path} is a checkpoint of another architecture: {unlike}",
            path=path,
            hint=hint,
        )
    network.load_state_dict(tensors)


def differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Names and shapes that are not alike, counted; nothing where all are."""
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = [
        f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("reshaped", sorted(reshaped)))
        if names
    )

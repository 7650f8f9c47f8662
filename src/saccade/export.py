"""`saccade export`: an encoder as a folder that transformers, timm or onnxruntime reads, or as plain safetensors.

Everything is written beside the final name, loaded again by the library it is for where that is installed, and
compared; only what says the same features gets the name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade import __version__, card, naming, published, weights
from saccade.backbone import FAMILIES, family_of
from saccade.convnet import Convnet
from saccade.encoder import Encoder
from saccade.errors import SaccadeError
from saccade.naming import Target
from saccade.provenance import terms_of, travelling
from saccade.settings import ExportArguments, checked
from saccade.tensors import hash_of
from saccade.vit import ViTConfig

FARTHEST = 1e-4
"""The largest difference of a feature that an export may have."""
_PROCESSOR = "preprocessor_config.json"


class Written(NamedTuple):
    """What stands in a folder before it is checked: a file of weights, what a user must know, and who reads it."""

    weights: Path
    notes: tuple[str, ...]
    left_out: list[str]
    target: Target | None


def export(
    backbone: str | Path | Encoder, *, to: str, out: str | Path, int8: str | Path | None = None
) -> dict[str, Any]:
    """Writes an encoder for another library into a new folder and compares what that library makes of it.

    `to`: hf, timm, safetensors or onnx; `int8`: pictures among which an int8 copy must find the same neighbours.
    Returns `files`, `checked` (by whom, `max_abs_difference`), `int8`, the licence, and what was left out. Raises
    `SaccadeError` where no network there computes the same, features differ or neighbours change: then there is no
    folder.
    """
    given = str(backbone.record.get("path", "")) if isinstance(backbone, Encoder) else str(backbone)
    asked = {"backbone": given, "to": to, "out": str(out), "int8": None if int8 is None else str(int8)}
    arguments = checked(ExportArguments, asked, owner="export")
    place = Path(arguments.out).expanduser()
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise SaccadeError(f"{place} is there already", path=place, hint="name another --out, or remove it yourself")
    if arguments.to == "onnx" and not isinstance(backbone, Encoder) and (Path(given).expanduser() / "head").is_dir():
        return _export_model(arguments, place)
    encoder = backbone if isinstance(backbone, Encoder) else weights.load(backbone)
    if not isinstance(encoder.backbone.config, tuple(family.config for family in FAMILIES.values())):
        raise SaccadeError("this encoder is no network of saccade's, so it cannot be written as another's", path=given)
    with _beside(place) as folder:
        written = _WRITERS[arguments.to](encoder, folder)
        found = _check(encoder, folder, arguments.to, written)
        if not found["max_abs_difference"] <= FARTHEST:
            raise SaccadeError(
                f"{found['by']} makes other features of the export: they differ by {found['max_abs_difference']:.2g}",
                path=place,
                hint="nothing was kept; this is a fault of saccade's, please report it with the backbone's config.json",
                code=1,
            )
        notes = list(written.notes)
        if "unrounded" in found:
            notes.append(
                f"with its own periods the features differ by up to {found['unrounded']:.2g} at the native size"
            )
        if "without" in found:
            notes.append(f"{found['without']} was not there to read it: saccade alone has compared what is written")
        smaller = None
        if arguments.int8 is not None:
            smaller = importlib.import_module("saccade.onnx").quantise(folder, arguments.int8)
            notes.append(_int8_note(smaller))
        card.write(folder, encoder, arguments.to, place.name, hash_of(written.weights), notes)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    terms = terms_of(encoder.record)
    return {
        "out": str(place),
        "to": arguments.to,
        "architecture": written.target and written.target.architecture,
        "files": names,
        "checked": found,
        "int8": smaller,
        "licence": terms["licence"],
        "terms": terms["terms"],
        "left_out": written.left_out,
        "notes": notes,
    }


def _export_model(arguments: ExportArguments, place: Path) -> dict[str, Any]:
    """A run of `saccade finetune` as one graph: pictures in, answers out."""
    if arguments.int8 is not None:
        raise SaccadeError(
            "a head is not written in int8", path="--int8", hint=f"for the encoder alone: {arguments.backbone}/backbone"
        )
    exporting = importlib.import_module("saccade.finetune.exporting")
    with _beside(place) as folder:
        model, found = exporting.write(arguments.backbone, folder)
        if not found["max_abs_difference"] <= FARTHEST:
            raise SaccadeError(
                f"{found['by']} gives other answers: they differ by {found['max_abs_difference']:.2g}",
                path=place,
                hint="nothing was kept; this is a fault of saccade's, please report it",
                code=1,
            )
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    terms = terms_of(model.encoder.record)
    return {
        "out": str(place), "to": "onnx", "task": model.task.name, "outputs": list(model.head.answers), "files": names,
        "checked": found, "licence": terms["licence"], "terms": terms["terms"],
    }  # fmt: skip


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A folder that gets its name when all is done, and is gone when it is not."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SaccadeError(f"{place} cannot be made: {reason}", path=place, hint="name another --out") from None
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for path in (folder, *folder.rglob("*")):  # made for one user alone, by tempfile and by safetensors
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        os.rename(folder, place)  # onto nothing, or an empty folder: else it fails
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_hf(encoder: Encoder, folder: Path) -> Written:
    """What AutoModel and AutoImageProcessor read."""
    config = encoder.backbone.config
    target = naming.transformers(config, str(encoder.record["family"]))
    facts = {"model_type": target.architecture, **target.facts, "dtype": "float32"}
    (folder / _PROCESSOR).write_text(_json(_processor(encoder)), encoding="utf-8")
    return _write(encoder, folder, target, facts, naming.fold(target, encoder.backbone.config, _state(encoder)))


def _write_timm(encoder: Encoder, folder: Path) -> Written:
    """What `timm.create_model("local-dir:…")` reads."""
    record, config = encoder.record, encoder.backbone.config
    size = record.get("arch")
    target = naming.timm(config, str(record["family"]), None if size is None else str(size))
    facts = {
        "architecture": target.architecture,
        "num_classes": 0,
        "num_features": config.width,
        "pretrained_cfg": _pretrained(encoder),
        **target.facts,
    }
    return _write(encoder, folder, target, facts, naming.fold(target, encoder.backbone.config, _state(encoder)))


def _write_safetensors(encoder: Encoder, folder: Path) -> Written:
    """The names that a family is known by, its authors' where they are known; a run's are ours."""
    known = published.families().get(str(encoder.record["family"]))
    if known is None:
        weights.save_backbone(folder, encoder.backbone, travelling(encoder.record))
        return Written(folder / weights.WEIGHTS, (), [], None)
    target = Target(known.name, known.name, next(iter(known.namings)), {})
    return _write(encoder, folder, target, {}, _state(encoder))


def _write_onnx(encoder: Encoder, folder: Path) -> Written:
    files = importlib.import_module("saccade.onnx").write(encoder, folder)
    return Written(files[0], (), [], None)


def _int8_note(found: Mapping[str, Any]) -> str:
    speed = found["images_per_second"]["ratio"]
    return (
        f"the int8 copy finds {100 * found['overlap']:.1f} % of the 10 nearest neighbours that float32 finds, the same"
        f" nearest one in {100 * found['top1']:.1f} %, at {speed:.2f} times its speed on the machine that wrote it;"
        f" float32 in it beside the patch embedding: {found['kept']}"
    )


_WRITERS = {"hf": _write_hf, "timm": _write_timm, "safetensors": _write_safetensors, "onnx": _write_onnx}


def _state(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in encoder.backbone.state_dict().items()}


def _write(
    encoder: Encoder, folder: Path, target: Target, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Written:
    """Weights under the target's names, and config.json with its facts and ours."""
    config, rules = encoder.backbone.config, naming.naming(target.page, target.naming)
    unsaid = encoder.backbone.state_dict().keys() - tensors.keys() | published.without_name(rules, tensors)
    left_out = sorted(unsaid - {"rope_embed.periods"})
    theirs = published.to_theirs(rules, tensors, rules.prefixes[0]) | naming.dense(target)
    path = folder / weights.WEIGHTS
    save_file({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, path, metadata={"format": "pt"})
    prepare = encoder.preprocess
    ours = {
        "network": family_of(encoder.backbone),
        "page": target.page,
        "naming": target.naming,
        "config": config.model_dump(mode="json"),
        "preprocess": {name: getattr(prepare, name) for name in prepare.__dataclass_fields__},
        "record": travelling(encoder.record),
        "version": __version__,
    }
    (folder / weights.CONFIG).write_text(_json({**facts, weights.EXPORTED: ours}), encoding="utf-8")
    return Written(path, target.notes, left_out, target)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _processor(encoder: Encoder) -> dict[str, Any]:
    """How a picture is prepared, as transformers says it."""
    prepare, config = encoder.preprocess, encoder.backbone.config
    square = {"height": prepare.crop, "width": prepare.crop}
    return {
        "image_processor_type": "ViTImageProcessor" if prepare.square else "BitImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True,
        "size": square if prepare.square else {"shortest_edge": prepare.resize},
        "resample": {"bilinear": 2, "bicubic": 3}[prepare.interpolation],
        "do_center_crop": not prepare.square,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def _pretrained(encoder: Encoder) -> dict[str, Any]:
    """How a picture is prepared, and what else timm wants to know."""
    prepare, config = encoder.preprocess, encoder.backbone.config
    return {
        "tag": "saccade",
        "custom_load": False,
        "input_size": [config.channels, prepare.crop, prepare.crop],
        "fixed_input_size": False,
        "interpolation": prepare.interpolation,
        "crop_pct": 1.0 if prepare.square else prepare.crop / prepare.resize,
        "crop_mode": "squash" if prepare.square else "center",
        "mean": list(config.mean),
        "std": list(config.std),
        "num_classes": 0,
        "license": terms_of(encoder.record)["licence"],
    }


def _check(encoder: Encoder, folder: Path, to: str, written: Written) -> dict[str, Any]:
    """The largest difference of features between the encoder and what reads the folder, at the native size."""
    if to == "onnx":
        difference = importlib.import_module("saccade.onnx").check(encoder, folder)
        return {"by": _version("onnxruntime"), "max_abs_difference": difference}
    library = {"hf": "transformers", "timm": "timm"}.get(to)
    target = written.target
    ours = _by_saccade(encoder, folder)
    if library is None or target is None:
        return {"by": "saccade", "max_abs_difference": ours}
    if importlib.util.find_spec(library) is None:
        return {"by": "saccade", "max_abs_difference": ours, "without": library}
    pictures = _pictures(encoder)
    wanted = _features(encoder, pictures)
    normed = encoder.backbone.normalise(pictures)
    if library == "transformers":
        found, plain = _by_transformers(encoder, folder, target, normed)
    else:
        found, plain = _by_timm(encoder, folder, normed)
    checked = {"by": _version(library), "max_abs_difference": max(ours, _farthest(wanted, found))}
    return checked if plain is None else {**checked, "unrounded": _farthest(wanted, plain)}


def _version(library: str) -> str:
    return f"{library} {importlib.metadata.version(library)}"


def _pictures(encoder: Encoder) -> Tensor:
    config: Any = encoder.backbone.config
    time = [config.frames] if getattr(config, "patch_time", None) else []
    shape = (2, *time, config.channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _features(encoder: Encoder, pictures: Tensor) -> dict[str, Tensor]:
    """Class token and registers where there are any, patches, and the one vector."""
    with torch.inference_mode():
        features = encoder(pictures)
        found = {"patches": features.patches, "pooled": encoder.embedding(features)}
    if features.cls is not None:
        found |= {"cls": features.cls, "registers": features.registers}
    return found


def _farthest(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest difference; NaN where there is one. Of what both say."""
    apart = [(wanted[name] - found[name]).abs() for name in wanted if name in found and wanted[name].numel()]
    return float(torch.stack([part.max() for part in apart]).max())


def _by_saccade(encoder: Encoder, folder: Path) -> float:
    pictures = _pictures(encoder)
    return _farthest(_features(encoder, pictures), _features(weights.load(folder), pictures))


def _by_transformers(
    encoder: Encoder, folder: Path, target: Target, images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """What AutoModel makes of it; where RoPE's periods are rounded, with rounded ones and with its own."""
    library: Any = importlib.import_module("transformers")  # asked where it is installed: neither it nor timm is needed
    model, loaded = library.AutoModel.from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: names for kind, names in loaded.items() if names}:
        raise SaccadeError(f"transformers does not load the export whole: {wrong}", path=folder, code=1)
    model.eval()
    if not _rounded(encoder):
        return _said_by_transformers(encoder, model, target, images), None
    plain = _said_by_transformers(encoder, model, target, images)
    model.rope_embeddings.inv_freq = 1 / (1 / model.rope_embeddings.inv_freq).bfloat16().float()
    return _said_by_transformers(encoder, model, target, images), plain


def _rounded(encoder: Encoder) -> bool:
    config = encoder.backbone.config
    return isinstance(config, ViTConfig) and config.position == "rope" and config.rope_rounded


def _said_by_transformers(encoder: Encoder, model: Any, target: Target, images: Tensor) -> dict[str, Tensor]:
    count = torch.Size(encoder.backbone.config.grid).numel()
    rising = {"noise": torch.arange(count).float().expand(len(images), -1)} if target.architecture == "vit_mae" else {}
    with torch.inference_mode():
        output = model(images, **rising)
        tokens = output.last_hidden_state
        if target.architecture == "clip_vision_model":
            tokens = model.post_layernorm(tokens)
    if target.architecture == "resnet":
        return {"patches": tokens.flatten(2).transpose(1, 2), "pooled": output.pooler_output.flatten(1)}
    more = target.architecture == "dinov3_convnext" and not encoder.backbone.config.cls  # the mean, normed after
    found = _split(encoder, tokens[:, 1:] if more else tokens)
    if encoder.backbone.config.pooling != "mean" and target.architecture != "vit_mae":
        found["pooled"] = output.pooler_output
    return found


def _by_timm(encoder: Encoder, folder: Path, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """What timm makes of it; where RoPE's periods are rounded, with rounded ones and with its own."""
    library: Any = importlib.import_module("timm")
    model = library.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def said() -> dict[str, Tensor]:
        with torch.inference_mode():
            tokens = model.forward_features(images)
            pooled = model.forward_head(tokens, pre_logits=True)
            if not isinstance(encoder.backbone, Convnet):
                return {**_split(encoder, tokens), "pooled": pooled}
            cells = model.head.norm(tokens) if encoder.backbone.config.cls else tokens
        return {"patches": cells.flatten(2).transpose(1, 2), "pooled": pooled}

    plain = said()
    if not _rounded(encoder):
        return plain, None
    model.rope.periods.copy_(model.rope.periods.bfloat16())
    return said(), plain


def _split(encoder: Encoder, tokens: Tensor) -> dict[str, Tensor]:
    """All tokens of another library by what they are; its order is ours."""
    count = torch.Size(encoder.backbone.config.grid).numel()
    prefix, patches = tokens[:, : tokens.shape[1] - count], tokens[:, tokens.shape[1] - count :]
    found = {"patches": patches}
    if encoder.backbone.config.cls:
        found |= {"cls": prefix[:, 0], "registers": prefix[:, 1:]}
    pooling = encoder.backbone.config.pooling
    if pooling == "mean":
        found["pooled"] = patches.mean(1)
    elif pooling == "cls":
        found["pooled"] = found["cls"]
    return found

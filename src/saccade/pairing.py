"""Text towers on disk: those in other projects' files beside an image tower, and those of runs.

A text tower that is not whole does not keep an image tower from being loaded: the record says why it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from saccade import published
from saccade.checkpoint import config_of
from saccade.errors import SaccadeError
from saccade.hub import CONFIG, WEIGHTS
from saccade.published import Recognised, Shapes, Sorted, Tensors
from saccade.published.clip import activation
from saccade.published.texts import TOWERS, Texts
from saccade.tensors import hash_of, read_tensors
from saccade.text import Pairing, TextConfig, TextEncoder
from saccade.tokenizer import FILES, Tokenizer

FOLDER = "text"
"""Where it lies in the folder of a run's backbone."""
FORMAT = "saccade-text-1"


def find(
    found: Recognised, tensors: Tensors, config: Mapping[str, Any], folder: Path
) -> tuple[Pairing | None, dict[str, Any] | None]:
    """The text tower in a published file and what the record says of it; neither where there is none.

    `folder` may hold its tokenizer. Raises `SaccadeError` for a tokenizer that is damaged or of other weights.
    """
    texts = TOWERS.get(found.family.name)
    if texts is None:
        return None, None
    name, names = _nearest(texts, tensors)
    if not any(ours.startswith("tower.") for named, *_ in names.found for ours in named):
        return None, None
    naming = texts.namings[name]
    said: dict[str, Any] = {"naming": name, "matched": names.matched, "missing": [], "unexpected": []}
    try:
        ours = published.to_ours(naming, tensors, names.prefix)
        shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
        settings = TextConfig(**_switches(texts, shapes, config, found.config))
        pairing = _hollow(settings, shapes)
    except (SaccadeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        return None, {**said, "refused": str(error).splitlines()[0]}
    wanted = {key: tuple(tensor.shape) for key, tensor in pairing.state_dict().items()}
    lacking = {key for key in wanted if shapes.get(key) != wanted[key]}
    further = {key for key in shapes if key not in wanted}
    said |= {"missing": sorted({*names.missing, *lacking}), "unexpected": sorted({*names.unexpected, *further})}
    if said["missing"] or said["unexpected"]:
        return None, {**said, "refused": "it is not whole"}
    if wild := [key for key, tensor in ours.items() if not torch.isfinite(tensor).all()]:
        return None, {**said, "refused": f"{wild[0]} has NaN or infinite values"}
    pairing = _filled(pairing, ours)
    pairing.tokenizer, said["tokenizer"] = _tokenizer(folder, settings, found.family.name)
    if pairing.tokenizer is not None and settings.pooling == "last":
        words = {"begin": pairing.tokenizer.begin, "end": pairing.tokenizer.end, "pad": pairing.tokenizer.pad}
        pairing.tower.config = settings.model_copy(update=words)
    return pairing, {**said, **pairing.tower.config.model_dump(mode="json")}


def save(folder: Path, pairing: Pairing) -> None:
    """Writes model.safetensors, config.json and the tokenizer, what `load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().cpu().contiguous() for name, x in pairing.state_dict().items()}, folder / WEIGHTS)
    if pairing.tokenizer is not None:
        pairing.tokenizer.save(folder)
    facts = {"format": FORMAT, FOLDER: pairing.tower.config.model_dump(mode="json")}
    facts["weights"] = {"blake3": hash_of(folder / WEIGHTS)}
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Pairing, dict[str, Any]]:
    """What `save` wrote, and what the record says of it. Raises `SaccadeError` for what is damaged."""
    path, facts = folder / CONFIG, config_of(folder / CONFIG)
    try:
        known = facts["format"] == FORMAT
        settings, hash_said = TextConfig(**facts[FOLDER]), facts["weights"]["blake3"]
    except (LookupError, TypeError, ValidationError) as error:
        raise SaccadeError(f"{path} describes no text tower: {error}", path=path, hint="copy it again") from None
    if not known:
        raise SaccadeError(f"{path} has format {facts['format']!r}, which this version does not know", path=path)
    if not (folder / WEIGHTS).is_file() or hash_of(folder / WEIGHTS) != hash_said:
        raise SaccadeError(
            f"{folder / WEIGHTS} is damaged or not the file that its {CONFIG} describes", path=folder / WEIGHTS,
            hint="copy the whole folder again",
        )  # fmt: skip
    tensors = read_tensors(folder / WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    pairing = _hollow(settings, shapes)
    wanted = {name: tuple(tensor.shape) for name, tensor in pairing.state_dict().items()}
    if wanted != shapes:
        unlike = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise SaccadeError(f"{folder} is not what its {CONFIG} describes: {', '.join(unlike[:3])}", path=folder)
    pairing = _filled(pairing, tensors)
    pairing.tokenizer, said = _tokenizer(folder, settings, "saccade")
    record = {
        "naming": "saccade",
        "hash": hash_said,
        "matched": len(tensors),
        "missing": [],
        "unexpected": [],
        "tokenizer": said,
    }
    return pairing, {**record, **settings.model_dump(mode="json")}


def _nearest(texts: Texts, tensors: Tensors) -> tuple[str, Sorted]:
    """The naming that explains most of a file's names."""
    ways = [
        (name, published.sort(naming, published.unstacked(naming, tensors), prefix))
        for name, naming in texts.namings.items()
        for prefix in naming.prefixes
    ]
    return max(ways, key=lambda way: (way[1].matched, -len(way[1].unexpected)))


def _switches(texts: Texts, shapes: Shapes, config: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a text tower: of tensors, a config.json of transformers, and the family. Raises `LookupError`."""
    said = dict(config.get("text_config") or {})
    vocabulary, width = shapes["tower.token_embed.weight"]
    depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("tower.blocks."))
    if "model_type" not in config and "activation" in image:  # others' CLIPs were trained with the exact GELU
        said.setdefault("activation", image["activation"])
    switches = {**texts.switches, **({"activation": said["activation"]} if "activation" in said else {})}
    end = 1
    if switches["pooling"] == "end":
        end = said.get("eos_token_id", 2)
        end = vocabulary - 1 if end == 2 else end
    return {
        **switches,
        **activation({"hidden_act": said["hidden_act"]} if "hidden_act" in said else {}),
        **({"eps": said["layer_norm_eps"]} if "layer_norm_eps" in said else {}),
        "width": width,
        "depth": depth,
        "heads": said.get("num_attention_heads") or texts.heads.get(width, max(1, width // 64)),
        "hidden": shapes["tower.blocks.0.mlp.fc1.weight"][0],
        "vocabulary": vocabulary,
        "length": shapes["tower.pos_embed"][1],
        "projection": shapes["tower.head.weight"][0],
        "end": end,
        "pad": end,
    }


def _hollow(settings: TextConfig, shapes: Shapes) -> Pairing:
    """A pairing that holds nothing."""
    width = shapes["projection.weight"][1] if "projection.weight" in shapes else None
    with torch.device("meta"):
        return Pairing(TextEncoder(settings), None, width, "logit_bias" in shapes)


def _filled(pairing: Pairing, tensors: Tensors) -> Pairing:
    pairing.to_empty(device="cpu")
    pairing.load_state_dict(dict(tensors))
    return pairing.eval()


def _tokenizer(folder: Path, settings: TextConfig, family: str) -> tuple[Tokenizer | None, dict[str, Any] | None]:
    """The tokenizer that lies beside weights, and what is said of it.

    Raises `SaccadeError` where it is damaged or does not fit; not where the library that reads it is missing.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None, None
    try:
        tokenizer = Tokenizer.load(folder, "clip" if family == "clip" else None)
    except SaccadeError as error:
        if error.path == "tokenizers":
            return None, {"refused": str(error)}
        raise
    tokenizer.fits(settings.vocabulary, folder)
    if settings.pooling == "end" and tokenizer.end != settings.end:
        raise SaccadeError(
            f"the tokenizer {tokenizer.place} ends a text with token {tokenizer.end}, the weights in {folder} with "
            f"{settings.end}",
            path=tokenizer.place,
            hint="is it the one that lies beside these weights?",
        )
    return tokenizer, tokenizer.record

"""What a run begins with: an encoder's weights put into a network of its family, and the decoder that lay beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade import hub, published, resize, weights
from saccade.backbone import FAMILIES, Backbone, family_of, known
from saccade.checkpoint import config_of, find
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, say
from saccade.frozen import Kept
from saccade.hub import CONFIG
from saccade.provenance import origins
from saccade.recipe import Recipe, Training, configure
from saccade.run import Run
from saccade.settings import BACKBONE, PretrainArguments
from saccade.tensors import read_tensors
from saccade.vit import Attention, sincos
from saccade.weights import differences, into, refuse_numbers


def configured(recipe: str, settings: Mapping[str, Any], arguments: PretrainArguments) -> tuple[Recipe, Training]:
    """The recipe and its config; one that keeps its start has it on its page, and its architecture and sizes.

    A published name means the commit that the run began with. Raises `SaccadeError` where a start is missing.
    """
    page, config = configure(recipe, settings, also=PretrainArguments.model_fields)
    if not config.keeps_start() or page.network is not None:
        return page, config
    began = Run(Path(arguments.out).expanduser()).record.get("initial", {})
    path = began["path"] if "revision" in began else arguments.init
    if path is None:
        raise SaccadeError(
            f"recipe {page.name} leaves a backbone as it is, and needs one", path="--init", hint=BACKBONE
        )
    encoder = weights.load(path, image_size=settings.get("image_size"), channels=settings.get("channels"))
    if not known(encoder.backbone):
        raise SaccadeError(
            f"{path} runs as it is, for inference only", path="--init", hint="take the weights themselves"
        )
    facts = {"arch": encoder.record.get("arch") or family_of(encoder.backbone), "image_size": encoder.preprocess.crop}
    facts["channels"] = encoder.backbone.config.channels
    if settings.get("arch", facts["arch"]) != facts["arch"]:
        raise SaccadeError(f"{path} is {facts['arch']}", path="--arch", hint="leave it out: --init says it")
    sized = {**encoder.backbone.config.model_dump(mode="python"), "image_size": facts["image_size"]}
    network = FAMILIES[family_of(encoder.backbone)].network(type(encoder.backbone.config)(**sized))
    record = load_state(network, encoder) | {"derived_from": origins(encoder.record)}
    return replace(page, network=Kept(network, record)), config.model_copy(update=facts)


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
    size = str(encoder.record.get("arch") or "")
    hint = f"it is {size}: give --arch and --image-size to match" if size else "give the --arch that it was made with"
    into(network, resize.fitted(encoder.backbone, network), Path(encoder.record["path"]), hint)
    found = resize.said(encoder.backbone.config, network.config)
    record = encoder.record | found
    for name in ("channels", "patch"):
        if name in record:
            what = record[name]
            say(f"saccade: {record['path']}: {name} from {what['from']} to {what['to']}: {what['how']}")
    return record


def load_decoder(method: nn.Module, backbone: nn.Module, encoder: Encoder) -> dict[str, Any]:
    """Gives a method the decoder that stands beside a published encoder, if it has such a one; returns what to record.

    Where the method has another one, that starts afresh, and stderr says why. Raises `SaccadeError` for NaN in it.
    """
    family = published.families().get(encoder.record["family"])
    inside = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    own = {name: tensor for name, tensor in method.state_dict(keep_vars=True).items() if id(tensor) not in inside}
    if family is None or family.decoder is None or not own:
        return {}
    fetched = hub.find(encoder.record["path"], None, None)
    folder, files = find(encoder.record["path"] if fetched is None else fetched.folder)
    decoder, place = family.decoder, Path(encoder.record["path"])
    tensors = published.decoder_of(decoder, {key: x for file in files for key, x in read_tensors(file).items()})
    if not own.keys() & tensors.keys():
        return {}
    refuse_numbers(tensors, place)
    heads = config_of(folder / CONFIG).get(decoder.heads_key, decoder.heads)
    ours = {
        part.heads
        for part in method.modules()
        if isinstance(part, Attention) and id(next(part.qkv.parameters())) not in inside
    }
    table = tensors.pop(decoder.positions, None)
    reason = differences(own, tensors) or (f"it has {heads} heads" if ours != {heads} else "")
    if not reason and table is not None and not _fixed(table):
        reason = "its positions are not the fixed ones"
    if reason:
        say(f"saccade: {place} has a decoder that is not this recipe's, which starts afresh: {reason}")
        return {"decoder": {"matched": 0, "reason": reason}}
    method.load_state_dict(tensors, strict=False)
    say(f"saccade: goes on with the decoder of {place}; {decoder.note}")
    return {"decoder": {"matched": len(tensors), "note": decoder.note}}


def _fixed(table: Tensor) -> bool:
    """Whether a table [1 1+N D] holds the numbers of the formula, and none for the class token."""
    side = math.isqrt(table.shape[1] - 1)
    formula = sincos((side, side), table.shape[2]).float()
    return (
        len(formula) == table.shape[1] - 1
        and not table[:, 0].any()
        and torch.allclose(table[0, 1:], formula, atol=1e-4)
    )

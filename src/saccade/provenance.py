"""What `encoder.record` says: where weights come from, how they were read, and the licence and terms that travel along.

Every way in (a run, an export, a published file, a graph for onnxruntime) fills all of `KEYS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEYS = {
    "family": "of published weights; saccade: a run of ours; onnx: somebody's graph",
    "arch": "the published size, or a run's --arch; None where it is none of the known ones",
    "size": "native side in pixels",
    "pooling": "the one vector: cls, mean, map, or the name of a graph's output",
    "mean": "taken out of each channel of a picture in [0, 1]",
    "std": "each channel is divided by it",
    "licence": "of the weights; None where its owner may choose it, `unknown` where nothing says it",
    "licence_url": "where it can be read",
    "terms": "one sentence, where the licence is not a free one or not known",
    "data": "what they were trained on: words, or a run's fingerprint",
    "hash": "BLAKE3 of the file, or of the hashes of several",
    "path": "where it was read; name@commit from the hub",
    "naming": "whose names the tensors had: official, transformers, timm, …",
    "matched": "how many tensors were taken",
    "missing": "names of tensors that were not there; whatever changes the output is an error instead",
    "unexpected": "names that nothing explains; likewise",
    "reshaped": "our names of tensors that were made to fit",
    "ignored": "names that belong to no encoder: heads, decoders",
}
"""Further ones as they occur. From the hub: name, revision, sha256. Of published weights: prefix, preprocess. Of a run:
all that its backbone/config.json says, such as recipe, steps, initial and derived_from (the published weights behind
it). Where `load` was asked for another network: asked, and {from, to, how} as channels, patch, image_size. Of ONNX:
runtime, int8. Of an export: exported_from, a hash. Of one with a text tower: text, {naming, matched, missing,
unexpected, tokenizer {kind, vocabulary, sha256}} and the tower's settings, or why it was refused.
"""

_OF_A_FILE = (
    "path",
    "naming",
    "prefix",
    "matched",
    "missing",
    "unexpected",
    "reshaped",
    "ignored",
    "hash",
    "asked",
    "text",
)
_ORIGIN = ("name", "revision", "family", "arch", "licence", "licence_url", "terms", "hash")


def described(config: Any, **said: Any) -> dict[str, Any]:
    """A record with every key: what the network's settings tell, and what is said."""
    lists: dict[str, Any] = {name: [] for name in ("missing", "unexpected", "reshaped", "ignored")}
    told = {"size": config.image_size, "pooling": config.pooling, "mean": list(config.mean), "std": list(config.std)}
    return {**dict.fromkeys(KEYS), **lists, **told, **said}


def travelling(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record goes into an export: nothing of this machine, and nothing that was true of one file only."""
    kept = {name: value for name, value in record.items() if name not in _OF_A_FILE}
    if isinstance(kept.get("initial"), Mapping):
        kept["initial"] = {name: value for name, value in kept["initial"].items() if name != "path"}
    return {**kept, "exported_from": record.get("hash")}


def origins(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The published weights that an encoder's are or derive from, with licence, terms and hash: for a record."""
    if record["family"] == "saccade":
        return list(record.get("derived_from", []))
    name = {"name": Path(record["path"]).name} if record.get("path") else {}
    return [{**name, **{key: record[key] for key in _ORIGIN if record.get(key) is not None}}]


def terms_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Licence, its address, its terms and a text: of published weights, or of those that a run derives from.

    However far back: a run that started from a run that started from DINOv3 is under DINOv3's licence.
    """
    bound = next((origin for origin in origins(record) if origin.get("licence")), None)
    if bound is None:
        text = "Trained from random weights: the licence is for who trained it to choose, within the terms of the data."
        if (record.get("initial") or {}).get("weights") == "given":
            text = "Trained from weights that the user gave: their terms, and those of the data, are not known here."
        return {"licence": None, "licence_url": None, "terms": None, "text": text}
    own = record["family"] != "saccade"
    whose = "These weights" if own else f"It derives from {bound['family']} weights, which"
    terms, url = bound.get("terms"), bound.get("licence_url")
    text = f"{whose} are under the licence {bound['licence']}" + (f": {terms}." if terms else ".")
    text += f" <{url}>" if url else ""
    if not own:
        text += " What was trained from them is bound by it too, and by the terms of the data."
    return {"licence": bound["licence"], "licence_url": url, "terms": terms, "text": text}

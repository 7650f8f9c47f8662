"""The card that goes with an export: what it is, how to load it, where it comes from, how good it is, its terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from saccade import __version__
from saccade.encoder import Encoder
from saccade.provenance import terms_of

_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "CC-BY-NC-4.0": "cc-by-nc-4.0", "unknown": "unknown"}
"""As the hub spells them; any other is `other`, with its name."""

_CARD = """\
---
license: {{ hub_licence }}
{%- if hub_licence == "other" and licence %}
license_name: {{ licence | tojson }}
{%- endif %}
{%- if licence_url %}
license_link: {{ licence_url | tojson }}
{%- endif %}
library_name: {{ library }}
tags:
- image-feature-extraction
- self-supervised-learning
- saccade
---
# {{ title }}

{{ what }}

| | |
|---|---|
{%- for name, value in facts %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Load it

```python
{{ load }}
```
{% for note in notes %}
- {{ note }}
{%- endfor %}

## Where it comes from
{% for name, value in origin %}
- {{ name }}: {{ value }}
{%- endfor %}

## How good it is
{% if evaluations %}
| step | on | k-NN | linear |
|---|---|---|---|
{%- for row in evaluations %}
| {{ row.step }} | {{ row.part }} | {{ "%.1f" | format(row.knn) }} | {{ "%.1f" | format(row.linear) }} |
{%- endfor %}

Percent right, frozen, on the run's own labelled pictures.
{%- else %}
Not measured by saccade. `saccade evaluate` does it on labelled pictures of yours.
{%- endif %}

## Licence and terms

{{ terms }}
"""

_LOADS = {
    "hf": (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'model, processor = AutoModel.from_pretrained("PATH"), AutoImageProcessor.from_pretrained("PATH")\n'
        'features = model(**processor(images=picture, return_tensors="pt")).last_hidden_state'
    ),
    "timm": (
        "import timm\n\n"
        'model = timm.create_model("local-dir:PATH", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "features = model.forward_features(transform(picture)[None])"
    ),
    "safetensors": (
        'import saccade\n\nencoder = saccade.load("PATH")\nfeatures = encoder(encoder.preprocess(picture)[None])'
    ),
    "onnx": (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("PATH/model.onnx")\n'
        "features = session.run(None, {session.get_inputs()[0].name: images})"
    ),
}
_LIBRARIES = {"hf": "transformers", "timm": "timm", "safetensors": "saccade", "onnx": "onnx"}


def write(directory: Path, encoder: Encoder, to: str, called: str, digest: str, notes: Sequence[str]) -> Path:
    """README.md of an export that will be `called` so, with the hash of its weights.

    `notes` are what a user of that library must know.
    """
    record = encoder.record
    run = of_run(Path(str(record.get("path", "")))) if record["family"] == "saccade" else {}
    evaluations = run.get("summary", {}).get("eval") or []
    terms = terms_of(record)
    title = f"{name_of(record)} ({record.get('recipe') or record['family']})"
    page = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).from_string(_CARD)
    text = page.render(
        hub_licence=_LICENCES.get(str(terms["licence"]), "other"),
        licence=terms["licence"],
        licence_url=terms["licence_url"],
        library=_LIBRARIES[to],
        title=title,
        what="An encoder of pictures: it gives features, and has no head. Exported by saccade.",
        facts=_facts(encoder),
        load=_LOADS[to].replace("PATH", called),
        notes=notes,
        origin=_origin(record, run, digest),
        evaluations=[row for row in evaluations if row["step"] == record.get("steps")],
        terms=terms["text"],
    )
    path = directory / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def name_of(record: Mapping[str, Any]) -> str:
    """What a backbone is called: its architecture, else its family."""
    return str(record.get("arch") or record["family"])


def _facts(encoder: Encoder) -> list[tuple[str, str]]:
    config, record, prepare = encoder.backbone.config, encoder.record, encoder.preprocess
    resized = (
        f"both sides to {prepare.crop}" if prepare.square else f"short side to {prepare.resize}, centre {prepare.crop}"
    )
    return [
        ("family", str(record["family"])),
        ("size", name_of(record)),
        ("parameters", f"{sum(part.numel() for part in encoder.backbone.parameters()):,}"),
        ("features", f"{config.width} wide, {' x '.join(map(str, config.grid))} patches at the native size"),
        ("the one vector", {"cls": "class token", "mean": "mean of the patches"}.get(config.pooling, config.pooling)),
        ("native size", f"{config.image_size} x {config.image_size}, {config.channels} channels"),
        ("preparation", f"{resized}, {prepare.interpolation}; numbers in [0, 1], then mean and spread"),
        ("mean", ", ".join(f"{value:g}" for value in config.mean)),
        ("spread", ", ".join(f"{value:g}" for value in config.std)),
    ]


def _origin(record: Mapping[str, Any], run: Mapping[str, Any], digest: str) -> list[tuple[str, str]]:
    start = record.get("initial") or {}
    sessions = run.get("sessions") or [{}]
    code = sessions[-1].get("code", {})
    found = {
        "recipe": record.get("recipe"),
        "steps": record.get("steps"),
        "data": _data(record.get("data")),
        "trained with": f"saccade {code['version']}, code `{code['blake3']}`" if code else None,
        "started from": _started(start),
        "exported with": f"saccade {__version__}",
        "hash of the weights that were exported (blake3)": record.get("hash") and f"`{record['hash']}`",
        "hash of the file here (blake3)": f"`{digest}`",
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


def _data(data: Any) -> Any:
    """A run measured its data; of others' we have words."""
    if isinstance(data, Mapping) and {"samples", "fingerprint"} <= data.keys():
        return f"{data['samples']} pictures, fingerprint `{data['fingerprint']}`"
    return data


def _started(start: Mapping[str, Any]) -> str | None:
    if not start:
        return None
    if start.get("weights") == "random":
        return f"random weights, seed {start.get('seed')}"
    called = " ".join(str(start[name]) for name in ("family", "arch") if start.get(name))
    return f"{called}, weights `{start.get('hash')}`, licence {start.get('licence')}"


def of_run(place: Path) -> dict[str, Any]:
    """The record.json of the run that a backbone lies in, or an empty one."""
    folder = place if place.is_dir() else place.parent
    for path in (folder / "record.json", folder.parent / "record.json"):
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}
            return found if isinstance(found, dict) else {}
    return {}

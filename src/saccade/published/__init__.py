"""Other projects' checkpoints: what is known of each family, and one table of names that serves both ways.

Every other file here is a family: facts and key maps as `FAMILY`, no model code. The file name is the registry. Nothing
here imports torch before tensors are there, so that families can be listed at once.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal, NamedTuple

from saccade.errors import SaccadeError, nearest

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, Any]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CC_BY_NC = ("CC-BY-NC-4.0", "https://creativecommons.org/licenses/by-nc/4.0/", "for non-commercial use only")
APACHE = ("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", None)


class Way(NamedTuple):
    """How tensors of theirs become tensors of ours, and back: each takes and gives a list, in the order of the rule."""

    ours: Callable[[list[Any]], list[Any]]
    theirs: Callable[[list[Any]], list[Any]]


def rows(tensors: list[Any]) -> list[Any]:
    """Several tensors as one, row below row."""
    import torch

    return [torch.cat(tensors)]


def _query_value(tensors: list[Any]) -> list[Any]:
    query, _, value = tensors[0].chunk(3)
    return [query, value]


SAME = Way(list, list)
THREE = Way(rows, lambda ours: list(ours[0].chunk(3)))
"""Queries, keys and values apart with them, in one matrix with us."""
KEYLESS = Way(lambda theirs: rows([theirs[0], theirs[0] * 0, theirs[1]]), _query_value)
"""Biases of queries and values with them; with us the keys' too, which are zero."""
HALVES = Way(lambda theirs: list(theirs[0].chunk(2)), rows)
"""One matrix with them is two with us: the packed SwiGLU (w12 to w1 and w2)."""
QUERY_REST = Way(lambda theirs: list(theirs[0].split([len(theirs[0]) // 3, len(theirs[0]) // 3 * 2])), rows)
"""One matrix of queries, keys and values with them; with us the queries' apart from the rest (attention pool)."""
BATCH = Way(lambda theirs: [theirs[0][None]], lambda ours: [ours[0][0]])
"""They have no batch axis: [N D] to [1 N D]."""
TOKEN = Way(lambda theirs: [theirs[0][None, None]], lambda ours: [ours[0][0, 0]])
"""[D] to [1 1 D]."""
UNBATCH = Way(lambda theirs: [theirs[0][0]], lambda ours: [ours[0][None]])
"""They have an axis more: [1 1 D] to [1 D]."""
TRANSPOSED = Way(lambda theirs: [theirs[0].t().contiguous()], lambda ours: [ours[0].t().contiguous()])

Names = str | tuple[str, ...]
Rule = tuple[Names, Names] | tuple[Names, Names, Way]
"""Our names, theirs, and the way; {n} (any word in braces) stands for a number. Three of theirs for one: `THREE`."""


@dataclass(frozen=True)
class Naming:
    """How a project names the tensors of a family.

    `prefixes` may stand before every name, the wanted one first where several do; `ignored` are regular expressions of
    names that belong to no encoder (heads, decoders); `optional` are our names, numbers in braces too, that may be
    missing; `model_types` are what a transformers config.json says. `stacked` is the folder that holds all layers in
    one tensor each, along a leading axis: `layer/x` for the rules' `layer_0/x`, `layer_1/x`, …
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("", "module.", "backbone.", "module.backbone.", "model.", "encoder.")
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    stacked: str | None = None

    def needed(self, ours: Iterable[str]) -> set[str]:
        """Those of our names that may not be missing."""
        return {name for name in ours if not any(_pattern(template).fullmatch(name) for template in self.optional)}


@dataclass(frozen=True)
class Size:
    """One published network: numbers of the ViT, native side, parameters, where it is published, what differs in it.

    `names`: hub repositories, timm names and official files. `switches` and `preprocess` add to the family's.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    image_size: int
    parameters: int
    names: tuple[str, ...] = ()
    switches: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers that tell sizes apart, by the names of `ViTConfig`."""
        return {name: getattr(self, name) for name in ("width", "depth", "heads", "hidden", "patch", "image_size")}


@dataclass(frozen=True)
class ConvnetSize:
    """One published convnet, as `Size` is of ViTs: blocks and widths of its stages, a ResNet's kind of block."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int
    parameters: int
    names: tuple[str, ...] = ()
    switches: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    kind: str | None = None

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that tell sizes apart, by the names of the network's config."""
        kind = {"kind": self.kind} if self.kind else {}
        return {"blocks": self.blocks, "widths": self.widths, **kind}


@dataclass(frozen=True)
class Prepared:
    """How a family prepares a picture: short side to `resize`/`crop` of the size, then the centre.

    `square`: both sides to the size instead, whatever the aspect. `side`: the size, where it is not the native one.
    """

    resize: int = 256
    crop: int = 224
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    square: bool = False
    side: int | None = None


@dataclass(frozen=True)
class Decoder:
    """What files of a family may hold beside the encoder, for a recipe that has the same to go on with.

    `namings` lead to the names that the recipe's method gives its tensors; `positions` is the name of a table that a
    method computes; the number of `heads` is in no tensor, but may be in a config.json (`heads_key`); `note` is said.
    """

    namings: tuple[Naming, ...]
    positions: str
    heads: int
    heads_key: str
    note: str


@dataclass(frozen=True)
class Family:
    """What is known of a family of checkpoints. `terms` is one sentence where the licence is not a free one.

    `switches` are those of the network's config that no tensor tells (eps, activation, position, mean, std, …); `read`
    gives further ones from our names' shapes and the config.json, of a convnet all that tensors tell. `signs` are
    regular expressions for a file's or folder's name, which decide where two families have the same tensors. `figures`
    are top-1 on ImageNet-1k in percent, frozen, by size, as `figures_source` states them: `knn`, `linear` (on the class
    token unless said), `linear_real` (on the labels of ImageNet-ReaL). `recipe`: the one of ours that goes on as it was
    made, or nearest to it; None where none does.
    """

    name: str
    licence: str
    licence_url: str
    terms: str | None
    data: str
    pooling: str
    switches: Mapping[str, Any]
    sizes: Mapping[str, Size] | Mapping[str, ConvnetSize]
    namings: Mapping[str, Naming]
    preprocess: Prepared = Prepared()
    network: str = "vit"
    read: Callable[[Shapes, Mapping[str, Any]], Mapping[str, Any]] | None = None
    signs: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    figures_source: str | None = None
    decoder: Decoder | None = None
    recipe: str | None = None


class Sorted(NamedTuple):
    """Names of a file by what a naming makes of them; `missing` are theirs, `found` the rules that apply."""

    prefix: str
    found: list[tuple[list[str], list[str], Way]]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]

    @property
    def matched(self) -> int:
        return sum(len(theirs) for _, theirs, _ in self.found)


class Recognised(NamedTuple):
    """The family, the naming and the size (None: none of the published) of a set of tensors, and its settings."""

    family: Family
    naming: str
    size: str | None
    config: dict[str, Any]
    names: Sorted


def families() -> dict[str, Family]:
    """Every family, by name: those of the files in this folder."""
    pages = [importlib.import_module(f"{__name__}.{page.name}") for page in pkgutil.iter_modules(__path__)]
    return {known.name: known for page in pages for known in vars(page).values() if isinstance(known, Family)}


def _parts(rule: Rule) -> tuple[list[str], list[str], Way]:
    ours, theirs = ([names] if isinstance(names, str) else list(names) for names in rule[:2])
    return ours, theirs, rule[2] if len(rule) == 3 else THREE if len(theirs) == 3 and len(ours) == 1 else SAME


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _apply(rules: Iterable[tuple[list[str], list[str], Way]], names: set[str]) -> tuple[list[Any], set[str]]:
    """The rules (from, to, way) with numbers in place whose names are all there, and what is missing of the others."""
    found, missing = [], set()
    for source, target, way in rules:
        bound = {
            tuple(match.groupdict().items())
            for template in source
            for match in map(_pattern(template).fullmatch, names)
            if match
        }
        for numbers in sorted(bound, key=lambda pairs: [int(number) for _, number in pairs]):
            if any(name not in dict(numbers) for part in target for name in re.findall(r"{(\w+)}", part)):
                continue  # a rule of one way: it drops a number that nothing could give back
            sources, targets = ([name.format(**dict(numbers)) for name in side] for side in (source, target))
            lacking = set(sources) - names
            missing |= lacking
            if not lacking:
                found.append((sources, targets, way))
    return found, missing


def sort(naming: Naming, names: Iterable[str], prefix: str = "") -> Sorted:
    """What a naming makes of these names, of which those below `prefix` are the encoder's."""
    every = set(names)
    inside = {name.removeprefix(prefix) for name in every if name.startswith(prefix)}
    rules = [_parts(rule) for rule in naming.rules]
    found, missing = _apply([(theirs, ours, way) for ours, theirs, way in rules], inside)
    known = {name for theirs, _, _ in found for name in theirs}
    rest = sorted(inside - known)
    patterns = [re.compile(pattern) for pattern in naming.ignored]
    ignored = [name for name in rest if any(pattern.match(name) for pattern in patterns)]
    outside = sorted(name for name in every if not name.startswith(prefix))
    unexpected = [prefix + name for name in rest if name not in ignored]
    return Sorted(
        prefix,
        [(ours, [prefix + name for name in theirs], way) for theirs, ours, way in found],
        sorted(prefix + name for name in missing),
        unexpected,
        [prefix + name for name in ignored] + outside,
    )


def to_ours(naming: Naming, tensors: Tensors, prefix: str = "") -> dict[str, Any]:
    """Their tensors by our names. What the naming does not know is left out; `sort` says what that is."""
    tensors = unstacked(naming, tensors)
    result: dict[str, Any] = {}
    for ours, theirs, way in sort(naming, tensors, prefix).found:
        result.update(zip(ours, way.ours([tensors[name] for name in theirs]), strict=True))
    return result


def decoder_of(decoder: Decoder, tensors: Tensors) -> dict[str, Any]:
    """The tensors of a decoder by the names of a method; none where a file has none."""
    ways = [(sort(naming, tensors, prefix), naming) for naming in decoder.namings for prefix in naming.prefixes]
    names, naming = max(ways, key=lambda way: way[0].matched)
    return to_ours(naming, tensors, names.prefix)


def unstacked(naming: Naming, tensors: Tensors) -> Tensors:
    """Every layer under its own name, where the naming keeps them in one tensor. A number has no layers and stays."""
    folder = f"{naming.stacked}/"
    if naming.stacked is None or not any(folder in name for name in tensors):
        return tensors
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layers = len(tensor) if folder in name and tensor.ndim and tensor.numel() else 0
        names = [name.replace(folder, f"{naming.stacked}_{layer}/") for layer in range(layers)]
        result |= dict(zip(names, tensor, strict=True)) if names else {name: tensor}
    return result


def _stacked(naming: Naming, tensors: dict[str, Any]) -> dict[str, Any]:
    """What `unstacked` was given."""
    import torch

    layers: dict[str, dict[int, Any]] = {}
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if found := re.search(rf"{naming.stacked}_(\d+)/", name):
            together = name.replace(found[0], f"{naming.stacked}/")
            layers.setdefault(together, {})[int(found[1])] = tensor
        else:
            result[name] = tensor
    return result | {name: torch.stack([every[n] for n in sorted(every)]) for name, every in layers.items()}


def without_name(naming: Naming, ours: Iterable[str]) -> set[str]:
    """Those of our names that `to_theirs` leaves out, or refuses."""
    every = set(ours)
    found, _ = _apply([_parts(rule) for rule in naming.rules], every)
    return every - {name for named, _, _ in found for name in named}


def to_theirs(naming: Naming, tensors: Tensors, prefix: str = "") -> dict[str, Any]:
    """Our tensors by their names, bit for bit what `to_ours` was given. Raises `SaccadeError` for what has no name."""
    found, _ = _apply([_parts(rule) for rule in naming.rules], set(tensors))
    if nameless := sorted(naming.needed(without_name(naming, tensors))):
        raise SaccadeError(f"this naming has no place for {', '.join(nameless[:3])}", path=nameless[0])
    result: dict[str, Any] = {}
    for ours, theirs, way in found:
        values = way.theirs([tensors[name] for name in ours])
        result.update(zip((prefix + name for name in theirs), values, strict=True))
    return result if naming.stacked is None else _stacked(naming, result)


def pairs(rules: Mapping[str, Names], before: tuple[str, str] = ("", "")) -> tuple[Rule, ...]:
    """Rules for the weight and the bias of each of these, with what stands before our names and before theirs."""
    return tuple(
        (
            f"{before[0]}{ours}.{kind}",
            f"{before[1]}{theirs}.{kind}"
            if isinstance(theirs, str)
            else tuple(f"{before[1]}{part}.{kind}" for part in theirs),
        )
        for ours, theirs in rules.items()
        for kind in ("weight", "bias")
    )


_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

PLAIN: tuple[Rule, ...] = (
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    *pairs({name: name for name in ("patch_embed.proj", "norm", *(f"blocks.{{n}}.{part}" for part in _PARTS))}),
)
"""A ViT as timm names it, and MAE, DINO, iBOT, MoCo v3 and I-JEPA themselves; where there is no class token, none."""


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "silu": "swiglu",
    "swish": "swiglu",
}


def activation(config: Mapping[str, Any], gated: bool) -> dict[str, str]:
    """The activation that a transformers config.json says, where it says one that is read. Raises `SaccadeError`."""
    said = config.get("hidden_act")
    if said is None or "model_type" not in config or (gated and str(config["model_type"]).startswith("dinov2")):
        return {}  # DINOv2's gate is a SiLU whatever stands there
    known = {name for name, ours in _ACTIVATIONS.items() if (ours == "swiglu") == gated}
    if said not in known:
        kind = "an MLP with a gate" if gated else "a plain MLP"
        raise SaccadeError(
            f"no {kind.partition(' ')[2]} has the activation {said!r} here",
            path="hidden_act",
            hint=nearest(str(said), known),
        )
    return {"activation": _ACTIVATIONS[said]}


def recognise(shapes: Shapes, config: Mapping[str, Any] | None = None, called: str = "") -> Recognised:
    """What these tensors are, by their names and shapes, a transformers config.json where there is one, and a name.

    `called` (the file's or folder's name) decides only where two families or sizes have the very same tensors. Raises
    `SaccadeError` that counts what matches the nearest family, unless every tensor of an encoder is there.
    """
    config = config or {}
    attempts = [
        _attempt(family, name, naming, shapes, config, called)
        for family in families().values()
        if _may_be(family, config)
        for name, naming in family.namings.items()
    ]
    if not attempts:
        namings = [naming for family in families().values() for naming in family.namings.values()]
        known = {kind for naming in namings for kind in naming.model_types}
        raise SaccadeError(
            f"model_type {config['model_type']!r} is of no family that saccade knows",
            path="model_type",
            hint=nearest(str(config["model_type"]), known),
        )
    whole = [found for found, reason in attempts if reason is None]
    signed = [found for found in whole if _signed(found.family, called)]
    if halves := [] if signed else [attempt for attempt in attempts if _is_half(*attempt, called)]:
        whole, attempts = [], halves
    distinct = {found.family.name: found for found in reversed(signed or whole)}  # the first naming that fits
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    if distinct:
        signs = " or ".join(sign for found in distinct.values() for sign in found.family.signs[:1])
        raise SaccadeError(
            f"these tensors may be of {' or '.join(distinct)}: the families name and shape theirs alike",
            path=called,
            hint=f"name the file or its folder so that it says which: {signs}",
        )
    found, reason = max(attempts, key=_nearness)
    names = found.names
    if not names.matched:
        raise SaccadeError(
            f"none of its {len(shapes)} tensors has a name of a family that saccade knows",
            path=called,
            hint=f"known families: {', '.join(families())}",
        )
    raise SaccadeError(
        f"not a whole encoder of any family; the nearest is {found.family.name} ({found.naming} names): {reason}",
        path=called,
        hint="nothing was loaded; is it the whole file, and of a family that saccade knows?",
    )


def _signed(family: Family, called: str) -> bool:
    return any(re.search(sign, called, re.IGNORECASE) for sign in family.signs)


def _is_half(found: Recognised, reason: str | None, called: str) -> bool:
    """Whether these are part of what their name says, and no more: what is left may be another family's whole."""
    names = found.names
    return bool(reason and names.matched and names.missing and not names.unexpected and _signed(found.family, called))


def _may_be(family: Family, config: Mapping[str, Any]) -> bool:
    kinds = {kind for naming in family.namings.values() for kind in naming.model_types}
    return "model_type" not in config or str(config["model_type"]) in kinds


def _nearness(attempt: tuple[Recognised, str | None]) -> tuple[bool, float]:
    """Those whose size could be read first, then how many names fit."""
    names = attempt[0].names
    likeness = names.matched / max(1, names.matched + len(names.missing) + len(names.unexpected))
    return bool(attempt[0].config), likeness


def _attempt(
    family: Family, name: str, naming: Naming, shapes: Shapes, config: Mapping[str, Any], called: str
) -> tuple[Recognised, str | None]:
    """What the tensors are if they are this family's in this naming, and why they are not."""
    if naming.stacked is not None:
        shapes = {key: tuple(tensor.shape) for key, tensor in unstacked(naming, _hollow(shapes)).items()}
    names = max((sort(naming, shapes, prefix) for prefix in naming.prefixes), key=lambda names: names.matched)
    found = Recognised(family, name, None, {}, names)
    if not names.matched:
        return found, "nothing matches"
    given = _our_shapes(naming, shapes, names.prefix)
    try:
        size, switches = _geometry(family, given, config, called)
        expected = _expected(family, switches)
    except SaccadeError as error:
        if error.path == "hidden_act":  # all but the activation is this family's
            found = found._replace(config={"hidden_act": config["hidden_act"]})
        return found, f"{counts(names)}; {error.error}"
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return found, f"{counts(names)}; what tells its size is missing or of another shape"
    reshaped = [
        f"{key} {given[key]} for {expected[key]}"
        for key in given.keys() & expected.keys()
        if given[key] != expected[key]
    ]
    once: set[str] = set()
    doubled: list[str] = []
    for ours, theirs, _ in names.found:
        doubled += theirs if once & set(ours) else []
        once |= set(ours)
    lacking = _in_their_names(naming, naming.needed(expected.keys() - given.keys()), names.prefix, shapes)
    names = names._replace(
        missing=sorted({*names.missing, *lacking}),
        unexpected=sorted([*names.unexpected, *doubled, *(given.keys() - expected.keys()), *reshaped]),
    )
    found = found._replace(size=size, config=switches, names=names)
    return found, counts(names) if names.missing or names.unexpected else None


def _in_their_names(naming: Naming, ours: Iterable[str], prefix: str, shapes: Shapes) -> set[str]:
    """What a file lacks, by the names that the file would have, or by ours where the naming has none."""
    found, _ = _apply([_parts(rule) for rule in naming.rules], set(ours))
    named = {name for sources, _, _ in found for name in sources}
    return {prefix + name for _, targets, _ in found for name in targets} - shapes.keys() | (set(ours) - named)


def counts(names: Sorted) -> str:
    """How many of a file's names match, are missing and unexpected, in words."""
    parts = [f"{names.matched} matched"]
    for kind, some in (("missing", names.missing), ("unexpected", names.unexpected)):
        listed = f" ({', '.join(some[:3])}{', …' if len(some) > 3 else ''})" if some else ""
        parts.append(f"{len(some)} {kind}{listed}")
    return ", ".join(parts)


def _hollow(shapes: Shapes) -> dict[str, Any]:
    """Tensors that hold nothing."""
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _our_shapes(naming: Naming, shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """What `to_ours` would give: the same table, on tensors that hold nothing."""
    hollow = _hollow({name: shape for name, shape in shapes.items() if name.startswith(prefix)})
    result: dict[str, tuple[int, ...]] = {}
    for ours, theirs, way in sort(naming, hollow, prefix).found:
        try:
            result.update(
                (key, tuple(x.shape)) for key, x in zip(ours, way.ours([hollow[name] for name in theirs]), strict=True)
            )
        except (IndexError, RuntimeError, ValueError):  # it is of another shape than this naming's
            continue
    return result


def _expected(family: Family, switches: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the network that these switches describe. Raises `SaccadeError` where none does."""
    return _built(family.network, tuple(sorted(switches.items())))


@functools.lru_cache(8)
def _built(network: str, switches: tuple[tuple[str, Any], ...]) -> dict[str, tuple[int, ...]]:
    """Kept, for many families are the same network."""
    import torch

    from saccade.backbone import FAMILIES

    kind = FAMILIES[network]
    with torch.device("meta"):
        hollow = kind.network(kind.config(**dict(switches)))
    return {name: tuple(tensor.shape) for name, tensor in hollow.state_dict().items()}


def _geometry(
    family: Family, shapes: Shapes, config: Mapping[str, Any], called: str
) -> tuple[str | None, dict[str, Any]]:
    """The published size, where it is one, and the settings of the network. Raises `SaccadeError` or `LookupError`."""
    config = {**config, **config.get("vision_config", {})}
    if family.network != "vit":
        return _convnet(family, shapes, config, called)
    switches = {**family.switches, "pooling": family.pooling}
    numbers = _numbers(shapes, config)
    cls = int(switches.get("cls", True) and switches.get("cls_position", True))
    if "pos_embed" in shapes:
        rows = shapes["pos_embed"][1]
        if cls and math.isqrt(rows) ** 2 == rows:  # the class token has no position of its own
            cls, switches["cls_position"] = 0, False
        numbers["image_size"] = math.isqrt(rows - cls) * numbers["patch"]
    gated = any(".mlp.w1." in name for name in shapes)
    registers = shapes.get("register_tokens", (1, 0))[1]
    alike = [
        (name, size)
        for name, size in family.sizes.items()
        if all(numbers[key] == value for key, value in size.numbers.items() if key in numbers and key != "image_size")
        and (size.switches.get("activation") == "swiglu") == gated
        and size.switches.get("registers", registers) == registers
    ]
    exact = [(name, size) for name, size in alike if numbers.get("image_size", size.image_size) == size.image_size]
    name, size = _chosen(exact or alike, called)
    if "num_attention_heads" not in config and size is None:
        shown = ", ".join(f"{key} {numbers[key]}" for key in ("width", "depth", "hidden", "patch"))
        raise SaccadeError(f"its size ({shown}) is none of the published ones, so nothing says how many heads it has")
    if size is not None:
        switches |= size.switches
        numbers = {**size.numbers, **numbers}
    else:
        numbers.setdefault("image_size", config.get("image_size", 224))
    if "num_attention_heads" in config:
        numbers["heads"] = config["num_attention_heads"]
    if gated:
        switches["activation"] = "swiglu"
    switches |= activation(config, gated)
    if "register_tokens" in shapes:
        switches["registers"] = shapes["register_tokens"][1]
    switches |= {"mask_token": "mask_token" in shapes, "channels": shapes["patch_embed.proj.weight"][1], **numbers}
    switches |= dict(family.read(shapes, config) if family.read else {})
    return name if (name, size) in exact else None, switches


def _convnet(
    family: Family, shapes: Shapes, config: Mapping[str, Any], called: str
) -> tuple[str | None, dict[str, Any]]:
    """As `_geometry`. A size that is not published must be told by config.json: else half a network looks whole."""
    numbers = dict(family.read(shapes, config) if family.read else {})
    alike = [
        (name, size)
        for name, size in family.sizes.items()
        if all(numbers[key] == value for key, value in size.numbers.items())
    ]
    name, size = _chosen(alike, called)
    if size is None and "depths" not in config:
        shown = ", ".join(f"{key} {'-'.join(map(str, numbers[key]))}" for key in ("blocks", "widths"))
        raise SaccadeError(f"its size ({shown}) is none of the published ones, so nothing says that it is whole")
    native = size.image_size if size else config.get("image_size", 224)
    return name, {**family.switches, "image_size": native, **(size.switches if size else {}), **numbers}


def stages(shapes: Shapes, config: Mapping[str, Any], template: str) -> tuple[int, ...]:
    """Blocks of each stage: of config.json where it says them, else counted in names like `template` ({stage}, {n})."""
    if "depths" in config:
        return tuple(config["depths"])
    counts: dict[int, int] = {}
    for match in filter(None, map(_pattern(template).match, shapes)):
        stage, number = int(match["stage"]), int(match["n"])
        counts[stage] = max(counts.get(stage, 0), 1 + number)
    return tuple(counts[stage] for stage in sorted(counts))


def only(config: Mapping[str, Any], **said: Any) -> None:
    """Raises `SaccadeError` where a transformers config.json says something else of one of these."""
    for name, value in said.items():
        if config.get(name, value) != value:
            raise SaccadeError(f"its config.json says {name} {config[name]!r}: here it is {value!r}", path=name)


def _numbers(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, int]:
    """What tensors tell of a ViT: width, depth, hidden, patch. The depth is config.json's where there is one."""
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    depth = config.get("num_hidden_layers", 1 + max(blocks))
    if depth > len(shapes):  # before a network as deep is built to compare with
        raise SaccadeError(f"it says that it has {depth} blocks, and has {len(shapes)} tensors")
    first = next(
        name for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w1.weight", "") if name in shapes or not name
    )
    return {
        "width": width,
        "depth": depth,
        "hidden": shapes[first][0],
        "patch": patch,
    }


def _chosen(sizes: list[tuple[str, Any]], called: str) -> tuple[str | None, Any]:
    """The one that the file's or folder's name says; any where they are alike. Raises `SaccadeError` where not."""
    said = [one for one in sizes if any(name.rpartition("/")[2] in called for name in one[1].names)] or sizes
    if not said:
        return None, None
    if any(size.switches != said[0][1].switches for _, size in said):
        names = " or ".join(size.names[0].rpartition("/")[2] for _, size in said)
        raise SaccadeError(f"its name must say which it is, for their tensors are alike: {names}", path=called)
    return said[0]


def listing(pattern: str = "*") -> list[dict[str, Any]]:
    """The published checkpoints whose name or family has the pattern in it, * and ? allowed. Raises `SaccadeError`."""
    from saccade.hub import cached, repository

    found: list[dict[str, Any]] = [
        {
            "name": size.names[0] if size.names else f"{family.name}/{name}",
            "family": family.name,
            "size": name,
            "parameters": size.parameters,
            "licence": family.licence,
            "terms": family.terms,
            "data": size.data or family.data,
            "figures": {**family.figures[name], "source": family.figures_source} if name in family.figures else {},
            "hub": any("/" in one and repository(one) for one in size.names),
            "cached": any(map(cached, size.names)),
            "cached_names": list(filter(cached, size.names)),
        }
        for family in families().values()
        for name, size in family.sizes.items()
    ]
    wanted = [
        row for row in found if any(fnmatch(row[key].lower(), f"*{pattern.lower()}*") for key in ("name", "family"))
    ]
    if not wanted:
        hint = nearest(pattern, [*families(), *(str(row["name"]) for row in found)])
        everything = f"families: {', '.join(sorted(families()))}; without a pattern all are listed"
        raise SaccadeError(
            f"no published model is called {pattern!r}",
            path=pattern,
            hint=hint if hint.startswith("did you mean") else everything,
        )
    return wanted

"""What is not as usual, learned from normal pictures alone: how far patches are from those that were seen.

A memory of patches (PatchCore, arXiv 2106.08265; AnomalyDINO, arXiv 2405.14529) finds what is small, a Gaussian of the
mean patch what is everywhere. The threshold comes from normal pictures held out: every one is scored by a memory that
was made without it and without its group. Neither mask nor anomalous picture decides anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from saccade import backbone
from saccade.data import Source
from saccade.embed import Look, Tokens, device, examining, read_pictures
from saccade.encoder import Encoder, untrained
from saccade.errors import SaccadeError, Unreadable
from saccade.evaluate.segmentation import sides
from saccade.finetune.curves import Pixels, Threshold, auroc, average_precision, bounded, resampled, share
from saccade.finetune.folds import folds
from saccade.finetune.heatmap import enlarged, name_of, write
from saccade.finetune.memory import core_set, gaussian, near
from saccade.finetune.normal import Shown, is_mask, read_mask, read_normal
from saccade.finetune.shown import cards_of
from saccade.finetune.task import Examples, Fitted, Picture, TaskSettings
from saccade.finetune.task import Head as AnyHead
from saccade.report.page import Bar, Bars, Cards, Comparison, Section
from saccade.settings import FinetuneArguments
from saccade.vit import Features, ViT

FROZEN = "it learns from normal pictures alone, and nothing there says which way a backbone should move"
PRETRAINED, HEATMAPS = "pretrained", "heatmaps"
_BATCH, _DEPTHS = 8, 4
_SHOWN = 24
_THUMB = 4  # pixels a side to which a patch is shrunk for the raw-pixel baseline


class Settings(TaskSettings):
    """Flags of `--task anomaly`."""

    normal: str | None = Field(None, description="the class that is normal; good, normal or ok if not given")
    false_alarms: float = Field(0.01, gt=0, lt=1, description="share of normal pictures that may be called anomalous")
    score: Literal["both", "patches", "vector"] = Field(
        "both", description="patches: distance to a memory of patches; vector: of the mean patch to a Gaussian; or both"
    )
    memory: int = Field(10_000, ge=1, description="patches remembered, at most: a core-set of all")
    neighbours: int = Field(1, ge=1, description="nearest patches of the memory whose distance is averaged")
    depths: int = Field(3, ge=1, le=4, description="blocks of a ViT that are looked at, side by side; the last first")
    smooth: int = Field(1, ge=1, description="patches a side over which features are averaged first; odd")
    top: float = Field(0.01, gt=0, le=1, description="share of a picture's patches, the farthest, that score it")
    pictures: int = Field(2000, ge=2, description="normal pictures learned from, at most")
    baselines: bool = Field(True, description="measure raw pixels and the untrained network too")


def read(data: Any, encoder: Encoder, asked: FinetuneArguments, settings: Settings) -> Examples:
    """Normal pictures to learn from and others to be examined (`normal`). Raises `SaccadeError`."""
    if not encoder.grid or not all(encoder.grid):
        raise SaccadeError("this backbone gives one vector and no patches", path="--task", hint="use a ViT or a ResNet")
    if settings.smooth % 2 == 0:
        raise SaccadeError("patches are averaged around one: an odd number", path="--smooth", hint="--smooth 3")
    return read_normal(
        data, normal=settings.normal, pictures=settings.pictures, group_by=asked.group_by,
        channels=encoder.preprocess.channels,
    )  # fmt: skip


def blocks_of(network: Any, depths: int) -> tuple[int, ...]:
    """The last so many of four blocks of a ViT, evenly spaced; empty where the last map is all there is."""
    if depths == 1 or not isinstance(network, ViT):
        return ()
    count = len(network.blocks)
    return tuple(sorted({(place + 1) * count // _DEPTHS - 1 for place in range(_DEPTHS - depths, _DEPTHS)} - {-1}))


def side_by_side(network: Any, images: Shaped[Tensor, "b c h w"], blocks: Sequence[int]) -> Features:
    """Patches after these blocks, each brought to length 1, one beside the other."""
    seen = network.intermediate(images, list(blocks))
    return Features(None, seen[-1].registers, torch.cat([F.normalize(one.patches, dim=-1) for one in seen], dim=-1),
                    seen[-1].positions, seen[-1].grid)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Features of one picture's patches [N D], row by row, and how they stand."""

    patches: Float[Tensor, "n d"]
    grid: tuple[int, ...]

    def features(self) -> Features:
        """As an encoder says it, of a batch of one."""
        x = self.patches[None].to(device()).float()
        return Features(None, x[:, :0], x, x.new_zeros(1, x.shape[1], 2), self.grid)


@dataclass(frozen=True)
class Seen:
    """Patches of train by contestant, and of test for the baselines; rows of those that could be read."""

    train: dict[str, list[Grid]]
    test: dict[str, list[Grid]]
    train_rows: list[int]
    test_rows: list[int]
    failures: list[tuple[int, str, str]]
    seed: int
    blocks: tuple[int, ...]
    heads: dict[str, Head] = field(default_factory=dict)


def see(encoder: Encoder, examples: Examples, settings: Settings, asked: FinetuneArguments) -> Seen:
    """Looks at train once; the baselines look at test too, which the model itself does later."""
    blocks = blocks_of(encoder.backbone, settings.depths)
    found, beside = Seen({}, {}, [], [], [], asked.seed, blocks), dict[str, Encoder]()
    if settings.baselines and backbone.known(encoder.backbone):
        beside["untrained"] = untrained(encoder, asked.seed).to(encoder.device)
    test = examples.test if settings.baselines else examples.test[:0]
    with examining(encoder) as look:
        for rows, images in _read(encoder, examples, examples.train, asked.workers, found.failures, "learning"):
            found.train_rows.extend(rows)
            _note(found.train, look, {PRETRAINED: encoder, **beside}, images, blocks, settings.baselines)
        for rows, images in _read(encoder, examples, test, asked.workers, [], "looking at baselines"):
            found.test_rows.extend(rows)
            _note(found.test, look, beside, images, blocks, True)
    if len(set(examples.names(np.array(found.train_rows, dtype=np.int64)))) < 2:
        first = f"; the first: {found.failures[0][1]}: {found.failures[0][2]}" if found.failures else ""
        said = f"fewer than two normal pictures (or groups) could be read{first}"
        raise SaccadeError(said, hint="look at the files", code=1)
    return found


def _note(
    into: dict[str, list[Grid]],
    look: Look,
    networks: Mapping[str, Encoder],
    images: Tensor,
    blocks: Sequence[int],
    pixels: bool,
) -> None:
    """Adds what each contestant sees of a batch."""
    for name, network in networks.items():
        seen = _looked(look, network, images, blocks)
        if not bool(torch.isfinite(seen.patches).all()):
            raise SaccadeError("features have NaN or infinite values", hint="the backbone is damaged", code=1)
        into.setdefault(name, []).extend(Grid(one.half().cpu(), seen.grid) for one in seen.patches)
    if pixels:
        stride = look.encoder.backbone.stride
        values = images.float() if images.is_floating_point() else images.float() / 255
        grid = tuple(max(1, side // stride) for side in values.shape[2:])
        for name, side in (("colour", 1), ("pixels", _THUMB)):
            small = F.adaptive_avg_pool2d(values, (side * grid[0], side * grid[1]))
            rows = F.unfold(small, side, stride=side).mT
            into.setdefault(name, []).extend(Grid(one.half().clone(), grid) for one in rows)


def _looked(look: Look, network: Encoder, images: Tensor, blocks: Sequence[int]) -> Features:
    if blocks:
        return side_by_side(network.backbone, images.to(network.device), blocks)
    return look(images, tokens="patches", encoder=network)


def _read(
    encoder: Encoder, examples: Examples, rows: np.ndarray, workers: int, failures: list[tuple[int, str, str]],
    words: str,
) -> Iterator[tuple[list[int], Shaped[Tensor, "b c h w"]]]:  # fmt: skip
    """Whole pictures in whole patches, neighbours of one size together."""

    def whole(picture: Tensor) -> Tensor:
        return encoder.preprocess.sized(picture, sides(encoder, picture))

    waiting: list[int] = []
    images: list[Tensor] = []
    for found in read_pictures(examples.source, [whole], rows=rows.tolist(), batch=1, workers=workers, words=words):
        failures += found.failures
        if not found.rows:
            continue
        image = found.views[0][0]
        if waiting and (len(waiting) == _BATCH or image.shape != images[0].shape or image.dtype != images[0].dtype):
            yield waiting, torch.stack(images)
            waiting, images = [], []
        waiting.append(found.rows[0])
        images.append(image)
    if waiting:
        yield waiting, torch.stack(images)


class Head(AnyHead):
    """Distance of each patch to the memory, and of the mean patch to the Gaussian; both in units of what is normal."""

    tokens: Tokens = "patches"
    whole: ClassVar[bool] = True
    answers: ClassVar[tuple[str, ...]] = ("score", "map")
    memory: Tensor
    mean: Tensor
    whitening: Tensor
    usual: Tensor
    threshold: Tensor
    unit: Tensor

    def __init__(
        self,
        *,
        remembered: int,
        width: int,
        score: str,
        top: float,
        neighbours: int,
        smooth: int,
        length: bool,
        blocks: Sequence[int] = (),
    ):
        super().__init__()
        self._config = {
            "remembered": remembered, "width": width, "score": score, "top": top, "neighbours": neighbours,
            "smooth": smooth, "length": length, "blocks": list(blocks),
        }  # fmt: skip
        self.score_of, self.top, self.neighbours, self.smooth, self.length = score, top, neighbours, smooth, length
        self.blocks = tuple(blocks)
        self.register_buffer("memory", torch.zeros(remembered, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.zeros(width, width))
        self.register_buffer("usual", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # mean and spread of both scores
        self.register_buffer("threshold", torch.tensor(math.inf))
        self.register_buffer("unit", torch.tensor(1.0))

    def config(self) -> dict[str, Any]:
        """What builds one like it."""
        return dict(self._config)

    def features(self, backbone: Any, images: Shaped[Tensor, "b c h w"]) -> Features:
        """Patches of the last block, or of several side by side."""
        if self.blocks:
            return side_by_side(backbone, images, self.blocks)
        return backbone(images, tokens="patches") if isinstance(backbone, ViT) else backbone(images)

    def prepared(self, features: Features) -> Float[Tensor, "b n d"]:
        """Patches as the memory holds them: averaged with their neighbours if asked, of length 1."""
        x = features.patches
        if self.smooth > 1:
            maps = x.mT.unflatten(2, features.grid)
            x = F.avg_pool2d(maps, self.smooth, 1, self.smooth // 2, count_include_pad=False).flatten(2).mT
        return F.normalize(x, dim=-1) if self.length else x

    def vector(self, features: Features) -> Float[Tensor, "b d"]:
        """The mean patch."""
        x = features.patches.mean(dim=1)
        return F.normalize(x, dim=-1) if self.length else x

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Float[Tensor, "b 2 y x"]:
        """Of each patch how far it is from the memory; and how far the whole picture is, the same at every patch."""
        far = near(self.prepared(features), self.memory, self.neighbours).unflatten(1, features.grid)
        away = ((self.vector(features) - self.mean) @ self.whitening).square().sum(dim=1).sqrt()
        return torch.stack([far, away[:, None, None].expand_as(far)], dim=1)

    def scores(self, outputs: Float[Tensor, "b 2 y x"]) -> Float[Tensor, " b"]:
        """One number a picture; higher is less normal."""
        return self.joined(farthest(outputs[:, 0].flatten(1), self.top), outputs[:, 1, 0, 0])

    def joined(self, patches: Float[Tensor, " n"], vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Both scores as one: the larger, each as how many spreads of normal pictures it is above their mean."""
        if self.score_of != "both":
            return patches if self.score_of == "patches" else vector
        both = torch.stack([patches, vector], dim=1)
        return ((both - self.usual[:, 0]) / self.usual[:, 1]).amax(dim=1)

    def answer(self, outputs: Float[Tensor, "b 2 y x"]) -> tuple[Tensor, ...]:
        """The score of each picture, and the distance of each of its patches."""
        return self.scores(outputs), outputs[:, 0]

    def look(self, look: Look, pixels: Sequence[Shaped[Tensor, "c h w"]]) -> list[Tensor]:
        """Whole pictures near their own aspect, with the short side that the encoder was loaded for."""
        found: list[Tensor] = []
        for picture in pixels:
            image = look.encoder.preprocess.sized(picture, sides(look.encoder, picture))
            found.append(self(_looked(look, look.encoder, image[None], self.blocks))[0].float().cpu())
        return found

    def told(self, outputs: Sequence[Tensor], pictures: Sequence[Picture], folder: Path | None) -> list[dict[str, Any]]:
        """Score, verdict and threshold of each picture; its heatmap, a 16-bit PNG, goes into `folder`/heatmaps."""
        return [self._told(one, picture, folder) for one, picture in zip(outputs, pictures, strict=True)]

    def _told(self, output: Tensor, picture: Picture, folder: Path | None) -> dict[str, Any]:
        score = float(self.scores(output[None].to(self.memory))[0])
        said: dict[str, Any] = {
            "score": round(score, 6), "threshold": round(float(self.threshold), 6),
            "predicted": "anomalous" if score > float(self.threshold) else "normal",
        }  # fmt: skip
        if isinstance(picture.target, Shown):
            said |= {"label": picture.target.label, "anomalous": picture.target.anomalous}
        if folder is not None:
            file = f"{HEATMAPS}/{name_of(picture.key)}"
            write(folder / file, enlarged(output[0], picture.size), float(self.unit))
            said |= {"heatmap": file, "unit": round(float(self.unit), 6)}
        return said | {"_score": score, "_map": output[0], "_key": picture.key, "_size": picture.size,
                       "_shown": picture.target, "_threshold": float(self.threshold)}  # fmt: skip


def farthest(distances: Float[Tensor, "b n"], top: float) -> Float[Tensor, " b"]:
    """The mean over this share of the patches of each picture, the farthest; one at least.

    Written so that an exported graph counts anew for pictures of another size.
    """
    ordered = distances.sort(dim=1, descending=True).values
    counted = torch.ones_like(ordered)
    rank = counted.cumsum(dim=1)
    counted = ((rank - 0.5 <= top * rank[:, -1:]) | (rank < 1.5)).to(ordered)
    return (ordered * counted).sum(dim=1) / counted.sum(dim=1)


def fit(seen: Seen, examples: Examples, settings: Settings) -> Fitted:
    """Memory, Gaussian and threshold of the encoder; nothing but normal pictures is asked."""
    began, names = time.perf_counter(), examples.names(np.array(seen.train_rows))
    head, threshold = learn(
        seen.train[PRETRAINED], names, settings, seen.seed, grouped=examples.groups is not None, blocks=seen.blocks
    )
    seen.heads[PRETRAINED] = head
    if not threshold.report()["vouched"]:
        examples.warnings.append(str(threshold.report()["said"]))
    chosen = {
        "memory": len(head.memory),
        "patches": sum(len(one.patches) for one in seen.train[PRETRAINED]),
        "threshold": float(head.threshold),
        "false_alarms": threshold.report(),
        "seconds": round(time.perf_counter() - began, 2),
    }
    return Fitted(head, chosen)


def learn(
    grids: Sequence[Grid],
    names: Sequence[str],
    settings: Settings,
    seed: int,
    *,
    grouped: bool,
    length: bool = True,
    blocks: Sequence[int] = (),
) -> tuple[Head, Threshold]:
    """A head from normal pictures; in five parts, by names, each is scored by what was learned without it.

    `length`: vectors are brought to length 1, as those of networks are and colours are not.
    """
    knobs = {"score": settings.score, "top": settings.top, "neighbours": settings.neighbours,
             "smooth": settings.smooth, "length": length, "blocks": blocks}  # fmt: skip
    apart = [np.flatnonzero(out) for out in folds(names, np.zeros(len(names), dtype=bool))]
    held = np.concatenate(apart)
    local, whole, peaks = [], [], []
    for out in apart:
        rest = [grids[place] for place in np.setdiff1d(held, out).tolist()]
        head = _memory(rest, settings.memory, seed, knobs)
        for place in out.tolist():
            output = head(grids[place].features())
            local.append(float(farthest(output[:, 0].flatten(1), settings.top)))
            whole.append(float(output[0, 1, 0, 0]))
            peaks.append(float(output[:, 0].max()))
    head = _memory(grids, settings.memory, seed, knobs)
    both = torch.tensor([local, whole])
    head.usual = torch.stack([both.mean(dim=1), both.std(dim=1).clamp_min(1e-6)], dim=1)
    scores = head.cpu().joined(both[0], both[1]).double().numpy()
    groups = [names[place] for place in held.tolist()] if grouped else None
    threshold = Threshold.of(scores, settings.false_alarms, groups)
    head.threshold = torch.tensor(threshold.value)
    head.unit = torch.tensor(Threshold.of(np.array(peaks), settings.false_alarms).value)
    return head.to(device()), threshold


def _memory(grids: Sequence[Grid], count: int, seed: int, knobs: Mapping[str, Any]) -> Head:
    """A head with memory and Gaussian of these pictures."""
    width = grids[0].patches.shape[1]
    empty = Head(remembered=1, width=width, **knobs)
    patches = torch.cat([empty.prepared(one.features())[0] for one in grids])
    rows = core_set(patches, count, seed)
    head = Head(remembered=len(rows), width=width, **knobs)
    head.memory = patches[rows]
    vectors = torch.cat([empty.vector(one.features()) for one in grids])
    head.mean, head.whitening = gaussian(vectors)
    return head.eval()


def measure(told: list[dict[str, Any]], seen: Seen, examples: Examples, settings: Settings) -> dict[str, Any]:
    """Scores of test in percent, with the bounds of 95 of 100 bootstrap draws over pictures (groups)."""
    lines = {one["_key"]: one for one in told}
    if not lines:
        return {"examined": 0}
    keys, row_of = list(lines), {key: row for row, key in enumerate(examples.keys)}
    names = examples.names(np.array([row_of[key] for key in keys]))
    drawn = resampled(names, seen.seed)
    lost: dict[str, str] = {}
    masks = _Masks([lines[key]["_shown"] for key in keys], [lines[key]["_size"] for key in keys], keys, lost)
    ours = _Scored(np.array([one["_score"] for one in lines.values()]), [one["_map"] for one in lines.values()],
                   float(seen.heads[PRETRAINED].threshold))  # fmt: skip
    beside = {name: _baseline(name, seen, examples, settings, keys) for name in seen.test}
    anomalous = np.array([one["_shown"].anomalous for one in lines.values()])
    found: dict[str, Any] = {"examined": len(keys), **_report(ours, anomalous, masks, drawn)}
    whole = {name: one for name, one in beside.items() if one is not None}
    if whole:
        found["baselines"] = {name: _report(one, anomalous, masks, drawn) for name, one in whole.items()}
        found["differences"] = _difference(ours, whole, anomalous, drawn)
    if lost:
        found["masks_set_aside"] = [{"key": key, "reason": reason} for key, reason in lost.items()]
    return found


@dataclass(frozen=True)
class _Scored:
    """What a contestant says of the examined pictures."""

    scores: Float[np.ndarray, " n"]
    maps: list[Float[Tensor, "y x"]]
    threshold: float


@dataclass(frozen=True)
class _Masks:
    """Which pixels of the examined pictures are anomalous, read when asked; `lost` are those that cannot be used."""

    shown: list[Shown]
    sizes: list[tuple[int, int]]
    keys: list[str]
    lost: dict[str, str]

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(one.mask is not None for one in self.shown)

    def __getitem__(self, place: int) -> np.ndarray | None:
        """None where it is not known."""
        one, size = self.shown[place], self.sizes[place]
        if not one.anomalous:
            return np.zeros(size, dtype=bool)
        if one.mask is None:
            return None
        try:
            return read_mask(one.mask, size).numpy()
        except Unreadable as error:
            self.lost[self.keys[place]] = error.reason
            return None


def _baseline(name: str, seen: Seen, examples: Examples, settings: Settings, keys: Sequence[str]) -> _Scored | None:
    """The same method on other features; None where a picture could not be looked at."""
    names = examples.names(np.array(seen.train_rows))
    length = name == "untrained"
    head, _ = learn(seen.train[name], names, settings, seen.seed, grouped=examples.groups is not None, length=length)
    of = {examples.keys[row]: grid for row, grid in zip(seen.test_rows, seen.test[name], strict=True)}
    if not all(key in of for key in keys):
        return None
    outputs = [head(of[key].features()).cpu() for key in keys]
    head = head.cpu()
    return _Scored(np.array([float(head.scores(one)) for one in outputs]), [one[0, 0] for one in outputs],
                   float(head.threshold))  # fmt: skip


def _report(one: _Scored, anomalous: np.ndarray, masks: _Masks | None, drawn: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measured in (("auroc", auroc), ("average_precision", average_precision)):
        found[name], found[f"{name}_between"] = bounded(partial(measured, one.scores, anomalous), drawn)
    above = one.scores > one.threshold
    for name, kind in (("recall", anomalous), ("false_alarms", ~anomalous)):
        found[name], found[f"{name}_between"] = share(int((above & kind).sum()), int(kind.sum()))
    if masks is not None and masks.any:
        found |= _of_pixels(one, masks, drawn)
    return found


def _of_pixels(one: _Scored, masks: _Masks, drawn: np.ndarray) -> dict[str, Any]:
    low, high = (float(bound([bound(part.flatten().tolist()) for part in one.maps])) for bound in (min, max))
    pixels, used = Pixels(low, high), list[int]()
    for place, scores in enumerate(one.maps):
        mask = masks[place]
        if mask is not None:
            pixels.add(enlarged(scores, masks.sizes[place]).numpy(), mask)
            used.append(place)
    if not sum(pixels.count):
        return {"pixel_auroc": None, "pro": None}
    found: dict[str, Any] = {"examined_by_pixel": len(used)}
    some = drawn[:, used]
    found["pixel_auroc"], found["pixel_auroc_between"] = bounded(pixels.auroc, some)
    found["pro"], found["pro_between"] = bounded(pixels.pro, some)
    return found


def _difference(
    ours: _Scored, rivals: Mapping[str, _Scored], anomalous: np.ndarray, drawn: np.ndarray
) -> dict[str, Any]:
    """How far the encoder's AUROC is from the best rival's: a bootstrap, the same draws for both."""
    once = np.ones((1, len(anomalous)))
    value = {name: float(auroc(one.scores, anomalous, once)[0]) for name, one in rivals.items()}
    if not all(map(math.isfinite, value.values())):
        return {}
    rival = max(value, key=lambda name: value[name])
    mean = float(auroc(ours.scores, anomalous, once)[0]) - value[rival]
    both = [auroc(one.scores, anomalous, drawn) for one in (ours, rivals[rival])]
    bound = 2 * float(np.nanstd(both[0] - both[1], ddof=1))
    verdict = "no difference" if abs(mean) <= bound else "better" if mean > 0 else "worse"
    return {"auroc": {"mean": round(mean, 3), "two_standard_errors": round(bound, 3), "verdict": verdict,
                      "against": rival}}  # fmt: skip


def known(source: Source, facts: Mapping[str, Any]) -> tuple[list[Shown | None], dict[str, int]]:
    """What folders or a column say of pictures: none of masks, none where nothing is of the normal class."""
    labels = [None if is_mask(source.key(row)) else source.label(row) for row in range(len(source))]
    if facts["normal"] not in labels:
        return [None] * len(labels), {}
    return [None if one is None else Shown(one, one != facts["normal"], None) for one in labels], {}


def scores(told: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """AUROC, average precision, recall and false alarms of pictures whose class is known; empty where none is."""
    some = [one for one in told if one["_shown"] is not None]
    if not some:
        return {}
    one = _Scored(np.array([one["_score"] for one in some]), [], float(some[0]["_threshold"]))
    anomalous = np.array([one["_shown"].anomalous for one in some])
    drawn = resampled([one.get("group") or one["key"] for one in some], 0)
    return {"normal": facts["normal"], "examined": len(some), **_report(one, anomalous, None, drawn)}


def sections(told: list[dict[str, Any]], examples: Examples, result: Mapping[str, Any]) -> list[Section]:
    """Scores beside baselines, and the pictures that it took for what they are not."""
    found: list[Section] = []
    for name, title in (("auroc", "AUROC by picture"), ("pixel_auroc", "AUROC by pixel"), ("pro", "PRO")):
        if result.get(name) is not None:
            bars = [Bar("this model", result[name], None, "c0")]
            bars += [Bar(who, one[name], None, "plain") for who, one in result.get("baselines", {}).items()]
            found.append(Section(title, "Percent on test.", [Comparison([Bars(title, bars, 100.0)])]))
    row_of = {key: row for row, key in enumerate(examples.keys)}
    wrong = [one for one in told if one["_shown"] and (one["predicted"] == "anomalous") != one["_shown"].anomalous]
    for kind, title in ((True, "Missed"), (False, "False alarms")):
        some = [one for one in wrong if one["_shown"].anomalous == kind]
        some.sort(key=lambda one: one["_score"], reverse=not kind)
        captions = [(row_of[one["_key"]], f"{one['label']}, {one['score']:.3g}") for one in some[:_SHOWN]]
        cards = cards_of(examples, captions)
        if cards:
            lede = f"{len(some)} in all; the threshold is {some[0]['threshold']:.3g}."
            found.append(Section(title, lede, [Cards(cards, least=140)]))
    return found

"""Heads that say something of every pixel, and how they learn on maps that are computed once.

Outputs on a grid are enlarged bilinearly, so what a head says at a pixel can be had for that pixel alone: heads learn
at chosen pixels of the targets as they lie on disk, whatever the grid.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbone import known
from saccade.convnet import ChannelNorm
from saccade.embed import Look, examining
from saccade.encoder import Encoder
from saccade.errors import SaccadeError, Unreadable
from saccade.finetune import task
from saccade.finetune.maps import Maps, look
from saccade.finetune.windows import Frame, slide

PIXELS = 1 << 16
"""Pixels that a linear head learns from, at most, and by which heads are compared; the same number of every picture."""
_WIDTH, _THIN = 64, 16
_AT_ONCE = 1024  # pixels of a window that a step of a decoder learns from
_LOOKS = 4


class LinearLayer(nn.Module):
    """One linear layer on the last map."""

    several = False

    def __init__(self, widths: Sequence[int], channels: int, outputs: int):
        super().__init__()
        self.layer = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, seen: Maps) -> Float[Tensor, "b k _ _"]:
        return self.layer(seen.maps[-1])


class Decoder(nn.Module):
    """Maps of several depths, brought to one width and summed, then made finer in two steps beside the picture.

    It ends at a quarter of the picture's sides; the picture enters through two thin convolutions, because patches know
    what is there and pixels where it ends. Norms are of single cells, so that a window says the same as a picture.
    """

    several = True

    def __init__(self, widths: Sequence[int], channels: int, outputs: int):
        super().__init__()
        self.standards = nn.ModuleList(ChannelNorm(width, elementwise_affine=False) for width in widths)
        self.projections = nn.ModuleList(nn.Conv2d(width, _WIDTH, 1) for width in widths)
        self.mix = _convolution(_WIDTH, _WIDTH)
        self.thin = nn.Sequential(_convolution(channels, _THIN, 2), _convolution(_THIN, _THIN, 2))
        self.middle = _convolution(_WIDTH, _WIDTH)
        self.fine = _convolution(_WIDTH + _THIN, _WIDTH)
        self.layer = nn.Conv2d(_WIDTH, outputs, 1)

    def forward(self, seen: Maps) -> Float[Tensor, "b k _ _"]:
        finest = seen.maps[0].shape[2:]
        parts = zip(seen.maps, self.standards, self.projections, strict=True)
        x = torch.stack([_enlarged(project(norm(part)), finest) for part, norm, project in parts]).sum(dim=0)
        picture = self.thin(2 * seen.images - 1)
        quarter = picture.shape[2:]
        x = self.mix(F.gelu(x))
        x = self.middle(_enlarged(x, [(few + many) // 2 for few, many in zip(finest, quarter, strict=True)]))
        return self.layer(self.fine(torch.cat([_enlarged(x, quarter), picture], 1)))


def _convolution(inputs: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, stride, 1), ChannelNorm(width), nn.GELU())


def _enlarged(x: Float[Tensor, "b k h w"], size: Sequence[int]) -> Float[Tensor, "b k _ _"]:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


NETWORKS: dict[str, Any] = {"linear": LinearLayer, "decoder": Decoder}


class MapHead(task.Head):
    """A head that makes a map: pictures of any size, in windows where they do not fit in one."""

    whole: ClassVar[bool] = True

    def __init__(
        self, kind: str, widths: Sequence[int], channels: int, outputs: int, scale: float | None, overlap: float
    ):
        super().__init__()
        self._said = {"kind": kind, "widths": list(widths), "channels": channels, "outputs": outputs, "scale": scale,
                      "overlap": overlap}  # fmt: skip
        self.scale, self.overlap = scale, overlap
        self.network = NETWORKS[kind](widths, channels, outputs)

    def config(self) -> dict[str, Any]:
        """What builds one like it."""
        return dict(self._said)

    def features(self, backbone: Any, images: Shaped[Tensor, "b c h w"]) -> Maps:
        """What it looks at."""
        return look(backbone, images, self.network.several)

    def forward(self, seen: Maps, size: tuple[int, int] | None = None) -> Float[Tensor, "b k _ _"]:
        """Outputs of every pixel, at `size` or as large as the pictures."""
        return _enlarged(self.network(seen).float(), size or seen.images.shape[2:])

    def look(self, look: Look, pixels: Sequence[Shaped[Tensor, "c h w"]]) -> list[Float[Tensor, "k _ _"]]:
        """Outputs of pictures as they lie on disk, each of its picture's size."""
        encoder, found = look.encoder, list[Tensor]()
        for (height, width, _), alike in itertools.groupby(pixels, lambda x: (x.shape[1], x.shape[2], x.dtype)):
            images = torch.stack([sized(encoder, self.frame(encoder), picture) for picture in alike])
            found += self.outputs(encoder, images, (height, width))
        return found

    def outputs(
        self, encoder: Encoder, images: Shaped[Tensor, "b c h w"], size: tuple[int, int]
    ) -> Float[Tensor, "b k _ _"]:
        """Outputs at `size` of pictures that are as large as they are looked at."""

        def once(window: Tensor, size: tuple[int, int]) -> Tensor:
            return self(self.features(encoder.backbone, window), size)

        return slide(images.to(encoder.device), self.frame(encoder), once, size)

    def frame(self, encoder: Encoder) -> Frame:
        """How large pictures are looked at."""
        return frame_of(encoder, self.scale, self.overlap)

    @abstractmethod
    def answer(self, outputs: Float[Tensor, "b k h w"]) -> tuple[Tensor, ...]:
        """As `task.Head`."""


def frame_of(encoder: Encoder, scale: float | None, overlap: float) -> Frame:
    """How large an encoder looks at pictures; what is no network of ours may hold its size."""
    return Frame(encoder.preprocess.crop, encoder.backbone.stride, scale, overlap, square=not known(encoder.backbone))


def sized(encoder: Encoder, frame: Frame, picture: Shaped[Tensor, "c h w"]) -> Shaped[Tensor, "c _ _"]:
    """A picture as large as it is looked at."""
    return encoder.preprocess.sized(picture, list(frame.sized(picture.shape[1], picture.shape[2])))


class Piece(NamedTuple):
    """A window of a picture. `places` are the pixels of its target, in [-1, 1] across the window: rows and columns."""

    maps: tuple[Float[Tensor, "_ _ _"], ...]
    image: Shaped[Tensor, "c h w"]
    target: Shaped[Tensor, "y x"]
    places: tuple[Float[Tensor, " y"], Float[Tensor, " x"]]


class _Where(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    dtype: Any


@dataclass
class Pieces:
    """Windows of pictures to learn from; what is large lies in a file without a name, maps in half precision."""

    rows: list[int] = field(default_factory=list)  # of the source, one a piece
    kinds: list[Any] = field(default_factory=list)  # pieces of one kind can be stacked
    _held: list[tuple[list[_Where], int]] = field(default_factory=list)
    _file: Any = field(default_factory=tempfile.TemporaryFile)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: int, piece: Piece) -> None:
        """One more."""
        largest = torch.finfo(torch.float16).max
        maps = [part.clamp(-largest, largest).half() for part in piece.maps]
        held = [self._put(part.detach().cpu()) for part in (*maps, piece.image, piece.target, *piece.places)]
        self.rows.append(row)
        self.kinds.append((tuple(part.shape for part in maps), tuple(piece.image.shape), piece.image.dtype))
        self._held.append((held, len(maps)))

    def _put(self, tensor: Tensor) -> _Where:
        array = np.ascontiguousarray(tensor.numpy())
        self._file.seek(0, 2)
        offset = self._file.tell()
        self._file.write(array.tobytes())
        return _Where(offset, array.shape, array.dtype)

    def __getitem__(self, number: int) -> Piece:
        self._file.flush()
        held, maps = self._held[number]
        # copy on write: torch wants memory that it could write to
        found = [torch.from_numpy(np.memmap(self._file, at.dtype, "c", at.offset, at.shape)) for at in held]
        image, target, down, across = found[maps:]
        return Piece(tuple(found[:maps]), image, target, (down, across))


def cut(
    seen: Callable[[Tensor], Maps], frame: Frame, image: Shaped[Tensor, "c h w"], target: Shaped[Tensor, "y x"]
) -> Iterator[Piece]:
    """The windows of a picture as large as it is looked at, side by side, and of its target the pixels in them."""
    size, (high, wide) = (image.shape[1], image.shape[2]), frame.window((image.shape[1], image.shape[2]))
    rows, columns = ((torch.arange(n) + 0.5) * full / n for n, full in zip(target.shape, size, strict=True))
    for top, left in frame.corners(size, overlap=0.0):
        window = image[:, top : top + high, left : left + wide]
        down, across = (
            ((at >= start) & (at < start + side)).nonzero()[:, 0]
            for at, start, side in ((rows, top, high), (columns, left, wide))
        )
        if not len(down) or not len(across):
            continue
        found = seen(window[None])
        places = (2 * (rows[down] - top) / high - 1, 2 * (columns[across] - left) / wide - 1)
        yield Piece(tuple(part[0] for part in found.maps), window, target[down][:, across], places)


def points(piece: Piece, chosen: Int[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    """Where pixels of the target, by number, are in the window: across and down, in [-1, 1]."""
    width = piece.target.shape[1]
    return torch.stack([piece.places[1][chosen % width], piece.places[0][chosen // width]], -1)


def at(grids: Float[Tensor, "b k y x"], where: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n k"]:
    """What grids, enlarged bilinearly, have at these points; the rest is not computed."""
    found = F.grid_sample(grids, where[:, None], mode="bilinear", padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2)


@dataclass(frozen=True)
class Solved:
    """A linear layer with its penalty, and its score at the pixels held out."""

    weight: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]
    penalty: float
    held_out: float


@dataclass(frozen=True)
class Goal:
    """What is learned of a pixel: how many numbers, of which pixels, by which loss, and when it is learned well."""

    outputs: int
    counted: Callable[[Shaped[Tensor, "y x"]], Bool[Tensor, "y x"]]
    loss: Callable[[Float[Tensor, "n k"], Shaped[Tensor, " n"]], Float[Tensor, ""]]
    score: Callable[[Float[Tensor, "n k"], Shaped[Tensor, " n"]], float]
    """Higher is better."""
    solve: Callable[[Float[Tensor, "n d"], Shaped[Tensor, " n"], Bool[Tensor, " n"], bool], Solved]
    """The best linear layer: features, targets, whether held out; and whether it then learns from these too."""


@dataclass(frozen=True)
class Lesson:
    """Pieces with what is learned of them, which are held out, and the pixels that stand for each."""

    pieces: Pieces
    held: Bool[np.ndarray, " pieces"]
    goal: Goal
    seed: int
    device: torch.device
    flip: float
    whole: bool
    """The head that comes out also learns from what is held out, once that has chosen."""

    def usable(self, number: int) -> np.ndarray:
        """The pixels of a piece that count."""
        return np.flatnonzero(self.goal.counted(self.pieces[number].target).flatten().numpy())

    def chosen(self, number: int) -> Int[Tensor, " n"]:
        """The pixels that stand for a piece: always the same."""
        count = max(1, PIXELS // max(1, len(self.pieces)))
        return torch.from_numpy(np.random.default_rng((self.seed, number)).permutation(self.usable(number))[:count])

    def targets(self) -> tuple[Shaped[Tensor, " n"], Bool[Tensor, " n"]]:
        """Of the chosen pixels of all pieces: what is to be learned, and whether it is held out."""
        found, held = [], []
        for number in range(len(self.pieces)):
            chosen = self.chosen(number)
            found.append(self.pieces[number].target.flatten()[chosen])
            held.append(torch.full((len(chosen),), bool(self.held[number])))
        return torch.cat(found).to(self.device), torch.cat(held).to(self.device)


def linear(lesson: Lesson) -> tuple[Solved, dict[str, Any]]:
    """The best linear layer on the last map."""
    rows = []
    for number in range(len(lesson.pieces)):
        piece = lesson.pieces[number]
        where = points(piece, lesson.chosen(number))
        rows.append(at(piece.maps[-1][None].float().to(lesson.device), where[None].to(lesson.device))[0])
    solved = lesson.goal.solve(torch.cat(rows), *lesson.targets(), lesson.whole)
    return solved, {"penalty": solved.penalty, "held_out": round(solved.held_out, 3)}


@dataclass(frozen=True)
class Pace:
    """How a decoder learns: AdamW, a cosine, so many windows a step."""

    steps: int
    batch: int
    rate: float
    weight_decay: float


def decoder(lesson: Lesson, pace: Pace) -> tuple[Decoder, dict[str, Any]]:
    """A decoder, after as many steps as do best on what is held out; then, if wanted, of all pieces in as many."""
    looks = sorted({max(1, round(n * pace.steps / _LOOKS)) for n in range(1, _LOOKS + 1)})
    targets, held = lesson.targets()
    out = [number for number in range(len(lesson.pieces)) if lesson.held[number]]
    best, highest, kept = 0, -math.inf, None
    for step, network in _learning(lesson, pace, [n for n in range(len(lesson.pieces)) if not lesson.held[n]]):
        if step in looks and (found := lesson.goal.score(_said(network, lesson, out), targets[held])) > highest:
            best, highest, kept = step, found, copy.deepcopy(network)
    for step, network in _learning(lesson, pace, list(range(len(lesson.pieces)))) if lesson.whole else ():
        if step == best:
            kept = network
            break
    if kept is None:
        raise SaccadeError("the decoder diverged", path="--decoder-rate", hint="lower it", code=1)
    return kept.eval(), {"steps": best, "weight_decay": pace.weight_decay, "held_out": round(highest, 3)}


def _learning(lesson: Lesson, pace: Pace, numbers: list[int]) -> Iterator[tuple[int, Decoder]]:
    """A decoder after each step on these pieces."""
    first = lesson.pieces[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        network = Decoder([part.shape[0] for part in first.maps], first.image.shape[0], lesson.goal.outputs)
    network.to(lesson.device).train()
    decayed = [x for x in network.parameters() if x.ndim > 1]
    rest = [x for x in network.parameters() if x.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": pace.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=pace.rate)
    generator = np.random.default_rng(lesson.seed)
    usable = {number: lesson.usable(number) for number in numbers}
    batches = _batches(lesson.pieces, [n for n in numbers if len(usable[n])], pace.batch, generator)
    for step in range(1, pace.steps + 1):
        t = (step - 1) / pace.steps
        for group in optimizer.param_groups:
            group["lr"] = pace.rate * min(1.0, t / 0.05 + 1e-2) * 0.5 * (1 + math.cos(math.pi * t))
        with torch.enable_grad():
            seen, where, targets = _drawn(lesson, next(batches), usable, generator)
            found = at(network(seen), where).flatten(0, 1)
            loss = lesson.goal.loss(found, targets)
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, network


def _batches(pieces: Pieces, numbers: list[int], batch: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """Pieces of one kind together, in epochs; what does not fill a batch waits for the next one."""
    waiting: dict[Any, list[int]] = {}
    while True:
        for number in generator.permutation(numbers).tolist():
            some = waiting.setdefault(pieces.kinds[number], [])
            some.append(number)
            if len(some) == batch:
                yield some
                waiting[pieces.kinds[number]] = []


def _drawn(
    lesson: Lesson, numbers: list[int], usable: dict[int, np.ndarray], generator: np.random.Generator
) -> tuple[Maps, Float[Tensor, "b n 2"], Shaped[Tensor, " m"]]:
    """Pieces, some mirrored with all that belongs to them, and drawn pixels of each: where, and what they are."""
    maps, images, where, targets = [], [], [], []
    for number in numbers:
        piece, mirrored = lesson.pieces[number], bool(generator.random() < lesson.flip)
        chosen = torch.from_numpy(generator.choice(usable[number], _AT_ONCE))
        place = points(piece, chosen)
        targets.append(piece.target.flatten()[chosen])
        where.append(place * torch.tensor([-1.0, 1.0]) if mirrored else place)
        maps.append([part.flip(-1) if mirrored else part for part in piece.maps])
        images.append(piece.image.flip(-1) if mirrored else piece.image)
    device = lesson.device
    return _stacked(maps, images, device), torch.stack(where).to(device), torch.cat(targets).to(device)


def _stacked(maps: list[Any], images: list[Tensor], device: torch.device) -> Maps:
    pictures = torch.stack(images).to(device)
    floats = pictures if pictures.is_floating_point() else pictures.float() / 255
    return Maps(tuple(torch.stack(list(parts)).to(device).float() for parts in zip(*maps, strict=True)), floats)


@torch.no_grad()
def _said(network: Decoder, lesson: Lesson, numbers: list[int]) -> Float[Tensor, "n k"]:
    """What a decoder says of the pixels that stand for these pieces."""
    network.eval()
    found = []
    for number in numbers:
        piece = lesson.pieces[number]
        seen = _stacked([piece.maps], [piece.image], lesson.device)
        found.append(at(network(seen), points(piece, lesson.chosen(number))[None].to(lesson.device))[0])
    network.train()
    return torch.cat(found)


class MapSettings(task.TaskSettings):
    """Flags of every task that says something of each pixel."""

    head: Literal["auto", "linear", "decoder"] = Field(
        "auto", description="one linear layer, a small decoder over several depths, or whichever does better held out"
    )
    decoder_steps: int = Field(400, ge=1, description="steps of eight windows that a decoder learns at most")
    decoder_rate: float = Field(2e-3, gt=0, description="a decoder's learning rate")
    decoder_decay: float = Field(0.05, ge=0, description="a decoder's weight decay")
    scale: float | None = Field(
        None, gt=0, description="sides are multiplied by it; if not given, the short side becomes --image-size"
    )
    overlap: float = Field(0.25, ge=0, lt=1, description="how far windows lap over, as a part of their side")
    baselines: bool = Field(True, description="also learn what must be beaten: colour and place, an untrained network")
    zoom: float = Field(1.5, ge=1, description="a moving backbone sees so many times smaller and larger windows too")
    flip: float = Field(0.5, ge=0, le=1, description="how often a view is mirrored; 0 where that is another thing")
    colour: float = Field(0.5, ge=0, description="strength of the colour jitter that a moving backbone sees")

    def pace(self) -> Pace:
        """How a decoder learns."""
        return Pace(self.decoder_steps, 8, self.decoder_rate, self.decoder_decay)


@dataclass
class Seen:
    """What was computed once: maps of the windows of all pictures to learn from; and who looked."""

    encoder: Encoder
    pieces: Pieces
    held: Bool[np.ndarray, " pieces"]
    failures: list[tuple[int, str, str]]
    seed: int
    seconds: float
    kind: str | None = None
    """Of the head that was learned of it."""

    def lesson(self, goal: Goal, flip: float, whole: bool) -> Lesson:
        """Its pieces, and what is to be learned of them."""
        return Lesson(self.pieces, self.held, goal, self.seed, self.encoder.device, flip, whole)


def observe(encoder: Encoder, examples: task.Examples, settings: MapSettings, seed: int, words: str = "maps") -> Seen:
    """Looks at all pictures to learn from. Raises `SaccadeError` for a backbone without patches."""
    if not encoder.grid or not all(encoder.grid):
        raise SaccadeError("this backbone gives one vector and no patches", path="--task", hint="use classification")
    began, pieces, held = time.perf_counter(), Pieces(), list[bool]()
    failures: list[tuple[int, str, str]] = []
    frame, apart = frame_of(encoder, settings.scale, settings.overlap), set(examples.held.tolist())
    console = Console(stderr=True)
    with examining(encoder):

        def seen(window: Tensor) -> Maps:
            return look(encoder.backbone, window.to(encoder.device), settings.head != "linear")

        rows = examples.learned.tolist()
        for row in track(rows, words, console=console, transient=True, disable=not console.is_terminal):
            try:
                picture, target = examples.source[row].pixels, examples.targets[row]
            except Unreadable as error:
                failures.append((row, error.key, error.reason))
                continue
            assert picture is not None
            for piece in cut(seen, frame, sized(encoder, frame, picture[0]), target):
                pieces.add(row, piece)
                held.append(row in apart)
    return Seen(encoder, pieces, np.array(held, dtype=bool), failures, seed, time.perf_counter() - began)


@dataclass(frozen=True)
class Learned:
    """A head's network, and what the held-out part decided."""

    kind: str
    widths: list[int]
    network: nn.Module
    chosen: dict[str, Any]


def learn(seen: Seen, goal: Goal, settings: MapSettings, kind: str | None = None, whole: bool = True) -> Learned:
    """The head that does best on what is held out, or the one that is asked for.

    Not `whole`: it does not learn from what is held out, which is to judge what comes after it.
    """
    began, lesson, wanted = time.perf_counter(), seen.lesson(goal, settings.flip, whole), kind or settings.head
    usable = [bool(len(lesson.usable(number))) for number in range(len(lesson.pieces))]
    for side in (True, False):
        if not any(fine for fine, held in zip(usable, seen.held.tolist(), strict=True) if held is side):
            raise SaccadeError("too few pictures with known pixels", hint="label more of them", code=1)
    first = lesson.pieces[0]
    widths, channels = [part.shape[0] for part in first.maps], first.image.shape[0]
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    if wanted in ("auto", "linear"):
        solved, said = linear(lesson)
        layer = LinearLayer(widths[-1:], channels, goal.outputs)
        with torch.no_grad():
            layer.layer.weight.copy_(solved.weight.T[:, :, None, None])
            layer.layer.get_parameter("bias").copy_(solved.bias)
        found["linear"] = layer, said
    if wanted in ("auto", "decoder"):
        found["decoder"] = decoder(lesson, settings.pace())
    best = max(found, key=lambda name: found[name][1]["held_out"])
    heads = {name: said for name, (_, said) in found.items()}
    network, seen.kind = found[best][0].to(seen.encoder.device), best
    took = {"head": best, "heads": heads, "seconds": round(time.perf_counter() - began, 2)}
    return Learned(best, widths if best == "decoder" else widths[-1:], network, took)


def unlearned(encoder: Encoder, outputs: int, settings: MapSettings) -> Learned:
    """A head that knows nothing: a decoder, unless a linear layer is asked for."""
    kind = "linear" if settings.head == "linear" else "decoder"
    channels, side = encoder.backbone.config.channels, encoder.preprocess.crop
    with examining(encoder):
        black = torch.zeros(1, channels, side, side, device=encoder.device)
        widths = [part.shape[1] for part in look(encoder.backbone, black, kind == "decoder").maps]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[kind](widths, channels, outputs)
    return Learned(kind, widths, network, {"head": kind})

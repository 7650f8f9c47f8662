"""Is the representation alive: figures of features, loss and teacher while a run trains, and a verdict with a cause.

`Monitor` judges from the lines of metrics.jsonl alone, so a run that goes on comes to the verdicts it would have had.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saccade.data import Source
from saccade.draws import Permutation
from saccade.encoder import Encoder, Preprocess
from saccade.errors import Unreadable

RECENT = 100
"""Steps over which figures are averaged before they are judged, and a few lines at least."""
LINES = 5
DIFFERENCE = 2 / 255
"""Mean difference of pixels below which two pictures count as the same."""


def effective_rank(features: Float[Tensor, "b d"]) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the centred features' singular values, 1 to min(b, d)."""
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    shares = values / values.sum().clamp_min(1e-12) + 1e-12
    return math.exp(-(shares * shares.log()).sum().item())


def spread(features: Float[Tensor, "b d"]) -> float:
    """How far unit-length features are from being all the same: 0 the same, 1 in all directions."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return 1 - unit.mean(0).norm().item() ** 2


def distinct(pixels: Shaped[Tensor, "b c h w"]) -> int:
    """How many different pictures there are, by 16 x 16 of their pixels; re-encoded copies count as the same."""
    height, width = pixels.shape[2:]
    points = pixels[:, :, :: max(1, height // 16), :: max(1, width // 16)].flatten(1).to(torch.float32)
    if not pixels.is_floating_point():
        points = points / torch.iinfo(pixels.dtype).max
    same = torch.cdist(points, points, p=1) < DIFFERENCE * points.shape[1]
    return int((~same.tril(-1).any(1)).sum())


def choose(source: Source, preprocess: Preprocess, count: int) -> Shaped[Tensor, "b c s s"] | None:
    """A fixed choice of the source's pictures as the encoder takes them; None where it has none."""
    chosen = Permutation(len(source), "health")
    pictures = []
    for place in range(min(count, len(source))):
        with contextlib.suppress(Unreadable):
            pixels = source[chosen(place)].pixels
            if pixels is not None and pixels.shape[:2] == (1, preprocess.channels):
                pictures.append(preprocess(pixels))
    kinds = {picture.dtype for picture in pictures}
    return torch.stack([p if len(kinds) == 1 else p.float() for p in pictures]) if pictures else None


@torch.inference_mode()
def look(encoder: Encoder, pictures: Shaped[Tensor, "b c s s"]) -> dict[str, Any]:
    """`rank` and `spread` of the features of these pictures, None when they are no numbers; `most`, the highest rank
    that they could have; and the length of all `weights` together.
    """
    parts = [encoder.backbone.pooled(part.to(encoder.device)).float().cpu() for part in pictures.split(64)]
    features = torch.cat(parts)
    alive = bool(torch.isfinite(features).all())
    return {
        "rank": effective_rank(features) if alive else None,
        "spread": spread(features) if alive else None,
        "most": min(features.shape),
        "weights": torch.stack([p.float().square().sum() for p in encoder.parameters()]).sum().sqrt().item(),
    }


@dataclass(frozen=True)
class Finding:
    """A verdict, as in the interface, with what was seen and what to do about it."""

    verdict: str = "healthy"
    cause: str = ""
    remedy: str = ""

    @property
    def advice(self) -> str | None:
        """Cause and remedy in words; None where nothing is wrong."""
        return f"{self.cause}; {self.remedy}" if self.cause else None

    def __str__(self) -> str:
        return f"{self.verdict}: {self.advice}" if self.cause else self.verdict


_SLOWER = "lower --lr or lengthen --warmup"
_ANSWERS = (("teacher_entropy", "prototype_use", "picture"), ("patch_entropy", "patch_use", "hidden patch"))
"""What is logged of a teacher's answers: their entropy, which part of the prototypes they use, and for what."""


class Monitor:
    """Follows the lines of metrics.jsonl. `finding` is the verdict now, `history` the verdicts by step.

    `chance` is what metrics are, by name, where the method tells nothing apart; `warmup` the steps in which the
    learning rate rises; `samples` how many the data have. A new verdict has to stand on two lines, but for what is
    plain at once.
    """

    def __init__(self, chance: dict[str, float], warmup: int, samples: int):
        self.chance, self.warmup, self.samples = chance, warmup, samples
        self._level = chance.get("cls_loss", chance.get("loss"))
        self.finding, self.history = Finding(), list[dict[str, Any]]()
        self._recent = deque[dict[str, Any]]()
        self._figures: dict[str, Any] = {}
        self._first: dict[str, Any] = {}  # figures when they were first seen, of the untrained network
        self._suspected = "healthy"
        self._lowest = math.inf

    def add(self, entry: dict[str, Any]) -> bool:
        """Takes in a line; whether the verdict is another than before."""
        entry = {**entry, "loss": entry.get("cls_loss", entry["loss"]), **entry.get("health", {})}
        self._figures |= entry
        self._first = {**entry, **self._first}
        self._recent.append(entry)
        while len(self._recent) > LINES and entry["step"] - self._recent[0]["step"] >= RECENT:
            self._recent.popleft()
        plain = self._broken() or self._alike()
        found = plain or (self._trained() if entry["step"] > self.warmup else None)
        if found is None:
            plain = found = self._outgrown()
        found = found or Finding()
        settled, self._suspected = plain is not None or found.verdict == self._suspected, found.verdict
        changed = settled and found.verdict != self.finding.verdict
        if changed or found.verdict == self.finding.verdict:
            self.finding = found
        if changed:
            self.history.append({"step": entry["step"], "verdict": found.verdict, "advice": found.advice})
        return changed

    def summary(self) -> dict[str, Any]:
        """The verdict, its advice, the figures that it stands on, and the verdicts before it."""
        names = ("rank", "spread", *(name for *two, _ in _ANSWERS for name in two), "gradient_norm")
        return {"verdict": self.finding.verdict, **{name: self._figures.get(name) for name in names},
                "chance": self.chance, "advice": self.finding.advice, "history": self.history}  # fmt: skip

    def _mean(self, name: str) -> float | None:
        """Over the recent lines after the warm-up that have it."""
        values = [line[name] for line in self._recent if line.get(name) is not None and line["step"] > self.warmup]
        return sum(values) / len(values) if values else None

    def _broken(self) -> Finding | None:
        """Numbers have become none."""
        loss, figures = self._figures["loss"], self._figures
        if math.isfinite(loss) and not ("rank" in figures and figures["rank"] is None):
            return None
        what = "features are" if math.isfinite(loss) else "loss is"
        return Finding("diverged", f"the {what} no number any more", _SLOWER)

    def _alike(self) -> Finding | None:
        """The data themselves show the same thing again and again."""
        figures, kinds = self._figures, {"pictures": "pictures looked at", "batch": "pictures of a batch"}
        for shown, where in kinds.items():
            different = figures.get("distinct" if shown == "pictures" else "batch_distinct", 0)
            if figures.get(shown, 0) > 1 and 4 * different <= figures[shown]:
                cause = f"the pictures are (nearly) all the same: {different} of {figures[shown]} {where} differ"
                return Finding("constant_features", cause, "look in the data for black, empty or repeated files")
        return None

    def _growth(self) -> tuple[float, float]:
        """How many times the weights are what they were at first, and how far no good rate moves them so soon."""
        grown = self._figures.get("weights", 0.0) / max(self._first.get("weights", 0.0), 1e-12)
        return grown, 2 + 0.002 * self._figures["step"]

    def _outgrown(self) -> Finding | None:
        """The weights are twice as far as even an ill run may take them, whatever loss and features look like."""
        grown, limit = self._growth()
        if grown <= 2 * limit:
            return None
        cause = f"the weights have grown {grown:.1f} times: the learning rate is too high"
        return Finding("diverged", cause, _SLOWER)

    def _trained(self) -> Finding | None:
        """What is judged once the learning rate has risen, the gravest first."""
        risen = self._risen()
        ill = self._constant() or self._one_answer() or self._uniform() or self._blind() or self._low_rank()
        if risen is not None or ill is None:
            return risen or self._starved()
        grown, limit = self._growth()
        if grown > limit:
            return Finding("diverged", f"{ill.cause}, and the weights have grown {grown:.1f} times: the learning rate "
                           "is too high", _SLOWER)  # fmt: skip
        return ill

    def _risen(self) -> Finding | None:
        """The loss rises above that of the untrained network, or gives back half of what it had gained.

        A loss against a teacher, who changes, is only held against what chance gives.
        """
        last, lines = self._recent[-1]["step"], list(self._recent)
        fresh = [line for line in lines if last - line["step"] < RECENT // 2]
        window = fresh if len(fresh) >= LINES else lines[-LINES:]
        now, first = statistics.median(line["loss"] for line in window), self._first["loss"]
        self._lowest = min(self._lowest, now)
        low, high = sorted((first, first if self._level is None else self._level))
        gained = 0.0 if "teacher_entropy" in self._first else low - self._lowest
        lost = gained > 0.1 * low and now > self._lowest + 0.5 * gained
        brief = len(window) < LINES or last - window[0]["step"] < RECENT // 5
        if brief or not (lost or now > 1.15 * high):
            return None
        before = f"after {self._lowest:.4g}" if lost else f"from {first:.4g} untrained"
        cause = f"the loss rose to {now:.4g} {before}: the learning rate is too high"
        return Finding("diverged", cause, _SLOWER)

    def _constant(self) -> Finding | None:
        """All pictures get the same features, and did not from the untrained network.

        A class token that no loss reads loses spread as well (to a thirtieth in healthy MAE), but no directions.
        """
        (spread, rank), (before, most) = (
            (line.get("spread"), line.get("rank")) for line in (self._figures, self._first)
        )
        if spread is None or rank is None or before is None or most is None:
            return None
        if spread >= 1e-6 and not (spread < 0.01 * before and rank < 0.5 * most):
            return None
        return Finding(
            "constant_features", "all pictures get the same features", f"{_SLOWER}, or make the views harder"
        )

    def _one_answer(self) -> Finding | None:
        """The teacher gives all pictures, or all hidden patches, the same prototypes."""
        for entropy, name, what in _ANSWERS:
            use, top = self._mean(name), self.chance.get(entropy)
            if use is None or top is None or use * math.exp(top) >= 3:
                continue
            many = f"{use * math.exp(top):.1f} of {math.exp(top):.0f} prototypes"
            cause = f"the teacher gives every {what} the same {many}: centring fails"
            return Finding("constant_features", cause, "lower `centre_momentum` or --lr")
        return None

    def _uniform(self) -> Finding | None:
        """The teacher's answers tell nothing, so the student learns to say nothing."""
        loss = self._mean("loss")
        for name, _, what in _ANSWERS:
            entropy, top = self._mean(name), self.chance.get(name)
            if entropy is None or top is None:
                continue
            count = round(math.exp(top))
            wide = count > self.samples
            if entropy < (0.95 if wide else 0.998) * top:
                continue
            stayed = f"the teacher's answer to every {what} has entropy {entropy:.4f} of {top:.4f}"
            if what == "picture" and loss is not None and abs(loss / top - 1) < 0.02:
                stayed = f"loss has stayed at {loss:.4f}"
            cause = f"{stayed} = ln {count}: the teacher is uniform"
            if wide:
                cause += f", its head far too wide for {self.samples} samples"
                return Finding("uniform_teacher", cause, "lower `prototypes`, then `teacher_temperature`")
            return Finding("uniform_teacher", cause, "lower `teacher_temperature`, or --lr where it is 0.04 or less")
        return None

    def _blind(self) -> Finding | None:
        """Samples are compared, all come out the same, and there is no gradient left that would change it."""
        loss, gradient, before = self._mean("loss"), self._mean("gradient_norm"), self._first.get("gradient_norm")
        if self._level is None or loss is None or gradient is None or before is None:
            return None
        if "teacher_entropy" in self._first or abs(loss / self._level - 1) > 0.01 or gradient > 0.02 * before:
            return None
        cause = f"loss has stayed at {loss:.4f}, where all samples are the same to it ({self._level:.4f})"
        return Finding("constant_features", cause, f"{_SLOWER}, or raise `temperature`")

    def _low_rank(self) -> Finding | None:
        """The features lie in few directions."""
        rank = self._figures.get("rank")
        if rank is None or rank >= min(3.0, 0.1 * self._figures["most"]):
            return None
        cause = f"features fill {rank:.1f} directions of {self._figures['most']}"
        return Finding("low_rank", cause, "train longer, raise --batch, or make the views harder")

    def _starved(self) -> Finding | None:
        """The model waits for data."""
        waited = self._mean("data_wait")
        if waited is None or waited <= 0.5 or len(self._recent) < LINES:
            return None
        cause = f"{100 * waited:.0f} % of the time is spent waiting for data"
        return Finding("starved", cause, "raise --workers, or store smaller pictures on a faster disk")

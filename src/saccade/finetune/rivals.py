"""What a head on maps must beat: colour and place of a pixel, and the same head on a network that learned nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from rich.console import Console
from rich.progress import track
from torch import Tensor

from saccade.backbone import known
from saccade.embed import examining
from saccade.encoder import untrained
from saccade.finetune.pixelwise import PIXELS, Goal, MapHead, MapSettings, Seen, Solved, observe
from saccade.finetune.task import Examples

Outputs = Callable[[Shaped[Tensor, "c h w"]], Float[Tensor, "k h w"]]


def rivals(
    seen: Seen,
    examples: Examples,
    settings: MapSettings,
    goal: Goal,
    head: Callable[[Seen], MapHead],
    rows: Sequence[int],
    count: Callable[[Tensor, Tensor], Any],
) -> dict[str, list[Any]]:
    """By name of a rival what `count` makes of its outputs and the target, of each of these rows.

    `head` learns one on what another encoder saw. None where `settings` want none.
    """
    if not settings.baselines:
        return {}
    contestants: dict[str, Outputs] = {"pixels": _colour(examples, goal, seen.seed)}
    if known(seen.encoder.backbone):
        fresh = untrained(seen.encoder, seen.seed).to(seen.encoder.device)
        learned = head(observe(fresh, examples, settings, seen.seed, "maps of the untrained network"))
        with examining(fresh) as look:
            contestants["untrained"] = lambda picture: learned.look(look, [picture])[0]
            return _counted(contestants, examples, rows, count)
    return _counted(contestants, examples, rows, count)


@torch.inference_mode()
def _counted(
    contestants: dict[str, Outputs], examples: Examples, rows: Sequence[int], count: Callable[[Tensor, Tensor], Any]
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in contestants}
    console = Console(stderr=True)
    for row in track(rows, "rivals", console=console, transient=True, disable=not console.is_terminal):
        picture, target = examples.source[row].pixels, examples.targets[row]
        assert picture is not None
        for name, contestant in contestants.items():
            found[name].append(count(contestant(picture[0]).cpu(), target))
    return found


def _colour(examples: Examples, goal: Goal, seed: int) -> Outputs:
    """The best linear layer on the colour of a pixel and on a quadratic of its place."""
    rows, targets, held = list[Tensor](), list[Tensor](), list[Tensor]()
    apart, learned = set(examples.held.tolist()), examples.learned.tolist()
    for row in learned:
        picture, target = examples.source[row].pixels, examples.targets[row]
        assert picture is not None
        usable = np.flatnonzero(goal.counted(target).flatten().numpy())
        chosen = np.random.default_rng((seed, row)).permutation(usable)[: max(1, PIXELS // len(learned))]
        where = torch.from_numpy(chosen)
        rows.append(_said(picture[0])[where])
        targets.append(target.flatten()[where])
        held.append(torch.full((len(where),), row in apart))
    solved: Solved = goal.solve(torch.cat(rows), torch.cat(targets), torch.cat(held), True)

    def outputs(picture: Tensor) -> Tensor:
        return (_said(picture) @ solved.weight + solved.bias).T.unflatten(1, tuple(picture.shape[1:]))

    return outputs


def _said(picture: Shaped[Tensor, "c h w"]) -> Float[Tensor, "n d"]:
    """Colour and place of every pixel."""
    highest = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(picture.dtype, 1.0)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in picture.shape[1:]), indexing="ij")
    place = torch.stack([y, x, y * y, x * x, y * x])
    return torch.cat([picture.float() / highest, place]).flatten(1).T

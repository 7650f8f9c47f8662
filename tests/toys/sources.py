"""Small sources in memory: every sample is a function of its index."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.data import Sample, Source
from saccade.errors import Unreadable


class Toy(Source):
    """Samples that a function makes from a generator of their own."""

    def __init__(self, size: int, broken: frozenset[int] = frozenset()):
        self._size, self._broken = size, broken

    def __len__(self) -> int:
        return self._size

    def make(self, index: int, generator: torch.Generator) -> Sample:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        if index in self._broken:
            raise Unreadable(f"{index}", "a toy that is broken on purpose")
        return self.make(index, torch.Generator().manual_seed(index))


def smooth(generator: torch.Generator, frames: int, channels: int, height: int, width: int) -> Tensor:
    """Blobs in [0, 1] that move from frame to frame: something to learn, and different in every sample."""
    phase = torch.rand(channels, 4, generator=generator) * 6
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    t = torch.arange(frames)[:, None, None, None] * 0.3
    waves = torch.sin(x * phase[:, 0, None, None] + phase[:, 1, None, None] + t)
    waves = waves * torch.sin(y * phase[:, 2, None, None] + phase[:, 3, None, None] - t)
    return (waves + 1) / 2


class Pictures(Toy):
    """uint8 RGB pictures of different sizes."""

    def make(self, index: int, generator: torch.Generator) -> Sample:
        pixels = smooth(generator, 1, 3, 34 + index % 5, 40 - index % 3).mul(255).round().to(torch.uint8)
        return Sample(f"picture {index}", pixels, label=str(index % 2))


class Bands(Toy):
    """Pictures of 13 bands of 16 bits."""

    def make(self, index: int, generator: torch.Generator) -> Sample:
        pixels = smooth(generator, 1, 13, 20 + index % 4, 24).mul(65535).round().to(torch.uint16)
        return Sample(f"scene {index}", pixels, group=f"orbit {index % 3}")


class Clips(Toy):
    """uint8 RGB clips of four frames."""

    def make(self, index: int, generator: torch.Generator) -> Sample:
        return Sample(f"clip {index}", smooth(generator, 4, 3, 24, 20 + index % 4).mul(255).round().to(torch.uint8))


class Pairs(Toy):
    """Pictures with texts: two of every four have the same one, every fourth has two."""

    _WORDS = ("red", "green", "blue", "bright", "dark", "striped", "wavy", "calm")

    def make(self, index: int, generator: torch.Generator) -> Sample:
        pixels = smooth(generator, 1, 3, 34 + index % 5, 40 - index % 3).mul(255).round().to(torch.uint8)
        number = index - 1 if index % 4 == 3 else index
        words = [self._WORDS[number * step % 8] for step in (1, 3, 5)]
        texts = [" ".join([*words, str(number)]), f"{words[0]} and {number}"]
        return Sample(f"pair {index}", pixels, tuple(texts[: 1 + (index % 4 == 0)]), label=str(index % 2))


class Texts(Toy):
    """Texts without pictures; some samples carry two."""

    _WORDS = ("the", "eye", "moves", "from", "one", "fixation", "to", "another", "überall")

    def make(self, index: int, generator: torch.Generator) -> Sample:
        picks = torch.randint(len(self._WORDS), (2, 3 + index % 4), generator=generator).tolist()
        texts = [" ".join(self._WORDS[place] for place in words) for words in picks]
        return Sample(f"text {index}", texts=tuple(texts[: 1 + index % 2]))

"""Self-supervised learning from pictures: pretrain, evaluate, embed, search.

The names below are imported when they are first used, so that `import saccade` costs no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from saccade.errors import SaccadeError

if TYPE_CHECKING:
    from saccade.adapt import adapt as adapt
    from saccade.diagnose import diagnose as diagnose
    from saccade.embed import embed as embed
    from saccade.encoder import Encoder as Encoder
    from saccade.evaluate import evaluate as evaluate
    from saccade.export import export as export
    from saccade.finetune import finetune as finetune
    from saccade.finetune import predict as predict
    from saccade.label_next import label_next as label_next
    from saccade.own import Own as Own
    from saccade.run import Run as Run
    from saccade.search import Hit as Hit
    from saccade.search import Index as Index
    from saccade.train import pretrain as pretrain
    from saccade.vit import Features as Features
    from saccade.weights import load as load

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "weights",
    "Features": "vit",
    "Hit": "search",
    "Index": "search",
    "Own": "own",
    "Run": "run",
    "adapt": "adapt",
    "diagnose": "diagnose",
    "embed": "embed",
    "evaluate": "evaluate",
    "export": "export",
    "finetune": "finetune",
    "label_next": "label_next",
    "load": "weights",
    "predict": "finetune",
    "pretrain": "train",
}

__all__ = [
    "Encoder",
    "Features",
    "Hit",
    "Index",
    "Own",
    "Run",
    "SaccadeError",
    "__version__",
    "adapt",
    "diagnose",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "label_next",
    "load",
    "predict",
    "pretrain",
]


class _Package(ModuleType):
    """`saccade.evaluate` stays the verb, though importing the page of that name would put the page in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'saccade' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"saccade.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package

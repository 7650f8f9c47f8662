"""Every annotation of shape and type is executed in the tests; in production nothing installs this hook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it

assert not any(name.split(".")[0] == "saccade" for name in sys.modules), "the hook must come before the first import"
install_import_hook("saccade", f"{__name__}.checked")


@pytest.fixture(scope="module")
def workshop() -> Iterator[Any]:
    """A process that starts sessions of `pretrain`."""
    from toys import forge

    with forge.forge() as process:
        yield process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures as files."""
    from toys import forge
    from toys.sources import Pictures

    return forge.pictures(tmp_path_factory.mktemp("data"), Pictures(30))

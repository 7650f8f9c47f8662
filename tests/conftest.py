"""Every annotation of shape and type is executed in the tests; in production nothing installs this hook."""

from __future__ import annotations

import sys

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it

assert not any(name.split(".")[0] == "saccade" for name in sys.modules), "the hook must come before the first import"
install_import_hook("saccade", f"{__name__}.checked")

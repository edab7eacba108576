"""Loading the compiled loops, where numba is installed."""

import logging
import os
from functools import cache
from typing import Any

SWITCH = "SUTURE_COMPILED"  #: environment variable: 0 takes the plain path, 1 the compiled one for small models too
_WORTH = 1 << 26  # entries of all models; fewer are merged before the kernels are loaded
log = logging.getLogger(__name__)


def worth_it(entries: int) -> bool:
    """Whether loading the kernels, about a second, pays for a merge of so many entries of all models together."""
    choice = os.environ.get(SWITCH)
    return entries >= _WORTH if choice not in ("0", "1") else choice == "1"


@cache
def compiled_loops() -> Any:
    """The module of compiled loops; None where numba is not installed, or cannot compile here."""
    try:
        from suture.merging.compiled import loops
    except ImportError:
        return None
    except RuntimeError as error:  # no folder in which numba may keep what it compiles
        log.warning("The compiled loops are not used: %s", " ".join(str(error).split()))
        return None
    return loops

"""vitkit: efficient vision models on edge devices, measured and verified.

`vitkit.open_engine` and the other names of `vitkit.runtimes` are found here too.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitkit.runtimes import *  # noqa: F403

__version__ = "0.1.0"

# An application decides what it shows of this log; the command line shows it by itself.
logging.getLogger("vitkit").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    # Late, because it imports numpy, which `vitkit --help` can do without.
    runtimes = import_module("vitkit.runtimes")
    if name in runtimes.__all__:
        return getattr(runtimes, name)
    raise AttributeError(f"module 'vitkit' has no attribute {name!r}")

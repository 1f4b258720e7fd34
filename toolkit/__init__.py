"""vitkit: efficient vision models on edge devices, measured and verified.

`vitkit.open_engine` and the other names of `vitkit.runtimes` are found here too.
"""

# The names of __all__ come from there.
# ruff: noqa: F403, F405

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitkit.runtimes import *

__version__ = "0.1.0"

# An application decides what it shows of this log; the command line shows it by itself.
logging.getLogger("vitkit").addHandler(logging.NullHandler())


__all__ = [
    "Artifact",
    "BadArtifact",
    "BadInput",
    "BadRequest",
    "Classification",
    "DeviceError",
    "Engine",
    "ExportFailed",
    "ImageSpec",
    "Label",
    "MissingBackend",
    "ModelCard",
    "Panoptic",
    "RunFailed",
    "Segment",
    "Semantic",
    "Session",
    "TensorSpec",
    "Tensors",
    "VitkitError",
    "__version__",
    "open_engine",
    "read_artifact",
]


# Out of type checkers' sight, which would take any name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Late, because it imports numpy, which `vitkit --help` can do without.
        if name in __all__:
            return getattr(import_module("vitkit.runtimes"), name)
        raise AttributeError(f"module 'vitkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""vitkit: efficient vision models on edge devices, measured and verified.

`vitkit.open_engine` and the other names of `vitkit.runtimes` are found here too, and those of `vitkit.api`:
`wrap`, `export`, `verify`, `evaluate` and `bench`. The last two are packages that can also be called.
"""

# The names of __all__ come from there.
# ruff: noqa: F403, F405

from __future__ import annotations

import logging
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitkit.api import bench, evaluate, export, verify, wrap
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
    "bench",
    "evaluate",
    "export",
    "open_engine",
    "read_artifact",
    "verify",
    "wrap",
]
_OF_API = ("export", "verify", "wrap")
_PACKAGES = ("bench", "evaluate")


class CallablePackage(ModuleType):
    """A package of vitkit that, called, is the function of `vitkit.api` with its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        return getattr(import_module("vitkit.api"), self.__name__.rpartition(".")[2])(*args, **options)


# Out of type checkers' sight, which would take any name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Late, because it imports numpy, which `vitkit --help` can do without.
        if name in _PACKAGES:
            return import_module(f"vitkit.{name}")
        if name in __all__:
            return getattr(import_module("vitkit.api" if name in _OF_API else "vitkit.runtimes"), name)
        raise AttributeError(f"module 'vitkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Opening an artifact and running it: numpy, and the one vendor package that the artifact needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard, TensorSpec, read_artifact
from vitkit.runtimes.classification import Classification, Label
from vitkit.runtimes.engine import Engine, Session, open_engine
from vitkit.runtimes.errors import (
    BadArtifact,
    BadInput,
    BadRequest,
    DeviceError,
    ExportFailed,
    MissingBackend,
    RunFailed,
    VitkitError,
)
from vitkit.runtimes.privacy import stop_reports

if TYPE_CHECKING:
    from vitkit.runtimes.panoptic import Panoptic, Segment

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
    "Session",
    "TensorSpec",
    "VitkitError",
    "open_engine",
    "read_artifact",
]

stop_reports()


# Out of type checkers' sight, which would take any name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Late, because a classifier needs nothing of the panoptic part.
        if name in ("Panoptic", "Segment"):
            return getattr(import_module("vitkit.runtimes.panoptic"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

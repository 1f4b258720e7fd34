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
    from vitkit.runtimes.semantic import Semantic
    from vitkit.runtimes.tensors import Tensors

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
    "open_engine",
    "read_artifact",
]

stop_reports()

# Late, because an app needs the results of one task.
_RESULTS = {
    "Panoptic": "vitkit.runtimes.panoptic",
    "Segment": "vitkit.runtimes.panoptic",
    "Semantic": "vitkit.runtimes.semantic",
    "Tensors": "vitkit.runtimes.tensors",
}


# Out of type checkers' sight, which would take any name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _RESULTS:
            return getattr(import_module(_RESULTS[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

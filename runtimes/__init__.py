"""Opening an artifact and running it: numpy, and the one vendor package that the artifact needs."""

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
    VitkitError,
)

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
    "Session",
    "TensorSpec",
    "VitkitError",
    "open_engine",
    "read_artifact",
]

"""The task `embedding`: an image becomes a unit vector, the first output of the network."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitkit.runtimes import BadArtifact, BadRequest, ModelCard
from vitkit.runtimes.image import Placement
from vitkit.runtimes.tasks import Task

TASK = Task(
    decode="embedding_task", parity="embedding_parity", metric="embedding_task", picture="embedding_task"
)
Vector = NDArray[np.float32]
OPTIONS = ()
VIDEO_OPTIONS = None


def decode(outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement) -> Vector:
    """Outputs of one image -> its vector (D,) of length 1."""
    vector = outputs[card.outputs[0].name].astype(np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def check_options() -> None:
    """There are none."""


def check_card(card: ModelCard) -> None:
    """Raises BadArtifact for a first output that is no vector."""
    if len(card.outputs[0].shape) != 2:
        raise BadArtifact(f"an embedding has the shape (N, D), the first output is {card.outputs[0]}")


def evaluate(network: Any, data: Any, progress: Any) -> Any:
    """No metric yet."""
    raise BadRequest("embeddings have no metric; compare engines with vitkit verify")


def describe(result: Vector) -> str:
    """The largest element, on one line."""
    return f"{result.size} dimensions, the largest is {int(result.argmax())}"


def to_json(result: Vector) -> dict[str, Any]:
    """The vector as numbers."""
    return {"vector": result.tolist()}


def draw(image: NDArray[np.uint8], result: Vector) -> Image.Image:
    """The vector as a strip of greys."""
    return Image.fromarray((128 + 127 * result[None, :]).astype(np.uint8)).resize((result.size * 4, 16))

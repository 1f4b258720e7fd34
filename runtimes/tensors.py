"""Raw tensors: an engine's outputs by name, for networks whose results only the application understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard, check_decode
from vitkit.runtimes.errors import BadArtifact
from vitkit.runtimes.image import Placement


@dataclass(frozen=True)
class Tensors:
    """The outputs of one image by name, as the engine returns them without the dimension of the images."""

    by_name: Mapping[str, NDArray[Any]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An output; raises KeyError, with the names that there are, for an unknown one."""
        if name not in self.by_name:
            raise KeyError(f"no output {name!r}; there are {', '.join(self.by_name)}")
        return self.by_name[name]


def decode(outputs: Mapping[str, NDArray[Any]], card: ModelCard, place: Placement) -> Tensors:
    """Outputs of ONE image (no batch dimension), as they are."""
    return Tensors(dict(outputs))


def check_options() -> None:
    """Decoding has no options."""


def check_card(card: ModelCard) -> None:
    """Raises BadArtifact for a card with roles of outputs, or an output that does not go over the images."""
    check_decode(card, (), ())
    images = card.inputs[0].shape[:1]
    for spec in card.outputs:
        if spec.shape[:1] != images:
            raise BadArtifact(
                f"the output {spec} does not go over the images as the input {card.inputs[0]} does: "
                "its first dimension must be the same"
            )

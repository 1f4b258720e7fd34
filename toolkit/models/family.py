"""What every family of models has: a config, a module, a card, the layouts of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from vitkit.runtimes.card import ImageSpec, TensorSpec

if TYPE_CHECKING:
    Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model; families add their own fields. `image_size` is the input's side in pixels."""

    num_classes: int = 1000
    image_size: int = 224


class Model(nn.Module):
    """A network that vitkit trains and exports; see `vitkit.exporters.source.Deployable`."""

    config: ModelConfig
    output_names: tuple[str, ...]

    @property
    def float_modules(self) -> tuple[str, ...]:
        """What stays float in every engine, as glob patterns over module paths."""
        return ()

    def deploy(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised (B, 3, H, W) images -> the tensors that an engine returns."""
        raise NotImplementedError

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        """Decisions inside the network on which all that follows hangs, by the name of their node."""
        return {}

    def layers(self) -> dict[str, nn.Module]:
        """The parts that follow each other from input to output, by name."""
        raise NotImplementedError


@dataclass(frozen=True)
class Labels:
    """The classes of a data set: `names`, its own `ids` if they differ, and which classes are things."""

    names: tuple[str, ...]
    ids: tuple[str, ...] | None = None
    things: tuple[bool, ...] | None = None


class CardParts(NamedTuple):
    """The parts of a run's card that its family decides; see `vitkit.runtimes.card.ModelCard`."""

    outputs: tuple[TensorSpec, ...]
    image: ImageSpec
    decode: dict[str, Any]


class Place(NamedTuple):
    """Where a layout keeps one of our tensors: under each of `names` the same, in this `shape`.

    A `flipped` matrix has our rows as columns; otherwise the shape differs from ours by 1s at the end.
    """

    names: tuple[str, ...]
    shape: Shape
    flipped: bool = False


@dataclass(frozen=True)
class Layout:
    """How a project names the tensors of a family's models.

    `place` finds our tensor of a name and shape. `heads` matches our names of the tensors that have a row
    for every class, and `void` rows more. `training` matches their names of what only training needs;
    `spare` gives other tensors of theirs that ours do without, with their shapes.
    """

    place: Callable[[Any, str, Shape], Place]
    heads: str
    void: int = 0
    training: str = r"(?!)"
    spare: Callable[[Any], dict[str, Shape]] = lambda config: {}


@dataclass(frozen=True)
class Family:
    """The models of one architecture.

    `config` is the type of their configs, `module` builds a model from one, `task` is a key of
    `vitkit.runtimes.tasks.TASKS`, `card` makes the card's parts. `training` is the class of
    `vitkit.train.task.TrainingTask` that trains them, as `module:class`. `layouts` are those of other
    projects' checkpoints, by the name that `vitkit import --format` takes. `labels` names the classes of
    the data set that models with so many classes are published for.
    """

    config: type[ModelConfig]
    module: Callable[[Any], Model]
    task: str
    card: Callable[[Any, Labels], CardParts]
    training: str
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    labels: Mapping[int, Callable[[], Labels]] = field(default_factory=dict)

"""Parity: does the engine do what the float model does? What the comparisons of all tasks share.

How an engine is compared is the task's own: `parity` of its row in `TASKS` names a module with
`GOLDEN_PAIRS`, `check_golden` and `check_images`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.golden import read_golden
from vitkit.exporters.source import Reference
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.image import prepare_batch
from vitkit.runtimes.tasks import task_module

NamedImage = tuple[str, NDArray[np.uint8]]


class ParityCheck(Protocol):
    """What a comparison found: `problems` is empty if the engine does what the float model does."""

    @property
    def name(self) -> str:
        """Which inputs: `golden` or `images`."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """Every limit that is broken, in words."""
        ...

    def details(self) -> list[str]:
        """A line for each image that people may want to look at."""
        ...

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        ...


def golden_pairs(task: str) -> int:
    """How many golden pairs an artifact of a task carries."""
    return int(task_module(task, "parity").GOLDEN_PAIRS)


def check_golden(engine: Engine[Any]) -> ParityCheck:
    """The engine against the golden outputs in its artifact; raises BadArtifact."""
    check: ParityCheck = task_module(engine.card.task, "parity").check_golden(engine)
    return check


def check_images(
    engine: Engine[Any],
    reference: Reference,
    images: Iterable[NamedImage],
    decisions: dict[str, float] | None = None,
) -> ParityCheck:
    """The engine against the float network on named images, each prepared for either side.

    Images are (H, W, 3) uint8 RGB. `decisions` are shares of changed decisions inside the network, see
    `decision_flips`. Raises BadArtifact if the two have other outputs.
    """
    module = task_module(engine.card.task, "parity")
    check: ParityCheck = module.check_images(engine, reference, images, decisions)
    return check


def pairs_of_golden(engine: Engine[Any]) -> Iterator[tuple[Outputs, Outputs]]:
    """Outputs of ONE golden input after the other: the float model's, the engine's. Raises BadArtifact."""
    inputs, reference = read_golden(engine.artifact)
    for i in range(len(inputs)):
        found = engine.run_batched(inputs[i : i + 1])
        yield of_image(reference, i), of_image(found)


def pairs_of_images(
    engine: Engine[Any], reference: Reference, images: Iterable[NamedImage]
) -> Iterator[tuple[Outputs, Outputs]]:
    """Outputs of ONE image after the other, prepared for either side: the float model's, the engine's."""
    for _, image in images:
        want = reference.predict(prepare_batch([image], reference.card.image))
        yield of_image(want), of_image(engine.run_batched(engine.prepare([image])))


def of_image(outputs: Outputs, i: int = 0) -> Outputs:
    """Outputs (N, ...) -> those of one image, without the batch dimension."""
    return {name: value[i] for name, value in outputs.items()}


def check_reference(card: ModelCard, reference: ModelCard) -> None:
    """Refuse to compare an engine with anything but a float form of the same network; raises BadRequest."""
    if reference.precision != "fp32":
        raise BadRequest(f"--against is a {reference.precision} engine; name the run, or an fp32 engine")
    ours, theirs = (
        (c.image.size, [(s.name, s.shape[1:]) for s in c.outputs], c.labels) for c in (card, reference)
    )
    if ours != theirs:
        raise BadRequest(
            f"--against is another network: {reference.name} for {reference.image.size} with outputs "
            f"{', '.join(map(str, reference.outputs))}, the engine is {card.name} for {card.image.size} with "
            f"{', '.join(map(str, card.outputs))}"
            + ("; their labels differ" if card.labels != reference.labels else "")
        )


def decision_flips(
    engine: Engine[Any], reference: Reference, images: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Shares (0..1) of changed elements in each decision, of an engine that returns its decisions too."""
    changed: dict[str, list[float]] = {}
    for image in images:
        want = reference.decisions(prepare_batch([image], reference.card.image))
        got = engine.run_batched(engine.prepare([image]))
        for name, made in want.items():
            changed.setdefault(name, []).append(float(np.mean(got[name].reshape(made.shape) != made)))
    return {name: float(np.mean(shares)) for name, shares in changed.items()}

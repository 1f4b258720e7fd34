"""The tasks: for each one, the modules that decode, verify, score and draw its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.image import Placement
from vitkit.runtimes.plugins import Rows

Part = Literal["decode", "parity", "metric", "picture"]
Decoder = Callable[[Mapping[str, NDArray[Any]], ModelCard, Placement], Any]


class Task(NamedTuple):
    """The modules of one task, by dotted names; modules of one column have the same functions.

    `decode` has `decode(outputs, card, place, ...)`, `check_options(...)` and `check_card(card)`; `parity`
    compares an engine with its float model; `metric` has `evaluate(network, data, ...)` and its
    `OPTIONS`, and `save_predictions(path, card, results)` if there is a common format for predictions;
    `picture` has `draw(image, result, ...)`, which returns an object with `save(path)`, `describe(result)`,
    `to_json(result)` and `VIDEO_OPTIONS`, and `SUFFIX` if what is saved is no PNG.
    """

    decode: str
    parity: str
    metric: str
    picture: str


_TASKS = {
    "classification": Task(
        "vitkit.runtimes.classification",
        "vitkit.exporters.parity_classification",
        "vitkit.evaluate.accuracy",
        "vitkit.pictures.classification",
    ),
    "panoptic": Task(
        "vitkit.runtimes.panoptic.decode",
        "vitkit.exporters.parity_panoptic",
        "vitkit.evaluate.panoptic",
        "vitkit.pictures.panoptic",
    ),
    "semantic": Task(
        "vitkit.runtimes.semantic",
        "vitkit.exporters.parity_semantic",
        "vitkit.evaluate.semantic",
        "vitkit.pictures.semantic",
    ),
    "tensors": Task(
        "vitkit.runtimes.tensors",
        "vitkit.exporters.parity_tensors",
        "vitkit.evaluate.tensors",
        "vitkit.pictures.tensors",
    ),
}
TASKS = Rows("vitkit.tasks", Task, _TASKS)


def task_module(task: str, part: Part) -> Any:
    """A module of a task's row in `TASKS`.

    Raises BadArtifact for a task that is not there, BadRequest for a plugin's module that cannot be imported.
    """
    if task not in TASKS:
        raise BadArtifact(
            f"the card's task is {task!r}; this vitkit has {', '.join(TASKS)}: "
            "upgrade it with: pip install --upgrade vitkit"
        )
    return TASKS.module(task, part)


def decoder(card: ModelCard, options: Mapping[str, Any] | None = None) -> Decoder:
    """The decoding function of the card's task, the card and the options checked.

    `options` are the function's own (`top` of classification, `fast` of panoptic). Raises BadArtifact for
    a card that cannot be decoded, BadRequest for an option that the task lacks or a value that it has not.
    """
    module = task_module(card.task, "decode")
    module.check_card(card)
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise BadRequest(f"decode is {options!r}; it must be a dictionary of options such as {{'top': 5}}")
    known = signature(module.check_options).parameters
    for name in options:
        if name not in known:
            raise BadRequest(
                f"decoding of {card.task} has no option {name!r}; it has {', '.join(known) or 'none'}"
            )
    module.check_options(**options)
    return partial(module.decode, **options)

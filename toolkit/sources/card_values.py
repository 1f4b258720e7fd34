"""The values of a card that a foreign network does not hold itself: who gave each, and what was assumed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, check_image_spec, text_problem
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.reading import read_text, read_toml
from vitkit.runtimes.tasks import TASKS

# Values for which most networks agree. Size, mean and standard deviation are never assumed: with the wrong
# ones an engine runs, agrees with its network, and is wrong on every image.
DEFAULTS: dict[str, Any] = {"colour": "RGB", "fit": "cover", "crop_pct": 1.0, "interpolation": "bicubic"}
_IMAGE_FIELDS = ("size", "mean", "std", "colour", "fit", "crop_pct", "interpolation")
_MISSING = {
    "size": "--size HEIGHT,WIDTH (such as --size 224,224): an engine takes one size",
    "mean": "--mean R,G,B of values from 0 to 1 (ImageNet's: --mean 0.485,0.456,0.406; --mean 0,0,0 and "
    "--std 1,1,1 for a network that takes 0 to 1)",
    "std": "--std R,G,B of values from 0 to 1 (ImageNet's: --std 0.229,0.224,0.225)",
}
# Outputs that a task reads, by rank: (N, classes), and (N, classes, h, w).
_RANKS = {"classification": 2, "semantic": 4}


@dataclass(frozen=True)
class CardValues:
    """What somebody said of a card; None for what was not said.

    `size` is (height, width) in pixels, `mean` and `std` are per channel for pixels of 0..1, `outputs` are
    the names of the network's outputs in order. The rest is as in `ImageSpec` and `ModelCard`. Raises
    BadRequest for a value that no card may hold.
    """

    task: str | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    colour: str | None = None
    fit: str | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    labels: tuple[str, ...] | None = None
    label_ids: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse at once what a card would refuse in the end."""
        if self.task is not None and self.task not in TASKS:
            raise BadRequest(f"--task is {self.task!r}; the tasks are {', '.join(TASKS)}")
        for name in ("labels", "label_ids", "outputs"):
            _check_names(getattr(self, name), name)
        if self.outputs is not None and len(set(self.outputs)) < len(self.outputs):
            raise BadRequest(f"--outputs names an output twice: {','.join(self.outputs)}")
        if self.labels and self.label_ids and len(self.labels) != len(self.label_ids):
            raise BadRequest(f"there are {len(self.labels)} labels, but {len(self.label_ids)} label_ids")
        try:
            check_image_spec(replace(ImageSpec((1, 1)), **self._image()))
        except BadRequest as error:
            raise BadRequest(_with_flags(str(error))) from None

    def over(self, other: CardValues) -> CardValues:
        """These values, and the other's for those that are None here."""
        # Ids belong to the labels that they were given with.
        lower = asdict(other) | ({"label_ids": None} if self.labels is not None else {})
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return CardValues(**{**lower, **own})

    def _image(self) -> dict[str, Any]:
        return {name: value for name in _IMAGE_FIELDS if (value := getattr(self, name)) is not None}

    def image(self) -> tuple[ImageSpec, dict[str, Any]]:
        """The image specification of a float network (NCHW float32), and what of it was assumed.

        Raises BadRequest for a missing size, mean or standard deviation, with the flags to give.
        """
        given = self._image()
        if missing := [text for name, text in _MISSING.items() if name not in given]:
            raise BadRequest(f"the card lacks what the network does not say; add {'; and '.join(missing)}")
        assumed = {name: value for name, value in DEFAULTS.items() if name not in given}
        return ImageSpec(**{**assumed, **given}, layout="NCHW", dtype="float32"), assumed


def _check_names(names: tuple[str, ...] | None, flag: str) -> None:
    if names is None:
        return
    if not names:
        raise BadRequest(f"--{flag} names nothing")
    for name in names:
        problem = text_problem(name) if isinstance(name, str) else "is not text"
        if problem or not name:
            raise BadRequest(f"--{flag.replace('_', '-')} holds {name!r}, which {problem or 'is empty'}")


def _with_flags(text: str) -> str:
    """A message about a card's image in the words of the command line."""
    return re.sub(r"'?image\.(\w+)'?", lambda found: "--" + found[1].replace("_", "-"), text)


def read_card_values(path: Path) -> CardValues:
    """The values in a TOML file: the fields of `CardValues` by name.

    `size` may be one number for a square. `labels` may also be the name of a file beside the TOML, see
    `read_labels`. Raises BadInput for a file that cannot be read or has an unknown name or a bad value.
    """
    try:
        body = read_toml(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as TOML: {error}") from None
    known = [field.name for field in fields(CardValues)]
    if unknown := sorted(set(body) - set(known)):
        raise BadInput(f"{path} has an unknown name {unknown[0]!r}; known are {', '.join(known)}")
    if isinstance(body.get("labels"), str):
        file = path.parent / body["labels"]
        body = {**asdict(read_labels(file)), **{name: body[name] for name in body if name != "labels"}}
    if type(body.get("size")) is int:
        body["size"] = [body["size"]] * 2
    try:
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in body.items()}
        return CardValues(**given)
    except (BadRequest, TypeError) as error:
        raise BadInput(f"{path}: {error}") from None


def read_labels(path: Path) -> CardValues:
    """The classes in a file: a name on each line, a JSON list, or a JSON object by class number.

    In an object each class may also be a pair [id, name], as in ImageNet's class index. Raises BadInput.
    """
    try:
        text = read_text(path)
        body: Any = json.loads(text) if path.suffix == ".json" else text.rstrip().split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"the labels in {path} cannot be read: {error}") from None
    if isinstance(body, dict):
        if set(body) != {str(i) for i in range(len(body))}:
            raise BadInput(f"{path}: its keys are not the class numbers from 0 to {len(body) - 1}")
        body = [body[str(i)] for i in range(len(body))]
    try:
        if body and all(isinstance(item, list) and len(item) == 2 for item in body):
            return CardValues(labels=tuple(name for _, name in body), label_ids=tuple(i for i, _ in body))
        return CardValues(labels=tuple(item.strip() if isinstance(item, str) else item for item in body))
    except (BadRequest, TypeError) as error:
        raise BadInput(f"{path}: {error}") from None


def build_card(
    name: str, values: CardValues, outputs: Sequence[TensorSpec], provenance: Mapping[str, Any]
) -> ModelCard:
    """The card of a float network with these outputs (N, ...): normalised NCHW float32 input, any batch.

    What is assumed because nobody said it is in `provenance["assumed"]`, by name. Raises BadRequest, with the
    flag to give, if something is missing or does not fit the outputs.
    """
    image, assumed = values.image()
    task = values.task
    if task is None:
        task = assumed["task"] = "classification" if [len(o.shape) for o in outputs] == [2] else "tensors"
    scores = _scores(task, outputs)
    labels, label_ids = values.labels, values.label_ids
    if scores is None:
        if labels:
            raise BadRequest(
                f"there are labels, but the task is {task}, which has no classes; add --task classification "
                f"or --task semantic. The outputs are {'; '.join(map(str, outputs))}"
            )
        labels = ()
    elif labels is None:
        count = scores.shape[1]
        if count is None:
            raise BadRequest(f"the number of classes of {scores} is unknown; add --labels FILE")
        labels, assumed["labels"] = tuple(map(str, range(count))), f"the class numbers 0 to {count - 1}"
    else:
        _check_count(labels, scores)
    return ModelCard(
        name=name,
        task=task,
        target="torch",
        precision="fp32",
        inputs=(TensorSpec("image", (None, 3, *image.size), "float32"),),
        outputs=tuple(replace(spec, shape=(None, *spec.shape[1:])) for spec in outputs),
        image=image,
        labels=labels,
        label_ids=label_ids if labels else None,
        decode={} if scores is None else {_role(task, scores): scores.name},
        provenance={**provenance, "assumed": assumed},
    )


def _scores(task: str, outputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The output that holds a value for each class, None for a task without classes; raises BadRequest."""
    if task not in _RANKS:
        if task != "tensors":
            raise BadRequest(
                f"--task {task} is not for networks from outside; use {', '.join(_RANKS)}, tensors"
            )
        return None
    fitting = [spec for spec in outputs if len(spec.shape) == _RANKS[task]]
    if not fitting:
        shape = "(N, classes)" if task == "classification" else "(N, classes, height, width)"
        raise BadRequest(
            f"--task {task} needs an output {shape}; the network returns {'; '.join(map(str, outputs))}. "
            "--task tensors takes any outputs"
        )
    return next((spec for spec in fitting if spec.name in ("logits", "probabilities")), fitting[0])


def _role(task: str, scores: TensorSpec) -> str:
    return "probabilities" if (task, scores.name) == ("classification", "probabilities") else "logits"


def _check_count(labels: tuple[str, ...], scores: TensorSpec) -> None:
    """Raises BadRequest unless there is a label for each class."""
    count, last = scores.shape[1], scores.shape[-1]
    if count in (None, len(labels)):
        return
    cure = f"give one label for each of the {count} classes, in the network's order"
    if len(scores.shape) == 4 and last == len(labels):
        cure = "its classes come last (NHWC); return logits.permute(0, 3, 1, 2)"
    elif len(labels) - (count or 0) == 1:
        cure = (
            f"the first is {labels[0]!r}: if the network has no such class (as 'background' of TensorFlow's "
            "lists), or if it is a heading, remove it from the file"
        )
    elif len(labels) - (count or 0) == -1:
        cure = f"if the network's class 0 is a background, add it as the first label; else {cure}"
    raise BadRequest(f"there are {len(labels)} labels, but {count} classes in {scores}; {cure}")

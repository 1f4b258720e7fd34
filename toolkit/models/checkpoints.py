"""Reading other people's checkpoints into vitkit's models, without unpickling code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitkit.models import FAMILIES, Model, ModelConfig, build, configure, family_of
from vitkit.models.family import Layout, Place
from vitkit.models.state import Kind, read_weights, summarise, weight_problem
from vitkit.runtimes.errors import BadInput, BadRequest

if TYPE_CHECKING:
    from torch import Tensor

    Shape = tuple[int, ...]
    Tensors = Mapping[str, Tensor]


class Imported(NamedTuple):
    """A model with the weights of a checkpoint, in eval mode.

    `reset` are the model's layers that were left fresh, `ignored` the checkpoint's tensors that only
    training needs. `kind` are the weights that were taken of the `kinds` that the checkpoint holds.
    """

    model: Model
    reset: tuple[str, ...]
    ignored: tuple[str, ...]
    kind: Kind
    kinds: tuple[Kind, ...]


def load_checkpoint(
    path: Path,
    layout: str,
    name: str,
    options: Mapping[str, Any],
    *,
    reset_head: bool = False,
    kind: Kind | None = None,
) -> Imported:
    """The model `name` with the weights of a checkpoint in a layout of its family.

    `reset_head` leaves the layers that depend on the number of classes as they are made, the same every
    time. `kind` chooses between plain weights and their moving average, see `read_weights`. Raises
    BadRequest for a bad layout, model or option; BadInput for weights of another number of classes, and
    naming every tensor that is missing, extra, misshapen, no weight, or differs between the places in which
    the layout repeats it.
    """
    import torch

    config = configure(name, options)
    theirs = _layout(layout, name, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name, **options)
    state = model.state_dict()
    places = {key: theirs.place(config, key, tuple(tensor.shape)) for key, tensor in state.items()}
    expected = {source for place in places.values() for source in place.names}
    weights = read_weights(path, kind, expected)
    tensors = weights.tensors
    heads = {key: place for key, place in places.items() if re.fullmatch(theirs.heads, key)}
    problems = [] if reset_head else _class_problems(tensors, heads.values(), theirs, config.num_classes)
    if reset_head or problems:
        left = {key for key, place in heads.items() if reset_head or place.names[0] in tensors}
        tensors = _without(tensors, {source for key in left for source in heads[key].names})
        places = {key: place for key, place in places.items() if key not in left}
    ignored = tuple(source for source in tensors if re.match(theirs.training, source))
    tensors = _without(tensors, set(ignored))
    problems += _problems(tensors, places, theirs.spare(config))
    if problems:
        raise BadInput(f"{path} does not hold a {name}: {summarise(problems)}")
    with torch.no_grad():
        for key, place in places.items():
            found = next((tensors[source] for source in place.names if source in tensors), None)
            if found is not None:
                state[key].copy_(found.T if place.flipped else found.reshape(state[key].shape))
    reset = dict.fromkeys(key.rpartition(".")[0] for key in heads) if reset_head else ()
    return Imported(model.eval(), tuple(reset), ignored, weights.kind, weights.kinds)


def _layout(layout: str, name: str, config: ModelConfig) -> Layout:
    fitting = family_of(config).layouts
    if layout in fitting:
        return fitting[layout]
    known = [other for family in FAMILIES.values() for other in family.layouts]
    if layout not in known:
        raise BadRequest(f"there is no checkpoint format {layout!r}; the formats are {', '.join(known)}")
    raise BadRequest(
        f"a checkpoint of the format {layout!r} holds no {name}, use --format {' or '.join(fitting)}"
    )


def _without(tensors: Tensors, names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _class_problems(tensors: Tensors, heads: Iterable[Place], layout: Layout, classes: int) -> list[str]:
    """What to do about a checkpoint whose heads agree on another number of classes; nothing otherwise."""
    counts = set()
    for place in heads:
        if (tensor := tensors.get(place.names[0])) is not None:
            fits = tensor.ndim > 0 and tuple(tensor.shape[1:]) == place.shape[1:]
            counts.add(len(tensor) - layout.void if fits else 0)
    count = counts.pop() if len(counts) == 1 else 0
    if count < 1 or count == classes:
        return []
    return [
        f"its heads are for {count} classes, the model's for {classes} (add --option num_classes={count} to "
        "keep its classes, or --reset-head to give the model a fresh head)"
    ]


def _problems(tensors: Tensors, places: Mapping[str, Place], spare: Mapping[str, Shape]) -> list[str]:
    import torch

    problems = []
    expected = dict(spare)
    for key, place in places.items():
        expected.update(dict.fromkeys(place.names, place.shape))
        present = [source for source in place.names if source in tensors]
        # The batch counter is no weight, and formats that store a shared tensor once drop its other names.
        if not present and not key.endswith("num_batches_tracked"):
            problems.append(f"{place.names[0]} is missing")
        for source in present[1:]:
            if not weight_problem(source, tensors[source]) and not torch.equal(
                tensors[source], tensors[present[0]]
            ):
                problems.append(f"{source} differs from {present[0]}, with which the model shares it")
    for source, tensor in tensors.items():
        if source not in expected:
            problems.append(f"{source} is extra")
        elif tuple(tensor.shape) != expected[source]:
            problems.append(f"{source} is {list(tensor.shape)}, not {list(expected[source])}")
        elif reason := weight_problem(source, tensor):
            problems.append(f"{source} {reason}")
    return problems

"""`model.tflite`: somebody's TFLite file, which is an engine already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.parity import NamedImage, ParityCheck
from vitkit.exporters.tflite_file import TFLiteFile, adopt
from vitkit.runtimes.card import Artifact, ModelCard, sha256
from vitkit.runtimes.errors import BadRequest
from vitkit.sources.card_values import CardValues, build_card


def export(
    path: Path,
    values: CardValues,
    out: Path,
    *,
    target: str,
    precision: str | None = None,
    golden: Sequence[NDArray[np.uint8]] | None = None,
    images: Sequence[NamedImage] = (),
    say: Callable[[ModelCard], object] = lambda card: None,
) -> tuple[Artifact, list[ParityCheck]]:
    """Make a verified artifact of a file as it is; see `vitkit.exporters.tflite_file.adopt`.

    `say` is called with the card before anything is written. Raises BadRequest for another target, and for a
    precision that is not the file's.
    """
    if target != "tflite":
        raise BadRequest(
            f"{path} is an engine of TFLite, and no float network can be made of it: use --target tflite, or "
            f"give the network that it was made from for --target {target}"
        )
    file, card = load(path, values)
    if precision not in (None, file.precision):
        raise BadRequest(f"{path} is {file.precision} and stays so: leave out --precision")
    say(card)
    return adopt(file, card, out, golden=golden, images=images)


def refuse_changes(path: Path, request: Mapping[str, Any]) -> None:
    """Refuse what would change a file that becomes an artifact as it is; raises BadRequest.

    `request` holds options by their names, None for those that were not given.
    """
    as_it_is = {"input": "uint8", "batch": 1}
    if named := [name for name, value in request.items() if value != as_it_is.get(name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in named)
        raise BadRequest(f"{path} is an engine already, which stays as it is: leave out {flags}")


def load(path: Path, values: CardValues) -> tuple[TFLiteFile, ModelCard]:
    """The file, and a card that `values` complete: of them it needs no more than labels, if it is quantised.

    Raises BadInput for a file that is no engine of vitkit's, BadRequest for values that are missing or
    contradict it.
    """
    file = TFLiteFile.open(path)
    spec, names = file.session.inputs[0], tuple(output.name for output in file.session.outputs)
    if values.outputs not in (None, names):
        raise BadRequest(f"the outputs of {path} are called {', '.join(names)}: leave out --outputs")
    if values.size not in (None, file.image.size):
        height, width = file.image.size
        raise BadRequest(f"{path} is made for images of {height},{width}: leave out --size")
    said, assumed = CardValues(size=file.image.size), {}
    if spec.dtype == "uint8":
        if values.mean or values.std:
            raise BadRequest(f"{path} takes uint8 pixels and scales them itself: leave out --mean and --std")
        said = replace(said, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    elif (found := file.normalisation) and values.mean is None and values.std is None:
        mean, std = found
        said = replace(said, mean=(mean,) * 3, std=(std,) * 3)
        assumed = {
            "mean and std": f"{mean:.4g} and {std:.4g}, with which the input's 256 steps are those of pixels"
        }
    card = build_card(
        path.stem,
        values.over(said),
        file.session.outputs,
        {"source": {"file": path.name, "sha256": sha256(path)}},
    )
    if card.task == "classification":
        (name,) = card.decode.values()
        card = replace(card, decode={"probabilities" if name in file.softmaxes else "logits": name})
    provenance = {**card.provenance, "assumed": {**card.provenance["assumed"], **assumed}}
    return file, replace(card, provenance=provenance)

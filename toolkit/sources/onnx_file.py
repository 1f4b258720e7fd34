"""`model.onnx`: a float network in an ONNX file as a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitkit.exporters.onnx_file import OnnxFile, OnnxSource
from vitkit.exporters.onnx_reading import ImageInput, opset_of, weight_files
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, sha256
from vitkit.runtimes.errors import BadRequest
from vitkit.sources.card_values import CardValues, build_card

# Of a network that takes pixels: whatever it does with them is in its graph.
_AS_THEY_ARE = CardValues(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def load(path: Path, values: CardValues, keep_float: Sequence[str] = ()) -> OnnxSource:
    """The network of a file with the card that `values` complete.

    The file gives the size of its input, unless it leaves it open, and its outputs, which `values.outputs`
    may give other names. `keep_float` are glob patterns over module paths that stay float. Raises BadInput
    for a file that no engine can be made of, BadRequest for values that are missing or contradict it.
    """
    file = OnnxFile.open(path)
    values = values.over(_said(file.input, values, path))
    image, _ = values.image()
    _check_size(file.input, image, path)
    if file.input.dtype == "uint8":
        image = replace(image, layout="NHWC", dtype="uint8")
    outputs = _named(file.outputs(image), values, path)
    card = build_card(path.stem, values, outputs, {"source": _origin(file)})
    card = replace(card, image=image, inputs=(_input(image),))
    return OnnxSource(file, _with_role(file, card), tuple(keep_float))


def _said(taken: ImageInput, values: CardValues, path: Path) -> CardValues:
    """What a file says of the card: its size, and that pixels go in as they are."""
    height, width = taken.size
    said = CardValues(size=(height, width)) if height and width else CardValues()
    if taken.dtype == "uint8":
        if values.mean or values.std:
            raise BadRequest(
                f"{path} takes uint8 pixels and normalises them itself: leave out --mean and --std"
            )
        said = _AS_THEY_ARE.over(said)
    return said


def _check_size(taken: ImageInput, image: ImageSpec, path: Path) -> None:
    if any(want not in (None, got) for want, got in zip(taken.size, image.size, strict=True)):
        fixed = ",".join("any" if side is None else str(side) for side in taken.size)
        raise BadRequest(
            f"--size is {image.size[0]},{image.size[1]}, but {path} is made for {fixed}: leave out --size, "
            "or export the file with free height and width"
        )


def _named(outputs: tuple[TensorSpec, ...], values: CardValues, path: Path) -> tuple[TensorSpec, ...]:
    names = values.outputs or tuple(spec.name for spec in outputs)
    if len(names) != len(outputs):
        raise BadRequest(
            f"--outputs gives {len(names)} names, {path} has {len(outputs)} outputs: "
            f"{'; '.join(map(str, outputs))}"
        )
    if "image" in names:
        raise BadRequest(
            f"an output of {path} is called image, as the input: name the outputs, with --outputs"
        )
    return tuple(replace(spec, name=name) for spec, name in zip(outputs, names, strict=True))


def _input(image: ImageSpec) -> TensorSpec:
    shape = (*image.size, 3) if image.layout == "NHWC" else (3, *image.size)
    return TensorSpec("image", (None, *shape), image.dtype)


def _origin(file: OnnxFile) -> dict[str, Any]:
    found: dict[str, Any] = {
        "file": file.path.name,
        "sha256": sha256(file.path),
        "opset": opset_of(file.model),
        "producer": f"{file.model.producer_name} {file.model.producer_version}".strip(),
    }
    if weights := weight_files(file.path):
        found["weights"] = {weight.name: sha256(weight) for weight in weights}
    return found


def _with_role(file: OnnxFile, card: ModelCard) -> ModelCard:
    """A classifier's card that calls its scores what they are, logits or probabilities."""
    if card.task != "classification":
        return card
    ((role, name),) = card.decode.items()
    place = [spec.name for spec in card.outputs].index(name)
    found = "probabilities" if file.is_distribution(place, card.image) else "logits"
    if found == role:
        return card
    if found == "logits":
        raise BadRequest(
            f"the output {name!r} of {file.path} does not hold probabilities, which add up to 1: a softmax "
            "is missing; name it with --outputs logits"
        )
    if name == "logits":
        raise BadRequest(
            f"the output {name!r} of {file.path} holds probabilities, which add up to 1: a softmax is in the "
            "network; name it with --outputs probabilities"
        )
    provenance = dict(card.provenance)
    provenance["assumed"] = {**provenance["assumed"], "probabilities": f"{name}, whose values add up to 1"}
    return replace(card, decode={found: name}, provenance=provenance)

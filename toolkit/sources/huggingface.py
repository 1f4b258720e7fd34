"""`hf:FOLDER`: a checkpoint of transformers on this machine, an image classifier or semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.exporters.source import Source
from vitkit.runtimes.card import sha256
from vitkit.runtimes.errors import BadInput, BadRequest, MissingBackend, first_line
from vitkit.runtimes.reading import read_json
from vitkit.sources.card_values import CardValues
from vitkit.sources.network import wrap_network

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# The classes of transformers end in these.
_TASKS = {"ForImageClassification": "classification", "ForSemanticSegmentation": "semantic"}
# Pillow's numbers of filters, in which transformers stores them.
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def load(folder: Path, values: CardValues, keep_float: Sequence[str] = ()) -> Source:
    """The network of a folder with `config.json` and safetensors.

    Labels come from the configuration, what is done to images from `preprocessor_config.json` if it is there.
    Nothing is downloaded, and code in the folder is not run. Raises BadInput for a folder that is no such
    checkpoint, BadRequest for one of another task, MissingBackend without transformers.
    """
    config = _config(folder)
    task = _task(config, folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BadInput(
            f"{folder} holds no safetensors; vitkit unpickles nothing: in Python, load the checkpoint and "
            "call save_pretrained(FOLDER)"
        )
    if find_spec("transformers") is None:
        raise MissingBackend("transformers", "hf")
    said = _said(config, task, _processor(folder))
    network = _network(folder, task)
    origin = {"transformers": config["architectures"][0], "weights": {w.name: sha256(w) for w in weights}}
    # Of the outputs of transformers' classes only these are an engine's business.
    values = values.over(CardValues(outputs=("logits",))).over(said)
    return wrap_network(network.eval(), folder.resolve().name, values, origin, keep_float)


def _config(folder: Path) -> dict[str, Any]:
    try:
        body = read_json(folder / CONFIG)
    except FileNotFoundError:
        raise BadInput(f"{folder} holds no {CONFIG}: it is no checkpoint of transformers on disk") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{folder / CONFIG} cannot be read as JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadInput(f"{folder / CONFIG} holds a {type(body).__name__}, not an object")
    if body.get("auto_map"):
        raise BadInput(
            f"{folder} brings its own code (auto_map), which vitkit does not run; make the network in a "
            "function of yours, and name that: FILE.py:FACTORY"
        )
    return body


def _task(config: Mapping[str, Any], folder: Path) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for suffix, task in _TASKS.items():
        if isinstance(name, str) and name.endswith(suffix):
            return task
    raise BadRequest(
        f"{folder} is a checkpoint of {name or 'no class that its config.json names'}; vitkit takes those of "
        f"{' and '.join('...' + suffix for suffix in _TASKS)}. For others, return the network from a "
        "function and name that: FILE.py:FACTORY --task tensors"
    )


def _network(folder: Path, task: str) -> Any:
    import vitkit.torchvision_shim  # noqa: F401  (before transformers looks for torchvision)

    # isort: split
    import torch
    import transformers

    kind = {
        "classification": transformers.AutoModelForImageClassification,
        "semantic": transformers.AutoModelForSemanticSegmentation,
    }[task]
    try:
        network, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    # transformers raises many types for a damaged or foreign checkpoint.
    except Exception as error:
        raise BadInput(
            f"transformers {transformers.__version__} cannot load {folder}: {first_line(error)}"
        ) from error
    if lacking := sorted(report["missing_keys"]):
        raise BadInput(f"{folder} lacks weights: {', '.join(map(str, lacking[:5]))}; save it whole")
    return network


def _processor(folder: Path) -> Mapping[str, Any] | None:
    """What the checkpoint does to images, with the defaults of its class; None if it does not say."""
    if not (folder / PROCESSOR).is_file():
        return None
    import vitkit.torchvision_shim  # noqa: F401

    # isort: split
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise BadInput(f"{folder / PROCESSOR} cannot be used: {first_line(error)}") from error
    found: Mapping[str, Any] = processor.to_dict()
    return found


def _said(config: Mapping[str, Any], task: str, processor: Mapping[str, Any] | None) -> CardValues:
    """What configuration and processor say of the card."""
    names = config.get("id2label")
    labels = None
    if isinstance(names, dict) and set(names) == {str(i) for i in range(len(names))}:
        labels = tuple(str(names[str(i)]) for i in range(len(names)))
    said = CardValues(task=task, labels=labels)
    return said if processor is None else said.over(_image(processor))


def _image(processor: Mapping[str, Any]) -> CardValues:
    mean, std = _normalisation(processor)
    return CardValues(
        mean=mean,
        std=std,
        colour="BGR" if processor.get("do_flip_channel_order") else "RGB",
        interpolation=_FILTERS.get(processor.get("resample", -1)),
        **_geometry(processor),
    )


def _normalisation(processor: Mapping[str, Any]) -> tuple[Any, Any]:
    """Mean and standard deviation of pixels of 0..1, whatever factor the processor gives pixels first."""
    mean, std = [0.0] * 3, [1.0] * 3
    if processor.get("do_normalize"):
        mean, std = (list(map(float, processor[name])) for name in ("image_mean", "image_std"))
    factor = processor.get("rescale_factor") or 1 / 255
    scale = 255 * (factor if processor.get("do_rescale", True) else 1)
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)


def _geometry(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Size, fit and crop; what has no form here is left out, and so is recorded as assumed."""
    size = processor.get("size") or {}
    crop = _sides(processor.get("crop_size")) if processor.get("do_center_crop") else None
    scaled, shortest = _sides(size), size.get("shortest_edge")
    if not processor.get("do_resize", True):
        return {}
    if scaled is not None:
        if crop in (None, scaled):
            return {"size": scaled, "fit": "stretch"}
        return {"size": crop, "crop_pct": min(1.0, crop[0] / scaled[0])}
    if shortest is None:
        return {}
    if crop is not None:
        return {"size": crop, "fit": "cover", "crop_pct": min(1.0, max(crop) / shortest)}
    if (share := processor.get("crop_pct")) is not None:
        # ConvNeXt crops small images, and squashes those of 384 pixels and more.
        large = {"fit": "stretch"} if shortest >= 384 else {"fit": "cover", "crop_pct": float(share)}
        return {"size": (shortest, shortest), **large}
    return {"size": (shortest, shortest)}


def _sides(value: Any) -> tuple[int, int] | None:
    if isinstance(value, Mapping) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    return None

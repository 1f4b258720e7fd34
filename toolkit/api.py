"""Python's entrance: `vitkit.wrap`, `export`, `verify`, `evaluate` and `bench`, for any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.runtimes.card import Artifact, ImageSpec, check_image_spec
from vitkit.runtimes.errors import BadRequest, ExportFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from vitkit.bench import BenchOptions, BenchReport
    from vitkit.calibration.dataset import CalibrationSet
    from vitkit.devices.registry import Device
    from vitkit.evaluate.network import Network
    from vitkit.evaluate.results import Result
    from vitkit.exporters.parity import NamedImage, ParityCheck
    from vitkit.exporters.source import Exportable, Reference, Source
    from vitkit.sources.card_values import CardValues

Place = str | PathLike[str]
_DIFFERENT_HERE = ("layout", "dtype")


def wrap(
    network: nn.Module,
    *,
    image: ImageSpec | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    label_ids: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    keep_float: Sequence[str] = (),
    name: str | None = None,
) -> Source:
    """A torch module, checked, with the card that its engines will have.

    `network` maps normalised float32 (N, 3, H, W) to a tensor or a nest of tensors, in eval mode, on the CPU.
    `image` says how photographs become its input (its `layout` and `dtype` are the engine's affair and are
    not read); timm's modules know it. `task` is `classification` for an output (N, classes), `semantic` for
    (N, classes, h, w), `tensors` for any. `labels` name the classes, `label_ids` are their names in data
    sets. `outputs` name the outputs in order, or choose among those of a dictionary. `keep_float` are glob
    patterns over module paths that stay float in INT8 and half-precision engines.

    What was assumed is in `card.provenance["assumed"]`. Raises BadRequest for a module that cannot be
    exported or a card that lacks something, with the cure.
    """
    return _wrap(network, _card_values(image, task, labels, label_ids, outputs), keep_float, name)


def _wrap(
    network: nn.Module, values: CardValues, keep_float: Sequence[str], name: str | None = None
) -> Source:
    from vitkit.exporters.foreign import check_module
    from vitkit.sources.network import wrap_network
    from vitkit.sources.resolve import said_by

    check_module(network)
    kind = type(network)
    origin = {"module": f"{kind.__module__}.{kind.__qualname__}"}
    return wrap_network(
        network, name or kind.__name__, values.over(said_by(network, values.task)), origin, keep_float
    )


def _card_values(
    image: ImageSpec | None,
    task: str | None,
    labels: Sequence[str] | None,
    label_ids: Sequence[str] | None,
    outputs: Sequence[str] | None,
) -> CardValues:
    from vitkit.sources.card_values import CardValues

    for what, value in (("labels", labels), ("label_ids", label_ids), ("outputs", outputs)):
        if isinstance(value, str):
            raise BadRequest(f"{what} is {value!r}; it must be a list of texts")
    given: dict[str, Any] = {}
    if image is not None:
        if not isinstance(image, ImageSpec):
            raise BadRequest(f"image is a {type(image).__name__}; it must be a vitkit.ImageSpec")
        checked = check_image_spec(image)
        given = {f.name: getattr(checked, f.name) for f in fields(checked) if f.name not in _DIFFERENT_HERE}
    return CardValues(
        **given,
        task=task,
        labels=None if labels is None else tuple(labels),
        label_ids=None if label_ids is None else tuple(label_ids),
        outputs=None if outputs is None else tuple(outputs),
    )


def export(
    network: nn.Module | Exportable | Place,
    out: Place,
    *,
    target: str,
    precision: str = "fp32",
    image: ImageSpec | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    label_ids: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    keep_float: Sequence[str] = (),
    calib: Place | CalibrationSet | None = None,
    input: str = "uint8",
    batch: int | None = 1,
    options: Mapping[str, Any] | None = None,
    golden: Sequence[NDArray[np.uint8]] | None = None,
    images: Place | None = None,
    untrained: bool = False,
) -> Artifact:
    """Make a verified artifact folder at `out`, whole or not at all.

    `network` is a torch module, a `Source` of `wrap`, or a word as the command line takes it: a run folder,
    `timm:NAME`, `timm:NAME=FILE`, `hf:FOLDER`, `FILE.pt2`, `FILE.onnx`, `FILE.tflite`, `FILE.py:FACTORY`.
    `image` to `keep_float` are as in `wrap`. `calib` is the folder of images that calibrate int8 (128 of
    them, seed 0), or a `CalibrationSet`. `images` is a folder of images on which engine and network are
    compared too. The rest is as in `vitkit.exporters.export`. `untrained` gives words random weights.

    Raises BadRequest, BadInput, BadArtifact, MissingBackend and DeviceError, and ExportFailed if the engine
    does not do what the network does.
    """
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.runtimes.files import check_output_folder
    from vitkit.runtimes.image import sample_photos
    from vitkit.sources import check_word, parse_word

    values = _card_values(image, task, labels, label_ids, outputs)
    if isinstance(network, (str, PathLike)) and parse_word(str(network)).kind == "tflite":
        from vitkit.sources import tflite_file

        changes = {"batch": batch, "input": input, "calib": calib, "options": options or None}
        tflite_file.refuse_changes(Path(network), {**changes, "keep_float": keep_float or None})
        kept = None if precision == "fp32" else precision
        compared = [] if images is None else sample_photos(Path(images), 64)
        return tflite_file.export(
            Path(network), values, Path(out), target=target, precision=kept, golden=golden, images=compared
        )[0]
    exporters.check_request(
        target, precision, calibrated=calib is not None, input=input, batch=batch, options=options
    )
    if isinstance(network, (str, PathLike)):
        check_word(parse_word(str(network)), values)
    folders = [Path(place) for place in (calib, images) if isinstance(place, (str, PathLike))]
    check_output_folder(Path(out), inputs=folders)
    calibration = calibration_set(Path(calib), 128, 0) if isinstance(calib, (str, PathLike)) else calib
    artifact, _ = exporters.export(
        _source(network, values, keep_float, untrained),
        Path(out),
        target=target,
        precision=precision,
        calibration=calibration,
        input=input,
        batch=batch,
        options=options,
        golden=golden,
        images=[] if images is None else sample_photos(Path(images), 64),
    )
    return artifact


def _source(
    network: nn.Module | Exportable | Place, values: CardValues, keep_float: Sequence[str], untrained: bool
) -> Exportable:
    from vitkit.exporters.source import Exportable
    from vitkit.sources import CardValues, resolve

    if isinstance(network, (str, PathLike)):
        return resolve(str(network), values, keep_float=keep_float, untrained=untrained)
    if untrained:
        raise BadRequest("untrained is for words such as timm:NAME; a module has its weights")
    if isinstance(network, Exportable):
        if values != CardValues() or keep_float:
            raise BadRequest("the source has its card; give image, labels and the like to vitkit.wrap")
        return network
    return _wrap(network, values, keep_float)


def verify(
    artifact: Place,
    against: nn.Module | Exportable | Place | None = None,
    *,
    images: Place | None = None,
    count: int = 256,
    image: ImageSpec | None = None,
    device: str | None = None,
) -> list[ParityCheck]:
    """Check an engine: its golden pairs, and images against the float network `against`.

    `against` is what `export` takes as its network, or a float artifact; `image` as in `wrap`, for a module.
    `images` is a folder, of which `count` are compared (16 generated images without it). `device` is as in
    `bench`: on a machine of `devices.toml` the engine is compared with itself here too, the last check.
    Raises ExportFailed if the engine does not do what the network does, BadRequest if `against` is another
    network, DeviceError if the machine cannot be used.
    """
    from vitkit.devices.registry import find_machine
    from vitkit.exporters import run_checks
    from vitkit.exporters.parity import check_reference
    from vitkit.exporters.verify import check_problems
    from vitkit.runtimes.card import read_card
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.image import generated_photos, sample_photos

    machine, engine_device = find_machine(device)
    if images is not None and against is None and machine is None:
        raise BadRequest("images need the float network to compare with: give against")
    compared = [(f"generated {i}", photo) for i, photo in enumerate(generated_photos(16, seed=1))]
    folder = None if images is None else Path(images)
    if folder is not None:
        compared = sample_photos(folder, count)
    with ExitStack() as opened:
        reference = None
        if against is not None:
            reference = opened.enter_context(closing(_network(against, image)))
            check_reference(read_card(Path(artifact)), reference.card)
        if machine is not None:
            return _verify_on(machine, engine_device, Path(artifact), reference, compared, folder)
        engine = opened.enter_context(open_engine(Path(artifact), device=engine_device))
        checks = run_checks(engine, reference, compared)
    check_problems(checks)
    return checks


def _verify_on(
    machine: Device,
    engine_device: str | None,
    artifact: Path,
    reference: Reference | None,
    images: Sequence[NamedImage],
    folder: Path | None,
) -> list[ParityCheck]:
    from vitkit.devices.verify import verify_on

    found = verify_on(machine, artifact, reference, images, folder=folder, engine_device=engine_device)
    if found.broken:
        raise ExportFailed(
            f"{artifact} does not do on {machine.name} what it should: {'; '.join(found.problems)}"
        )
    return [*found.there, *found.between]


def evaluate(
    network: nn.Module | Exportable | Place,
    data: Place,
    *,
    image: ImageSpec | None = None,
    device: str | None = None,
    **options: Any,
) -> Result:
    """Measure a network or an engine on labelled data by the metric of its task.

    `network` is what `export` takes, or an artifact folder, whose engine is measured, on `device`, as in
    `bench`; `image` as in `wrap`, for a module. `data` is a folder of class folders, or COCO's panoptic
    layout. `options` are the metric's own, such as `split`. Raises BadInput for data that cannot be read,
    BadRequest for a bad option, DeviceError if the device cannot be used.
    """
    from vitkit.devices.network import open_network_on
    from vitkit.devices.registry import find_machine
    from vitkit.evaluate.network import evaluate

    machine, engine_device = find_machine(device)
    if device is not None and not isinstance(network, (str, PathLike)):
        raise BadRequest(f"device is {device!r}, which is for engines: export the network, name its folder")
    if machine is not None:
        opened = open_network_on(machine, Path(str(network)), engine_device=engine_device)
    else:
        opened = _network(network, image, engine_device)
    with closing(opened):
        return evaluate(opened, Path(data), **options)


def _network(
    network: nn.Module | Exportable | Place, image: ImageSpec | None, device: str | None = None
) -> Network:
    """A network, run or engine to be evaluated."""
    from vitkit.evaluate.network import Network, open_network
    from vitkit.sources import parse_word

    if isinstance(network, (str, PathLike)) and parse_word(str(network)).kind == "run":
        return open_network(Path(network), device=device)
    source = _source(network, _card_values(image, None, None, None, None), (), untrained=False)
    return Network(source.card, source.predict, lambda: None, source.decisions)


def bench(
    artifacts: Place | Sequence[Place], options: BenchOptions | None = None, *, device: str | None = None
) -> list[BenchReport]:
    """Measure engines side by side: a report for each scope and artifact, with all raw times.

    `device` is a machine of `devices.toml`, or an engine's device here (`cpu`, `gpu`), or both as
    `NAME:DEVICE`; it takes the place of `options.device`. `options` are `vitkit.bench.BenchOptions`. Raises
    BadRequest, BadArtifact and DeviceError.
    """
    from vitkit.bench import BenchOptions
    from vitkit.devices.measure import measure
    from vitkit.devices.registry import find_machine

    places = [artifacts] if isinstance(artifacts, (str, PathLike)) else artifacts
    settings = options or BenchOptions()
    machine, engine_device = find_machine(device)
    if engine_device is not None:
        settings = replace(settings, device=engine_device)
    return measure([Path(place) for place in places], settings, machine)

"""Turning a model into an artifact: refuse, write, verify, and only then show the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.golden import write_golden
from vitkit.exporters.parity import NamedImage, ParityCheck, golden_pairs
from vitkit.exporters.source import Exportable, Source
from vitkit.exporters.targets import INPUTS, TARGETS, check_request, with_defaults
from vitkit.exporters.verify import verify
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard, sha256, write_card
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.files import atomic_folder
from vitkit.runtimes.image import check_image, generated_photos, prepare_batch

if TYPE_CHECKING:
    from vitkit.calibration.dataset import CalibrationSet

CALIBRATION_FILE = "calibration.json"
# Of the calibration images, this many verify an INT8 engine by default.
_VERIFIED_IMAGES = 64


def export(
    source: Exportable,
    out: Path,
    *,
    target: str,
    precision: str,
    calibration: CalibrationSet | None = None,
    input: str = "uint8",
    batch: int | None = 1,
    options: Mapping[str, Any] | None = None,
    golden: Sequence[NDArray[np.uint8]] | None = None,
    images: Sequence[NamedImage] = (),
    step: Callable[[str], object] = lambda text: None,
) -> tuple[Artifact, list[ParityCheck]]:
    """Make a verified artifact folder at `out`, whole or not at all.

    `batch` None leaves the batch dimension free. `options` are the target's own, see its row in `TARGETS`:
    `{"opset": 18}` of onnx and openvino, `{"trt_version": "8.6"}` of tensorrt. `golden` are the images of
    `golden.npz` (generated ones by default). `images` are named images on which the engine is compared with
    the float model; for int8 by default the first 64 calibration images. Images are (H, W, 3) uint8 RGB.
    `step` is called with a line of text when a step begins.

    Returns the artifact and what the checks found. Raises BadRequest, BadInput, MissingBackend, DeviceError,
    and ExportFailed if the engine does not do what the float model does.
    """
    check_request(
        target, precision, calibrated=calibration is not None, input=input, batch=batch, options=options
    )
    if (reason := TARGETS[target].from_torch) and not isinstance(source, Source):
        raise BadRequest(
            f"--target {target} does not take {source.card.name}, which is no torch module: {reason}; "
            "give the torch module that the file was made from, as PACKAGE.MODULE:FACTORY or FILE.py:FACTORY"
        )
    options = with_defaults(target, options)
    image = replace(source.card.image, **INPUTS[input])  # type: ignore[arg-type]
    examples = _golden_images(source.card.task, golden)
    images = _images_to_verify(images, calibration)
    with atomic_folder(out) as folder:
        step(f"making the {precision} engine for {target}")
        card: ModelCard = TARGETS.module(target, "module").export(
            source,
            folder,
            precision=precision,
            calibration=calibration,
            image=image,
            batch=batch,
            **options,
        )
        if calibration is not None:
            if scheme := card.provenance.get("int8_scheme"):
                step(f"quantised as {scheme}")
            _write_calibration(folder, calibration, source, target, image)
        reference = _in_types_of(card, source.predict(prepare_batch(examples, source.card.image)))
        write_golden(folder, prepare_batch(examples, image), reference)
        provenance = {**card.provenance, **_provenance(source, target, options, calibration)}
        files: dict[str, str | None] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        card = replace(card, files=files, provenance=provenance)
        write_card(card, folder)
        step("comparing it with the float model")
        checks = verify(folder, source, images)
    return Artifact(out, card), checks


def _in_types_of(card: ModelCard, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The float model's outputs by name, as the engine has them: integers may be narrower there."""
    return {spec.name: outputs[spec.name].astype(spec.dtype, copy=False) for spec in card.outputs}


def _golden_images(task: str, given: Sequence[NDArray[np.uint8]] | None) -> Sequence[NDArray[np.uint8]]:
    """As many images as an artifact of the task carries; raises BadInput for what is no image."""
    count = golden_pairs(task)
    if given is None:
        return generated_photos(count)
    return [check_image(image, f"golden image {i}") for i, image in enumerate(given[:count])]


def _images_to_verify(
    given: Sequence[NamedImage], calibration: CalibrationSet | None
) -> Sequence[NamedImage]:
    """The images to compare engine and float model on; raises BadInput for what is no image."""
    if given or calibration is None:
        return [(name, check_image(image, name)) for name, image in given]
    files = calibration.files[:_VERIFIED_IMAGES]
    return list(zip(files, calibration.images(), strict=False))


def _write_calibration(
    folder: Path, calibration: CalibrationSet, source: Exportable, target: str, image: ImageSpec
) -> None:
    method = TARGETS.module(target, "quantiser").METHOD
    record = calibration.record(image, method, list(source.float_modules))
    (folder / CALIBRATION_FILE).write_text(record, encoding="utf-8")


def _provenance(
    source: Exportable, target: str, options: Mapping[str, Any], calibration: CalibrationSet | None
) -> dict[str, Any]:
    """What made an engine; no time or place, so that bytes repeat."""
    packages = ("vitkit", "numpy", *sorted(TARGETS[target].packages))
    found: dict[str, Any] = {
        **source.card.provenance,
        "source_weights": source.card.files.get("model.safetensors"),
        **options,
        "versions": {name: _version(name) for name in packages},
    }
    if calibration is not None:
        found["calibration"] = {
            "fingerprint": calibration.fingerprint,
            "count": len(calibration.files),
            "seed": calibration.seed,
        }
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

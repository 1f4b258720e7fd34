"""Turning a model into an artifact: `export` refuses, writes, verifies, and only then shows the folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vitkit.runtimes.card import Artifact, ModelCard, TensorSpec, read_card, sha256, write_card
from vitkit.runtimes.errors import BadRequest, ExportFailed, MissingBackend
from vitkit.runtimes.tensorrt_options import DEFAULT_VERSION, DIALECTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vitkit.calibration.dataset import CalibrationSet
    from vitkit.exporters.parity import Check
    from vitkit.exporters.source import Source
    from vitkit.runtimes.engine import Engine

CALIBRATION_FILE = "calibration.json"
# Photographs on which the decisions inside a network are compared; they hardly differ from photo to photo.
DECISION_IMAGES = 8


class Deciding(Protocol):
    """A float model that tells its decisions; `Source` is one."""

    @property
    def card(self) -> ModelCard:
        """The card of its run."""
        ...

    @property
    def decisions(self) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        """Prepared inputs (N, ...) -> the decisions by node name."""
        ...


class Target(NamedTuple):
    """A row of `TARGETS`: where the exporter lives, what it needs, what it makes, and why not the rest.

    `stand_in` is the target whose runtime runs the graph for the parity check, where the engine itself is
    built elsewhere. `extra` installs the packages. `through_onnx` says whether an opset means anything,
    `free_batch` whether the batch dimension may stay open.
    """

    module: str
    quantiser: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    refusals: dict[str, str]
    stand_in: str | None = None
    extra: str = "export"
    through_onnx: bool = True
    free_batch: bool = True


TARGETS = {
    "onnx": Target(
        "vitkit.exporters.onnx",
        "vitkit.calibration.onnx",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        ("fp32", "fp16", "int8"),
        {"bf16": "ONNX Runtime has no bf16 kernels for CPUs; use --target openvino, or --precision fp16"},
    ),
    "openvino": Target(
        "vitkit.exporters.openvino",
        "vitkit.calibration.openvino",
        ("torch", "onnx", "onnxscript", "openvino", "nncf"),
        ("fp32", "fp16", "bf16", "int8"),
        {},
    ),
    "tensorrt": Target(
        "vitkit.exporters.tensorrt",
        "vitkit.calibration.tensorrt",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        ("fp32", "fp16", "int8"),
        {"bf16": "TensorRT 8 has no bf16; use fp16"},
        stand_in="onnx",
        free_batch=False,
    ),
    "tflite": Target(
        "vitkit.exporters.tflite",
        "vitkit.calibration.tflite",
        ("torch", "litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        ("fp32", "fp16", "int8"),
        {"bf16": "TFLite has no bf16 kernels for CPUs; use --target openvino, or --precision fp16"},
        extra="tflite-export",
        through_onnx=False,
        free_batch=False,
    ),
}
INPUTS = {"uint8": {"layout": "NHWC", "dtype": "uint8"}, "float32": {"layout": "NCHW", "dtype": "float32"}}


def check_request(
    target: str,
    precision: str,
    *,
    input: str = "uint8",
    batch: int | None = 1,
    opset: int | None = None,
    trt_version: str | None = None,
) -> None:
    """Refuse what cannot work before any heavy import; raises BadRequest and MissingBackend."""
    if target not in TARGETS:
        raise BadRequest(f"there is no target {target!r}; the targets are {', '.join(TARGETS)}")
    row = TARGETS[target]
    if precision not in row.precisions:
        reason = row.refusals.get(precision, f"{target} has {', '.join(row.precisions)}")
        raise BadRequest(f"--precision {precision} is not possible for {target}: {reason}")
    if input not in INPUTS:
        raise BadRequest(f"--input is {input!r}; it must be {' or '.join(INPUTS)}")
    if batch is not None and batch < 1:
        raise BadRequest(f"--batch is {batch}; it must be at least 1")
    if batch is None and not row.free_batch:
        raise BadRequest(f"{target} engines have a fixed batch size: use --batch N, not --dynamic-batch")
    _check_version(target, opset, trt_version)
    for package in row.packages:
        if find_spec(package) is None:
            raise MissingBackend(package, row.extra)
    from vitkit.exporters.onnx import OPSETS

    if opset is not None and not row.through_onnx:
        raise BadRequest(f"--opset is {opset}, but {target} engines have no opset; leave it out")
    if opset is not None and opset not in OPSETS:
        raise BadRequest(f"--opset is {opset}; it must be {OPSETS.start} to {OPSETS.stop - 1}")


def _check_version(target: str, opset: int | None, trt_version: str | None) -> None:
    """Refuse what only TensorRT packages take, and what they do not take."""
    if target != "tensorrt":
        if trt_version is not None:
            raise BadRequest(f"--trt-version is for --target tensorrt, not for {target}")
        return
    if trt_version is not None and trt_version not in DIALECTS:
        raise BadRequest(f"--trt-version is {trt_version!r}; it must be one of {', '.join(DIALECTS)}")
    if opset is not None:
        raise BadRequest("--opset follows from --trt-version for tensorrt; leave it out")


def check_calibration(precision: str, given: bool) -> None:
    """Refuse int8 without calibration images, and calibration images without int8; raises BadRequest."""
    if (precision == "int8") != given:
        what = "needs calibration images: add --calib DIR" if precision == "int8" else "takes no --calib"
        raise BadRequest(f"--precision {precision} {what}")


def export(
    source: Source,
    out: Path,
    *,
    target: str,
    precision: str,
    calibration: CalibrationSet | None = None,
    input: str = "uint8",
    batch: int | None = 1,
    opset: int | None = None,
    trt_version: str | None = None,
    golden: Sequence[NDArray[np.uint8]] | None = None,
    photos: Sequence[tuple[str, NDArray[np.uint8]]] = (),
    step: Callable[[str], object] = lambda text: None,
) -> tuple[Artifact, list[Check]]:
    """Make a verified artifact folder at `out`, whole or not at all.

    `golden` are the photographs of `golden.npz` (generated ones by default). `photos` are named
    photographs on which the engine is compared with the float model. `trt_version` (a key of `DIALECTS`) is
    of the tensorrt target alone. `step` hears what begins.

    Returns the artifact and what the checks found. Raises BadRequest, MissingBackend, and ExportFailed
    where the engine does not do what the float model does.
    """
    check_request(target, precision, input=input, batch=batch, opset=opset, trt_version=trt_version)
    check_calibration(precision, calibration is not None)
    from vitkit.exporters import golden as goldens
    from vitkit.exporters.onnx import DEFAULT_OPSET
    from vitkit.runtimes.files import atomic_folder
    from vitkit.runtimes.image import generated_photos, prepare_batch

    image = replace(source.card.image, **INPUTS[input])  # type: ignore[arg-type]
    count = goldens.count(source.card.task)
    own: dict[str, Any] = {}
    if target == "tensorrt":
        own["trt_version"] = trt_version or DEFAULT_VERSION
        opset = DIALECTS[own["trt_version"]].opset
    examples = generated_photos(count) if golden is None else golden[:count]
    with atomic_folder(out) as folder:
        step(f"making the {precision} engine for {target}")
        make = import_module(TARGETS[target].module).export
        card: ModelCard = make(
            source,
            folder,
            precision=precision,
            calibration=calibration,
            image=image,
            batch=batch,
            opset=opset or DEFAULT_OPSET,
            **own,
        )
        if calibration is not None:
            method = import_module(TARGETS[target].quantiser).METHOD
            record = calibration.record(image, method, list(source.module.float_modules))
            (folder / CALIBRATION_FILE).write_text(record, encoding="utf-8")
        reference = source.predict(prepare_batch(examples, source.card.image))
        goldens.write_golden(folder, prepare_batch(examples, image), reference)
        artifact = Artifact(
            folder, _finish(card, source, folder, target, calibration, opset or DEFAULT_OPSET)
        )
        write_card(artifact.card, folder)
        step("comparing it with the float model")
        checks = verify(folder, source, photos)
    return Artifact(out, artifact.card), checks


def _finish(
    card: ModelCard,
    source: Source,
    folder: Path,
    target: str,
    calibration: CalibrationSet | None,
    opset: int,
) -> ModelCard:
    """The card with its file hashes and with what made it; no time or place, so that bytes repeat."""
    packages = [*TARGETS[target].packages, "numpy"]
    provenance: dict[str, Any] = {
        **source.card.provenance,
        "source_weights": source.card.files.get("model.safetensors"),
        **({"opset": opset} if TARGETS[target].through_onnx else {}),
        "versions": {"vitkit": _version("vitkit"), **{name: _version(name) for name in sorted(packages)}},
    }
    if calibration is not None:
        provenance["calibration"] = {
            "fingerprint": calibration.fingerprint,
            "count": len(calibration.files),
            "seed": calibration.seed,
        }
    files: dict[str, str | None] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    return replace(card, files=files, provenance=provenance)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def verify(path: Path, source: Source, photos: Sequence[tuple[str, NDArray[np.uint8]]] = ()) -> list[Check]:
    """Open an artifact and compare it with its source; raises ExportFailed naming what is broken."""
    from vitkit.exporters.parity import check_golden, check_photos
    from vitkit.runtimes.engine import open_engine

    with _runnable(path) as folder, open_engine(folder) as engine:
        checks = [check_golden(engine)]
        if photos:
            decisions = check_decisions(engine, source, [photo for _, photo in photos[:DECISION_IMAGES]])
            checks.append(check_photos(engine, source.predict, source.card.image, photos, decisions))
    problems = [f"{check.name}: {problem}" for check in checks for problem in check.problems]
    if problems:
        raise ExportFailed(f"the engine does not do what the float model does ({'; '.join(problems)})")
    return checks


@contextmanager
def _runnable(path: Path) -> Iterator[Path]:
    """The artifact; or, of a package, a twin for as long as the block lasts that runs its very graph."""
    card = read_card(path)
    stand_in = TARGETS[card.target].stand_in
    if stand_in is None:
        yield path
        return
    from vitkit.exporters.golden import GOLDEN_FILE
    from vitkit.runtimes.files import naming

    with TemporaryDirectory(prefix=".vitkit.") as name, naming(path, Path(name)):
        files: dict[str, str | None] = {file: None for file in (card.engine, GOLDEN_FILE)}
        for file in files:
            shutil.copy(path / file, name)
        write_card(replace(card, target=stand_in, files=files, options={"exact_qdq": True}), Path(name))
        yield Path(name)


def check_decisions(
    engine: Engine, source: Deciding, photos: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Shares of pixels that change in each decision inside the network, from a twin that returns them too."""
    from vitkit.exporters.parity_panoptic import decision_flips
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.files import naming
    from vitkit.runtimes.image import prepare_batch

    found = source.decisions(prepare_batch(photos[:1], source.card.image))
    if not found:
        return {}
    shapes = {name: (engine.batch, *slots.shape[1:]) for name, slots in found.items()}
    card, target = engine.card, TARGETS[engine.card.target]
    with TemporaryDirectory(prefix=".vitkit.") as name, naming(engine.artifact.path, Path(name)):
        folder = Path(name)
        import_module(target.module).write_twin(engine.artifact, folder, shapes)
        outputs = [TensorSpec(name, shape, "int64") for name, shape in shapes.items()]
        files: dict[str, str | None] = {path.name: None for path in folder.iterdir()}
        write_card(replace(card, outputs=(*card.outputs, *outputs), files=files), folder)
        with open_engine(folder) as twin:
            return decision_flips(twin, source.decisions, source.card.image, photos)

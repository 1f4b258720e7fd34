"""The `tensorrt` target: an artifact whose engine TensorRT builds on the machine that is to run it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitkit.calibration.dataset import CalibrationSet
from vitkit.exporters import onnx as to_onnx
from vitkit.exporters.half import to_half
from vitkit.exporters.source import Exportable
from vitkit.runtimes.card import (
    Artifact,
    ImageSpec,
    ModelCard,
    check_files,
    read_artifact,
    sha256,
    write_card,
)
from vitkit.runtimes.engine import Engine, open_engine, runtime_module
from vitkit.runtimes.errors import BadRequest, ExportFailed
from vitkit.runtimes.files import atomic_folder, check_output_folder
from vitkit.runtimes.tensorrt_options import (
    DIALECTS,
    GRAPH_FILE,
    PLAN_FILE,
    build_script,
    options_for,
)

if TYPE_CHECKING:
    from onnx import ModelProto

    from vitkit.exporters.parity import ParityCheck

SCRIPT_FILE = "build.sh"
# Violations named in an error; one mistake often breaks a rule at every layer.
_NAMED = 5


def export(
    source: Exportable,
    folder: Path,
    *,
    precision: str,
    calibration: CalibrationSet | None = None,
    image: ImageSpec,
    batch: int | None,
    trt_version: str,
) -> ModelCard:
    """Write `model.onnx` and `build.sh` into `folder` and return the card of an unbuilt artifact.

    `trt_version` is a key of `DIALECTS`. Raises ExportFailed, also if the graph breaks a rule of that
    version.
    """
    import onnx

    from vitkit.exporters.tensorrt_graph import TRACED, float32_layers

    dialect, float_modules = DIALECTS[trt_version], source.float_modules
    graph = source.graph(image, batch, TRACED)
    model = convert(
        graph, trt_version, precision, float_modules=float_modules, calibration=calibration, image=image
    )
    to_onnx.check_graph(model, dialect.opset)
    onnx.save(model, folder / GRAPH_FILE)
    layers = float32_layers(model, float_modules, layer_norms=not dialect.layer_norm)
    options = options_for(trt_version, precision, tuple(layers))
    (folder / SCRIPT_FILE).write_text(build_script(options), encoding="utf-8")
    card = to_onnx.engine_card(
        source, image, batch, target="tensorrt", precision=precision, engine=GRAPH_FILE
    )
    return replace(card, options={"build": asdict(options), "built": None})


def convert(
    graph: ModelProto,
    version: str,
    precision: str,
    *,
    float_modules: Sequence[str],
    calibration: CalibrationSet | None = None,
    image: ImageSpec,
) -> ModelProto:
    """A float graph of opset 19 as the version parses it, in its precision.

    Typed float16 only where the version is strongly typed; elsewhere the builder's flags say it. Raises
    ExportFailed where the result breaks a rule of the version.
    """
    from vitkit.exporters.tensorrt_graph import to_dialect

    dialect = DIALECTS[version]
    model = to_dialect(graph, dialect)
    if precision == "int8":
        from vitkit.calibration.tensorrt import quantize

        assert calibration is not None
        model = quantize(model, calibration, image, float_modules)
    if precision != "fp32" and precision in dialect.strongly_typed:
        model = to_half(model, float_modules)
    check_rules(model, version)
    return model


def check_rules(model: ModelProto, version: str) -> None:
    """Refuse a graph that TensorRT of a version would refuse or compute wrongly; raises ExportFailed."""
    from vitkit.exporters.tensorrt_rules import check

    if violations := check(model, version):
        shown = "; ".join(map(str, violations[:_NAMED]))
        more = f"; and {len(violations) - _NAMED} more" if len(violations) > _NAMED else ""
        raise ExportFailed(f"TensorRT {version} does not take this graph: {shown}{more}")


def write_twin(artifact: Artifact, folder: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Write the artifact into `folder` with the integers that the named nodes compute as outputs too.

    Of a built one the engine is built anew, since an engine returns nothing else than it was built for.
    """
    unbuilt = Artifact(artifact.path, replace(artifact.card, engine=GRAPH_FILE))
    to_onnx.write_twin(unbuilt, folder, shapes)
    if artifact.card.engine == PLAN_FILE:
        runtime = runtime_module("tensorrt")
        graph = (folder / GRAPH_FILE).read_bytes()
        plan = runtime.compile_engine(artifact, graph, runtime.machine())
        (folder / PLAN_FILE).write_bytes(plan)


def build(path: Path, out: Path | None = None, *, cuda_graph: bool = False) -> tuple[Artifact, ParityCheck]:
    """Build an artifact's engine for this machine, and compare it with the float model's golden outputs.

    The engine and what it was built from go to the folder `out`, whole or not at all; without one the engine
    goes into this machine's cache alone, where `open_engine` finds it. `cuda_graph` makes the engine of `out`
    replay a recorded CUDA graph, which spares launching its kernels one by one.

    Raises BadRequest, MissingBackend, DeviceError, and ExportFailed where TensorRT cannot build it or where
    the engine does not do what the float model does.
    """
    artifact = read_artifact(path)
    if artifact.card.target != "tensorrt":
        raise BadRequest(f"{path} is made for {artifact.card.target}, which needs no building")
    if out is None:
        if cuda_graph:
            raise BadRequest("--cuda-graph is kept in the card of a built artifact; add -o FOLDER")
        return artifact, _golden(_open(artifact))
    check_output_folder(out, inputs=[path])
    runtime = runtime_module("tensorrt")
    here = runtime.machine()
    graph = check_files(path, artifact.card, keep=(GRAPH_FILE,))[GRAPH_FILE]
    with atomic_folder(out) as folder:
        for name in set(artifact.card.files) - {PLAN_FILE}:
            shutil.copy(path / name, folder)
        (folder / PLAN_FILE).write_bytes(runtime.compile_engine(artifact, graph, here))
        built = {"built": here._asdict(), "cuda_graph": cuda_graph}
        card = replace(
            artifact.card,
            engine=PLAN_FILE,
            files={**artifact.card.files, PLAN_FILE: sha256(folder / PLAN_FILE)},
            options={**artifact.card.options, **built},
        )
        write_card(card, folder)
        check = _golden(open_engine(folder))
    return Artifact(out, card), check


def _open(artifact: Artifact) -> Engine:
    """The engine of an unbuilt artifact, which this machine's cache then keeps."""
    if artifact.card.engine != GRAPH_FILE:
        raise BadRequest(f"{artifact.path} is built already; to build it for this machine add -o FOLDER")
    return open_engine(artifact.path)


def _golden(engine: Engine) -> ParityCheck:
    from vitkit.exporters.verify import check_problems, run_checks

    with engine:
        checks = run_checks(engine)
    check_problems(checks)
    return checks[0]

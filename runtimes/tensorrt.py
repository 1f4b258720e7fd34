"""Sessions of TensorRT, and the building of its engines, from 8.5 to 11."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt

from vitkit.runtimes import cuda
from vitkit.runtimes.card import Artifact, TensorSpec
from vitkit.runtimes.engine import Feeds, Outputs, Session
from vitkit.runtimes.errors import BadArtifact, BadRequest, DeviceError, ExportFailed
from vitkit.runtimes.files import user_folder, write_bytes
from vitkit.runtimes.operators import Operator
from vitkit.runtimes.tensorrt_options import (
    GRAPH_FILE,
    BuildOptions,
    Machine,
    check_machine,
    check_version,
    engine_key,
    read_built,
    read_options,
    timing_key,
)

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}
_PRECISIONS = {"float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "int8": "int8"}


class _Log(tensorrt.ILogger):  # type: ignore[misc]
    """Keeps TensorRT's errors, which its calls do not return."""

    def __init__(self) -> None:
        tensorrt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT."""
        if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
            self.errors.append(msg)

    def __str__(self) -> str:
        return "; ".join(self.errors) or "TensorRT gives no reason"


def machine() -> Machine:
    """What engines built here are bound to; raises DeviceError where there is no GPU."""
    system = f"{sys.platform}-{platform.machine()}"
    return Machine(tensorrt.__version__, cuda.compute_capability(), system)


def cache_folder() -> Path:
    """Where engines and kernel timings of this machine are kept."""
    return user_folder("cache") / "tensorrt"


def compile_engine(artifact: Artifact, graph: bytes, here: Machine) -> bytes:
    """An engine for this machine from a graph, with the artifact's options.

    It takes minutes, fewer if the timings of kernels are known.

    Raises DeviceError if the graph is for another version of TensorRT, ExportFailed where TensorRT
    cannot build it.
    """
    options = read_options(artifact)
    check_version(artifact, here)
    log = _Log()
    builder = tensorrt.Builder(log)
    network = builder.create_network(_network_flags(options))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse(graph):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportFailed(f"TensorRT {here.tensorrt} cannot parse {artifact.path / GRAPH_FILE}: {reasons}")
    config = _config(builder, options)
    if options.float32_layers:
        _keep_float32(network, options.float32_layers, artifact.path)
    timings = cache_folder() / f"{timing_key(here)}.timing"
    _use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportFailed(f"TensorRT {here.tensorrt} cannot build {artifact.path}: {log}")
    write_bytes(timings, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _network_flags(options: BuildOptions) -> int:
    """TensorRT 8 must be told that shapes hold the batch, 10 that types are meant; 11 knows nothing else."""
    kinds = tensorrt.NetworkDefinitionCreationFlag
    if options.version in ("8.5", "8.6"):
        return 1 << int(kinds.EXPLICIT_BATCH)
    if options.version == "10" and options.strongly_typed:
        return 1 << int(kinds.STRONGLY_TYPED)
    return 0


def _config(builder: Any, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    for flag in options.flags:
        config.set_flag(getattr(tensorrt.BuilderFlag, flag))
    if options.float32_layers:
        config.set_flag(tensorrt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return config


def _keep_float32(network: Any, names: Sequence[str], path: Path) -> None:
    """Bind the layers of the named nodes to float32, what they return too."""
    wanted, found = set(names), 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        # A node that becomes several layers gives the later ones its name and a number.
        if layer.name not in wanted and re.sub(r"_\d+$", "", layer.name) not in wanted:
            continue
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        if layer.type != tensorrt.LayerType.CONSTANT and all(o.dtype == tensorrt.float32 for o in outputs):
            found += 1
            layer.precision = tensorrt.float32
            for j in range(len(outputs)):
                layer.set_output_type(j, tensorrt.float32)
    if not found:
        raise ExportFailed(
            f"{path}: TensorRT's network has none of the {len(wanted)} layers to keep in float32"
        )


def _use_timings(config: Any, file: Path) -> None:
    """Start from the timings in a file; from none where it is missing or of another TensorRT."""
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def cached_engine(artifact: Artifact, graph: bytes, here: Machine) -> tuple[bytes, Path]:
    """The engine of an unbuilt artifact for this machine, and the file that keeps it; built if need be."""
    digest = hashlib.sha256(graph).hexdigest()
    file = cache_folder() / f"{engine_key(digest, read_options(artifact), here)}.plan"
    if not file.is_file():
        write_bytes(file, compile_engine(artifact, graph, here))
    return file.read_bytes(), file


class TensorRTSession(Session):
    """One engine with one execution context and one stream; a lock lets threads take turns.

    `plan` is the file that holds the engine.
    """

    main_device = "cuda"

    def __init__(self, artifact: Artifact, plan: bytes, file: Path, settings: dict[str, Any]) -> None:
        self._lock, self._log = threading.Lock(), _Log()
        self._runtime = tensorrt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BadArtifact(f"TensorRT {tensorrt.__version__} cannot open {file}: {self._log}")
        self._context = self._engine.create_execution_context()
        self.settings, self.plan = settings, file
        card = artifact.card
        self.inputs = self._specs(tensorrt.TensorIOMode.INPUT, card.inputs)
        self.outputs = self._specs(tensorrt.TensorIOMode.OUTPUT, card.outputs)
        self._stream = cuda.Stream()
        self._buffers: dict[str, cuda.Buffer] = {}
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(size or 0 for size in spec.shape)
            self._buffers[spec.name] = cuda.Buffer(shape, self._dtype(spec.name))
            self._context.set_tensor_address(spec.name, self._buffers[spec.name].device)
        self._graph: cuda.Graph | None = None

    def _dtype(self, name: str) -> str:
        kind = str(self._engine.get_tensor_dtype(name).name)
        return _DTYPES.get(kind, kind.lower())

    def _specs(self, mode: Any, promised: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """The engine's tensors, in the card's order where it knows them."""
        order = {spec.name: i for i, spec in enumerate(promised)}
        dtypes = {spec.name: spec.dtype for spec in promised}
        names = (self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors))
        specs = []
        for name in names:
            if self._engine.get_tensor_mode(name) != mode:
                continue
            dtype = self._dtype(name)
            # TensorRT 8 has no int64 and computes in int32 instead; `run` turns it back.
            dtype = "int64" if (dtype, dtypes.get(name)) == ("int32", "int64") else dtype
            shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
            specs.append(TensorSpec(name, shape, dtype))
        return tuple(sorted(specs, key=lambda spec: order.get(spec.name, len(order))))

    def run(self, feeds: Feeds) -> Outputs:
        """Run the network on checked feeds; raises DeviceError."""
        with self._lock:
            for spec in self.inputs:
                np.copyto(self._buffers[spec.name].host, feeds[spec.name], casting="same_kind")
            if self._graph is not None:
                self._graph.launch()
            else:
                self._queue()
            self._stream.wait()
            results = {s.name: self._buffers[s.name].host.astype(s.dtype, copy=True) for s in self.outputs}
            # The first run does work that must not be recorded.
            if self.settings["cuda_graph"] and self._graph is None:
                self._graph = cuda.Graph(self._stream, self._queue)
            return results

    def _queue(self) -> None:
        for spec in self.inputs:
            self._buffers[spec.name].upload(self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise DeviceError(f"TensorRT cannot run the engine: {self._log}")
        for spec in self.outputs:
            self._buffers[spec.name].download(self._stream)

    def operators(self) -> tuple[Operator, ...]:
        """The layers as TensorRT fused them, in the precision of their first output."""
        inspector = self._engine.create_engine_inspector()
        body = json.loads(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))
        found = []
        for layer in body["Layers"]:
            if not isinstance(layer, dict):
                found.append(Operator(str(layer), "layer", "unknown", self.main_device))
                continue
            output = (layer.get("Outputs") or [{}])[0]
            kind = str(
                output.get("Format/Datatype") or output.get("Datatype") or output.get("DataType") or ""
            )
            words = re.findall(r"[a-z0-9]+", kind.lower())
            precision = next((_PRECISIONS[word] for word in words if word in _PRECISIONS), "integer")
            name, layer_type = str(layer.get("Name", "")), str(layer.get("LayerType", "layer"))
            found.append(Operator(name, layer_type, precision, self.main_device))
        return tuple(found)

    def close(self) -> None:
        """Free the engine and its memory."""
        with self._lock:
            if self._graph is not None:
                self._graph.close()
            for buffer in self._buffers.values():
                buffer.close()
            self._stream.close()
            # In this order: a context needs its engine, an engine its runtime.
            self._context = None
            self._engine = None
            self._runtime = None


def open_session(
    artifact: Artifact, files: Mapping[str, bytes], *, threads: int | None, device: str
) -> TensorRTSession:
    """Open a built engine; one that is not built yet is built first, unless this machine has kept it."""
    if threads is not None:
        raise BadRequest(f"threads is {threads}; TensorRT computes on the GPU: leave it out")
    here = machine()
    check_machine(artifact, here)
    if read_built(artifact) is None:
        plan, file = cached_engine(artifact, files[artifact.card.engine], here)
    else:
        plan, file = files[artifact.card.engine], artifact.engine_path
    settings = {**here._asdict(), "cuda_graph": artifact.card.options.get("cuda_graph") is True}
    return TensorRTSession(artifact, plan, file, settings)

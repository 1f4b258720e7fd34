"""Sessions of OpenVINO."""

from __future__ import annotations

import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from vitkit.runtimes.card import Artifact, TensorSpec, check_files
from vitkit.runtimes.engine import Feeds, Outputs, Session
from vitkit.runtimes.errors import BadArtifact, DeviceError
from vitkit.runtimes.lifetime import hold_for_ever
from vitkit.runtimes.operators import WARM_UP, Operator, Profile, Timing, timed
from vitkit.runtimes.reading import has_external_weights

_DTYPES = {"u8": "uint8", "i32": "int32", "i64": "int64", "f16": "float16", "f32": "float32"}
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "FullyConnectedQuantizedLegacy", "MatMul")
_PRODUCTS_IN_FILES = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
)
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "MaxPool")
_CONVERSIONS = ("FakeQuantize", "Convert", "Reorder")
_FELL_BACK = "a product of quantised factors that runs in float: no INT8 kernel was found for it"
_CAPABILITY = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
# The caps of `ONEDNN_MAX_CPU_ISA` under which nothing computes in half precision.
_WITHOUT_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")
_WITHOUT_HALF = (*_WITHOUT_AVX512, "AVX512_CORE", "AVX512_CORE_VNNI")


def _spec(port: Any) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else None for d in port.partial_shape)
    dtype = port.element_type.get_type_name()
    return TensorSpec(port.any_name, shape, _DTYPES.get(dtype, dtype))


class OpenVINOSession(Session):
    """One compiled model with one infer request; a lock lets threads take turns.

    `reread` reads the same files once more; `compile_to_profile` compiles what it read, with the same
    settings and performance counters.
    """

    def __init__(
        self,
        compiled: Any,
        settings: dict[str, Any],
        reread: Callable[[], Any],
        compile_to_profile: Callable[[Any], Any],
    ) -> None:
        self._compiled = compiled
        self._reread, self._compile_to_profile = reread, compile_to_profile
        self.main_device = settings["device"]
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        self.settings = settings
        self.inputs = tuple(_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_spec(port) for port in compiled.outputs)
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Feeds) -> Outputs:
        """Run the network on checked feeds."""
        with self._lock:
            # Shared inputs and outputs skip the vendor's copies; the copy below makes results the caller's.
            results = self._request.infer(
                {name: np.ascontiguousarray(array) for name, array in feeds.items()},
                share_inputs=True,
                share_outputs=True,
            )
            return {name: results[i].copy() for i, name in enumerate(self._names)}

    def operators(self) -> tuple[Operator, ...]:
        """The nodes of the runtime model, as the device executes them after its own fusions."""
        return _operators(self._compiled, _int8_products(self._reread()))

    def profile(self, feeds: Feeds, runs: int) -> Profile:
        """Times of every node by OpenVINO's performance counters, which the model is compiled again for."""
        model = self._reread()
        compiled = self._compile_to_profile(model)
        known = {operator.name: operator for operator in _operators(compiled, _int8_products(model))}
        request = compiled.create_infer_request()
        for _ in range(WARM_UP):
            request.infer(dict(feeds))
        before = _counted_us(request, WARM_UP)
        times = [timed(lambda: request.infer(dict(feeds))) for _ in range(runs)]
        after = _counted_us(request, WARM_UP + runs)
        timings = [
            Timing(known[name], 0, None, max(0, round(1000 * (total - before.get(name, 0)) / runs)))
            for name, total in after.items()
            if name in known
        ]
        source = f"performance counters of OpenVINO {openvino.__version__}"
        return Profile(times, timings, source, is_mean=True)

    def close(self) -> None:
        """Drop the compiled model, which frees its memory."""
        with self._lock:
            self._request = self._compiled = None


def _counted_us(request: Any, runs: int) -> dict[str, int]:
    """Time of every executed node over all `runs` of a request, in microseconds.

    The counters' `real_time` is the mean of all runs since the model was compiled, in whole microseconds.
    """
    return {
        info.node_name: runs * (info.real_time // timedelta(microseconds=1))
        for info in request.get_profiling_info()
        if info.status == info.EXECUTED
    }


def _operators(compiled: Any, meant_int8: set[str]) -> tuple[Operator, ...]:
    """The nodes of a runtime model; `meant_int8` are names of the file's products, see `_int8_products`."""
    device = ",".join(compiled.get_property("EXECUTION_DEVICES"))
    found = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
        kind, precision = info["layerType"], _precision(info)
        if kind not in ("Const", "Input", "Output"):
            origins = info["originalLayersNames"].split(",")
            fell_back = precision in _PRECISIONS.values() and meant_int8.intersection(origins)
            reason = _FELL_BACK if kind in _PRODUCTS and fell_back else ""
            found.append(Operator(op.get_friendly_name(), kind, precision, device, reason))
    return tuple(found)


def _precision(info: Mapping[str, str]) -> str:
    kind, before, after = info["layerType"], info["runtimePrecision"], info["outputPrecisions"]
    if kind in _CONVERSIONS and before != after:
        # A node that only quantises; Convert makes numbers of another type.
        int8 = "integer" if kind == "Convert" else "int8"
        names = {**_PRECISIONS, "u8": int8, "i8": int8}
        return f"{names.get(before, 'integer')} to {names.get(after, 'integer')}"
    # u8 is what quantised products take, but also what pixels and truth values are.
    if before == "i8" or (before == "u8" and kind in (*_PRODUCTS, "Pooling")):
        return "int8"
    return _PRECISIONS.get(before, "integer")


def _int8_products(model: Any) -> set[str]:
    """Names of the products in a file whose two factors are quantised."""
    return {
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() in _PRODUCTS_IN_FILES and all(map(_is_quantised, op.input_values()[:2]))
    }


def _is_quantised(output: Any) -> bool:
    """Whether values come from a FakeQuantize, or from 8-bit constants that are scaled."""
    op = output.get_node()
    while op.get_type_name() in _LAYOUT:
        op = op.input_value(0).get_node()
    if op.get_type_name() == "FakeQuantize":
        return int(op.get_attributes()["levels"]) <= 256
    while op.get_type_name() in ("Multiply", "Subtract", "Convert"):
        op = op.input_value(0).get_node()
    return op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in ("i8", "u8")


def _beyond_cap(compiled: Any, cap: str) -> dict[str, int]:
    """Operators whose kernels use more than the cap allows, by `operator kernel`: MLAS and some of OpenVINO's
    own ask the processor.
    """
    wider = ("mlas", "avx512", "amx") if cap in _WITHOUT_AVX512 else ("amx",)
    counts: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, kernel = info["layerType"].astype(str), info["primitiveType"].astype(str)
        if any(name in kernel for name in wider):
            counts[f"{kind} {kernel}"] += 1
    return dict(counts.most_common())


_cores: dict[int, Any] = {}


def _core() -> Any:
    """The vendor's Core of this process, which is never destroyed.

    Its CPU plugin gives the thread that makes it an alternate stack for signals. Destroyed by another thread
    it takes the memory and leaves the setting, and the next signal that Python handles, Ctrl-C's too, ends
    the process.
    """
    pid = os.getpid()
    if pid not in _cores:
        # By process, since a forked child lacks the threads of its parent's.
        _cores[pid] = openvino.Core()
        hold_for_ever(_cores[pid])
    return _cores[pid]


def capabilities() -> dict[str, list[str]]:
    """What each device here computes natively, in OpenVINO's words (`FP32`, `BF16`, `INT8`, ...)."""
    core = _core()
    able = {name: core.get_property(name, "OPTIMIZATION_CAPABILITIES") for name in core.available_devices}
    # OpenVINO asks the processor, its kernels obey the cap.
    if _cap() in _WITHOUT_HALF:
        able["CPU"] = [name for name in able["CPU"] if name not in ("BF16", "FP16")]
    return able


def _cap() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def _choose_hint(device: str, able: list[str], hints: list[str], path: object) -> str:
    """The first of the artifact's precisions that the device computes natively.

    A bf16 hint crashes on AVX2 and is slower than float32 on AVX512 without bf16 instructions.
    """
    for hint in hints:
        if _CAPABILITY[hint] in able:
            return hint
    raise DeviceError(
        f"{path} computes in {' or '.join(hints)}, which this {device} cannot do (it has {', '.join(able)}); "
        "export again with --precision fp32 or int8"
    )


def open_session(
    artifact: Artifact, files: Mapping[str, bytes], *, threads: int | None, device: str
) -> OpenVINOSession:
    """Open `model.xml` for low latency, in the precision that the card's options name."""
    name, here = device.upper(), capabilities()
    if name not in here:
        raise DeviceError(
            f"OpenVINO has no device {device!r} here; it has {', '.join(found.lower() for found in here)}"
        )
    hints = artifact.card.options.get("precision_hints", ["f32"])
    if not isinstance(hints, list) or not hints or any(str(hint) not in _CAPABILITY for hint in hints):
        raise BadArtifact(
            f"{artifact.path}: options.precision_hints is {hints!r}; known are {', '.join(_CAPABILITY)}"
        )
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": _choose_hint(name, here[name], hints, artifact.path),
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = _compile(artifact, files, name, settings)

    def reread() -> Any:
        again = check_files(artifact.path, artifact.card, keep=artifact.engine_files)
        return _core().read_model(*_graph_and_weights(artifact, again))

    def compile_to_profile(model: Any) -> Any:
        return _core().compile_model(model, name, {**settings, "PERF_COUNT": True})

    reported = {"openvino": openvino.__version__, "device": name, **settings}
    if _cap() in _WITHOUT_HALF:
        reported |= {"ONEDNN_MAX_CPU_ISA": _cap(), "beyond_cap": _beyond_cap(compiled, _cap())}
    return OpenVINOSession(compiled, reported, reread, compile_to_profile)


def _graph_and_weights(artifact: Artifact, files: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    graph = files[artifact.card.engine]
    if artifact.engine_path.suffix == ".onnx" and has_external_weights(graph):
        raise BadArtifact(
            f"{artifact.engine_path} keeps weights in another file, which OpenVINO would read unchecked: "
            "save the graph with its weights inside"
        )
    return graph, files.get(Path(artifact.card.engine).with_suffix(".bin").name, b"")


def _compile(artifact: Artifact, files: Mapping[str, bytes], device: str, settings: dict[str, Any]) -> Any:
    graph, weights = _graph_and_weights(artifact, files)
    try:
        return _core().compile_model(graph, device, settings, weights=weights)
    # The vendor raises RuntimeError and its own subclasses for files it cannot take.
    except Exception as error:
        arm = artifact.card.precision == "int8" and platform.machine().lower() in ("aarch64", "arm64")
        mend = "; on ARM it takes few INT8 graphs: export with --target tflite or onnx" if arm else ""
        raise BadArtifact(
            f"OpenVINO {openvino.__version__} cannot open {artifact.engine_path}: {str(error).strip()}{mend}"
        ) from None

"""Sessions of TFLite: `ai_edge_litert`, or the older `tflite_runtime` where that is what a device has."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import Artifact, TensorSpec
from vitkit.runtimes.engine import Feeds, Outputs, Session
from vitkit.runtimes.errors import BadArtifact, MissingBackend
from vitkit.runtimes.operators import WARM_UP, Operator, Profile, timed

try:
    from ai_edge_litert.interpreter import Interpreter

    PACKAGE = "ai-edge-litert"
except ImportError as _newer:
    try:
        from tflite_runtime.interpreter import Interpreter
    except ModuleNotFoundError:
        raise _newer from None
    # Its releases are built for NumPy 1; beside NumPy 2 they raise either of these.
    except (ImportError, SystemError) as _older:
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            raise
        raise MissingBackend(
            "tflite_runtime",
            "tflite",
            f"{_older}; it is built for NumPy 1, here is NumPy {np.__version__}",
            "pip install 'numpy<2', or pip install ai-edge-litert and leave NumPy as it is",
        ) from _older

    PACKAGE = "tflite-runtime"

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "int8": "int8"}
# What quantised operators of older files compute in; without a scale these are pixels or truth values.
_QUANTISED = ("uint8", "int16")
_DELEGATE, _OWN_KERNELS = "XNNPACK", "TFLite"
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE", "CAST")
# Their second input are weights: if these alone are INT8, so are the products (dynamic range quantisation).
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_NO_PROFILER = (
    "the Python package of TFLite has no profiler: only whole runs are timed; for times by operator run "
    "TFLite's benchmark_model with --enable_op_profiling=true"
)


class Tensor:
    """An input or output of the interpreter, and how it meets the app.

    An output that the file quantises comes as the float32 numbers that it stands for, and so go inputs of
    int8. A uint8 input takes the pixels themselves, quantised or not: that is what such files expect.
    """

    def __init__(self, detail: dict[str, Any], *, is_input: bool) -> None:
        self.index = int(detail["index"])
        self.dtype = np.dtype(detail["dtype"])
        scales, zeros = (detail["quantization_parameters"][key] for key in ("scales", "zero_points"))
        integer = self.dtype.kind in "iu" and len(scales) == 1
        self.quantised = integer and not (is_input and self.dtype == np.uint8)
        self.scale, self.zero = (float(scales[0]), int(zeros[0])) if integer else (1.0, 0)
        shape = tuple(int(d) if d >= 0 else None for d in detail["shape_signature"])
        self.spec = TensorSpec(detail["name"], shape, "float32" if self.quantised else self.dtype.name)

    def to_file(self, array: NDArray[Any]) -> NDArray[Any]:
        """What the app feeds -> what the file takes; numbers out of its range become its ends."""
        if not self.quantised:
            return array
        info = np.iinfo(self.dtype)
        # In float64: a large float32 over a small scale would overflow.
        steps = np.rint(array.astype(np.float64) / self.scale) + self.zero
        return np.asarray(np.clip(steps, info.min, info.max), self.dtype)

    def from_file(self, array: NDArray[Any]) -> NDArray[Any]:
        """What the file returns -> what the app gets."""
        if not self.quantised:
            return array
        return (array.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)


class TFLiteSession(Session):
    """One interpreter; a lock lets threads take turns."""

    def __init__(self, interpreter: Any, settings: dict[str, Any]) -> None:
        self._interpreter = interpreter
        self._lock = threading.Lock()
        self._inputs = [Tensor(detail, is_input=True) for detail in interpreter.get_input_details()]
        self._outputs = [Tensor(detail, is_input=False) for detail in interpreter.get_output_details()]
        self._shapes = {tensor.spec.name: tensor.spec.shape for tensor in self._inputs}
        self.inputs = tuple(tensor.spec for tensor in self._inputs)
        self.outputs = tuple(tensor.spec for tensor in self._outputs)
        nodes = self._nodes()
        # From the end, since delegates are appended.
        accelerated = any(nodes.NodeName(i) == "DELEGATE" for i in reversed(range(nodes.NumNodes())))
        self.settings = {**settings, "delegate": _DELEGATE if accelerated else "none"}
        self.main_device = _DELEGATE

    @property
    def input_steps(self) -> tuple[float, int] | None:
        """Scale and zero point of the first input if the app's numbers are quantised on their way in."""
        first = self._inputs[0]
        return (first.scale, first.zero) if first.quantised else None

    def _nodes(self) -> Any:
        """The vendor lists operators to its own tools only, and slowly; this is what they ask."""
        return self._interpreter._interpreter

    def run(self, feeds: Feeds) -> Outputs:
        """Run the network on checked feeds."""
        with self._lock:
            self._resize(feeds)
            for tensor in self._inputs:
                self._interpreter.set_tensor(tensor.index, tensor.to_file(feeds[tensor.spec.name]))
            self._interpreter.invoke()
            # The vendor copies, so results are the caller's.
            return {
                tensor.spec.name: tensor.from_file(self._interpreter.get_tensor(tensor.index))
                for tensor in self._outputs
            }

    def _resize(self, feeds: Feeds) -> None:
        """Follow feeds whose free dimensions changed."""
        shapes = {tensor.spec.name: feeds[tensor.spec.name].shape for tensor in self._inputs}
        if shapes != self._shapes:
            # If the vendor fails half-way, the next run starts anew.
            self._shapes = {}
            for tensor in self._inputs:
                self._interpreter.resize_tensor_input(tensor.index, shapes[tensor.spec.name], strict=True)
            self._interpreter.allocate_tensors()
            self._shapes = dict(shapes)

    def operators(self) -> tuple[Operator, ...]:
        """The file's operators, each with what executes it: XNNPACK, or TFLite's own kernels.

        The vendor lists them all, with a `DELEGATE` for every part that XNNPACK took over, which names the
        tensors at its borders alone: what is between them runs there.
        """
        with self._lock:
            tensors = {item["index"]: item for item in self._interpreter.get_tensor_details()}
            nodes = self._nodes()
            count = nodes.NumNodes()
            taken = self._delegated(count)
            found = []
            for i in range(count):
                if (kind := nodes.NodeName(i)) == "DELEGATE":
                    continue
                inputs, outputs = (
                    [tensors.get(int(t)) for t in side(i)] for side in (nodes.NodeInputs, nodes.NodeOutputs)
                )
                name = _name(outputs[0]["name"]) if outputs and outputs[0] else kind
                device = _DELEGATE if i in taken else _OWN_KERNELS
                found.append(Operator(name, kind, _precision(kind, inputs, outputs), device))
            return tuple(found)

    def _delegated(self, count: int) -> set[int]:
        """Numbers of the nodes that a delegate runs: those on the ways from its outputs to its inputs."""
        nodes = self._nodes()
        delegates = [i for i in range(count) if nodes.NodeName(i) == "DELEGATE"]
        makers = {int(t): i for i in range(count) if i not in delegates for t in nodes.NodeOutputs(i)}
        taken: set[int] = set()
        for delegate in delegates:
            borders = {int(t) for t in nodes.NodeInputs(delegate)}
            waiting = [int(t) for t in nodes.NodeOutputs(delegate)]
            while waiting:
                tensor = waiting.pop()
                maker = makers.get(tensor)
                if tensor not in borders and maker is not None and maker not in taken:
                    taken.add(maker)
                    waiting += map(int, nodes.NodeInputs(maker))
        return taken

    def profile(self, feeds: Feeds, runs: int) -> Profile:
        """Wall times of whole runs: the vendor's Python package measures no operators."""
        for _ in range(WARM_UP):
            self.run(feeds)
        times = [timed(lambda: self.run(feeds)) for _ in range(runs)]
        return Profile(times, (), f"clock around runs of {PACKAGE}", _NO_PROFILER)

    def close(self) -> None:
        """Drop the interpreter, which frees its memory."""
        with self._lock:
            self._interpreter = None


def _name(tensor: str) -> str:
    """The first of the names that TensorFlow joined, its scopes joined as a module path."""
    scopes, sign, operator = tensor.partition(";")[0].rpartition("/")
    return f"{scopes.replace('/', '.')}{sign}{operator}"


def _precision(kind: str, inputs: list[Any], outputs: list[Any]) -> str:
    """What an operator computes in, by the types of its tensors in the plan; None is an absent input."""
    before, after = (_type(side[0] if side else None) for side in (inputs, outputs))
    if kind in _CONVERSIONS and before != after:
        return f"{before} to {after}"
    if kind in _PRODUCTS and _type(inputs[1]) == "int8":
        return "int8"
    return before if after == "integer" else after


def _type(tensor: dict[str, Any] | None) -> str:
    if tensor is None:
        return "integer"
    name = np.dtype(tensor["dtype"]).name
    if name in _QUANTISED and len(tensor["quantization_parameters"]["scales"]):
        return "int8"
    return _PRECISIONS.get(name, "integer")


def open_reference(content: bytes) -> TFLiteSession:
    """A file run by TFLite's own kernels alone, without XNNPACK; raises BadArtifact."""
    # Known to the newer package alone, which reading others' files needs anyway.
    from ai_edge_litert.interpreter import OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
        interpreter.allocate_tensors()
    # The vendor raises ValueError, RuntimeError and MemoryError for files it cannot take.
    except Exception as error:
        raise BadArtifact(f"{PACKAGE} {metadata.version(PACKAGE)} does not take the file: {error}") from None
    return TFLiteSession(interpreter, {PACKAGE: metadata.version(PACKAGE)})


def open_session(
    artifact: Artifact, files: Mapping[str, bytes], *, threads: int | None, device: str
) -> TFLiteSession:
    """Open `model.tflite` on the CPU; XNNPACK runs what it knows. Without `threads` TFLite takes one."""
    version = metadata.version(PACKAGE)
    try:
        interpreter = Interpreter(model_content=files[artifact.card.engine], num_threads=threads)
        interpreter.allocate_tensors()
    # The vendor raises ValueError, RuntimeError and MemoryError for files it cannot take.
    except Exception as error:
        raise BadArtifact(f"{PACKAGE} {version} cannot open {artifact.engine_path}: {error}") from None
    return TFLiteSession(interpreter, {PACKAGE: version, "threads": threads})

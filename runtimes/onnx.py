"""Sessions of ONNX Runtime."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnxruntime

from vitkit.runtimes.card import Artifact, TensorSpec
from vitkit.runtimes.engine import Feeds, Outputs, Session
from vitkit.runtimes.errors import BadArtifact, DeviceError
from vitkit.runtimes.reading import has_external_weights

_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
}
# The first ONNX Runtime that reads files of an IR version and of an opset; found by trying 1.20 to 1.31.
_READS_IR = {10: "1.20", 11: "1.23", 13: "1.24"}
_EXTERNAL = (
    ". The graph keeps weights in another file, which the card must list under a name like the graph's "
    "(model.onnx.data), and which ONNX Runtime reads from 1.24 on: save the graph with its weights inside"
)
_READS_OPSET = {21: "1.20", 22: "1.21", 23: "1.23", 25: "1.24", 26: "1.25"}


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else None for d in node.shape)
    return TensorSpec(node.name, shape, _DTYPES.get(node.type, node.type))


class OnnxSession(Session):
    """One ONNX Runtime session; its own calls are thread-safe."""

    def __init__(self, session: Any, settings: dict[str, Any]) -> None:
        self._session = session
        self.settings = settings
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Feeds) -> Outputs:
        """Run the network on checked feeds."""
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))

    def operators(self) -> Counter[tuple[str, str]]:
        """Empty: ONNX Runtime lists its operators to nobody."""
        return Counter()

    def close(self) -> None:
        """Drop the session, which frees its memory."""
        self._session = None


def open_session(
    artifact: Artifact, files: Mapping[str, bytes], *, threads: int | None, device: str
) -> OnnxSession:
    """Open a graph on the CPU, or on CUDA if this ONNX Runtime has it.

    Weights may be in other files of the engine's stem, such as `model.onnx.data` beside `model.onnx`.
    """
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    here = onnxruntime.get_available_providers()
    if providers.get(device) not in here:
        raise DeviceError(
            f"ONNX Runtime has no device {device!r} here; it has "
            f"{', '.join(name for name, provider in providers.items() if provider in here)}"
        )
    options = _options(artifact, files, threads)
    try:
        # Without its fallback, which would go on with another provider than the one that was asked for.
        session = onnxruntime.InferenceSession(
            files[artifact.card.engine],
            options,
            providers=[providers[device]],
            enable_fallback=0,
        )
    # The vendor raises a dozen unrelated types for files it cannot take.
    except Exception as error:
        raise BadArtifact(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {artifact.engine_path}: {error}"
            f"{_remedy(str(error), onnxruntime.__version__)}"
        ) from None
    if session.get_providers()[0] != providers[device]:
        raise DeviceError(
            f"ONNX Runtime {onnxruntime.__version__} cannot use {providers[device]} here; use device 'cpu'"
        )
    # The vendor keeps them for its fallback: as much memory again as the weights.
    session._model_bytes = None
    settings = {"onnxruntime": onnxruntime.__version__, "provider": providers[device], "threads": threads}
    return OnnxSession(session, settings)


def open_reference(content: bytes) -> OnnxSession:
    """A graph with its weights inside, run on the CPU as it is written: ONNX Runtime's optimiser is off.

    What engines of the graph are compared with. Raises BadArtifact.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # The vendor raises a dozen unrelated types for graphs it cannot take.
    except Exception as error:
        version = onnxruntime.__version__
        raise BadArtifact(
            f"ONNX Runtime {version} does not take the graph: {error}{_remedy(str(error), version)}"
        ) from None
    return OnnxSession(session, {"onnxruntime": onnxruntime.__version__, "optimiser": "off"})


def _options(artifact: Artifact, files: Mapping[str, bytes], threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Fused into integer kernels, pairs of float16 scales compute something else than the graph says.
    if artifact.card.options.get("exact_qdq"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    weights = {name: content for name, content in files.items() if name != artifact.card.engine}
    if weights and hasattr(options, "add_external_initializers_from_files_in_memory"):
        sizes = [len(content) for content in weights.values()]
        options.add_external_initializers_from_files_in_memory(list(weights), list(weights.values()), sizes)
    elif has_external_weights(files[artifact.card.engine]):
        # Of a graph that comes from memory they would be looked for in the current folder.
        raise BadArtifact(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {artifact.engine_path}{_EXTERNAL}"
        )
    return options


def _remedy(text: str, version: str) -> str:
    """What fixes a file that ONNX Runtime of a version refuses with a text; empty if that is unknown."""
    if match := re.search(r"model IR version: (\d+), max supported", text):
        return _upgrade(_READS_IR, int(match[1]), f"IR version {match[1]}", version)
    if match := re.search(r"Opset (\d+) is under development", text):
        return _upgrade(_READS_OPSET, int(match[1]), f"opset {match[1]}", version)
    return _EXTERNAL if "xternal" in text else ""


def _upgrade(table: Mapping[int, str], wanted: int, what: str, version: str) -> str:
    enough = next((first for known, first in table.items() if known >= wanted), None)
    if enough is None:
        newest = max(_READS_OPSET)
        return f". No ONNX Runtime known to vitkit reads {what}: export again with --opset {newest}"
    return (
        f". {what} needs ONNX Runtime {enough} or newer, here is {version}: "
        f"pip install --upgrade 'onnxruntime>={enough}'"
    )

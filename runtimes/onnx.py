"""Sessions of ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vitkit.runtimes.card import Artifact, TensorSpec, check_files
from vitkit.runtimes.engine import Feeds, Outputs, Session
from vitkit.runtimes.errors import BadArtifact, DeviceError
from vitkit.runtimes.onnx_profile import float_products, read_nodes, read_timings
from vitkit.runtimes.operators import WARM_UP, Operator, Profile, timed
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
_GRAPH_FILE = "graph.onnx"
# A protobuf ends at 2 GiB; weights of a larger graph are written beside it.
_LARGE = 1 << 30
_READS_OPSET = {21: "1.20", 22: "1.21", 23: "1.23", 25: "1.24", 26: "1.25"}


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else None for d in node.shape)
    return TensorSpec(node.name, shape, _DTYPES.get(node.type, node.type))


class OnnxSession(Session):
    """One ONNX Runtime session; its own calls are thread-safe.

    `reopen` opens the same files with the same options once more, this time to write its profile and the
    graph that it runs into a folder. A session without it lists no operators.
    """

    def __init__(
        self, session: Any, settings: dict[str, Any], reopen: Callable[[Path], Any] | None = None
    ) -> None:
        self._session = session
        self._reopen = reopen
        self._operators: tuple[Operator, ...] | None = None
        self.settings = settings
        self.main_device = settings.get("provider", "")
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Feeds) -> Outputs:
        """Run the network on checked feeds."""
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))

    def operators(self) -> tuple[Operator, ...]:
        """Every kernel of one run on zeros, by its profile; opens the engine's files once more."""
        if self._reopen is None:
            return ()
        if self._operators is None:
            # A free dimension is the batch: one image.
            feeds = {spec.name: np.zeros([d or 1 for d in spec.shape], spec.dtype) for spec in self.inputs}
            profile = self._profile(self._reopen, feeds, 0, 1)
            self._operators = tuple(timing.operator for timing in profile.timings)
        return self._operators

    def profile(self, feeds: Feeds, runs: int) -> Profile:
        """Times of every kernel, by ONNX Runtime's own profiler, in microseconds."""
        if self._reopen is None:
            return super().profile(feeds, runs)
        return self._profile(self._reopen, feeds, WARM_UP, runs)

    def _profile(self, reopen: Callable[[Path], Any], feeds: Feeds, warm_up: int, runs: int) -> Profile:
        # Late, since no app needs it to open an engine.
        from tempfile import TemporaryDirectory

        with TemporaryDirectory(prefix="vitkit-profile-", ignore_cleanup_errors=True) as name:
            session = reopen(Path(name))
            times = [timed(lambda: session.run(self._names, feeds)) for _ in range(warm_up + runs)]
            file = Path(session.end_profiling())
            meant_int8 = float_products(read_nodes((Path(name) / _GRAPH_FILE).read_bytes()))
            timings = read_timings(file, meant_int8, skip=warm_up)
        return Profile(times[warm_up:], timings, f"profiler of ONNX Runtime {onnxruntime.__version__}")

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
    session = _open(artifact, files, providers[device], _options(artifact, files, threads))
    settings = {"onnxruntime": onnxruntime.__version__, "provider": providers[device], "threads": threads}

    def reopen(folder: Path) -> Any:
        again = check_files(artifact.path, artifact.card, keep=artifact.engine_files)
        options = _options(artifact, again, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(folder / _GRAPH_FILE)
        if sum(map(len, again.values())) > _LARGE:
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "weights.bin"
            )
        return _open(artifact, again, providers[device], options)

    return OnnxSession(session, settings, reopen)


def _open(artifact: Artifact, files: Mapping[str, bytes], provider: str, options: Any) -> Any:
    try:
        # Without its fallback, which would go on with another provider than the one that was asked for.
        session = onnxruntime.InferenceSession(
            files[artifact.card.engine],
            options,
            providers=[provider],
            enable_fallback=0,
        )
    # The vendor raises a dozen unrelated types for files it cannot take.
    except Exception as error:
        raise BadArtifact(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {artifact.engine_path}: {error}"
            f"{_remedy(str(error), onnxruntime.__version__)}"
        ) from None
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"ONNX Runtime {onnxruntime.__version__} cannot use {provider} here; use device 'cpu'"
        )
    # The vendor keeps them for its fallback: as much memory again as the weights.
    session._model_bytes = None
    return session


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

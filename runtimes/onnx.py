"""Sessions of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import onnxruntime

from vitkit.runtimes.card import Artifact, TensorSpec
from vitkit.runtimes.engine import Feeds, Outputs
from vitkit.runtimes.errors import BadArtifact, DeviceError

_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
}


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else None for d in node.shape)
    return TensorSpec(node.name, shape, _DTYPES.get(node.type, node.type))


class OnnxSession:
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

    def close(self) -> None:
        """Drop the session, which frees its memory."""
        self._session = None


def open_session(artifact: Artifact, *, threads: int | None, device: str) -> OnnxSession:
    """Open `model.onnx` on the CPU, or on CUDA where this ONNX Runtime has it."""
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    here = onnxruntime.get_available_providers()
    if providers.get(device) not in here:
        raise DeviceError(
            f"ONNX Runtime has no device {device!r} here; it has "
            f"{', '.join(name for name, provider in providers.items() if provider in here)}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Fused into integer kernels, pairs of float16 scales compute something else than the graph says.
    if artifact.card.options.get("exact_qdq"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(artifact.engine_path), options, providers=[providers[device]]
        )
    # The vendor raises a dozen unrelated types for files it cannot take.
    except Exception as error:
        raise BadArtifact(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {artifact.engine_path}: {error}"
        ) from None
    settings = {"onnxruntime": onnxruntime.__version__, "provider": providers[device], "threads": threads}
    return OnnxSession(session, settings)

"""The target `zipped` on a device: ONNX graphs, compressed, in ONNX Runtime."""

import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vitkit.runtimes import Artifact, BadArtifact, Session, TensorSpec
from vitkit.runtimes.engine import Feeds, Outputs, Runtime

RUNTIME = Runtime("zipped_runtime", package="onnxruntime", extra="onnx", sole=True)
DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


class ZippedSession(Session):
    """One session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session, self.settings = session, {"provider": "CPU"}
        self.inputs, self.outputs = (
            tuple(TensorSpec(node.name, tuple(node.shape), DTYPES[node.type]) for node in nodes)
            for nodes in (session.get_inputs(), session.get_outputs())
        )

    def run(self, feeds: Feeds) -> Outputs:
        """Run the graph on checked feeds."""
        return {s.name: a for s, a in zip(self.outputs, self.session.run(None, dict(feeds)), strict=True)}

    def operators(self) -> Counter[tuple[str, str]]:
        """None: ONNX Runtime lists no operators."""
        return Counter()

    def close(self) -> None:
        """Free the graph."""
        self.session = None


def open_session(
    artifact: Artifact, files: Mapping[str, bytes], *, threads: int | None, device: str
) -> ZippedSession:
    """Unzip and open a graph; the vendor's package is imported here, late."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        graph = zlib.decompress(files[artifact.card.engine])
    except zlib.error as error:
        raise BadArtifact(f"{artifact.engine_path} cannot be unzipped: {error}") from None
    return ZippedSession(onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))

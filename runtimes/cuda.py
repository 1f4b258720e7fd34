"""CUDA memory, streams and graphs, through cuda-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from cuda.bindings import runtime as cudart
except ImportError:
    # Where cuda-python had it before 12.8.
    from cuda import cudart

from vitkit.runtimes.errors import DeviceError


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """The value of a CUDA call; raises DeviceError with CUDA's own words."""
    # Before 13, cuda-python raises where there is no driver.
    try:
        error, *values = function(*arguments)
    except RuntimeError as cause:
        raise DeviceError(
            f"CUDA does not load: {cause}; see what the driver knows with: nvidia-smi"
        ) from None
    if int(error) != 0:
        text = cudart.cudaGetErrorString(error)[1]
        words = text.decode() if isinstance(text, bytes) else str(text)
        raise DeviceError(
            f"CUDA says: {words} (error {int(error)}); see what the driver knows with: nvidia-smi"
        )
    return values[0] if values else None


def compute_capability() -> str:
    """That of the current GPU, such as `8.7`. Raises DeviceError where there is none."""
    if not _call(cudart.cudaGetDeviceCount):
        raise DeviceError("CUDA finds no GPU; see what the driver knows with: nvidia-smi")
    device, kinds = _call(cudart.cudaGetDevice), cudart.cudaDeviceAttr
    parts = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(_call(cudart.cudaDeviceGetAttribute, part, device)) for part in parts)


class Stream:
    """A queue of work on the current GPU."""

    def __init__(self) -> None:
        self.raw = _call(cudart.cudaStreamCreate)

    @property
    def handle(self) -> int:
        """Its address, as other libraries want it."""
        return int(self.raw)

    def wait(self) -> None:
        """Block until all its work is done; raises DeviceError for what failed in it."""
        _call(cudart.cudaStreamSynchronize, self.raw)

    def close(self) -> None:
        """Free it."""
        _call(cudart.cudaStreamDestroy, self.raw)


class Buffer:
    """A tensor on the GPU and its twin in page-locked host memory, `host`, a numpy array."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self._bytes = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        self.device = int(_call(cudart.cudaMalloc, self._bytes))
        self._host = int(_call(cudart.cudaMallocHost, self._bytes))
        memory = (ctypes.c_byte * self._bytes).from_address(self._host)
        self.host = np.frombuffer(memoryview(memory), dtype, count=int(np.prod(shape))).reshape(shape)

    def upload(self, stream: Stream) -> None:
        """Queue the copy from host to GPU."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        _call(cudart.cudaMemcpyAsync, self.device, self._host, self._bytes, kind, stream.raw)

    def download(self, stream: Stream) -> None:
        """Queue the copy from GPU to host."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call(cudart.cudaMemcpyAsync, self._host, self.device, self._bytes, kind, stream.raw)

    def close(self) -> None:
        """Free both."""
        del self.host
        _call(cudart.cudaFree, self.device)
        _call(cudart.cudaFreeHost, self._host)


class Graph:
    """Work that is recorded once and then launched as a whole."""

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        self._stream = stream
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(cudart.cudaStreamBeginCapture, stream.raw, mode)
        try:
            work()
        finally:
            recorded = _call(cudart.cudaStreamEndCapture, stream.raw)
        self._graph = _call(cudart.cudaGraphInstantiateWithFlags, recorded, 0)
        _call(cudart.cudaGraphDestroy, recorded)

    def launch(self) -> None:
        """Queue the recorded work."""
        _call(cudart.cudaGraphLaunch, self._graph, self._stream.raw)

    def close(self) -> None:
        """Free it."""
        _call(cudart.cudaGraphExecDestroy, self._graph)

"""CUDA through cuda-python: copies and recorded work where there is a GPU, words where there is none."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from vitkit import DeviceError


@pytest.fixture
def cuda():
    pytest.importorskip("cuda", reason="cuda-python is not installed")
    return import_module("vitkit.runtimes.cuda")


@pytest.fixture
def gpu(cuda):
    try:
        cuda.compute_capability()
    except DeviceError as error:
        pytest.skip(str(error))
    return cuda


def test_without_a_gpu_cuda_says_why(cuda):
    try:
        cuda.compute_capability()
    except DeviceError:
        with pytest.raises(DeviceError, match=r"CUDA.*nvidia-smi"):
            cuda.Stream()
    else:
        pytest.skip("there is a GPU")


def test_compute_capabilities_are_two_numbers(gpu):
    major, minor = gpu.compute_capability().split(".")
    assert int(major) >= 5
    assert int(minor) >= 0


@pytest.mark.parametrize("shape", [(), (3,), (1, 5, 7, 3), (0, 4)])
def test_what_goes_up_comes_down(gpu, shape):
    stream, buffer = gpu.Stream(), gpu.Buffer(shape, "float16")
    values = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    buffer.host[...] = values
    buffer.upload(stream)
    stream.wait()
    buffer.host[...] = 0
    buffer.download(stream)
    stream.wait()
    assert np.array_equal(buffer.host, values)
    buffer.close()
    stream.close()


def test_recorded_work_is_done_anew_at_every_launch(gpu):
    stream, buffer = gpu.Stream(), gpu.Buffer((4,), "int32")
    graph = gpu.Graph(stream, lambda: buffer.upload(stream))
    for value in (3, 5):
        buffer.host[:] = value
        graph.launch()
        stream.wait()
        buffer.host[:] = 0
        buffer.download(stream)
        stream.wait()
        assert buffer.host.tolist() == [value] * 4
    graph.close()
    buffer.close()
    stream.close()

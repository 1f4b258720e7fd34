"""Benches in a process of their own, and OpenVINO as on a lesser CPU."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import write_artifact

from vitkit.bench import BenchOptions, isa
from vitkit.bench.cpu import cpu_info
from vitkit.bench.isa import ISAS, cap_isa
from vitkit.devices.worker import bench_apart, collect, crash_text, events
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, read_card, write_card
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest, DeviceError

openvino = pytest.importorskip("openvino")
SHORT = BenchOptions(device="cpu", duration=0.02, pool_size=2, threads=1, scopes=("engine",))
FEATURES = cpu_info()["features"] or []


def for_openvino(folder: Path) -> Path:
    write_card(replace(read_card(folder), target="openvino"), folder)
    return folder


def normalising(folder: Path) -> Path:
    """Layer norms over 88 channels, on whose kernel OpenVINO's cap of AVX2 stumbles on AVX512 machines."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "shape"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "scale"], ["n"], axis=-1),
        helper.make_node("ReduceMax", ["n"], ["logits"], axes=[2], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 8, 11, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        [
            helper.make_tensor("shape", TensorProto.INT64, [3], [1, 3, 88]),
            helper.make_tensor("scale", TensorProto.FLOAT, [88], [1.5] * 88),
        ],
    )
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    card = ModelCard(
        name="norms",
        task="classification",
        target="openvino",
        precision="fp32",
        inputs=(TensorSpec("x", (1, 8, 11, 3), "uint8"),),
        outputs=(TensorSpec("logits", (1, 3), "float32"),),
        image=ImageSpec(size=(8, 11)),
        engine="model.onnx",
        files={"model.onnx": None},
    )
    write_card(card, folder)
    return folder


def test_a_bench_apart_is_a_bench(tmp_path):
    artifact, seen = normalising(tmp_path / "norms"), []
    (report,) = bench_apart([artifact], SHORT, progress=lambda text, done: seen.append(done))
    assert report.artifact == "norms"
    assert report.n > 0
    assert report.emulated is None
    assert sys.argv[0] in report.environment["command"]
    assert seen[-1] == 1.0


def test_errors_keep_their_class(tmp_path):
    with pytest.raises(BadArtifact, match=r"holds no card\.json"):
        bench_apart([tmp_path], SHORT)
    with pytest.raises(BadInput, match="image folder"):
        bench_apart([write_artifact(tmp_path / "means")], replace(SHORT, images=tmp_path / "none"))


def test_under_a_cap(tmp_path):
    if "avx2" not in FEATURES:
        pytest.skip("this CPU has no AVX2 to cap at")
    artifact = for_openvino(write_artifact(tmp_path / "means"))
    (report,) = bench_apart([artifact], replace(SHORT, max_isa="avx2"))
    assert report.emulated == "avx2"
    assert report.settings["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


CONVOLUTION = """
import sys
from pathlib import Path
from vitkit.bench.isa import cap_isa
if sys.argv[2] != "none":
    cap_isa(sys.argv[2], [Path(sys.argv[1])])
import numpy as np, openvino
from openvino import opset13 as op
x = op.parameter([1, 16, 32, 32], np.float32)
weights = op.constant(np.ones((16, 16, 3, 3), np.float32))
y = op.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])
settings = {"INFERENCE_PRECISION_HINT": "f32"}
compiled = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", settings)
for node in compiled.get_runtime_model().get_ops():
    info = node.get_rt_info()
    if info["layerType"].astype(str) == "Convolution":
        print(info["primitiveType"].astype(str))
"""


def test_the_cap_changes_the_kernels(tmp_path):
    if "avx512f" not in FEATURES:
        pytest.skip("this CPU has no AVX512 to be capped")
    artifact = for_openvino(write_artifact(tmp_path / "means"))

    def kernel(isa):
        command = [sys.executable, "-c", CONVOLUTION, str(artifact), isa]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "avx512" in kernel("none")
    assert "avx512" not in kernel("avx2")


# Of OpenVINO 2026.4; without the crash there is nothing to tell.
@pytest.mark.skipif(not openvino.__version__.startswith("2026.4"), reason="the crash is that of one OpenVINO")
def test_a_crash_under_a_cap_is_told_and_no_measurement(tmp_path):
    if "avx512f" not in FEATURES:
        pytest.skip("the crash needs a CPU with AVX512")
    with pytest.raises(
        DeviceError, match=r"crashed while it was measured \(SIGSEGV\).* under --max-isa avx2"
    ):
        bench_apart([normalising(tmp_path / "norms")], replace(SHORT, max_isa="avx2"))


def test_what_cannot_be_capped(tmp_path):
    artifact = write_artifact(tmp_path / "means")
    with pytest.raises(BadRequest, match=r"works for openvino, and .* is compiled for onnx"):
        bench_apart([artifact], replace(SHORT, max_isa="avx2"))
    with pytest.raises(BadRequest, match="--max-isa is 'sse'; known are avx2, avx2_vnni, avx512_vnni"):
        BenchOptions(max_isa="sse")


@pytest.mark.parametrize("name", ISAS)
def test_a_cpu_shows_only_less_than_it_has(tmp_path, monkeypatch, name):
    monkeypatch.setattr(isa, "cpu_info", lambda: {"features": ["asimd"]})
    artifact = for_openvino(write_artifact(tmp_path / "means"))
    with pytest.raises(BadRequest, match=r"this CPU has no avx.*; it has asimd"):
        cap_isa(name, [artifact])


def test_a_loaded_openvino_cannot_be_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(isa, "cpu_info", lambda: {"features": ["avx2"]})
    monkeypatch.setitem(sys.modules, "openvino", sys.modules.get("openvino", os))
    with pytest.raises(BadRequest, match="ignores a cap"):
        cap_isa("avx2", [for_openvino(write_artifact(tmp_path / "means"))])


# Events


def test_only_marked_lines_are_events():
    lines = [b"Welcome\n", b'vitkit: {"progress": ["a", 0.5]}\n', b"\xff\xfe\n", b' vitkit: {"x": 1}\n']
    assert list(events(lines)) == [{"progress": ["a", 0.5]}]
    assert collect(lines, lambda text, done: None) is None


def test_crashes_in_words():
    assert "(SIGILL)" in crash_text(-signal.SIGILL)
    assert "run out of memory" in crash_text(-signal.SIGKILL)
    assert "exit code 3" in crash_text(3)
    with pytest.raises(DeviceError, match="SIGSEGV"):
        collect([b"vitkit: " + json.dumps({"crashed": -11}).encode()], lambda text, done: None)

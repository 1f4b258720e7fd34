"""TFLite files of others: quantised inputs and outputs, free batches, a real one on photographs."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

import vitkit
from vitkit import BadArtifact, BadInput, DeviceError
from vitkit.evaluate import evaluate, open_network
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec

pytest.importorskip("ai_edge_litert")


def tensor(schema, name, shape, kind, quantisation=None, signature=None):
    made = schema.TensorT()
    made.name, made.shape, made.type, made.buffer = name.encode(), shape, kind, 0
    made.shapeSignature = signature
    if quantisation:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = [quantisation[0]], [quantisation[1]]
    return made


def quantise_file(kinds, quantisations, signature=None) -> bytes:
    """A network of one QUANTIZE, which turns numbers of one scale and zero point into those of another."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    graph, code, step = schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    types = [getattr(schema.TensorType, kind) for kind in kinds]
    graph.tensors = [
        tensor(schema, name, [1, 2, 2, 3], kind, quantisation, signature)
        for name, kind, quantisation in zip(("in", "out"), types, quantisations, strict=True)
    ]
    graph.inputs, graph.outputs, graph.operators = [0], [1], [step]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.QUANTIZE
    step.opcodeIndex, step.inputs, step.outputs = 0, [0], [1]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.buffers, model.subgraphs = (
        3,
        [code],
        [schema.BufferT()],
        [graph],
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def session_of(content, folder):
    from vitkit.runtimes.card import Artifact
    from vitkit.runtimes.tflite import open_session

    spec = TensorSpec("in", (1, 2, 2, 3), "uint8")
    card = ModelCard("x", "x", "tflite", "int8", (spec,), (spec,), ImageSpec((2, 2)), engine="model.tflite")
    return open_session(Artifact(folder, card), {"model.tflite": content}, threads=1, device="cpu")


def test_quantised_tensors_meet_the_app_as_the_numbers_they_stand_for(tmp_path):
    quantisations = [(0.5, -3), (0.25, 10)]
    session = session_of(quantise_file(("INT8", "INT8"), quantisations), tmp_path)
    assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["float32", "float32"]
    numbers = np.array([0, 0.5, -0.5, 0.7, 1e30, -1e30, 3, 4, 5, -6, -7, 20.5], np.float32)
    (found,) = session.run({"in": numbers.reshape(1, 2, 2, 3)}).values()
    # By the formula: real = scale * (step - zero), first in the input's steps, then in the output's.
    first = (np.clip(np.rint(numbers / 0.5) - 3, -128, 127) + 3) * 0.5
    expected = (np.clip(np.rint(first / 0.25) + 10, -128, 127) - 10) * 0.25
    assert np.allclose(found.ravel(), expected)
    assert found.dtype == np.float32


def test_pixels_go_in_as_they_are(tmp_path):
    session = session_of(quantise_file(("UINT8", "INT8"), [(1 / 128, 127), (1 / 64, -1)]), tmp_path)
    assert session.inputs[0].dtype == "uint8"
    pixels = np.arange(0, 252, 21, dtype=np.uint8).reshape(1, 2, 2, 3)
    (found,) = session.run({"in": pixels}).values()
    assert np.abs(found - (pixels.astype(float) - 127) / 128).max() <= 1 / 128 + 1e-6


def test_free_batches_follow_the_feeds(tmp_path):
    content = quantise_file(("FLOAT32", "INT8"), [None, (0.5, 0)], signature=[-1, 2, 2, 3])
    session = session_of(content, tmp_path)
    assert session.inputs[0].shape == (None, 2, 2, 3)
    for count in (1, 3, 2):
        feed = np.full((count, 2, 2, 3), count, np.float32)
        assert np.array_equal(session.run({"in": feed})["out"], feed)


def test_a_batch_that_failed_leaves_no_half_set_shapes(tmp_path, monkeypatch):
    session = session_of(
        quantise_file(("FLOAT32", "INT8"), [None, (0.5, 0)], signature=[-1, 2, 2, 3]), tmp_path
    )
    one, two = np.ones((1, 2, 2, 3), np.float32), np.ones((2, 2, 2, 3), np.float32)
    assert np.array_equal(session.run({"in": one})["out"], one)

    def fail():
        raise MemoryError

    monkeypatch.setattr(session._interpreter, "allocate_tensors", fail)
    with pytest.raises(MemoryError):
        session.run({"in": two})
    monkeypatch.undo()
    # The interpreter has the shape of two by now, and the memory of neither.
    for feed in (one, two):
        assert np.array_equal(session.run({"in": feed})["out"], feed)


def test_opening_asks_for_no_details_of_operators(tmp_path, monkeypatch):
    """For a large network they cost several times what the vendor takes to open it."""
    from ai_edge_litert.interpreter import Interpreter

    def slow(*arguments):
        raise AssertionError("asked for details")

    with monkeypatch.context() as patch:
        for name in ("get_tensor_details", "_get_ops_details", "_get_op_details"):
            patch.setattr(Interpreter, name, slow)
        session = session_of(quantise_file(("UINT8", "INT8"), [(1 / 128, 127), (1 / 64, -1)]), tmp_path)
    # XNNPACK leaves the file's only operator to TFLite, or takes it over.
    (operator,) = session.operators()
    assert operator.kind == "QUANTIZE"
    assert session.settings["delegate"] == {"XNNPACK": "XNNPACK", "TFLite": "none"}[operator.device]


def test_a_file_that_others_made_knows_the_photographs(mobilenet, real_photos):
    network = open_network(mobilenet, threads=1)
    accuracy = evaluate(network, real_photos)
    network.close()
    assert accuracy.images == 300
    assert accuracy.top1 >= 85
    with vitkit.open_engine(mobilenet, threads=1) as engine:
        assert engine.session.settings["delegate"] == "XNNPACK"
        assert sum(one[1:3] == ("CONV_2D", "int8") for one in engine.operators()) > 30
        fish = engine(next((real_photos / "n01443537").iterdir()))
    assert fish.label == "goldfish"
    # The softmax is in the graph: taken twice, no class would have more than 0.3 %.
    assert 0.5 < fish.probability <= 1


def test_what_cannot_be_opened_says_why(mobilenet, tmp_path):
    with pytest.raises(DeviceError, match="tflite engines have no device 'gpu', they run on cpu alone"):
        vitkit.open_engine(mobilenet, device="gpu")
    folder = shutil.copytree(mobilenet, tmp_path / "a")
    for content in (b"", b"not an engine", (folder / "model.tflite").read_bytes()[:5000]):
        (folder / "model.tflite").write_bytes(content)
        with pytest.raises(BadArtifact, match=r"cannot open .*model\.tflite"):
            vitkit.open_engine(folder)


def test_feeds_are_checked_and_results_are_the_callers(mobilenet):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    with vitkit.open_engine(mobilenet, threads=2) as engine:
        with pytest.raises(BadInput, match="float32"):
            engine.run({"input": pixels.astype(np.float32)})
        first = engine.run({"input": pixels})["Identity"]
        kept = first.copy()
        engine.run({"input": np.zeros_like(pixels)})
        assert np.array_equal(first, kept)


@pytest.mark.parametrize(
    "failure",
    [
        "SystemError('initialization of _pywrap_tensorflow_interpreter_wrapper raised unreported exception')",
        "ImportError('A module that was compiled using NumPy 1.x cannot be run in NumPy 2.4')",
    ],
)
def test_the_older_runtime_beside_numpy_2_says_the_cure(failure, tmp_path):
    package = tmp_path / "tflite_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.14.0'")
    (package / "interpreter.py").write_text(f"raise {failure}")
    code = (
        "import sys\n"
        "sys.modules['ai_edge_litert'] = None\n"
        "from vitkit import MissingBackend, doctor\n"
        "from vitkit.runtimes.engine import RUNTIMES, runtime_module\n"
        "try:\n"
        "    runtime_module('tflite')\n"
        "except MissingBackend as error:\n"
        "    print(error)\n"
        "print(doctor._target('tflite', RUNTIMES['tflite'], []).remedy)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    error, remedy = run.stdout.strip().splitlines()
    for text in (error, remedy):
        assert "pip install 'numpy<2', or pip install ai-edge-litert" in text
    assert f"built for NumPy 1, here is NumPy {np.__version__}" in error
    assert "vitkit[tflite]" not in error


def test_without_any_runtime_the_newer_one_is_named():
    code = (
        "import sys\n"
        "sys.modules['ai_edge_litert'] = None\n"
        "sys.modules['tflite_runtime'] = None\n"
        "import vitkit.runtimes.engine as engine\n"
        "try:\n"
        "    engine.runtime_module('tflite')\n"
        "except engine.MissingBackend as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("ai_edge_litert") >= 1
    assert "tflite_runtime" not in run.stdout
    assert "pip install 'vitkit[tflite]'" in run.stdout


def test_the_older_runtime_stands_in():
    """Its interpreter has the same calls, so the newer one's plays its part here."""
    code = (
        "import sys, types\n"
        "from importlib import metadata\n"
        "from ai_edge_litert import interpreter\n"
        "sys.modules['tflite_runtime'] = types.ModuleType('tflite_runtime')\n"
        "sys.modules['tflite_runtime.interpreter'] = interpreter\n"
        "sys.modules['ai_edge_litert.interpreter'] = None\n"
        "version = metadata.version\n"
        "metadata.version = lambda name: '2.14.0' if name == 'tflite-runtime' else version(name)\n"
        "from vitkit.doctor import _run_tiny_engine\n"
        "from vitkit.runtimes import tflite\n"
        "_run_tiny_engine('tflite')\n"
        "print(tflite.PACKAGE)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "tflite-runtime"

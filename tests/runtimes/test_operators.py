"""Where operators run, read back from each vendor and held against the vendor's own dumps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tiny import write_tiny

import vitkit
from vitkit import BadArtifact, BadRequest, DeviceError
from vitkit.runtimes.card import TensorSpec
from vitkit.runtimes.onnx_profile import read_nodes
from vitkit.runtimes.operators import Operator, off_device


def kinds(operators):
    return Counter(one.kind for one in operators)


# ONNX Runtime


def optimised(path, **entries):
    """The nodes of the graph that ONNX Runtime itself writes, read by the package onnx."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.parent / "optimised.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(path.parent / "optimised.onnx").graph.node


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnx_runtimes_operators_are_those_of_its_optimised_graph(artifact_of, precision, tmp_path):
    import onnx

    content = (artifact_of("onnx", precision) / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content)
    nodes = optimised(tmp_path / "model.onnx")
    with vitkit.open_engine(artifact_of("onnx", precision)) as engine:
        found = engine.operators()
        assert engine.operators() is found
    assert kinds(found) == Counter(node.op_type for node in nodes)
    assert {one.device for one in found} == {"CPUExecutionProvider"}
    in_file = Counter(node.op_type for node in onnx.load_from_string(content).graph.node)
    # The file's pairs of Q and DQ became kernels, and what is left of them is no arithmetic in INT8.
    assert kinds(found)["DequantizeLinear"] < (in_file["DequantizeLinear"] or 1)
    int8 = [one for one in found if one.precision == "int8"]
    assert bool(int8) == (precision == "int8")
    assert not {"QuantizeLinear", "DequantizeLinear"} & {one.kind for one in int8}
    assert {one.module for one in found if one.kind == "QLinearConv"} <= {
        node.name.split("/")[0] for node in onnx.load_from_string(content).graph.node
    }


def test_an_onnx_graph_is_read_as_the_package_onnx_reads_it(artifact_of):
    import onnx

    content = (artifact_of("onnx", "int8") / "model.onnx").read_bytes()
    expected = [
        (node.name, node.op_type, tuple(node.input), tuple(node.output))
        for node in onnx.load_from_string(content).graph.node
    ]
    assert [tuple(node) for node in read_nodes(content)] == expected
    assert len(expected) > 100


def quantised_convolution(ending: str) -> bytes:
    """A convolution of quantised factors; its result goes on in INT8, or is read in float by a softplus."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).integers(-60, 60, (4, 3, 1, 1)).astype(np.int8)
    constants = {
        "scale": np.float32(0.02),
        "zero": np.uint8(3),
        "weights": weights,
        "weight_scale": np.float32(0.01),
        "weight_zero": np.int8(0),
    }
    pair = [
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["qy"], name="stem.conv/QuantizeLinear_1"),
        helper.make_node(
            "DequantizeLinear", ["qy", "scale", "zero"], ["z"], name="stem.conv/DequantizeLinear_2"
        ),
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT, name="camera/Cast"),
        helper.make_node("Transpose", ["c"], ["f"], perm=[0, 3, 1, 2], name="camera/Transpose"),
        helper.make_node("QuantizeLinear", ["f", "scale", "zero"], ["q"], name="stem.conv/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", ["q", "scale", "zero"], ["d"], name="stem.conv/DequantizeLinear"
        ),
        helper.make_node(
            "DequantizeLinear",
            ["weights", "weight_scale", "weight_zero"],
            ["w"],
            name="stem.conv/DequantizeLinear_1",
        ),
        helper.make_node("Conv", ["d", "w"], ["y"], name="stem.conv/Conv"),
        *(pair if ending == "int8" else [helper.make_node("Softplus", ["y"], ["z"], name="act/Softplus")]),
        helper.make_node("Flatten", ["z"], ["logits"], name="head/Flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 2, 2, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


OUTPUTS = (TensorSpec("logits", (1, 16), "float32"),)


def test_a_convolution_that_became_a_kernel_is_int8(tmp_path):
    folder = write_tiny(tmp_path, "onnx", quantised_convolution("int8"), outputs=OUTPUTS, precision="int8")
    with vitkit.open_engine(folder) as engine:
        found = engine.operators()
    (conv,) = [one for one in found if "Conv" in one.kind]
    assert (conv.kind, conv.precision, conv.module, conv.in_float) == ("QLinearConv", "int8", "stem.conv", "")
    assert conv.name.startswith("stem.conv/Conv")
    precisions = {one.kind: one.precision for one in found}
    assert precisions["QuantizeLinear"] == "fp32 to int8"
    assert precisions["DequantizeLinear"] == "int8 to fp32"
    assert precisions["Cast"] == "integer to fp32"


def test_a_convolution_whose_result_is_read_in_float_fell_back(tmp_path):
    folder = write_tiny(tmp_path, "onnx", quantised_convolution("float"), outputs=OUTPUTS, precision="int8")
    with vitkit.open_engine(folder) as engine:
        (fallen,) = [one for one in engine.operators() if one.in_float]
    assert (fallen.name, fallen.module, fallen.precision) == ("stem.conv/Conv", "stem.conv", "fp32")


def test_opening_and_running_read_nothing_back(tmp_path, monkeypatch):
    import onnxruntime

    opened, make = [], onnxruntime.InferenceSession

    def count(*arguments, **options):
        opened.append(arguments)
        return make(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", count)
    folder = write_tiny(tmp_path, "onnx")
    with vitkit.open_engine(folder) as engine:
        engine(np.zeros((2, 2, 3), np.uint8))
        assert len(opened) == 1
        engine.operators()
        assert len(opened) == 2


def test_reading_back_refuses_files_that_changed_meanwhile(tmp_path):
    from vitkit.runtimes.card import sha256

    folder = write_tiny(tmp_path, "onnx")
    digest = sha256(folder / "model.onnx")
    write_tiny(tmp_path, "onnx", files={"model.onnx": digest})
    with vitkit.open_engine(folder) as engine:
        (folder / "model.onnx").write_bytes(b"another graph")
        with pytest.raises(BadArtifact, match="is not what was exported"):
            engine.operators()


NAME = 'a"b\\c/Cast 模'


def choice() -> bytes:
    """One of two branches, each with a node of its own, and names that JSON must escape."""
    from onnx import TensorProto, helper

    def branch(kind):
        result = helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)
        return helper.make_graph(
            [helper.make_node(kind, ["f"], [kind], name=f"{kind}/{kind}")], kind, [], [result]
        )

    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT, name=NAME),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("ReduceMax", ["f"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["b"], to=TensorProto.BOOL),
        helper.make_node(
            "If", ["b"], ["logits"], then_branch=branch("Exp"), else_branch=branch("Neg"), name="choice/If"
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 2, 2, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 12])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def test_a_branch_counts_with_what_it_ran_and_once(tmp_path):
    with vitkit.open_engine(write_tiny(tmp_path, "onnx", choice())) as engine:
        found = engine.operators()
        profile = engine.profile({"x": np.ones((1, 2, 2, 3), np.uint8)}, 5)
    # Zeros take the other branch.
    assert [one.kind for one in found] == ["Cast", "Flatten", "ReduceMax", "Cast", "If", "Neg"]
    assert found[0].name == NAME
    names = {timing.operator.name for timing in profile.timings}
    assert {"choice/If", "Exp/Exp"} <= names
    assert "Neg/Neg" not in names
    for run, wall in enumerate(profile.runs_ns):
        times = [timing.duration_ns for timing in profile.timings if timing.run == run]
        assert min(times) >= 0
        assert sum(times) <= wall + 1000 * len(times)


# OpenVINO


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvinos_operators_are_those_of_its_runtime_model(artifact_of, precision):
    import openvino

    with vitkit.open_engine(artifact_of("openvino", precision)) as engine:
        found = engine.operators()
        settings = {"INFERENCE_PRECISION_HINT": engine.session.settings["INFERENCE_PRECISION_HINT"]}
    compiled = openvino.Core().compile_model(
        artifact_of("openvino", precision) / "model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY", **settings}
    )
    expected = Counter(
        op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()
    )
    assert kinds(found) == expected - Counter({k: expected[k] for k in ("Const", "Input", "Output")})
    assert {one.device for one in found} == set(compiled.get_property("EXECUTION_DEVICES")) == {"CPU"}
    assert any(one.precision == "int8" for one in found) == (precision == "int8")


def planted_convolution(per_channel: bool):
    """A convolution of quantised factors; OpenVINO has no INT8 kernel for a scale of each input channel."""
    import openvino
    from openvino import opset13 as op

    pixels = op.parameter([1, 2, 2, 3], np.uint8, name="x")
    image = op.transpose(op.convert(pixels, np.float32), np.array([0, 3, 1, 2]))
    image.set_friendly_name("camera/Transpose")
    factors = np.arange(1, 4, dtype=np.float32).reshape(1, 3, 1, 1) if per_channel else np.ones((1, 1, 1, 1))
    low, high = (np.float32(end * factors) for end in (-1.28, 1.27))
    quantised = op.fake_quantize(op.relu(image), low, high, low, high, 256)
    integers = op.constant(np.random.default_rng(0).integers(-99, 99, (4, 3, 1, 1)).astype(np.int8))
    weights = op.multiply(op.convert(integers, np.float32), np.full((4, 1, 1, 1), 0.01, np.float32))
    product = op.convolution(quantised, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    product.set_friendly_name("stem.conv/Conv")
    result = op.result(op.reshape(op.relu(product), np.array([1, 16]), False))
    result.input_value(0).get_tensor().set_names({"logits"})
    return openvino.Model([result], [pixels])


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_int8_product_that_openvino_runs_in_float_fell_back(tmp_path, per_channel):
    import openvino

    files = {"model.xml": None, "model.bin": None}
    folder = write_tiny(
        tmp_path, "openvino", outputs=OUTPUTS, precision="int8", engine="model.xml", files=files
    )
    (folder / "model.onnx").unlink()
    openvino.save_model(planted_convolution(per_channel), folder / "model.xml", compress_to_fp16=False)
    with vitkit.open_engine(folder) as engine:
        (product,) = [one for one in engine.operators() if one.kind == "Convolution"]
    assert (product.name, product.module) == ("stem.conv/Conv", "stem.conv")
    assert product.precision == ("fp32" if per_channel else "int8")
    assert bool(product.in_float) == per_channel


# TFLite


def test_what_xnnpack_leaves_to_tflite_is_named(mobilenet):
    """Coral's file: XNNPACK takes no softmax in INT8, and no change of type."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # Without delegates the vendor lists the file's operators, and nothing but those.
    plain = Interpreter(
        str(mobilenet / "model.tflite"),
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    plain.allocate_tensors()
    with vitkit.open_engine(mobilenet, threads=1) as engine:
        found = engine.operators()
        delegated = engine.session._nodes()
        kinds_there = [delegated.NodeName(i) for i in range(delegated.NumNodes())]
    assert kinds(found) == Counter(item["op_name"] for item in plain._get_ops_details())
    assert kinds_there.count("DELEGATE") == 1
    left = [one.kind for one in found if one.device == "TFLite"]
    # TFLite's own log: XNNPACK takes 65 of the 68 nodes.
    assert sorted(left) == ["QUANTIZE", "QUANTIZE", "SOFTMAX"]
    assert "MobileNetV2.expanded_conv_1.project.batch_norm" in {one.module for one in found}
    with pytest.raises(DeviceError, match=r"3 operators .* run on TFLite, not on XNNPACK: .*SOFTMAX"):
        vitkit.open_engine(mobilenet, require_device=True)


def test_tflite_times_whole_runs_and_says_that_it_has_no_more(mobilenet):
    with vitkit.open_engine(mobilenet) as engine:
        profile = engine.profile({"input": np.zeros((1, 224, 224, 3), np.uint8)}, runs=3)
    assert len(profile.runs_ns) == 3
    assert min(profile.runs_ns) > 1e5
    assert list(profile.timings) == []
    assert "no profiler" in profile.missing


# Profiles


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_times_of_operators_fill_the_time_of_their_runs(artifact_of, target):
    with vitkit.open_engine(artifact_of(target, "fp32"), threads=1) as engine:
        name = engine.card.inputs[0].name
        feeds = {name: np.zeros((1, *engine.card.inputs[0].shape[1:]), np.uint8)}
        profile = engine.profile(feeds, runs=5)
        expected = kinds(engine.operators())
    assert len(profile.runs_ns) == 5
    assert not profile.missing
    total = sum(timing.duration_ns for timing in profile.timings) / profile.timed_runs
    wall = sum(profile.runs_ns) / 5
    # OpenVINO counts whole microseconds for each operator.
    assert 0.05 * wall < total < 1.1 * wall + 3000 * len(profile.timings)
    if target == "openvino":
        assert kinds(timing.operator for timing in profile.timings) <= expected
        return
    for run in range(5):
        inside = [timing for timing in profile.timings if timing.run == run]
        assert kinds(timing.operator for timing in inside) == expected
        ends = [timing.start_ns + timing.duration_ns for timing in inside]
        assert max(ends) <= profile.runs_ns[run] + 1000


def test_a_number_of_runs_is_checked(artifact_of):
    with vitkit.open_engine(artifact_of("onnx", "fp32")) as engine:
        feeds = {engine.card.inputs[0].name: np.zeros((1, *engine.card.inputs[0].shape[1:]), np.uint8)}
        for runs in (0, -1, 1001, 2.0, True):
            with pytest.raises(BadRequest, match="an integer from 1 to 1000"):
                engine.profile(feeds, runs)
        with pytest.raises(vitkit.BadInput, match="is missing"):
            engine.profile({}, 1)


# The device


def test_operators_elsewhere_are_found_and_arithmetic_on_shapes_is_not_counted():
    device = "CUDAExecutionProvider"
    operators = [
        Operator("a/Conv", "Conv", "fp16", device),
        Operator("b.c/Shape", "Shape", "integer", "CPUExecutionProvider"),
        Operator("b.c/Resize", "Resize", "fp16", "CPUExecutionProvider"),
    ]
    assert off_device(operators, device) == operators[2:]
    assert off_device(operators, "") == []


def test_a_device_that_is_required_and_not_used_is_an_error_that_names_the_operators(tmp_path, monkeypatch):
    """A CUDA session of a graph whose Resize it left to the CPU, by the operators that it lists."""
    from vitkit.runtimes.onnx import OnnxSession

    listed = (
        Operator("stem/Conv", "Conv", "fp32", "CUDAExecutionProvider"),
        Operator("neck.up/Resize", "Resize", "fp32", "CPUExecutionProvider"),
    )
    folder = write_tiny(tmp_path, "onnx")
    vitkit.open_engine(folder, require_device=True).close()
    monkeypatch.setattr(OnnxSession, "operators", lambda session: listed)
    with pytest.raises(DeviceError, match=r"stem/Conv \(Conv\)"):
        vitkit.open_engine(folder, require_device=True)
    vitkit.open_engine(folder).close()

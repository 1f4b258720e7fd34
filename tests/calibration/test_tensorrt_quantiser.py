"""Where TensorRT's Q/DQ pairs stand, on a graph small enough to read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitkit.calibration.dataset import calibration_set
from vitkit.calibration.tensorrt import quantize
from vitkit.runtimes.card import ImageSpec


@pytest.fixture(scope="module")
def quantised(photo_folder):
    """a/Conv -> Relu, read by b/Conv, by the norm-like d/Mul, by keep/Conv and as the shortcut of b/Add."""
    weight = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    # A channel that weight decay has emptied.
    weight[1] = 1e-12
    nodes = [
        helper.make_node("Conv", ["image", "w", "bias"], ["a/Conv"], "a/Conv"),
        helper.make_node("Relu", ["a/Conv"], ["a/Relu"], "a/Relu"),
        helper.make_node("Conv", ["a/Relu", "w", "bias"], ["b/Conv"], "b/Conv"),
        helper.make_node("Add", ["b/Conv", "a/Relu"], ["b/Add"], "b/Add"),
        helper.make_node("Conv", ["a/Relu", "w", "bias"], ["keep/Conv"], "keep/Conv"),
        helper.make_node("Mul", ["a/Relu", "a/Relu"], ["d/Mul"], "d/Mul"),
        helper.make_node("Sum", ["b/Add", "keep/Conv", "d/Mul"], ["y"], "d/Sum"),
    ]
    shape = [1, 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(3, np.float32), "bias")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    image = ImageSpec((8, 8), layout="NCHW", dtype="float32")
    return quantize(model, calibration_set(photo_folder, 16), image, ("keep",))


def test_only_products_and_shortcuts_read_quantised_values(quantised):
    makers = {output: node.op_type for node in quantised.graph.node for output in node.output}
    found = {
        node.name: [makers.get(name, "constant") for name in node.input]
        for node in quantised.graph.node
        if "Linear" not in node.op_type
    }
    pair = "DequantizeLinear"
    assert found == {
        "a/Conv": [pair, pair, "constant"],
        "a/Relu": ["Conv"],
        "b/Conv": [pair, pair, "constant"],
        "b/Add": ["Conv", pair],
        "keep/Conv": ["Relu", "constant", "constant"],
        "d/Mul": ["Relu", "Relu"],
        "d/Sum": ["Add", "Conv", "Mul"],
    }


def test_pairs_are_named_by_the_module_that_reads_them(quantised):
    names = [node.name for node in quantised.graph.node if "Linear" in node.op_type]
    assert len(set(names)) == len(names) == 6
    assert {name.split("/")[0] for name in names} == {"a", "b"}


def test_no_scale_vanishes_in_float16(quantised):
    values = {item.name: numpy_helper.to_array(item) for item in quantised.graph.initializer}
    scales = [values[node.input[1]] for node in quantised.graph.node if "Linear" in node.op_type]
    assert all((scale.astype(np.float16) > 0).all() for scale in scales)
    assert any(scale.size == 3 and scale[1] == np.float32(2**-24) for scale in scales)
    onnx.checker.check_model(quantised, full_check=True)

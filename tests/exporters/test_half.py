from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from vitkit.calibration.policy import float_nodes
from vitkit.exporters.half import to_half


@pytest.fixture(scope="module")
def graphs(source):
    image = replace(source.card.image, layout="NHWC", dtype="uint8")
    full = source.graph(image, 2, 20)
    return full, to_half(full, source.float_modules)


def test_half_passes_the_checker_and_keeps_its_face(graphs):
    full, half = graphs
    onnx.checker.check_model(half, full_check=True)
    for side in ("input", "output"):
        faces = [[(v.name, v.type.SerializeToString()) for v in getattr(g.graph, side)] for g in graphs]
        assert faces[0] == faces[1]
    assert half.ByteSize() < 0.65 * full.ByteSize()


def test_float_modules_stay_float_and_the_rest_does_not(graphs, source):
    _, half = graphs
    typed = onnx.shape_inference.infer_shapes(half, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in [*typed.graph.value_info, *typed.graph.output]}
    keep = set(float_nodes([node.name for node in half.graph.node], (*source.float_modules, "camera")))
    kinds = {True: set(), False: set()}
    for node in half.graph.node:
        if node.op_type != "Cast" and types[node.output[0]] in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
        ):
            kinds[node.name in keep].add(types[node.output[0]])
    assert kinds == {True: {onnx.TensorProto.FLOAT}, False: {onnx.TensorProto.FLOAT16}}


def test_half_computes_the_same_to_half_precision(graphs):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    full, half = (
        onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"image": pixels})
        for graph in graphs
    )
    assert np.abs(full[0] - half[0]).max() < 0.02 * full[0].std()
    assert np.abs(full[1] - half[1]).mean() < 0.05

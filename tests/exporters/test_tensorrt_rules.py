"""The table of what TensorRT takes: every rule is broken once, by a graph written down by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from vitkit.exporters.tensorrt_rules import RULES, VERSIONS, check

OLD = ("8.5", "8.6")
IMAGE = "float[1, 4, 8, 8] x"
MAP = "float[1, 4, 8, 8] y"


def graph(body: str, *, x: str = IMAGE, y: str = MAP, opset: int = 17, **constants) -> onnx.ModelProto:
    """A graph in ONNX's text form; an array becomes an initializer of its keyword's name."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1]> g ({x}) => ({y}) {{ {body} }}'
    model = parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for i, node in enumerate(model.graph.node):
        node.name = f"module/{node.op_type}_{i}"
    return model


ONE = np.float32(0.1)
ZERO = np.int8(0)
WEIGHT = np.ones((4, 4, 1, 1), np.float32)
LABELS = "int64[1, 1, 8, 8] y"
LATENT = {"x": "float[1, 64] x, int64[1] k", "y": "float[1, k] y"}
PAIR = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"

# (the rule, the versions that it holds for, a graph that breaks it)
PLANTED = [
    ("opset", OLD, graph("y = Relu(x)", opset=18)),
    ("opset", VERSIONS[:3], graph("y = Relu(x)", opset=21)),
    ("operator", ("8.5",), graph("y = LayerNormalization <axis = -1> (x, w)", w=np.ones(8, np.float32))),
    ("operator", OLD, graph("y = Gelu(x)", opset=20)),
    ("operator", VERSIONS, graph("y = other.Relu(x)")),
    ("operator", VERSIONS, graph("y = Det(x)", y="float[1, 4] y")),
    ("type", VERSIONS, graph("d = Cast <to = 11> (x) y = Cast <to = 1> (d)")),
    ("type", OLD, graph("d = Cast <to = 16> (x) y = Cast <to = 1> (d)")),
    (
        "uint8",
        VERSIONS,
        graph(
            "t = Transpose <perm = [0, 3, 1, 2]> (x) y = Cast <to = 1> (t)",
            x="uint8[1, 8, 8, 3] x",
            y="float[1, 3, 8, 8] y",
        ),
    ),
    ("uint8", VERSIONS, graph("y = Cast <to = 7> (x)", x="uint8[1, 4] x", y="int64[1, 4] y")),
    (
        "layer-norm-outputs",
        VERSIONS[1:],
        graph(
            "y, m = LayerNormalization <axis = -1> (x, w)",
            y=f"{MAP}, float[1, 4, 8, 1] m",
            w=np.ones(8, np.float32),
        ),
    ),
    (
        "grid-sample-rank",
        VERSIONS,
        graph(
            "y = GridSample <mode = 'linear'> (x, p)".replace("'", '"'),
            x="float[1, 4, 8, 8, 8] x, float[1, 8, 8, 8, 3] p",
            y="float[1, 4, 8, 8, 8] y",
            opset=20,
        ),
    ),
    (
        "grid-sample-opset",
        VERSIONS,
        graph(
            'y = GridSample <mode = "linear"> (x, p)', x=f"{IMAGE}, float[1, 8, 8, 2] p", opset=20
        ),
    ),
    (
        "einsum",
        VERSIONS[:3],
        graph('y = Einsum <equation = "...ij,...jk->...ik"> (x, x)'),
    ),
    ("einsum", VERSIONS[:3], graph('y = Einsum <equation = "bcii->bci"> (x)', y="float[1, 4, 8] y")),
    (
        "einsum",
        VERSIONS[:3],
        graph('y = Einsum <equation = "bchw,bcwk->bchk"> (x, w)', w=np.ones((1, 1, 8, 8), np.float32)),
    ),
    ("arg-type", ("8.5",), graph("y = ArgMax <axis = 1> (x)", x="int32[1, 4, 8, 8] x", y=LABELS)),
    ("arg-type", OLD, graph("y = ArgMax <axis = 1> (x)", x="int64[1, 4, 8, 8] x", y=LABELS)),
    (
        "one-hot-depth",
        VERSIONS,
        graph("y = OneHot(x, n, v)", x="int64[4] x, int64[1] n", y="float[4, k] y", v=np.float32([0, 1])),
    ),
    ("top-k-constant", OLD, graph("y, i = TopK(x, k)", x=LATENT["x"], y="float[1, n] y, int64[1, n] i")),
    (
        "top-k-size",
        VERSIONS,
        graph(
            "y, i = TopK(x, k)",
            x="float[1, 5000] x",
            y="float[1, 4000] y, int64[1, 4000] i",
            k=np.int64([4000]),
        ),
    ),
    ("resize-mode", OLD, graph('y = Resize <mode = "cubic"> (x, , s)', s=np.ones(4, np.float32))),
    (
        "resize-mode",
        VERSIONS,
        graph(
            'y = Resize <mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"> (x, r, s)',
            s=np.ones(4, np.float32),
            r=np.float32([0] * 4 + [1] * 4),
        ),
    ),
    (
        "resize-antialias",
        VERSIONS,
        graph('y = Resize <mode = "linear", antialias = 1> (x, , s)', s=np.ones(4, np.float32), opset=18),
    ),
    (
        "reduce-axes",
        ("8.5",),
        graph("y = ReduceMean(x, a)", y="float[1, 4, 1, 1] y", a=np.int64([2, 3]), opset=18),
    ),
    (
        "scatter-reduction",
        OLD,
        graph(
            'y = ScatterElements <axis = 0, reduction = "add"> (x, i, u)',
            x="float[4] x, int64[4] i, float[4] u",
            y="float[4] y",
        ),
    ),
    ("qdq-zero-point", VERSIONS, graph(PAIR, s=ONE, z=np.int8(3))),
    ("qdq-zero-point", VERSIONS, graph("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", s=ONE)),
    ("qdq-zero-point", VERSIONS, graph(PAIR, x=f"{IMAGE}, int8 z", s=ONE)),
    ("qdq-type", VERSIONS, graph(PAIR, s=ONE, z=np.uint8(0))),
    ("qdq-scale", VERSIONS, graph(PAIR, s=np.float32(0), z=ZERO)),
    ("qdq-scale", VERSIONS, graph(PAIR, s=np.float32(np.nan), z=ZERO)),
    ("qdq-scale", VERSIONS, graph(PAIR, x=f"{IMAGE}, float s", z=ZERO)),
    (
        "qdq-scale-type",
        VERSIONS,
        graph(PAIR, x="float16[1, 4] x", y="float16[1, 4] y", s=np.float16(0.1), z=ZERO),
    ),
    ("qdq-per-axis", VERSIONS, graph(PAIR, s=np.full(4, 0.1, np.float32), z=np.zeros(4, np.int8))),
    ("qdq-pair", VERSIONS, graph("y = QuantizeLinear(x, s, z)", y="int8[1, 4, 8, 8] y", s=ONE, z=ZERO)),
    (
        "qdq-pair",
        VERSIONS,
        graph(
            "q = QuantizeLinear(x, s, z) t = Transpose(q) y = DequantizeLinear(t, s, z)",
            y="float[8, 8, 4, 1] y",
            s=ONE,
            z=ZERO,
        ),
    ),
    (
        "qdq-pair",
        OLD,
        graph(
            "w = DequantizeLinear(i, s, z) y = Conv(x, w)", i=WEIGHT.astype(np.int8), s=ONE, z=ZERO
        ),
    ),
    (
        "qdq-bias",
        VERSIONS,
        graph(
            "q = QuantizeLinear(b, s, z) d = DequantizeLinear(q, s, z) y = Conv(x, w, d)",
            b=np.ones(4, np.float32),
            w=WEIGHT,
            s=ONE,
            z=ZERO,
        ),
    ),
    (
        "qdq-output",
        VERSIONS,
        graph(
            "c = Conv(x, w) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = HardSwish(d)",
            w=WEIGHT,
            s=ONE,
            z=ZERO,
        ),
    ),
    (
        "qdq-output",
        VERSIONS,
        graph(
            "c = MatMul(x, w) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = Add(d, b)",
            w=np.ones((8, 8), np.float32),
            b=np.ones(8, np.float32),
            s=ONE,
            z=ZERO,
        ),
    ),
]  # fmt: skip

# Graphs that look alike and are right.
SOUND = [
    graph("f = Cast <to = 1> (x) y = Transpose <perm = [0, 3, 1, 2]> (f)", x="uint8[1, 8, 8, 3] x",
          y="float[1, 3, 8, 8] y"),
    graph('y = GridSample <mode = "bilinear"> (x, p)', x=f"{IMAGE}, float[1, 8, 8, 2] p"),
    graph('y = Einsum <equation = "bchw,bcwk->bchk"> (x, w)', w=np.ones((1, 4, 8, 8), np.float32)),
    graph("y = ReduceMean <axes = [2, 3]> (x)", y="float[1, 4, 1, 1] y"),
    graph("y = ReduceSum(x, a)", y="float[1, 4, 1, 1] y", a=np.int64([2, 3])),
    graph("y = ArgMax <axis = 1> (x)", y=LABELS),
    graph('y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, , s)',
          s=np.ones(4, np.float32)),
    graph("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
          "p = QuantizeLinear <axis = 0> (w, t, u) e = DequantizeLinear <axis = 0> (p, t, u) "
          "c = Conv(d, e, b) y = Add(c, d)",
          w=WEIGHT, b=np.ones(4, np.float32), s=ONE, z=ZERO, t=np.full(4, 0.1, np.float32),
          u=np.zeros(4, np.int8)),
    graph("c = Conv(x, w) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w)",
          w=WEIGHT, s=ONE, z=ZERO),
    graph("y = Abs(x)"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "versions", "model"), PLANTED)
def test_a_planted_violation_is_named(rule, versions, model):
    for version in VERSIONS:
        found = [violation for violation in check(model, version) if violation.rule == rule]
        assert bool(found) == (version in versions), (version, found)
        for violation in found:
            assert violation.node == "g" if rule == "opset" else violation.node.startswith("module/")
            assert violation.reason


@pytest.mark.parametrize("model", SOUND)
def test_sound_graphs_pass(model):
    for version in VERSIONS:
        assert check(model, version) == []


def test_every_rule_is_broken_by_some_graph():
    assert {rule for rule, _, _ in PLANTED} == {"opset", *(rule.name for rule in RULES)}


def test_planted_graphs_break_only_what_they_should():
    """In the newest version that a rule holds for, so that no graph passes by another rule's finding."""
    # Without a zero point Q makes unsigned bytes; GridSample in three dimensions needs opset 20.
    companions = {"grid-sample-rank": {"grid-sample-opset"}, "qdq-zero-point": {"qdq-type"}}
    for rule, versions, model in PLANTED:
        others = {violation.rule for violation in check(model, versions[-1])} - {rule}
        allowed = companions.get(rule, set()) | {"opset"}
        assert others <= allowed, (rule, others)


def test_a_node_without_a_name_is_told_by_what_it_makes():
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Det", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    (violation,) = check(model, "10")
    assert str(violation) == "operator: Det that makes y: TensorRT 10 has no Det"

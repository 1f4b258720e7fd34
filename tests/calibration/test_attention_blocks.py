"""Attention blocks in OpenVINO's graphs: small ones made by hand, and those of real networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import ImageSpec, ModelCard, TensorSpec, exporters
from vitkit.calibration.openvino import attention_blocks, describe_scheme
from vitkit.exporters.source import Source

openvino = pytest.importorskip("openvino")
ops = openvino.opset13
# (batch, heads, tokens, width)
SHAPE = (1, 2, 5, 4)


def parameter():
    return ops.parameter(SHAPE, np.float32)


def constant(*shape):
    return ops.constant(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def scores(query, key):
    return ops.matmul(query, key, False, True)


def blocks(result) -> int:
    inputs, waiting = {}, [result]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            inputs[node.get_name()] = node
        waiting += [value.get_node() for value in node.input_values()]
    return len(attention_blocks(openvino.Model([result], list(inputs.values()))))


def exponentials(x):
    """A softmax as exporters decompose it."""
    axis = ops.constant(np.array([-1]))
    raised = ops.exp(ops.subtract(x, ops.reduce_max(x, axis, True)))
    return ops.divide(raised, ops.reduce_sum(raised, axis, True))


def plain(q, k, v):
    return ops.matmul(ops.softmax(scores(q, k), -1), v, False, False)


def scaled_biased_masked(q, k, v):
    found = ops.add(ops.multiply(scores(q, k), constant(1)), constant(1, 2, 5, 5))
    mask = ops.constant(np.tri(5, dtype=bool))
    found = ops.select(mask, found, ops.constant(np.float32(-1e9)))
    return ops.matmul(ops.softmax(found, -1), v, False, False)


def in_exponentials(q, k, v):
    return ops.matmul(exponentials(ops.divide(scores(q, k), constant(1))), v, False, False)


def talking_heads(q, k, v):
    def mix(x):
        order = ops.constant(np.array([0, 2, 3, 1]))
        back = ops.constant(np.array([0, 3, 1, 2]))
        return ops.transpose(ops.matmul(ops.transpose(x, order), constant(2, 2), False, False), back)

    return ops.matmul(mix(ops.softmax(mix(scores(q, k)), -1)), v, False, False)


def reshaped(q, k, v):
    found = ops.softmax(ops.reshape(scores(q, k), ops.constant(np.array([2, 5, 5])), False), -1)
    return ops.matmul(found, ops.reshape(v, ops.constant(np.array([2, 5, 4])), False), False, False)


def einsums(q, k, v):
    return ops.einsum([ops.softmax(ops.einsum([q, k], "bhqc,bhkc->bhqk"), -1), v], "bhqk,bhkc->bhqc")


def one_operator(q, k, v):
    return ops.scaled_dot_product_attention(q, k, v, causal=False)


def value_first(q, k, v):
    """The softmax as the second factor, as in (values, keys) x (keys, queries)."""
    return ops.matmul(v, ops.softmax(scores(q, k), -1), True, True)


@pytest.mark.parametrize(
    "attention",
    [
        plain,
        scaled_biased_masked,
        in_exponentials,
        talking_heads,
        reshaped,
        einsums,
        one_operator,
        value_first,
    ],
)
def test_attention_is_found(attention):
    assert blocks(attention(parameter(), parameter(), parameter())) == 1


def probabilities(q, k, v):
    return ops.softmax(ops.matmul(q, constant(1, 2, 4, 7), False, False), -1)


def probabilities_of_similarities(q, k, v):
    """A head whose classes are embeddings of the other input, as in CLIP: no product follows."""
    return ops.softmax(scores(q, k), -1)


def global_context(q, k, v):
    """GCNet: weights of places by a product with a constant, then a weighted sum."""
    return ops.matmul(ops.softmax(ops.matmul(q, constant(1, 2, 4, 5), False, False), -1), v, False, False)


def separable(q, k, v):
    """MobileViTv2: the softmax scales elements, whose sum scales others."""
    weights = ops.softmax(ops.matmul(q, constant(1, 2, 4, 1), False, False), -2)
    context = ops.reduce_sum(ops.multiply(k, weights), ops.constant(np.array([-2])), True)
    return ops.matmul(ops.multiply(v, context), constant(1, 2, 4, 4), False, False)


def gate(q, k, v):
    """A gate between two products of activations is no attention: the softmax multiplies elements."""
    found = ops.multiply(scores(q, k), ops.softmax(ops.matmul(q, constant(1, 2, 4, 5), False, False), -1))
    return ops.matmul(found, v, False, False)


def linear_attention(q, k, v):
    """EfficientViT: products of activations without any softmax."""
    return ops.matmul(ops.relu(q), ops.matmul(ops.relu(k), v, True, False), False, False)


def sigmoid(q, k, v):
    return ops.matmul(ops.sigmoid(scores(q, k)), v, False, False)


@pytest.mark.parametrize(
    "other",
    [
        probabilities,
        probabilities_of_similarities,
        global_context,
        separable,
        gate,
        linear_attention,
        sigmoid,
    ],
)
def test_other_softmaxes_and_products_are_none(other):
    assert blocks(other(parameter(), parameter(), parameter())) == 0


def test_a_norm_is_not_passed():
    """The sum and the product of a layer norm do not join a softmax to the attention before it."""
    q, k, v = parameter(), parameter(), parameter()
    found = plain(q, k, v)
    axis = ops.constant(np.array([-1]))
    centred = ops.subtract(found, ops.reduce_mean(found, axis, True))
    deviation = ops.sqrt(ops.reduce_mean(ops.power(centred, ops.constant(np.float32(2))), axis, True))
    normed = ops.add(ops.multiply(ops.divide(centred, deviation), constant(4)), constant(4))
    assert blocks(global_context(normed, k, v)) == 1


def test_the_reason_is_told():
    assert describe_scheme([]) == "convolutional: no softmax lies between two products of activations"
    assert describe_scheme(["a.b/Softmax"]) == "transformer: 1 attention block, the first in a.b"
    assert describe_scheme(["a.b/Softmax", "c/Softmax"]).startswith("transformer: 2 attention blocks, ")


class Small(torch.nn.Module):
    """A residual of convolutions, then a block of attention or of a convolution more."""

    output_names, float_modules = ("logits",), ()

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.body = torch.nn.Conv2d(8, 8, 3, 1, 1)
        self.qkv = torch.nn.Linear(8, 24) if attention else None
        self.head = torch.nn.Linear(8, 5)

    def deploy(self, images):
        x = self.stem(images).relu()
        x = (x + self.body(x)).flatten(2).transpose(1, 2)
        if self.qkv is not None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            x = x + torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return (self.head(x.mean(1)),)

    def decisions(self, images):
        return {}


def small_source(attention: bool) -> Source:
    torch.manual_seed(0)
    card = ModelCard(
        "small",
        "classification",
        "torch",
        "fp32",
        (TensorSpec("image", (None, 3, 32, 32), "float32"),),
        (TensorSpec("logits", (None, 5), "float32"),),
        ImageSpec((32, 32), layout="NCHW", dtype="float32"),
        tuple("abcde"),
        decode={"logits": "logits"},
    )
    return Source(Small(attention).eval(), card)


@pytest.mark.parametrize(
    ("attention", "scheme"),
    [
        (False, "convolutional: no softmax lies between two products of activations"),
        (True, "transformer: 1 attention block, the first in camera"),
    ],
)
def test_the_scheme_follows_the_graph_and_is_recorded(attention, scheme, calibration, tmp_path):
    steps = []
    artifact, _ = exporters.export(
        small_source(attention),
        tmp_path / "engine",
        target="openvino",
        precision="int8",
        calibration=calibration,
        step=steps.append,
    )
    assert artifact.card.provenance["int8_scheme"] == scheme
    assert any(scheme in step for step in steps)
    model = openvino.Core().read_model(tmp_path / "engine" / "model.xml")
    (residual,) = [
        op
        for op in model.get_ops()
        if op.get_type_name() == "Add"
        and {"Relu"} & {type_behind(value) for value in op.input_values()}
        and "Constant" not in {type_behind(value) for value in op.input_values()}
    ]
    kinds = [value.get_node().get_type_name() for value in residual.input_values()]
    # Integer kernels fuse a convolution with a quantised sum; the transformer scheme keeps sums float.
    assert ("FakeQuantize" in kinds) == (not attention)


def type_behind(value) -> str:
    """What makes a value, looked at through a pair of quantisers."""
    node = value.get_node()
    return (
        type_behind(node.input_value(0)) if node.get_type_name() == "FakeQuantize" else node.get_type_name()
    )

"""What takes the converter's detours out of a file, on graphs made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vitkit.exporters.tflite_graph import add_constant, append_operator, kind_of, shorten, write_model

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")


def empty(shape):
    """A model with an input and nothing else."""
    model, graph, tensor = schema.ModelT(), schema.SubGraphT(), schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = b"x", list(shape), schema.TensorType.FLOAT32, 0
    graph.tensors, graph.inputs, graph.operators = [tensor], [0], []
    model.version, model.buffers, model.operatorCodes = 3, [schema.BufferT()], []
    model.subgraphs, model.signatureDefs = [graph], []
    return model


def append(model, kind, source, shape, *constants, options):
    places = [add_constant(model, values, "c") for values in constants]
    return append_operator(model, kind, [source, *places], shape, source, options, kind.lower())


def turn(model, source, order):
    shape = [model.subgraphs[0].tensors[source].shape[i] for i in order]
    return append(model, "TRANSPOSE", source, shape, order, options=schema.TransposeOptionsT())


def reshape(model, source, shape):
    return append(model, "RESHAPE", source, shape, shape, options=schema.ReshapeOptionsT())


def cut(model, source, shape, begin, end, step):
    options = schema.StridedSliceOptionsT()
    return append(model, "STRIDED_SLICE", source, shape, begin, end, step, options=options)


def kinds(model):
    return [kind_of(model, step) for step in model.subgraphs[0].operators]


def run(model, x):
    from ai_edge_litert.interpreter import Interpreter

    file = Interpreter(model_content=write_model(model))
    file.allocate_tensors()
    file.set_tensor(file.get_input_details()[0]["index"], x)
    file.invoke()
    return [file.get_tensor(item["index"]) for item in file.get_output_details()]


X = np.random.default_rng(0).normal(size=(2, 6, 8, 5)).astype(np.float32)


def test_slices_and_flattening_need_no_turned_map():
    model = empty(X.shape)
    turned = turn(model, 0, [0, 3, 1, 2])
    rows = cut(model, turned, [2, 5, 3, 8], [0, 0, 1, 0], [2, 5, 6, 8], [1, 1, 2, 1])
    both = cut(model, rows, [2, 5, 3, 2], [0, 0, 0, 2], [2, 5, 3, 8], [1, 1, 1, 4])
    tokens = turn(model, reshape(model, both, [2, 5, 6]), [0, 2, 1])
    model.subgraphs[0].outputs = [tokens]
    expected = X[:, 1::2, 2::4].reshape(2, 6, 5)
    assert np.array_equal(run(model, X)[0], expected)
    shorten(model)
    assert kinds(model) == ["STRIDED_SLICE", "STRIDED_SLICE", "RESHAPE"]
    assert np.array_equal(run(model, X)[0], expected)


def test_rows_that_become_a_map_again_are_not_turned():
    rows = X.reshape(2, 48, 5)
    model = empty(rows.shape)
    parted = reshape(model, turn(model, 0, [0, 2, 1]), [2, 5, 6, 8])
    model.subgraphs[0].outputs = [turn(model, parted, [0, 2, 3, 1])]
    shorten(model)
    assert kinds(model) == ["RESHAPE"]
    assert np.array_equal(run(model, rows)[0], X)


@pytest.mark.parametrize(
    ("orders", "shape"),
    [
        (([0, 3, 1, 2], [0, 2, 1]), [2, 10, 24]),
        (([0, 3, 2, 1], [0, 2, 1]), [2, 5, 48]),
        (([0, 3, 1, 2], [1, 0, 2]), [2, 5, 48]),
    ],
)
def test_what_moves_numbers_stays(orders, shape):
    """Channels that a reshape splits, maps on their side, images that become rows."""
    model = empty(X.shape)
    middle = reshape(model, turn(model, 0, orders[0]), shape)
    model.subgraphs[0].outputs = [turn(model, middle, orders[1])]
    (before,) = run(model, X)
    shorten(model)
    assert kinds(model) == ["TRANSPOSE", "RESHAPE", "TRANSPOSE"]
    assert np.array_equal(run(model, X)[0], before)


def test_a_turned_map_that_others_read_stays():
    model = empty(X.shape)
    turned = turn(model, 0, [0, 3, 1, 2])
    tokens = turn(model, reshape(model, turned, [2, 5, 48]), [0, 2, 1])
    model.subgraphs[0].outputs = [turned, tokens]
    shorten(model)
    assert sorted(kinds(model)) == ["RESHAPE", "TRANSPOSE"]
    found = run(model, X)
    assert np.array_equal(found[0], X.transpose(0, 3, 1, 2))
    assert np.array_equal(found[1], X.reshape(2, 48, 5))


def number(model, value, shape):
    """A float32 constant of one element."""
    place = add_constant(model, [0], "number")
    tensor = model.subgraphs[0].tensors[place]
    tensor.shape, tensor.type = shape, schema.TensorType.FLOAT32
    model.buffers[-1].data = np.array([value], np.float32).view(np.uint8)
    return place


def maximum_behind(activation):
    """x -> 1x1 convolution by the identity -> padding with a huge negative number -> maximum of 2x2."""
    model = empty([1, 4, 4, 1])
    weight, bias = number(model, 1, [1, 1, 1, 1]), number(model, 0, [1])
    convolution = schema.Conv2DOptionsT()
    convolution.strideH = convolution.strideW = 1
    convolution.fusedActivationFunction = activation
    made = append_operator(model, "CONV_2D", [0, weight, bias], [1, 4, 4, 1], 0, convolution, "conv")
    sides = add_constant(model, [0, 0, 1, 1, 1, 1, 0, 0], "sides")
    model.subgraphs[0].tensors[sides].shape = [4, 2]
    least = number(model, -3e38, [])
    padding = schema.PadV2OptionsT()
    padded = append_operator(model, "PADV2", [made, sides, least], [1, 6, 6, 1], 0, padding, "pad")
    pool = schema.Pool2DOptionsT()
    pool.filterHeight = pool.filterWidth = pool.strideH = pool.strideW = 2
    pool.padding = schema.Padding.VALID
    model.subgraphs[0].outputs = [
        append_operator(model, "MAX_POOL_2D", [padded], [1, 3, 3, 1], 0, pool, "pool")
    ]
    return model


@pytest.mark.parametrize(("activation", "kind"), [("RELU", "PAD"), ("NONE", "PADV2")])
def test_only_what_is_never_negative_is_padded_with_zeros(activation, kind):
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 1)).astype(np.float32) - 1
    model = maximum_behind(getattr(schema.ActivationFunctionType, activation))
    (before,) = run(model, x)
    shorten(model)
    assert kinds(model) == ["CONV_2D", kind, "MAX_POOL_2D"]
    assert np.array_equal(run(model, x)[0], before)
    assert (before[0, 0, 0, 0] >= 0) == (activation == "RELU")

"""Each quantised graph, walked: no quantiser between an offset layer and the sampling it steers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from vitkit.calibration.policy import float_nodes
from vitkit.models.ps_vit import PSViT

FLOAT_MODULES = PSViT.float_modules


def test_patterns_match_a_module_and_not_its_neighbours():
    names = [
        "sampler/Add",
        "sampler.layers.0.mlp.0/Gemm",
        "sampler.offset_layers.1/Gemm_2",
        "samplers/Add",
        "Add",
    ]
    assert float_nodes(names, FLOAT_MODULES) == ["sampler/Add", "sampler.offset_layers.1/Gemm_2"]


class OnnxGraph:
    """(inputs of a node, nodes by name) of an ONNX file."""

    quantisers = frozenset(("QuantizeLinear", "DequantizeLinear"))

    def __init__(self, folder):
        graph = onnx.load(folder / "model.onnx").graph
        self.types = {node.name: node.op_type for node in graph.node}
        makers = {name: node.name for node in graph.node for name in node.output}
        constants = {item.name for item in graph.initializer}
        self.parents = {
            node.name: [makers[i] for i in node.input if i in makers and i not in constants]
            for node in graph.node
        }


class OpenVINOGraph:
    """The same of an OpenVINO file."""

    quantisers = frozenset(("FakeQuantize",))

    def __init__(self, folder):
        import openvino

        ops = openvino.Core().read_model(folder / "model.xml").get_ordered_ops()
        self.types = {op.get_friendly_name(): op.get_type_name() for op in ops}
        self.parents = {
            op.get_friendly_name(): [
                value.get_source_output().get_node().get_friendly_name() for value in op.inputs()
            ]
            for op in ops
        }


class TFLiteGraph:
    """The same of a TFLite file; an operator is called as its first result."""

    quantisers = frozenset(("QUANTIZE", "DEQUANTIZE"))

    def __init__(self, folder):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        # Without delegates, whose nodes stand for many.
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        file = Interpreter(str(folder / "model.tflite"), experimental_op_resolver_type=plain)
        names = {item["index"]: item["name"] for item in file.get_tensor_details()}
        ops = file._get_ops_details()
        makers = {int(op["outputs"][0]): names[int(op["outputs"][0])] for op in ops}
        self.types = {makers[int(op["outputs"][0])]: op["op_name"] for op in ops}
        self.parents = {
            makers[int(op["outputs"][0])]: [makers[i] for i in map(int, op["inputs"]) if i in makers]
            for op in ops
        }


GRAPHS = {"onnx": OnnxGraph, "openvino": OpenVINOGraph, "tflite": TFLiteGraph}


def coordinate_path(graph):
    """Every node from the offset layers to the sampling they steer, and what feeds the offset layers."""
    children = {name: set() for name in graph.types}
    for name, parents in graph.parents.items():
        for parent in parents:
            children[parent].add(name)
    offset_layers = [name for name in graph.types if name.startswith("sampler.offset_layers.")]
    sinks = {
        name
        for name in graph.types
        if name.startswith(
            ("sampler.sample/ReduceProd", "sampler.sample/Gather", "sampler.sample/EmbeddingLookup")
        )
    }
    after = reach(offset_layers, lambda name: () if ".layers." in name else children[name])
    before = reach(sinks, lambda name: graph.parents[name])
    feeding = {parent for name in offset_layers for parent in graph.parents[name]}
    steered = {name for name in sinks & after if "ReduceProd" in name}
    return (after & before) | feeding, steered


def reach(start, step):
    found, todo = set(start), list(start)
    while todo:
        for name in step(todo.pop()):
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


@pytest.mark.parametrize("target", GRAPHS)
def test_no_quantiser_between_offsets_and_sampling(target, artifact_of):
    graph = GRAPHS[target](artifact_of(target, "int8"))
    assert sum(kind in graph.quantisers for kind in graph.types.values()) > 20, "the graph is not quantised"
    path, steered = coordinate_path(graph)
    assert len(steered) == 3, "three iterations sample where offsets say"
    assert not [name for name in path if graph.types[name] in graph.quantisers]


@pytest.mark.parametrize("target", GRAPHS)
@pytest.mark.parametrize(
    "victim",
    [
        "sampler.sample/Floor",
        ("sampler.offset_layers.1/Gemm", "sampler.offset_layers.1/FullyConnected"),
        "sampler.sample/Cast",
    ],
)
def test_the_walk_finds_a_planted_quantiser(target, victim, artifact_of):
    graph = GRAPHS[target](artifact_of(target, "int8"))
    # The last one: where the first iteration samples is known, so that no offset leads there.
    name = [name for name in graph.types if name.startswith(victim)][-1]
    graph.types["planted"], graph.parents["planted"] = next(iter(graph.quantisers)), graph.parents[name]
    graph.parents[name] = ["planted"]
    assert "planted" in coordinate_path(graph)[0]


def test_no_float_node_of_onnx_reads_quantised_values(artifact_of):
    """The quantiser gives a quantised tensor to all its readers: no float module here shares one."""
    graph = OnnxGraph(artifact_of("onnx", "int8"))
    kept = float_nodes(graph.types, FLOAT_MODULES)
    assert len(kept) > 50
    # A quantiser without parents holds a constant: equal constants are one, here biases of zeros.
    quantised = {
        name for name, kind in graph.types.items() if kind in graph.quantisers and graph.parents[name]
    }
    assert not [name for name in kept if quantised & set(graph.parents[name])]


@pytest.mark.parametrize("target", GRAPHS)
def test_int8_weights_are_stored_as_int8(target, artifact_of):
    files = {"onnx": "model.onnx", "openvino": "model.bin", "tflite": "model.tflite"}
    weights = artifact_of(target, "int8") / files[target]
    full = artifact_of(target, "fp32") / weights.name
    assert weights.stat().st_size < 0.5 * full.stat().st_size


@pytest.mark.parametrize("target", GRAPHS)
def test_points_of_int8_stay_near_those_of_float(target, artifact_of, photo_folder):
    import vitkit
    from vitkit.runtimes.image import sample_photos

    photos = [photo for _, photo in sample_photos(photo_folder, 12)]
    points = {}
    for precision in ("fp32", "int8"):
        with vitkit.open_engine(artifact_of(target, precision)) as engine:
            points[precision] = engine.run_batched(engine.prepare(photos))["points"]
    moved = np.abs(points["fp32"][:, -1] - points["fp32"][:, 0]).mean()
    assert moved > 2
    assert np.abs(points["fp32"] - points["int8"]).mean() < 0.1 * moved

"""TensorRT packages: each version's dialect does what the model does, and breaks none of its rules."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lively
from onnx import TensorProto, helper

from vitkit import BadRequest, ExportFailed, exporters
from vitkit.calibration.dataset import calibration_set
from vitkit.calibration.policy import float_nodes
from vitkit.exporters.source import Source
from vitkit.exporters.tensorrt import check_rules, convert
from vitkit.exporters.tensorrt_graph import TRACED, to_dialect
from vitkit.exporters.tensorrt_rules import VERSIONS, check
from vitkit.inspection import inspect
from vitkit.models import build, run_card
from vitkit.runtimes.card import CARD_FILE, read_artifact
from vitkit.runtimes.image import generated_photos, prepare_batch
from vitkit.runtimes.tensorrt_options import DIALECTS, read_built, read_options

SMALL = {
    "image_size": 65, "pixel_widths": (16, 16, 8, 8), "heads": 4, "queries": 8, "query_width": 16,
    "mask_width": 8, "ffn_width": 32, "drop_path": 0.0,
}  # fmt: skip
PRODUCTS = ("Conv", "Gemm", "MatMul")
# Worst root mean square error of an output over its spread.
BOUNDS = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.15}


@pytest.fixture(scope="module")
def calibration(photo_folder):
    return calibration_set(photo_folder, 16)


@pytest.fixture(scope="module")
def sources(source):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        remax = lively(build("remax_nano", **SMALL))
    return {"ps_vit_nano": source, "remax_nano": Source(remax, run_card("remax_nano", remax.config))}


@pytest.fixture(scope="module")
def traced(sources):
    """Float graphs by model, each traced once, with the image they take."""
    made = {}

    def get(name: str):
        if name not in made:
            image = replace(sources[name].card.image, layout="NHWC", dtype="uint8")
            made[name] = sources[name].graph(image, 1, TRACED), image
        return made[name]

    return get


@pytest.fixture(scope="module")
def converted(sources, traced, calibration):
    """Graphs by (model, version, precision) with the image they take, each made once.

    Versions of one dialect share their graph, and precisions that only the builder's flags tell apart.
    """
    made = {}

    def get(name: str, version: str, precision: str):
        dialect = DIALECTS[version]
        written = precision == "int8" or precision in dialect.strongly_typed
        key = name, dialect.opset, dialect.layer_norm, precision if written else "fp32"
        if key not in made:
            graph, image = traced(name)
            float_modules = sources[name].module.float_modules
            made[key] = (
                convert(
                    graph,
                    version,
                    precision,
                    float_modules=float_modules,
                    calibration=calibration,
                    image=image,
                ),
                image,
            )
        return made[key]

    return get


@pytest.fixture(scope="module")
def package(source, calibration, tmp_path_factory):
    """A whole export, with what its checks found."""
    folder = tmp_path_factory.mktemp("packages") / "a"
    photos = [(str(i), photo) for i, photo in enumerate(generated_photos(4, seed=3))]
    _, checks = exporters.export(
        source,
        folder,
        target="tensorrt",
        precision="int8",
        options={"trt_version": "8.5"},
        calibration=calibration,
        images=photos,
    )
    return folder, checks


def run(model: onnx.ModelProto, feeds: dict) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["ps_vit_nano", "remax_nano"])
def test_every_dialect_equals_the_model(name, version, precision, sources, converted):
    source, dialect = sources[name], DIALECTS[version]
    model, image = converted(name, version, precision)
    assert check(model, version) == []
    onnx.checker.check_model(model, full_check=True)
    assert {item.domain: item.version for item in model.opset_import if not item.domain} == {
        "": dialect.opset
    }
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Gelu", "Einsum", "GridSample"}
    assert ("LayerNormalization" in kinds) == dialect.layer_norm
    photos = generated_photos(1, seed=5)
    expected = source.predict(prepare_batch(photos, source.card.image))
    found = run(model, {"image": prepare_batch(photos, image)})
    for value, output in zip(found, source.output_names, strict=True):
        error = np.sqrt(((value - expected[output]) ** 2).mean())
        assert error < BOUNDS[precision] * expected[output].std(), output


@pytest.mark.parametrize("version", ["8.5", "11"])
@pytest.mark.parametrize("name", ["ps_vit_nano", "remax_nano"])
def test_pairs_stand_on_what_int8_kernels_read_and_nowhere_else(name, version, sources, converted):
    float_modules = sources[name].module.float_modules
    model, _ = converted(name, version, "int8")
    nodes = list(model.graph.node)
    makers = {output: node for node in nodes for output in node.output}
    floating = set(float_nodes([node.name for node in nodes], float_modules))
    ranks = {item.name: len(item.dims) for item in model.graph.initializer}
    quantised = 0
    for node in nodes:
        kinds = [makers[name].op_type if name in makers else "" for name in node.input]
        pairs = kinds.count("DequantizeLinear")
        if node.op_type == "DequantizeLinear":
            assert kinds[0] == "QuantizeLinear"
        elif node.name in floating or node.op_type not in (*PRODUCTS, "Add"):
            assert pairs == 0, node.name
        elif node.op_type == "Add":
            assert pairs == 0 or sorted(kinds) == ["Conv", "DequantizeLinear"], node.name
        elif any(ranks.get(name, 2) != 2 for name in node.input[:2]) and node.op_type == "MatMul":
            assert pairs == 0, node.name
        else:
            assert kinds[:2] == ["DequantizeLinear"] * 2, node.name
            assert pairs == 2, node.name
            quantised += 1
    assert quantised > 30
    assert any(node.name in floating and node.op_type in PRODUCTS for node in nodes)


def test_weights_have_a_scale_for_each_channel(converted):
    model, _ = converted("ps_vit_nano", "8.5", "int8")
    values = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    counted = 0
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type in PRODUCTS else None
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        quantiser = makers[maker.input[0]]
        weight = values.get(quantiser.input[0])
        if weight is None:
            continue
        axis = next(a.i for a in quantiser.attribute if a.name == "axis")
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        np.testing.assert_allclose(
            values[quantiser.input[1]], np.abs(rows).max(axis=1) / 127, rtol=1e-5, err_msg=node.name
        )
        output = 0 if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute) else 1
        assert axis == output
        counted += 1
    assert counted > 20


def test_the_float_policy_reaches_the_builder(package, converted):
    """Weakly typed versions get the nodes by name, typed graphs hold float32 there."""
    options = read_options(read_artifact(package[0]))
    assert options.flags == ("FP16", "INT8")
    assert not options.strongly_typed
    float_modules = {name.split("/")[0] for name in options.float32_layers}
    assert {"camera", "sampler", "sampler.pos_layer", "sampler.sample"} <= float_modules
    assert any(name.endswith("LayerNormalization_variance") for name in options.float32_layers)
    model, _ = converted("ps_vit_nano", "10", "fp16")
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    seen = set()
    for node in graph.node:
        module, kind = node.name.split("/")[0], types.get(node.output[0])
        if module in ("camera", "sampler.sample", "sampler.pos_layer") and node.op_type in ("Sub", "Gemm"):
            assert kind == TensorProto.FLOAT, node.name
            seen.add(module)
        elif node.op_type in ("Conv", "LayerNormalization", "Softmax"):
            assert kind == TensorProto.FLOAT16, node.name
            seen.add(node.op_type)
    assert seen >= {"camera", "sampler.pos_layer", "Conv", "LayerNormalization", "Softmax"}


def test_a_package_says_that_it_is_one(package):
    folder, checks = package
    assert [check.name for check in checks] == ["golden", "images"]
    artifact = read_artifact(folder)
    assert (artifact.card.target, artifact.card.engine) == ("tensorrt", "model.onnx")
    assert read_built(artifact) is None
    assert read_options(artifact).version == "8.5"
    assert artifact.card.provenance["trt_version"] == "8.5"
    files = {path.name for path in folder.iterdir()}
    assert files == {"model.onnx", "build.sh", "golden.npz", "calibration.json", CARD_FILE}
    assert set(artifact.card.files) == files - {CARD_FILE}
    assert subprocess.run(["sh", "-n", str(folder / "build.sh")], check=False).returncode == 0
    assert "Conv" in inspect(folder)["operators"]["int8"]
    assert "TensorRT" in json.loads((folder / "calibration.json").read_text())["method"]


def test_a_second_graph_has_the_same_bytes(package, converted):
    model, _ = converted("ps_vit_nano", "8.5", "int8")
    assert (package[0] / "model.onnx").read_bytes() == model.SerializeToString()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"target": "tensorrt", "options": {"trt_version": "9"}}, "8.5, 8.6, 10, 11"),
        ({"target": "tensorrt", "options": {"opset": 18}}, "tensorrt has --trt-version"),
        ({"target": "tensorrt", "batch": None}, "--batch N"),
        ({"target": "tensorrt", "precision": "bf16"}, "use fp16"),
        ({"target": "onnx", "options": {"trt_version": "10"}}, "not of onnx"),
    ],
)
def test_impossible_packages_are_refused(request_, words, source, tmp_path):
    with pytest.raises(BadRequest, match=words):
        exporters.export(source, tmp_path / "a", **{"precision": "fp32", **request_})


def test_a_graph_that_breaks_a_rule_is_not_written():
    nodes = [helper.make_node("Det", ["x"], [f"y{i}"], f"module/Det_{i}") for i in range(7)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 2])], []),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    with pytest.raises(ExportFailed, match=r"8\.6 does not take this graph: operator: module/Det_0.*2 more"):
        check_rules(model, "8.6")


@pytest.mark.parametrize(
    ("operator", "attributes", "words"),
    [
        ("Split", {"num_outputs": 3}, "3 parts of 8"),
        ("Resize", {"mode": "linear", "antialias": 1}, "antialias"),
        ("Mish", {}, "another meaning"),
    ],
)
def test_what_opset_17_cannot_say_is_refused(operator, attributes, words):
    """Splits into unequal parts, and operators that came later."""
    inputs = {"Resize": ["a", "", "s"]}.get(operator, ["a"])
    outputs = ["y", "z", "u"] if operator == "Split" else ["y"]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "module/Relu"),
        helper.make_node(operator, inputs, outputs, f"module/{operator}", **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones(2, np.float32), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", TRACED)])
    with pytest.raises(ExportFailed, match=words):
        to_dialect(model, DIALECTS["8.5"])

"""TFLite exports: names, signature, alignment, and what the converter leaves in modules."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import lively

from vitkit import ExportFailed, exporters, open_engine
from vitkit.exporters.source import Source
from vitkit.models import build, run_card
from vitkit.runtimes.image import generated_photos

interpreter = pytest.importorskip("ai_edge_litert.interpreter")
pytest.importorskip("litert_torch")


def opened(path):
    plain = interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return interpreter.Interpreter(str(path), experimental_op_resolver_type=plain)


@pytest.fixture(scope="module")
def small() -> Source:
    """Two iterations on another grid, on a map that the grid does not divide."""
    model = lively(build("ps_vit_nano", image_size=50, n=5, iterations=2, share=False, encoder_layers=0))
    return Source(model, run_card("ps_vit_nano", model.config))


def test_other_sizes_and_batches_in_int8(small, calibration, tmp_path):
    classes = {name: type(module) for name, module in small.module.named_modules()}
    photos = [(str(i), photo) for i, photo in enumerate(generated_photos(7, seed=6))]
    _, checks = exporters.export(
        small,
        tmp_path / "a",
        target="tflite",
        precision="int8",
        calibration=calibration,
        batch=5,
        images=photos,
    )
    assert checks[1].images == 7
    assert {name: type(module) for name, module in small.module.named_modules()} == classes
    with open_engine(tmp_path / "a") as engine:
        assert engine.batch == 5
        assert engine.session.inputs[0].shape == (5, 50, 50, 3)


def test_operators_are_named_by_module(artifact_of, source):
    file = opened(artifact_of("tflite", "fp32") / "model.tflite")
    names = [item["name"] for item in file.get_tensor_details() if item["name"]]
    assert len(set(names)) == len(names)
    modules = {name for name, _ in source.module.named_modules() if name} | {"camera"}
    assert {name.split("/")[0] for name in names} <= modules | {"image", "logits", "points"}
    layers = {name.split("/")[0] for name in names if "/FullyConnected" in name and ":" not in name}
    linear = {n for n, m in source.module.named_modules() if type(m).__name__ == "Linear"}
    # The head's result is called logits.
    assert layers == linear - {"head"}
    convolutions = {name.split("/")[0] for name in names if "/Conv2d" in name and ":" not in name}
    assert convolutions == {n for n, m in source.module.named_modules() if type(m).__name__ == "Conv2d"}


@pytest.mark.parametrize("precision", exporters.TARGETS["tflite"].precisions)
def test_other_tools_find_the_ends_by_name(precision, artifact_of, source):
    file = opened(artifact_of("tflite", precision) / "model.tflite")
    expected = {"inputs": ["image"], "outputs": list(source.output_names)}
    assert file.get_signature_list() == {"serving_default": expected}
    feed = np.full((1, 64, 64, 3), 90, np.uint8)
    found = file.get_signature_runner()(image=feed)
    with open_engine(artifact_of("tflite", precision)) as engine:
        outputs = engine.run({"image": feed})
    # The reference kernels round otherwise than XNNPACK.
    for name, value in outputs.items():
        assert np.abs(found[name] - value).mean() < 0.05 * value.std()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_constants_lie_where_the_format_wants_them(precision, artifact_of):
    from ai_edge_litert import schema_py_generated as schema

    content = (artifact_of("tflite", precision) / "model.tflite").read_bytes()
    model = schema.Model.GetRootAs(content)
    start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    found = [model.Buffers(i).DataAsNumpy() for i in range(model.BuffersLength())]
    places = [
        array.__array_interface__["data"][0] - start for array in found if isinstance(array, np.ndarray)
    ]
    assert len(places) > 30
    assert not [place for place in places if place % 16]


def test_fp16_halves_the_weights_but_not_those_that_make_coordinates(artifact_of):
    file = opened(artifact_of("tflite", "fp16") / "model.tflite")
    details = {item["index"]: item for item in file.get_tensor_details()}
    halved = {
        details[int(op["outputs"][0])]["name"].split("/")[0]
        for op in file._get_ops_details()
        if op["op_name"] == "DEQUANTIZE" and details[int(op["inputs"][0])]["dtype"] == np.float16
    }
    assert {"stem.0", "sampler.layers.0.attn.qkv", "encoder.0.mlp.3"} <= halved
    assert not [name for name in halved if "offset_layers" in name or "pos_layer" in name]


def test_a_decision_that_the_file_lacks_is_named(artifact_of, tmp_path):
    from vitkit.exporters.tflite import write_twin
    from vitkit.runtimes.card import read_artifact

    with pytest.raises(ExportFailed, match=r"no operator 'nowhere/ArgMax'"):
        write_twin(read_artifact(artifact_of("tflite", "fp32")), tmp_path, {"nowhere/ArgMax": (1, 1, 4)})

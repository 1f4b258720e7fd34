"""TFLite files of others as artifacts: what the file says is its card."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from conftest import SHARED

import vitkit
from vitkit import BadInput, BadRequest, ExportFailed
from vitkit.evaluate import evaluate, open_network
from vitkit.exporters import tflite_file
from vitkit.runtimes.card import read_card
from vitkit.runtimes.image import generated_photos, prepare_batch
from vitkit.sources.card_values import CardValues
from vitkit.sources.tflite_file import load

pytest.importorskip("ai_edge_litert")


def means_file(kind, quantisation=None, shape=(1, 8, 8, 3)) -> bytes:
    """A network of one MEAN over height and width: (1, 8, 8, 3) -> (1, 3), both of a type."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    graph, code, step, model = (
        schema.SubGraphT(),
        schema.OperatorCodeT(),
        schema.OperatorT(),
        schema.ModelT(),
    )
    axes = schema.BufferT()
    axes.data = np.array([1, 2], np.int32).tobytes()
    graph.tensors = []
    for name, dims, number in (("in", shape, kind), ("axes", [2], "INT32"), ("out", [1, shape[-1]], kind)):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name.encode(), list(dims), getattr(schema.TensorType, number)
        tensor.buffer = int(name == "axes")
        if quantisation and name != "axes":
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [quantisation[0]], [quantisation[1]]
        graph.tensors.append(tensor)
    options = schema.ReducerOptionsT()
    options.keepDims = False
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.MEAN
    code.version = 2
    step.opcodeIndex, step.inputs, step.outputs = 0, [0, 1], [2]
    step.builtinOptions, step.builtinOptionsType = options, schema.BuiltinOptions.ReducerOptions
    graph.inputs, graph.outputs, graph.operators = [0], [2], [step]
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [schema.BufferT(), axes]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def written(tmp_path, *arguments, **options):
    path = tmp_path / "net.tflite"
    path.write_bytes(means_file(*arguments, **options))
    return path


def test_corals_file_needs_nothing_beyond_labels(mobilenet, real_photos, tmp_path):
    """Its card written by hand is what the file itself and a list of labels give."""
    by_hand = read_card(mobilenet)
    labels = CardValues(labels=by_hand.labels, label_ids=by_hand.label_ids)
    file, card = load(SHARED / "weights" / "mobilenet_v2_imagenet_int8.tflite", labels)
    artifact, checks = tflite_file.adopt(file, card, tmp_path / "a")
    assert not checks[0].problems
    made = artifact.card
    for name in (
        "task",
        "target",
        "precision",
        "inputs",
        "outputs",
        "labels",
        "label_ids",
        "decode",
        "engine",
    ):
        assert getattr(made, name) == getattr(by_hand, name), name
    assert (made.image.size, made.image.dtype, made.image.layout) == ((224, 224), "uint8", "NHWC")
    assert "crop_pct" in made.provenance["assumed"]
    with vitkit.open_engine(tmp_path / "a") as engine:
        assert engine(next((real_photos / "n01443537").iterdir())).label == "goldfish"
    network = open_network(tmp_path / "a", threads=1)
    assert evaluate(network, real_photos).top1 >= 83
    network.close()


def test_labels_off_by_one_are_refused(mobilenet):
    path = SHARED / "weights" / "mobilenet_v2_imagenet_int8.tflite"
    with pytest.raises(BadRequest, match=r"1000 labels, but 1001 classes.*background"):
        load(path, CardValues(labels=read_card(mobilenet).labels[1:]))


def test_vitkits_own_file_gives_its_own_card(artifact_of, tmp_path):
    folder = artifact_of("tflite", "int8")
    own = read_card(folder)
    shutil.copy(folder / "model.tflite", tmp_path / "net.tflite")
    file, card = load(tmp_path / "net.tflite", CardValues(labels=own.labels, task="classification"))
    made = tflite_file.adopt(file, card, tmp_path / "a")[0].card
    assert (made.inputs, made.outputs, made.precision) == (own.inputs, own.outputs, "int8")
    assert made.decode == {"logits": "logits"}


def test_an_int8_input_is_fed_with_pixels(tmp_path):
    """real = scale * (step - zero) and step = pixel - 128, whatever the network calls normalised."""
    scale, zero = 1 / 64, -5
    file, card = load(written(tmp_path, "INT8", (scale, zero)), CardValues())
    tflite_file.adopt(file, card, tmp_path / "a")
    photos = generated_photos(5, seed=3)
    pixels = prepare_batch(photos, vitkit.ImageSpec((8, 8), crop_pct=1.0)).astype(np.float64)
    want = scale * (pixels.mean((1, 2)) - 128 - zero)
    with vitkit.open_engine(tmp_path / "a") as engine:
        got = engine.run_batched(engine.prepare(photos))["out"]
        assert engine.card.image.mean == pytest.approx(((128 + zero) / 255,) * 3)
    assert np.abs(got - want).max() <= scale
    assert "mean and std" in card.provenance["assumed"]
    said = CardValues(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert load(tmp_path / "net.tflite", said)[1].image.mean == (0.5,) * 3


def test_a_float_input_asks_for_its_mean(tmp_path):
    path = written(tmp_path, "FLOAT32")
    with pytest.raises(BadRequest, match="add --mean"):
        load(path, CardValues())
    file, card = load(path, CardValues(mean=(0.5,) * 3, std=(0.25,) * 3))
    artifact, _ = tflite_file.adopt(file, card, tmp_path / "a")
    photos = generated_photos(3, seed=3)
    with vitkit.open_engine(artifact.path) as engine:
        got = engine.run_batched(engine.prepare(photos))["out"]
    pixels = prepare_batch(photos, vitkit.ImageSpec((8, 8), crop_pct=1.0)).astype(np.float64)
    assert np.allclose(got, (pixels.mean((1, 2)) / 255 - 0.5) / 0.25, atol=1e-5)
    assert (artifact.card.precision, artifact.card.provenance["source"]["file"]) == ("fp32", "net.tflite")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": (9, 9)}, "made for images of 8,8: leave out --size"),
        ({"outputs": ("scores",)}, "the outputs of .* are called out: leave out --outputs"),
        ({"labels": ("a", "b")}, "2 labels, but 3 classes"),
    ],
)
def test_values_that_contradict_the_file_are_refused(values, words, tmp_path):
    with pytest.raises(BadRequest, match=words):
        load(written(tmp_path, "INT8", (0.1, 0)), CardValues(**values))


def test_pixels_need_no_mean(tmp_path):
    path = written(tmp_path, "UINT8", (0.1, 0))
    assert load(path, CardValues())[1].task == "classification"
    with pytest.raises(BadRequest, match="leave out --mean and --std"):
        load(path, CardValues(mean=(0.5,) * 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be opened"),
        (b"not an engine", "cannot be opened"),
        (means_file("FLOAT32", shape=(1, 8, 8, 4)), "an engine takes one image"),
    ],
)
def test_what_is_no_engine_for_images_is_refused(content, words, tmp_path):
    (tmp_path / "net.tflite").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        load(tmp_path / "net.tflite", CardValues())


def test_a_delegate_that_computes_something_else_is_noticed(tmp_path, monkeypatch):
    file, card = load(written(tmp_path, "FLOAT32"), CardValues(mean=(0.5,) * 3, std=(0.25,) * 3))
    run = tflite_file.TFLiteFile.run
    monkeypatch.setattr(
        tflite_file.TFLiteFile, "run", lambda self, x: {k: v[:, ::-1] for k, v in run(self, x).items()}
    )
    with pytest.raises(ExportFailed, match="does not do what"):
        tflite_file.adopt(file, card, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_word_makes_an_artifact_and_no_source(tmp_path):
    from vitkit.sources import resolve

    path = written(tmp_path, "UINT8", (0.1, 0))
    artifact = vitkit.export(path, tmp_path / "a", target="tflite", labels=("a", "b", "c"))
    assert artifact.card.labels == ("a", "b", "c")
    for target, words in (
        ("onnx", "use --target tflite, or give the network"),
        ("openvino", "no float network"),
    ):
        with pytest.raises(BadRequest, match=words):
            vitkit.export(path, tmp_path / "b", target=target)
    with pytest.raises(BadRequest, match="is an engine already"):
        vitkit.export(path, tmp_path / "b", target="tflite", calib=tmp_path)
    with pytest.raises(BadRequest, match="is an engine already"):
        resolve(str(path))
    assert not (tmp_path / "b").exists()


def test_the_command_line_takes_the_file(tmp_path, capsys):
    from typer.testing import CliRunner

    from vitkit.cli.main import app

    path = written(tmp_path, "UINT8", (0.1, 0))
    arguments = ["export", str(path), "--target", "tflite", "-o", str(tmp_path / "a")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert read_card(tmp_path / "a").inputs[0].dtype == "uint8"
    refused = CliRunner().invoke(app, [*arguments, "--dynamic-batch", "--opset", "20"])
    assert isinstance(refused.exception, BadRequest)
    assert "leave out --batch, --opset" in str(refused.exception)

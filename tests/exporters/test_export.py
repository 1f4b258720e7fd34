"""Exports end to end: what is written, that it repeats, and that nothing half is left behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import lively

import vitkit
from vitkit import BadRequest, ExportFailed, MissingBackend, exporters
from vitkit.exporters import trace
from vitkit.exporters.source import Source
from vitkit.exporters.targets import OPSET
from vitkit.models import build, run_card
from vitkit.runtimes.card import CARD_FILE, read_card, sha256
from vitkit.runtimes.image import generated_photos

# Packages, which nothing here runs as they are, have tests of their own.
TARGETS = {target: row for target, row in exporters.TARGETS.items() if row.stand_in is None}
EVERY = [(target, p) for target, row in TARGETS.items() for p in row.precisions]
# TFLite's converter takes many seconds for each network; test_tflite_export.py does this with a small one.
CONVERTED_QUICKLY = ("onnx", "openvino")
# Worst mean distance of sampling points, in pixels of 64, and worst relative error of the logits.
BOUNDS = {"fp32": (1e-3, 1e-4), "fp16": (0.05, 0.02), "bf16": (0.5, 0.15), "int8": (0.5, 0.2)}


@pytest.mark.parametrize(("target", "precision"), EVERY)
def test_every_engine_does_what_the_model_does(target, precision, artifact_of, source, photo_folder):
    from vitkit.runtimes.image import prepare_batch, sample_photos

    folder = artifact_of(target, precision)
    photos = [photo for _, photo in sample_photos(photo_folder, 24)]
    with vitkit.open_engine(folder) as engine:
        found = engine.run_batched(engine.prepare(photos))
    expected = source.predict(prepare_batch(photos, source.card.image))
    points, logits = BOUNDS[precision]
    assert np.abs(found["points"] - expected["points"]).mean() < points
    error = found["logits"] - expected["logits"]
    assert np.sqrt((error**2).mean()) < logits * expected["logits"].std()
    card = read_card(folder)
    assert (card.target, card.precision) == (target, precision)
    assert set(card.files) | {CARD_FILE} == {path.name for path in folder.iterdir()}
    assert ("calibration.json" in card.files) == (precision == "int8")


@pytest.mark.parametrize("target", TARGETS)
def test_a_second_export_has_the_same_bytes(target, source, calibration, artifact_of, tmp_path):
    first = artifact_of(target, "int8")
    # A source of its own, which has no trace yet.
    fresh = Source(source.module, source.card)
    exporters.export(fresh, tmp_path / "again", target=target, precision="int8", calibration=calibration)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in (tmp_path / "again").iterdir())
    for path in first.iterdir():
        assert sha256(path) == sha256(tmp_path / "again" / path.name), path.name


def test_the_card_tells_how_and_no_place(artifact_of, photo_folder):
    text = (artifact_of("onnx", "int8") / CARD_FILE).read_text()
    body = json.loads(text)
    assert body["provenance"]["calibration"]["count"] == 24
    assert set(body["provenance"]["versions"]) >= {"vitkit", "torch", "onnx", "onnxruntime"}
    assert str(photo_folder.parent) not in text
    graph = onnx.load(artifact_of("onnx", "int8") / "model.onnx")
    assert b"/site-packages/" not in graph.SerializeToString()


@pytest.mark.parametrize("opset", [OPSET.choices[0], 20, OPSET.choices[-1]])
def test_opsets_are_what_was_asked_for(opset, source):
    image = replace(source.card.image, layout="NHWC", dtype="uint8")
    graph = source.graph(image, 1, opset)
    assert {item.domain: item.version for item in graph.opset_import} == {"": opset}
    assert len({node.name for node in graph.graph.node}) == len(graph.graph.node)


def test_engines_of_one_source_share_the_trace_until_its_weights_change(source, monkeypatch):
    model = type(source.module)(source.module.config)
    model.load_state_dict(source.module.state_dict())
    fresh = Source(model.eval(), source.card)
    image = replace(source.card.image, layout="NHWC", dtype="uint8")
    captures = []
    capture = trace._capture
    monkeypatch.setattr(trace, "_capture", lambda *request: captures.append(request) or capture(*request))
    first, second = (fresh.graph(image, 1, 20) for _ in range(2))
    assert len(captures) == 1
    assert first == second
    # What a caller does to its graph is not in the next one.
    del first.graph.node[:]
    assert fresh.graph(image, 1, 20) == second
    with torch.no_grad():
        model.head.bias += 1
    assert fresh.graph(image, 1, 20) != second
    assert len(captures) == 2


def test_what_is_constant_is_folded():
    model = build("ps_vit_nano", image_size=56, n=7).eval()
    source = Source(model, run_card("ps_vit_nano", model.config))
    image = replace(source.card.image, layout="NHWC", dtype="uint8")
    graph = source.graph(image, 1, 20).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"BatchNormalization", "Shape", "Constant", "Identity", "GridSample"} & set(kinds)
    # Four iterations sample, but the first one's places are known, here whole pixels: a strided slice.
    assert sum(node.name.startswith("sampler.pos_layer/Gemm") for node in graph.node) == 3
    assert sum(node.name.startswith("sampler.sample/ReduceSum") for node in graph.node) == 3


@pytest.mark.parametrize(
    "options", [{"image_size": 50, "n": 5, "iterations": 1}, {"n": 6, "share": False, "iterations": 2}]
)
@pytest.mark.parametrize("target", CONVERTED_QUICKLY)
def test_other_sizes_and_grids_export_too(options, target, tmp_path):
    model = lively(build("ps_vit_nano", **options))
    source = Source(model, run_card("ps_vit_nano", model.config))
    photos = [(str(i), photo) for i, photo in enumerate(generated_photos(6, seed=2))]
    _, checks = exporters.export(source, tmp_path / "a", target=target, precision="fp32", images=photos)
    assert [check.name for check in checks] == ["golden", "images"]
    assert all(check.error < 1e-4 and check.others["points"].mean < 1e-3 for check in checks)


@pytest.mark.parametrize("target", CONVERTED_QUICKLY)
def test_int8_of_a_fixed_batch_is_calibrated_on_whole_batches(
    target, source, calibration, artifact_of, tmp_path
):
    photos = [(str(i), photo) for i, photo in enumerate(generated_photos(7, seed=6))]
    _, checks = exporters.export(
        source,
        tmp_path / "a",
        target=target,
        precision="int8",
        calibration=calibration,
        batch=5,
        images=photos,
    )
    assert checks[1].images == 7
    assert [x.shape[0] for x in calibration.inputs(source.card.image, 5)] == [5] * 5


def test_an_export_never_costs_the_user_anything(source, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "data").mkdir()
    with pytest.raises(BadRequest, match="other files"):
        exporters.export(source, tmp_path / "run", target="onnx", precision="fp32")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "card.json").write_text("{}")
    (tmp_path / "precious" / "thesis.txt").write_text("precious")
    with pytest.raises(BadRequest, match="other files"):
        exporters.export(source, tmp_path / "precious", target="onnx", precision="fp32")
    for place in ("/proc/x/y", tmp_path / "precious" / "thesis.txt" / "a", tmp_path / ("a" * 300)):
        with pytest.raises(BadRequest):
            exporters.export(source, Path(place), target="onnx", precision="fp32")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    exporters.export(source, tmp_path / "link", target="onnx", precision="fp32")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "model.onnx").is_file()


def test_a_broken_engine_is_not_written(source, tmp_path, monkeypatch):
    class Liar(Source):
        def predict(self, inputs, batch=16):
            outputs = super().predict(inputs, batch)
            return {**outputs, "logits": outputs["logits"][:, ::-1].copy()}

    with pytest.raises(ExportFailed, match="mean cosine"):
        exporters.export(Liar(source.module, source.card), tmp_path / "a", target="onnx", precision="fp32")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_what_was_there(source, artifact_of, tmp_path, monkeypatch):
    exporters.export(source, tmp_path / "a", target="onnx", precision="fp32")
    before = {path.name: sha256(path) for path in (tmp_path / "a").iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    # By its module: the package shows the function of that name.
    monkeypatch.setattr(import_module("vitkit.exporters.export"), "write_golden", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exporters.export(source, tmp_path / "a", target="onnx", precision="fp32", batch=2)
    assert {path.name: sha256(path) for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_peoples_folders_are_never_replaced(source, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    with pytest.raises(BadRequest, match="other files"):
        exporters.export(source, tmp_path / "a", target="onnx", precision="fp32")
    assert (tmp_path / "a" / "thesis.txt").read_text() == "precious"
    with pytest.raises(BadRequest, match="is a file"):
        exporters.export(source, tmp_path / "a" / "thesis.txt", target="onnx", precision="fp32")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"target": "coreml"}, "coreml"),
        ({"target": "onnx", "precision": "bf16"}, "ONNX Runtime has no bf16"),
        ({"target": "onnx", "precision": "int4"}, "int4"),
        ({"target": "onnx", "precision": "int8"}, "--calib DIR"),
        ({"target": "onnx", "input": "rgb"}, "rgb"),
        ({"target": "onnx", "batch": 0}, "--batch is 0"),
        ({"target": "onnx", "options": {"opset": 17}}, "one of 18, .*, 25"),
        ({"target": "tflite", "batch": None}, "fixed batch size: use --batch N"),
        (
            {"target": "tflite", "options": {"opset": 20}},
            "--opset is an option of --target onnx and --target openvino, not of tflite",
        ),
        ({"target": "tflite", "precision": "bf16"}, "TFLite has no bf16"),
    ],
)
def test_impossible_requests_are_refused(request_, words, source, tmp_path):
    with pytest.raises(BadRequest, match=words):
        exporters.export(source, tmp_path / "a", **{"precision": "fp32", **request_})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vitkit.exporters.targets.find_spec", lambda name: None if name == "onnxscript" else object()
    )
    with pytest.raises(MissingBackend, match="pip install 'vitkit\\[export\\]'"):
        exporters.export(source, tmp_path / "a", target="onnx", precision="fp32")


def test_a_batch_that_the_code_fixes_is_noticed(source):
    """Torch's exporter falls back to a fixed batch without a word where the code asks for its number."""

    class Fixed(type(source.module)):
        def deploy(self, images):
            assert len(images) == 2
            return super().deploy(images)

    model = Fixed(source.module.config)
    model.load_state_dict(source.module.state_dict())
    image = replace(source.card.image, layout="NHWC", dtype="uint8")
    with pytest.raises(ExportFailed, match="--dynamic-batch"):
        Source(model.eval(), source.card).graph(image, None, 20)

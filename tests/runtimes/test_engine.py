"""The engine's front: what it accepts, what it refuses, and that both vendors answer alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import vitkit
from vitkit import BadArtifact, BadInput, BadRequest, Classification, DeviceError, MissingBackend
from vitkit.exporters import export
from vitkit.exporters.golden import read_golden
from vitkit.runtimes.card import CARD_FILE, read_card, sha256, write_card
from vitkit.runtimes.image import generated_photos

TARGETS = ("onnx", "openvino", "tflite")


@pytest.fixture(params=TARGETS)
def engine(request, artifact_of):
    with vitkit.open_engine(artifact_of(request.param, "fp32"), threads=1) as opened:
        yield opened


def recard(folder, copy, **changes):
    """A copy of an artifact with another card; hashes stay right."""
    shutil.copytree(folder, copy)
    write_card(replace(read_card(copy), **changes), copy)
    return copy


def test_an_image_a_list_and_a_path_agree(engine, photo, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    result = engine(photo)
    assert isinstance(result, Classification)
    assert engine(path) == engine(str(path))
    assert engine(path).top == result.top
    both = engine([photo, path])
    assert [r.top for r in both] == [result.top, result.top]
    assert result.label == result.top[0].name == f"class {result.top[0].index}"
    probabilities = [label.probability for label in result.top]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) <= 1 + 1e-9


def test_probabilities_are_the_softmax_of_the_raw_logits(engine, photo):
    feeds = {"image": engine.prepare([photo])}
    logits = engine.run(feeds)["logits"][0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    top = engine(photo).top
    assert len(top) == 5
    for label in top:
        assert abs(label.probability - expected[label.index]) < 1e-9


def test_points_come_back_in_pixels_of_the_photograph(engine):
    square = generated_photos(1, seed=3, size=(64, 64))[0]
    spec = engine.card.image
    points = engine(square).points
    raw = engine.run({"image": engine.prepare([square])})["points"][0]
    scale = int(spec.size[0] / spec.crop_pct) / 64
    expected = (raw + 0.5 + round((64 * scale - spec.size[0]) / 2)) / scale - 0.5
    assert points.shape == raw.shape == (4, 49, 2)
    assert np.allclose(points, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([], "empty"),
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8), np.uint8), "shape"),
        (np.zeros((8, 8, 1), np.uint8), "RGB"),
        (None, "NoneType"),
        (3, "int"),
        ("nowhere.png", "nowhere.png"),
        ([np.zeros((8, 8, 3), np.uint8), "nowhere.png"], "nowhere.png"),
        ([np.zeros((8, 8, 3), np.uint8), None], "image 1"),
    ],
)
def test_bad_images_are_named(engine, image, words):
    with pytest.raises(BadInput, match=words):
        engine(image)


def feeds_of(engine):
    return np.zeros(engine.card.inputs[0].shape, engine.card.inputs[0].dtype)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: {}, "missing"),
        (lambda x: None, "dictionary"),
        (lambda x: [x], "dictionary"),
        (lambda x: {None: x, 3: x}, "unknown"),
        (lambda x: {"image": x, "more": x}, "more"),
        (lambda x: {"picture": x}, "picture"),
        (lambda x: {"image": x.tolist()}, "list"),
        (lambda x: {"image": x.astype(np.float32)}, "float32"),
        (lambda x: {"image": x.astype(np.int8)}, "int8"),
        (lambda x: {"image": x[0]}, "wanted image"),
        (lambda x: {"image": x[:, :-1]}, "wanted image"),
        (lambda x: {"image": x[:0]}, "wanted image"),
        (lambda x: {"image": np.concatenate([x, x])}, "wanted image"),
        (lambda x: {"image": x.view(np.matrix if x.ndim == 2 else np.recarray)}, "subclass"),
    ],
)
def test_bad_feeds_are_named(engine, make, words):
    with pytest.raises(BadInput, match=words):
        engine.run(make(feeds_of(engine)))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_floats_must_be_finite(target, source, tmp_path):
    export(source, tmp_path / "a", target=target, precision="fp32", input="float32")
    with vitkit.open_engine(tmp_path / "a", threads=1) as engine:
        good = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
        assert np.isfinite(engine.run({"image": good})["logits"]).all()
        huge = np.full_like(good, 1e38)
        assert "logits" in engine.run({"image": huge}), "finite values whose sum overflows are allowed"
        for value in (np.nan, np.inf, -np.inf):
            bad = good.copy()
            bad[0, 1, 2, 3] = value
            with pytest.raises(BadInput, match="1 NaN or infinite"):
                engine.run({"image": bad})
        assert engine(generated_photos(1)[0]).top[0].probability > 0


def test_views_give_the_same_as_copies(engine, photo):
    prepared = engine.prepare([photo])
    strided = np.repeat(prepared, 2, axis=2)[:, :, ::2]
    assert not strided.flags.c_contiguous
    expected = engine.run({"image": prepared})["logits"]
    assert np.array_equal(engine.run({"image": strided})["logits"], expected)


def test_results_belong_to_the_caller(engine, photo):
    feeds = {"image": engine.prepare([photo])}
    first = engine.run(feeds)
    kept = {name: value.copy() for name, value in first.items()}
    engine.run({"image": np.zeros_like(feeds["image"])})
    for name, value in first.items():
        assert np.array_equal(value, kept[name])
        value[:] = 0


def test_threads_may_share_an_engine(engine):
    inputs = [engine.prepare([photo]) for photo in generated_photos(6, seed=9)]
    expected = [engine.run({"image": x})["logits"] for x in inputs]
    wrong = []

    def work(i):
        for _ in range(15):
            if not np.allclose(engine.run({"image": inputs[i]})["logits"], expected[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_engine_says_so(artifact_of, photo):
    engine = vitkit.open_engine(artifact_of("onnx", "fp32"))
    engine.close()
    engine.close()
    with pytest.raises(BadRequest, match="closed"):
        engine(photo)
    with pytest.raises(BadRequest, match="closed"):
        engine.run({"image": feeds_of(engine)})


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_fixed_and_free_batches_agree(target, source, artifact_of, tmp_path):
    photos = generated_photos(5, seed=4)
    with vitkit.open_engine(artifact_of(target, "fp32")) as engine:
        expected = engine.run_batched(engine.prepare(photos))
    for name, batch in (("four", 4), ("free", None)):
        export(source, tmp_path / name, target=target, precision="fp32", batch=batch)
        with vitkit.open_engine(tmp_path / name) as engine:
            assert engine.batch == batch
            found = engine.run_batched(engine.prepare(photos))
            results = engine(photos)
        assert len(results) == 5
        for key in expected:
            assert found[key].shape == expected[key].shape
            assert np.abs(found[key] - expected[key]).max() < 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_foreign_engine_files_are_refused(target, artifact_of, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(artifact_of(target, "fp32"), folder)
    card = read_card(folder)
    for content in (b"", b"not an engine", (folder / card.engine).read_bytes()[:1000]):
        (folder / card.engine).write_bytes(content)
        files = {name: sha256(folder / name) for name in card.files}
        write_card(replace(card, files=files), folder)
        with pytest.raises(BadArtifact, match=card.engine):
            vitkit.open_engine(folder)


def test_a_card_that_describes_another_engine_is_refused(artifact_of, tmp_path):
    folder = artifact_of("onnx", "fp32")
    card = read_card(folder)
    wrong_output = (replace(card.outputs[0], dtype="float16"), card.outputs[1])
    with pytest.raises(BadArtifact, match="outputs: card logits: float16"):
        vitkit.open_engine(recard(folder, tmp_path / "a", outputs=wrong_output))
    with pytest.raises(BadArtifact, match="2 labels for 10 logits"):
        vitkit.open_engine(recard(folder, tmp_path / "b", labels=("one", "two")))
    with pytest.raises(BadArtifact, match="task"):
        vitkit.open_engine(recard(folder, tmp_path / "c", task="poetry"))
    with pytest.raises(BadArtifact, match="tflitee"):
        vitkit.open_engine(recard(folder, tmp_path / "d", target="tflitee"))
    with pytest.raises(BadArtifact, match="image"):
        vitkit.open_engine(recard(folder, tmp_path / "e", image=replace(card.image, size=(32, 32))))
    with pytest.raises(BadArtifact, match="precision_hints"):
        vitkit.open_engine(
            recard(artifact_of("openvino", "fp32"), tmp_path / "f", options={"precision_hints": ["f8"]})
        )


def test_a_hand_written_card_needs_no_hashes(artifact_of, tmp_path, photo):
    folder = tmp_path / "hand"
    folder.mkdir()
    made = artifact_of("onnx", "fp32")
    shutil.copy(made / "model.onnx", folder)
    body = json.loads((made / CARD_FILE).read_text())
    keep = ("format", "name", "task", "target", "precision", "inputs", "outputs", "image", "engine")
    short = {key: body[key] for key in keep} | {"files": {"model.onnx": None}}
    (folder / CARD_FILE).write_text(json.dumps(short))
    with vitkit.open_engine(folder) as engine, vitkit.open_engine(made) as original:
        assert engine(photo).label == str(original(photo).top[0].index)


def test_unknown_devices_and_threads_are_refused(artifact_of):
    for target in TARGETS:
        with pytest.raises(DeviceError, match="cpu"):
            vitkit.open_engine(artifact_of(target, "fp32"), device="toaster")
    for path in (None, 3, b"x"):
        with pytest.raises(BadRequest, match="artifact is a"):
            vitkit.open_engine(path)
    for threads in (0, -1, 1.5, True, 10**12):
        with pytest.raises(BadRequest, match="threads"):
            vitkit.open_engine(artifact_of("onnx", "fp32"), threads=threads)


def test_bf16_is_refused_where_the_cpu_lacks_it(artifact_of, monkeypatch):
    import vitkit.runtimes.openvino as runtime

    monkeypatch.setattr(runtime, "capabilities", lambda: {"CPU": ["FP32", "INT8"]})
    int8 = artifact_of("openvino", "int8")
    with vitkit.open_engine(int8) as engine:
        assert engine.session.settings["INFERENCE_PRECISION_HINT"] == "f32"
    fp32 = artifact_of("openvino", "fp32")
    bf16 = recard(fp32, fp32.parent / "bf16-by-hand", options={"precision_hints": ["bf16"]})
    with pytest.raises(DeviceError, match="fp32 or int8"):
        vitkit.open_engine(bf16)


def test_a_missing_vendor_names_the_extra(artifact_of, monkeypatch):
    for target, package in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"vitkit.runtimes.{target}", raising=False)
        with pytest.raises(MissingBackend, match=rf"pip install 'vitkit\[{target}\]'"):
            vitkit.open_engine(artifact_of(target, "fp32"))


def test_an_app_loads_numpy_and_one_vendor_only(artifact_of):
    others = {"onnx": "openvino", "openvino": "onnxruntime", "tflite": "onnxruntime"}
    for target, other in others.items():
        code = (
            "import sys, numpy, vitkit\n"
            f"with vitkit.open_engine({str(artifact_of(target, 'fp32'))!r}) as engine:\n"
            "    size = engine.card.image.size\n"
            "    engine(numpy.zeros((100, 100, 3), numpy.uint8))\n"
            f"print([n for n in ('torch', 'typer', 'rich', 'timm', {other!r}) if n in sys.modules])"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("target", TARGETS)
def test_golden_outputs_come_out_of_the_engine(target, artifact_of):
    with vitkit.open_engine(artifact_of(target, "fp32")) as engine:
        inputs, expected = read_golden(engine.artifact)
        found = engine.run_batched(inputs)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-3 * max(1, np.abs(value).max())

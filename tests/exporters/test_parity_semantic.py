"""Parity of semantic engines, and their label maps through every target."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import LABELS, Segmenter, source

from vitkit import BadArtifact, ExportFailed, Semantic, exporters, open_engine
from vitkit.calibration.dataset import calibration_set
from vitkit.exporters.parity_semantic import LIMITS, _compare
from vitkit.exporters.verify import verify
from vitkit.runtimes.image import generated_photos, prepare

PHOTOS = [(f"generated {i}", image) for i, image in enumerate(generated_photos(6, seed=3))]


@pytest.fixture(scope="module")
def segmenter():
    return source(Segmenter(), "semantic")


def logits(seed=0, scale=4.0):
    return (scale * np.random.default_rng(seed).normal(size=(4, 4, 16, 16))).astype(np.float32)


def parity_of(want, got, precision="fp32"):
    pairs = [({"logits": a}, {"logits": b}) for a, b in zip(want, got, strict=True)]
    card = replace(source(Segmenter(), "semantic").card, precision=precision)
    return _compare("x", pairs, card)


def test_figures_are_those_of_a_formula():
    want, got = logits(), logits() + 0.2 * logits(1)
    parity = parity_of(want, got, "int8")
    probabilities = torch.softmax(torch.from_numpy(want), dim=1)
    (first, second), best = probabilities.topk(2, dim=1).values.unbind(1), want.argmax(1)
    clear = (first >= 2 * second).numpy()
    changed = best != got.argmax(1)
    assert parity.flips == changed.mean()
    assert parity.clear == clear.mean()
    assert parity.clear_flips == changed[clear].mean()
    off, centred = (x - x.mean(axis=1, keepdims=True) for x in (got - want, want))
    assert parity.logits.error == pytest.approx(np.sqrt((off**2).mean()) / centred.std(), rel=1e-4)


def test_what_softmax_ignores_is_no_error():
    want = logits()
    shift = np.random.default_rng(5).normal(size=(4, 1, 16, 16)).astype(np.float32)
    parity = parity_of(want, want + 9 * shift)
    assert parity.logits.error < 1e-5
    assert parity.problems == ()


@pytest.mark.parametrize("precision", LIMITS)
def test_classes_that_change_clearly_are_a_problem_in_every_precision(precision):
    want = logits()
    got = want.copy()
    # On a tenth of the pixels two of four classes change places: a twentieth has another best class.
    got[:, :, :2, :12] = got[:, [1, 0, 2, 3], :2, :12]
    parity = parity_of(want, got, precision)
    assert 0.03 < parity.clear_flips < 0.07
    found = any("of the clear pixels change class" in problem for problem in parity.problems)
    assert found == (precision != "int8")
    assert parity_of(want, want, precision).problems == ()
    turned = parity_of(want, want[:, [1, 2, 3, 0]], precision)
    assert any("of the clear pixels change class" in problem for problem in turned.problems)
    assert any("of all pixels change class" in problem for problem in turned.problems)


def test_a_network_that_is_sure_of_nothing_is_held_too():
    want = logits(scale=1e-3)
    got = want[:, [1, 2, 3, 0]]
    parity = parity_of(want, got, "int8")
    assert parity.clear == 0
    assert any("of all pixels change class" in problem for problem in parity.problems)
    assert parity_of(want, want + 0.1 * logits(1, scale=1e-3), "int8").problems == ()


def test_a_class_that_the_engine_lost_is_named():
    want = logits()
    want[:, 2] = want[:, 2] * 0.02 - 20
    got = want.copy()
    got[:, 2] = -20
    assert parity_of(want, got, "int8").flips == 0
    got[:, 3] = -20
    assert any(
        "change class" in problem or "lost" in problem for problem in parity_of(want, got, "int8").problems
    )


def test_values_that_are_not_finite_are_named():
    got = logits()
    got[2, 1, 5, 6] = np.nan
    assert "'logits' of the engine holds" in parity_of(logits(), got, "int8").problems[0]
    json.dumps(parity_of(logits(), got, "int8").summary(), allow_nan=False)


@pytest.mark.parametrize(("target", "batch"), [("onnx", 1), ("openvino", 1), ("tflite", 1), ("onnx", None)])
def test_float_engines_give_the_label_maps_of_torch(segmenter, target, batch, tmp_path):
    _, (golden, images) = exporters.export(
        segmenter, tmp_path / "a", target=target, precision="fp32", batch=batch, images=PHOTOS
    )
    assert (golden.images, images.images) == (1, 6)
    assert images.clear > 0.5
    assert images.clear_flips == 0
    photo = PHOTOS[0][1]
    with open_engine(tmp_path / "a", task="semantic") as engine:
        result = engine(photo)
    assert isinstance(result, Semantic)
    assert result.labels == LABELS
    with torch.inference_mode():
        (values,) = segmenter.module.deploy(torch.from_numpy(prepare(photo, segmenter.card.image))[None])
        want = torch.nn.functional.interpolate(values, photo.shape[:2], mode="bilinear")[0].argmax(0).numpy()
    assert len(np.unique(want)) >= 3
    # The camera's bytes are normalised in the graph, whose rounding decides between near equals.
    assert np.mean(result.classes != want) < 1e-3


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_int8_engines_pass(segmenter, photo_folder, target, tmp_path):
    _, (_golden, images) = exporters.export(
        segmenter,
        tmp_path / "a",
        target=target,
        precision="int8",
        calibration=calibration_set(photo_folder, 16),
    )
    assert 0 < images.logits.error < 0.2
    assert images.clear_flips < LIMITS["int8"].clear_flips / 2


def test_other_outputs_are_held_as_well(tmp_path):
    two = source(Segmenter(auxiliary=True), "semantic")
    _, (_, images) = exporters.export(two, tmp_path / "a", target="onnx", precision="fp32", images=PHOTOS)
    assert images.others["auxiliary"].error < 1e-4
    other = source(Segmenter(auxiliary=True), "semantic")
    with torch.inference_mode():
        other.module.auxiliary.weight[:] = other.module.auxiliary.weight.flip(0)
    with pytest.raises(ExportFailed, match="'auxiliary' has an error of"):
        verify(tmp_path / "a", other, PHOTOS)


def test_another_networks_outputs_are_refused(segmenter, tmp_path):
    exporters.export(segmenter, tmp_path / "a", target="onnx", precision="fp32")
    two = source(Segmenter(auxiliary=True), "semantic")
    with pytest.raises(BadArtifact, match="the reference returns logits, auxiliary, the engine logits"):
        verify(tmp_path / "a", two, PHOTOS)

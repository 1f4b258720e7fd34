"""Parity of raw tensors: every output is held, whatever it means."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Detector, source

from vitkit import BadArtifact, ExportFailed, Tensors, exporters, open_engine
from vitkit.exporters.parity_tensors import ELEMENTS, LIMITS, OutputSums, TensorSums
from vitkit.exporters.verify import verify
from vitkit.runtimes.image import generated_photos

PHOTOS = [(f"generated {i}", image) for i, image in enumerate(generated_photos(6, seed=3))]


def values(seed=0, shape=(9, 4, 50)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sums_of(want, got):
    sums = TensorSums("x")
    for a, b in zip(want, got, strict=True):
        sums.add(a, b)
    return sums


@settings(max_examples=50, deadline=None)
@given(noise=st.floats(0, 0.5), shift=st.floats(-100, 100), seed=st.integers(0, 99))
def test_the_error_is_that_of_a_formula(noise, shift, seed):
    want = values(seed) + np.float32(shift)
    got = want + np.float32(noise) * values(seed + 1)
    off = got.astype(np.float64) - want
    found = sums_of(want, got).difference()
    assert found.error == pytest.approx(np.sqrt(np.mean(off**2)) / want.astype(np.float64).std(), rel=1e-4)
    assert found.max_abs == pytest.approx(np.abs(off).max())
    assert found.changed == np.mean(want != got)


def test_values_that_are_all_the_same_are_measured_by_their_size():
    want = np.full((2, 10), 8, np.float32)
    assert sums_of(want, want + 1).difference().error == pytest.approx(1 / 8)
    zeros = np.zeros((2, 10), np.float32)
    assert not list(sums_of(zeros, zeros).problems("fp32"))
    assert list(sums_of(zeros, zeros + 1e-3).problems("int8"))


@pytest.mark.parametrize("precision", LIMITS)
def test_each_limit_breaks(precision):
    want, limits = values(), LIMITS[precision]
    assert not list(sums_of(want, want + 0.9 * limits.error * values(1)).problems(precision))
    (problem,) = sums_of(want, want + 1.2 * limits.error * values(1)).problems(precision)
    assert f"over {limits.error:g}" in problem
    numbers = np.arange(100_000).reshape(10, -1)
    changed = numbers.copy()
    changed.ravel()[: int(limits.changed * numbers.size)] += 1
    assert not list(sums_of(numbers, changed).problems(precision))
    changed.ravel()[: int(limits.changed * numbers.size) + 1] = -1
    (problem,) = sums_of(numbers, changed).problems(precision)
    assert "of the integers of 'x' differ" in problem


def test_a_single_wrong_integer_of_a_small_output_is_a_problem():
    want = np.arange(900).reshape(9, 100)
    got = want.copy()
    got[4, 3] = 0
    (problem,) = sums_of(want, got).problems("fp32")
    assert "0.11% of the integers" in problem


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["the float model", "the engine"])
def test_values_that_are_not_finite_are_named_with_their_place(value, side):
    sides = {"the float model": values(), "the engine": values()}
    sides[side][3, 2, 17] = value
    (problem,) = sums_of(*sides.values()).problems("int8")
    assert problem == f"'x' of {side} holds 1 NaN or infinite values, the first at [2, 17]"


def test_a_channel_that_is_lost_beside_larger_ones_is_a_problem():
    """The scores of boxes in pixels, all of one scale in INT8: the whole output's error hides them."""
    want = values(shape=(6, 5, 80)) * np.float32([200, 200, 200, 200, 0.2])[None, :, None] + 5
    got = want.copy()
    got[:, 4] = 5
    for a, b in ((want, got), (want.transpose(0, 2, 1), got.transpose(0, 2, 1))):
        sums = sums_of(a, b)
        assert sums.difference().error < 1e-3
        (problem,) = sums.problems("int8")
        assert "channel 4 on axis" in problem
        assert "is lost" in problem


def test_few_elements_are_no_channel():
    want = values(shape=(ELEMENTS - 1, 7)) * 100
    want[:, 0] *= 1e-3
    got = want.copy()
    got[:, 0] = 0
    assert not list(sums_of(want, got).problems("int8"))


def test_outputs_of_other_names_or_shapes_are_refused():
    sums = OutputSums()
    with pytest.raises(BadArtifact, match="the reference returns a, b, the engine a"):
        sums.add({"a": values(), "b": values()}, {"a": values()})
    with pytest.raises(BadArtifact, match=r"output 'a' is float32 \[9, 4, 50\], the engine's is .*\[4, 50\]"):
        OutputSums().add({"a": values()}, {"a": values()[0]})
    with pytest.raises(BadArtifact, match="the engine's is int64"):
        OutputSums().add({"a": values()}, {"a": values().astype(np.int64)})


@pytest.fixture(scope="module")
def detector():
    return source(Detector(), "tensors")


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_every_output_of_a_float_engine_equals_torch(detector, target, tmp_path):
    _, checks = exporters.export(detector, tmp_path / "a", target=target, precision="fp32", images=PHOTOS)
    golden, images = (check.summary() for check in checks)
    assert set(images["outputs"]) == {"boxes", "scores", "best"}
    assert (golden["images"], images["images"]) == (4, 6)
    assert images["outputs"]["boxes"]["error"] < 1e-4
    json.dumps(images, allow_nan=False)
    with open_engine(tmp_path / "a", task="tensors") as engine:
        result = engine(PHOTOS[0][1])
        feeds = engine.prepare([PHOTOS[0][1]])
    assert isinstance(result, Tensors)
    with torch.inference_mode():
        images = torch.from_numpy(feeds.transpose(0, 3, 1, 2).copy()) / 255
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (detector.card.image.mean, detector.card.image.std)
        )
        want = detector.module.deploy((images - mean) / std)
    for name, value in zip(detector.module.output_names, want, strict=True):
        assert result[name].shape == value.shape[1:]
        assert np.allclose(result[name], value[0], atol=2e-3)


def test_one_broken_output_of_three_fails_the_export(detector, tmp_path):
    made = tmp_path / "a"
    exporters.export(detector, made, target="onnx", precision="fp32")
    other = source(Detector(), "tensors")
    with torch.inference_mode():
        other.module.classes.bias.roll(1)
        other.module.classes.bias += torch.arange(5) / 3
    with pytest.raises(ExportFailed, match="'scores' has an error of") as error:
        verify(made, other, PHOTOS)
    assert "'boxes'" not in str(error.value)

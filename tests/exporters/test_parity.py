from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vitkit
from vitkit import BadArtifact
from vitkit.exporters.golden import GOLDEN_FILE
from vitkit.exporters.parity import check_golden
from vitkit.exporters.parity_classification import LIMITS, TIE_LEAD, compare
from vitkit.models import build, run_card
from vitkit.runtimes.card import read_card, sha256, write_card

NANO = run_card("ps_vit_nano", build("ps_vit_nano").config)


def parity_of(want, got, precision):
    """The parity of outputs by name; of logits alone if they are arrays."""
    sides = [side if isinstance(side, dict) else {"logits": side} for side in (want, got)]
    names = [str(i) for i in range(len(sides[0]["logits"]))]
    return compare("x", *sides, replace(NANO, precision=precision), names)


def logits(seed=0, n=40, classes=10):
    return np.random.default_rng(seed).normal(size=(n, classes)).astype(np.float32) * 3


@settings(max_examples=50, deadline=None)
@given(noise=st.floats(0, 0.5), shift=st.floats(-5, 5), seed=st.integers(0, 99))
def test_error_is_the_noise_and_ignores_what_softmax_ignores(noise, shift, seed):
    want = logits(seed)
    step = noise * np.random.default_rng(seed + 1).normal(size=want.shape)
    parity = parity_of(want, want + step + shift, "int8")
    centred = step - step.mean(axis=1, keepdims=True)
    expected = np.sqrt((centred**2).mean()) / (want - want.mean(1, keepdims=True)).std()
    assert abs(parity.error - expected) < 1e-5
    assert len(parity.flips) == (want.argmax(1) != (want + step).argmax(1)).sum()


def test_a_flip_between_equals_is_a_tie_and_a_clear_one_is_not():
    want = np.zeros((50, 3), np.float32)
    want[:, 0] = 5
    got = want.copy()
    want[0] = [1.001, 1.0, 0]
    got[0] = [1.0, 1.001, 0]
    parity = parity_of(want, got, "fp32")
    assert (parity.near_ties, parity.agreement, parity.problems) == (1, 0.98, ())
    assert parity.flips[0].lead < TIE_LEAD
    assert "1 of 1 flips are near ties, 2.0% of the images" in str(parity)
    got[1] = [0, 5, 0]
    assert any("1 of 50 images change class" in problem for problem in parity_of(want, got, "fp32").problems)


def flipped(want, images, lead):
    """Other logits, whose class differs on the first `images`; the float model leads by `lead` there."""
    want, got = want.copy(), want.copy()
    for i in range(images):
        first, second = np.argsort(-want[i])[:2]
        want[i, first] = want[i, second] + lead
        got[i] = want[i]
        got[i, [first, second]] = got[i, [second, first]]
    return want, got


def flat(images, classes=1000):
    """Logits of a network that is sure of nothing: no class reaches one per cent."""
    return np.random.default_rng(1).normal(size=(images, classes)).astype(np.float32) * 0.3


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("lead", [1e-4, 0.05, 0.3])
def test_a_flat_network_whose_every_class_flips_fails(precision, lead):
    want, got = flipped(flat(12), 12, lead)
    parity = parity_of(want, got, precision)
    assert parity.agreement == 0
    assert any("12 of 12 images change class" in problem for problem in parity.problems)


@pytest.mark.parametrize("images", [16, 64, 300])
def test_near_ties_excuse_a_bounded_share_of_the_images(images):
    limit = int(np.ceil(LIMITS["int8"].ties * images))
    want, got = flipped(flat(images), limit, 1e-3)
    parity = parity_of(want, got, "int8")
    assert (parity.near_ties, parity.problems) == (limit, ())
    assert f"{limit / images:.1%} of the images" in str(parity)
    assert parity.summary()["near_tie_share"] == limit / images
    want, got = flipped(flat(images), limit + 1, 1e-3)
    (problem,) = parity_of(want, got, "int8").problems
    assert f"{limit + 1} of {images} images change to a class that the float model puts within" in problem


def test_a_tie_is_small_beside_the_best_class_too():
    # A lead of a fifth, though of a thousandth of a point: 0.0012 against 0.0010.
    want, got = flipped(flat(40), 8, np.log(1.25))
    parity = parity_of(want, got, "int8")
    assert all(flip.lead < TIE_LEAD for flip in parity.flips)
    assert parity.near_ties == 0
    assert any("8 of 40 images change class" in problem for problem in parity.problems)


def points_of(*errors, images=8):
    """Sampling points of four iterations, and those of an engine off by so many pixels in each."""
    grid = np.random.default_rng(0).uniform(0, 64, (images, 4, 49, 2)).astype(np.float32)
    moved = grid + np.float32(errors)[None, :, None, None]
    want = logits(n=images)
    return {"logits": want, "points": grid}, {"logits": want, "points": moved}


def test_sampling_points_are_held_at_the_last_iteration():
    # The mean over all iterations is 0.25 pixels, a quarter of what the last one has.
    parity = parity_of(*points_of(0, 0, 0, 0.99), "int8")
    assert parity.others["points"].mean == pytest.approx(0.99, abs=1e-4)
    assert any("points are off by 0.99 on average" in problem for problem in parity.problems)
    assert parity_of(*points_of(0, 0.05, 0.1, 0.2), "int8").problems == ()


def test_sampling_points_are_held_on_the_worst_image():
    want, got = points_of(0, 0, 0, 0, images=64)
    got["points"][5, -1] += 3
    parity = parity_of(want, got, "int8")
    found = parity.others["points"]
    assert found.mean == pytest.approx(3 / 64, abs=1e-4)
    assert found.mean < found.limit
    assert found.worst == pytest.approx(3, abs=1e-4)
    (problem,) = parity.problems
    assert "points are off by 3 on the worst image" in problem


def test_the_limit_of_points_is_a_share_of_their_distance():
    # 7 x 7 points in 64 pixels.
    want, got = points_of(0, 0, 0, 0)
    assert parity_of(want, got, "int8").others["points"].limit == pytest.approx(
        LIMITS["int8"].points * 64 / 7
    )


def test_each_limit_breaks_by_itself():
    want = logits()
    assert parity_of(want, want.copy(), "fp32").problems == ()
    broken = want.copy()
    broken[3, 2] = np.nan
    assert "not finite" in parity_of(want, broken, "int8").problems[0]
    turned = want.copy()
    turned[5] = -turned[5]
    assert any("cosine" in problem for problem in parity_of(want, turned, "int8").problems)
    other = {"logits": want, "embedding": want * 10}
    moved = {"logits": want, "embedding": want * 10 + 5}
    assert any("embedding are off by 5" in problem for problem in parity_of(other, moved, "int8").problems)
    doubled = want * (1 + 2 * LIMITS["fp16"].error)
    assert any("error" in problem for problem in parity_of(want, doubled, "fp16").problems)


def test_a_tampered_golden_or_engine_is_found(artifact_of, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(artifact_of("onnx", "fp32"), folder)
    with np.load(folder / GOLDEN_FILE) as file:
        arrays = dict(file)
    arrays["output.logits"] = arrays["output.logits"][:, ::-1]
    np.savez(folder / GOLDEN_FILE, **arrays)
    with pytest.raises(BadArtifact, match=r"golden\.npz"):
        vitkit.open_engine(folder)
    card = read_card(folder)
    write_card(replace(card, files={name: sha256(folder / name) for name in card.files}), folder)
    with vitkit.open_engine(folder) as engine:
        assert check_golden(engine).problems
    (folder / GOLDEN_FILE).write_bytes(b"zip?")
    write_card(replace(card, files={**card.files, GOLDEN_FILE: None}), folder)
    with vitkit.open_engine(folder) as engine, pytest.raises(BadArtifact, match="cannot be read"):
        check_golden(engine)

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
from vitkit.exporters.parity import LIMITS, NEAR_TIE, check_golden, compare
from vitkit.runtimes.card import read_card, sha256, write_card


def logits(seed=0, n=40, classes=10):
    return np.random.default_rng(seed).normal(size=(n, classes)).astype(np.float32) * 3


@settings(max_examples=50, deadline=None)
@given(noise=st.floats(0, 0.5), shift=st.floats(-5, 5), seed=st.integers(0, 99))
def test_error_is_the_noise_and_ignores_what_softmax_ignores(noise, shift, seed):
    want = logits(seed)
    step = noise * np.random.default_rng(seed + 1).normal(size=want.shape)
    parity = compare("x", {"logits": want}, {"logits": want + step + shift}, "int8")
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
    parity = compare("x", {"logits": want}, {"logits": got}, "fp32")
    assert (parity.near_ties, parity.agreement, parity.problems) == (1, 0.98, ())
    assert parity.flips[0].margin < NEAR_TIE
    got[1] = [0, 5, 0]
    problems = compare("x", {"logits": want}, {"logits": got}, "fp32").problems
    assert any("1 of 50 images change class" in problem for problem in problems)


def test_each_limit_breaks_by_itself():
    want = logits()
    assert compare("x", {"logits": want}, {"logits": want.copy()}, "fp32").problems == ()
    broken = want.copy()
    broken[3, 2] = np.nan
    assert "not finite" in compare("x", {"logits": want}, {"logits": broken}, "int8").problems[0]
    turned = want.copy()
    turned[5] = -turned[5]
    assert any("cosine" in p for p in compare("x", {"logits": want}, {"logits": turned}, "int8").problems)
    points = {"logits": want, "points": want * 10}
    moved = {"logits": want, "points": want * 10 + 5}
    assert any("points are off by 5" in p for p in compare("x", points, moved, "int8").problems)
    doubled = want * (1 + 2 * LIMITS["fp16"].error)
    assert any("error" in p for p in compare("x", {"logits": want}, {"logits": doubled}, "fp16").problems)


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

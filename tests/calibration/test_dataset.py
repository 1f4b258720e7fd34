from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from vitkit.calibration.dataset import calibration_set
from vitkit.runtimes import BadInput, BadRequest, ImageSpec
from vitkit.runtimes.card import sha256
from vitkit.runtimes.image import prepare, read_image


def test_the_sample_is_reproducible_and_known(photo_folder):
    first, again = calibration_set(photo_folder, 16), calibration_set(photo_folder, 16)
    assert first == again
    assert first.fingerprint == again.fingerprint
    assert len(first.files) == 16
    assert list(first.files) == sorted(first.files)
    other = calibration_set(photo_folder, 16, seed=1)
    assert other.files != first.files
    assert other.fingerprint != first.fingerprint
    for name, digest in zip(first.files, first.hashes, strict=True):
        assert sha256(photo_folder / name) == digest


def test_the_fingerprint_follows_content_not_place(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "copy")
    moved = calibration_set(tmp_path / "copy", 24)
    assert moved.fingerprint == calibration_set(photo_folder, 24).fingerprint
    (tmp_path / "copy" / "01.jpg").write_bytes((photo_folder / "02.jpg").read_bytes())
    assert calibration_set(tmp_path / "copy", 24).fingerprint != moved.fingerprint


def test_inputs_go_through_the_cards_preparation(photo_folder):
    chosen = calibration_set(photo_folder, 16)
    spec = ImageSpec((32, 48), layout="NCHW", dtype="float32")
    inputs = list(chosen.inputs(spec))
    assert len(inputs) == 16
    expected = prepare(read_image(photo_folder / chosen.files[3]), spec)
    assert np.array_equal(inputs[3][0], expected)


def test_too_few_missing_and_unreadable_are_refused_by_name(photo_folder, tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        calibration_set(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds 0 images"):
        calibration_set(tmp_path)
    with pytest.raises(BadRequest, match="--calib-count is 15"):
        calibration_set(photo_folder, 15)
    folder = tmp_path / "broken"
    shutil.copytree(photo_folder, folder)
    (folder / "cut.jpg").write_bytes((folder / "01.jpg").read_bytes()[:200])
    (folder / "text.png").write_text("no image")
    with pytest.raises(BadInput) as error:
        calibration_set(folder)
    assert "2 of 26" in str(error.value)
    assert "cut.jpg" in str(error.value)
    assert "text.png" in str(error.value)
    same = tmp_path / "same"
    same.mkdir()
    for i in range(20):
        shutil.copy(photo_folder / "01.jpg", same / f"{i}.jpg")
    with pytest.raises(BadInput, match="1 different"):
        calibration_set(same)


def test_the_record_tells_all(photo_folder):
    chosen = calibration_set(photo_folder, 16, seed=3)
    body = json.loads(chosen.record(ImageSpec((32, 32)), "a method", ["a.b"]))
    assert body["seed"] == 3
    assert body["count"] == 16
    assert body["method"] == "a method"
    assert body["kept_float"] == ["a.b"]
    assert body["fingerprint"] == chosen.fingerprint
    assert [item["path"] for item in body["files"]] == list(chosen.files)
    assert str(photo_folder) not in json.dumps(body), "an artifact must not tell where it was made"

"""Each example does what its first line promises, on small engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
from test_predict import classifier, colour_engine, scene

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str, *arguments: object, path: Path | None = None) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


OPENCV = """
import numpy as np

class VideoCapture:
    def __init__(self, source):
        assert source == 0
        # Blue, green and red in OpenCV's order; then the camera is unplugged.
        self.frames = [np.full((48, 64, 3), colour, np.uint8) for colour in np.eye(3) * 255]
    def read(self):
        return (True, self.frames.pop(0)) if self.frames else (False, None)
    def release(self):
        pass
"""


def test_camera(tmp_path):
    (tmp_path / "cv2.py").write_text(OPENCV)
    artifact = classifier(tmp_path / "colours")
    lines = example("camera.py", artifact, path=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == ["blue", "green", "red"]


def test_batch_leaves_out_what_is_unreadable(artifact_of, photo_folder, tmp_path):
    good = sorted(photo_folder.glob("*.jpg"))[:9]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    lines = example("batch.py", artifact_of("onnx", "fp32"), *good, tmp_path / "broken.jpg").splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in (*good, tmp_path / "broken.jpg")]
    assert "left out" in lines[-1]
    assert not any("left out" in line for line in lines[:-1])


def test_tensors(artifact_of):
    import vitkit

    artifact = artifact_of("onnx", "fp32")
    lines = example("tensors.py", artifact).splitlines()
    assert [line.split()[0] for line in lines] == [
        spec.name for spec in vitkit.read_artifact(artifact).card.outputs
    ]


def test_overlay_changes_the_pixels_of_segments_and_no_others(tmp_path):
    frame, slots = scene()
    Image.fromarray(frame).save(tmp_path / "frame.png")
    artifact = colour_engine(tmp_path / "colours")
    text = example("overlay.py", artifact, tmp_path / "frame.png", tmp_path / "out.png")
    assert sorted(line.split(":")[0] for line in text.splitlines()) == ["ball", "box", "box", "road", "sky"]
    painted = np.asarray(Image.open(tmp_path / "out.png"))
    # The last slot is void.
    assert np.array_equal(painted[slots == 5], frame[slots == 5])
    assert (painted != frame).any(axis=-1)[slots != 5].mean() > 0.9

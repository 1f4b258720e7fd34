"""What AI Edge Quantizer is told."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitkit import exporters, open_engine
from vitkit.calibration.dataset import calibration_set
from vitkit.runtimes.image import generated_photos

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


def test_what_a_single_image_has_is_in_range(source, artifact_of, tmp_path):
    """A moving average over many grey images forgets the one with all colours."""
    photos = generated_photos(40, seed=5)
    photo = photos[20]
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(photos):
        pixels = pixels if i == 20 else (pixels // 16 + 120).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02}.png")
    calibration = calibration_set(tmp_path / "photos", 40)
    exporters.export(source, tmp_path / "a", target="tflite", precision="int8", calibration=calibration)
    logits = []
    for path in (artifact_of("tflite", "fp32"), tmp_path / "a"):
        with open_engine(path) as engine:
            logits.append(engine.run({"image": engine.prepare([photo])})["logits"])
    assert np.abs(logits[0] - logits[1]).max() < 0.08 * logits[0].std()

"""The same promises on real photographs and the real model size; skipped where there are none."""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest
from conftest import lively
from PIL import Image

from vitkit import exporters
from vitkit.calibration.dataset import calibration_set
from vitkit.exporters.source import Source
from vitkit.models import build, run_card
from vitkit.runtimes import ImageSpec
from vitkit.runtimes.image import _SMALL, read_image, resize_and_crop, sample_photos
from vitkit.runtimes.listing import find_images


def test_preparation_equals_torchvision_on_every_photo(real_photos):
    import_module("vitkit.torchvision_shim")
    v2 = import_module("torchvision.transforms.v2")

    steps = v2.Compose([v2.Resize(248, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    files = find_images(real_photos)
    assert len(files) == 300
    for path in files[::6]:
        photo = read_image(path)
        expected = np.asarray(steps(Image.fromarray(photo)))
        found = resize_and_crop(photo, ImageSpec((224, 224)))
        # Of large frames only what the crop keeps is resized, which may round otherwise.
        large = photo.shape[0] * photo.shape[1] > _SMALL
        assert np.abs(found.astype(int) - expected).max() <= int(large), path


# TFLite's converter takes half a minute for it.
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_ti_share_in_int8_on_photographs(target, real_photos, tmp_path):
    # Of a thousand classes an untrained network puts many alike, and any INT8 flips some.
    model = lively(build("ps_vit_ti_14_share", num_classes=10))
    source = Source(model, run_card("ps_vit_ti_14_share", model.config))
    calibration = calibration_set(real_photos, 32)
    photos = sample_photos(real_photos, 48)
    artifact, checks = exporters.export(
        source, tmp_path / "a", target=target, precision="int8", calibration=calibration, images=photos
    )
    assert [check.images for check in checks] == [4, 48]
    assert checks[1].cosine_mean > 0.97
    record = json.loads((tmp_path / "a" / "calibration.json").read_text())
    assert len(record["files"]) == 32
    assert artifact.size_bytes < 6e6

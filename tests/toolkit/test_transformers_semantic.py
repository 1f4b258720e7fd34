"""Segmentation networks of transformers through the whole chain: label maps equal the library's own."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from PIL import Image

import vitkit
from vitkit import ImageSpec
from vitkit.evaluate import open_network
from vitkit.evaluate.semantic import evaluate
from vitkit.runtimes.image import generated_photos, prepare

pytest.importorskip("transformers", reason="transformers is not installed")
# Before transformers' image processors, which import torchvision.
import vitkit.torchvision_shim  # isort: skip
import torch
import transformers

SIDE, CLASSES = 64, 7
IMAGE = ImageSpec((SIDE, SIDE), fit="stretch", interpolation="bilinear")
PHOTOS = [generated_photos(1, seed=i, size=size)[0] for i, size in enumerate(((96, 128), (150, 70)))]


def segformer():
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=32, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def mobilevit():
    config = transformers.MobileViTV2Config(image_size=SIDE, width_multiplier=0.25, num_labels=CLASSES)
    return transformers.MobileViTV2ForSemanticSegmentation(config)


PROCESSORS = {segformer: "SegformerImageProcessor", mobilevit: "MobileViTImageProcessor"}


@pytest.fixture(scope="module", params=PROCESSORS, ids=lambda make: make.__name__)
def network(request):
    """Random weights, with norms that saw images and a head that prefers no class everywhere."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = request.param()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
        images = torch.from_numpy(np.stack([prepare(photo, normalised()) for photo in PHOTOS]))
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        made.train()(images)
    return made.eval(), getattr(transformers, PROCESSORS[request.param])()


def normalised() -> ImageSpec:
    return ImageSpec(IMAGE.size, fit=IMAGE.fit, interpolation="bilinear", layout="NCHW", dtype="float32")


def library_maps(network, processor) -> list[np.ndarray]:
    images = torch.from_numpy(np.stack([prepare(photo, normalised()) for photo in PHOTOS]))
    with torch.no_grad():
        outputs = network(images)
    sizes = [photo.shape[:2] for photo in PHOTOS]
    return [found.numpy() for found in processor.post_process_semantic_segmentation(outputs, sizes)]


@pytest.fixture(scope="module")
def artifact(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "onnx"
    return export(network[0], folder, "onnx")


def export(module, folder, target):
    labels = [f"class {i}" for i in range(CLASSES)]
    vitkit.export(
        module, folder, target=target, image=IMAGE, task="semantic", labels=labels, outputs=["logits"]
    )
    return folder


def check_label_maps(artifact, network):
    with vitkit.open_engine(artifact, task="semantic") as engine:
        results = engine(PHOTOS)
    for result, want in zip(results, library_maps(*network), strict=True):
        assert len(np.unique(want)) >= 3
        # Rounding may decide between equals.
        assert np.mean(result.classes != want) < 1e-3


def test_label_maps_equal_the_librarys_own(network, artifact):
    check_label_maps(artifact, network)


@pytest.mark.parametrize("network", [segformer], indirect=True, ids=["segformer"])
def test_openvino_too(network, tmp_path):
    check_label_maps(export(network[0], tmp_path / "a", "openvino"), network)


def test_miou_of_the_networks_own_maps(network, artifact, tmp_path):
    for i, (photo, classes) in enumerate(zip(PHOTOS, library_maps(*network), strict=True)):
        for kind, pixels in (("images", photo), ("labels", classes.astype(np.uint8))):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    with closing(open_network(artifact)) as opened:
        report = evaluate(opened, tmp_path)
    assert report.miou > 97
    assert report.pixel_accuracy > 99

"""Panoptic networks through every target: the engine against torch, in every decision and in its segments."""

from __future__ import annotations

import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vitkit import BadArtifact, BadRequest, ExportFailed, exporters, open_engine
from vitkit.calibration.dataset import calibration_set
from vitkit.data.coco.read import read_split
from vitkit.data.scenes import write_scenes
from vitkit.devices.network import open_network_on
from vitkit.devices.registry import Device
from vitkit.devices.verify import verify_on
from vitkit.evaluate import evaluate, open_network
from vitkit.exporters.parity_panoptic import LIMITS, check_images
from vitkit.exporters.source import Source
from vitkit.inspection import inspect
from vitkit.models import build, run_card
from vitkit.runtimes.card import read_card, write_card
from vitkit.runtimes.image import prepare, sample_photos

OPTIONS = {
    "image_size": 129, "pixel_widths": (16, 16, 8, 8), "heads": 4, "queries": 12, "query_width": 16,
    "mask_width": 8, "ffn_width": 32, "drop_path": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=16, val=8, size=160)


@pytest.fixture(scope="module")
def photos(scenes):
    return sample_photos(scenes / "val", 8)


@pytest.fixture(scope="module")
def source(photos) -> Source:
    """A network whose branches are all alive, with the statistics of real images in its norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("remax_nano", **OPTIONS)
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.weight.data.uniform_(0.6, 1.4)
                module.bias.data.normal_(0, 0.2)
                module.momentum = None
        card = run_card("remax_nano", model.config)
        images = torch.from_numpy(np.stack([prepare(photo, card.image) for _, photo in photos]))
        with torch.no_grad():
            model.train()(images)
    return Source(model.eval(), card)


@pytest.fixture(scope="module")
def exported(source, photos, tmp_path_factory):
    """Float engines and what their export found, each made once."""
    made = {}

    def make(target: str, batch: int | None = 1):
        if (target, batch) not in made:
            folder = tmp_path_factory.mktemp("engines") / "a"
            result = exporters.export(
                source, folder, target=target, precision="fp32", batch=batch, images=photos
            )
            made[target, batch] = (folder, result[1])
        return made[target, batch]

    return make


@pytest.mark.parametrize(("target", "batch"), [("onnx", 1), ("openvino", 1), ("tflite", 1), ("onnx", None)])
def test_float_engines_equal_torch_in_every_decision(source, photos, exported, target, batch):
    folder, (_, parity) = exported(target, batch)
    assert parity.images == 8
    assert len(parity.decisions) == 3
    assert max(parity.decisions.values()) < 0.002
    assert parity.error < 0.01
    with open_engine(folder) as engine:
        got = engine.run_batched(engine.prepare([photo for _, photo in photos[:3]]))
    want = source.predict(np.stack([prepare(photo, source.card.image) for _, photo in photos[:3]]))
    for name in ("masks", "classes"):
        np.testing.assert_allclose(got[name], want[name], atol=0.02 * want[name].std())


def test_a_device_is_verified_in_every_decision_and_evaluated(source, photos, scenes, exported, tmp_path):
    """On another Python of this machine, which computes as this one does: nothing may differ."""
    box, (folder, _) = Device("box", "local", python=sys.executable, folder=str(tmp_path)), exported("onnx")
    found = verify_on(box, folder, source, photos, folder=scenes / "val")
    assert not found.broken
    assert found.unlike == ()
    assert [check.summary() for check in found.there] == [check.summary() for check in found.here]
    assert len(found.there[1].decisions) == 3
    (between,) = found.between
    assert (between.error, between.flips, between.mask_error) == (0.0, 0.0, 0.0)
    named = shutil.copytree(folder, tmp_path / "named")
    labels = tuple(category.name for category in read_split(scenes, "val").categories)
    write_card(replace(read_card(named), labels=labels), named)
    with closing(open_network_on(box, named)) as there, closing(open_network(named)) as here:
        assert evaluate(there, scenes, split="val") == evaluate(here, scenes, split="val")


def test_pixels_are_padded_below_and_right(exported):
    photo = np.zeros((50, 120, 3), np.uint8)
    with open_engine(exported("onnx")[0]) as engine:
        (prepared,) = engine.prepare([photo])
        assert prepared.shape == (129, 129, 3)
        assert (prepared[54:] == 128).all()
        assert (prepared[:54] == 0).all()
        assert engine(photo).ids.shape == (50, 120)


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_int8_keeps_the_assignments_and_mask_products_float(source, scenes, target, tmp_path, monkeypatch):
    # Random weights make an assignment of near ties: what is tested is the policy, not the parity.
    loose = LIMITS["int8"]._replace(logits=10, flips=1, decision_flips=1, classes=1)
    monkeypatch.setitem(LIMITS, "int8", loose)
    calibration = calibration_set(scenes / "train", 16)
    exporters.export(source, tmp_path / "a", target=target, precision="int8", calibration=calibration)
    counts = inspect(tmp_path / "a")["operators"]["int8"]
    assert counts[{"onnx": "QLinearConv", "openvino": "Convolution", "tflite": "CONV_2D"}[target]] > 30
    if target != "onnx":
        return
    nodes = onnx.load(tmp_path / "a" / "model.onnx").graph.node
    quantised = {o for node in nodes if node.op_type == "DequantizeLinear" for o in node.output}
    kept = [n for n in nodes if n.name.startswith(("decoder.predictor/", "decoder.blocks.0/"))]
    assert {"ArgMax", "MatMul"} <= {node.op_type for node in kept}
    assert not [
        node.name for node in kept if node.op_type in ("MatMul", "Gemm") and set(node.input) & quantised
    ]


def test_another_network_is_refused(source, photos, exported):
    folder, _ = exported("onnx")
    other = Source(build("remax_nano", **OPTIONS).eval(), source.card)
    with open_engine(folder) as engine:
        parity = check_images(engine, other, photos)
    assert parity.problems
    with pytest.raises(ExportFailed, match="mask logits"):
        exporters.verify(folder, other, photos)


def test_options_of_decoding_are_the_tasks_own(exported, tmp_path):
    folder = shutil.copytree(exported("onnx")[0], tmp_path / "a")
    with pytest.raises(BadRequest, match=r"'top'.*fast"):
        open_engine(folder, decode={"top": 3})
    with open_engine(folder, decode={"fast": True}) as engine:
        assert engine(np.zeros((30, 40, 3), np.uint8)).ids.shape == (30, 40)
    card = read_card(folder)
    for change in ({"things": [9]}, {"things": "all"}, {"masks": "nothing"}, {"overlap": "much"}):
        write_card(replace(card, decode={**card.decode, **change}), folder)
        with pytest.raises(BadArtifact):
            open_engine(folder)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (700, 30), (129, 129), (300, 400)])
def test_photos_of_any_size_come_back_at_their_own(exported, shape):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    with open_engine(exported("onnx")[0]) as engine:
        assert engine(photo).ids.shape == shape

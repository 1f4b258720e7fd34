"""Networks of timm that vitkit has never seen; benchmarks/families.py runs all sixty on every target."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

import vitkit
from vitkit import exporters
from vitkit.calibration.openvino import attention_blocks
from vitkit.exporters.openvino import to_ir
from vitkit.runtimes.image import generated_photos, prepare_batch

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "families.py"
_SPEC = spec_from_file_location("families", _FILE)
families = module_from_spec(_SPEC)
_SPEC.loader.exec_module(families)

# Attention layers of each network, counted by their classes in timm's code.
ATTENTION = {
    "mobilenetv4_conv_small": 0,
    "repvit_m0_9": 0,
    "convnextv2_atto": 0,
    "vit_tiny_patch16_224": 12,
    "pvt_v2_b0": 8,
    "mobilevitv2_050": 0,
    "gmlp_ti16_224": 0,
}


@pytest.fixture(scope="module", params=families.TESTED)
def source(request):
    return families.family_source(request.param)


def test_sixty_families():
    from vitkit.torchvision_shim import timm

    assert len(set(families.NAMES)) == 60
    assert set(families.NAMES) <= set(timm.list_models())
    assert set(families.TESTED) <= set(families.NAMES)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_engines_do_what_the_network_does(source, target, tmp_path):
    exporters.export(source, tmp_path / "engine", target=target, precision="fp32")
    photos = generated_photos(3, seed=11)
    with torch.inference_mode():
        images = torch.from_numpy(prepare_batch(photos, source.card.image))
        want = source.module.network(images).numpy()
    with vitkit.open_engine(tmp_path / "engine") as engine:
        found = engine.run_batched(engine.prepare(photos))["logits"]
    assert want.std() > 0.01
    assert np.abs(found - want).max() < 1e-3 * want.std() * 4


def test_attention_is_found_in_real_networks(source):
    # As exports ask for it, so that the trace is shared.
    image = replace(source.card.image, layout="NHWC", dtype="uint8")
    graph = to_ir(source.graph(image, 1, 20))
    assert len(attention_blocks(graph)) == ATTENTION[source.card.name]

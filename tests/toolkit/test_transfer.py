from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitkit.models import build
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.train import TrainConfig, train
from vitkit.train.transfer import freeze, initialise

OPTIONS = {
    "image_size": 32, "n": 2, "dim": 8, "heads": 2, "iterations": 2, "encoder_layers": 1, "stem_width": 8,
    "stem_mid": 8,
}  # fmt: skip
TINY = TrainConfig(
    model="ps_vit_nano", options=OPTIONS, epochs=2, batch_size=8, warmup_epochs=0, lr=1e-3, crop_pct=1.0,
    device="cpu",
)  # fmt: skip


def pictures(folder: Path, classes: int, side: int = 32) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for i in range(classes):
            (folder / split / f"c{i}").mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(20 * i, 100 + 20 * i, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"c{i}" / f"{j}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    return train(TINY, pictures(folder / "data", 2), folder / "run", progress=False)


def test_another_number_of_classes_and_another_size_start_from_a_run(run, tmp_path, capsys):
    data = pictures(tmp_path / "data", 3, side=48)
    still = replace(TINY, options={**OPTIONS, "image_size": 48, "n": 3}, epochs=1, lr=0.0, warmup_lr=0.0)
    made = load_file(train(still, data, tmp_path / "run", init=run) / "model.safetensors")
    assert "left fresh, for another number of classes: head.weight, head.bias" in capsys.readouterr().out
    first = load_file(run / "model.safetensors")
    assert made["head.weight"].shape == (3, 8)
    # A batch norm's statistics follow the new images.
    learned = [n for n in first if not n.startswith("head.") and "running" not in n and "num_b" not in n]
    assert all(torch.equal(made[name], first[name]) for name in learned)


def test_a_runs_weights_file_serves_too_and_anything_else_is_refused(run, tmp_path):
    network = build("ps_vit_nano", **{**OPTIONS, "num_classes": 2})
    assert initialise(network, run / "model.safetensors") == []
    first = load_file(run / "model.safetensors")
    assert all(torch.equal(tensor, first[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(BadInput, match=r"stem.*wanted.*vitkit import"):
        initialise(build("ps_vit_nano", **{**OPTIONS, "num_classes": 2, "stem_width": 16}), run)
    with pytest.raises(BadInput, match="does not fit"):
        initialise(build("ps_vit_nano", **{**OPTIONS, "num_classes": 2, "encoder_layers": 2}), run)
    first["stray"] = torch.zeros(1)
    save_file(first, tmp_path / "stray.safetensors")
    with pytest.raises(BadInput, match="unknown stray"):
        initialise(network, tmp_path / "stray.safetensors")


def test_panoptic_heads_are_left_fresh_alone():
    small = {
        "image_size": 65, "pixel_widths": (16, 16, 8, 8), "heads": 4, "queries": 12, "query_width": 16,
        "mask_width": 8, "ffn_width": 32, "aspp_width": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    teacher = build("remax_nano", **small, num_classes=5)
    network = build("remax_nano", **small, num_classes=7)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    path = Path(__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitkit.train.transfer.read_tensors", lambda *_: teacher.state_dict())
        fresh = initialise(network, path)
    assert fresh
    assert all("class_head" in name for name in fresh)
    for name, tensor in network.state_dict().items():
        source = before if name in fresh else teacher.state_dict()
        assert torch.equal(tensor, source[name])


def test_frozen_parts_keep_every_weight_and_statistic(run, tmp_path):
    data = pictures(tmp_path / "data", 2)
    probe = replace(TINY, freeze="stem,sampler,encoder,norm,cls_token", lr=0.1)
    made = load_file(train(probe, data, tmp_path / "probe", init=run, progress=False) / "model.safetensors")
    first = load_file(run / "model.safetensors")
    changed = {name for name in first if not torch.equal(made[name], first[name])}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(BadRequest, match=r"no part 'trunk'; it has stem, sampler"):
        freeze(build("ps_vit_nano"), "stem,trunk")

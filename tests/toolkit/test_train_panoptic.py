from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit.data.coco.ids import read_ids, write_ids
from vitkit.data.coco.read import read_split
from vitkit.data.scenes import CATEGORIES, write_scenes
from vitkit.evaluate import open_network
from vitkit.evaluate.panoptic import evaluate
from vitkit.runs import load_run
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.train import TrainConfig, checkpoint, train
from vitkit.train.panoptic import PanopticTraining, Scene, _targets, jittered, paste

TINY = TrainConfig(
    model="remax_nano",
    options={
        "image_size": 65, "pixel_widths": [16, 16, 8, 8], "heads": 4, "queries": 12, "query_width": 16,
        "mask_width": 8, "ffn_width": 32, "aspp_width": 8, "drop_path": 0.1,
    },
    epochs=2, batch_size=4, lr=5e-3, warmup_epochs=1, samples=64, copy_paste=0.5, clip_norm=float("inf"),
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=10, val=4, size=65)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return train(TINY, data, tmp_path_factory.mktemp("runs") / "run", progress=False)


def test_a_run_tells_its_classes_and_repeats_its_pq(run, data):
    loaded = load_run(run)
    assert loaded.card.labels == tuple(category.name for category in CATEGORIES)
    assert loaded.card.label_ids == tuple(str(category.id) for category in CATEGORIES)
    assert loaded.card.decode["things"] == [i for i, c in enumerate(CATEGORIES) if c.thing]
    report = evaluate(open_network(run), read_split(data))
    assert loaded.card.provenance["pq"] == pytest.approx(report.all.pq, abs=1e-9)
    rows = json.loads((run / "log.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2]
    parts = ("class", "dice", "mask_id", "instance", "semantic", "blocks")
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][part] for part in parts), rel=1e-4)


def test_training_descends(data, tmp_path):
    # The ratio is about sigmoids: a softmax leaves the level of the logits open.
    options = {**TINY.options, "mask_id": "sigmoid"}
    still = replace(TINY, options=options, epochs=8, copy_paste=0.0, jitter=0.0, flip=0.0, lr=1e-2)
    still = replace(still, scale_min=1.0, scale_max=1.0)
    log = json.loads((train(still, data, tmp_path / "run", progress=False) / "log.json").read_text())
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert log[-1]["fp_ratio"] < log[0]["fp_ratio"]


def test_an_interrupted_run_goes_on_bit_for_bit(data, run, tmp_path, monkeypatch):
    save, torn = checkpoint.save, tmp_path / "torn"

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, data, torn, progress=False)
    monkeypatch.undo()
    train(TINY, data, torn, resume=True, progress=False)
    assert (torn / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_what_only_training_needs_is_not_in_the_run(run):
    from safetensors import safe_open

    with safe_open(run / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == set(load_run(run).model.state_dict())
    assert not [name for name in names if "semantic" in name or "remask" in name]


def coloured(size: int = 80) -> Scene:
    """Four quarters whose colour tells their number."""
    numbers = np.ones((size, size), np.int32)
    numbers[: size // 2, size // 2 :] = 2
    numbers[size // 2 :, : size // 2] = 3
    numbers[size // 2 :, size // 2 :] = 4
    photo = np.repeat((numbers * 50).astype(np.uint8)[..., None], 3, axis=2)
    return Scene(photo, numbers, np.array([-1, 0, 1, 2, 0]), np.array([False, True, True, False, True]))


@pytest.mark.parametrize("seed", range(8))
def test_segments_move_with_their_pixels(seed):
    config = replace(TINY, scale_min=0.4, scale_max=2.0, flip=0.5)
    moved = jittered(coloured(), 65, config, np.random.default_rng(seed))
    assert moved.pixels.shape == (65, 65, 3)
    grey = moved.pixels[..., 0].astype(int)
    inside = moved.numbers > 0
    assert np.mean(np.abs(grey[inside] - 50 * moved.numbers[inside]) > 12) < 0.08
    assert (moved.pixels[~inside] == 128).all()


def test_pasting_takes_things_and_leaves_crowds():
    base, other = coloured(64), coloured(64)
    things = np.array([True, False, True])
    for seed in range(10):
        made = paste(base, other, things, np.random.default_rng(seed))
        pasted = set(np.unique(made.numbers[made.numbers > 4]).tolist())
        # 1 and 4 are things of class 0; 2 is stuff; 3 is a crowd.
        assert pasted <= {5, 8}
        assert made.classes.tolist() == [-1, 0, 1, 2, 0, 0, 1, 2, 0]
        for number in pasted:
            assert ((made.numbers == number) == (other.numbers == number - 4)).all()


def test_a_crowd_has_a_class_but_no_mask():
    numbers = torch.tensor([[[0, 1], [2, 2]]])
    targets = _targets(numbers, torch.tensor([[-1, 5, 7]]), torch.tensor([[False, True, False]]))
    assert targets.classes.tolist() == [[5, -1]]
    assert targets.masks[0, 0].tolist() == [[False, True], [False, False]]
    assert not targets.masks[0, 1].any()
    assert targets.semantic.tolist() == [[[-1, 5], [7, 7]]]


def test_samples_repeat_by_their_seed(data):
    task = PanopticTraining(TINY, data)
    first, again, other = (task.collate([task.sample(i, seed) for i in range(4)]) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_unfit_data_is_named(data, tmp_path):
    import shutil

    for change, words in (("stray", "does not name"), ("size", "pixels"), ("none", "no panoptic data")):
        copy = tmp_path / change
        shutil.copytree(data, copy)
        mask = sorted((copy / "annotations" / "panoptic_train").glob("*.png"))[0]
        photo = sorted((copy / "train").iterdir())[0]
        if change == "stray":
            ids = read_ids(mask).copy()
            ids[:3, :3] = 7_000_000
            write_ids(mask, ids)
        elif change == "size":
            photo.unlink()
            Image.new("RGB", (30, 30)).save(photo)
        else:
            shutil.rmtree(copy / "annotations")
        with pytest.raises(BadInput, match=words):
            train(TINY, copy, tmp_path / f"run_{change}", progress=False)


def test_backbone_weights_come_from_a_file_or_a_clear_refusal(data, tmp_path, monkeypatch):
    from vitkit.models import build
    from vitkit.torchvision_shim import timm

    model = build("remax_nano", **TINY.options)
    path = tmp_path / "backbone.pth"
    torch.save(model.backbone.state_dict(), path)
    task_options = replace(TINY, epochs=1, lr=0.0, warmup_lr=0.0)
    trained = load_run(train(task_options, data, tmp_path / "run", backbone=str(path), progress=False)).model
    assert torch.equal(trained.backbone.conv_stem.weight, model.backbone.conv_stem.weight)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(BadInput, match="missing"):
        train(TINY, data, tmp_path / "other", backbone=str(path), progress=False)

    def fail(*args, pretrained=False, **kwargs):
        raise OSError("no network")

    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: fail(*a, **k) if k.get("pretrained") else create(*a, **k)
    )
    with pytest.raises(BadRequest, match=r"no network.*--backbone-weights FILE"):
        train(TINY, data, tmp_path / "third", backbone="timm", progress=False)

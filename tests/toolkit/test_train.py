from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitkit.data.folder import labelled_images
from vitkit.runs import load_run
from vitkit.runtimes.card import ImageSpec, check_files
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest
from vitkit.runtimes.image import prepare, read_image
from vitkit.train import RECIPES, TrainConfig, checkpoint, loop, override, recipe_named, train
from vitkit.train import images as images_module
from vitkit.train.images import augment, normalise
from vitkit.train.loop import learning_rate

SPEC = ImageSpec((16, 16), layout="NCHW", dtype="float32")
# Dropout and dropped paths draw from torch's own generator, which a resumed run must continue too.
TINY = TrainConfig(
    model="ps_vit_nano",
    options={
        "image_size": 32, "n": 2, "dim": 8, "heads": 2, "iterations": 2, "encoder_layers": 1,
        "stem_width": 8, "stem_mid": 8, "dropout": 0.1, "drop_path": 0.1,
    },
    epochs=3, batch_size=8, lr=2e-3, warmup_epochs=1, crop_pct=1.0, rotate=10.0, seed=3,
)  # fmt: skip
STILL = replace(TINY, flip=0.0, shift=0.0, zoom=0.0, rotate=0.0, jitter=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes that brightness tells apart, in noise: 22 images to train on, 10 to validate."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 5)):
        for name, level in (("light", 170), ("dark", 80)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(level, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    config = replace(TINY, epochs=12, options={**TINY.options, "dropout": 0.0, "drop_path": 0.0})
    return train(config, data, tmp_path_factory.mktemp("runs") / "run")


def test_training_learns_and_the_run_repeats_its_accuracy_on_the_apps_own_images(run, data):
    loaded = load_run(run)
    items = labelled_images(data / "val")
    inputs = np.stack([prepare(read_image(path), loaded.card.image) for path, _ in items])
    with torch.no_grad():
        best = loaded.model(torch.from_numpy(inputs)).argmax(1).tolist()
    right = sum(loaded.card.labels[i] == name for i, (_, name) in zip(best, items, strict=True))
    assert loaded.card.provenance["top1"] == pytest.approx(100 * right / len(items))
    assert right == len(items)


def test_the_finished_run_is_whole_and_says_where_it_comes_from(run):
    card = load_run(run).card
    check_files(run, card)
    assert card.labels == ("dark", "light")
    assert card.image.crop_pct == 1.0
    log = json.loads((run / "log.json").read_text())
    assert [row["epoch"] for row in log] == list(range(1, 13))
    assert max(row["top1"] for row in log) == card.provenance["top1"]
    told = {key: card.provenance[key] for key in ("model", "weights", "epochs", "seed", "train_images")}
    assert told == {
        "model": "ps_vit_nano", "weights": "trained", "epochs": 12, "seed": 3, "train_images": 22,
    }  # fmt: skip
    assert card.provenance["options"]["dim"] == 8
    assert len(card.provenance["data"]) == 64
    assert sorted(p.name for p in run.iterdir()) == [
        "card.json", "config.json", "log.json", "model.safetensors",
    ]  # fmt: skip


def test_killed_while_writing_a_checkpoint_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch):
    """A real SIGKILL with half of the second `last` written; then every tensor and loss is bitwise equal."""
    program = f"""
import os, signal
from pathlib import Path
from vitkit.train import checkpoint, train
from vitkit.train.config import TrainConfig
save_file, written = checkpoint.save_file, []
def save_and_die(tensors, path, header):
    save_file(tensors, path, header)
    written.append(path)
    if sum("last" in p.name for p in written) == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_and_die
train({TINY!r}, Path({str(data)!r}), Path({str(tmp_path / "killed")!r}))
"""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **threads}, check=False)
    assert done.returncode == -signal.SIGKILL
    monkeypatch.setattr(checkpoint, "remove", lambda out: None)
    resumed = train(TINY, data, tmp_path / "killed", resume=True)
    straight = train(TINY, data, tmp_path / "straight")
    told = [
        [(row["epoch"], row["loss"], row["lr"], row["top1"]) for row in json.loads(text.read_text())]
        for text in (resumed / "log.json", straight / "log.json")
    ]
    assert told[0] == told[1]
    one, two = (load_file(out / "checkpoint" / "last.safetensors") for out in (resumed, straight))
    assert one.keys() == two.keys()
    assert any(name.startswith("optimizer.") for name in one)
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_another_seed_is_another_run(data, tmp_path):
    weights = [
        load_file(train(replace(TINY, epochs=1, seed=seed), data, tmp_path / str(seed)) / "model.safetensors")
        for seed in (0, 1)
    ]
    assert not torch.equal(weights[0]["stem.0.weight"], weights[1]["stem.0.weight"])


def test_training_leaves_the_callers_random_numbers_alone(data, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(replace(TINY, epochs=1), data, tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_no_number_names_the_files_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    calls = []

    def spoil(images, config, generator):
        calls.append(len(images))
        # 22 images in batches of at most 8 are 3 steps: this is the second step of the second epoch.
        return images * float("nan") if len(calls) == 5 else augment(images, config, generator)

    monkeypatch.setattr(images_module, "augment", spoil)
    with pytest.raises(BadInput, match="finite number in epoch 2") as caught:
        train(TINY, data, tmp_path / "run")
    named = [str(path) in str(caught.value) for path, _ in labelled_images(data / "train")]
    assert sum(named) == calls[4]
    monkeypatch.setattr(images_module, "augment", augment)
    assert load_run(train(TINY, data, tmp_path / "run", resume=True)).card.provenance["epochs"] == 3


def test_an_infinite_gradient_is_caught_before_it_reaches_the_weights(data, tmp_path, monkeypatch):
    calls = []

    def steep(*arguments, **options):
        loss = cross_entropy(*arguments, **options)
        calls.append(loss)
        # The last step of the second epoch: no later loss would tell before the checkpoint.
        if len(calls) == 6:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    cross_entropy = images_module.F.cross_entropy
    monkeypatch.setattr(images_module.F, "cross_entropy", steep)
    with pytest.raises(BadInput, match="finite number in epoch 2"):
        train(TINY, data, tmp_path / "run")
    state = load_file(tmp_path / "run" / "checkpoint" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_every_epoch_has_its_own_order(data, tmp_path, monkeypatch):
    seen = []

    def spy(images, config, generator):
        seen.append(images.mean((1, 2, 3)))
        return augment(images, config, generator)

    monkeypatch.setattr(images_module, "augment", spy)
    train(replace(TINY, epochs=2), data, tmp_path / "run")
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)
    assert first.unique().numel() == 22


def test_an_output_that_holds_something_is_refused(run, data, tmp_path):
    with pytest.raises(BadRequest, match="not empty"):
        train(TINY, data, run)
    with pytest.raises(BadRequest, match="finished run"):
        train(TINY, data, run, resume=True)
    with pytest.raises(BadRequest, match="no checkpoint"):
        train(TINY, data, tmp_path / "new", resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadRequest, match="is a file"):
        train(TINY, data, tmp_path / "file")


def test_an_unfinished_run_is_only_continued_on_purpose_and_with_its_own_settings(
    data, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    # The line is printed after the epoch's checkpoint.
    monkeypatch.setattr(loop, "_line", stop)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, data, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(BadRequest, match="--resume"):
        train(TINY, data, tmp_path / "run")
    with pytest.raises(BadRequest, match=r"lr=0\.002"):
        train(replace(TINY, lr=1e-3), data, tmp_path / "run", resume=True)
    with pytest.raises(BadArtifact, match="not a vitkit artifact or run"):
        load_run(tmp_path / "run")
    last = tmp_path / "run" / "checkpoint" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(BadArtifact, match="damaged"):
        train(TINY, data, tmp_path / "run", resume=True)


def test_data_that_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(BadInput, match="train"):
        train(TINY, tmp_path, tmp_path / "run")
    with pytest.raises(BadRequest, match="num_classes is 7"):
        train(replace(TINY, options={"num_classes": 7}), data, tmp_path / "run")
    for split, name in (("train", "dark"), ("val", "grey")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    with pytest.raises(BadInput, match="grey"):
        train(TINY, tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_requests_that_cannot_be_met_are_refused_before_anything_is_written(data, tmp_path):
    for change, named in (
        ({"model": "ps_vit_huge"}, "ps_vit_huge"),
        ({"options": {"depth": 3}}, "depth"),
        ({"device": "warp"}, "warp"),
    ):
        with pytest.raises(BadRequest, match=named):
            train(replace(TINY, **change), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_there_is_one_line_an_epoch(data, tmp_path, capsys):
    train(replace(TINY, epochs=2), data, tmp_path / "told")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    train(replace(TINY, epochs=2), data, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().out == ""


def test_normalise_is_the_apps_image_preparation():
    photos = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    wanted = np.stack([prepare(photo, replace(SPEC, crop_pct=1.0)) for photo in photos])
    found = normalise(torch.from_numpy(photos), SPEC)
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def augmented(images: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    return augment(images, config, torch.Generator().manual_seed(1))


def test_augment_with_nothing_to_do_changes_nothing_and_flip_mirrors():
    images = pictures(4)
    torch.testing.assert_close(augmented(images, STILL), images, rtol=0, atol=1e-5)
    mirrored = augmented(images, replace(STILL, flip=1.0))
    torch.testing.assert_close(mirrored, images.flip(3), rtol=0, atol=1e-5)


def test_augment_shifts_each_image_by_its_own_amount_within_the_limit():
    images = torch.zeros(64, 1, 16, 16)
    images[:, :, 8, 8] = 1.0
    moved = augmented(images.expand(-1, 3, -1, -1), replace(STILL, shift=0.125))[:, 0]
    places = torch.arange(16.0)
    mass = moved.sum((1, 2))
    rows = (moved.sum(2) * places).sum(1) / mass - 8
    columns = (moved.sum(1) * places).sum(1) / mass - 8
    for shift in (rows, columns):
        assert shift.abs().max() <= 2.0 + 1e-3
        assert shift.abs().max() > 1.5
        assert shift.unique().numel() == 64
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.4


def test_augment_turns_about_the_centre_without_stretching():
    y, x = torch.meshgrid(torch.arange(16.0) - 7.5, torch.arange(16.0) - 7.5, indexing="ij")
    disc = ((x**2 + y**2) < 25).float().expand(8, 3, 16, 16)
    turned = augmented(disc, replace(STILL, rotate=180.0, flip=0.5))
    inner = (x**2 + y**2) < 12
    assert (turned[:, :, inner] > 0.99).all()
    around = ((x**2 + y**2) > 45) & ((x**2 + y**2) < 56)
    assert (turned[:, :, around] < 0.01).all()
    stripes = (x > 0).float().expand(8, 3, 16, 16)
    assert (augmented(stripes, replace(STILL, rotate=180.0)) - stripes).abs().mean() > 0.1


def test_augment_recolours_each_channel_along_a_line():
    images = pictures(2)
    changed = augmented(images, replace(STILL, jitter=0.3))
    lines = set()
    for old, new in zip(images.flatten(0, 1), changed.flatten(0, 1), strict=True):
        slope, offset = np.polyfit(old.flatten(), new.flatten(), 1)
        np.testing.assert_allclose(new, slope * old + offset, atol=1e-4)
        assert abs(slope - 1) <= 0.3 + 1e-4
        assert abs(offset) <= 0.3 + 1e-4
        lines.add((round(float(slope), 4), round(float(offset), 4)))
    assert len(lines) == 6


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = replace(TINY, lr=1.0, epochs=5, warmup_epochs=1)
    rates = [learning_rate(config, step, 10) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5)
    assert rates[20] == pytest.approx((1 + 2**-0.5) / 2)
    assert 0 < rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_override_reads_text_by_the_settings_own_type():
    config = override(TINY, {"lr": "1e-4", "epochs": "7", "device": "cuda", "options.dim": "16"})
    assert (config.lr, config.epochs, config.device) == (1e-4, 7, "cuda")
    assert config.options == {**TINY.options, "dim": "16"}
    assert TINY.options["dim"] == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "1"), ("options", "x"), ("lr", "fast"), ("epochs", "1.5"), ("epochs", "0"),
        ("lr", "nan"), ("crop_pct", "1.1"), ("seed", "-1"),
    ],
)  # fmt: skip
def test_override_refuses_unknown_settings_and_bad_values(key, value):
    with pytest.raises(BadRequest, match=key):
        override(TINY, {key: value})


def test_recipes_are_found_by_name_and_name_models_that_exist():
    from vitkit.models import configure

    for name, recipe in RECIPES.items():
        assert recipe_named(name) == recipe()
        configure(recipe().model, recipe().options)
    with pytest.raises(BadRequest, match="ps_vit_nano_demo"):
        recipe_named("no_such")

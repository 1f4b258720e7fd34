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
from conftest import write_pictures
from PIL import Image
from safetensors.torch import load_file

from vitkit.data.folder import labelled_images
from vitkit.runs import load_run
from vitkit.runtimes.card import ImageSpec, check_files
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest
from vitkit.runtimes.image import prepare, read_image
from vitkit.train import RECIPES, TrainConfig, checkpoint, override, recipe_named, train
from vitkit.train import classification as classification_module
from vitkit.train.classification import ClassificationTraining
from vitkit.train.mixing import mix
from vitkit.train.pixels import normalise
from vitkit.train.progress import Progress
from vitkit.train.schedule import make_optimizer, make_schedule

SPEC = ImageSpec((16, 16), layout="NCHW", dtype="float32")
# Dropout and dropped paths draw from torch's own generator, which a resumed run must continue too.
TINY = TrainConfig(
    model="ps_vit_nano",
    options={
        "image_size": 32, "n": 2, "dim": 8, "heads": 2, "iterations": 2, "encoder_layers": 1,
        "stem_width": 8, "stem_mid": 8, "dropout": 0.1, "drop_path": 0.1,
    },
    epochs=3, batch_size=8, lr=2e-3, warmup_epochs=1, crop_pct=1.0, crop_min=0.6, seed=3, device="cpu",
)  # fmt: skip

# What of a log's row differs from one run to the next.
TIMED = ("seconds", "images_per_second", "data_share")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes that brightness tells apart, in noise: 22 images to train on, 10 to validate."""
    return write_pictures(tmp_path_factory.mktemp("data"))


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
        "card.json", "config.json", "curves.png", "events", "log.json", "model.safetensors",
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


def test_killed_at_twenty_random_moments_and_resumed_equals_uninterrupted(data, tmp_path):
    """Every kill is a real SIGKILL of a forked process; in between, whatever file is there can be read."""
    config = replace(TINY, epochs=60, save_minutes=0, ema=0.9)
    program = f"""
import os, random, signal, sys, time
from pathlib import Path
import torch.utils.tensorboard
from safetensors import safe_open
from vitkit.train import has_checkpoint, train
from vitkit.train.config import TrainConfig

data, out, kills, attempts = Path({str(data)!r}), Path({str(tmp_path / "killed")!r}), 0, 0
random.seed(1)
while not (out / "card.json").exists():
    attempts += 1
    assert attempts < 400
    child = os.fork()
    if not child:
        try:
            train({config!r}, data, out, resume=has_checkpoint(out), progress=False)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    if kills < 24:
        time.sleep(random.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    kills += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    for path in (out / "checkpoint").glob("[a-z]*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                file.get_tensor(name)
print("kills", kills)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 20
    one_thread = f"""
from pathlib import Path
from vitkit.train import train
from vitkit.train.config import TrainConfig
train({config!r}, Path({str(data)!r}), Path({str(tmp_path / "straight")!r}), progress=False)
"""
    subprocess.run([sys.executable, "-c", one_thread], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    told = [
        [(row["epoch"], row["loss"], row["lr"], row["top1"]) for row in json.loads(text.read_text())]
        for text in (killed / "log.json", straight / "log.json")
    ]
    assert told[0] == told[1]


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
        return mix(images * float("nan") if len(calls) == 5 else images, config, generator)

    monkeypatch.setattr(classification_module, "mix", spoil)
    with pytest.raises(BadInput, match="finite number in epoch 2") as caught:
        train(TINY, data, tmp_path / "run")
    named = [str(path) in str(caught.value) for path, _ in labelled_images(data / "train")]
    assert sum(named) == calls[4] == 7
    listed = json.loads((tmp_path / "run" / "checkpoint" / "not_finite.json").read_text())
    assert len(set(listed)) == 7
    assert all(path in str(caught.value) for path in listed)
    monkeypatch.setattr(classification_module, "mix", mix)
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

    cross_entropy = classification_module.F.cross_entropy
    monkeypatch.setattr(classification_module.F, "cross_entropy", steep)
    with pytest.raises(BadInput, match="finite number in epoch 2"):
        train(TINY, data, tmp_path / "run")
    state = load_file(tmp_path / "run" / "checkpoint" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_every_epoch_has_its_own_order_and_own_changes(data, tmp_path, monkeypatch):
    seen = []

    def spy(self, index, seed):
        seen.append((index, seed))
        return sample(self, index, seed)

    sample = ClassificationTraining.sample
    monkeypatch.setattr(ClassificationTraining, "sample", spy)
    train(replace(TINY, epochs=2), data, tmp_path / "run")
    first, second = seen[:21], seen[21:]
    # 22 images are three steps of 7: one is left out.
    assert len({i for i, _ in first}) == len({i for i, _ in second}) == 21
    assert [i for i, _ in first] != [i for i, _ in second]
    assert len({seed for _, seed in seen}) == 42


def test_workers_and_memory_change_nothing(data, tmp_path):
    options = {**TINY.options, "dropout": 0.0}
    config = replace(
        TINY, epochs=2, options=options, randaugment="rand-m9-mstd0.5-inc1", erase=0.5, mixup=0.8
    )
    weights = [
        train(replace(config, **change), data, tmp_path / str(i)) / "model.safetensors"
        for i, change in enumerate(({}, {"workers": 2}, {"cache_mb": 0}))
    ]
    assert len({path.read_bytes() for path in weights}) == 1


@pytest.mark.parametrize("change", [{"accumulate": 2, "batch_size": 11}, {"ema": 0.9}, {"precision": "bf16"}])
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(data, tmp_path, monkeypatch, change):
    config = replace(TINY, save_minutes=0, **change)
    save = checkpoint.save

    def stop(*arguments):
        save(*arguments)
        record = arguments[-1]
        if record.log and record.state.step:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, data, tmp_path / "torn")
    monkeypatch.undo()
    torn, whole = train(config, data, tmp_path / "torn", resume=True), train(config, data, tmp_path / "whole")
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    told = [
        [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
        for rows in (json.loads((run / "log.json").read_text()) for run in (torn, whole))
    ]
    assert told[0] == told[1]


def test_the_average_of_the_weights_is_what_the_run_keeps(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "remove", lambda out: None)
    run = train(replace(TINY, ema=0.9), data, tmp_path / "run")
    last = load_file(run / "checkpoint" / "last.safetensors")
    best = load_file(run / "checkpoint" / "best.safetensors")
    assert all(
        torch.equal(best[name], tensor) for name, tensor in load_file(run / "model.safetensors").items()
    )
    assert not torch.equal(last["average.head.weight"], last["model.head.weight"])


def test_accumulated_passes_are_one_batch(data, tmp_path):
    """Without a batch norm that counts: the gradient of the mean is the mean of the gradients."""
    options = {**TINY.options, "dropout": 0.0, "drop_path": 0.0}
    config = replace(TINY, epochs=1, batch_size=22, options=options, label_smoothing=0.0)
    rows = [
        json.loads((train(replace(config, accumulate=n), data, tmp_path / str(n)) / "log.json").read_text())[
            0
        ]
        for n in (1, 2)
    ]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=0.05)


def test_unreadable_images_are_left_out_and_named_up_to_one_in_a_hundred(tmp_path, capsys):
    for split, count in (("train", 101), ("val", 2)):
        for level, name in ((40, "dark"), (200, "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (level, level, i)).save(
                    tmp_path / "data" / split / name / f"{i}.png"
                )
    broken = sorted((tmp_path / "data" / "train" / "dark").iterdir())
    for path in broken[:2]:
        path.write_bytes(path.read_bytes()[:40])
    config = replace(TINY, epochs=1, batch_size=64)
    train(config, tmp_path / "data", tmp_path / "run")
    told = capsys.readouterr().out
    assert "2 training images were left out" in told
    assert all(path.name in told for path in broken[:2])
    broken[2].write_bytes(b"")
    with pytest.raises(BadInput, match="3 of 202 training images cannot be read, over 1%"):
        train(config, tmp_path / "data", tmp_path / "other")


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
    monkeypatch.setattr(Progress, "epoch", stop)
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
        ({"precision": "fp16"}, "fp16"),
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


def rates(config: TrainConfig, steps_per_epoch: int = 10) -> list[float]:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config, steps_per_epoch)
    found = []
    for step in range(config.epochs * steps_per_epoch):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = replace(TINY, lr=1.0, epochs=5, warmup_epochs=1, warmup_lr=0.2, min_lr=0.1)
    found = rates(config)
    assert found[:10] == pytest.approx([0.2 + 0.08 * i for i in range(10)])
    # The cosine's clock runs from the first step.
    assert found[10:] == pytest.approx([0.1 + 0.45 * (1 + np.cos(np.pi * i / 50)) for i in range(10, 50)])


def test_learning_rate_falls_by_a_power_or_in_steps():
    config = replace(TINY, lr=1.0, epochs=10, warmup_epochs=0)
    assert rates(replace(config, schedule="poly")) == pytest.approx(
        [(1 - i / 100) ** 0.9 for i in range(100)]
    )
    found = rates(replace(config, schedule="steps", drops=(0.5, 0.8)))
    # timm's milestones fall one step early.
    assert found == pytest.approx([1.0] * 49 + [0.1] * 30 + [0.01] * 21)


def test_learning_rate_is_scaled_by_the_parameters_name():
    config = replace(TINY, lr=1.0, lr_scale={"weight": 0.1})
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    make_schedule(optimizer, config, 1).step_update(config.warmup_epochs)
    found = {tuple(group["params"][0].shape): group["lr"] for group in optimizer.param_groups}
    assert found[(2, 2)] == pytest.approx(0.1 * found[(2,)])


def test_override_reads_text_by_the_settings_own_type():
    config = override(
        TINY, {"lr": "1e-4", "epochs": "7", "device": "cuda", "transmix": "true", "options.dim": "16"}
    )
    assert (config.lr, config.epochs, config.device, config.transmix) == (1e-4, 7, "cuda", True)
    assert config.options == {**TINY.options, "dim": "16"}
    assert TINY.options["dim"] == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "1"), ("options", "x"), ("lr", "fast"), ("epochs", "1.5"), ("epochs", "0"),
        ("lr", "nan"), ("crop_pct", "1.1"), ("seed", "-1"), ("precision", "int8"), ("transmix", "maybe"),
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

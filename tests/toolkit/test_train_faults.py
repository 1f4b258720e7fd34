"""Training that meets bad data, full disks and foreign checkpoints, by the command that a user types."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitkit.cli.main import main
from vitkit.data.coco.ids import read_ids, write_ids
from vitkit.data.scenes import write_scenes
from vitkit.evaluate import evaluate, open_network
from vitkit.train import checkpoint, loop
from vitkit.train.classification import ClassificationTraining
from vitkit.train.config import TrainConfig
from vitkit.train.panoptic import PanopticTraining
from vitkit.train.progress import Progress
from vitkit.train.training_images import TrainingImages

SETTINGS = {
    "batch_size": 8, "device": "cpu", "track": "none", "warmup_epochs": 1, "options.image_size": 32,
    "options.n": 2, "options.dim": 8, "options.heads": 2, "options.iterations": 2,
    "options.encoder_layers": 1, "options.stem_width": 8, "options.stem_mid": 8,
}  # fmt: skip
PANOPTIC = {
    "batch_size": 4, "device": "cpu", "track": "none", "samples": 64, "options.image_size": 65,
    "options.heads": 4, "options.queries": 12, "options.query_width": 16, "options.mask_width": 8,
    "options.ffn_width": 32, "options.aspp_width": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """22 images to train on, which are three steps an epoch, and 10 to validate."""
    return write_pictures(tmp_path_factory.mktemp("data") / "data")


def arguments(recipe: str, settings: dict[str, object], *more: object) -> list[str]:
    pairs = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    return ["train", recipe, "--epochs", "2", *pairs, *map(str, more)]


def command(*words: str) -> int:
    """Run the command line in this process, for its exit code; what is a bug comes out as an exception."""
    terminated = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vitkit", *words])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            signal.signal(signal.SIGTERM, terminated)
    return 0


@pytest.fixture
def vitkit(capsys):
    """Runs `vitkit train`; returns (exit code, output, errors)."""

    def run(*more: object, recipe: str = "ps_vit_nano_demo", settings: dict[str, object] = SETTINGS):
        code = command(*arguments(recipe, settings, *more))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """The run that is never disturbed."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    command(*arguments("ps_vit_nano_demo", SETTINGS, "--data", data, "-o", out))
    return out


def assert_equal_runs(one: Path, two: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    told = [
        [(row["epoch"], row["loss"], row["lr"], row["top1"]) for row in json.loads(text.read_text())]
        for text in (one / "log.json", two / "log.json")
    ]
    assert told[0] == told[1]
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


# --- the data


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("one class", ("holds the class 'dark' alone", "train/CLASS/")),
        ("empty class", ("hold no image", "grey", "rmdir")),
        ("other suffix", ("hold no image", "grey", ".jpg", ".png")),
        ("no val", ("val is missing", "measured on")),
        ("val images", ("1 of 10 validation images cannot be read, over 1%", "val/dark/0.png")),
    ],
)
def test_image_folders_that_cannot_be_trained_on_are_refused_before_training(vitkit, tmp_path, fault, words):
    folder = write_pictures(tmp_path / "data", names=("dark",) if fault == "one class" else ("dark", "light"))
    if fault in ("empty class", "other suffix"):
        (folder / "train" / "grey").mkdir()
    if fault == "other suffix":
        Image.new("RGB", (8, 8)).save(folder / "train" / "grey" / "a.pdf")
    if fault == "no val":
        shutil.rmtree(folder / "val")
    if fault == "val images":
        (folder / "val" / "dark" / "0.png").write_bytes(b"")
    code, told, error = vitkit("--data", folder, "-o", tmp_path / "run")
    assert code == 2
    assert told == ""
    assert all(word in error for word in words)
    assert not (tmp_path / "run").exists()


def test_a_class_without_validation_images_is_said(vitkit, tmp_path):
    folder = write_pictures(tmp_path / "data")
    for path in (folder / "val" / "dark").iterdir():
        path.unlink()
    code, told, _ = vitkit("--data", folder, "-o", tmp_path / "run", "--epochs", 1)
    assert code == 0
    assert told.splitlines()[0] == "no validation images of: dark"


def test_unreadable_images_of_all_kinds_are_said_once_and_accuracy_counts_the_others(vitkit, tmp_path):
    folder = write_pictures(tmp_path / "data", train=100, val=51)
    dark = folder / "train" / "dark"
    jpeg = dark / "cut.jpg"
    Image.open(dark / "7.png").save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-50])
    (dark / "0.png").write_text("no image")
    lost = folder / "val" / "light" / "3.png"
    lost.write_bytes(lost.read_bytes()[:100])
    code, told, _ = vitkit("--data", folder, "-o", tmp_path / "run", "--set", "batch_size=64")
    assert code == 0
    lines = told.splitlines()
    heading = lines.index("2 training images were left out:")
    assert lines[heading - 1].startswith("epoch 1/2")
    assert [Path(line.split()[0]).name for line in lines[heading + 1 : heading + 3]] == ["0.png", "cut.jpg"]
    assert told.count("left out") == 2
    assert told.count(f"validation image left out: {lost}") == 1
    lost.unlink()
    network = open_network(tmp_path / "run")
    best = json.loads((tmp_path / "run" / "card.json").read_text())["provenance"]["top1"]
    assert best == pytest.approx(evaluate(network, folder / "val").top1)


def test_an_image_pasted_into_others_is_counted_once(tmp_path):
    folder = write_scenes(tmp_path / "data", train=12, val=2, size=65)
    broken = sorted((folder / "train").iterdir())[4]
    broken.write_bytes(broken.read_bytes()[:200])
    config = TrainConfig(model="remax_nano", options={"image_size": 65}, copy_paste=1.0, device="cpu")
    samples = TrainingImages(PanopticTraining(config, folder))
    found = [samples[i, seed] for seed in range(10) for i in range(12)]
    assert sum(bool(reasons) for _, reasons, _ in found) > 12
    assert len(set().union(*(reasons for _, reasons, _ in found))) == 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=6, val=4, size=65)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("category", ("panoptic_val.json", "'category_id' is 99")),
        ("cut off", ("panoptic_val.json", "cannot be read as JSON")),
        ("stray id", ("000000.png", "[7000000]", "1 of 4 validation images")),
        ("absent id", ("000000.png", "lacks the ids [77777]", "1 of 4 validation images")),
        ("size", ("000000.png", "(30, 30)", "(65, 65)")),
    ],
)
def test_wrong_panoptic_labels_are_refused_before_training(vitkit, scenes, tmp_path, fault, words):
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    labels = folder / "annotations" / "panoptic_val.json"
    body = json.loads(labels.read_text())
    segments = body["annotations"][0]["segments_info"]
    mask = labels.with_suffix("") / body["annotations"][0]["file_name"]
    if fault == "category":
        segments[0]["category_id"] = 99
    if fault == "absent id":
        segments.append({**segments[0], "id": 77777})
    labels.write_text(json.dumps(body)[: 500 if fault == "cut off" else None])
    if fault == "stray id":
        ids = read_ids(mask).copy()
        ids[:3, :3] = 7_000_000
        write_ids(mask, ids)
    if fault == "size":
        photo = folder / "val" / body["images"][0]["file_name"]
        photo.unlink()
        Image.new("RGB", (30, 30)).save(photo)
    given = ("--data", folder, "-o", tmp_path / "run")
    code, told, error = vitkit(*given, recipe="remax_nano_demo", settings=PANOPTIC)
    assert code == 2
    assert told == ""
    assert all(word in error for word in words)
    assert not (tmp_path / "run").exists()


def test_images_that_go_bad_cost_no_epoch(vitkit, data, straight, tmp_path, monkeypatch):
    """They are found by the measure at the end of an epoch, and restored before going on."""
    folder, steps = tmp_path / "data", []
    shutil.copytree(data, folder)
    bad = folder / "val" / "dark" / "2.png"
    whole = bad.read_bytes()

    def spoil(self, *_):
        steps.append(None)
        if len(steps) == 3:
            bad.write_bytes(whole[:100].ljust(len(whole), b"\0"))

    monkeypatch.setattr(Progress, "step", spoil)
    given = ("--data", folder, "-o", tmp_path / "run")
    code, _, error = vitkit(*given)
    assert code == 2
    assert "1 of 10 validation images" in error
    assert "dark/2.png" in error
    bad.write_bytes(whole)
    code, _, error = vitkit(*given, "--resume")
    assert code == 0, error
    # None of the six was taken again.
    assert len(steps) == 6
    assert_equal_runs(tmp_path / "run", straight)


def test_a_loss_that_explodes_stops_with_the_batch_and_a_sound_checkpoint(vitkit, data, tmp_path):
    out = tmp_path / "run"
    steep = {**SETTINGS, "lr": 100, "warmup_epochs": 0, "clip_norm": "inf"}
    code, _, error = vitkit("--data", data, "-o", out, "--epochs", 60, settings=steep)
    assert code == 2
    assert "no finite number" in error
    assert f"--init {out / 'checkpoint' / 'best.safetensors'}" in error
    listed = json.loads((out / "checkpoint" / "not_finite.json").read_text())
    assert len(set(listed)) == 7
    assert all(path in error and Path(path).is_file() for path in listed)
    state = load_file(out / "checkpoint" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("elsewhere", [True, False])
def test_of_several_processes_those_with_the_wrong_loss_are_named(
    vitkit, data, tmp_path, monkeypatch, elsewhere
):
    """Another process' part of the batch, as it would come from there."""
    monkeypatch.setattr(loop, "gather_object", lambda parts: [(False, ["theirs.png"]), *parts])
    if not elsewhere:
        monkeypatch.setattr(
            ClassificationTraining,
            "losses",
            lambda self, module, data, _: {"total": module(data[0]).sum() * np.nan},
        )
    else:
        # The loss is finite in both, their common gradient is not.
        monkeypatch.setattr(
            ClassificationTraining,
            "losses",
            lambda self, module, data, _: {"total": module(data[0]).abs().sum() ** 0.5 * 0},
        )
        monkeypatch.setattr(loop.Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    code, _, error = vitkit("--data", data, "-o", tmp_path / "run")
    assert code == 2
    listed = json.loads((tmp_path / "run" / "checkpoint" / "not_finite.json").read_text())
    assert ("theirs.png" in listed) == elsewhere
    assert len(listed) == 7 + elsewhere
    assert "--init" not in error


def test_a_killed_decoder_stops_the_training_and_it_goes_on(vitkit, data, straight, tmp_path, monkeypatch):
    if torch.multiprocessing.get_start_method() != "fork":
        pytest.skip("decoding processes of this platform do not see what the test changes")

    def sample(self, index, seed):
        if (
            torch.utils.data.get_worker_info()
            and (tmp_path / "run" / "checkpoint" / "last.safetensors").exists()
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, index, seed)

    whole = ClassificationTraining.sample
    monkeypatch.setattr(ClassificationTraining, "sample", sample)
    given = ("--data", data, "-o", tmp_path / "run")
    code, _, error = vitkit(*given, "--set", "workers=1")
    assert code == 2
    assert "a process that decodes images is gone" in error
    assert "--resume" in error
    assert "--set workers=" in error
    code, _, error = vitkit(*given, "--resume")
    assert code == 0, error
    assert_equal_runs(tmp_path / "run", straight)


# --- the disk


@contextmanager
def files_of_at_most(size: int):
    """Inside, the kernel refuses to let any file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# With a checkpoint after every step: which call of `save` has how much room (the weights have 23 kB, all
# of a checkpoint 72 kB), and which file cannot be written then.
MOMENTS = {
    "within an epoch": (4, 40_000, "last.safetensors"),
    "the best": (3, 8_000, "best.safetensors"),
    "after the best": (3, 40_000, "last.safetensors"),
    "the first of all": (1, 8_000, "last.safetensors"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_costs_no_checkpoint(vitkit, data, straight, tmp_path, monkeypatch, moment):
    call, size, file = MOMENTS[moment]
    folder, before, calls = tmp_path / "run" / "checkpoint", {}, []

    def crowded(*given):
        calls.append(None)
        if len(calls) != call:
            return save(*given)
        before.update({path.name: path.read_bytes() for path in folder.glob("*")})
        folder.mkdir(parents=True, exist_ok=True)
        # As a kill leaves it.
        (folder / ".tmpXYZ").write_bytes(b"torn")
        with files_of_at_most(size):
            return save(*given)

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", crowded)
    given = ("--data", data, "-o", tmp_path / "run", "--set", "save_minutes=0")
    code, _, error = vitkit(*given)
    assert code == 2
    assert f"{file} cannot be written" in error
    assert "File too large" in error
    first = moment == "the first of all"
    assert ("no checkpoint in" if first else "go on with --resume") in error
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert left.keys() - before.keys() == ({"best.safetensors"} if moment == "after the best" else set())
    assert left.get("last.safetensors") == before.get("last.safetensors")
    monkeypatch.setattr(checkpoint, "save", save)
    code, _, error = vitkit(*given, *([] if first else ["--resume"]))
    assert code == 0, error
    assert_equal_runs(tmp_path / "run", straight)


def test_a_disk_that_is_full_when_all_epochs_are_done_costs_nothing(
    vitkit, data, straight, tmp_path, monkeypatch
):
    def crowded(*given):
        with files_of_at_most(8_000):
            return finish(*given)

    finish = loop._finish
    monkeypatch.setattr(loop, "_finish", crowded)
    given = ("--data", data, "-o", tmp_path / "run")
    code, _, error = vitkit(*given)
    assert code == 2
    assert "all epochs are done" in error
    assert "go on with --resume" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]
    monkeypatch.setattr(loop, "_finish", finish)
    code, told, error = vitkit(*given, "--resume")
    assert code == 0, error
    assert told == ""
    assert_equal_runs(tmp_path / "run", straight)


# In a namespace of its own: on a disk of one megabyte, filled before the fifth checkpoint, then made
# read-only before the seventh, after the last epoch, and before it begins.
ON_A_SMALL_DISK = """
import contextlib, io, json, shutil, subprocess, sys
from pathlib import Path
from vitkit.cli.main import main
from vitkit.train import checkpoint, loop

arguments, disk, kept = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ballast, answers, calls = disk / "ballast", {}, []

def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)

def fill():
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass

def crowded(*given):
    calls.append(None)
    if len(calls) == 5:
        fill()
    if len(calls) == 7:
        mount("-o", "remount,ro")
    return save(*given)

def closed(*given):
    mount("-o", "remount,ro")
    return finish(*given)

def vitkit(name, *more):
    sys.argv, told = ["vitkit", *arguments, "-o", str(disk / "run"), *more], io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        answers[name] = 0, ""
        try:
            main()
        except SystemExit as ended:
            answers[name] = ended.code or 0, told.getvalue()

mount("-t", "tmpfs", "-o", "size=1m", "none")
save, finish = checkpoint.save, loop._finish
checkpoint.save, loop._finish = crowded, closed
vitkit("full")
ballast.unlink()
vitkit("read-only", "--resume")
mount("-o", "remount,rw")
vitkit("read-only at the end", "--resume")
vitkit("read-only at the start", "--resume")
mount("-o", "remount,rw")
checkpoint.save, loop._finish = save, finish
vitkit("mended", "--resume")
shutil.copytree(disk / "run", kept)
print(json.dumps(answers))
"""


def test_a_full_and_a_read_only_disk_cost_nothing(data, straight, tmp_path):
    alone = ["unshare", "--mount", "--user", "--map-root-user"]
    disk = tmp_path / "disk"
    disk.mkdir()
    trial = [*alone, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk in a namespace of their own")
    given = json.dumps(arguments("ps_vit_nano_demo", SETTINGS, "--data", data, "--set", "save_minutes=0"))
    done = subprocess.run(
        [*alone, sys.executable, "-c", ON_A_SMALL_DISK, given, disk, tmp_path / "kept"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for name, words in (
        ("full", ("last.safetensors cannot be written", "No space left", "go on with --resume")),
        ("read-only", ("cannot be written", "Read-only", "go on with --resume")),
        ("read-only at the end", ("all epochs are done", "Read-only", "go on with --resume")),
        ("read-only at the start", ("cannot be written", "Read-only")),
    ):
        assert answers[name][0] == 2
        assert all(word in answers[name][1] for word in words)
    assert answers["mended"] == [0, ""]
    assert_equal_runs(tmp_path / "kept", straight)


# --- the checkpoint


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    """A training that was stopped after its first epoch."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "epoch", lambda self, row: sys.exit(7) if row["epoch"] == 1 else None)
        assert command(*arguments("ps_vit_nano_demo", SETTINGS, "--data", data, "-o", out)) == 7
    return out


@pytest.fixture
def torn(stopped, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_checkpoint_of_another_training_is_refused_with_both_values(vitkit, data, torn, tmp_path):
    settings = {**SETTINGS, "lr": 0.5, "options.dim": 16}
    code, _, error = vitkit("--data", data, "-o", torn, "--resume", settings=settings)
    assert code == 2
    assert "lr=0.0015 (now 0.5), options.dim=8 (now 16)" in error
    three = write_pictures(tmp_path / "three", names=("dark", "grey", "light"))
    code, _, error = vitkit("--data", three, "-o", torn, "--resume")
    assert code == 2
    assert "other images or labels, options.num_classes=2 (now 3)" in error
    code, _, error = vitkit("--data", data, "-o", torn, "--resume")
    assert code == 0, error


def test_a_damaged_checkpoint_is_refused_with_what_can_be_saved(vitkit, data, torn, tmp_path):
    last, best = (torn / "checkpoint" / name for name in ("last.safetensors", "best.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    given = ("--data", data, "-o", torn, "--resume")
    code, _, error = vitkit(*given)
    assert code == 2
    assert "last.safetensors is damaged" in error
    assert f"in a new folder, with --init {best}" in error
    code, _, error = vitkit("--data", data, "-o", tmp_path / "new", "--init", best, "--epochs", 1)
    assert code == 0, error
    best.write_bytes(best.read_bytes()[:-1])
    code, _, error = vitkit(*given)
    assert code == 2
    assert "train again in a new folder" in error
    # Needed only when all epochs are done, and looked at before any.
    last.write_bytes(whole)
    code, told, error = vitkit(*given)
    assert code == 2
    assert told == ""
    assert "best.safetensors is damaged" in error


def test_a_checkpoint_that_does_not_fit_its_own_settings_is_refused(vitkit, data, torn):
    last = torn / "checkpoint" / "last.safetensors"
    with safe_open(last, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(last)
    del tensors["model.head.bias"]
    save_file(tensors, last, header)
    code, _, error = vitkit("--data", data, "-o", torn, "--resume")
    assert code == 2
    assert "does not fit" in error
    assert "head.bias" in error


def test_a_kill_while_a_finished_run_is_tidied_up_loses_nothing(vitkit, data, torn, straight, monkeypatch):
    def killed(*_):
        sys.exit(9)

    monkeypatch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=killed))
    given = ("--data", data, "-o", torn, "--resume")
    assert vitkit(*given)[0] == 9
    assert (torn / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    code, _, error = vitkit(*given)
    assert code == 2
    assert "holds a finished run" in error


def test_an_output_below_a_file_is_refused(vitkit, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, error = vitkit("--data", data, "-o", tmp_path / "file" / "run")
    assert code == 2
    assert f"{tmp_path / 'file'} is a file" in error

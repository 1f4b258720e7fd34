from __future__ import annotations

import json
import re
import resource
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vitkit.runtimes.errors import BadInput, BadRequest, MissingBackend
from vitkit.runtimes.files import check_output_folder
from vitkit.train import TrainConfig, track, train
from vitkit.train import classification as classification_module
from vitkit.train.checkpoint import State
from vitkit.train.classification import ClassificationTraining
from vitkit.train.curves import draw_curves
from vitkit.train.mixing import mix
from vitkit.train.progress import Progress
from vitkit.train.track import Tracker

# 22 images in batches of at most 4 are 6 steps an epoch.
STEPS = 6
TINY = TrainConfig(
    model="ps_vit_nano",
    options={
        "image_size": 32, "n": 2, "dim": 8, "heads": 2, "iterations": 2, "encoder_layers": 1,
        "stem_width": 8, "stem_mid": 8,
    },
    epochs=2, batch_size=4, lr=2e-3, warmup_epochs=1, crop_pct=1.0, crop_min=0.6, device="cpu",
)  # fmt: skip
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"), 11, 3)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run whose every step is tracked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(track, "EVERY", 1)
        return train(TINY, data, tmp_path_factory.mktemp("runs") / "run", progress=False)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by name."""
    events = EventAccumulator(str(run / "events"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def log_of(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "log.json").read_text())


def test_tensorboard_shows_the_log_against_the_steps(run):
    shown, log = scalars(run), log_of(run)
    assert {name for name in shown if name.startswith("epoch/")} == {f"epoch/{name}" for name in log[0]}
    for name in log[0]:
        assert [step for step, _ in shown[f"epoch/{name}"]] == [STEPS, 2 * STEPS]
        assert [value for _, value in shown[f"epoch/{name}"]] == pytest.approx([row[name] for row in log])


def test_steps_are_tracked_so_that_their_mean_is_the_epochs(run):
    shown = scalars(run)
    assert {name for name in shown if name.startswith("step/")} == {"step/loss", "step/lr"}
    assert [step for step, _ in shown["step/loss"]] == list(range(1, 2 * STEPS + 1))
    for i, row in enumerate(log_of(run)):
        part = slice(STEPS * i, STEPS * (i + 1))
        assert np.mean([value for _, value in shown["step/loss"][part]]) == pytest.approx(row["loss"])
        assert shown["step/lr"][part][-1][1] == pytest.approx(row["lr"])


def test_points_are_means_over_the_steps_between_them(tmp_path):
    tracker = Tracker("tensorboard", tmp_path, TINY)
    for number in range(1, 46):
        tracker.step(number, {"total": float(number), "dice": 0.5}, 0.1 * number)
    tracker.close()
    shown = scalars(tmp_path)
    assert shown["step/loss"] == [(1, 1.0), (20, 11.0), (40, 30.5)]
    assert shown["step/dice"] == [(1, 0.5), (20, 0.5), (40, 0.5)]
    assert shown["step/lr"] == [(n, pytest.approx(0.1 * n)) for n in (1, 20, 40)]


@pytest.mark.parametrize(("last", "resume"), [(4, False), (STEPS + 3, True)])
def test_a_resumed_training_does_not_double_its_curves(run, data, tmp_path, monkeypatch, last, resume):
    """Stopped some steps after the last checkpoint, or before the first one, with a value half written."""

    def stop(self, epoch, state, parts, lr):
        step(self, epoch, state, parts, lr)
        if epoch * STEPS + state.step == last:
            raise KeyboardInterrupt

    step, torn = Progress.step, tmp_path / "torn"
    monkeypatch.setattr(track, "EVERY", 1)
    monkeypatch.setattr(Progress, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, data, torn, progress=False)
    monkeypatch.setattr(Progress, "step", step)
    assert sorted(path.name for path in torn.iterdir()) == (
        ["checkpoint", "events"] if resume else ["events"]
    )
    (file,) = (torn / "events").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    void = [event.step for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert max(void) == last
    train(TINY, data, torn, resume=resume, progress=False)
    found, wanted = scalars(torn), scalars(run)
    timed = {"epoch/seconds", "epoch/images_per_second", "epoch/data_share"}
    assert found.keys() == wanted.keys()
    assert {n: found[n] for n in found.keys() - timed} == {n: wanted[n] for n in wanted.keys() - timed}


def test_nothing_is_opened_before_the_first_step_is_done(data, tmp_path, monkeypatch):
    monkeypatch.setattr(classification_module, "mix", lambda images, *rest: mix(images * float("nan"), *rest))
    with pytest.raises(BadInput, match="finite"):
        train(TINY, data, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]


def test_events_that_cannot_be_written_are_told(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events").write_text("in the way")
    with pytest.raises(BadRequest, match=r"events cannot be written.*track=none.*no checkpoint"):
        train(TINY, data, tmp_path / "run", progress=False)


def test_a_run_with_its_curves_may_still_be_replaced(run, tmp_path):
    check_output_folder(run)
    (run / "events.txt").write_text("mine")
    with pytest.raises(BadRequest, match="other files"):
        check_output_folder(run)
    (run / "events.txt").unlink()


@pytest.fixture
def no_tensorboard(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


def test_without_tensorboard_a_training_says_so_once_and_goes_on(data, tmp_path, capsys, no_tensorboard):
    done = train(replace(TINY, epochs=1), data, tmp_path / "run")
    told = capsys.readouterr().out
    assert told.count("TensorBoard is not installed") == told.count("pip install 'vitkit[tensorboard]'") == 1
    assert not (done / "events").exists()
    assert (done / "curves.png").exists()
    train(replace(TINY, epochs=1, track="none"), data, tmp_path / "quiet")
    assert "TensorBoard" not in capsys.readouterr().out


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_asked_for_and_not_installed_is_refused(
    package, data, tmp_path, monkeypatch, no_tensorboard
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingBackend, match=re.escape(f"pip install 'vitkit[{package}]'")):
        train(replace(TINY, track=package), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tracker_does_not_make_another_run(data, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(replace(TINY, track="none"), data, tmp_path / "run")
    monkeypatch.undo()
    resumed = train(replace(TINY, track="tensorboard"), data, tmp_path / "run", resume=True)
    assert [step for step, _ in scalars(resumed)["epoch/loss"]] == [2 * STEPS]
    assert "track" not in json.loads((resumed / "config.json").read_text())


class FakeWandb(types.ModuleType):
    """Records the calls, as W&B's own module would take them."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict] = []
        self.refusal: Exception | None = None

    def init(self, *, project, name, id, resume, dir, config):
        if self.refusal:
            raise self.refusal
        assert Path(dir).is_dir()
        given = {"project": project, "name": name, "id": id, "resume": resume, "dir": dir, "config": config}
        self.runs.append({**given, "logged": [], "exit": None})
        return self

    def log(self, values, *, step):
        self.runs[-1]["logged"].append((step, values))

    def finish(self, *, exit_code):
        self.runs[-1]["exit"] = exit_code


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_settings_and_the_log_and_goes_on_under_its_id(data, tmp_path, monkeypatch, wandb):
    def stop(*_):
        raise KeyboardInterrupt

    config, out = replace(TINY, track="wandb"), tmp_path / "porch"
    monkeypatch.setattr(Progress, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, data, out, progress=False)
    monkeypatch.setattr(Progress, "epoch", lambda *_: None)
    done = train(config, data, out, resume=True, progress=False)
    first, second = wandb.runs
    assert (first["project"], first["name"], first["resume"]) == ("vitkit", "porch", "allow")
    assert first["config"] == asdict(config)
    assert first["id"] == second["id"] != ""
    assert (first["exit"], second["exit"]) == (1, 0)
    log = log_of(done)
    for part, row, numbers in ((first, log[0], [1, STEPS]), (second, log[1], [2 * STEPS])):
        assert [step for step, _ in part["logged"]] == numbers
        assert part["logged"][-1][1] == {f"epoch/{name}": value for name, value in row.items()}
    train(replace(config, epochs=1), data, tmp_path / "other", progress=False)
    assert wandb.runs[2]["id"] != first["id"]


def test_wandb_that_does_not_start_is_told(data, tmp_path, wandb):
    wandb.refusal = wandb.Error("no key")
    with pytest.raises(BadRequest, match=r"no key.*wandb login.*WANDB_MODE=offline"):
        train(replace(TINY, track="wandb"), data, tmp_path / "run", progress=False)


def rows(epochs: int, parts: tuple[str, ...] = (), best: int = 1) -> list[dict[str, float]]:
    """A log that descends, whose best epoch is `best`."""
    return [
        {
            "epoch": i,
            "loss": 3 / i,
            **{name: 10.0**-n / i for n, name in enumerate(parts)},
            "lr": 1e-3 / i,
            "seconds": 2.0,
            "images_per_second": 40.0 + i % 3,
            "data_share": 0.1,
            "top1": 90.0 if i == best else 50.0,
        }
        for i in range(1, epochs + 1)
    ]


def drawn(path: Path, log: list[dict[str, float]]) -> np.ndarray:
    """The picture's pixels (H, W, 3)."""
    draw_curves(path, log, "top1", "top-1", "ps_vit_nano")
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def coloured(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(N, 2) rows and columns of the pixels that have exactly this colour."""
    return np.argwhere((pixels == colour).all(-1))


def test_the_runs_picture_is_that_of_its_log(run, tmp_path):
    drawn(tmp_path / "again.png", log_of(run))
    assert (tmp_path / "again.png").read_bytes() == (run / "curves.png").read_bytes()
    log = log_of(run)
    log[-1]["loss"] *= 2
    drawn(tmp_path / "other.png", log)
    assert (tmp_path / "other.png").read_bytes() != (run / "curves.png").read_bytes()


def test_a_star_marks_the_best_epoch(tmp_path):
    first, last = (drawn(tmp_path / "a.png", rows(9, best=best)) for best in (2, 8))
    height, width = first.shape[:2]
    places = [coloured(pixels, ORANGE).mean(0) for pixels in (first, last)]
    for row, column in places:
        assert row < height / 2
        assert column > width / 2
    # The axis spans 8 epochs and a margin of 5 % at each end: 6 epochs apart.
    blue = coloured(first, BLUE)
    line = blue[(blue[:, 0] < height / 2) & (blue[:, 1] > width / 2)][:, 1]
    assert places[1][1] - places[0][1] == pytest.approx((line.max() - line.min()) * 6 / 8, rel=0.03)


def test_one_epoch_is_four_marks(tmp_path):
    pixels = drawn(tmp_path / "one.png", rows(1))
    height, width = pixels.shape[:2]
    blue = coloured(pixels, BLUE)
    # The star lies on the mark of the measure.
    quarters = {(r < height / 2, c < width / 2) for r, c in np.vstack([blue, coloured(pixels, ORANGE)])}
    assert len(quarters) == 4


def test_a_long_panoptic_log_is_a_small_file(tmp_path):
    drawn(tmp_path / "long.png", rows(600, ("class", "dice", "mask_id", "instance", "semantic", "blocks")))
    assert (tmp_path / "long.png").stat().st_size < 150_000


def test_the_share_of_the_time_that_is_waited_for_data(data, tmp_path, monkeypatch, capsys):
    def slow(self, index, seed):
        time.sleep(0.02)
        return sample(self, index, seed)

    def slow_step(*arguments, **options):
        time.sleep(0.1)
        return cross_entropy(*arguments, **options)

    sample, cross_entropy = ClassificationTraining.sample, classification_module.F.cross_entropy
    config = replace(TINY, epochs=1)
    plain = log_of(train(config, data, tmp_path / "plain"))[0]
    assert 0 < plain["data_share"] < 1
    monkeypatch.setattr(classification_module.F, "cross_entropy", slow_step)
    assert log_of(train(config, data, tmp_path / "step"))[0]["data_share"] < 0.3
    monkeypatch.undo()
    monkeypatch.setattr(ClassificationTraining, "sample", slow)
    capsys.readouterr()
    row = log_of(train(config, data, tmp_path / "slow"))[0]
    # 6 steps of 3 images.
    assert row["data_share"] > 0.5
    assert row["data_share"] * row["seconds"] > 18 * 0.02
    assert f"data {100 * row['data_share']:.0f} % (0 workers)" in capsys.readouterr().out


def test_the_bar_shows_all_there_is_to_watch(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    state = State(step=4, seen=32, seconds=2.0, waited=0.5, sums={"total": 8.0, "dice": 1.0})
    task = types.SimpleNamespace(unit="top-1", metric="top1")
    with Progress(replace(TINY, workers=1), task, STEPS, True, Tracker("none", tmp_path, TINY)) as shown:
        shown.step(0, state, {}, 1e-3)
    told = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    for text in ("epoch 1/2", "loss 2.000", "dice 0.25", "lr 1.0e-03", "16 images/s", "left"):
        assert text in told
    assert "data 25 % (1 worker)" in told
    # In GB with one digit; the kernel's own peak is in KB.
    memory = float(re.search(r"([\d.]+) GB", told)[1])
    assert 0 < memory <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 + 0.05

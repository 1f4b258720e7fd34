"""`verify` and `evaluate` on devices: planted faults, each found; a sound device, bit for bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_bench import write_artifact
from test_miou import engine_of
from test_report import Page, column
from typer.testing import CliRunner

import vitkit
from vitkit.cli.main import app
from vitkit.devices import verify as module
from vitkit.devices.network import open_network_on
from vitkit.devices.registry import Device, write_devices
from vitkit.devices.verify import verify_on
from vitkit.evaluate import Network, evaluate, open_network
from vitkit.exporters.golden import write_golden
from vitkit.report import write_report
from vitkit.runtimes.card import read_card, write_card
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest, DeviceError, ExportFailed, RunFailed
from vitkit.runtimes.image import generated_photos, prepare_batch, sample_photos

pytest.importorskip("onnxruntime")

# What a device's Python runs as it starts: its ONNX Runtime is told to compute something else.
RUNTIME = """
import onnxruntime, numpy as np
run = onnxruntime.InferenceSession.run
def changed(self, names, feeds, *rest):
    outputs = run(self, names, feeds, *rest)
    {change}
    return outputs
onnxruntime.InferenceSession.run = changed
"""
REVERSED = RUNTIME.format(change="outputs = [value[:, ::-1] for value in outputs]")
ROUNDED = RUNTIME.format(change="outputs = [np.round(value / 2) * 2 for value in outputs]")
NAN = RUNTIME.format(change="outputs[0][0, 0] = np.nan")
SHORT = RUNTIME.format(change="outputs = [value[:, :2] for value in outputs]")
RAISES = RUNTIME.format(change="raise RuntimeError('no kernel')")
CRASHES = RUNTIME.format(change="import os; feeds['x'].max() > 250 and os.kill(os.getpid(), 11)")
NEAREST = """
import PIL.Image
resize = PIL.Image.Image.resize
PIL.Image.Image.resize = lambda self, size, resample=None, box=None: resize(self, size, 0, box)
"""


def device(folder: Path, code: str = "") -> Device:
    """Another Python on this machine, whose processes run `code` first."""
    folder.mkdir(exist_ok=True)
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    here = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    (site / "here.pth").write_text("\n".join(dict.fromkeys(here)))
    (site / "sitecustomize.py").write_text(code)
    return Device(
        "box", "local", python=str(environment / "bin/python"), folder=str(folder / "it's kept $HERE")
    )


def means(inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The network of `write_artifact`, by its definition."""
    return {"logits": inputs.astype(np.float64).mean(axis=(1, 2)).astype(np.float32)}


def with_golden(folder: Path, images: list[np.ndarray]) -> Path:
    write_artifact(folder)
    inputs = prepare_batch(images, read_card(folder).image)
    write_golden(folder, inputs, means(inputs), "x")
    write_card(replace(read_card(folder), files={**read_card(folder).files, "golden.npz": None}), folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return with_golden(tmp_path_factory.mktemp("artifact") / "means", generated_photos(4))


@pytest.fixture
def reference(artifact) -> Network:
    return Network(read_card(artifact), means, lambda: None)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Folders of noisy red, green and blue images, some of which have another colour than their folder."""
    folder, rng = tmp_path_factory.mktemp("labelled") / "set", np.random.default_rng(0)
    for true, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(7):
            pixels = rng.integers(0, 100, (20, 30, 3))
            pixels[..., true if i < 5 else (true + 1) % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_a_sound_device_returns_every_bit(artifact, reference, photo_folder, tmp_path):
    box, images = device(tmp_path), sample_photos(photo_folder, 20)
    found = verify_on(box, artifact, reference, images, folder=photo_folder)
    assert not found.broken
    assert [check.name for check in found.there] == ["golden", "images"]
    assert [check.summary() for check in found.there] == [check.summary() for check in found.here]
    (between,) = found.between
    assert (between.images, between.max_abs, between.agreement) == (20, 0.0, 1.0)
    assert found.unlike == ()
    first = found.sent
    # What is there is not sent again: only the golden inputs of another file are the same bytes too.
    assert first > sum((photo_folder / name).stat().st_size for name, _ in images)
    again = verify_on(box, artifact, reference, images, folder=photo_folder)
    assert again.sent == 0
    assert not list((tmp_path / "it's kept $HERE").glob("run.*"))


@pytest.mark.parametrize(
    ("code", "problem"),
    [(REVERSED, "change class"), (ROUNDED, "logits error"), (NAN, "not finite")],
    ids=["reversed", "rounded", "nan"],
)
def test_a_device_that_computes_otherwise_is_found(artifact, reference, tmp_path, code, problem):
    images = [(f"generated {i}", image) for i, image in enumerate(generated_photos(16, seed=1))]
    found = verify_on(device(tmp_path, code), artifact, reference, images)
    assert found.broken
    for checks in (found.there, found.between):
        assert any(problem in text for text in checks[-1].problems)
    assert not [check for check in found.here if check.problems]
    assert found.unlike == ()


def test_without_the_float_model_golden_pairs_and_this_machine_find_it(artifact, tmp_path):
    images = [(f"generated {i}", image) for i, image in enumerate(generated_photos(16, seed=1))]
    found = verify_on(device(tmp_path, REVERSED), artifact, None, images)
    assert found.broken
    assert [bool(checks[0].problems) for checks in (found.there, found.here, found.between)] == [1, 0, 1]


def test_a_device_that_prepares_images_otherwise_is_found(artifact, reference, photo_folder, tmp_path):
    images = sample_photos(photo_folder, 16)
    found = verify_on(device(tmp_path, NEAREST), artifact, reference, images, folder=photo_folder)
    assert found.unlike == tuple(name for name, _ in images)
    assert found.broken
    # The golden pairs are prepared already.
    assert not found.there[0].problems
    assert any("logits error" in text for text in found.there[1].problems)


def test_an_engine_that_crashes_there_is_a_finding(reference, tmp_path):
    dark, white = np.full((16, 16, 3), 9, np.uint8), np.full((16, 16, 3), 255, np.uint8)
    artifact, box = with_golden(tmp_path / "means", [dark, dark + 90]), device(tmp_path, CRASHES)
    found = verify_on(box, artifact, reference, [("dark", dark), ("white", white)])
    assert found.broken
    assert found.failure == "box: the engine crashed on 1.png (SIGSEGV)"


def test_an_engine_that_fails_there_is_a_finding(artifact, reference, tmp_path):
    found = verify_on(device(tmp_path, RAISES), artifact, reference, [])
    assert found.broken
    assert "box: the engine of" in found.failure
    assert "no kernel" in found.failure
    assert str(artifact) in found.failure


def test_outputs_that_the_card_does_not_describe(artifact, reference, tmp_path):
    with pytest.raises(DeviceError, match=r"box: what it returned on golden-0\.npy .*\[4, 2\], the card has"):
        verify_on(device(tmp_path, SHORT), artifact, reference, [])


def test_accuracy_is_that_of_the_outputs_there(artifact, labelled, tmp_path):
    with closing(open_network_on(device(tmp_path / "sound"), artifact, threads=1)) as there:
        found = evaluate(there, labelled)
    with closing(open_network(artifact, 1)) as here:
        assert found == evaluate(here, labelled)
    assert found.top1 == pytest.approx(100 * 5 / 7)
    # The outputs of the other are reversed: what is counted is what came back.
    with closing(open_network_on(device(tmp_path / "other", REVERSED), artifact)) as there:
        wrong = evaluate(there, labelled)
    assert wrong.predictions == tuple(2 - i for i in found.predictions)
    with (
        closing(open_network_on(device(tmp_path / "nan", NAN), artifact)) as there,
        pytest.raises(RunFailed, match=r"NaN or infinite values .*blue.0\.png"),
    ):
        evaluate(there, labelled)


def test_an_image_that_the_device_cannot_read_is_named(artifact, tmp_path):
    (tmp_path / "set/red").mkdir(parents=True)
    (tmp_path / "set/red/broken.png").write_bytes(b"no image")
    with (
        closing(open_network_on(device(tmp_path), artifact)) as there,
        pytest.raises(BadInput, match=r"box: .*red/broken\.png cannot be read as an image"),
    ):
        evaluate(there, tmp_path / "set")


def test_a_metric_that_stops_early_leaves_nothing_running(artifact, labelled, tmp_path):
    box = device(tmp_path)

    def stop(done, total):
        raise KeyboardInterrupt

    start = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        closing(open_network_on(box, artifact)) as there,
    ):
        evaluate(there, labelled, stop)
    assert time.monotonic() - start < 60
    assert not list(Path(box.folder).glob("run.*"))


def test_refused_before_the_device_is_reached(artifact, reference, run_folder, tmp_path):
    away = Device("box", "local", python="/no/python", folder=str(tmp_path))
    phone = Device("phone", "adb", "1", tool="benchmark_model")
    for refused, words in (
        (phone, "phone is a phone, whose benchmark_model measures but returns no outputs"),
        (replace(away, targets=("openvino",)), "compiled for onnx, and box is meant for openvino"),
    ):
        with pytest.raises(BadRequest, match=words):
            verify_on(refused, artifact, reference, [])
        with pytest.raises(BadRequest, match=words):
            open_network_on(refused, artifact)
    with pytest.raises(BadArtifact, match="is a training run, not an engine"):
        open_network_on(away, run_folder)
    with pytest.raises(BadRequest, match="is a run, which torch evaluates here"):
        open_network(run_folder, device="cpu")
    with pytest.raises(BadRequest, match="threads"):
        open_network_on(away, artifact, threads=0)


def test_no_room_for_outputs(artifact, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(BadRequest, match="compare fewer with --count N"):
        verify_on(Device("box", "local", python="/no/python"), artifact, reference, [])


def run_command(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_commands_and_the_page(artifact, photo_folder, labelled, tmp_path):
    pytest.importorskip("matplotlib")
    sound, other = device(tmp_path / "sound"), device(tmp_path / "other", REVERSED)
    names, file = [], ["--devices", tmp_path / "devices.toml"]
    write_devices({"box": sound, "odd": replace(other, name="odd")}, file[1])
    for name, code in (("box", 0), ("odd", 1)):
        options = ["--device", name, *file, "--images", photo_folder, "--count", 16]
        found, text = run_command("verify", artifact, *options, "--json")
        assert found == code
        body = json.loads(text)
        assert body["ok"] == (code == 0)
        assert body["machine"] == name
        assert body["between"][0]["images"] == 16
        assert (body["between"][0]["logits_max_abs"] == 0) == (code == 0)
        (tmp_path / f"verify-{name}.json").write_text(text)
        options = ["--data", labelled, "--device", f"{name}:cpu", *file]
        found, text = run_command("evaluate", artifact, *options, "--json")
        assert json.loads(text)["machine"] == name
        (tmp_path / f"evaluate-{name}.json").write_text(text)
        names += [tmp_path / f"verify-{name}.json", tmp_path / f"evaluate-{name}.json"]
    (tmp_path / "here.json").write_text(run_command("evaluate", artifact, "--data", labelled, "--json")[1])
    page = write_report([*names, tmp_path / "here.json"], tmp_path / "page.html").read_text()
    assert column(page, "Here and there", "figure").count("logits error") == 4
    (header, row) = Page(page).tables["Artifacts"]
    accuracy = {title: cell for title, cell in zip(header, row, strict=True) if title.startswith("top-1")}
    assert [title.rpartition(", ")[2] for title in accuracy] == ["on box)", "on odd)", "n 21)"]
    on_box, on_odd, here = (float(cell.split()[0]) for cell in accuracy.values())
    assert on_box == here != on_odd


def test_the_commands_in_words(artifact, labelled, tmp_path):
    write_devices({"box": device(tmp_path)}, tmp_path / "devices.toml")
    options = ["--device", "box", "--devices", tmp_path / "devices.toml"]
    code, text = run_command("verify", artifact, *options)
    assert code == 0
    for words in ("box:", "here:", "box against here:", "images: 16 images, top-1 agreement 100.00%"):
        assert words in text
    assert re.search(r"images +│ images +│ +│ +│ 16 ", text)
    assert re.search(r"golden +│ logits error +│ 0 +│ 0 +│ +│", text)
    assert "onnx fp32 on box: top-1" in run_command("evaluate", artifact, "--data", labelled, *options)[1]


def test_from_python_and_another_task(artifact, labelled, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    sound, odd = device(tmp_path / "sound"), replace(device(tmp_path / "other", REVERSED), name="odd")
    write_devices({"box": sound, "odd": odd}, tmp_path / "vitkit/devices.toml")
    checks = vitkit.verify(artifact, images=photo_folder, count=16, device="box")
    assert [(check.name, check.problems) for check in checks] == [("golden", ()), ("images", ())]
    with pytest.raises(ExportFailed, match=r"on odd what it should: there, golden: .*there against here, i"):
        vitkit.verify(artifact, device="odd:cpu")
    assert vitkit.evaluate(artifact, labelled, device="box").top1 == pytest.approx(100 * 5 / 7)
    with pytest.raises(BadRequest, match="for engines: export the network"):
        vitkit.evaluate(object(), labelled, device="box")
    engine, data = engine_of(tmp_path / "colours"), tmp_path / "maps"
    for i in range(3):
        for place in ("images", "labels"):
            (data / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generated_photos(1, i, (60, 40))[0]).save(data / f"images/{i}.png")
        Image.fromarray(np.full((60, 40), i, np.uint8)).save(data / f"labels/{i}.png")
    found, wrong = (vitkit.evaluate(engine, data, device=name) for name in ("box", "odd"))
    assert found == vitkit.evaluate(engine, data, device="cpu") != wrong


def test_damaged_results_are_refused(artifact, reference, tmp_path):
    found = verify_on(device(tmp_path), artifact, reference, [])
    body = found.to_json(artifact, read_card(artifact), "box")
    file = tmp_path / "result.json"
    for change in (
        {"format": 2},
        {"machine": None},
        {"ok": "yes"},
        {"failure": 1},
        {"checks": 1},
        {"here": [1]},
        {"between": [{}]},
        {"files": {}},
    ):
        file.write_text(json.dumps({**body, **change}))
        with pytest.raises(BadInput, match=r"result\.json"):
            write_report([file], tmp_path / "page.html")
    file.write_text(json.dumps(body))
    assert "Here and there" in write_report([file], tmp_path / "page.html").read_text()

"""The command line as a user meets it: exit codes, messages, JSON, files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoints import theirs

from vitkit.data.shapes import write_shapes
from vitkit.runs import load_run
from vitkit.runtimes.image import generated_photos


def vitkit(*arguments, code=0, cwd=None):
    """Run the installed command; returns (stdout, stderr) without colours."""
    command = [sys.executable, "-c", "from vitkit.cli.main import main; main()", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert run.returncode == code, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
    if code != 1 or "Traceback" in run.stderr:
        assert "Traceback" not in run.stderr
    return run.stdout, run.stderr


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", train=40, val=20, size=64)


def test_models_as_json_and_table():
    rows = json.loads(vitkit("models", "--json")[0])
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == 21
    assert by_name["ps_vit_ti_14"]["params"] == 4_777_902
    assert by_name["ps_vit_b_14_share"]["params"] == 16_910_254
    assert {"name", "task", "input", "params", "macs"} <= set(rows[0])
    table = vitkit("models")[0]
    assert "4,777,902" in table
    assert "top-1 75.6" in table
    assert "PQ 40.4" in table


def test_version():
    assert vitkit("--version")[0] == f"vitkit {metadata.version('vitkit')}\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_and_verbose_work_before_and_after_the_commands_name(place, tmp_path):
    def said(flag):
        out = tmp_path / f"{place}{flag}"
        command = ["data", "shapes", out, "--train", "10", "--val", "10", "--size", "16"]
        out, error = vitkit(*([flag, *command] if place == "before" else [*command, flag]))
        assert out == ""
        return error

    assert said("--quiet") == said("-q") == ""
    assert "10 training and 10 validation images" in said("-v")


def test_verbose_shows_how_an_engine_was_opened(artifact_of):
    artifact = artifact_of("onnx", "fp32")
    line = f"opened {artifact} on cpu in "
    assert line in vitkit("verify", artifact, "--verbose")[1]
    assert line not in vitkit("verify", artifact)[1]


def test_options_keep_their_help_and_the_log_options_are_on_every_command():
    for command in (["verify"], ["data", "check"], ["device", "add"]):
        text = vitkit(*command, "--help")[0]
        assert "--quiet" in text
        assert "Show what is done in more detail" in text
    assert "CPU threads of one run" in vitkit("bench", "--help")[0]


def test_verbose_and_quiet_exclude_each_other():
    assert "exclude each other" in vitkit("models", "-q", "-v", code=2)[1]


def test_a_program_that_imports_vitkit_decides_itself_what_it_shows():
    """The library logs to `vitkit` and prints nothing, whether or not logging is set up."""
    code = """
import logging, sys
if sys.argv[1] == "shown":
    logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
import vitkit
logging.getLogger("vitkit.part").warning("careful")
logging.getLogger("vitkit.part").info("done")
"""
    for setting, expected in (
        ("plain", ""),
        ("shown", "vitkit.part WARNING careful\nvitkit.part INFO done\n"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code, setting], capture_output=True, text=True, check=True
        )
        assert (run.stdout, run.stderr) == ("", expected)


def test_launchers_can_start_the_module():
    done = subprocess.run(
        [sys.executable, "-m", "vitkit", "models"], capture_output=True, text=True, check=True
    )
    assert "remax_t" in done.stdout


def test_every_command_has_help():
    text = vitkit("--help")[0]
    commands = re.findall(r"^│ (\w+) ", text, flags=re.MULTILINE)
    assert {
        "models",
        "import",
        "export",
        "verify",
        "evaluate",
        "bench",
        "inspect",
        "doctor",
        "predict",
    } <= set(commands)
    for command in commands:
        assert len(vitkit(command, "--help")[0]) > 200


def test_runs_have_a_default_folder_that_replaces_nothing(tmp_path, run_folder, shapes):
    torch.save(theirs(load_run(run_folder).model), tmp_path / "weights.pth")
    arguments = ("import", "weights.pth", "--format", "psvit", "--model", "ps_vit_nano")
    assert "runs/ps_vit_nano" in vitkit(*arguments, cwd=tmp_path)[1]
    before = (tmp_path / "runs/ps_vit_nano/model.safetensors").stat()
    assert "runs/ps_vit_nano exists already" in vitkit(*arguments, code=2, cwd=tmp_path)[1]
    assert (tmp_path / "runs/ps_vit_nano/model.safetensors").stat() == before
    arguments = ("train", "ps_vit_nano_demo", "--data", shapes, "--epochs", 1)
    assert "the run goes to runs/ps_vit_nano_demo" in "".join(vitkit(*arguments, cwd=tmp_path))
    assert load_run(tmp_path / "runs/ps_vit_nano_demo").card.task == "classification"
    assert "runs/ps_vit_nano_demo is not empty" in vitkit(*arguments, code=2, cwd=tmp_path)[1]


def test_import_export_verify_predict(tmp_path, run_folder, photo_folder):
    run = load_run(run_folder)
    torch.save({"state_dict": theirs(run.model)}, tmp_path / "weights.pth")
    vitkit(
        "import",
        tmp_path / "weights.pth",
        "--format",
        "psvit",
        "--model",
        "ps_vit_nano",
        "-o",
        tmp_path / "run",
    )
    imported = load_run(tmp_path / "run")
    assert imported.card.provenance["weights"]["imported"] == "weights.pth"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(imported.model(images), run.model(images))

    made = tmp_path / "engine"
    flags = (
        "--target",
        "onnx",
        "--precision",
        "int8",
        "--calib",
        photo_folder,
        "--calib-count",
        16,
        "-o",
        made,
    )
    out, err = vitkit("export", tmp_path / "run", *flags)
    assert re.search(r"images: 16 images, top-1 agreement .* ok", out)
    assert "making the int8 engine" in err

    report = json.loads(
        vitkit("verify", made, "--against", tmp_path / "run", "--images", photo_folder, "--json")[0]
    )
    assert report["ok"] is True
    assert [check["images"] for check in report["checks"]] == [4, 24]

    photo = photo_folder / "01.jpg"
    out, _ = vitkit("predict", made, photo, photo, "-o", tmp_path / "pictures")
    assert len(out.splitlines()) == 2
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["01-2.png", "01.png"]
    with Image.open(tmp_path / "pictures" / "01.png") as picture, Image.open(photo) as original:
        assert picture.width >= 512
        plain = original.convert("RGB").resize(picture.size)
        assert np.abs(np.asarray(picture, int) - np.asarray(plain, int)).mean() > 1, "nothing was drawn"


def test_evaluate_counts_right(tmp_path, run_folder, artifact_of):
    """Accuracy against labels that are made from the predictions themselves: 3 of 4 right."""
    photos = generated_photos(8, seed=20)
    run = load_run(run_folder)
    from vitkit.runtimes.image import prepare_batch

    inputs = torch.from_numpy(prepare_batch(photos, run.card.image))
    with torch.no_grad():
        order = run.model(inputs).argsort(dim=1, descending=True).tolist()
    for i, (photo, ranks) in enumerate(zip(photos, order, strict=True)):
        label = f"class {ranks[7 if i % 4 == 0 else 0]}"
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(photo).save(tmp_path / label / f"{i}.png")
    for network in (run_folder, artifact_of("onnx", "fp32"), artifact_of("openvino", "fp32")):
        body = json.loads(vitkit("evaluate", network, "--data", tmp_path, "--json")[0])
        assert (body["images"], body["top1"], body["top5"]) == (8, 75.0, 75.0)
        assert body["files"] == {
            name: hashlib.sha256((network / name).read_bytes()).hexdigest() for name in body["files"]
        }
        engine = network / "model.onnx"
        assert body["size_bytes"] == (engine.stat().st_size if engine.exists() else body["size_bytes"])
        assert (body["size_bytes"] is None) == (body["target"] == "torch")
        assert (body["artifact"], body["name"], body["data"]) == (network.name, "ps_vit_nano", str(tmp_path))
    (tmp_path / "stranger").mkdir()
    Image.fromarray(photos[0]).save(tmp_path / "stranger" / "x.png")
    assert "stranger" in vitkit("evaluate", run_folder, "--data", tmp_path, code=2)[1]


def test_inspect_tells_operators_by_precision(artifact_of):
    for target in ("onnx", "openvino"):
        body = json.loads(vitkit("inspect", artifact_of(target, "int8"), "--json")[0])
        assert sum(body["operators"]["int8"].values()) > 10
        assert body["files"].keys() >= {"golden.npz", "calibration.json"}
        assert (
            "int8" not in json.loads(vitkit("inspect", artifact_of(target, "fp32"), "--json")[0])["operators"]
        )
    assert "ps_vit_nano" in vitkit("inspect", artifact_of("onnx", "fp32"))[0]


def test_bench_compares_and_saves_raw_times(artifact_of, tmp_path):
    artifacts = [artifact_of(target, "fp32") for target in ("onnx", "openvino")]
    flags = ("--duration", 0.3, "--threads", 1, "--device", "cpu", "--json", tmp_path / "bench.json")
    out, _ = vitkit("bench", *artifacts, *flags)
    assert "onnx" in out
    body = json.loads((tmp_path / "bench.json").read_text())
    text = json.dumps(body)
    assert "times_ns" in text
    assert "n too small" in out


def test_doctor_speaks_json():
    checks = json.loads(vitkit("doctor", "--json")[0])
    assert all({"name", "ok", "detail", "remedy"} <= set(check) for check in checks)
    assert vitkit("doctor")[0]


def test_train_is_quiet_if_asked_and_recipes_are_shown(tmp_path, shapes):
    quick = ("--set", "batch_size=20", "--epochs", 1)
    command = ("train", "ps_vit_nano_demo", "--data", shapes, "-o", tmp_path / "run", *quick)
    assert vitkit(*command, "--quiet") == ("", "")
    assert "nothing to resume" in vitkit(*command, "--resume", code=2)[1]
    assert load_run(tmp_path / "run").card.labels[0] == "arrow"
    assert (
        "not empty"
        in vitkit("train", "ps_vit_nano_demo", "--data", shapes, "-o", tmp_path / "run", code=2)[1]
    )
    assert json.loads(vitkit("recipes", "ps_vit_nano_demo", "--json")[0])["model"] == "ps_vit_nano"
    assert "ps_vit_nano_demo" in vitkit("recipes")[0]


def broken_copy(artifact, folder):
    shutil.copytree(artifact, folder)
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def test_nothing_that_is_read_is_written_over(tmp_path, run_folder, artifact_of, photo_folder):
    shutil.copytree(run_folder, tmp_path / "run")
    err = vitkit("export", tmp_path / "run", "--target", "onnx", "-o", tmp_path / "run", code=2)[1]
    assert "which is read" in err
    assert (tmp_path / "run" / "model.safetensors").is_file()
    shutil.copy(photo_folder / "more/00.png", tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    assert (
        "in the way"
        in vitkit("predict", artifact_of("onnx", "fp32"), tmp_path / "a.png", "-o", tmp_path, code=2)[1]
    )
    assert (tmp_path / "a.png").read_bytes() == before
    names = ["a-2.png", "a.png", "b/a.png"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(before)
    vitkit(
        "predict", artifact_of("onnx", "fp32"), *(tmp_path / "in" / n for n in names), "-o", tmp_path / "out"
    )
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_verify_refuses_another_network(artifact_of, tmp_path):
    from vitkit.runs import save_run, untrained_run

    fp32 = artifact_of("onnx", "fp32")
    for name, options in (
        ("classes", {"num_classes": 5}),
        ("size", {"image_size": 32}),
        ("points", {"n": 5}),
    ):
        other = untrained_run("ps_vit_nano", options)
        save_run(tmp_path / name, other.model, other.card, {})
        assert "another network" in vitkit("verify", fp32, "--against", tmp_path / name, code=2)[1]
    assert "int8" in vitkit("verify", fp32, "--against", artifact_of("onnx", "int8"), code=2)[1]


BAD_CALLS = {
    "no such model": (["export", "resnet", "--untrained", "--target", "onnx", "-o", "a"], "resnet"),
    "name without untrained": (["export", "ps_vit_nano", "--target", "onnx", "-o", "a"], "--untrained"),
    "no such run": (["export", "nowhere", "--target", "onnx", "-o", "a"], "nowhere"),
    "no such target": (["export", "ps_vit_nano", "--untrained", "--target", "tpu", "-o", "a"], "tpu"),
    "no calibration": (
        ["export", "ps_vit_nano", "--untrained", "--target", "onnx", "--precision", "int8", "-o", "a"],
        "--calib DIR",
    ),
    "missing calibration": (
        [
            *[
                "export",
                "ps_vit_nano",
                "--untrained",
                "--target",
                "onnx",
                "--precision",
                "int8",
                "--calib",
                "nowhere",
                "-o",
                "a",
            ]
        ],
        "nowhere",
    ),
    "two batches": (
        [
            *[
                "export",
                "ps_vit_nano",
                "--untrained",
                "--target",
                "onnx",
                "--batch",
                "2",
                "--dynamic-batch",
                "-o",
                "a",
            ]
        ],
        "--dynamic-batch",
    ),
    "bad option": (
        [*["export", "ps_vit_nano", "--untrained", "--option", "n", "--target", "onnx", "-o", "a"]],
        "key=value",
    ),
    "no such artifact": (["verify", "nowhere"], "nowhere"),
    "images without reference": (["verify", "nowhere", "--images", "."], "--against"),
    "no such checkpoint": (
        [*["import", "x.pth", "--format", "psvit", "--model", "ps_vit_nano", "-o", "a"]],
        "x.pth",
    ),
    "no such format": ([*["import", "x.pth", "--format", "tf", "--model", "ps_vit_nano", "-o", "a"]], "tf"),
    "no such recipe": ([*["train", "nothing", "--data", ".", "-o", "a"]], "nothing"),
    "no such data": ([*["train", "ps_vit_nano_demo", "--data", "nowhere", "-o", "a"]], "nowhere"),
    "no image": ([*["predict", "nowhere", "x.png"]], "x.png"),
    "no bench": ([*["bench", "nowhere"]], "nowhere"),
    "unknown flag": ([*["bench", "nowhere", "--quick"]], "--quick"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_user_errors_are_one_line_with_code_2(arguments, words, tmp_path):
    out, err = vitkit(*arguments, code=2, cwd=tmp_path)
    assert words in err
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "bad input must leave nothing behind"


def test_a_broken_engine_exits_with_1_and_a_damaged_one_with_2(artifact_of, run_folder, tmp_path):
    assert (
        "model.onnx" in vitkit("verify", broken_copy(artifact_of("onnx", "fp32"), tmp_path / "a"), code=2)[1]
    )
    from vitkit.runs import save_run, untrained_run

    other = untrained_run("ps_vit_nano", {}, seed=5)
    labels = tuple(f"class {i}" for i in range(10))
    save_run(tmp_path / "other", other.model, replace(other.card, labels=labels), {})
    out, err = vitkit("verify", artifact_of("onnx", "fp32"), "--against", tmp_path / "other", code=1)
    assert "mean cosine" in out
    assert "does not do what the float model does" in err


def test_calibration_refuses_before_any_heavy_work(tmp_path, photo_folder):
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted(Path(photo_folder).glob("*.jpg"))[:5]:
        shutil.copy(path, folder)
    code = (
        "import sys\nfrom vitkit.cli.main import app\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\n"
        "except Exception as error:\n    print(type(error).__name__, 'torch' in sys.modules, error)\n"
    )
    flags = f"--target onnx --precision int8 --calib {folder} -o {tmp_path}/a"
    arguments = f"export ps_vit_nano --untrained {flags}".split()
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.stdout.startswith("BadInput False"), run.stdout + run.stderr
    assert "holds 5 images" in run.stdout

"""Rows of other people's packages: the examples installed and used, and broken ones named and skipped."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitkit import BadArtifact, BadRequest
from vitkit.exporters.targets import TARGETS, Target, check_request
from vitkit.runtimes.engine import RUNTIMES
from vitkit.runtimes.plugins import Rows
from vitkit.runtimes.tasks import TASKS, Task, task_module

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"
# Runs command lines in one process, since each would import torch again.
RUNNER = """
import json, sys
from typer.testing import CliRunner
from vitkit.cli.main import app
results = []
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(app, arguments)
    results.append([done.exit_code, done.stdout, done.stderr, repr(done.exception)])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with both examples, installed as pip does it."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    for name in ("zipped", "embedding"):
        # A copy, since building leaves its files beside the source.
        source = shutil.copytree(EXAMPLES / name, tmp_path_factory.mktemp(name) / name)
        subprocess.run([*pip, "--target", str(folder), str(source)], check=True, capture_output=True)
    return folder


def python(code: str, path: Path, *arguments: object, stdin: str = "") -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def vitkit(path: Path, *commands: list[object]):
    """(exit code, standard output, standard error, exception) of each command line."""
    lines = [list(map(str, command)) for command in commands]
    return json.loads(python(RUNNER, path, stdin=json.dumps(lines)))


def plugin(
    folder: Path, name: str, points: dict[str, dict[str, str]], modules: dict[str, str] | None = None
) -> None:
    """A package as pip leaves it in `folder`: metadata with its entry points, and its modules."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in rows.items())
        for group, rows in points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    for module, code in (modules or {}).items():
        (folder / f"{module}.py").write_text(code)


def test_a_strangers_target_goes_through_the_whole_chain(installed, run_folder, photo_folder, tmp_path):
    out = tmp_path / "engine"
    results = vitkit(
        installed,
        ["export", run_folder, "--target", "zipped", "-o", out],
        ["verify", out, "--against", run_folder, "--json"],
        ["predict", out, photo_folder / "01.jpg", "--json"],
        ["bench", out, "--duration", 0.2, "--scope", "engine"],
        ["export", run_folder, "--target", "zipped", "--precision", "int8", "--calib", photo_folder],
    )
    assert [code for code, *_ in results] == [0, 0, 0, 0, 1], results
    card = json.loads((out / "card.json").read_text())
    assert (card["target"], card["engine"], card["provenance"]["opset"]) == ("zipped", "model.zip", 20)
    checks = json.loads(results[1][1])["checks"]
    assert [check["ok"] for check in checks] == [True, True]
    assert len(json.loads(results[2][1])[0]["top"]) == 5
    assert "img/s" in results[3][1] or "images" in results[3][1]
    assert "zipped engines are float; use --target onnx" in results[4][3]


def test_a_strangers_task_goes_through_the_whole_chain(installed, run_folder, photo_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    card = json.loads((run / "card.json").read_text())
    (run / "card.json").write_text(json.dumps({**card, "task": "embedding"}))
    out, photo = tmp_path / "engine", photo_folder / "01.jpg"
    results = vitkit(
        installed,
        ["export", run, "--target", "openvino", "-o", out],
        ["verify", out, "--against", run, "--json"],
        ["predict", out, photo, "--json"],
        ["predict", out, photo, "-o", tmp_path / "drawn"],
        ["bench", out, "--duration", 0.2],
        ["evaluate", out, "--data", photo_folder],
    )
    assert [code for code, *_ in results] == [0, 0, 0, 0, 0, 1], results
    golden, images = json.loads(results[1][1])["checks"]
    assert golden["cosine"] > 0.99999
    assert images["cosine"] > 0.99999
    vector = json.loads(results[2][1])[0]["vector"]
    assert abs(sum(x * x for x in vector) - 1) < 1e-5
    assert (tmp_path / "drawn" / "01.png").is_file() or (tmp_path / "drawn" / "01.jpg").is_file()
    assert "embeddings have no metric" in results[5][3]


def test_own_names_are_found_without_entry_points(installed, artifact_of):
    code = """
import sys, vitkit
from vitkit.runtimes.engine import RUNTIMES
from vitkit.runtimes.tasks import TASKS
with vitkit.open_engine(sys.argv[1], task="classification"):
    read = [rows for rows in (RUNTIMES, TASKS) if "_entry_points" in vars(rows)]
loaded = [name for name in sys.modules if name.startswith(("zipped", "embedding"))]
print(len(read), loaded, "zipped" in RUNTIMES, "embedding" in TASKS, "zipped_exporter" in sys.modules)
"""
    assert python(code, installed, artifact_of("onnx", "fp32")).strip() == "0 [] True True False"


def test_devices_do_without_the_exporter(installed):
    """On a device there is no `vitkit.exporters`: what runs an engine must not import it."""
    code = """
import sys
sys.modules["vitkit.exporters"] = None
from vitkit.runtimes.engine import RUNTIMES, runtime_module
print(runtime_module("zipped").__name__, RUNTIMES["zipped"].sole)
"""
    assert python(code, installed).strip() == "zipped_runtime True"


def test_unknown_names_are_refused_with_those_of_plugins(installed, run_folder, tmp_path):
    folder = shutil.copytree(installed, tmp_path / "site")
    plugin(folder, "acme-broken", {"vitkit.targets": {"acme": "acme_broken:TARGET"}})
    ((code, _, shown, error),) = vitkit(folder, ["export", run_folder, "--target", "ziped"])
    assert code == 1
    assert "there is no target 'ziped'; the targets are onnx, openvino, tensorrt, tflite, zipped" in error
    assert "warning: the plugin 'acme' of vitkit.targets from acme-broken 1.0 (acme_broken:TARGET)" in shown
    assert "pip uninstall acme-broken" in shown


GOOD = "from vitkit.exporters.targets import Target\nTARGET = Target('m', '', (), ('fp32',))\n"
BROKEN = {
    "import error": ("import absent_package\n", "ModuleNotFoundError: No module named 'absent_package'"),
    "a vendor's crash": ("raise OSError('libacme.so: cannot open')\n", "OSError: libacme.so: cannot open"),
    "an exit": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "syntax": ("TARGET = (\n", "SyntaxError"),
    "no such object": ("X = 1\n", "AttributeError: module 'acme' has no attribute 'TARGET'"),
    "a dictionary": (
        "TARGET = {'module': 'm'}\n",
        "it is a dict; it must be a vitkit.exporters.targets.Target",
    ),
    "the class": (f"{GOOD}TARGET = Target\n", "it is a type; it must be a vitkit.exporters.targets.Target"),
    "another table's row": (
        "from vitkit.runtimes.tasks import Task\nTARGET = Task('a', 'b', 'c', 'd')\n",
        "it is a Task; it must be a vitkit.exporters.targets.Target",
    ),
    "a text for a tuple": (
        f"{GOOD}TARGET = TARGET._replace(packages='torch')\n",
        "its packages is 'torch'; vitkit.exporters.targets.Target wants",
    ),
    "nothing for a text": (f"{GOOD}TARGET = TARGET._replace(module=None)\n", "its module is None"),
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the module path, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("acme", "good")):
            del sys.modules[name]


def fresh() -> Rows[Target]:
    return Rows("vitkit.targets", Target, TARGETS.own)


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_and_skipped(code, reason, site, caplog):
    plugin(site, "acme-engines", {"vitkit.targets": {"acme": "acme:TARGET"}}, {"acme": code})
    plugin(site, "good-engines", {"vitkit.targets": {"good": "good:TARGET"}}, {"good": GOOD})
    rows = fresh()
    with caplog.at_level(logging.WARNING, "vitkit"):
        assert "acme" not in rows
        assert list(rows) == [*TARGETS.own, "good"]
        assert rows["good"].precisions == ("fp32",)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "the plugin 'acme' of vitkit.targets from acme-engines 1.0 (acme:TARGET) is skipped: "
    )
    assert reason in record.getMessage()
    assert "pip install --upgrade acme-engines" in record.getMessage()


def test_a_plugin_replaces_nothing(site, caplog):
    plugin(site, "acme-engines", {"vitkit.targets": {"onnx": "acme:TARGET"}}, {"acme": GOOD})
    rows = fresh()
    with caplog.at_level(logging.WARNING, "vitkit"):
        assert rows["onnx"] is TARGETS.own["onnx"]
        assert not caplog.records
        assert list(rows) == list(TARGETS.own)
        assert list(rows) == list(TARGETS.own)
    (record,) = caplog.records
    assert "acme-engines 1.0 (acme:TARGET) is skipped: the name 'onnx' is vitkit's own" in record.getMessage()
    assert "acme" not in sys.modules


def test_of_two_plugins_with_one_name_neither_is_taken(site, caplog):
    for name in ("acme", "good"):
        plugin(site, f"{name}-engines", {"vitkit.targets": {"fast": f"{name}:TARGET"}}, {name: GOOD})
    with caplog.at_level(logging.WARNING, "vitkit"):
        assert "fast" not in fresh()
    (record,) = caplog.records
    assert "acme-engines 1.0" in record.getMessage()
    assert "good-engines 1.0" in record.getMessage()
    assert "2 packages have the name 'fast'" in record.getMessage()


def test_a_row_whose_module_is_absent_is_an_error_that_names_the_plugin(site, monkeypatch):
    code = "from vitkit.runtimes.tasks import Task\nTASK = Task(*['acme_absent'] * 4)\n"
    plugin(site, "acme-tasks", {"vitkit.tasks": {"acme": "acme:TASK"}}, {"acme": code})
    monkeypatch.setattr("vitkit.runtimes.tasks.TASKS", Rows("vitkit.tasks", Task, TASKS.own))
    with pytest.raises(
        BadRequest, match=r"'acme' of vitkit.tasks from acme-tasks 1.0 .* 'acme_absent' as its"
    ):
        task_module("acme", "decode")
    with pytest.raises(BadArtifact, match=r"this vitkit has classification, .*acme"):
        task_module("absent", "decode")


def test_a_plugins_target_is_held_to_its_row(site, monkeypatch):
    code = f"{GOOD}TARGET = TARGET._replace(packages=('acme_sdk',), remedy='ask Acme for its SDK')\n"
    plugin(site, "acme-engines", {"vitkit.targets": {"acme": "acme:TARGET"}}, {"acme": code})
    monkeypatch.setattr("vitkit.exporters.targets.TARGETS", fresh())
    from vitkit import MissingBackend

    with pytest.raises(BadRequest, match="acme has fp32"):
        check_request("acme", "fp16", calibrated=False)
    with pytest.raises(MissingBackend, match=r"'acme_sdk' is needed .*; ask Acme for its SDK"):
        check_request("acme", "fp32", calibrated=False)


def test_every_own_row_would_pass_as_a_plugin():
    for rows in (TARGETS, RUNTIMES, TASKS):
        assert [rows._type_problem(row) for row in rows.own.values()] == [None] * len(rows.own)

import json
import subprocess
import sys
from importlib import metadata

import pytest

from vitkit import doctor
from vitkit.doctor import Finding, diagnose, table, to_json
from vitkit.runtimes.engine import RUNTIMES, Runtime

INFO = {
    "model": "A",
    "architecture": "x86_64",
    "cores": 4,
    "usable_cores": None,
    "features": ["avx2", "avx512f"],
    "governor": None,
    "load_average": None,
}


def named(checks: list[Finding], name: str) -> Finding:
    (found,) = [check for check in checks if check.name == name]
    return found


def check_target(target: str, package: str) -> Finding:
    return doctor._target(target, Runtime("vitkit.runtimes.onnx", package, target), [])


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_installed_targets_run_a_tiny_engine(target):
    pytest.importorskip(RUNTIMES[target].package)
    found = named(diagnose(), f"run {target}")
    assert found.ok
    assert "runs a tiny engine" in found.detail


def test_the_tiny_engine_is_what_its_comment_says():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(doctor._TINY_ONNX)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Flatten"]


def test_a_substitute_of_the_vendor_package_is_enough():
    package = pytest.importorskip("ai_edge_litert").__name__
    runtime = Runtime("vitkit.runtimes.tflite", "vitkit_absent_package", "tflite", substitute=package)
    found = doctor._target("tflite", runtime, [])
    assert found.ok
    assert found.detail.startswith(package)
    neither = doctor._target("tflite", runtime._replace(substitute="vitkit_absent_too"), [])
    assert neither.remedy == "pip install 'vitkit[tflite]'"


def test_a_missing_vendor_package_names_its_extra():
    found = check_target("onnx", "vitkit_absent_package")
    assert not found.ok
    assert found.remedy == "pip install 'vitkit[onnx]'"


@pytest.mark.parametrize("failure", ["ImportError('libfoo.so is missing')", "AttributeError('_ARRAY_API')"])
def test_a_broken_vendor_package_names_the_cause(tmp_path, monkeypatch, failure):
    (tmp_path / "vitkit_broken_package.py").write_text(f"raise {failure}")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = check_target("onnx", "vitkit_broken_package")
    assert not found.ok
    assert "installed but does not import" in found.detail
    assert failure.split("'")[1] in found.detail
    assert found.remedy == "pip install --force-reinstall vitkit_broken_package"


def test_a_vendor_package_that_cannot_run_names_the_cause(monkeypatch):
    def fail(target):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(doctor, "_run_tiny_engine", fail)
    found = check_target("onnx", "json")
    assert not found.ok
    assert "fails to run: RuntimeError: illegal instruction" in found.detail


def test_old_packages_are_named_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.1+cpu")
    found = doctor._package(doctor._Requirement("torch", "2.13", "train"))
    assert not found.ok
    assert found.detail == "2.9.1+cpu is too old; vitkit needs 2.13 or newer"
    assert found.remedy == "pip install --upgrade 'torch>=2.13'"


@pytest.mark.parametrize(
    ("version", "minimum", "old"),
    [
        ("2.13.0+cpu", "2.13", False),
        ("2.9", "2.13", True),
        ("10.0rc1", "9.5", False),
        ("unknown", "1", False),
    ],
)
def test_versions_compare_by_number(version, minimum, old):
    assert bool(doctor._too_old(version, minimum)) is old


def test_missing_packages_name_their_extra():
    found = doctor._package(doctor._Requirement("vitkit-absent-package", "1", "export"))
    assert (found.ok, found.remedy) == (False, "pip install 'vitkit[export]'")


def test_the_packages_come_from_vitkits_own_metadata():
    found = {(one.package, one.extra) for one in doctor._requirements()}
    assert {("numpy", None), ("onnxruntime", "onnx"), ("torch", "train"), ("nncf", "export")} <= found


def test_files_without_an_installation_are_noticed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    found = named(diagnose(), "vitkit")
    assert (found.ok, found.remedy) == (False, "pip install vitkit")


def test_a_cpu_without_the_instructions_says_what_follows():
    checks = doctor._cpu(INFO)
    assert not named(checks, "cpu int8").ok
    assert "bf16 would be emulated" in named(checks, "cpu bf16").detail
    assert named(checks, "cpu").detail == "A, x86_64, 4 cores, governor unknown"


def test_a_cpu_with_the_instructions_names_them():
    checks = doctor._cpu({**INFO, "features": ["asimd", "asimddp", "bf16"]})
    assert named(checks, "cpu int8").detail == "native: asimddp"
    assert named(checks, "cpu bf16").detail == "native: bf16"


def test_a_cpu_that_does_not_tell():
    checks = doctor._cpu({**INFO, "features": None})
    assert [check.name for check in checks] == ["cpu", "cpu features"]
    assert not checks[1].ok


def test_openvino_without_bf16_says_what_follows(monkeypatch):
    pytest.importorskip("openvino")
    from vitkit.runtimes import openvino as runtime

    class Core:
        available_devices = ("CPU", "GPU")

        def get_property(self, device, name):
            assert name == "OPTIMIZATION_CAPABILITIES"
            return ["FP32", "INT8"]

    monkeypatch.setattr(runtime, "_core", Core)
    devices, bf16 = doctor._openvino_devices()
    assert devices.detail == "CPU: FP32 INT8; GPU: FP32 INT8"
    assert not bf16.ok
    assert "refused here" in bf16.detail


def test_only_the_small_dependencies_are_needed_and_nothing_heavy_is_loaded():
    code = """
import json, sys
absent = ("onnxruntime", "openvino", "onnx", "rich", "psutil")
sys.modules.update(dict.fromkeys(absent))
from vitkit.doctor import diagnose, to_json
checks = to_json(diagnose())
assert not {"torch", "timm", "torchvision", "nncf", "onnxscript"} & set(sys.modules)
print(json.dumps(checks))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    checks = [Finding(**check) for check in json.loads(done.stdout)]
    for target in ("onnx", "openvino"):
        assert not named(checks, f"run {target}").ok
    assert named(checks, "python").ok


def test_findings_are_json():
    checks = diagnose()
    assert [Finding(**check) for check in json.loads(json.dumps(to_json(checks)))] == checks


def test_the_table_prints_commands_as_they_are():
    from rich.console import Console

    checks = [
        Finding("run a", False, "not installed", "pip install 'vitkit[onnx]'"),
        Finding("run b", False, "planned"),
        Finding("run c", True, "1.0"),
    ]
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as capture:
        console.print(table(checks))
    lines = capture.get().splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["MISSING", "-", "ok"]
    assert "pip install 'vitkit[onnx]'" in lines[0]

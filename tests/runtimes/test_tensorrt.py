"""Building and opening TensorRT engines: what is refused without it, and the whole where a GPU has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from typer.testing import CliRunner

from vitkit import BadArtifact, BadRequest, DeviceError, MissingBackend, exporters, open_engine
from vitkit.bench import BenchOptions, bench
from vitkit.bench.trtexec import find_trtexec
from vitkit.cli.main import app
from vitkit.exporters.tensorrt import build
from vitkit.runtimes.card import read_card, sha256, write_card
from vitkit.runtimes.engine import RUNTIMES, runtime_module
from vitkit.runtimes.image import generated_photos
from vitkit.runtimes.tensorrt_options import DIALECTS, Machine, dialect_of


def runtime():
    """The runtime where TensorRT and a GPU are; otherwise the test is skipped with the reason."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    module = import_module("vitkit.runtimes.tensorrt")
    try:
        here = module.machine()
    except DeviceError as error:
        pytest.skip(str(error))
    if dialect_of(here.tensorrt) is None:
        pytest.skip(f"no dialect for TensorRT {here.tensorrt}")
    return module, here


def has_tensorrt() -> bool:
    try:
        import_module("tensorrt")
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """A package made on the command line, and what that said."""
    folder = tmp_path_factory.mktemp("packages") / "a"
    command = [
        "export",
        str(run_folder),
        "--target",
        "tensorrt",
        "--precision",
        "fp16",
        "--trt-version",
        "11",
    ]
    result = CliRunner().invoke(app, [*command, "-o", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    return folder, result


@pytest.fixture
def package(exported):
    return exported[0]


def test_an_export_says_that_nothing_is_built(exported):
    folder, result = exported
    assert "not built yet" in result.stderr
    assert f"vitkit build {folder}" in " ".join(result.stderr.split())
    assert "golden: 4 images" in result.stdout
    card = read_card(folder)
    assert card.options["built"] is None
    assert card.options["build"] == {
        "version": "11",
        "strongly_typed": True,
        "flags": [],
        "float32_layers": [],
    }


@pytest.mark.skipif(has_tensorrt(), reason="TensorRT is installed")
def test_without_tensorrt_the_command_that_mends_it_is_named(package, tmp_path):
    for attempt in (
        lambda: open_engine(package),
        lambda: build(package),
        lambda: build(package, tmp_path / "built"),
        lambda: runtime_module("tensorrt"),
    ):
        with pytest.raises(MissingBackend, match=r"pip install 'vitkit\[tensorrt\]'"):
            attempt()
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "vitkit", "build", str(package), "-o", str(tmp_path / "built")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "vitkit[tensorrt]" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_says_so(package, tmp_path):
    shutil.copytree(package, tmp_path / "onnx")
    write_card(replace(read_card(package), target="onnx"), tmp_path / "onnx")
    with pytest.raises(BadRequest, match="made for onnx, which needs no building"):
        build(tmp_path / "onnx", tmp_path / "a")
    with pytest.raises(BadRequest, match="add -o FOLDER"):
        build(package, cuda_graph=True)
    with pytest.raises(BadRequest, match="which is read"):
        build(package, package)
    with pytest.raises(BadArtifact, match="does not exist"):
        build(tmp_path / "nowhere", tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    with pytest.raises(BadRequest, match="other files"):
        build(package, tmp_path / "a")


def test_tensorrt_runs_on_the_gpu_unasked(package):
    assert {name: row.device for name, row in RUNTIMES.items() if row.device != "cpu"} == {"tensorrt": "cuda"}
    for device in ("cpu", "gpu", "cuda:1"):
        with pytest.raises(
            DeviceError, match=f"tensorrt engines have no device '{device}', they run on cuda"
        ):
            open_engine(package, device=device)


def export_for(here: Machine, source, calibration, folder, precision):
    return exporters.export(
        source,
        folder,
        target="tensorrt",
        precision=precision,
        options={"trt_version": dialect_of(here.tensorrt)},
        calibration=calibration if precision == "int8" else None,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_built_engine_does_what_the_model_does(precision, source, calibration, tmp_path, monkeypatch):
    _, here = runtime()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_for(here, source, calibration, tmp_path / "package", precision)
    artifact, check = build(tmp_path / "package", tmp_path / "built", cuda_graph=precision == "fp16")
    assert not check.problems
    assert artifact.card.options["built"] == here._asdict()
    with open_engine(tmp_path / "built") as engine:
        inputs = engine.prepare(generated_photos(3, seed=1))
        first, second = engine.run_batched(inputs), engine.run_batched(inputs)
        assert all(np.array_equal(first[name], second[name]) for name in first)
        assert len(engine.session.operators()) > 3


def test_a_package_is_built_once(source, tmp_path, monkeypatch):
    module, here = runtime()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_for(here, source, None, tmp_path / "package", "fp32")
    build(tmp_path / "package")
    (plan,) = module.cache_folder().glob("*.plan")
    (timings,) = module.cache_folder().glob("*.timing")
    assert timings.stat().st_size > 0
    monkeypatch.setattr(module, "compile_engine", None)
    with open_engine(tmp_path / "package") as engine:
        assert engine(generated_photos(1)[0]).top
    plan.write_bytes(b"no engine")
    with pytest.raises(BadArtifact, match=plan.name):
        open_engine(tmp_path / "package")


def test_engines_of_other_machines_are_refused_by_their_card(source, tmp_path, monkeypatch):
    _, here = runtime()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_for(here, source, None, tmp_path / "package", "fp32")
    folder = tmp_path / "package"
    card = read_card(folder)
    (folder / "engine.plan").write_bytes(b"never read")
    there = Machine("8.6.2", "8.7", "linux-aarch64")
    files = {**card.files, "engine.plan": sha256(folder / "engine.plan")}
    options = {**card.options, "built": there._asdict()}
    write_card(replace(card, engine="engine.plan", files=files, options=options), folder)
    with pytest.raises(DeviceError, match=r"built by TensorRT 8\.6\.2.* here is .*vitkit build"):
        open_engine(folder)


def test_a_package_for_another_version_is_refused(source, tmp_path, monkeypatch):
    _, here = runtime()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = next(version for version in DIALECTS if version != dialect_of(here.tensorrt))
    exporters.export(
        source, tmp_path / "a", target="tensorrt", precision="fp32", options={"trt_version": other}
    )
    with pytest.raises(DeviceError, match=f"package for TensorRT {other}, here is {here.tensorrt}"):
        open_engine(tmp_path / "a")
    with pytest.raises(BadRequest, match="threads is 2"):
        open_engine(tmp_path / "a", threads=2)


def test_trtexec_agrees_with_the_bench(source, tmp_path, monkeypatch):
    _, here = runtime()
    if find_trtexec() is None:
        pytest.skip("there is no trtexec, neither in the PATH nor in /usr/src/tensorrt/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_for(here, source, None, tmp_path / "package", "fp32")
    (report,) = bench([tmp_path / "package"], BenchOptions(duration=0.5, pool_size=2, scopes=["engine"]))
    assert report.device == "cuda"
    assert "problem" not in report.cross_check
    # Copies and launches add to the GPU's own time, and take nothing from it.
    assert report.cross_check_ratio > 0.8

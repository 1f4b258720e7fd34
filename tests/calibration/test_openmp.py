"""How long torch's threads spin: set before torch is imported, wherever vitkit imports it first."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitkit.calibration import openmp
from vitkit.calibration.openmp import BUSY, IDLE, VARIABLE

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"exporters": "vitkit.exporters", "toolkit": "vitkit"}


def importers_of_torch() -> list[str]:
    """The packages and loose modules of vitkit that import torch, late or at once."""
    found = set()
    for room, package in ROOMS.items():
        for path in (ROOT / room).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            first = path.relative_to(ROOT / room).with_suffix("").parts[0]
            # A command imports the packages that it calls, see the test of commands.
            if first != "cli" and any(module.split(".")[0] in ("torch", "timm") for module in modules):
                found.add("vitkit.exporters" if room == "exporters" else f"{package}.{first}")
    return sorted(found)


def run(code: str, *arguments: str, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Torch is only looked for, which takes no time: the finder notes the variable and has no such package.
BLOCK = f"""
import importlib, os, sys
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append(os.environ.get({VARIABLE!r}))
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
"""
AT_THE_IMPORT = f"""{BLOCK}
try:
    importlib.import_module(sys.argv[1])
except ModuleNotFoundError as error:
    assert str(error) == "torch", error
print(*seen, os.environ.get({VARIABLE!r}))
"""
AT_A_COMMAND = f"""{BLOCK}
from vitkit.cli.main import app
try:
    app(sys.argv[1:], standalone_mode=False)
except Exception as error:
    print(error, file=sys.stderr)
print(*seen)
"""


def test_the_packages_that_import_torch_are_found():
    assert {"vitkit.exporters", "vitkit.models", "vitkit.train", "vitkit.runs"} <= set(importers_of_torch())


@pytest.mark.parametrize("module", importers_of_torch())
def test_the_limit_is_set_before_torch_is_imported(module):
    values = run(AT_THE_IMPORT, module).split()
    assert len(set(values)) == 1
    assert values[0] in (IDLE, BUSY)


# What each needs to come as far as torch; evaluate and verify read a run before.
COMMANDS = {
    "models": "",
    "recipes": "",
    "train": "ps_vit_nano_demo --data DATA",
    "import": "DATA/x.pth --format psvit --model ps_vit_nano",
    "export": "ps_vit_nano --untrained --target onnx -o DATA/a",
    "evaluate": "RUN --data DATA",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_limit_is_set_before_a_command_imports_torch(command, tmp_path, run_folder):
    places = {"DATA": str(tmp_path), "RUN": str(run_folder)}
    words = [command, *COMMANDS[command].split()]
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    seen = run(AT_A_COMMAND, *words).splitlines()[-1].split()
    assert set(seen) in ({IDLE}, {BUSY})


def test_what_the_user_set_stays():
    assert set(run(AT_THE_IMPORT, "vitkit.train", **{VARIABLE: "12345"}).split()) == {"12345"}
    assert set(run(AT_THE_IMPORT, "vitkit.train", OMP_WAIT_POLICY="active").split()) == {"None"}


def test_an_application_that_runs_engines_keeps_its_environment():
    code = f"import os, vitkit, vitkit.runtimes; print(os.environ.get({VARIABLE!r}))"
    assert run(code) == "None"


@pytest.mark.parametrize(
    ("running", "cores", "value"),
    [(1, 2, IDLE), (2, 2, BUSY), (5, 2, BUSY), (3, 8, IDLE), (5, 8, BUSY), (None, 2, IDLE)],
)
def test_threads_do_not_spin_where_others_want_the_cores(running, cores, value, tmp_path, monkeypatch):
    """`running` counts this process too, as the system does."""
    load = tmp_path / "loadavg"
    if running is not None:
        load.write_text(f"0.00 0.01 0.05 {running}/345 6789\n")
    monkeypatch.setattr(openmp, "_LOAD", load)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for name in (VARIABLE, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    openmp.limit_spinning()
    assert os.environ[VARIABLE] == value


def test_a_process_that_runs_now_and_then_is_not_counted(monkeypatch):
    lines = iter(f"0 0 0 {running}/9 1" for running in (4, 1, 4, 4, 4))
    monkeypatch.setattr(Path, "read_text", lambda self: next(lines))
    assert openmp._others_running() == 0


def test_busy_processes_are_seen():
    if not Path("/proc/loadavg").is_file():
        pytest.skip("the system does not count what runs")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        assert openmp._others_running() >= 1
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("given", [{}, {VARIABLE: "777"}])
def test_the_library_reads_the_limit_in_a_training(given, tmp_path):
    """By its own words: libgomp prints what it read, once it is loaded with torch."""
    command = [sys.executable, "-m", "vitkit", "train", "ps_vit_nano_demo", "--data", str(tmp_path / "none")]
    kept = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "OMP_WAIT_POLICY")}
    variables = {**kept, "OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "run")], env=variables, capture_output=True, text=True
    )
    assert "none" in done.stderr.splitlines()[-1]
    read = re.findall(rf"{VARIABLE} = '(\d+)'", done.stderr)
    if not read:
        pytest.skip("torch brings no GNU OpenMP here, or it is no longer the one that prints this")
    assert read in ([[given.get(VARIABLE)]] if given else [[IDLE], [BUSY]])


def test_loading_workers_and_spawned_processes_inherit_it():
    code = f"""
import os
from multiprocessing import get_context
import vitkit.train
from torch.utils.data import DataLoader

class Values:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return int(os.environ[{VARIABLE!r}])

loaded = [int(value) for value in DataLoader(Values(), num_workers=1, multiprocessing_context="fork")]
with get_context("spawn").Pool(1) as pool:
    print(*loaded, pool.apply(os.getenv, ({VARIABLE!r},)))
"""
    assert set(run(code).split()) in ({IDLE}, {BUSY})
    assert set(run(code, **{VARIABLE: "777"}).split()) == {"777"}

"""How long torch's threads spin: set before torch is imported, wherever vitkit imports it first."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitkit.calibration.openmp import _ITERATIONS, VARIABLE

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"exporters": "vitkit.exporters", "toolkit": "vitkit"}


def importers_of_torch() -> list[str]:
    """The packages and loose modules of vitkit that import torch, late or at once; cli by its entry."""
    found = set()
    for room, name in ROOMS.items():
        for path in (ROOT / room).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            if any(module.split(".")[0] in ("torch", "timm", "safetensors") for module in modules):
                first = path.relative_to(ROOT / room).with_suffix("").parts[0]
                found.add("vitkit.exporters" if room == "exporters" else f"{name}.{first}")
    return sorted("vitkit.cli.main" if name == "vitkit.cli" else name for name in found)


def run(code: str, *arguments: str, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Torch is only looked for, which takes no time: the finder notes the variable and has no such package.
AT_THE_IMPORT = f"""
import importlib, os, sys
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append(os.environ.get({VARIABLE!r}))
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
try:
    importlib.import_module(sys.argv[1])
except ModuleNotFoundError as error:
    assert str(error) == "torch", error
print(*seen, os.environ.get({VARIABLE!r}))
"""


def test_the_packages_that_import_torch_are_found():
    assert {"vitkit.exporters", "vitkit.models", "vitkit.train", "vitkit.runs"} <= set(importers_of_torch())


@pytest.mark.parametrize("module", importers_of_torch())
def test_the_limit_is_set_before_torch_is_imported(module):
    values = run(AT_THE_IMPORT, module).split()
    assert len(set(values)) == 1
    assert 0 < int(values[0]) <= 1000


def test_what_the_user_set_stays():
    assert set(run(AT_THE_IMPORT, "vitkit.train", **{VARIABLE: "12345"}).split()) == {"12345"}
    assert set(run(AT_THE_IMPORT, "vitkit.train", OMP_WAIT_POLICY="active").split()) == {"None"}


def test_an_application_that_runs_engines_keeps_its_environment():
    code = f"import os, vitkit, vitkit.runtimes; print(os.environ.get({VARIABLE!r}))"
    assert run(code) == "None"


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
    assert read == [given.get(VARIABLE, _ITERATIONS)] * len(read)


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
    assert set(run(code).split()) == {_ITERATIONS}
    assert set(run(code, **{VARIABLE: "777"}).split()) == {"777"}

"""The README's blocks work when they are run one after another, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
INSTALLS = re.compile(r"^(python3 -m venv|pip install)\b")


def run(language: str, text: str, folder: Path) -> str:
    command = {"bash": ["bash", "-euc", text], "python": [sys.executable, "-c", text]}[language]
    # In networks this small, two threads mostly wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**environment, "PATH": path},
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_works_in_order(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("nncf")
    said = []
    for language, text in BLOCKS:
        lines = [line for line in text.splitlines() if not INSTALLS.match(line)]
        if any(lines):
            said.append(run(language, "\n".join(lines), tmp_path))
    assert len(list((tmp_path / "pictures").iterdir())) == 10
    assert (tmp_path / "report.html").stat().st_size > 10_000
    label, probability = said[1].split()
    assert label in {folder.name for folder in (tmp_path / "shapes/val").iterdir()}
    assert 0.1 <= float(probability) <= 1
    assert re.match(r"\(129, 129\) has \d+ segments\n", said[-1])


def test_what_the_blocks_install_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for _, text in BLOCKS for line in text.splitlines() if INSTALLS.match(line)]
    assert any(line.startswith("pip install") for line in lines)
    named = re.findall(r"'(?:vitkit|\.)\[([\w,-]+)\]'", README)
    assert {"export", "onnx", "openvino", "tflite", "cli"} <= set(named)
    assert {extra for group in named for extra in group.split(",")} <= set(project["optional-dependencies"])


def test_the_first_page_is_short():
    before_tables = README[: README.index("\n|")]
    assert len(before_tables.split()) < 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links {target}"


def test_files_named_by_the_map_exist():
    """Central types are where docs/design.md places them."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| .+ \| ((?:[a-z_]+/)+[a-z_]*(?:\.py)?)[^|]*\|$", text, flags=re.MULTILINE)
    assert len(rows) > 20
    for types, place in rows:
        files = [ROOT / place] if place.endswith(".py") else [*(ROOT / place).glob("*.py")]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(?:[a-z]+\.)*([A-Z]\w+)`", types.split(" (protocol):")[0]):
            assert f"class {name}" in code, f"{name} is not in {place}"


def test_the_files_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`?((?:[a-z_]+/)+[a-z_]+\.\w+)\b", text) if "NAME" not in name}
    assert len(named) > 8
    assert not {name for name in named if not (ROOT / name).exists()}

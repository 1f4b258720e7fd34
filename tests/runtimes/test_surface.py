"""What `vitkit` shows and exports, and what a type checker knows of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitkit
import vitkit.runtimes

ROOT = Path(__file__).resolve().parents[2]
USER = """
import numpy as np
import vitkit

frame = np.zeros((480, 640, 3), np.uint8)
with vitkit.open_engine("engine", task="classification") as engine:
    result = engine(frame)
    print(result.label, result.probability, result.top[0].name)
    results = engine([frame, frame])
    print(results[0].label, engine("a.jpg").label, engine(["a.jpg", "b.jpg"])[1].label)
with vitkit.open_engine("engine", task="panoptic", device="cpu") as segmenter:
    print(segmenter(frame).segments[0].label, segmenter(frame).ids.shape)
with vitkit.open_engine("engine", task="semantic") as street:
    print(street(frame).classes.max(), street(frame).labels[0], street(frame).shares()[0])
with vitkit.open_engine("engine", task="tensors") as detector:
    print(detector(frame)["boxes"].shape, detector([frame])[0].by_name.keys())
with vitkit.open_engine("engine") as unknown:
    either = unknown(frame)
    if isinstance(either, vitkit.Panoptic):
        print(either.segments)
    elif isinstance(either, vitkit.Semantic):
        print(either.classes)
    elif isinstance(either, vitkit.Tensors):
        print(either.by_name)
    else:
        print(either.label)


def use(
    engine: vitkit.Engine, session: vitkit.Session
) -> vitkit.Classification | vitkit.Panoptic | vitkit.Semantic | vitkit.Tensors:
    print(session.plan, session.settings, session.operators(), engine.device)
    return engine(frame)


def first(result: vitkit.Classification, segment: vitkit.Segment) -> vitkit.Label:
    return result.top[0]
"""
# A misspelt name in place of each right one, and what mypy then says.
MISTAKES = {
    "result.label": ("result.lable", '"Classification" has no attribute "lable"'),
    "results[0].label": ("results[0].lable", '"Classification" has no attribute "lable"'),
    "results[0].label, ": ("results.label, ", '"list[Classification]" has no attribute "label"'),
    "result.top[0].name": ("result.top[0].title", '"Label" has no attribute "title"'),
    "segmenter(frame).segments[0].label": ("segmenter(frame).label", '"Panoptic" has no attribute "label"'),
    "street(frame).classes.max()": ("street(frame).ids.max()", '"Semantic" has no attribute "ids"'),
    'detector(frame)["boxes"]': ("detector(frame).boxes", '"Tensors" has no attribute "boxes"'),
    "print(either.classes)": ("print(either.segments)", '"Semantic" has no attribute "segments"'),
    "print(either.segments)": ("print(either.label)", '"Panoptic" has no attribute "label"'),
    "either = unknown(frame)": ("either = unknown(frame); either.lable", 'has no attribute "lable"'),
    "engine.device": ("engine.devise", 'has no attribute "devise"'),
    'task="panoptic"': ('task="poetry"', "No overload variant"),
    "session.plan": ("session.plans", '"Session" has no attribute "plans"'),
    "vitkit.Segment": ("vitkit.Segmemt", 'Name "vitkit.Segmemt" is not defined'),
    "engine(frame)\n    print(result": ("engine(480)\n    print(result", "No overload variant"),
}


def mypy(folder: Path, *programs: str) -> dict[str, str]:
    """What mypy --strict says of each program, by its number."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    # The folders of the repository are packages of one name only once installed, or gathered like this.
    (folder / "typed" / "vitkit").mkdir(parents=True)
    for path in (
        *(ROOT / "toolkit").iterdir(),
        *(ROOT / room for room in ("runtimes", "calibration", "exporters")),
    ):
        (folder / "typed" / "vitkit" / path.name).symlink_to(path)
    for number, program in enumerate(programs):
        (folder / f"user_{number}.py").write_text(program)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        os.devnull,
        "--python-version",
        "3.11",
    ]
    found = subprocess.run(
        [*command, *(f"user_{number}.py" for number in range(len(programs)))],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(folder / "typed")},
        capture_output=True,
        text=True,
    )
    assert found.returncode in (0, 1), found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith("user_")]
    # Vendors' packages come without types; that is not the user's.
    return {
        str(number): "\n".join(line for line in lines if line.startswith(f"user_{number}.py"))
        for number in range(len(programs))
    }


def test_a_misspelt_attribute_of_a_result_is_an_error(tmp_path):
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    embedded = [block for block in readme if "vitkit.open_engine" in block]
    assert embedded
    programs = [USER]
    for right, (wrong, _) in MISTAKES.items():
        assert USER.count(right) >= 1, right
        programs.append(USER.replace(right, wrong, 1))
    said = mypy(tmp_path, *programs, *embedded)
    for right in (0, *range(len(programs), len(said))):
        assert said[str(right)] == ""
    for number, (_, words) in enumerate(MISTAKES.values(), start=1):
        assert words in said[str(number)], (words, said[str(number)])


def test_everything_is_exported_and_shown():
    names = [*vitkit.runtimes.__all__, "__version__"]
    assert sorted(vitkit.__all__) == sorted(names)
    assert {"Classification", "Label", "Panoptic", "Segment", "open_engine"} <= set(vitkit.__all__)
    assert set(names) <= set(dir(vitkit))
    for name in vitkit.runtimes.__all__:
        assert getattr(vitkit, name) is getattr(vitkit.runtimes, name)
    space: dict[str, object] = {}
    exec("from vitkit import *", space)
    assert set(vitkit.__all__) <= set(space)
    with pytest.raises(AttributeError, match="no attribute 'open_engines'"):
        vitkit.open_engines  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'open_engines'"):
        vitkit.runtimes.open_engines  # noqa: B018


def test_looking_imports_nothing():
    code = (
        "import sys, vitkit\n"
        "assert 'open_engine' in dir(vitkit) and 'Segment' in vitkit.__all__\n"
        "assert 'numpy' not in sys.modules and 'vitkit.runtimes' not in sys.modules\n"
        "vitkit.open_engine\n"
        "assert 'vitkit.runtimes.panoptic' not in sys.modules\n"
        "vitkit.Segment\n"
        "assert 'vitkit.runtimes.panoptic' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

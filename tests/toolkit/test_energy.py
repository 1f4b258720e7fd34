import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench import write_artifact
from test_jetson import board

from vitkit.bench import BenchOptions, bench, energy, measure
from vitkit.bench.energy import open_meter

RANGE = 1_000_000


def packages(root: Path, *values: int) -> Path:
    zones = {}
    for i, value in enumerate(values):
        zone = f"sys/class/powercap/intel-rapl:{i}"
        zones |= {f"{zone}/name": f"package-{i}\n", f"{zone}/energy_uj": f"{value}\n"}
        zones |= {f"{zone}/max_energy_range_uj": f"{RANGE - 1}\n"}
        # A part of the package, whose energy is in the package's.
        part = f"{zone.rsplit('/', 1)[0]}/intel-rapl:{i}:0"
        zones |= {f"{part}/name": "core\n", f"{part}/energy_uj": "7\n", f"{part}/max_energy_range_uj": "9\n"}
    return board(root, zones)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(0, RANGE - 1), st.integers(0, RANGE - 1)),
    st.lists(st.tuples(st.integers(0, RANGE - 1), st.integers(0, RANGE - 1)), max_size=5),
)
def test_packages_add_up_over_their_wraps(tmp_path_factory, start, steps):
    root = packages(tmp_path_factory.mktemp("machine"), *start)
    meter = open_meter(root)
    assert meter.joules() == 0
    spent = [0, 0]
    for step in steps:
        spent = [a + b for a, b in zip(spent, step, strict=True)]
        packages(root, *((a + b) % RANGE for a, b in zip(start, spent, strict=True)))
        assert meter.joules() == pytest.approx(sum(spent) / 1e6)
    assert "RAPL" in meter.source


def test_no_counter_no_meter(tmp_path):
    assert open_meter(tmp_path) is None
    board(tmp_path, {"sys/class/powercap/intel-rapl:0/name": "psys"})
    assert open_meter(tmp_path) is None


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root reads everything")
def test_a_counter_that_only_root_reads_is_none(tmp_path):
    packages(tmp_path, 1)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").chmod(0)
    assert open_meter(tmp_path) is None


def tegrastats(folder: Path, monkeypatch, lines: str) -> Path:
    """A board whose tegrastats prints the given lines over and over."""
    tool = folder / "bin/tegrastats"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\nwhile :; do\n{lines}\nsleep 0.02\ndone\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return board(folder, {"etc/nv_tegra_release": "# R36"})


def test_rails_are_integrated(tmp_path, monkeypatch):
    lines = "echo 'RAM 1/2MB VDD_IN 8000mW/1mW'; sleep 0.02; echo noise; echo 'RAM 1/2MB VDD_IN 12000mW/1mW'"
    meter = open_meter(tegrastats(tmp_path, monkeypatch, lines))
    start, joules = time.monotonic(), meter.joules()
    seen = []
    while time.monotonic() < start + 0.6:
        seen.append(meter.joules())
        time.sleep(0.01)
    watts = (meter.joules() - joules) / (time.monotonic() - start)
    meter.close()
    assert 8 < watts < 12
    assert "rails" in meter.source


def test_an_idle_sensor_takes_no_energy_away(tmp_path, monkeypatch):
    meter = open_meter(
        tegrastats(tmp_path, monkeypatch, "echo 'RAM 1/2MB VDD_GPU -392mW/-392mW VDD_CPU 0mW/0mW'")
    )
    seen = []
    for _ in range(10):
        seen.append(meter.joules())
        time.sleep(0.02)
    meter.close()
    assert set(seen) == {0.0}


def test_a_board_without_rails_has_no_meter(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_FIRST_LINE_S", 0.2)
    assert open_meter(tegrastats(tmp_path, monkeypatch, "echo 'RAM 1/2MB GR3D_FREQ @[1,2]'")) is None


def test_a_board_without_the_tool_has_no_meter(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert open_meter(board(tmp_path, {"etc/nv_tegra_release": "# R36"})) is None


def test_a_bench_on_a_board_says_what_it_took(tmp_path, monkeypatch):
    tegrastats(tmp_path, monkeypatch, "echo 'RAM 1/2MB tj@40C VDD_IN 10000mW/1mW'")
    for module in (energy, measure):
        monkeypatch.setattr(module, "is_jetson", lambda root=None: True)
    monkeypatch.setattr(measure, "WARMUP_S", 0.001)
    artifact = write_artifact(tmp_path / "means")
    (one,) = bench([artifact], BenchOptions(duration=0.3, pool_size=2, scopes=["engine"], threads=1))
    assert one.environment["jetson_before"]["tegrastats"]["temperatures"] == {"tj": 40.0}
    assert one.environment["jetson_after"]["nvpmodel"] is None
    assert one.environment["throttled"] == []
    # 10 W over the recorded queries and the little between them.
    seconds = sum(one.times_ns) / 1e9
    assert 10 * seconds * 0.9 < one.energy["joules"] < 10 * seconds * 3
    assert one.joules_per_image == one.energy["joules"] / one.n
    assert one.to_json()["summary"]["joules_per_image"] == one.joules_per_image

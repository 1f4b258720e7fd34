import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.bench.jetson import (
    Core,
    board_state,
    is_jetson,
    joules,
    parse_tegrastats,
    throttled,
    throttling,
)
from vitkit.runtimes.errors import BadInput

# Lines of our own in the grammar that real boards use.
ORIN = (
    "03-01-2026 10:00:01 RAM 100/7000MB (lfb 2x4MB) SWAP 5/300MB (cached 1MB) CPU [3%@700,off,40%@1500] "
    "EMC_FREQ 7%@2000 GR3D_FREQ 55%@[600] NVDEC off VIC_FREQ 115 APE 200 cpu@51.5C gpu@-256C tj@60C "
    "VDD_IN 9000mW/8000mW VDD_SOC 1000mW/900mW"
)
AGX = "RAM 1/2MB CPU [0%@1] GR3D_FREQ 0%@0 GR3D2_FREQ 8%@9 VDD_GPU_SOC 5mW/6mW/7mW VIN_SYS_5V0 3mW/1mW/2mW"
MORE = "NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 4mW/0mW"


def test_a_whole_line():
    found = parse_tegrastats(ORIN + "\n")
    assert found.time == datetime(2026, 3, 1, 10, 0, 1)
    assert (found.ram_mb, found.swap_mb) == ((100, 7000), (5, 300))
    assert found.cores == (Core(3, 700), None, Core(40, 1500))
    assert (found.gpu_load, found.gpu_mhz) == (55, (600,))
    assert (found.emc_load, found.emc_mhz) == (7, 2000)
    assert found.temperatures == {"cpu": 51.5, "tj": 60.0}
    assert found.power_mw == {"VDD_IN": 9000, "VDD_SOC": 1000}
    assert found.watts == 9.0


def test_rails_add_up_where_none_is_the_input():
    found = parse_tegrastats(f"{AGX} {MORE}")
    assert found.power_mw == {"VDD_GPU_SOC": 5, "VIN_SYS_5V0": 3, "NC": 4, "VDDQ_VDD2_1V8AO": 301}
    assert found.watts == pytest.approx(0.008)
    assert (found.gpu_load, found.gpu_mhz) == (8, (0, 9))


# As two AGX Thor boards with JetPack 7 print it; the second one has no rail of the whole board.
THOR = (
    "05-14-2026 21:36:35 RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972,0%@972] VDD_GPU -392mW/-392mW "
    "VDD_CPU_SOC_MSS 3924mW/3835mW VIN_SYS_5V0 5064mW/5055mW"
)


def test_the_offset_of_an_idle_sensor_is_no_power():
    found = parse_tegrastats(THOR)
    assert found.power_mw == {"VDD_GPU": -392, "VDD_CPU_SOC_MSS": 3924, "VIN_SYS_5V0": 5064}
    assert found.watts == pytest.approx(3.924 + 5.064)
    assert parse_tegrastats(f"{THOR} VIN 15004mW/15096mW").watts == 15.004
    assert parse_tegrastats("RAM 1/2MB VIN -5mW/0mW").watts == 0
    assert parse_tegrastats("RAM 1/2MB GPU -5/-4 CPU 7/6").watts == 0.007


def test_a_rail_may_have_one_value():
    found = parse_tegrastats("RAM 1/2MB APE 174 VDD_GPU 5517mW VIN 28548mW")
    assert found.power_mw == {"VDD_GPU": 5517, "VIN": 28548}


def test_what_a_line_lacks_is_none():
    found = parse_tegrastats("RAM 4722/7844MB (lfb 1x512kB) EMC_FREQ 2%@1866 GR3D_FREQ @[10,20,30] APE 150")
    assert (found.gpu_load, found.gpu_mhz) == (None, (10, 20, 30))
    assert (found.time, found.swap_mb, found.cores, found.watts) == (None, None, (), None)


@pytest.mark.parametrize("line", ["", "hello", "tegrastats: not found", "CPU [0%@1]"])
def test_other_lines_are_refused(line):
    with pytest.raises(BadInput, match="no line of tegrastats"):
        parse_tegrastats(line)


name = st.from_regex(r"V[A-Z0-9_]{1,12}", fullmatch=True).filter(lambda text: text not in ("VIN", "VDD_IN"))
number = st.integers(0, 99999)
core = st.none() | st.tuples(st.integers(0, 100), number)


@settings(max_examples=60, deadline=None)
@given(
    date=st.none()
    | st.datetimes(datetime(2000, 1, 1), datetime(2099, 1, 1)).map(lambda t: t.replace(microsecond=0)),
    ram=st.tuples(number, number),
    cores=st.lists(core, min_size=1, max_size=12),
    gpu=st.none() | st.integers(0, 100),
    clocks=st.lists(number, max_size=3),
    bare=st.booleans(),
    temperatures=st.dictionaries(name, st.integers(-256000, 120000).map(lambda t: t / 1000), max_size=8),
    pairs=st.booleans(),
    rails=st.dictionaries(name, st.tuples(*[st.integers(-999, 99999)] * 3), max_size=6),
    values=st.integers(2, 3),
    unit=st.sampled_from(["", "mW"]),
)
def test_every_variant_of_the_grammar_comes_back(
    date, ram, cores, gpu, clocks, bare, temperatures, pairs, rails, values, unit
):
    load = "" if gpu is None else f"{gpu}%"
    clock = (
        f"@{clocks[0]}" if bare and len(clocks) == 1 else f"@[{','.join(map(str, clocks))}]" if clocks else ""
    )
    parts = [
        *([f"{date:%m-%d-%Y %H:%M:%S}"] if date else []),
        f"RAM {ram[0]}/{ram[1]}MB (lfb 1x4MB) IRAM 0/252kB(lfb 252kB)",
        f"CPU [{','.join('off' if c is None else f'{c[0]}%@{c[1]}' for c in cores)}]",
        *([f"GR3D_FREQ {load}{clock}"] if load or clock else []),
        "NVJPG1 729 VIC off MTS fg 0% bg 0% APE 174",
        *(f"{key}@{value:g}C" + (f"/{value:g}C" if pairs else "") for key, value in temperatures.items()),
        *(f"{key} " + "/".join(f"{v}{unit}" for v in value[:values]) for key, value in rails.items()),
    ]
    found = parse_tegrastats(" ".join(parts))
    assert found.time == date
    assert found.ram_mb == ram
    assert found.cores == tuple(c and Core(*c) for c in cores)
    assert found.gpu_load == gpu
    assert found.gpu_mhz == tuple(clocks)
    assert found.temperatures == {k: float(f"{v:g}") for k, v in temperatures.items() if v != -256}
    assert found.power_mw == {key: value[0] for key, value in rails.items()}
    assert found.watts is None or found.watts >= 0


# Read off each line by eye: total W, GPU MHz, cores that are on, RAM in use, hottest sensor.
REAL = [
    (5.139 + 3.268 + 5.5, (1300, 1300), 12, 20642, 52.968),
    (12.479, (621,), 6, 6185, 53.968),
    (4.824, (), 6, 3452, 50.25),
    (2.34 + 0.39 + 4.025, (0, 0), 12, 4321, 44.562),
    (2.39 + 0.796 + 3.522, (0, 0), 12, 2257, 41.656),
    (1.155 + 0.385 + 2.502 + 0.192 + 2.692, (1377,), 8, 408, 100.0),
    (0.463 + 0.618 + 2.936 + 0.309 + 3.306, (), 8, 14700, 100.0),
    (0.933, (76,), 4, 331, 100.0),
    (3.14, (), 6, 2020, 100.0),
    (None, (1000, 1000, 1000), 0, 4722, None),
    (2.763, (114,), 6, 3168, 50.0),
    (5.704, (305,), 6, 2461, 48.843),
    (2.003, (114,), 1, 1345, 100.0),
]


def test_lines_of_real_boards():
    path = SHARED / "tegrastats_samples.txt"
    if not path.is_file():
        pytest.skip(f"real tegrastats lines are not at {path}")
    lines = [line.split(" | ")[-1] for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(REAL)
    for line, (watts, clocks, cores, ram, hottest) in zip(lines, REAL, strict=True):
        found = parse_tegrastats(line)
        assert found.watts == (None if watts is None else pytest.approx(watts)), line
        assert found.gpu_mhz == clocks, line
        assert sum(core is not None for core in found.cores) == cores, line
        assert found.ram_mb[0] == ram, line
        assert max(found.temperatures.values(), default=None) == hottest, line
        rails = [
            part for part in line.split() if "/" in part and part.replace("mW", "").replace("/", "").isdigit()
        ]
        named = {"NC"} & set(line.split())
        assert len(found.power_mw) == len(rails) - len(named), line


# Energy


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 50))
def test_constant_power_is_power_times_time(steps, watts):
    times = [sum(steps[:i]) / 100 for i in range(len(steps))]
    samples = [(time, float(watts)) for time in times]
    assert joules(samples) == pytest.approx(watts * (times[-1] if times else 0))


def test_rising_power_is_a_triangle():
    assert joules([(0.0, 0.0), (1.0, 5.0), (2.0, 10.0)]) == pytest.approx(10.0)


def test_time_does_not_run_backwards():
    with pytest.raises(BadInput, match="backwards"):
        joules([(1.0, 1.0), (0.5, 1.0)])


# The board


def board(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_jetson_is_known_by_its_files(tmp_path):
    assert not is_jetson(tmp_path)
    assert not is_jetson(board(tmp_path / "pi", {"proc/device-tree/model": "Raspberry Pi 5\0"}))
    assert is_jetson(board(tmp_path / "a", {"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"}))
    assert is_jetson(board(tmp_path / "b", {"etc/nv_tegra_release": "# R36"}))


def test_the_state_of_a_board(tmp_path, monkeypatch):
    board(tmp_path, {"nvpmodel": "#!/bin/sh\necho NV Power Mode: 15W\necho 2\n"})
    board(tmp_path, {"tegrastats": f"#!/bin/sh\nwhile :; do echo '{ORIN}'; done\n"})
    for tool in ("nvpmodel", "tegrastats"):
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    state = json.loads(json.dumps(board_state()))
    assert state["nvpmodel"] == "NV Power Mode: 15W\n2"
    assert state["tegrastats"]["temperatures"] == {"cpu": 51.5, "tj": 60.0}
    assert state["tegrastats"]["gpu_mhz"] == [600]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert board_state()["nvpmodel"] is board_state()["tegrastats"] is None


def test_throttling(tmp_path):
    def state(hot: int, events: int) -> dict[str, int]:
        files = {
            "sys/class/thermal/cooling_device0/type": "pwm-fan",
            "sys/class/thermal/cooling_device0/cur_state": "3",
            "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
            "sys/class/thermal/cooling_device1/cur_state": str(hot),
            "sys/class/hwmon/hwmon3/oc2_event_cnt": str(events),
        }
        return throttling(board(tmp_path, files))

    cool, hot, starved = state(0, 7), state(1, 7), state(0, 9)
    assert cool == {"gpu-throttle-alert": 0, "oc2": 7}
    assert throttled(cool, cool) == []
    assert throttled(cool, hot) == throttled(hot, cool) == ["gpu-throttle-alert"]
    assert throttled(cool, starved) == ["oc2"]
    assert throttled({}, {}) == []

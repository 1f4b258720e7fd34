import json
import os
from pathlib import Path

import pytest

from vitkit.bench import cpu
from vitkit.bench.cpu import cpu_info, load_average

X86 = """processor\t: 0
model name\t: Intel(R) Core(TM) i5-1240P
flags\t\t: fpu sse2 avx2 avx_vnni f16c
vmx flags\t: vnmi avx512f

processor\t: 1
model name\t: Intel(R) Core(TM) i5-1240P
flags\t\t: fpu sse2 avx2 avx_vnni
"""
BIG_LITTLE = """processor\t: 0
Features\t: fp asimd fphp asimdhp asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd46

processor\t: 1
Features\t: fp asimd fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""


def machine(root: Path, cpuinfo: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/cpuinfo": cpuinfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_x86(tmp_path):
    info = cpu_info(machine(tmp_path, X86, {}))
    assert info["model"] == "Intel(R) Core(TM) i5-1240P"
    assert info["features"] == ["avx2", "avx_vnni"]
    assert info["governor"] is None


def test_arm_counts_a_feature_only_where_every_core_has_it(tmp_path):
    board = {"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"}
    info = cpu_info(machine(tmp_path, BIG_LITTLE, board))
    assert info["features"] == ["asimd", "asimdhp", "asimddp"]
    assert info["model"].startswith("NVIDIA Jetson Orin Nano / ")
    assert "part 0xd05" in info["model"]
    assert "part 0xd46" in info["model"]


def test_governors_of_all_cores(tmp_path):
    folder = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    files = {
        folder.format(0): "schedutil\n",
        folder.format(1): "performance\n",
        folder.format(2): "schedutil\n",
    }
    assert cpu_info(machine(tmp_path, X86, files))["governor"] == "performance, schedutil"


def test_a_system_that_tells_nothing(tmp_path, monkeypatch):
    for name in ("getloadavg", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "")
    info = cpu_info(tmp_path)
    assert {name for name, value in info.items() if value is not None} == {"cores"}


def test_the_load_average_may_be_unobtainable(monkeypatch):
    def refuse():
        raise OSError("unobtainable")

    monkeypatch.setattr(os, "getloadavg", refuse, raising=False)
    assert load_average() is None


def test_this_machine():
    info = cpu_info()
    assert json.loads(json.dumps(info)) == info
    assert info["cores"] >= 1


@pytest.mark.parametrize("features", [cpu.INT8_FEATURES, cpu.BF16_FEATURES])
def test_features_that_decide_are_looked_for(features):
    assert features <= {*cpu.X86_FEATURES, *cpu.ARM_FEATURES}

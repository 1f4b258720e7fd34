"""Where operators run and how long they take: inspect, profile, bench reports and the page."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from test_bench import report
from test_cli import vitkit
from test_report import Page, column
from typer.testing import CliRunner

from vitkit import DeviceError
from vitkit.bench import BenchOptions, bench, load, notes, save
from vitkit.bench.placement import fallbacks, placement
from vitkit.bench.profile import profile, write_trace
from vitkit.cli.main import app
from vitkit.report.page import page
from vitkit.report.results import Results
from vitkit.runtimes.engine import open_engine
from vitkit.runtimes.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
LEFT = {"name": "neck.up/Resize", "kind": "Resize", "precision": "fp16", "device": "CPUExecutionProvider"}
FOUND = {
    "operators": {"fp16": {"Conv": 40, "Resize": 1}, "int8": {"QLinearConv": 2}},
    "devices": {"CUDAExecutionProvider": 42, "CPUExecutionProvider": 1},
    "main_device": "CUDAExecutionProvider",
    "off_device": [{**LEFT, "in_float": "", "module": "neck.up"}],
    "in_float": [],
}


def test_a_bench_report_keeps_where_its_engine_ran(artifact_of, tmp_path):
    artifact = artifact_of("onnx", "int8")
    reports = bench([artifact], BenchOptions(duration=0.05, threads=1, pool_size=2, require_device=True))
    with open_engine(artifact, threads=1) as engine:
        expected = placement(engine)
        operators = engine.operators()
    assert all(one.placement == expected for one in reports)
    assert sum(expected["operators"]["int8"].values()) == sum(one.precision == "int8" for one in operators)
    assert expected["devices"] == {"CPUExecutionProvider": len(operators)}
    save(reports, tmp_path / "bench.json")
    assert load(tmp_path / "bench.json") == reports
    int8 = sum(expected["operators"]["int8"].values())
    (note,) = [line for line in notes(reports) if line.startswith("Operators of")]
    assert f"int8 {int8}," in note
    assert note.endswith(f"on CPUExecutionProvider {len(operators)}.")


def test_what_fell_back_is_a_warning_of_bench_and_report():
    one = report([5_000_000] * 9, device="cuda", placement=FOUND)
    text = (
        "1 of 43 operators run on CPUExecutionProvider, not on CUDAExecutionProvider: neck.up/Resize (Resize)"
    )
    assert fallbacks(FOUND) == [text]
    assert f"FELL BACK: a: {text}." in notes([one])
    made = page(Results([one], []))
    assert "<b>Fell back:</b> a on cuda: 1 of 43 operators" in made
    table = "Where the operators run"
    assert column(made, table, "precisions") == ["fp16 41, int8 2"]
    assert column(made, table, "runs on") == ["CUDAExecutionProvider 42, CPUExecutionProvider 1"]
    assert column(made, table, "elsewhere") == ["1"]
    # Reports of older versions have none of it.
    assert table not in Page(page(Results([report([5])], []))).tables


@pytest.mark.parametrize(
    "change",
    [
        {"operators": {"fp16": {"Conv": "40"}}},
        {"devices": []},
        {"main_device": 3},
        {"off_device": [{"name": "a"}]},
        {"in_float": {"a": 1}},
    ],
)
def test_a_broken_placement_is_no_bench_report(change, tmp_path):
    save([report([5], placement={**FOUND, **change})], tmp_path / "bench.json")
    with pytest.raises(BadInput, match="placement"):
        load(tmp_path / "bench.json")


def test_inspect_counts_what_the_engine_runs(artifact_of):
    artifact = artifact_of("onnx", "int8")
    body = json.loads(vitkit("inspect", artifact, "--threads", "1", "--require-device", "--json")[0])
    with open_engine(artifact, threads=1) as engine:
        found = engine.operators()
    for precision, counts in body["operators"].items():
        assert counts == Counter(one.kind for one in found if one.precision == precision)
    assert body["operators"]["int8 to fp32"].keys() == {"DequantizeLinear"}
    assert (body["device"], body["settings"]["threads"]) == ("cpu", 1)


def test_inspect_names_what_fell_back_and_refuses_it_on_demand(mobilenet):
    out, error = vitkit("inspect", mobilenet)
    assert re.search(r"warning: .*3 of 68 operators run on TFLite, not on XNNPACK: .*\(SOFTMAX\)", error)
    assert re.search(r"XNNPACK +│ +65 ", out)
    assert "SOFTMAX" in vitkit("inspect", mobilenet, "--require-device", code=2)[1]
    assert "SOFTMAX" in vitkit("bench", mobilenet, "--require-device", "--duration", "0.1", code=2)[1]
    with pytest.raises(DeviceError, match="run on TFLite"):
        bench([mobilenet], BenchOptions(duration=0.1, require_device=True))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_profile_adds_up_and_its_trace_holds_every_operator(artifact_of, target, tmp_path):
    found = profile(artifact_of(target, "fp32"), threads=1, runs=4)
    body = found.to_json()
    total = body["operators_ms"]
    for table in ("by_operator", "by_module", "operators"):
        assert sum(row["ms"] for row in body[table]) == pytest.approx(total)
        assert sum(row["share"] for row in body[table]) == pytest.approx(1)
        assert [row["ms"] for row in body[table]] == sorted((row["ms"] for row in body[table]), reverse=True)
    assert len({row["module"] for row in body["by_module"]} - {""}) > 10
    write_trace(found, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 and event["pid"] == 1 for event in complete)
    drawn = [event for event in complete if event["cat"] != "run"]
    assert len(drawn) == len(found.profile.timings)
    runs = [event for event in complete if event["cat"] == "run"]
    # OpenVINO keeps means alone.
    assert len(runs) == (4 if target == "onnx" else 1)
    assert sum(event["dur"] for event in drawn) == pytest.approx(1e3 * len(runs) * total)
    assert all(one["ts"] + one["dur"] <= two["ts"] + 1e-3 for one, two in pairwise(runs))
    assert trace["otherData"]["starts"].startswith("measured" if target == "onnx" else "not measured")


def test_the_commands_of_the_page_on_inspecting_work(artifact_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "engine-int8").symlink_to(artifact_of("onnx", "int8"))
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/inspect.md").read_text(), flags=re.DOTALL)
    commands = [line.split()[1:] for block in blocks for line in block.splitlines()]
    assert {command[0] for command in commands} == {"inspect", "bench", "profile"}
    for command in commands:
        run = CliRunner().invoke(app, command, catch_exceptions=False)
        assert run.exit_code == 0
        if "--json" in command:
            assert json.loads(run.stdout)
        else:
            assert "CPUExecutionProvider" in run.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

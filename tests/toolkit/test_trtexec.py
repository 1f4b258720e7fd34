"""The cross-check by `trtexec`: its real output is read, and a script that prints it is run.

The script proves how the tool is found, called, waited for and believed; what a GPU takes is proved by
`tests/runtimes/test_tensorrt.py`, where there is one.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench import report

from vitkit.bench import load, measure, notes, save, to_markdown, to_tables, trtexec
from vitkit.bench.measure import _cross_check
from vitkit.bench.trtexec import cross_check, find_trtexec, parse_summary, parse_times
from vitkit.report.page import page
from vitkit.report.results import Results
from vitkit.runtimes.errors import BadInput

# Recorded by others. A Jetson Orin Nano with JetPack 5.1 (README of Idein/aicast_jetson_benchmark):
V8_5 = """\
[02/26/2024-10:43:06] [I] === Performance summary ===
[02/26/2024-10:43:06] [I] Throughput: 97.8649 qps
[02/26/2024-10:43:06] [I] Latency: min = 10.642 ms, max = 10.9861 ms, mean = 10.7971 ms, \
median = 10.7972 ms, percentile(90%) = 10.9329 ms, percentile(95%) = 10.949 ms, percentile(99%) = 10.9744 ms
[02/26/2024-10:43:06] [I] Enqueue Time: min = 1.1098 ms, max = 2.30975 ms, mean = 1.36227 ms, \
median = 1.19873 ms, percentile(90%) = 1.9928 ms, percentile(95%) = 2.07275 ms, percentile(99%) = 2.15002 ms
[02/26/2024-10:43:06] [I] GPU Compute Time: min = 10.0343 ms, max = 10.3575 ms, mean = 10.1824 ms, \
median = 10.1851 ms, percentile(90%) = 10.3206 ms, percentile(95%) = 10.338 ms, percentile(99%) = 10.356 ms
[02/26/2024-10:43:06] [I] Total Host Walltime: 3.0348 s
[02/26/2024-10:43:06] [I] Total GPU Compute Time: 3.02418 s
[02/26/2024-10:43:06] [I] Explanations of the performance metrics are printed in the verbose logs.
[02/26/2024-10:43:06] [I] 
&&&& PASSED TensorRT.trtexec [TensorRT v8502] # trtexec --onnx=./yolox_s_leaky.onnx --saveEngine=./fp16.trt
"""
# NVIDIA-AI-IOT/sdg_pallet_model, issue 4; its throughput was not quoted, so the one here follows from the
# walltime and the mean.
V8_5_UNSTABLE = """\
[08/02/2023-11:07:48] [I] Throughput: 687.7 qps
[08/02/2023-11:07:48] [I] GPU Compute Time: min = 1.34143 ms, max = 1.96094 ms, mean = 1.45063 ms, \
median = 1.38354 ms, percentile(90%) = 1.69373 ms, percentile(95%) = 1.7561 ms, percentile(99%) = 1.86157 ms
[08/02/2023-11:07:48] [I] Total Host Walltime: 3.00418 s
[08/02/2023-11:07:48] [W] * GPU compute time is unstable, with coefficient of variance = 9.24371%.
[08/02/2023-11:07:48] [W]   If not already in use, locking GPU clock frequency or adding --useSpinWait may \
improve the stability.
[08/02/2023-11:07:48] [I] Explanations of the performance metrics are printed in the verbose logs.
&&&& PASSED TensorRT.trtexec [TensorRT v8503] # /usr/src/tensorrt/bin/trtexec --fp16
"""
# A YOLOv8s engine under 8.6.1, from public notes on it.
V8_6 = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --loadEngine=output/yolov8s.onnx.engine
[02/06/2024-17:24:15] [I] Model: 
[02/06/2024-17:24:19] [I] Average on 10 runs - GPU latency: 4.64272 ms - Host latency: 5.06799 ms (enqueue \
0.811743 ms)
[02/06/2024-17:24:19] [I] === Performance summary ===
[02/06/2024-17:24:19] [I] Throughput: 215.68 qps
[02/06/2024-17:24:19] [I] Latency: min = 5.01874 ms, max = 5.21875 ms, mean = 5.06068 ms, \
median = 5.05786 ms, percentile(90%) = 5.09082 ms, percentile(95%) = 5.09766 ms, percentile(99%) = 5.10907 ms
[02/06/2024-17:24:19] [I] GPU Compute Time: min = 4.59161 ms, max = 4.68684 ms, mean = 4.62722 ms, \
median = 4.62241 ms, percentile(90%) = 4.65601 ms, percentile(95%) = 4.6633 ms, percentile(99%) = 4.67355 ms
&&&& PASSED TensorRT.trtexec [TensorRT v8601] # trtexec --loadEngine=output/yolov8s.onnx.engine
"""
# A Jetson with JetPack 6.1 and --noDataTransfers, from public notes on its set-up.
V10_3 = """\
[05/13/2025-10:36:46] [I] Throughput: 318.007 qps
[05/13/2025-10:36:46] [I] Latency: min = 3.12671 ms, max = 3.15479 ms, mean = 3.14068 ms, \
median = 3.14062 ms, percentile(90%) = 3.14587 ms, percentile(95%) = 3.14771 ms, percentile(99%) = 3.15039 ms
[05/13/2025-10:36:46] [I] H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, \
percentile(90%) = 0 ms, percentile(95%) = 0 ms, percentile(99%) = 0 ms
[05/13/2025-10:36:46] [I] GPU Compute Time: min = 3.12671 ms, max = 3.15479 ms, mean = 3.14068 ms, \
median = 3.14062 ms, percentile(90%) = 3.14587 ms, percentile(95%) = 3.14771 ms, percentile(99%) = 3.15039 ms
[05/13/2025-10:36:46] [I] Total GPU Compute Time: 3.00249 s
&&&& PASSED TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --noDataTransfers
"""
# A sample with a plugin, from its README: before 8.5 there is one percentile, and here both kinds of warning.
V8_4 = """\
[08/11/2022-06:55:33] [I] Throughput: 233.689 qps
[08/11/2022-06:55:33] [I] GPU Compute Time: min = 4.23773 ms, max = 5.25439 ms, mean = 4.26986 ms, \
median = 4.25195 ms, percentile(99%) = 5.24138 ms
[08/11/2022-06:55:33] [I] Total Host Walltime: 3.01255 s
[08/11/2022-06:55:33] [W] * Throughput may be bound by Enqueue Time rather than GPU Compute and the GPU may \
be under-utilized.
[08/11/2022-06:55:33] [W]   If not already in use, --useCudaGraph (utilize CUDA graphs where possible) may \
increase the throughput.
[08/11/2022-06:55:33] [W] * GPU compute time is unstable, with coefficient of variance = 2.9705%.
[08/11/2022-06:55:33] [W]   If not already in use, locking GPU clock frequency or adding --useSpinWait may \
improve the stability.
[08/11/2022-06:55:33] [I] Explanations of the performance metrics are printed in the verbose logs.
&&&& PASSED TensorRT.trtexec [TensorRT v8401] # trtexec --onnx=modified.onnx
 ----> debug <---- call [MyefficientnmsIPluginV2DynamicExt.cpp][destroy][Line 175]
"""
# From public logs: an engine of another version, options that a version does not know, a wrong shape.
FAILURES = {
    "trtexec 10.0.1 failed: Error[1]: [runtime.cpp::parsePlan::455] Error Code 1: Serialization": """\
[01/15/2026-07:20:09] [E] Error[1]: [runtime.cpp::parsePlan::455] Error Code 1: Serialization (Serialization \
assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.Trying to load an engine created with \
incompatible serialization version. Check that the engine was not created using safety runtime, same OS was \
used and version compatibility parameters were set accordingly.)
[01/15/2026-07:20:09] [E] Engine deserialization failed
[01/15/2026-07:20:09] [E] Inference set up failed
&&&& FAILED TensorRT.trtexec [TensorRT v100001] # ./trtexec --loadEngine=/models/resnet18_trt/1/model.plan
""",
    "trtexec 10.3.0 failed: Unknown option: --workspace 2048": """\
[10/05/2025-10:46:31] [E] Unknown option: --workspace 2048
[10/05/2025-10:46:31] [E] Unknown option: --buildOnly 
&&&& FAILED TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --workspace=2048 --buildOnly
""",
    "trtexec 8.6.1 failed: Error[3]: [executionContext.cpp::setInputShape::2264]": """\
[02/06/2024-17:33:20] [E] Error[3]: [executionContext.cpp::setInputShape::2264] Error Code 3: API Usage \
Error (Static dimension mismatch while setting input shape.
)
[02/06/2024-17:33:20] [E] Inference set up failed
&&&& FAILED TensorRT.trtexec [TensorRT v8601] # trtexec --shapes=images:2x3x320x640
""",
    "trtexec failed: sh: 1: trtexec: Permission denied": "sh: 1: trtexec: Permission denied\n\n",
    "trtexec failed: it said nothing": "",
    "trtexec 10.3.0 ended without a summary": (
        "[I] Throughput: 3 qps\n[I] GPU Compute Time: min = inf ms, median = inf ms\n"
        "&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec"
    ),
}


@pytest.mark.parametrize(
    ("text", "version", "throughput", "median", "p99", "warnings"),
    [
        (V8_4, "8.4.1", 233.689, 4.25195, 5.24138, 2),
        (V8_5, "8.5.2", 97.8649, 10.1851, 10.356, 0),
        (V8_5_UNSTABLE, "8.5.3", 687.7, 1.38354, 1.86157, 1),
        (V8_6, "8.6.1", 215.68, 4.62241, 4.67355, 0),
        (V10_3, "10.3.0", 318.007, 3.14062, 3.15039, 0),
    ],
)
def test_real_output_of_many_versions(text, version, throughput, median, p99, warnings):
    found = parse_summary(text)
    assert (found.version, found.throughput, len(found.warnings)) == (version, throughput, warnings)
    gpu = found.metrics["GPU Compute Time"]
    assert (gpu["median"], gpu["p99"]) == (median, p99)
    assert gpu["min"] <= gpu["median"] <= gpu["max"]
    # With carriage returns, as through some terminals, and without dates, as some loggers print it.
    assert parse_summary(text.replace("\n", "\r\n")) == found
    assert parse_summary(re.sub(r"^\[\d\d/.*?\] ", "", text, flags=re.MULTILINE)) == found


def test_each_metric_is_its_own():
    found = parse_summary(V8_5).metrics
    assert set(found) == {"Latency", "Enqueue Time", "GPU Compute Time"}
    assert found["Latency"] == {
        "min": 10.642, "max": 10.9861, "mean": 10.7971, "median": 10.7972, "p90": 10.9329, "p95": 10.949,
        "p99": 10.9744,
    }  # fmt: skip
    # Nothing is copied: the latency is the GPU's time.
    found = parse_summary(V10_3).metrics
    assert found["Latency"] == found["GPU Compute Time"]
    assert set(found["H2D Latency"].values()) == {0.0}


def test_warnings_are_whole_sentences():
    bound, unstable = parse_summary(V8_4).warnings
    assert bound.startswith("Throughput may be bound by Enqueue Time")
    assert bound.endswith("may increase the throughput.")
    assert unstable.startswith("GPU compute time is unstable, with coefficient of variance = 2.9705%.")
    assert unstable.endswith("may improve the stability.")


@pytest.mark.parametrize(("reason", "text"), FAILURES.items(), ids=range(len(FAILURES)))
def test_failures_keep_the_tools_own_reason(reason, text):
    with pytest.raises(BadInput) as caught:
        parse_summary(text)
    assert str(caught.value).startswith(reason)


# Variants

METRICS = (
    "Latency",
    "End-to-End Host Latency",
    "Enqueue Time",
    "H2D Latency",
    "GPU Compute Time",
    "D2H Latency",
)
TIMES = st.lists(st.floats(0.001, 5000.0), min_size=1, max_size=40)


def printed(times: list[float], percentiles: list[int]) -> str:
    """A metric as the tool prints it: six significant digits, percentiles by rank from above."""
    ordered = sorted(times)
    values = {"min": ordered[0], "max": ordered[-1], "mean": sum(times) / len(times)}
    values["median"] = statistics.median(times)
    for q in percentiles:
        values[f"percentile({q}%)"] = ordered[max(len(times) - 1 - int((1 - q / 100) * len(times)), 0)]
    return ", ".join(f"{name} = {value:g} ms" for name, value in values.items())


def exported(times: list[float]) -> str:
    """What `--exportTimes` writes from 8.5 on, in its own notation."""
    names = ("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs")
    rows = [
        ", ".join(
            [f'"{name}" : {i}' for name in names] + [f'"computeMs" : {time:g}', f'"latencyMs" : {time:g}']
        )
        for i, time in enumerate(times)
    ]
    return "[\n  { " + " }\n, { ".join(rows) + " }\n]\n"


@given(
    times=TIMES,
    percentiles=st.lists(st.sampled_from([50, 90, 95, 99]), unique=True),
    names=st.sets(st.sampled_from(METRICS)),
    dated=st.booleans(),
    noise=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=30), max_size=5
    ),
    version=st.sampled_from(
        [("8503", "8.5.3"), ("8602", "8.6.2"), ("101601", "10.16.1"), ("110201", "11.2.1")]
    ),
    build=st.sampled_from(["", " [b17]"]),
)
def test_any_summary_is_read_back(times, percentiles, names, dated, noise, version, build):
    start = "[01/02/2026-03:04:05] [I]" if dated else "[I]"
    lines = [f"{start} noise {one}" for one in noise]
    lines += [f"{start} {name}: {printed(times, percentiles)}" for name in {*names, "GPU Compute Time"}]
    lines += [f"{start} Throughput: {len(times) / sum(times) * 1000:g} qps", *lines[: len(noise)]]
    lines.append(f"&&&& PASSED TensorRT.trtexec [TensorRT v{version[0]}]{build} # trtexec")
    found = parse_summary("\n".join(lines))
    assert found.version == version[1]
    assert set(found.metrics) == {*names, "GPU Compute Time"}
    assert found.throughput == pytest.approx(len(times) / sum(times) * 1000, rel=1e-5)
    for values in found.metrics.values():
        assert set(values) == {"min", "max", "mean", "median", *(f"p{q}" for q in percentiles)}
        assert values["median"] == pytest.approx(statistics.median(times), rel=1e-5)
        assert (values["min"], values["max"]) == pytest.approx((min(times), max(times)), rel=1e-5)
    assert [ns / 1e6 for ns in parse_times(exported(times))] == pytest.approx(times, rel=1e-5, abs=1e-6)


@given(st.text())
def test_no_text_does_more_than_be_refused(text):
    for parse in (parse_summary, parse_times):
        with pytest.raises(BadInput):
            parse(text)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "3", "[1]", '[{"computeMs": "1"}]', '[{"computeMs": 0}]', '[{"computeMs": -1}]',
     '[{"computeMs": NaN}]', '[{"computeMs": 1e300}]', '[{"computeMs": 1}, {"latencyMs": 1}]', "[" * 100_000],
    ids=range(11),
)  # fmt: skip
def test_damaged_times_are_refused(text):
    with pytest.raises(BadInput, match="exported"):
        parse_times(text)


# Running it


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a `trtexec` of the PATH that prints and exports what it is told to; returns its path."""

    def make(text: str, times: str | None = None, after: str = "") -> Path:
        folder = tmp_path / "the tools"
        folder.mkdir(exist_ok=True)
        (folder / "text").write_text(text)
        (folder / "times").write_text(times or "")
        here = shlex.quote(str(folder))
        export = f"cp {here}/times times.json\n" if times is not None else ""
        (folder / "trtexec").write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$PWD" "$@" > {here}/said\n{export}cat {here}/text >&2\n{after}\n'
        )
        (folder / "trtexec").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return folder / "trtexec"

    return make


def test_the_tool_is_asked_for_the_gpus_time_alone(tool, tmp_path):
    path = tool(V10_3, exported([3.0, 3.14062, 3.2]))
    found = cross_check(path, tmp_path / "an engine.plan")
    folder, *said = (path.parent / "said").read_text().splitlines()
    assert said == [
        f"--loadEngine={tmp_path / 'an engine.plan'}", "--useSpinWait", "--useCudaGraph", "--noDataTransfers",
        "--warmUp=1000", "--duration=3", "--exportTimes=times.json",
    ]  # fmt: skip
    assert shlex.split(found["command"]) == [str(path), *said]
    assert not Path(folder).exists()
    assert found["gpu_ns"] == [3_000_000, 3_140_620, 3_200_000]
    assert (found["version"], found["throughput"]) == ("10.3.0", 318.007)
    assert "problem" not in found


@pytest.mark.parametrize(
    ("text", "times", "after", "problem"),
    [
        (
            FAILURES["trtexec 10.3.0 failed: Unknown option: --workspace 2048"],
            None,
            "exit 1",
            "Unknown option",
        ),
        (V10_3, None, "", "times.json"),
        (V10_3, "[", "", "no times that can be read"),
        (V10_3, exported([9.0]), "", "printed a median GPU time of 3.14062 ms and exported times with 9 ms"),
        (V10_3, exported([3.14]), "kill -9 $$", "ended by signal 9"),
        (V10_3, exported([3.14]), "exec sleep 60", "no result in 1 s"),
    ],
)
def test_what_goes_wrong_is_told_and_never_raised(tool, tmp_path, monkeypatch, text, times, after, problem):
    monkeypatch.setattr(trtexec, "_PATIENCE_S", 1.0)
    found = cross_check(tool(text, times, after), tmp_path / "engine.plan")
    assert problem in found["problem"]
    assert set(found) == {"command", "problem"}


def test_a_tool_that_cannot_be_run(tmp_path):
    assert "No such file" in cross_check(tmp_path / "trtexec", tmp_path / "engine.plan")["problem"]


def test_the_tool_is_found(tool, tmp_path, monkeypatch):
    path = tool(V10_3)
    assert find_trtexec() == path
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trtexec, "_FOLDER", tmp_path / "nowhere")
    assert find_trtexec() is None
    monkeypatch.setattr(trtexec, "_FOLDER", path.parent)
    assert find_trtexec() == path


# In a bench's report


def lane(scope, plan):
    session = SimpleNamespace(plan=plan)
    opened = SimpleNamespace(label="a", engine=SimpleNamespace(session=session))
    return SimpleNamespace(opened=opened, scope=scope)


def test_only_an_engine_with_a_plan_is_checked(tool, tmp_path, monkeypatch):
    plan = tmp_path / "engine.plan"
    lanes = [lane("engine", plan), lane("engine", None), lane("image", plan)]
    tool(V10_3, exported([3.14062]))
    reports, seen = [report([5], scope=one.scope) for one in lanes], []
    _cross_check(reports, lanes, lambda text, done: seen.append(text))
    assert [one.cross_check is None for one in reports] == [False, True, True]
    assert reports[0].cross_check["gpu_ns"] == [3_140_620]
    assert seen == ["cross-checking a by trtexec"]
    monkeypatch.setattr(measure, "find_trtexec", lambda: None)
    reports = [report([5])]
    _cross_check(reports, lanes[:1], lambda text, done: None)
    assert reports[0].cross_check is None


GOOD = {
    "command": "trtexec",
    "version": "10.3.0",
    "throughput": 499.0,
    "metrics": {},
    "warnings": ["GPU compute time is unstable."],
    "gpu_ns": [2_000_000, 1_000_000, 3_000_000],
}
BAD = {"command": "trtexec", "problem": "trtexec 10.0.1 failed: Engine deserialization failed"}


def test_the_ratio_is_of_the_medians():
    one = report([5_000_000, 1, 9_000_000], cross_check=GOOD)
    assert (one.trtexec_ns, one.cross_check_ratio) == (2_000_000, 2.5)
    assert one.to_json()["summary"]["cross_check_ratio"] == 2.5
    for other in (report([5]), report([5], cross_check=BAD)):
        assert (other.trtexec_ns, other.cross_check_ratio) == (None, None)


def test_a_report_says_what_the_cross_check_is():
    rows = [report([5_000_000], cross_check=GOOD), report([1], artifact="b", cross_check=BAD)]
    rows += [report([1], artifact="c"), report([9], artifact="a", scope="image")]
    text = "\n".join(notes(rows))
    assert "trtexec 10.3.0 measured 2.00 ms of GPU time alone (median of 3 queries)" in text
    assert "p50 here is 2.50 times that, with copies" in text
    assert "trtexec warns of a: GPU compute time is unstable." in text
    assert "No cross-check of b: trtexec 10.0.1 failed: Engine deserialization failed." in text
    table, image = (part.splitlines() for part in to_markdown(rows).split("**scope ")[1:])
    assert [line.split(" | ")[-1] for line in table if line.startswith("| ")] == [
        "trtexec ms (ratio) |", "--- |", "2.00 (2.50) |", "failed |", "- |",
    ]  # fmt: skip
    assert not any("trtexec ms" in line for line in image if line.startswith("| "))
    assert "trtexec" not in to_markdown([report([5])])
    assert len(to_tables(rows)) == 2


def test_cross_checks_survive_the_file(tmp_path):
    rows = [report([5], cross_check=GOOD), report([5], cross_check=BAD), report([5])]
    save(rows, tmp_path / "bench.json")
    assert load(tmp_path / "bench.json") == rows


@pytest.mark.parametrize(
    "damaged",
    [[], "no", {}, {"problem": 3}, {**GOOD, "gpu_ns": []}, {**GOOD, "gpu_ns": [0]}, {**GOOD, "gpu_ns": 5},
     {**GOOD, "gpu_ns": ["5"]}, {**GOOD, "warnings": [1]}, {**GOOD, "version": None}],
    ids=range(10),
)  # fmt: skip
def test_damaged_cross_checks_are_refused(tmp_path, damaged):
    body = {**report([5]).to_json(), "cross_check": damaged}
    (tmp_path / "bench.json").write_text(json.dumps({"format": 1, "reports": [body]}))
    with pytest.raises(BadInput, match="cross_check"):
        load(tmp_path / "bench.json")


def test_the_page_shows_it_only_where_there_is_one():
    pytest.importorskip("matplotlib")
    text = page(
        Results([report([5_000_000], cross_check=GOOD), report([1], artifact="b", cross_check=BAD)], [])
    )
    assert "times trtexec" in text
    assert "trtexec GPU ms" in text
    assert "No cross-check of b: trtexec 10.0.1 failed" in text
    assert "GPU compute time is unstable." in text
    assert "trtexec" not in page(Results([report([5])], []))
    hostile = {**GOOD, "version": "<script>alert(1)</script>", "warnings": ["<b>"]}
    text = page(Results([report([5], cross_check=hostile)], []))
    assert "<script>alert" not in text
    assert "&lt;b&gt;" in text


def test_the_terminal_table_has_it_too():
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(*to_tables([report([5_000_000], cross_check=GOOD)]))
    assert re.search(r"trtexec ms \(ratio\)\s+2\.00 \(2\.50\)", console.export_text())

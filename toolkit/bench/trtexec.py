"""TensorRT's own tool as a cross-check: runs `trtexec` on a built engine and reads what it reports."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from vitkit.runtimes.errors import BadInput

# JetPack and the vendor's packages install it here, outside the PATH.
_FOLDER = Path("/usr/src/tensorrt/bin")
# Version 11 does all of this by default and still accepts the flags. No shapes and no batch: the engines
# that vitkit builds have fixed ones.
_OPTIONS = ("--useSpinWait", "--useCudaGraph", "--noDataTransfers", "--warmUp=1000", "--duration=3")
_PATIENCE_S = 120.0
_TIMES_FILE = "times.json"
# Both come from the same floats, printed with six digits.
_MAX_DISAGREEMENT = 1e-3
_MAX_NS = 10**15

_LINE = re.compile(r"^(?:\[[\d/:-]+\] )?\[([VIWEF])\] ?(.*)$", re.MULTILINE)
_OUTCOME = re.compile(r"^&&&& (PASSED|FAILED) TensorRT\.trtexec \[TensorRT v(\d+)\]", re.MULTILINE)
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_THROUGHPUT = re.compile(rf"Throughput: {_NUMBER} qps\s*$")
_METRIC = re.compile(r"([A-Z][\w -]*): (min = .*)$")
_VALUE = re.compile(rf"\b(min|max|mean|median|percentile\(([\d.]+)%\)) = {_NUMBER} ms")


class Summary(NamedTuple):
    """The summary that `trtexec` prints at its end.

    `version` is TensorRT's, such as `10.3.0`; `throughput` is in queries a second. `metrics` holds, by the
    tool's names (`Latency`, `GPU Compute Time`, ...), `min`, `max`, `mean`, `median` and percentiles such as
    `p99`, in ms. `warnings` are the tool's own, of an unstable clock for instance.
    """

    version: str
    throughput: float
    metrics: dict[str, dict[str, float]]
    warnings: tuple[str, ...]


def find_trtexec() -> Path | None:
    """The tool of this machine, from the PATH or JetPack's folder; None if it is absent."""
    found = shutil.which("trtexec") or shutil.which("trtexec", path=str(_FOLDER))
    return Path(found) if found else None


def parse_summary(text: str) -> Summary:
    """Read the output of `trtexec` from 8.4 to 11.

    Raises BadInput with the tool's own reason if it failed, and if it ended without a summary.
    """
    outcome = _OUTCOME.search(text)
    lines = [(level, words.rstrip()) for level, words in _LINE.findall(text)]
    if outcome is None or outcome.group(1) == "FAILED":
        who = f"trtexec {_version(outcome.group(2))}" if outcome else "trtexec"
        raise BadInput(f"{who} failed: {_reason(text, lines)}")
    throughput, metrics = None, {}
    for _, words in lines:
        if match := _THROUGHPUT.match(words):
            throughput = float(match.group(1))
        elif match := _METRIC.match(words):
            values = _VALUE.findall(match.group(2))
            metrics[match.group(1)] = {f"p{q}" if q else name: float(value) for name, q, value in values}
    if throughput is None or "median" not in metrics.get("GPU Compute Time", {}):
        raise BadInput(f"trtexec {_version(outcome.group(2))} ended without a summary of its times")
    return Summary(_version(outcome.group(2)), throughput, metrics, tuple(dict.fromkeys(_warnings(lines))))


def _version(number: str) -> str:
    """TensorRT's version from its number: 8502 is 8.5.2, and 101601 is 10.16.1."""
    value = int(number)
    major, minor = (10_000, 100) if value >= 10_000 else (1000, 100)
    return f"{value // major}.{value % major // minor}.{value % minor}"


def _reason(text: str, lines: list[tuple[str, str]]) -> str:
    """The first error, which the later ones follow from; else the last words."""
    errors = [words for level, words in lines if level in "EF" and words]
    last = [line for line in text.splitlines() if line.strip()][-1:]
    return _clean((errors or last or ["it said nothing"])[0])


def _warnings(lines: list[tuple[str, str]]) -> Iterator[str]:
    """Each warning as a whole: the tool indents the lines that go on with one."""
    text = ""
    for words in (words for level, words in lines if level == "W"):
        if words.startswith("  "):
            text = f"{text} {words.strip()}"
            continue
        if text:
            yield _clean(text)
        text = words.removeprefix("* ")
    if text:
        yield _clean(text)


def _clean(text: str) -> str:
    # What a tool prints must not steer the terminal.
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()[:300]


def parse_times(text: str) -> list[int]:
    """GPU compute times in ns, in the order the queries ran, from the JSON of `trtexec --exportTimes`.

    Raises BadInput for other text.
    """
    try:
        times = [round(query["computeMs"] * 1e6) for query in json.loads(text)]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise BadInput(f"trtexec exported no times that can be read: {error!r}") from None
    if not times or not all(1 <= time <= _MAX_NS for time in times):
        raise BadInput(f"trtexec exported {len(times)} times, of which none may be 0 or beyond {_MAX_NS} ns")
    return times


def cross_check(tool: Path, plan: Path) -> dict[str, Any]:
    """Time a built engine with `trtexec`: a second of warm-up and three of queries. Never raises.

    Returns for JSON the `command` and either the `problem` in words, or: `version` of TensorRT, `gpu_ns` (the
    GPU compute time of each query, without copies, by a CUDA graph), `throughput`, `metrics` and `warnings`
    as in `Summary`.
    """
    command = [str(tool), f"--loadEngine={plan.resolve()}", *_OPTIONS, f"--exportTimes={_TIMES_FILE}"]
    found: dict[str, Any] = {"command": shlex.join(command)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_PATIENCE_S,
            )
            if done.returncode < 0:
                raise BadInput(f"trtexec was ended by signal {-done.returncode}")
            summary = parse_summary(done.stdout.decode("utf-8", "replace"))
            times = parse_times((Path(folder) / _TIMES_FILE).read_text("utf-8", "replace"))
        _check_agreement(times, summary)
        return {**found, **summary._asdict(), "warnings": list(summary.warnings), "gpu_ns": times}
    except subprocess.TimeoutExpired:
        return {**found, "problem": f"trtexec gave no result in {_PATIENCE_S:.0f} s"}
    except (OSError, BadInput) as error:
        return {**found, "problem": _clean(str(error))}


def _check_agreement(times: list[int], summary: Summary) -> None:
    printed, exported = summary.metrics["GPU Compute Time"]["median"], median(times) / 1e6
    if not math.isclose(printed, exported, rel_tol=_MAX_DISAGREEMENT):
        raise BadInput(
            f"trtexec {summary.version} printed a median GPU time of {printed:g} ms and exported times with "
            f"{exported:g} ms"
        )


def check_fields(found: Mapping[str, Any]) -> None:
    """Raises ValueError for a dictionary that `cross_check` did not return."""
    kinds = {"problem": str} if "problem" in found else {"version": str, "gpu_ns": list, "warnings": list}
    times, warnings = found.get("gpu_ns", [1]), found.get("warnings", [])
    if (
        any(type(found.get(key)) is not kind for key, kind in kinds.items())
        or not times
        or not all(type(time) is int and 1 <= time <= _MAX_NS for time in times)
        or not all(type(warning) is str for warning in warnings)
    ):
        raise ValueError(f"'cross_check' is {str(found)[:80]!r}")

"""Phones through `adb`: a TFLite artifact under the user's own `benchmark_model`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from vitkit.bench.measure import WARMUP_RUNS, WARMUP_S, Progress
from vitkit.bench.options import BenchOptions
from vitkit.devices.registry import Device
from vitkit.runtimes.card import Artifact, read_artifact, sha256
from vitkit.runtimes.errors import BadRequest, DeviceError
from vitkit.runtimes.files import write_text

# The rules for phones: so many tries, this close together.
TRIES = 5
MAX_SPREAD = 0.05
_ANSWER_S = 60.0
_FACTS = {"model": "ro.product.model", "android": "ro.build.version.release", "soc": "ro.soc.model"}

_NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
_SUMMARY = re.compile(
    rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, "
    rf"Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}"
)
_RUNS = re.compile(rf"\bcount=(\d+)((?: \w+={_NUMBER})+)")
_MEMORY = re.compile(
    rf"(?:Memory footprint delta[^:]*|Peak memory footprint \(MB\)): init=\S+ overall={_NUMBER}"
)


class Timing(NamedTuple):
    """The report of one try of `benchmark_model`, times in microseconds.

    `median_us` and `p95_us` are None for versions before 2.16, `memory_mb` if the tool does not print it.
    """

    init_us: float
    first_us: float
    warmup_us: float
    mean_us: float
    runs: int
    min_us: float
    max_us: float
    std_us: float
    median_us: float | None
    p95_us: float | None
    memory_mb: float | None


def parse_benchmark_model(text: str) -> Timing:
    """Read the output of TFLite's `benchmark_model`; raises DeviceError if it ended without one."""
    summary, runs, memory = _SUMMARY.search(text), _RUNS.findall(text), _MEMORY.search(text)
    # The last line of counts is that of the measured runs, those before are of the warm-up.
    values = dict(part.split("=") for part in runs[-1][1].split()) if runs else {}
    if summary is None or not runs:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
        raise DeviceError(f"benchmark_model gave no result; its last words: {last.strip()[:200]}")
    init, first, warmup, mean = map(float, summary.groups())
    # Of a single run it prints no statistics.
    only = float(values["curr"])
    return Timing(
        init,
        first,
        warmup,
        mean,
        int(runs[-1][0]),
        float(values.get("min", only)),
        float(values.get("max", only)),
        float(values.get("std", 0.0)),
        float(values["median"]) if "median" in values else None,
        float(values["p95"]) if "p95" in values else None,
        float(memory.group(1)) if memory else None,
    )


@dataclass(frozen=True)
class PhoneReport:
    """Tries of one artifact on a phone, by a tool that keeps no raw times: it supports no percentile.

    `facts` are the phone's model, Android and chip; `thermal` is its thermal status before and after each
    try, 0 if nothing is throttled; `outputs` is all that the tool printed.
    """

    artifact: str
    name: str
    precision: str
    files: dict[str, str | None]
    size_bytes: int
    device: str
    threads: int | None
    cool_down_s: float
    facts: dict[str, str]
    tries: list[Timing]
    thermal: list[int | None]
    outputs: list[str]

    @property
    def spread(self) -> float:
        """The slowest try's mean over the fastest one's, minus 1."""
        means = [one.mean_us for one in self.tries]
        return max(means) / min(means) - 1

    @property
    def invalid(self) -> str | None:
        """Reason why the measurement must not be used; None if it may."""
        if hot := [status for status in self.thermal if status]:
            return f"the phone throttled itself (thermal status {max(hot)})"
        if len(self.tries) < TRIES or self.spread > MAX_SPREAD:
            wanted = f"{TRIES} must be within {MAX_SPREAD:.0%}"
            return f"{len(self.tries)} tries are {self.spread:.1%} apart; {wanted}"
        return None


def save(reports: Sequence[PhoneReport], path: Path) -> None:
    """Write reports as one JSON file; raises BadRequest if it cannot be written."""
    bodies = [
        {
            **asdict(one),
            "tries": [timing._asdict() for timing in one.tries],
            "summary": {"spread": one.spread, "invalid": one.invalid},
        }
        for one in reports
    ]
    write_text(path, json.dumps({"format": 1, "phone_reports": bodies}) + "\n")


def facts(device: Device) -> dict[str, str]:
    """Model, Android version and chip of a phone; raises DeviceError if `adb` does not reach it."""
    state = _adb(device, "get-state").strip()
    if state != "device":
        raise DeviceError(f"{device.name}: the phone is {state!r}, not ready")
    return {name: _shell(device, "getprop", key).strip() for name, key in _FACTS.items()}


def bench_on_phone(
    device: Device, artifact: Path, options: BenchOptions, *, progress: Progress
) -> PhoneReport:
    """Measure a TFLite artifact on a phone: five tries, each after a rest.

    Of the options, `duration`, `threads` and `cool_down` count. Raises BadRequest for another target and
    without the tool, DeviceError if the phone cannot be reached or the tool fails.
    """
    read, tool = _checked(device, artifact)
    about = facts(device)
    label = artifact.resolve().name
    progress(f"copying {label} to {device.name}", 0.0)
    runner, graph = (_push(device, path) for path in (tool, read.engine_path))
    tries, thermal, outputs = [], [], []
    try_s = options.cool_down + WARMUP_S + options.duration
    for i in range(TRIES):

        def show(text: str, over_s: float, i: int = i) -> None:
            progress(f"{label}: {text}, try {i + 1} of {TRIES}", (i + over_s / try_s) / TRIES)

        _cool_down(options.cool_down, show)
        thermal.append(_thermal(device))
        show("measuring", options.cool_down)
        outputs.append(_run_tool(device, _command(runner, graph, options), 10 * options.duration + 600))
        tries.append(parse_benchmark_model(outputs[-1]))
        thermal.append(_thermal(device))
    progress(f"measured {label}", 1.0)
    return PhoneReport(
        artifact=label,
        name=read.card.name,
        precision=read.card.precision,
        files=dict(read.card.files),
        size_bytes=read.size_bytes,
        device=device.name,
        threads=options.threads,
        cool_down_s=options.cool_down,
        facts=about,
        tries=tries,
        thermal=thermal,
        outputs=outputs,
    )


def _cool_down(seconds: float, show: Callable[[str, float], None]) -> None:
    """Rest, and show how many of the seconds are over, so that the time left is on the screen."""
    start = time.monotonic()
    while (over := time.monotonic() - start) < seconds:
        show("cooling down", over)
        time.sleep(min(1.0, seconds - over))


def _checked(device: Device, artifact: Path) -> tuple[Artifact, Path]:
    read = read_artifact(artifact)
    if read.card.target != "tflite":
        raise BadRequest(
            f"{artifact} is compiled for {read.card.target}; phones are measured with tflite: export it with "
            "--target tflite"
        )
    tool = Path(device.tool).expanduser()
    if not device.tool or not tool.is_file():
        raise BadRequest(
            f"{device.name} has no benchmark_model (its tool is {device.tool!r}); build TFLite's for "
            f"Android, then: vitkit device add {device.name} --kind adb --tool PATH --replace"
        )
    return read, tool


def _command(runner: str, graph: str, options: BenchOptions) -> list[str]:
    return [
        runner,
        f"--graph={graph}",
        "--use_xnnpack=true",
        f"--warmup_runs={WARMUP_RUNS}",
        f"--warmup_min_secs={WARMUP_S:g}",
        f"--min_secs={options.duration:g}",
        *([f"--num_threads={options.threads}"] if options.threads else []),
    ]


def _push(device: Device, path: Path) -> str:
    """Copy a file under its SHA-256, unless it is there; returns its path on the phone."""
    place = f"{device.folder}/{sha256(path)}"
    if _shell(device, "sh", "-c", f"[ -f {shlex.quote(place)} ] && echo here || echo").strip() == "here":
        return place
    _shell(device, "mkdir", "-p", device.folder)
    part = f"{place}.part"
    _adb(device, "push", str(path), part, seconds=3600)
    _shell(device, "chmod", "755", part)
    # Only a whole file gets the name.
    _shell(device, "mv", part, place)
    return place


def _thermal(device: Device) -> int | None:
    found = re.search(r"Thermal Status: (\d+)", _shell(device, "dumpsys", "thermalservice"))
    return int(found.group(1)) if found else None


def _shell(device: Device, *command: str, seconds: float = _ANSWER_S) -> str:
    return _adb(device, "shell", shlex.join(command), seconds=seconds)


def _run_tool(device: Device, command: Sequence[str], seconds: float) -> str:
    # Versions of the tool print their results to either stream.
    return _adb(device, "shell", f"{shlex.join(command)} 2>&1", seconds=seconds)


def _adb(device: Device, *arguments: str, seconds: float = _ANSWER_S) -> str:
    serial = ["-s", device.address] if device.address else []
    try:
        done = subprocess.run(
            ["adb", *serial, *arguments],
            stdin=subprocess.DEVNULL,
            # Two pipes: on the second adb announces that it starts its daemon, and phones print warnings.
            capture_output=True,
            timeout=seconds,
        )
    except FileNotFoundError:
        raise DeviceError("there is no 'adb' here; install it with: apt-get install adb") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{device.name}: adb {arguments[0]} gave no answer in {seconds:.0f} s") from None
    if done.returncode:
        reason = _printable(done.stdout + b" " + done.stderr)
        raise DeviceError(f"{device.name}: adb {arguments[0]} failed: {reason}; see: adb devices -l")
    return done.stdout.decode("utf-8", "replace")


def _printable(output: bytes) -> str:
    """The end of what `adb` printed, without the announcements of its daemon."""
    lines = output.decode("utf-8", "replace").splitlines()
    text = " ".join(line for line in lines if not line.strip().startswith("* daemon"))
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()[-300:]


def rows(report: PhoneReport) -> list[tuple[str, str]]:
    """A report for the terminal: rows of a name and a value."""
    means = sorted(one.mean_us for one in report.tries)
    middle = means[len(means) // 2] / 1e3
    return [
        ("mean of the tries ms", " ".join(f"{one.mean_us / 1e3:.2f}" for one in report.tries)),
        ("median of those ms", f"{middle:.2f}"),
        ("spread", f"{report.spread:.1%}"),
        ("fastest and slowest run ms", _range(report.tries)),
        ("runs", str(sum(one.runs for one in report.tries))),
        ("load ms, first ms", f"{report.tries[0].init_us / 1e3:.2f}, {report.tries[0].first_us / 1e3:.2f}"),
        ("MB", f"{report.size_bytes / 1e6:.1f}"),
        ("phone", ", ".join(f"{key} {value or 'unknown'}" for key, value in report.facts.items())),
        ("threads", str(report.threads or "as the tool chooses")),
        ("cool-down s", f"{report.cool_down_s:g}"),
    ]


def _range(tries: Sequence[Timing]) -> str:
    low, high = min(one.min_us for one in tries), max(one.max_us for one in tries)
    return f"{low / 1e3:.2f} to {high / 1e3:.2f}"

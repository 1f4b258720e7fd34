"""A bench in a process of its own, so that a crash of the engine is a finding and not the end of vitkit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitkit.bench import BenchOptions, BenchReport, Progress, bench
from vitkit.bench.isa import check_isa
from vitkit.bench.measure import silent
from vitkit.runtimes import errors
from vitkit.runtimes.errors import DeviceError, VitkitError

# Lines of a device may come from anything that runs there; only those that start so are vitkit's.
MARK = "vitkit: "
COMMAND = ("-m", "vitkit.devices.worker")


def main() -> None:
    """Run the bench that standard input asks for, as JSON; events go to standard output, a line each."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What vendors print must not land among the events.
    os.dup2(2, 1)

    def send(**event: Any) -> None:
        events.write(f"{MARK}{json.dumps(event)}\n")
        events.flush()

    asked = json.loads(sys.stdin.buffer.read())
    try:
        artifacts = [Path(path) for path in asked["artifacts"]]
        options = BenchOptions.from_json(asked["options"])
        reports = bench(artifacts, options, progress=lambda text, fraction: send(progress=[text, fraction]))
    except VitkitError as error:
        send(error=str(error), kind=type(error).__name__)
        return
    send(reports=[asdict(report) for report in reports])


def request(artifacts: Iterable[str], options: Mapping[str, Any]) -> bytes:
    """The input of `main`: artifact folders, and options as `BenchOptions.to_json` writes them."""
    return json.dumps({"artifacts": list(artifacts), "options": options}).encode()


def collect(lines: Iterable[bytes], progress: Progress) -> list[BenchReport] | None:
    """Follow a worker's events to its reports; None if they end before.

    Raises the worker's error, and DeviceError if the worker crashed.
    """
    for event in events(lines):
        if "progress" in event:
            text, fraction = event["progress"]
            progress(str(text), float(fraction))
        elif "error" in event:
            raise_error(event)
        elif "crashed" in event:
            raise DeviceError(crash_text(event["crashed"]))
        elif "reports" in event:
            reports = [BenchReport(**report) for report in event["reports"]]
            for report in reports:
                report.environment["command"] = shlex.join(sys.argv)
            return reports
    return None


def events(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """The events among lines of text, whatever else is printed there."""
    for line in lines:
        text = line.decode("utf-8", "replace")
        if text.startswith(MARK):
            yield json.loads(text[len(MARK) :])


def raise_error(event: Mapping[str, Any]) -> None:
    """Raise the error in an event as the class that it had."""
    known = {"BadArtifact", "BadInput", "BadRequest", "DeviceError", "RunFailed"}
    kind = event.get("kind")
    raise getattr(errors, kind if kind in known else "DeviceError")(event["error"])


def crash_text(code: int) -> str:
    """The meaning of the exit code of a worker that ended without reports."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the engine crashed while it was measured ({name}){cause}; nothing of this run was kept"
    return f"the measuring process ended with exit code {code}; nothing of this run was kept"


def bench_apart(
    artifacts: Iterable[Path], options: BenchOptions, *, progress: Progress = silent
) -> list[BenchReport]:
    """`vitkit.bench.bench` in a process of its own.

    Raises what `bench` raises, and DeviceError if the engine crashes.
    """
    artifacts = [path.resolve() for path in artifacts]
    if options.max_isa is not None:
        check_isa(options.max_isa, artifacts)
    process = subprocess.Popen([sys.executable, *COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request(map(str, artifacts), options.to_json()))
        process.stdin.close()
        reports = collect(process.stdout, progress)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if reports is None:
        cap = options.max_isa
        reason = f" under --max-isa {cap}: this engine has no working kernels for it" if cap else ""
        raise DeviceError(f"{crash_text(code)}{reason}")
    return reports


if __name__ == "__main__":
    main()

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

from vitkit.bench import BenchReport, Progress, bench
from vitkit.bench.cpu import cpu_info
from vitkit.runtimes import errors
from vitkit.runtimes.card import read_card
from vitkit.runtimes.errors import BadRequest, DeviceError, VitkitError

# Lines of a device may come from anything that runs there; only those that start so are vitkit's.
MARK = "vitkit: "
COMMAND = ("-m", "vitkit.devices.worker")
# By the name of the cap: what OpenVINO's kernels call it, and the CPU feature without which it is no cap.
ISAS = {
    "avx2": ("AVX2", "avx2"),
    "avx2_vnni": ("AVX2_VNNI", "avx_vnni"),
    "avx512_vnni": ("AVX512_CORE_VNNI", "avx512_vnni"),
}
# The kernels read the first, some versions the second.
_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def main() -> None:
    """Run the bench that standard input asks for, as JSON; events go to standard output, a line each."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What vendors print must not land among the events.
    os.dup2(2, 1)

    def say(**event: Any) -> None:
        events.write(f"{MARK}{json.dumps(event)}\n")
        events.flush()

    request = json.loads(sys.stdin.buffer.read())
    try:
        artifacts = [Path(path) for path in request["artifacts"]]
        if request["max_isa"]:
            cap_isa(request["max_isa"], artifacts)
        options = request["options"]
        options["images"] = Path(options["images"]) if options["images"] else None
        reports = bench(artifacts, **options, progress=lambda text, fraction: say(progress=[text, fraction]))
    except VitkitError as error:
        say(error=str(error), kind=type(error).__name__)
        return
    if request["max_isa"]:
        for report in reports:
            report.environment["emulated_isa"] = request["max_isa"]
    say(reports=[asdict(report) for report in reports])


def check_isa(isa: str, artifacts: Iterable[Path]) -> None:
    """Raises BadRequest for an unknown cap, and for artifacts whose engine knows none."""
    if isa not in ISAS:
        raise BadRequest(f"--max-isa is {isa!r}; known are {', '.join(ISAS)}")
    for path in artifacts:
        if (target := read_card(path).target) != "openvino":
            raise BadRequest(
                f"--max-isa works for openvino, and {path} is compiled for {target}, whose engine always "
                "uses all that the CPU has; leave the artifact away, or export it with --target openvino"
            )


def cap_isa(isa: str, artifacts: Iterable[Path]) -> None:
    """Let OpenVINO use no more than the instructions `isa` in this process.

    Raises BadRequest for what `check_isa` refuses, where this CPU lacks the instructions itself, and where
    OpenVINO is loaded already: it reads the cap once.
    """
    check_isa(isa, artifacts)
    name, feature = ISAS[isa]
    features = cpu_info()["features"] or []
    if feature not in features:
        raise BadRequest(
            f"this CPU has no {feature}, so it cannot show what --max-isa {isa} would do; "
            f"it has {', '.join(features) or 'none of the known features'}"
        )
    if "openvino" in sys.modules:
        raise BadRequest("OpenVINO is loaded in this process and ignores a cap; use: vitkit bench --max-isa")
    for variable in _ISA_VARIABLES:
        os.environ[variable] = name


def request(artifacts: Iterable[str], options: Mapping[str, Any], max_isa: str | None) -> bytes:
    """What `main` reads: artifact folders, options of `bench`, and the cap of `--max-isa`."""
    images = options.get("images")
    plain = {**options, "images": str(images) if images else None}
    return json.dumps({"artifacts": list(artifacts), "options": plain, "max_isa": max_isa}).encode()


def collect(lines: Iterable[bytes], progress: Progress) -> list[BenchReport] | None:
    """Follow a worker's events to its reports; None where they end before.

    Raises the worker's error, and DeviceError where the worker crashed.
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
    """Raise the error that an event tells of, as the class it had."""
    known = {"BadArtifact", "BadInput", "BadRequest", "DeviceError"}
    kind = event.get("kind")
    raise getattr(errors, kind if kind in known else "DeviceError")(event["error"])


def crash_text(code: int) -> str:
    """What the exit code of a worker that ended without reports means."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the engine crashed while it was measured ({name}){cause}; nothing of this run was kept"
    return f"the measuring process ended with exit code {code}; nothing of this run was kept"


def bench_apart(
    artifacts: Iterable[Path],
    options: Mapping[str, Any],
    *,
    max_isa: str | None = None,
    progress: Progress = lambda text, fraction: None,
) -> list[BenchReport]:
    """`vitkit.bench.bench` in a process of its own, under a cap of instructions where `max_isa` is given.

    `options` are those of `bench` less `progress`. Raises what `bench` raises, and DeviceError where the
    engine crashes.
    """
    artifacts = [path.resolve() for path in artifacts]
    if max_isa is not None:
        check_isa(max_isa, artifacts)
    process = subprocess.Popen([sys.executable, *COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request(map(str, artifacts), options, max_isa))
        process.stdin.close()
        reports = collect(process.stdout, progress)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if reports is None:
        isa = f" under --max-isa {max_isa}: this engine has no working kernels for it" if max_isa else ""
        raise DeviceError(f"{crash_text(code)}{isa}")
    return reports


if __name__ == "__main__":
    main()

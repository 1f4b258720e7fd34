"""Engines in a process of their own, so that a crash of one is a finding and not the end of vitkit.

A worker measures engines (`bench`), or runs one on given inputs and returns its outputs (`run`).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.bench import BenchOptions, BenchReport, Progress, bench
from vitkit.bench.isa import check_isa
from vitkit.bench.measure import silent
from vitkit.devices.outputs import fingerprint, pack
from vitkit.runtimes import errors
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.engine import open_engine
from vitkit.runtimes.errors import DeviceError, VitkitError
from vitkit.runtimes.files import shown_as
from vitkit.runtimes.image import prepare_batch, read_image

# Lines of a device may come from anything that runs there; only those that start so are vitkit's.
MARK = "vitkit: "
COMMAND = ("-m", "vitkit.devices.worker")


def main() -> None:
    """Do what standard input asks for, as JSON; events go to standard output, a line each."""
    events = os.fdopen(os.dup(1), "wb")
    # What vendors print must not land among the events.
    os.dup2(2, 1)

    def send(following: Sequence[memoryview] = (), /, **event: Any) -> None:
        events.write(f"{MARK}{json.dumps(event)}\n".encode())
        for part in following:
            events.write(part)
        events.flush()

    asked = json.loads(sys.stdin.buffer.read())
    try:
        WORK[asked["do"]](asked, send)
    except VitkitError as error:
        send(error=str(error), kind=type(error).__name__)


def _bench(asked: Mapping[str, Any], send: Callable[..., None]) -> None:
    """Measure; `folder` is what relative paths are below: `artifacts`, and `options` as by `to_json`."""
    folder = Path(asked["folder"])
    options = BenchOptions.from_json(asked["options"])
    if options.images is not None:
        options = replace(options, images=folder / options.images)
    artifacts = [folder / path for path in asked["artifacts"]]
    reports = bench(artifacts, options, progress=lambda text, fraction: send(progress=[text, fraction]))
    send(reports=[asdict(report) for report in reports])


def _run(asked: Mapping[str, Any], send: Callable[..., None]) -> None:
    """Run the engine `artifact` on `groups` of inputs, each a file in `folder` and the user's name of it."""
    folder = Path(asked["folder"])
    artifact = folder / asked["artifact"]
    with (
        shown_as(artifact, asked["name"]),
        open_engine(artifact, threads=asked["threads"], device=asked["device"]) as engine,
    ):
        send(settings=engine.session.settings, device=engine.device)
        for group in asked["groups"]:
            inputs = np.concatenate([_load(folder / file, name, engine.card) for file, name in group])
            described, parts = pack(engine.run_batched(inputs))
            send(parts, outputs=described, inputs=[fingerprint(row) for row in inputs])


def _load(path: Path, name: str, card: ModelCard) -> NDArray[Any]:
    """The input (1, ...) in a `.npy` file as it is, or of an image file, prepared as in an app."""
    if path.suffix == ".npy":
        with path.open("rb") as file:
            inputs: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return inputs
    return prepare_batch([read_image(name, path.read_bytes())], card.image)


# What a worker can be asked to do.
WORK = {"bench": _bench, "run": _run}


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
            raise DeviceError(f"{crash_text(event['crashed'])}; nothing of this run was kept")
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


def crash_text(code: int, when: str = "while it was measured") -> str:
    """The meaning of the exit code of a worker that ended before its work."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the engine crashed {when} ({name}){cause}"
    return f"the engine's process ended {when} with exit code {code}"


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
        asked = {"do": "bench", "folder": "", "artifacts": list(map(str, artifacts))}
        process.stdin.write(json.dumps({**asked, "options": options.to_json()}).encode())
        process.stdin.close()
        reports = collect(process.stdout, progress)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if reports is None:
        cap = options.max_isa
        reason = f" under --max-isa {cap}: this engine has no working kernels for it" if cap else ""
        raise DeviceError(f"{crash_text(code)}; nothing of this run was kept{reason}")
    return reports


if __name__ == "__main__":
    main()

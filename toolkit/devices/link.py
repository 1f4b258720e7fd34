"""The near end of a connection to a device: sends files and a bench there, and returns the reports.

The far end is `vitkit.devices.agent`, whose `vitkit.devices.worker` runs the bench.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vitkit.bench import BenchOptions, BenchReport, Progress, labels
from vitkit.bench.isa import check_isa
from vitkit.bench.measure import silent
from vitkit.bench.pool import pool_files
from vitkit.devices.registry import Device
from vitkit.devices.wheel import runtime_wheel
from vitkit.devices.worker import collect, events, raise_error
from vitkit.doctor import Finding
from vitkit.runtimes.card import CARD_FILE, read_artifact, sha256
from vitkit.runtimes.engine import check_device
from vitkit.runtimes.errors import BadRequest, DeviceError, VitkitError
from vitkit.runtimes.tasks import decoder

# Above all of the user's configuration, which holds for the rest: keys, agent, jump hosts, known hosts.
_SSH_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "LogLevel": "ERROR",
}
_BEAT_S = 5.0
_PIECE = 1 << 18
_PATIENCE_S = 5.0
# The folder of the drawn images on the device.
_IMAGES = "images"

# Runs on the device before vitkit is there, maybe under an old Python: takes the wheel, then serves.
_BOOT = """
import hashlib, json, os, signal, sys
def say(**event):
    sys.stdout.write("vitkit: " + json.dumps(event) + chr(10))
    sys.stdout.flush()
folder = os.path.expanduser(FOLDER)
wheel = os.path.join(folder, "vitkit-" + DIGEST + ".whl")
def good():
    with open(wheel, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() == DIGEST
if sys.version_info < (3, 10):
    say(old=sys.version.split()[0])
    sys.exit(0)
if folder.startswith("~"):
    say(homeless=folder)
    sys.exit(0)
signal.alarm(60)
try:
    have = os.path.isfile(wheel) and good()
    say(python=sys.version.split()[0], have=have)
    if have:
        os.utime(wheel)
    else:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        part = "{}.{}".format(wheel, os.getpid())
        try:
            with open(part, "wb") as file:
                file.write(sys.stdin.buffer.read(SIZE))
            if os.path.getsize(part) == SIZE:
                os.replace(part, wheel)
        finally:
            if os.path.exists(part):
                os.unlink(part)
    if not os.path.isfile(wheel):
        sys.exit(0)
except OSError as error:
    say(error="{} cannot be used: {}".format(folder, error.strerror or error), kind="DeviceError")
    sys.exit(0)
signal.alarm(0)
sys.path.insert(0, wheel)
try:
    from pathlib import Path
    from vitkit.devices.agent import serve
except ImportError as error:
    say(lacks=error.name or str(error))
    sys.exit(0)
say(ready=True)
serve(Path(folder), Path(wheel))
"""


@dataclass(frozen=True)
class Condition:
    """A device's own diagnosis: its Python, whether it is a Jetson, and the findings of `doctor`."""

    python: str
    jetson: bool
    findings: list[Finding]


class Link:
    """A connection to a device; use it by `with`. Leaving ends whatever runs there.

    Raises DeviceError if the device cannot be reached or used, and if the link breaks.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._said: deque[str] = deque(maxlen=50)
        self._sending = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Link:
        digest, wheel = runtime_wheel()
        try:
            self._process = subprocess.Popen(
                _command(self.device, digest, len(wheel)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError as error:
            no_ssh = error.filename == "ssh"
            fix = "apt-get install openssh-client" if no_ssh else _again(self.device, "--python PATH")
            raise DeviceError(
                f"{self.device.name}: there is no {error.filename!r} here; fix it with: {fix}"
            ) from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._shake_hands(wheel)
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._ended.set()
        # The far end takes the end of its input for the order to stop; only then is the near end killed.
        with suppress(OSError):
            self._input.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").strip()
            # What a device prints must not steer the terminal.
            if clean := "".join(sign for sign in text if sign.isprintable()):
                self._said.append(clean)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with suppress(OSError, ValueError):
                self._send(b"\n")

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._input.write(data)
            self._input.flush()

    def _ask(self, **asked: Any) -> None:
        try:
            self._send(json.dumps(asked).encode() + b"\n")
        except OSError:
            raise self._lost() from None

    def _next(self) -> dict[str, Any]:
        for event in events(self._output):
            if "error" in event:
                self._raise(event)
            return event
        raise self._lost()

    def _raise(self, event: Mapping[str, Any]) -> None:
        raise_error({**event, "error": f"{self.device.name}: {event['error']}"})

    def _shake_hands(self, wheel: bytes) -> None:
        hello = self._next()
        name, python = self.device.name, self.device.python
        if "old" in hello:
            raise DeviceError(
                f"{name}: {python} is Python {hello['old']}, vitkit needs 3.10; name a newer one: "
                f"{_again(self.device, '--python PATH')}"
            )
        if "homeless" in hello:
            raise DeviceError(
                f"{name}: there is no home folder for {hello['homeless']}; name another folder: "
                f"{_again(self.device, '--folder PATH')}"
            )
        self.python = str(hello["python"])
        if not hello["have"]:
            try:
                self._send(wheel)
            except OSError:
                raise self._lost() from None
        ready = self._next()
        if "lacks" in ready:
            raise DeviceError(
                f"{name}: its {python} has no package {ready['lacks']!r}; install on the device with: "
                f"{python} -m pip install numpy pillow threadpoolctl, and the engine's package"
            )

    def _lost(self) -> DeviceError:
        """The reason why the far end fell silent, from the output of `ssh` and its exit code."""
        with suppress(OSError):
            self._input.close()
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = -1
        self._listener.join(1.0)
        return DeviceError(_reason(self.device, code, list(self._said)))

    def check(self) -> Condition:
        """Let the device diagnose itself."""
        self._ask(do="doctor")
        found = self._next()
        return Condition(self.python, found["jetson"], [Finding(**one) for one in found["findings"]])

    def send(self, files: Mapping[str, Path], progress: Progress) -> int:
        """Copy files, by SHA-256, that the device does not hold yet; returns how many bytes went over."""
        sizes = {digest: path.stat().st_size for digest, path in files.items()}
        self._ask(do="stored", files=sizes)
        found = self._next()
        wanted = sum(size - found["stored"][digest] for digest, size in sizes.items())
        if wanted > found["free"]:
            free, needed = f"{found['free'] / 1e6:.1f} MB free", f"{wanted / 1e6:.1f} MB are needed"
            raise DeviceError(
                f"{self.device.name}: the disk that holds {self.device.folder} has {free}, {needed}; "
                f"free some, or name another folder: {_again(self.device, '--folder PATH')}"
            )
        sent = 0
        for digest, path in files.items():
            if found["stored"][digest] < sizes[digest]:
                for size in self._put(digest, path, found["stored"][digest], sizes[digest]):
                    sent += size
                    progress(f"copying to {self.device.name}", sent / wanted)
        return sent

    def _put(self, digest: str, path: Path, offset: int, size: int) -> Iterator[int]:
        self._ask(do="put", file=digest, offset=offset, size=size)
        try:
            with self._sending, path.open("rb") as file:
                file.seek(offset)
                while data := file.read(_PIECE):
                    self._input.write(data)
                    yield len(data)
                self._input.flush()
        except BrokenPipeError:
            # It closed early for a reason, which it may have sent before.
            self._next()
            raise self._lost() from None
        self._next()

    def bench(
        self, artifacts: Sequence[Path], options: BenchOptions, *, progress: Progress = silent
    ) -> list[BenchReport]:
        """Copy artifacts to the device, measure them there by `vitkit.bench.bench`, return its reports.

        Of the folder `options.images`, the drawn sample is copied. Raises what `bench` raises, on the
        device. The link is used up then.
        """
        folders, files = _layout(artifacts, options)
        self.send(files, progress)
        self._ask(
            do="bench",
            artifacts=[str(i) for i in range(len(artifacts))],
            folders=folders,
            options={**options.to_json(), "images": _IMAGES if options.images else None},
        )
        try:
            reports = collect(self._output, progress)
        except VitkitError as error:
            raise type(error)(f"{self.device.name}: {error}") from None
        if reports is None:
            raise self._lost()
        return self._named(reports, artifacts, options)

    def _named(
        self, reports: list[BenchReport], artifacts: Sequence[Path], options: BenchOptions
    ) -> list[BenchReport]:
        names = labels(artifacts)
        for report in reports:
            report.environment["machine"] = {"name": self.device.name, "kind": self.device.kind}
            if options.images:
                report.pool["source"] = str(options.images)
        return [replace(report, artifact=names[int(report.artifact)]) for report in reports]


def _layout(
    artifacts: Sequence[Path], options: BenchOptions
) -> tuple[dict[str, dict[str, str]], dict[str, Path]]:
    """SHA-256 by folder and name of everything a bench reads, and the files by their SHA-256.

    On the device folders have numbers for names: the user's own are free to hold anything.
    """
    sources = {
        str(i): [path / name for name in (CARD_FILE, *read_artifact(path).card.files)]
        for i, path in enumerate(artifacts)
    }
    if options.images:
        sources[_IMAGES] = pool_files(options.images, options.pool_size, options.seed)
    folders: dict[str, dict[str, str]] = {folder: {} for folder in sources}
    files: dict[str, Path] = {}
    for folder, paths in sources.items():
        for i, path in enumerate(paths):
            digest = sha256(path)
            name = f"{i:05}{path.suffix}" if folder == _IMAGES else path.name
            folders[folder][name] = digest
            files[digest] = path
    return folders, files


def _command(device: Device, digest: str, size: int) -> list[str]:
    boot = f"FOLDER, DIGEST, SIZE = {device.folder!r}, {digest!r}, {size}\n{_BOOT}"
    # In hexadecimal there is nothing that a shell could take for its own.
    code = f"exec(bytes.fromhex('{boot.encode().hex()}').decode())"
    if device.kind == "local":
        return [os.path.expanduser(device.python), "-c", code]
    options = [part for key, value in _SSH_OPTIONS.items() for part in ("-o", f"{key}={value}")]
    line = f"exec {_quoted_path(device.python)} -c {shlex.quote(code)}"
    return ["ssh", *options, "-T", "--", device.address, line]


def _quoted_path(path: str) -> str:
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def _again(device: Device, change: str) -> str:
    address = f" --address {shlex.quote(device.address)}" if device.address else ""
    return f"vitkit device add {device.name} --kind {device.kind}{address} {change} --replace"


def _reason(device: Device, code: int, said: Sequence[str]) -> str:
    text, name, address = " ".join(said), device.name, device.address
    if code in (126, 127):
        return f"{name}: there is no Python at {device.python}; name one: {_again(device, '--python PATH')}"
    if code == 255 and device.kind != "local":
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in text:
            return (
                f"{name}: {address} shows another host key than the known one: it was set up anew, or is not "
                f"the machine you mean. If you are sure: ssh-keygen -R HOST, then once: ssh {address}"
            )
        if "host key" in text.lower():
            return f"{name}: the host key of {address} is not known; look at it once with: ssh {address}"
        if "Permission denied" in text:
            return f"{name}: {address} accepts none of your keys; send it one with: ssh-copy-id {address}"
        return f"{name}: the link to {address} failed: {said[-1] if said else 'it broke without a word'}"
    last = f": {said[-1]}" if said else ""
    return f"{name}: the device's process ended early (exit code {code}){last}"


def bench_on(
    device: Device, artifacts: Sequence[Path], options: BenchOptions, *, progress: Progress = silent
) -> list[BenchReport]:
    """Measure artifacts on a device; see `Link.bench`.

    Before the device is reached, raises BadRequest for an artifact of a target that the device is not meant
    for or that ignores `options.max_isa`, and DeviceError for an engine's device that the target cannot have.
    """
    for path in artifacts:
        _check_fits(device, path, options)
    progress(f"reaching {device.name}", 0.0)
    with Link(device) as link:
        if device.kind == "jetson" and not link.check().jetson:
            raise DeviceError(f"{device.name} is no Jetson; change its entry: --kind ssh")
        return link.bench(artifacts, options, progress=progress)


def _check_fits(device: Device, path: Path, options: BenchOptions) -> None:
    card = read_artifact(path).card
    if device.targets and card.target not in device.targets:
        meant = ", ".join(device.targets)
        raise BadRequest(
            f"{path} is compiled for {card.target}, and {device.name} is meant for {meant}; if it can run "
            f"that too: {_again(device, f'--target {card.target}')}"
        )
    check_device(card.target, options.device)
    decoder(card, options.decode)
    if options.max_isa is not None:
        check_isa(options.max_isa, [path])

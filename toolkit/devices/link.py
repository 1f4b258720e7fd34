"""The near end of a connection to a device: sends files and work there, and returns what comes of it.

The far end is `vitkit.devices.agent`, whose `vitkit.devices.worker` measures and runs engines.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from vitkit.bench import BenchOptions, BenchReport, Progress, labels
from vitkit.bench.isa import check_isa
from vitkit.bench.measure import silent
from vitkit.bench.pool import pool_files
from vitkit.devices.outputs import unpack
from vitkit.devices.registry import Device
from vitkit.devices.wheel import runtime_wheel
from vitkit.devices.worker import collect, crash_text, events, raise_error
from vitkit.doctor import Finding
from vitkit.runtimes.card import CARD_FILE, ModelCard, read_artifact, read_card, sha256
from vitkit.runtimes.engine import Outputs, check_device
from vitkit.runtimes.errors import BadInput, BadRequest, DeviceError, RunFailed, VitkitError
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
# Folders on the device: of a bench's drawn images, and of the inputs that an engine is run on.
_IMAGES, _INPUTS = "images", "inputs"
# There folders have plain names: the user's own are free to hold anything.
_ARTIFACT = "0"

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


class Ran(NamedTuple):
    """The outputs (N, ...) of one group of N inputs, and the SHA-256 of each input as prepared there."""

    outputs: Outputs
    inputs: list[str]


class Running(NamedTuple):
    """An engine that runs on a device: its vendor's settings in force, and its outputs as they arrive."""

    device: str
    settings: dict[str, Any]
    results: Iterator[Ran]


class Link:
    """A connection to a device; use it by `with`. Leaving ends whatever runs there.

    Raises DeviceError if the device cannot be reached or used, and if the link breaks.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._said: deque[str] = deque(maxlen=50)
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self.sent = 0

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
        # Outputs that nobody wants any more would keep it waiting.
        self._output.close()
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
                    self.sent += size
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
        sources = {str(i): _engine_files(path) for i, path in enumerate(artifacts)}
        if options.images:
            drawn = pool_files(options.images, options.pool_size, options.seed)
            sources[_IMAGES] = {f"{i:05}{path.suffix}": path for i, path in enumerate(drawn)}
        folders = self._send_folders(sources, progress)
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

    def run(
        self,
        artifact: Path,
        groups: Sequence[Sequence[Path]],
        *,
        device: str | None = None,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Running:
        """Copy an artifact and input files to the device, and run the engine there on one group at a time.

        An input is an image file, prepared there, or a `.npy` file of a prepared input (1, ...). `device` and
        `threads` are those of `open_engine`. Raises what `open_engine` raises, on the device; going through
        the results raises BadInput for an image that cannot be read, RunFailed if the engine fails or
        crashes, DeviceError for outputs that the card does not describe. The link is used up then.
        """
        sources = {_ARTIFACT: _engine_files(artifact), _INPUTS: {}}
        asked: list[list[tuple[str, str]]] = []
        for group in groups:
            asked.append([])
            for path in group:
                # The user's own names are free to hold anything.
                name = f"{len(sources[_INPUTS]):06}{path.suffix if path.suffix == '.npy' else ''}"
                sources[_INPUTS][name] = path
                asked[-1].append((f"{_INPUTS}/{name}", str(path)))
        folders = self._send_folders(sources, progress)
        progress(f"opening the engine on {self.device.name}", 0.0)
        self._ask(
            do="run",
            artifact=_ARTIFACT,
            name=str(artifact),
            groups=asked,
            folders=folders,
            device=device,
            threads=threads,
        )
        opened = self._next_of_run("while it was opened")
        try:
            results = self._results(read_card(artifact), groups)
            return Running(str(opened["device"]), dict(opened["settings"]), results)
        except (ValueError, KeyError, TypeError) as error:
            raise self._unusable("as it opened the engine", error) from None

    def _results(self, card: ModelCard, groups: Sequence[Sequence[Path]]) -> Iterator[Ran]:
        for group in groups:
            on = f"on {group[0]}{f' and {len(group) - 1} more' if len(group) > 1 else ''}"
            event = self._next_of_run(on)
            try:
                stream = cast(BufferedIOBase, self._output)
                ran = Ran(unpack(event["outputs"], stream, card.outputs, len(group)), list(event["inputs"]))
            except (ValueError, KeyError, TypeError) as error:
                raise self._unusable(on, error) from None
            except EOFError:
                raise self._lost() from None
            yield ran

    def _unusable(self, when: str, error: Exception) -> DeviceError:
        return DeviceError(f"{self.device.name}: what it returned {when} cannot be used: {error!r}")

    def _next_of_run(self, when: str) -> dict[str, Any]:
        event = self._next()
        if "crashed" in event:
            raise RunFailed(f"{self.device.name}: {crash_text(event['crashed'], when)}")
        return event

    def _send_folders(
        self, sources: Mapping[str, Mapping[str, Path]], progress: Progress
    ) -> dict[str, dict[str, str]]:
        """Copy files by folder and name; returns their SHA-256 in the same order."""
        try:
            folders = {
                folder: {name: sha256(path) for name, path in named.items()}
                for folder, named in sources.items()
            }
        except OSError as error:
            raise BadInput(f"a file cannot be sent to {self.device.name}: {error}") from None
        files = {folders[folder][name]: path for folder in sources for name, path in sources[folder].items()}
        self.send(files, progress)
        return folders

    def _named(
        self, reports: list[BenchReport], artifacts: Sequence[Path], options: BenchOptions
    ) -> list[BenchReport]:
        names = labels(artifacts)
        for report in reports:
            report.environment["machine"] = {"name": self.device.name, "kind": self.device.kind}
            if options.images:
                report.pool["source"] = str(options.images)
        return [replace(report, artifact=names[int(report.artifact)]) for report in reports]


def _engine_files(artifact: Path) -> dict[str, Path]:
    """Everything that opening an engine reads, by name."""
    return {name: artifact / name for name in (CARD_FILE, *read_artifact(artifact).card.files)}


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


@contextmanager
def connect(device: Device, progress: Progress = silent) -> Iterator[Link]:
    """An open `Link`; raises DeviceError as it does, and if the device is no Jetson but should be."""
    progress(f"reaching {device.name}", 0.0)
    with Link(device) as link:
        if device.kind == "jetson" and not link.check().jetson:
            raise DeviceError(f"{device.name} is no Jetson; change its entry: --kind ssh")
        yield link


def bench_on(
    device: Device, artifacts: Sequence[Path], options: BenchOptions, *, progress: Progress = silent
) -> list[BenchReport]:
    """Measure artifacts on a device; see `Link.bench`.

    Before the device is reached, raises BadRequest for an artifact of a target that the device is not meant
    for or that ignores `options.max_isa`, and DeviceError for an engine's device that the target cannot have.
    """
    for path in artifacts:
        card = check_fits(device, path, options.device)
        decoder(card, options.decode)
        if options.max_isa is not None:
            check_isa(options.max_isa, [path])
    with connect(device, progress) as link:
        return link.bench(artifacts, options, progress=progress)


def check_fits(device: Device, path: Path, engine_device: str | None) -> ModelCard:
    """The card of an artifact that may run on a device; raises BadArtifact, and else as `bench_on`."""
    card = read_artifact(path).card
    if device.targets and card.target not in device.targets:
        meant = ", ".join(device.targets)
        raise BadRequest(
            f"{path} is compiled for {card.target}, and {device.name} is meant for {meant}; if it can run "
            f"that too: {_again(device, f'--target {card.target}')}"
        )
    check_device(card.target, engine_device)
    return card


def check_runs_engines(device: Device, path: Path, engine_device: str | None) -> ModelCard:
    """The card of an artifact whose outputs are wanted from a device.

    Raises BadRequest for a phone, and what `check_fits` raises.
    """
    if device.kind == "adb":
        raise BadRequest(
            f"{device.name} is a phone, whose benchmark_model measures but returns no outputs; use a machine "
            f"of kind ssh, or measure alone with: vitkit bench {path} --device {device.name}"
        )
    return check_fits(device, path, engine_device)

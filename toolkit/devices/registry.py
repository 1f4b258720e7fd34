"""The user's devices: `devices.toml`, a table for each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitkit.bench.jetson import is_jetson
from vitkit.runtimes.engine import RUNTIMES
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.files import user_folder, write_text
from vitkit.runtimes.reading import read_toml

KINDS = ("local", "ssh", "jetson", "adb")
_PHONE_FOLDER = "/data/local/tmp/vitkit"
# Devices of this machine's engines; no entry may have such a name.
ENGINE_DEVICES = ("cpu", "gpu", "npu", "cuda", "auto")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Device:
    """A machine that engines can be measured on.

    `kind`: `local` is another Python on this machine, `ssh` a machine that the system's `ssh` reaches,
    `jetson` such a machine that must be a Jetson, `adb` a phone. `address` is what `ssh` takes: HOST,
    USER@HOST, a name of the user's SSH configuration, or `ssh://USER@HOST:PORT`; of a phone its serial
    number, or nothing if only one is plugged in. `python` is the device's Python 3.10 or newer that holds
    numpy and the vendors' packages; `folder` holds the files that are kept there. Both may start with `~/`.
    `targets` are those that the device is meant for; none means any. `tool` is, for a phone, the user's
    `benchmark_model`, a file on this machine.
    """

    name: str
    kind: str
    address: str = ""
    python: str = "python3"
    folder: str = "~/.cache/vitkit"
    targets: tuple[str, ...] = ()
    tool: str = ""

    def __post_init__(self) -> None:
        """Raises BadRequest for a field that cannot be."""
        if not _NAME.fullmatch(self.name) or self.name.lower().split(".")[0] in ENGINE_DEVICES:
            raise BadRequest(
                f"a device cannot be named {self.name!r}; use letters, digits, '.', '_' and '-', and none of "
                f"{', '.join(ENGINE_DEVICES)}"
            )
        if self.kind not in KINDS:
            raise BadRequest(f"the kind of {self.name} is {self.kind!r}; known are {', '.join(KINDS)}")
        if self.kind == "local" and self.address:
            raise BadRequest(f"{self.name} is local and has the address {self.address!r}; leave it out")
        needs_none = self.kind == "local" or (self.kind == "adb" and not self.address)
        if not needs_none and not re.fullmatch(r"[^\s\x00-\x1f\x7f-][^\s\x00-\x1f\x7f]*", self.address):
            raise BadRequest(
                f"the address of {self.name} is {self.address!r}; give what ssh takes: --address USER@HOST"
            )
        for what in ("python", "folder"):
            if not getattr(self, what) or any(ord(sign) < 32 for sign in getattr(self, what)):
                raise BadRequest(f"the {what} of {self.name} is {getattr(self, what)!r}; give a path")
        if self.kind == "adb" and self.folder == Device.folder:
            object.__setattr__(self, "folder", _PHONE_FOLDER)
        object.__setattr__(self, "targets", tuple(target.lower() for target in self.targets))
        if unknown := [target for target in self.targets if target not in RUNTIMES]:
            raise BadRequest(f"{self.name} has the target {unknown[0]!r}; known are {', '.join(RUNTIMES)}")


def default_file() -> Path:
    """`devices.toml` in the user's configuration folder; raises BadRequest as `user_folder` does."""
    return user_folder("config") / "devices.toml"


def read_devices(file: Path) -> dict[str, Device]:
    """Devices by name; none if the file does not exist. Raises BadRequest if it is damaged."""
    try:
        tables = read_toml(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadRequest(f"{file} cannot be read: {error}") from None
    return {name: _device(name, table, file) for name, table in tables.items()}


def _device(name: str, table: Any, file: Path) -> Device:
    known = ("kind", "address", "python", "folder", "targets", "tool")
    if not isinstance(table, dict):
        raise BadRequest(f"{file}: {name!r} is no table; a device is a table such as [{name}]")
    if unknown := sorted(set(table) - set(known)):
        raise BadRequest(f"{file}: {name} has the unknown key {unknown[0]!r}; known are {', '.join(known)}")
    for key, value in table.items():
        texts = value if key == "targets" and isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest(f"{file}: {key} of {name} is {value!r}, not text")
    targets = table.get("targets", [])
    if isinstance(targets, str):
        raise BadRequest(f"{file}: targets of {name} is {targets!r}; write [{targets!r}]")
    try:
        return Device(**{**table, "name": name, "kind": table.get("kind", ""), "targets": tuple(targets)})
    except BadRequest as error:
        raise BadRequest(f"{file}: {error}") from None


def write_devices(devices: Mapping[str, Device], file: Path) -> None:
    """Write all devices, replacing the file whole; raises BadRequest if it cannot be written."""
    blocks = []
    for device in devices.values():
        values = {key: value for key, value in asdict(device).items() if key != "name" and value}
        lines = [f"[{_quoted(device.name)}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
        blocks.append("\n".join(lines) + "\n")
    write_text(file, "\n".join(blocks))


def _value(value: str | Sequence[str]) -> str:
    return _quoted(value) if isinstance(value, str) else f"[{', '.join(map(_quoted, value))}]"


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's too, but TOML wants one more character escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def find_machine(device: str | None, file: Path | None = None) -> tuple[Device | None, str | None]:
    """The machine that `--device` means (None: this one), and the engine's device on it (None: the default).

    `device` is an engine's device of this machine such as `cpu`, a name in `file` (None: the user's own
    file), or `NAME:DEVICE`; an engine's device needs no such file. `jetson` means the entry of that name,
    else the only entry of that kind, else this machine if it is a Jetson. Raises BadRequest, with the
    command that adds an entry, if nothing fits.
    """
    if not device or device.lower().split(":")[0].split(".")[0] in ENGINE_DEVICES:
        return None, device
    name, _, engine_device = device.partition(":")
    return _find_entry(name, file or default_file()), engine_device or None


def _find_entry(name: str, file: Path) -> Device | None:
    devices = read_devices(file)
    if name in devices:
        return devices[name]
    if name == "jetson":
        boards = [device for device in devices.values() if device.kind == "jetson"]
        if len(boards) > 1:
            names = ", ".join(board.name for board in boards)
            raise BadRequest(f"{file} has several Jetsons, {names}: name one with --device NAME")
        if boards:
            return boards[0]
        if is_jetson():
            return None
        raise BadRequest(
            f"this machine is no Jetson, and {file} names none; add it with: "
            "vitkit device add jetson --kind jetson --address USER@HOST"
        )
    raise BadRequest(
        f"there is no device {name!r}: {file} names {', '.join(devices) or 'none'}, and this machine's own "
        f"are {', '.join(ENGINE_DEVICES)}; add it with: vitkit device add {name} --address USER@HOST"
    )

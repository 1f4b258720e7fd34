"""Energy counters: the CPU's own (RAPL) and a Jetson's power rails. Both are estimates, not a wall meter."""

from __future__ import annotations

import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from vitkit.bench.jetson import is_jetson, joules, parse_tegrastats
from vitkit.runtimes.errors import BadInput

_RAILS_MS = 100
_FIRST_LINE_S = 3.0


class Meter(Protocol):
    """A counter of energy; `source` names what it counts, for reports."""

    source: str

    def joules(self) -> float:
        """Energy in J since the meter was opened; never falls."""
        ...

    def close(self) -> None:
        """Stop whatever measures."""
        ...


class Rapl:
    """The energy counters of all CPU packages in `/sys/class/powercap`, which wrap around."""

    source = "RAPL, CPU packages"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj") + 1) for zone in zones]
        self._last = [_number(path) for path, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Energy in J of all packages, whatever runs on them, since the meter was opened."""
        for i, (path, wrap) in enumerate(self._zones):
            now = _number(path)
            self._total += (now - self._last[i]) % wrap
            self._last[i] = now
        return self._total / 1e6

    def close(self) -> None:
        """Nothing to stop."""


class Rails:
    """Power of a Jetson by tegrastats, a sample every 0.1 s, integrated; see `TegraStats.watts`.

    Blocks of a bench are hardly longer than a sample, so engines measured in turns blur into each other:
    measure one alone for its energy.
    """

    source = "on-board rails, whole module or board"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._first = threading.Event()
        self._last: tuple[float, float] | None = None
        self._total = 0.0
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def works(self) -> bool:
        """True once a line with power has come; waits for it for some seconds."""
        return self._first.wait(_FIRST_LINE_S)

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(BadInput):
                watts = parse_tegrastats(line).watts
                if watts is not None:
                    self._add(time.monotonic(), watts)

    def _add(self, now: float, watts: float) -> None:
        with self._lock:
            if self._last is not None:
                self._total += joules([self._last, (now, watts)])
            self._last = (now, watts)
        self._first.set()

    def joules(self) -> float:
        """Energy in J since the first sample, with the last sample's power up to now."""
        with self._lock:
            if self._last is None:
                return 0.0
            return self._total + (time.monotonic() - self._last[0]) * self._last[1]

    def close(self) -> None:
        """Stop tegrastats."""
        self._process.kill()
        self._process.wait()


def open_meter(root: Path = Path("/")) -> Meter | None:
    """The best meter that this machine has and that may be read; None if there is none.

    RAPL can often be read by root alone. `root` is the folder that holds `sys`, `proc` and `etc`.
    """
    if is_jetson(root):
        return _open_rails()
    zones = [
        zone
        for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        # Parts of a package have a second number, and count in it already.
        if zone.name.count(":") == 1 and _readable(zone)
    ]
    return Rapl(zones) if zones else None


def _open_rails() -> Rails | None:
    command = ["tegrastats", "--interval", str(_RAILS_MS)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    rails = Rails(process)
    if rails.works:
        return rails
    rails.close()
    return None


def _readable(zone: Path) -> bool:
    try:
        package = (zone / "name").read_text().startswith("package")
        return package and _number(zone / "energy_uj") >= 0 and _number(zone / "max_energy_range_uj") > 0
    except (OSError, ValueError):
        return False


def _number(path: Path) -> int:
    return int(path.read_text())

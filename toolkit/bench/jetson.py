"""Reading a Jetson: the lines of tegrastats, its power mode, and whether it throttled."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Sequence
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from vitkit.runtimes.errors import BadInput

# Rails that carry the whole module; boards without one add up the rest.
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
# Fed by VIN_SYS_5V0, or not connected: a sum with them would count twice, or noise.
_NOT_ADDED = ("VDDQ_VDD2_1V8AO", "NC")
# Printed by tegrastats for a sensor whose part is switched off.
_ABSENT_C = -256.0
_TOOL_S = 10.0

_DATE = re.compile(r"(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d) ")
_MEMORY = re.compile(r"\b(RAM|SWAP) (\d+)/(\d+)MB")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(r"(?:(\d+)%)?(?:@(\d+))?$")
_GPU = re.compile(r"\bGR3D\d*_FREQ (?:(\d+)%)?(?:@(?:\[([\d,]*)\]|(\d+)))?(?= |$)")
_EMC = re.compile(r"\bEMC_FREQ (\d+)%(?:@(\d+))?(?= |$)")
_TEMPERATURE = re.compile(r"(?<= )(\w+)@(-?\d+(?:\.\d+)?)C(?:/-?\d+(?:\.\d+)?C)?(?= |$)")
_RAIL = re.compile(r"(?<= )([A-Za-z]\w*) (-?\d+)(?:mW(?:/-?\d+mW)*|(?:/-?\d+){1,2})(?= |$)")


class Core(NamedTuple):
    """One CPU core: its load in per cent and clock in MHz, None if the line lacks it."""

    load: int | None
    mhz: int | None


class TegraStats(NamedTuple):
    """One line of tegrastats.

    `time` is the board's clock if the line has one; `ram_mb` and `swap_mb` are (used, total); `cores`
    has None for a core that is off; `gpu_load` is in per cent, `gpu_mhz` one clock for each part of the
    GPU; `emc_load` and `emc_mhz` are of the memory controller. `temperatures` are in degrees Celsius, of
    the sensors that are switched on; `power_mw` is the present reading of each rail in mW, a negative one
    as it stands.
    """

    time: datetime | None
    ram_mb: tuple[int, int] | None
    swap_mb: tuple[int, int] | None
    cores: tuple[Core | None, ...]
    gpu_load: int | None
    gpu_mhz: tuple[int, ...]
    emc_load: int | None
    emc_mhz: int | None
    temperatures: dict[str, float]
    power_mw: dict[str, int]

    @property
    def watts(self) -> float | None:
        """Power in W: of the input rail of module or board, else the sum of the rails; None without rails.

        Never negative. An idle rail of Thor reads about -400 mW, which is the offset of its sensor and no
        power that flows back, so that it counts as 0 and takes nothing from the other rails. On AGX boards
        the sum leaves out the memory's rail, which the 5 V rail contains.
        """
        power = {name: max(0, reading) for name, reading in self.power_mw.items()}
        for name in _TOTAL_RAILS:
            if name in power:
                return power[name] / 1000
        added = [value for name, value in power.items() if name not in _NOT_ADDED]
        return sum(added) / 1000 if added else None


def parse_tegrastats(line: str) -> TegraStats:
    """Read one line as any board and JetPack from 4 to 7 prints it; raises BadInput for other lines.

    The formats differ: rails with or without `mW`, with one to three values (present, average, peak), the
    GPU with clocks, without them or with nothing else, cores that are off. What a line lacks is None or
    empty. A rail that occurs twice is the sum of both.
    """
    line = line.strip()
    memory = {name: (int(used), int(total)) for name, used, total in _MEMORY.findall(line)}
    if "RAM" not in memory:
        raise BadInput(f"this is no line of tegrastats, which names the RAM: {line[:80]!r}")
    cpu, emc, date = _CPU.search(line), _EMC.search(line), _DATE.match(line)
    gpus = [match.groups() for match in _GPU.finditer(line)]
    loads = [int(load) for load, _, _ in gpus if load]
    clocks = ",".join(several or single or "" for _, several, single in gpus)
    power: dict[str, int] = {}
    for name, present in _RAIL.findall(line):
        power[name] = power.get(name, 0) + int(present)
    found = {name: float(value) for name, value in _TEMPERATURE.findall(line)}
    return TegraStats(
        time=_time(date.group(1)) if date else None,
        ram_mb=memory["RAM"],
        swap_mb=memory.get("SWAP"),
        cores=tuple(_core(item) for item in cpu.group(1).split(",")) if cpu else (),
        gpu_load=max(loads, default=None),
        gpu_mhz=tuple(int(clock) for clock in clocks.split(",") if clock),
        emc_load=int(emc.group(1)) if emc else None,
        emc_mhz=int(emc.group(2)) if emc and emc.group(2) else None,
        temperatures={name: value for name, value in found.items() if value != _ABSENT_C},
        power_mw=power,
    )


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%m-%d-%Y %H:%M:%S")
    except ValueError:
        return None


def _core(text: str) -> Core | None:
    match = _CORE.match(text.strip())
    if text.strip() in ("", "off") or match is None:
        return None
    load, mhz = match.groups()
    return Core(int(load) if load else None, int(mhz) if mhz else None)


def joules(samples: Sequence[tuple[float, float]]) -> float:
    """Energy of power samples (time in s, power in W), by the trapezoidal rule; 0 for fewer than two.

    Raises BadInput if time runs backwards.
    """
    total = 0.0
    for (start, first), (end, second) in pairwise(samples):
        if end < start:
            raise BadInput(f"power samples run backwards in time, from {start} s to {end} s")
        total += (end - start) * (first + second) / 2
    return total


def is_jetson(root: Path = Path("/")) -> bool:
    """True on a Jetson. `root` is the folder that holds `etc` and `proc`."""
    if (root / "etc/nv_tegra_release").exists():
        return True
    model = _read(root / "proc/device-tree/model") or ""
    return "jetson" in model.lower()


def board_state() -> dict[str, Any]:
    """Power mode, clocks, temperatures and throttling of this Jetson now, ready for JSON.

    `nvpmodel` is the output of the tool of that name, `tegrastats` one line as `parse_tegrastats` reads it;
    None if a tool is missing or prints nothing.
    """
    mode, line = _output_of(["nvpmodel", "-q"]), _output_of(["tegrastats", "--interval", "200"], lines=1)
    try:
        stats = parse_tegrastats(line)._asdict() if line else None
    except BadInput:
        stats = None
    if stats:
        del stats["time"]
    return {"nvpmodel": mode, "tegrastats": stats, "throttling": throttling()}


def _output_of(command: Sequence[str], lines: int | None = None) -> str | None:
    """The first `lines` that a tool prints, or all until it ends; None if it cannot be run."""
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            watchdog = threading.Timer(_TOOL_S, process.kill)
            watchdog.start()
            assert process.stdout is not None
            text = "".join(islice(process.stdout, lines)).strip()
            watchdog.cancel()
            process.kill()
    except OSError:
        return None
    return text or None


def throttling(root: Path = Path("/")) -> dict[str, int]:
    """Counters of what slows a Jetson down, by name; throttling raises them, or sets them above 0.

    `gpu-throttle-alert` and the like are 1 while the board is too hot; `oc1` to `oc3` count the events of
    low voltage and of too much current since boot. Empty on other machines.
    """
    counts = {}
    for folder in sorted(root.glob("sys/class/thermal/cooling_device*")):
        kind = _read(folder / "type") or ""
        if kind.endswith("-alert"):
            counts[kind] = _number(folder / "cur_state")
    for path in sorted(root.glob("sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt")):
        counts[path.name.removesuffix("_event_cnt")] = _number(path)
    return counts


def throttled(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Names of what slowed the board down between two calls of `throttling`."""
    alerts = [name for name in after if name.endswith("-alert") and (after[name] or before.get(name))]
    events = [name for name in after if not name.endswith("-alert") and after[name] > before.get(name, 0)]
    return alerts + events


def _number(path: Path) -> int:
    text = _read(path) or ""
    return int(text) if text.isdigit() else 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None

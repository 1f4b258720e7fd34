"""Facts about the CPU that go with a measurement, from /proc and /sys; other systems leave many unknown."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

# The instructions that decide which precision pays: wide vectors, INT8 dot products, 16-bit floats.
X86_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx_vnni_int8",
    "avx_ne_convert",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme")
INT8_FEATURES = frozenset(
    ("avx_vnni", "avx_vnni_int8", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "svei8mm")
)
BF16_FEATURES = frozenset(("avx_ne_convert", "avx512_bf16", "amx_bf16", "bf16", "svebf16"))


def cpu_info(root: Path = Path("/")) -> dict[str, Any]:
    """Facts about this machine's CPU, ready for JSON; None if the system does not provide one.

    `model` and `architecture` are names, `cores` counts logical cores and `usable_cores` those this
    process may run on, `features` lists the known instruction sets that every core has, `governor` is
    the frequency policy, `load_average` the runnable processes over 1, 5 and 15 minutes. `root` is the
    folder that holds `proc` and `sys`.
    """
    text = _read(root / "proc/cpuinfo") or ""
    return {
        "model": _model(text, root),
        "architecture": platform.machine() or None,
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "features": _features(text),
        "governor": _governor(root),
        "load_average": load_average(),
    }


def load_average() -> list[float] | None:
    """Runnable processes, averaged over 1, 5 and 15 minutes; None if the system does not count them."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _values(cpuinfo: str, key: str) -> list[str]:
    return re.findall(rf"^{key}[ \t]*:[ \t]*(.*)$", cpuinfo, re.MULTILINE | re.IGNORECASE)


def _model(cpuinfo: str, root: Path) -> str | None:
    if names := _values(cpuinfo, "model name"):
        return names[0].strip()
    # ARM kernels name the board rather than the core; the part number identifies the core.
    parts = sorted(set(zip(_values(cpuinfo, "CPU implementer"), _values(cpuinfo, "CPU part"), strict=False)))
    cores = ", ".join(f"implementer {implementer} part {part}" for implementer, part in parts)
    board = _read(root / "proc/device-tree/model")
    known = [name for name in (board, cores) if name]
    return " / ".join(known) or platform.processor() or None


def _features(cpuinfo: str) -> list[str] | None:
    cores = [set(line.split()) for key in ("flags", "Features") for line in _values(cpuinfo, key)]
    if not cores:
        return None
    # A thread may land on any core, so a feature counts only if the little cores have it as well.
    shared = set.intersection(*cores)
    return [name for name in (*X86_FEATURES, *ARM_FEATURES) if name in shared]


def _governor(root: Path) -> str | None:
    files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    found = {value for path in files if (value := _read(path))}
    return ", ".join(sorted(found)) or None


def _usable_cores() -> int | None:
    # Not offered by macOS and Windows.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else None

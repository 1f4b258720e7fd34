"""Limits how long torch's idle threads spin: beside other processes that slows training many times.

After each parallel loop GNU's OpenMP, which torch brings, waits in a busy loop for the next one. If another
process wants those cores, the threads that still compute wait for those that spin. It reads the variable
once, when torch is first imported; so the packages of vitkit that use torch import this module first. Here,
because NNCF is the first in the order of imports to load torch. Spawned processes inherit the variable.

No single value does: 1000 costs nothing on idle cores and too much on busy ones, 100 a fifth on idle ones
(docs/results/training.md).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "GOMP_SPINCOUNT"
IDLE, BUSY = "1000", "100"
_LOAD = Path("/proc/loadavg")
_LOOKS, _PAUSE_S = 5, 0.004


def limit_spinning() -> None:
    """Set the variable, unless the user set it or `OMP_WAIT_POLICY`, which it would overrule."""
    if VARIABLE not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        os.environ[VARIABLE] = BUSY if _others_running() >= (os.cpu_count() or 1) / 2 else IDLE


def _others_running() -> int:
    """How many threads beside this one want a core all the time; 0 if the system does not count them."""
    counts = []
    for _ in range(_LOOKS):
        try:
            # "0.20 0.18 0.12 1/80 11206": of 80 threads 1 runs or could, this one included. The averages
            # before it take a minute to follow.
            counts.append(int(_LOAD.read_text().split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(_PAUSE_S)
    return min(counts)


limit_spinning()

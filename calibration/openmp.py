"""Limits how long torch's idle threads spin: beside other processes that slows training many times.

After each parallel loop GNU's OpenMP, which torch brings, waits in a busy loop for the next one. If another
process wants those cores, the threads that still compute wait for those that spin. It reads the variable
once, when torch is first imported; so the packages of vitkit that use torch import this module first. Here,
because NNCF is the first in the order of imports to load torch. Spawned processes inherit the variable.
docs/results/training.md has the measurements.
"""

from __future__ import annotations

import os

VARIABLE = "GOMP_SPINCOUNT"
_ITERATIONS = "300"


def limit_spinning() -> None:
    """Set the variable, unless the user set it or `OMP_WAIT_POLICY`, which it would overrule."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(VARIABLE, _ITERATIONS)


limit_spinning()

"""Random numbers that depend on a run's seed and the place in it, never on what was drawn before.

So a resumed run, another number of decoding workers or of processes draw the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*place: int) -> int:
    """A seed (0..2^63-1) for a place such as (run's seed, epoch, image)."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators of Python, numpy and torch start at a seed; then they are as before.

    torch's is that of the CPU.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

"""The steps of the demo, how long each is expected to take, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# The machine's speed is taken for the expected one until steps worth this many seconds are done.
_PRIOR_S = 20.0


class Plan:
    """Named steps with the seconds that each takes on two idle cores.

    The time left is that of the steps not yet done, corrected by how fast the finished ones went.
    `changed` is called with the plan whenever a step starts, advances or ends.
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        changed: Callable[[Plan], object] = lambda plan: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.expected, self._changed, self._clock = dict(expected), changed, clock
        self.seconds: dict[str, float] = {}
        self.name = ""
        self.fraction = 0.0
        self._start = clock()

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Run one step; call what it yields with (done, total). Raises KeyError for an unknown name."""
        self.expected[name]
        self.name, self.fraction = name, 0.0
        start = self._clock()
        self._changed(self)
        yield self._advance
        self.seconds[name] = self._clock() - start
        self.name, self.fraction = "", 0.0
        self._changed(self)

    def _advance(self, done: int, total: int) -> None:
        self.fraction = done / total
        self._changed(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the plan was made."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that the rest is expected to take."""
        done = sum(self.expected[name] for name in self.seconds)
        done += self.expected.get(self.name, 0.0) * self.fraction
        pace = (self.elapsed + _PRIOR_S) / (done + _PRIOR_S)
        return max(0.0, sum(self.expected.values()) - done) * pace

    def __str__(self) -> str:
        """`[3/10] panoptic: training 42 %, 1:20 elapsed, about 3:10 left`."""
        number = min(len(self.seconds) + 1, len(self.expected))
        state = f"{self.name} {100 * self.fraction:.0f} %" if self.name else "done"
        return (
            f"[{number}/{len(self.expected)}] {state}, "
            f"{_minutes(self.elapsed)} elapsed, about {_minutes(self.left)} left"
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

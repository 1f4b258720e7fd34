"""Time by operator and by module of an artifact, and the same as a trace for Chrome and Perfetto."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from vitkit.bench.options import BenchOptions
from vitkit.bench.pool import make_pool
from vitkit.runtimes.engine import open_engine
from vitkit.runtimes.files import write_text
from vitkit.runtimes.operators import Operator, Profile, Timing

# Threads of the trace, which are drawn one below the other.
_RUNS, _OPERATORS = 1, 2


class Share(NamedTuple):
    """Operators that belong together: how many run in one run of the engine, and their mean time in it.

    `share` is that of the time of all operators, 0 to 1.
    """

    label: tuple[str, ...]
    operators: float
    ms: float
    share: float


@dataclass(frozen=True)
class ArtifactProfile:
    """The profile of one artifact: what was opened, how, and what the vendor's profiler measured."""

    artifact: str
    target: str
    precision: str
    device: str
    threads: int | None
    profile: Profile

    @property
    def run_ms(self) -> float:
        """Mean wall time of a run in ms, with what the profiler itself costs."""
        return fmean(self.profile.runs_ns) / 1e6

    @property
    def operators_ms(self) -> float:
        """Mean of the sum of all operators' times in one run, in ms."""
        return sum(timing.duration_ns for timing in self.profile.timings) / self.profile.timed_runs / 1e6

    @property
    def by_operator(self) -> list[Share]:
        """By kind, precision and device, the slowest first."""
        return self._shares(lambda one: (one.kind, one.precision, one.device))

    @property
    def by_module(self) -> list[Share]:
        """By module path, the slowest first; empty for what the vendor added."""
        return self._shares(lambda one: (one.module,))

    def _shares(self, label: Callable[[Operator], tuple[str, ...]]) -> list[Share]:
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for timing in self.profile.timings:
            groups[label(timing.operator)].append(timing.duration_ns)
        runs, total = self.profile.timed_runs, self.operators_ms
        found = [
            Share(name, len(times) / runs, ms := sum(times) / runs / 1e6, ms / total if total else 0.0)
            for name, times in groups.items()
        ]
        return sorted(found, key=lambda one: -one.ms)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values: times in ms, means over the runs."""
        return {
            "artifact": self.artifact,
            "target": self.target,
            "precision": self.precision,
            "device": self.device,
            "threads": self.threads,
            "source": self.profile.source,
            "missing": self.profile.missing,
            "runs_ms": [time / 1e6 for time in self.profile.runs_ns],
            "run_ms": self.run_ms,
            "operators_ms": self.operators_ms,
            "by_operator": [
                {**dict(zip(("kind", "precision", "device"), one.label, strict=True)), **_figures(one)}
                for one in self.by_operator
            ],
            "by_module": [{"module": one.label[0], **_figures(one)} for one in self.by_module],
            "operators": [
                {**dict(zip(Operator._fields, one.label, strict=True)), **_figures(one)}
                for one in self._shares(tuple)
            ],
        }


def _figures(one: Share) -> dict[str, float]:
    return {"operators": one.operators, "ms": one.ms, "share": one.share}


def profile(
    path: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    runs: int = 20,
    images: Path | None = None,
) -> ArtifactProfile:
    """Profile an artifact by its vendor's profiler, on an image of the folder `images` or a generated one.

    Raises what `open_engine` and `Engine.profile` raise.
    """
    options = BenchOptions(device=device, threads=threads, images=images, pool_size=1)
    (image,) = make_pool(options).images
    with open_engine(path, device=device, threads=threads) as engine:
        feeds = {engine.card.inputs[0].name: engine.prepare([image] * (engine.batch or 1))}
        found = engine.profile(feeds, runs)
        card = engine.card
        return ArtifactProfile(
            path.resolve().name, card.target, card.precision, engine.device, threads, found
        )


def write_trace(found: ArtifactProfile, path: Path) -> None:
    """Write the runs and their operators in Chrome's trace event format, for chrome://tracing and Perfetto.

    If the vendor keeps only means, one mean run is drawn, its operators one after another; `otherData` of the
    trace has a note of that. Raises BadRequest if the file cannot be written.
    """
    is_mean = found.profile.is_mean
    about = {
        "artifact": found.artifact,
        "device": found.device,
        "source": found.profile.source,
        "missing": found.profile.missing,
        "starts": "not measured: operators of a mean run, one after another" if is_mean else "measured",
    }
    events = [
        _named("process_name", 0, f"{found.artifact} on {found.device}"),
        _named("thread_name", _RUNS, "runs"),
        _named("thread_name", _OPERATORS, "operators"),
        *_events(found.profile),
    ]
    body = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    write_text(path, json.dumps(body) + "\n")


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def _events(found: Profile) -> Iterable[dict[str, Any]]:
    inside: dict[int, list[Timing]] = defaultdict(list)
    for timing in found.timings:
        inside[timing.run].append(timing)
    walls = [round(fmean(found.runs_ns))] if found.is_mean else found.runs_ns
    start = 0
    for run, length in enumerate(walls):
        name = f"mean of {len(found.runs_ns)} runs" if found.is_mean else f"run {run}"
        yield _event(name, "run", _RUNS, start, length, {})
        end = start
        for one in inside[run]:
            begin = end if one.start_ns is None else start + one.start_ns
            end = begin + one.duration_ns
            about = one.operator._asdict()
            yield _event(one.operator.name, one.operator.kind, _OPERATORS, begin, one.duration_ns, about)
        start = max(start + length, end)


def _event(
    name: str, category: str, thread: int, start: int, length: int, about: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": start / 1e3, "dur": length / 1e3}
    return {"name": name, "cat": category, "ph": "X", "pid": 1, "tid": thread, **times, "args": about}

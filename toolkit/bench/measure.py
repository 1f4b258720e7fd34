"""Measuring engines: single stream, interleaved, raw times kept. Needs no torch."""

from __future__ import annotations

import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from vitkit.bench.cpu import cpu_info, load_average
from vitkit.bench.energy import Meter, open_meter
from vitkit.bench.isa import cap_isa
from vitkit.bench.jetson import board_state, is_jetson, throttled
from vitkit.bench.options import BenchOptions
from vitkit.bench.placement import placement
from vitkit.bench.pool import make_pool
from vitkit.bench.report import BenchReport
from vitkit.bench.trtexec import cross_check, find_trtexec
from vitkit.runtimes.card import read_card
from vitkit.runtimes.engine import RUNTIMES, Engine, open_engine
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.image import Image

STAGES = ("prepare", "run", "decode")
WARMUP_RUNS = 10
WARMUP_S = 1.0
# The vendors' thread pools keep spinning for some milliseconds after a run and would slow the next
# engine by a factor of 2 to 3; after this pause they sleep.
PAUSE_S = 0.03
# Long enough to spread the cost of pause and settling query, short enough that every engine meets the
# same slow moments of the machine.
BLOCK_NS = 100_000_000
MIN_BLOCK = 5

Progress = Callable[[str, float], None]
Times = tuple[int, tuple[int, ...]]
Query = Callable[[], Times]


class _Opened(NamedTuple):
    label: str
    engine: Engine
    batch: int
    load_ns: int
    first_ns: int


@dataclass
class _Lane:
    """One artifact in one scope while it is measured."""

    opened: _Opened
    scope: str
    query: Query
    block: int = MIN_BLOCK
    warmup_ns: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    stages_ns: list[tuple[int, ...]] = field(default_factory=list)
    measured_ns: int = 0
    joules: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.opened.label} ({self.scope})"


class _Call(NamedTuple):
    """Values that the reports of one call of `bench` share."""

    options: BenchOptions
    started: str
    environment: dict[str, Any]
    pool: dict[str, Any]
    energy_source: str | None


def silent(text: str, fraction: float) -> None:
    """A `Progress` that shows nothing."""


def bench(
    artifacts: Sequence[Path],
    options: BenchOptions | None = None,
    *,
    progress: Progress = silent,
) -> list[BenchReport]:
    """Measure artifacts side by side in this process; one report for each scope and artifact, in order.

    Each report holds at least `options.duration` seconds of recorded queries, one after another. Inputs are
    drawn at random with replacement from the pool of images; every artifact meets the same sequence. An
    engine of fixed batch size is given that many images in each query, any other `options.batch`. If this
    machine has `trtexec`, it times TensorRT engines too, afterwards and with all engines closed: some seconds
    each. `options.max_isa` limits OpenVINO in this process from then on. `progress(text, fraction)` is called
    between the measured blocks, with the present step and the share of the time that is over.

    Raises BadRequest for no artifact, BadInput if no image can be read, and what `open_engine` and `cap_isa`
    raise.
    """
    options = options or BenchOptions()
    if not artifacts:
        raise BadRequest("no artifact to measure; name at least one folder that `vitkit export` wrote")
    if options.max_isa is not None:
        cap_isa(options.max_isa, artifacts)
    started = datetime.now(timezone.utc).isoformat()
    environment = _environment(options)
    pool = make_pool(options)
    with ExitStack() as stack:
        opened = []
        for path, label in zip(artifacts, labels(artifacts), strict=True):
            progress(f"opening {label}", 0.0)
            opened.append(_open(path, label, options, pool.images))
            stack.callback(opened[-1].engine.close)
            if options.require_device:
                opened[-1].engine.require_device()
        lanes = [_lane(one, scope, pool.images, options.seed) for scope in options.scopes for one in opened]
        meter = open_meter()
        if meter is not None:
            stack.callback(meter.close)
        _run(lanes, options, meter, progress)
        environment.update(_afterwards(environment))
        # After the measurement, since reading back may open an engine once more.
        places = {one.label: placement(one.engine) for one in opened}
    call = _Call(options, started, environment, pool.description, meter.source if meter else None)
    reports = [_report(lane, call, places[lane.opened.label]) for lane in lanes]
    _cross_check(reports, lanes, progress)
    return reports


def labels(artifacts: Sequence[Path]) -> list[str]:
    """Names of artifacts in reports: those of their folders, or the paths if names repeat."""
    names = [path.resolve().name for path in artifacts]
    return names if len(set(names)) == len(names) else [str(path) for path in artifacts]


def _environment(options: BenchOptions) -> dict[str, Any]:
    from vitkit import __version__

    cpu = cpu_info()
    return {
        "load_average_before": cpu.pop("load_average"),
        "cpu": cpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "vitkit": __version__,
        "command": shlex.join(sys.argv),
        **({"emulated_isa": options.max_isa} if options.max_isa else {}),
        **({"jetson_before": board_state()} if is_jetson() else {}),
    }


def _afterwards(before: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"load_average_after": load_average()}
    if "jetson_before" in before:
        found["jetson_after"] = board_state()
        states = (before["jetson_before"]["throttling"], found["jetson_after"]["throttling"])
        found["throttled"] = throttled(*states)
    return found


def _open(path: Path, label: str, options: BenchOptions, images: list[Image]) -> _Opened:
    runtime = RUNTIMES.get(read_card(path).target)
    # Otherwise the first artifact of a vendor would seem slow to load; open_engine explains a failure.
    with suppress(ImportError):
        if runtime is not None:
            import_module(runtime.module)
    time.sleep(PAUSE_S)
    start = time.perf_counter_ns()
    engine = open_engine(path, threads=options.threads, device=options.device, decode=options.decode)
    load_ns = time.perf_counter_ns() - start
    batch = engine.batch or options.batch
    feeds = {engine.card.inputs[0].name: engine.prepare([images[i % len(images)] for i in range(batch)])}
    start = time.perf_counter_ns()
    engine.run(feeds)
    return _Opened(label, engine, batch, load_ns, time.perf_counter_ns() - start)


# Queries, one kind for each scope


def _lane(opened: _Opened, scope: str, images: list[Image], seed: int) -> _Lane:
    # A generator of its own for each lane, all alike: every engine meets the same images.
    rng = np.random.default_rng([seed, 1])
    return _Lane(opened, scope, _QUERIES[scope](opened.engine, opened.batch, images, rng))


def _engine_query(engine: Engine, batch: int, images: list[Image], rng: np.random.Generator) -> Query:
    name, prepared = engine.card.inputs[0].name, engine.prepare(images)

    def query() -> Times:
        feeds = {name: prepared[rng.integers(len(prepared), size=batch)]}
        start = time.perf_counter_ns()
        engine.run(feeds)
        return time.perf_counter_ns() - start, ()

    return query


def _image_query(engine: Engine, batch: int, images: list[Image], rng: np.random.Generator) -> Query:
    def query() -> Times:
        drawn = [images[i] for i in rng.integers(len(images), size=batch)]
        # Timed from outside as well: freeing the arrays belongs to the query, and shows as a gap.
        start = time.perf_counter_ns()
        stages = _prepare_run_decode(engine, drawn)
        return time.perf_counter_ns() - start, stages

    return query


def _prepare_run_decode(engine: Engine, images: list[Image]) -> tuple[int, ...]:
    start = time.perf_counter_ns()
    inputs = engine.prepare(images)
    prepared = time.perf_counter_ns()
    outputs = engine.run_batched(inputs)
    ran = time.perf_counter_ns()
    engine.decode(outputs, images)
    return prepared - start, ran - prepared, time.perf_counter_ns() - ran


_QUERIES = {"engine": _engine_query, "image": _image_query}


# The schedule


def _run(lanes: list[_Lane], options: BenchOptions, meter: Meter | None, progress: Progress) -> None:
    """Warm up and measure all lanes; both count in the share of the time that `progress` gets."""
    warmup_share = WARMUP_S / (WARMUP_S + options.duration)
    for i, lane in enumerate(lanes):
        progress(f"warming up {lane.name}", warmup_share * i / len(lanes))
        _warm_up(lane)
    _choose_blocks(lanes)
    rng = np.random.default_rng([options.seed, 2])
    _measure(
        lanes,
        options.duration,
        rng,
        # So written, the end is 1 exactly.
        lambda text, fraction: progress(text, 1 - (1 - warmup_share) * (1 - fraction)),
        meter,
    )


def _warm_up(lane: _Lane) -> None:
    time.sleep(PAUSE_S)
    total = 0
    while len(lane.warmup_ns) < WARMUP_RUNS or total < WARMUP_S * 1e9:
        lane.warmup_ns.append(lane.query()[0])
        total += lane.warmup_ns[-1]


def _choose_blocks(lanes: list[_Lane]) -> None:
    """Give every lane as many queries in a block as take equally long, so that all end in the same round."""
    typical = [median(lane.warmup_ns[-WARMUP_RUNS:]) for lane in lanes]
    block_ns = max(BLOCK_NS, MIN_BLOCK * max(typical))
    for lane, each in zip(lanes, typical, strict=True):
        lane.block = max(MIN_BLOCK, math.ceil(block_ns / each))


def _measure(
    lanes: list[_Lane],
    duration: float,
    rng: np.random.Generator,
    progress: Progress,
    meter: Meter | None = None,
) -> None:
    """Rounds of one block for each lane, in drawn order, until all have `duration` seconds recorded."""
    number, wanted_ns = 0, duration * 1e9
    while min(lane.measured_ns for lane in lanes) < wanted_ns:
        for i in rng.permutation(len(lanes)):
            lane = lanes[i]
            # Before the pause, so that whatever shows it is at rest while queries are timed.
            progress(f"measuring {lane.name}", _recorded_share(lanes, wanted_ns))
            _measure_block(lane, number, meter)
        number += 1
    progress("measured", 1.0)


def _recorded_share(lanes: list[_Lane], wanted_ns: float) -> float:
    return sum(min(lane.measured_ns / wanted_ns, 1.0) for lane in lanes) / len(lanes)


def _measure_block(lane: _Lane, number: int, meter: Meter | None) -> None:
    time.sleep(PAUSE_S)
    # Unrecorded: it finds threads asleep and caches full of the previous engine.
    lane.query()
    joules = meter.joules() if meter else 0.0
    for _ in range(lane.block):
        wall, stages = lane.query()
        lane.times_ns.append(wall)
        lane.stages_ns.append(stages)
        lane.rounds.append(number)
        lane.measured_ns += wall
    lane.joules += meter.joules() - joules if meter else 0.0


# The reports


def _report(lane: _Lane, call: _Call, place: dict[str, Any]) -> BenchReport:
    opened, options = lane.opened, call.options
    artifact, card = opened.engine.artifact, opened.engine.card
    return BenchReport(
        artifact=opened.label,
        name=card.name,
        target=card.target,
        precision=card.precision,
        files=artifact.hashes(),
        size_bytes=artifact.size_bytes,
        device=opened.engine.device,
        scope=lane.scope,
        batch=opened.batch,
        threads=options.threads,
        load_ns=opened.load_ns,
        first_ns=opened.first_ns,
        warmup_runs=len(lane.warmup_ns),
        warmup_ns=sum(lane.warmup_ns),
        times_ns=lane.times_ns,
        rounds=lane.rounds,
        stages_ns=_by_stage(lane.stages_ns),
        pool=call.pool,
        protocol={
            "pause_s": PAUSE_S,
            "settling_queries": 1,
            "block": lane.block,
            "decode": dict(options.decode or {}),
        },
        settings=dict(opened.engine.session.settings),
        environment=dict(call.environment),
        started=call.started,
        energy={"source": call.energy_source, "joules": lane.joules} if call.energy_source else None,
        placement=place,
    )


def _by_stage(stages: list[tuple[int, ...]]) -> dict[str, list[int]]:
    if not stages[0]:
        return {}
    return {name: list(times) for name, times in zip(STAGES, zip(*stages, strict=True), strict=True)}


def _cross_check(reports: list[BenchReport], lanes: list[_Lane], progress: Progress) -> None:
    tool = find_trtexec()
    for i, lane in enumerate(lanes):
        plan = lane.opened.engine.session.plan
        if tool and plan and lane.scope == "engine":
            progress(f"cross-checking {lane.opened.label} by trtexec", 1.0)
            reports[i] = replace(reports[i], cross_check=cross_check(tool, plan))

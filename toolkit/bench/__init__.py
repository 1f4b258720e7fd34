"""Measuring engines: single stream, interleaved, raw times kept. Needs no torch."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from vitkit.bench.cpu import cpu_info, load_average
from vitkit.bench.energy import Meter, open_meter
from vitkit.bench.jetson import board_state, is_jetson, throttled
from vitkit.bench.trtexec import check_fields, cross_check, find_trtexec
from vitkit.runtimes.card import read_card
from vitkit.runtimes.engine import RUNTIMES, Engine, open_engine
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.files import write_text
from vitkit.runtimes.image import Image, find_images, generated_photos, read_image

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
# Samples from which at most one beyond the true percentile has a chance of 1 % or less, so that the
# percentile is known at 99 % confidence (the early stopping of MLPerf Inference). A median is always
# printed, beside the number of samples.
MIN_SAMPLES = {50.0: 1, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6640}
STAGES = ("prepare", "run", "decode")
SCOPES = {"engine": "prepared feeds in, outputs out", "image": "photographs in, decoded results out"}
MAX_STAGE_GAP = 0.02
WARMUP_RUNS = 10
WARMUP_S = 1.0
# The vendors' thread pools keep spinning for some milliseconds after a run and would slow the next
# engine by a factor of 2 to 3; after this pause they sleep.
PAUSE_S = 0.03
# Runnable processes a core, before the bench itself, from which on latencies are also those of others.
NOISY_LOAD = 0.25
# Long enough to spread the cost of pause and settling query, short enough that every engine meets the
# same slow moments of the machine.
BLOCK_NS = 100_000_000
MIN_BLOCK = 5
# Eleven days: a longer query in a file is no measurement.
MAX_NS = 10**15
GENERATED_SIZES = ((480, 640), (640, 480), (600, 800), (720, 1280))

Progress = Callable[[str, float], None]
Times = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class BenchReport:
    """Raw times of one artifact in one scope, and everything needed to judge them.

    Scope `engine` is prepared feeds in, outputs out; scope `image` is photographs in, decoded results
    out. `times_ns` are the wall times of the queries in the order they ran, a query taking `batch`
    images; `rounds` tells in which round of the interleaving each ran; `stages_ns` holds the times of
    prepare, run and decode (empty for scope `engine`). `load_ns` is the opening of the artifact, its
    vendor package already imported; `first_ns` is the first run of the engine after that. `started`
    identifies the call of `bench`: only reports that share it were measured together. `energy` holds the
    `joules` that the machine took over all recorded queries, and the `source` of that estimate; None where
    no meter can be read. `cross_check` is what `vitkit.bench.trtexec.cross_check` found about a TensorRT
    engine in scope `engine`; None for others, and where there is no `trtexec`.
    """

    artifact: str
    name: str
    target: str
    precision: str
    files: dict[str, str]
    size_bytes: int
    device: str
    scope: str
    batch: int
    threads: int | None
    load_ns: int
    first_ns: int
    warmup_runs: int
    warmup_ns: int
    times_ns: list[int]
    rounds: list[int]
    stages_ns: dict[str, list[int]]
    pool: dict[str, Any]
    protocol: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    started: str
    energy: dict[str, Any] | None = None
    cross_check: dict[str, Any] | None = None

    @property
    def n(self) -> int:
        """Number of recorded queries."""
        return len(self.times_ns)

    def percentile(self, q: float) -> int | None:
        """Percentile `q` (50, 90, 95, 99 or 99.9) of the query times in ns, or None where `n` is too small.

        By nearest rank: the smallest recorded time that at least q % of the recorded times do not exceed.
        Raises BadRequest for another `q`.
        """
        if q not in MIN_SAMPLES:
            raise BadRequest(f"percentile {q} is not reported; known are {', '.join(map(str, MIN_SAMPLES))}")
        if self.n < MIN_SAMPLES[q]:
            return None
        # Rounded first: 99.9 % of 10,000 is a little more than 9,990 in binary fractions.
        rank = math.ceil(round(q * self.n / 100, 6))
        return sorted(self.times_ns)[rank - 1]

    @property
    def percentiles_ms(self) -> dict[str, float | None]:
        """`p50`, `p90`, `p95`, `p99` and `p99.9` in ms; None where `n` is too small for one."""
        found = {f"p{q:g}": self.percentile(q) for q in MIN_SAMPLES}
        return {name: None if value is None else value / 1e6 for name, value in found.items()}

    @property
    def images_per_second(self) -> float:
        """Images over the sum of the query times, so pauses between blocks do not count."""
        return self.batch * self.n / sum(self.times_ns) * 1e9

    @property
    def stage_medians_ms(self) -> dict[str, float]:
        """Median of prepare, run and decode in ms; empty for scope `engine`."""
        return {stage: median(times) / 1e6 for stage, times in self.stages_ns.items()}

    @property
    def joules_per_image(self) -> float | None:
        """Energy of an image in J, that of everything else on the machine included; None without a meter."""
        return self.energy["joules"] / (self.batch * self.n) if self.energy and self.n else None

    @property
    def trtexec_ns(self) -> float | None:
        """Median GPU compute time of a query by `trtexec`, without copies; None without a cross-check."""
        times = (self.cross_check or {}).get("gpu_ns")
        return median(times) if times else None

    @property
    def cross_check_ratio(self) -> float | None:
        """p50 over `trtexec_ns`: what copies, launches, waiting and Python add; None without the latter."""
        own, other = self.percentile(50.0), self.trtexec_ns
        return own / other if own and other else None

    @property
    def emulated(self) -> str | None:
        """The instruction set that the CPU was capped to, to show a lesser one; None for the real machine."""
        isa: str | None = self.environment.get("emulated_isa")
        return isa

    @property
    def stage_gap(self) -> float | None:
        """Share of the wall time that no stage accounts for; None for scope `engine`."""
        if not self.stages_ns:
            return None
        return 1 - sum(map(sum, self.stages_ns.values())) / sum(self.times_ns)

    @property
    def invalid(self) -> str | None:
        """Why this measurement must not be used; None where it may."""
        if slowed := self.environment.get("throttled"):
            return f"the board throttled itself meanwhile ({', '.join(slowed)}): cool it, or feed it better"
        gap = self.stage_gap
        if gap is None or abs(gap) <= MAX_STAGE_GAP:
            return None
        return f"its stages leave {gap:.1%} of the wall time unexplained, more than {MAX_STAGE_GAP:.0%}"

    def to_json(self) -> dict[str, Any]:
        """All fields, raw times included, and under `summary` what is computed from them."""
        summary = {
            "n": self.n,
            "percentiles_ms": self.percentiles_ms,
            "images_per_second": self.images_per_second,
            "stage_medians_ms": self.stage_medians_ms,
            "stage_gap": self.stage_gap,
            "joules_per_image": self.joules_per_image,
            "cross_check_ratio": self.cross_check_ratio,
            "emulated": self.emulated,
            "invalid": self.invalid,
        }
        return {**asdict(self), "summary": summary}


class Ratio(NamedTuple):
    """How many times faster an artifact is than the reference, per image, in one scope.

    Each round gives a ratio, the reference's median time in it over this artifact's, so that both met the
    same moments of the machine; `ratio` is the median over the rounds. `low` and `high` bound it at 95 %
    confidence by the order statistics of the ratios, which assumes nothing about their distribution; None
    below 6 rounds, which cannot support it.
    """

    artifact: str
    reference: str
    scope: str
    ratio: float
    low: float | None
    high: float | None
    rounds: int


class _Pool(NamedTuple):
    images: list[Image]
    description: dict[str, Any]


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
    query: Callable[[], Times]
    block: int = MIN_BLOCK
    warmup_ns: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    stages_ns: list[tuple[int, ...]] = field(default_factory=list)
    measured_ns: int = 0
    joules: float = 0.0


def _silent(text: str, fraction: float) -> None:
    pass


def bench(
    artifacts: Sequence[Path],
    *,
    device: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    duration: float = 10.0,
    images: Path | None = None,
    pool_size: int = 32,
    seed: int = 0,
    scopes: Sequence[str] = ("engine", "image"),
    decode: Mapping[str, Any] | None = None,
    progress: Progress = _silent,
) -> list[BenchReport]:
    """Measure artifacts side by side in this process; one report for each scope and artifact, in order.

    Each report holds at least `duration` seconds of recorded queries, one after another. Inputs are drawn
    at random with replacement, by `seed`, from a pool of `pool_size` photographs: a sample of the folder
    `images`, or generated ones where it is None; every artifact meets the same sequence. An engine of fixed
    batch size is given that many images a query, any other `batch`. `device` and `decode` go to
    `open_engine`. Where this machine has `trtexec`, it times TensorRT engines too, afterwards and with all
    engines closed: some seconds each. `progress(text, fraction)` is called on the way.

    Raises BadRequest for options out of range, BadInput where no image can be read, and what
    `open_engine` raises.
    """
    _check_request(artifacts, batch, duration, pool_size, seed, scopes)
    started = datetime.now(timezone.utc).isoformat()
    environment = _environment()
    pool = _pool(images, pool_size, seed)
    with ExitStack() as stack:
        opened = []
        for path, label in zip(artifacts, labels(artifacts), strict=True):
            progress(f"opening {label}", 0.0)
            settings = {"device": device, "threads": threads, "decode": decode}
            opened.append(_open(path, label, settings, batch, pool.images))
            stack.callback(opened[-1].engine.close)
        lanes = [_lane(one, scope, pool.images, seed) for scope in scopes for one in opened]
        for lane in lanes:
            progress(f"warming up {lane.opened.label} ({lane.scope})", 0.0)
            _warm_up(lane)
        _choose_blocks(lanes)
        meter = open_meter()
        if meter is not None:
            stack.callback(meter.close)
        _measure(lanes, duration, np.random.default_rng([seed, 2]), progress, meter)
        environment.update(_afterwards(environment))
    source = meter.source if meter else None
    reports = [
        _report(lane, device, threads, decode, pool.description, environment, started, source)
        for lane in lanes
    ]
    _cross_check(reports, lanes, progress)
    return reports


def _cross_check(reports: list[BenchReport], lanes: list[_Lane], progress: Progress) -> None:
    tool = find_trtexec()
    for i, lane in enumerate(lanes):
        # Sessions of TensorRT know the file of their engine.
        plan = getattr(lane.opened.engine.session, "plan", None)
        if tool and plan and lane.scope == "engine":
            progress(f"cross-checking {lane.opened.label} by trtexec", 1.0)
            reports[i] = replace(reports[i], cross_check=cross_check(tool, plan))


def _check_request(
    artifacts: Sequence[Path], batch: int, duration: float, pool_size: int, seed: int, scopes: Sequence[str]
) -> None:
    if not artifacts:
        raise BadRequest("no artifact to measure; name at least one folder that `vitkit export` wrote")
    for what, value, least in (("batch", batch, 1), ("pool size", pool_size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise BadRequest(f"the {what} is {value!r}; it must be a whole number of at least {least}")
    if not (math.isfinite(duration) and duration > 0):
        raise BadRequest(f"the duration is {duration!r}; it must be a positive number of seconds")
    if not scopes or not set(scopes) <= set(_QUERIES):
        raise BadRequest(f"the scopes are {', '.join(scopes) or 'none'}; known are {', '.join(_QUERIES)}")


def labels(artifacts: Sequence[Path]) -> list[str]:
    """What reports call artifacts: the names of their folders, or the paths where names repeat."""
    names = [path.resolve().name for path in artifacts]
    return names if len(set(names)) == len(names) else [str(path) for path in artifacts]


def _environment() -> dict[str, Any]:
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
        **({"jetson_before": board_state()} if is_jetson() else {}),
    }


def _afterwards(before: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"load_average_after": load_average()}
    if "jetson_before" in before:
        found["jetson_after"] = board_state()
        states = (before["jetson_before"]["throttling"], found["jetson_after"]["throttling"])
        found["throttled"] = throttled(*states)
    return found


def _pool(folder: Path | None, size: int, seed: int) -> _Pool:
    rng = np.random.default_rng([seed, 0])
    if folder is None:
        sizes = rng.choice(GENERATED_SIZES, size)
        images = [_photograph(int(height), int(width), int(rng.integers(1 << 32))) for height, width in sizes]
        return _Pool(images, {"source": "generated", "size": size, "seed": seed})
    files, images, unreadable = find_images(folder), [], []
    for path in _shuffled(files, seed):
        if len(images) == size:
            break
        try:
            images.append(read_image(path))
        except BadInput as error:
            unreadable.append(str(error))
    if not images:
        reason = f": {unreadable[0]}" if unreadable else ""
        raise BadInput(
            f"none of the {len(files)} images below {folder} can be read{reason}; "
            "name a folder of photographs, or none to measure on generated ones"
        )
    description = {"source": str(folder), "size": len(images), "seed": seed, "unreadable": len(unreadable)}
    return _Pool(images, description)


def pool_files(folder: Path, size: int, seed: int) -> list[Path]:
    """The files that a pool of `size` images is drawn from, and some to spare for unreadable ones.

    Raises BadInput where the folder holds no image.
    """
    return _shuffled(find_images(folder), seed)[: 2 * size]


def _shuffled(files: list[Path], seed: int) -> list[Path]:
    return [files[i] for i in np.random.default_rng([seed, 0]).permutation(len(files))]


def _photograph(height: int, width: int, seed: int) -> Image:
    # Drawn at a quarter of the size: all of it takes sixteen times as long, and fine grain changes no speed.
    (small,) = generated_photos(1, seed, (height // 4, width // 4))
    return small.repeat(4, axis=0).repeat(4, axis=1)


def _open(path: Path, label: str, settings: Mapping[str, Any], batch: int, images: list[Image]) -> _Opened:
    runtime = RUNTIMES.get(read_card(path).target)
    # Otherwise the first artifact of a vendor would seem slow to load; open_engine explains a failure.
    with suppress(ImportError):
        if runtime is not None:
            import_module(runtime.module)
    time.sleep(PAUSE_S)
    start = time.perf_counter_ns()
    engine = open_engine(path, **settings)
    load_ns = time.perf_counter_ns() - start
    size = engine.batch or batch
    feeds = {engine.card.inputs[0].name: engine.prepare([images[i % len(images)] for i in range(size)])}
    start = time.perf_counter_ns()
    engine.run(feeds)
    return _Opened(label, engine, size, load_ns, time.perf_counter_ns() - start)


def _lane(opened: _Opened, scope: str, images: list[Image], seed: int) -> _Lane:
    # A generator of its own for each lane, all alike: every engine meets the same images.
    rng = np.random.default_rng([seed, 1])
    return _Lane(opened, scope, _QUERIES[scope](opened.engine, opened.batch, images, rng))


def _engine_query(
    engine: Engine, batch: int, images: list[Image], rng: np.random.Generator
) -> Callable[[], Times]:
    name, prepared = engine.card.inputs[0].name, engine.prepare(images)

    def query() -> Times:
        feeds = {name: prepared[rng.integers(len(prepared), size=batch)]}
        start = time.perf_counter_ns()
        engine.run(feeds)
        return time.perf_counter_ns() - start, ()

    return query


def _image_query(
    engine: Engine, batch: int, images: list[Image], rng: np.random.Generator
) -> Callable[[], Times]:
    def query() -> Times:
        photos = [images[i] for i in rng.integers(len(images), size=batch)]
        # Timed from outside as well: freeing the arrays belongs to the query, and shows as a gap.
        start = time.perf_counter_ns()
        stages = _prepare_run_decode(engine, photos)
        return time.perf_counter_ns() - start, stages

    return query


def _prepare_run_decode(engine: Engine, photos: list[Image]) -> tuple[int, ...]:
    start = time.perf_counter_ns()
    inputs = engine.prepare(photos)
    prepared = time.perf_counter_ns()
    outputs = engine.run_batched(inputs)
    ran = time.perf_counter_ns()
    engine.decode(outputs, photos)
    return prepared - start, ran - prepared, time.perf_counter_ns() - ran


_QUERIES = {"engine": _engine_query, "image": _image_query}


def _warm_up(lane: _Lane) -> None:
    time.sleep(PAUSE_S)
    total = 0
    while len(lane.warmup_ns) < WARMUP_RUNS or total < WARMUP_S * 1e9:
        lane.warmup_ns.append(lane.query()[0])
        total += lane.warmup_ns[-1]


def _choose_blocks(lanes: list[_Lane]) -> None:
    """Give every lane as many queries a block as take equally long, so that all end in the same round."""
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
    number, done = 0, 0.0
    while done < 1:
        for i in rng.permutation(len(lanes)):
            lane = lanes[i]
            time.sleep(PAUSE_S)
            # Unrecorded: it finds threads asleep and caches full of the previous engine.
            lane.query()
            joules = meter.joules() if meter else 0.0
            for _ in range(lane.block):
                _record(lane, number)
            lane.joules += meter.joules() - joules if meter else 0.0
        number += 1
        done = min(lane.measured_ns for lane in lanes) / (duration * 1e9)
        progress(f"measuring, round {number}", min(done, 1.0))


def _record(lane: _Lane, number: int) -> None:
    wall, stages = lane.query()
    lane.times_ns.append(wall)
    lane.stages_ns.append(stages)
    lane.rounds.append(number)
    lane.measured_ns += wall


def _report(
    lane: _Lane,
    device: str | None,
    threads: int | None,
    decode: Mapping[str, Any] | None,
    pool: dict[str, Any],
    environment: dict[str, Any],
    started: str,
    meter: str | None,
) -> BenchReport:
    opened = lane.opened
    artifact, card = opened.engine.artifact, opened.engine.card
    return BenchReport(
        artifact=opened.label,
        name=card.name,
        target=card.target,
        precision=card.precision,
        files=artifact.hashes(),
        size_bytes=artifact.size_bytes,
        device=device or RUNTIMES[card.target].device,
        scope=lane.scope,
        batch=opened.batch,
        threads=threads,
        load_ns=opened.load_ns,
        first_ns=opened.first_ns,
        warmup_runs=len(lane.warmup_ns),
        warmup_ns=sum(lane.warmup_ns),
        times_ns=lane.times_ns,
        rounds=lane.rounds,
        stages_ns=_by_stage(lane.stages_ns),
        pool=pool,
        protocol={
            "pause_s": PAUSE_S,
            "settling_queries": 1,
            "block": lane.block,
            "decode": dict(decode or {}),
        },
        settings=dict(opened.engine.session.settings),
        environment=dict(environment),
        started=started,
        energy={"source": meter, "joules": lane.joules} if meter else None,
    )


def _by_stage(stages: list[tuple[int, ...]]) -> dict[str, list[int]]:
    if not stages[0]:
        return {}
    return {name: list(times) for name, times in zip(STAGES, zip(*stages, strict=True), strict=True)}


def compare(reports: Sequence[BenchReport]) -> list[Ratio]:
    """Each artifact against the first one of its scope, above 1 where it is faster.

    Raises BadRequest for reports that were not measured together.
    """
    return [ratio for ratio in _ratios(reports) if ratio is not None]


def _ratios(reports: Sequence[BenchReport]) -> list[Ratio | None]:
    first: dict[str, BenchReport] = {}
    references = [first.setdefault(report.scope, report) for report in reports]
    return [
        None if reference is report else _ratio(reference, report)
        for reference, report in zip(references, reports, strict=True)
    ]


def _ratio(reference: BenchReport, report: BenchReport) -> Ratio:
    if reference.started != report.started:
        raise BadRequest(
            f"{reference.artifact} and {report.artifact} were not measured together, so their times do not "
            f"compare; measure them in one go: vitkit bench {reference.artifact} {report.artifact}"
        )
    per_image = report.batch / reference.batch
    base, own = _round_medians(reference), _round_medians(report)
    ratios = [base[number] / own[number] * per_image for number in sorted(base.keys() & own.keys())]
    if not ratios:
        raise BadInput(
            f"{reference.artifact} and {report.artifact} have no round in common; measure them again"
        )
    low, high = _median_interval(ratios)
    return Ratio(report.artifact, reference.artifact, report.scope, median(ratios), low, high, len(ratios))


def _round_medians(report: BenchReport) -> dict[int, float]:
    times: dict[int, list[int]] = {}
    for number, each in zip(report.rounds, report.times_ns, strict=True):
        times.setdefault(number, []).append(each)
    return {number: median(values) for number, values in times.items()}


def _median_interval(values: list[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the median: each value lies above it with a chance of one half (sign test)."""
    ordered, cut, tail = sorted(values), 0, 0.0
    while cut <= len(ordered):
        tail += math.comb(len(ordered), cut) / 2 ** len(ordered)
        if 2 * tail > 0.05:
            break
        cut += 1
    return (ordered[cut - 1], ordered[-cut]) if cut else (None, None)


def save(reports: Sequence[BenchReport], path: Path) -> None:
    """Write reports as one JSON file, raw times included; raises BadRequest where it cannot be written."""
    body = {"format": FORMAT, "reports": [report.to_json() for report in reports]}
    write_text(path, json.dumps(body) + "\n")


def load(path: Path) -> list[BenchReport]:
    """Read what `save` wrote; raises BadInput where the file is missing or is not such a file."""
    try:
        return from_body(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not a file of bench reports: {error!r}") from None


def from_body(body: Any, path: Path) -> list[BenchReport]:
    """The reports in the JSON of the file `path`; raises BadInput as `load`."""
    try:
        if body["format"] != FORMAT:
            raise BadInput(f"{path} has report format {body['format']!r}; this vitkit reads {FORMAT}")
        return [_from_json(one) for one in body["reports"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a file of bench reports: {error!r}") from None


def _from_json(body: Mapping[str, Any]) -> BenchReport:
    report = BenchReport(**{key: value for key, value in body.items() if key != "summary"})
    for name, kind in get_type_hints(BenchReport).items():
        if not _fits(getattr(report, name), kind):
            raise ValueError(f"{name!r} is {str(getattr(report, name))[:80]!r}, no {kind}")
    if not report.times_ns or not all(1 <= time <= MAX_NS for time in report.times_ns):
        raise ValueError(f"'times_ns' must hold times from 1 to {MAX_NS} ns")
    if report.batch < 1:
        raise ValueError(f"'batch' is {report.batch}; it must be at least 1")
    if report.cross_check is not None:
        check_fields(report.cross_check)
    if any(len(each) != report.n for each in (report.rounds, *report.stages_ns.values())):
        raise ValueError("'rounds' and 'stages_ns' must hold one number for each of 'times_ns'")
    return report


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has the type of an annotation."""
    inside = get_args(kind)
    if kind is Any or not inside:
        return kind is Any or type(value) is kind
    if get_origin(kind) is list:
        return type(value) is list and all(_fits(item, inside[0]) for item in value)
    if get_origin(kind) is dict:
        return type(value) is dict and all(_fits(item, inside[1]) for item in value.values())
    return any(_fits(value, one) for one in inside)


HEADER = ("artifact", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed", "n", "load ms", "first ms", "MB")
STAGE_HEADER = "prepare / run / decode ms"
CHECK_HEADER = "trtexec ms (ratio)"


def _tables(reports: Sequence[BenchReport]) -> dict[str, list[list[str]]]:
    """Header and rows by title, one table for each scope."""
    together = len({report.started for report in reports}) == 1
    ratios = _ratios(reports) if together else [None] * len(reports)
    checked = any(report.cross_check for report in reports)
    tables: dict[str, list[list[str]]] = {}
    for report, ratio in zip(reports, ratios, strict=True):
        batch = f", batch {report.batch}" if report.batch > 1 else ""
        emulated = f", emulated {report.emulated}" if report.emulated else ""
        title = f"scope {report.scope}{batch}{emulated}"
        stages = [STAGE_HEADER] if report.stages_ns else []
        checks = [CHECK_HEADER] if report.scope == "engine" and checked else []
        rows = tables.setdefault(title, [[*HEADER, *stages, *checks]])
        rows.append(
            [
                report.artifact,
                *(_time(report.percentile(q)) for q in (50.0, 90.0, 99.0)),
                f"{report.images_per_second:.1f}",
                _speed(ratio),
                str(report.n),
                _time(report.load_ns),
                _time(report.first_ns),
                f"{report.size_bytes / 1e6:.1f}",
                *(
                    [" / ".join(f"{value:.2f}" for value in report.stage_medians_ms.values())]
                    if stages
                    else []
                ),
                *([_checked(report)] if checks else []),
            ]
        )
    return tables


def _time(ns: int | None) -> str:
    return "n too small" if ns is None else f"{ns / 1e6:.2f}"


def _checked(report: BenchReport) -> str:
    if report.cross_check is None:
        return "-"
    time, ratio = report.trtexec_ns, report.cross_check_ratio
    return f"{time / 1e6:.2f} ({ratio:.2f})" if time and ratio else "failed"


def _speed(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    interval = "n too small" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.ratio:.2f} ({interval})"


def notes(reports: Sequence[BenchReport]) -> list[str]:
    """What a reader of the numbers must know, one sentence a line; invalid measurements come first."""
    invalid = [
        f"INVALID: {report.artifact} ({report.scope}): {reason}."
        for report in reports
        if (reason := report.invalid)
    ]
    return invalid + list(dict.fromkeys(line for report in reports for line in _circumstances(report)))


def _circumstances(report: BenchReport) -> list[str]:
    environment, pool = report.environment, report.pool
    cpu = environment["cpu"]
    machine = f"Measured on {environment['machine']['name']}. " if "machine" in environment else ""
    features = " ".join(cpu["features"] or []) or "unknown"
    cores = cpu["usable_cores"] or cpu["cores"] or "unknown"
    return [
        *_warnings(report),
        *check_notes(report),
        f"{machine}Device {report.device}; CPU {cpu['model'] or 'unknown'}, cores {cores}, features "
        f"{features}; threads {report.threads or 'as the vendor chooses'}.",
        f"Governor {cpu['governor'] or 'unknown'}; load average {_load(environment['load_average_before'])} "
        f"before, {_load(environment['load_average_after'])} after.",
        f"Inputs drawn with replacement from {pool['size']} images ({pool['source']}), seed {pool['seed']}.",
        f"Single stream, interleaved in blocks; a warm-up of at least {WARMUP_RUNS} runs and {WARMUP_S:g} s "
        "a row is excluded. Percentiles by nearest rank, printed where n supports them at 99 % confidence.",
        "speed: within a round, median time per image of the scope's first artifact over this one's; median "
        "of the rounds (95 % interval).",
    ]


def _warnings(report: BenchReport) -> list[str]:
    lines, cpu = [], report.environment["cpu"]
    if report.emulated:
        beyond = report.settings.get("beyond_cap", {})
        exceptions = ", ".join(f"{count} {kernel}" for kernel, count in beyond.items())
        ignored = f"These ignore the cap, so a real CPU is slower: {exceptions}."
        lines.append(
            f"EMULATED: {report.artifact} may use no more than {report.emulated} here; clocks, caches and "
            f"memory stay this machine's. {ignored if beyond else 'All kernels obey.'}"
        )
    load, cores = report.environment["load_average_before"], cpu["usable_cores"] or cpu["cores"]
    if load and cores and load[0] > NOISY_LOAD * cores:
        lines.append(
            f"NOISY: before the start {load[0]:.1f} processes wanted the {cores} cores; p90 and p99 are of a "
            "machine that does other things too. Ratios hold better, since engines took turns."
        )
    return lines


def check_notes(report: BenchReport) -> list[str]:
    """What the cross-check by `trtexec` says and does not say, one sentence or two a line; empty without."""
    found, time = report.cross_check, report.trtexec_ns
    if found is None:
        return []
    if time is None:
        return [f"No cross-check of {report.artifact}: {found['problem']}."]
    return [
        f"Cross-check of {report.artifact}: trtexec {found['version']} measured {time / 1e6:.2f} ms of GPU "
        f"time alone (median of {len(found['gpu_ns'])} queries): no copies, a CUDA graph, the next query "
        f"always queued. p50 here is {report.cross_check_ratio:.2f} times that, with copies, launches, "
        "waiting and Python; below 1 the clocks differed.",
        *(f"trtexec warns of {report.artifact}: {warning}" for warning in found["warnings"]),
    ]


def _load(values: list[float] | None) -> str:
    return "unknown" if values is None else " ".join(f"{value:.2f}" for value in values)


def tables(reports: Sequence[BenchReport]) -> list[Table]:
    """Reports as tables for the terminal, one for each scope and an artifact a column; add `notes` below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    results = []
    for title, rows in _tables(reports).items():
        # As Text: an artifact's name may hold what looks like markup.
        (_, *names), *lines = (list(map(Text, line)) for line in zip(*rows, strict=True))
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        results.append(table)
    return results


def to_markdown(reports: Sequence[BenchReport]) -> str:
    """Reports as a Markdown table for each scope, followed by the notes as a list."""
    lines = []
    for title, (header, *rows) in _tables(reports).items():
        cells = [header, ["---"] * len(header), *rows]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        lines += [f"**{title}**", "", *body, ""]
    return "\n".join([*lines, *(f"- {line}" for line in notes(reports)), ""])

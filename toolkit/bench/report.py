"""A bench report: the raw times of one artifact in one scope, what is computed from them, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args, get_origin, get_type_hints

from vitkit.bench.placement import check_placement
from vitkit.bench.trtexec import check_fields
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.files import write_text
from vitkit.runtimes.reading import MAX_REPORT_BYTES, read_json

FORMAT = 1
# Samples from which at most one beyond the true percentile has a chance of 1 % or less, so that the
# percentile is known at 99 % confidence (the early stopping of MLPerf Inference). A median is always
# printed, beside the number of samples.
MIN_SAMPLES = {50.0: 1, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6640}
MAX_STAGE_GAP = 0.02
# Eleven days: a longer query in a file is no measurement.
MAX_NS = 10**15


@dataclass(frozen=True)
class BenchReport:
    """Raw times of one artifact in one scope, and everything needed to judge them.

    Scope `engine` is prepared feeds in, outputs out; scope `image` is images in, decoded results
    out. `times_ns` are the wall times of the queries in the order they ran, a query taking `batch`
    images; `rounds` holds the round of the interleaving that each ran in; `stages_ns` holds the times of
    prepare, run and decode (empty for scope `engine`). `load_ns` is the opening of the artifact, its
    vendor package already imported; `first_ns` is the first run of the engine after that. `started`
    identifies the call of `bench`: only reports that share it were measured together. `energy` holds the
    `joules` that the machine took over all recorded queries, and the `source` of that estimate; None if
    no meter can be read. `cross_check` is what `vitkit.bench.trtexec.cross_check` found about a TensorRT
    engine in scope `engine`; None for others, and without `trtexec`. `placement` is what
    `vitkit.bench.placement.placement` read back from the engine; None in files of older versions.
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
    placement: dict[str, Any] | None = None

    @property
    def n(self) -> int:
        """Number of recorded queries."""
        return len(self.times_ns)

    def percentile(self, q: float) -> int | None:
        """Percentile `q` (50, 90, 95, 99 or 99.9) of the query times in ns, or None if `n` is too small.

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
        """`p50`, `p90`, `p95`, `p99` and `p99.9` in ms; None if `n` is too small for one."""
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
        p50, gpu_ns = self.percentile(50.0), self.trtexec_ns
        return p50 / gpu_ns if p50 and gpu_ns else None

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
        """Reason why this measurement must not be used; None if it may."""
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


def save(reports: Sequence[BenchReport], path: Path) -> None:
    """Write reports as one JSON file, raw times included; raises BadRequest if it cannot be written."""
    body = {"format": FORMAT, "reports": [report.to_json() for report in reports]}
    write_text(path, json.dumps(body) + "\n")


def load(path: Path) -> list[BenchReport]:
    """Read what `save` wrote; raises BadInput if the file is missing or is not such a file."""
    try:
        return from_body(read_json(path, MAX_REPORT_BYTES), path)
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
    if report.placement is not None:
        check_placement(report.placement)
    if any(len(each) != report.n for each in (report.rounds, *report.stages_ns.values())):
        raise ValueError("'rounds' and 'stages_ns' must hold one number for each of 'times_ns'")
    return report


def _fits(value: Any, kind: Any) -> bool:
    """True if a value from JSON has the type of an annotation."""
    inside = get_args(kind)
    if kind is Any or not inside:
        return kind is Any or type(value) is kind
    if get_origin(kind) is list:
        return type(value) is list and all(_fits(item, inside[0]) for item in value)
    if get_origin(kind) is dict:
        return type(value) is dict and all(_fits(item, inside[1]) for item in value.values())
    return any(_fits(value, one) for one in inside)

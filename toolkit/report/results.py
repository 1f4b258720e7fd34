"""Reading measured results and joining those of one artifact by the hashes of its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitkit.bench.report import BenchReport, from_body
from vitkit.evaluate.results import FORMAT, Beside, side_by_side
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.reading import MAX_REPORT_BYTES, read_json

# The standard normal's quantile for an interval of 95 %.
Z95 = 1.959964


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one artifact or run on one data set: `value` per cent of `metric`.

    `low` and `high` bound it at 95 % confidence by Wilson's interval if it is a share of `images`; else
    None. `fast` is the decoding of a panoptic network. `size_bytes` is None for a run. `machine` is the
    device it ran on, empty for the machine that evaluated.
    """

    artifact: str
    name: str
    target: str
    precision: str
    files: dict[str, str]
    size_bytes: int | None
    metric: str
    value: float
    low: float | None
    high: float | None
    images: int
    data: str
    fast: bool
    machine: str = ""

    @property
    def subject(self) -> tuple[str, str, int, bool, str]:
        """Metric, data and machine; values that share these compare."""
        return self.metric, self.data, self.images, self.fast, self.machine


@dataclass(frozen=True)
class Verification:
    """An artifact on the device `machine` beside itself here: what `verify --device --json` found.

    `failure` is how it failed there; None if it ran.
    """

    artifact: str
    name: str
    target: str
    precision: str
    files: dict[str, str]
    size_bytes: int | None
    machine: str
    ok: bool
    failure: str | None
    figures: list[Beside]


class Results(NamedTuple):
    """The measured results that the page shows; see `read_results`."""

    reports: list[BenchReport]
    evaluations: list[Evaluation]
    verifications: Sequence[Verification] = ()

    def evaluations_of(self, files: dict[str, str]) -> list[Evaluation]:
        """Those of the artifact with exactly these files."""
        return [one for one in self.evaluations if one.files == files]


def read_results(paths: Sequence[Path]) -> Results:
    """Read bench, evaluate and verify results; the same result in two files counts once.

    Raises BadRequest if no result is named, BadInput for a file that is no such result, holds none or
    was written by an earlier vitkit without the artifact's hashes, and for results of one artifact that
    differ in its files or disagree about its accuracy.
    """
    if not paths:
        raise BadRequest("no results; name files that `vitkit bench --json FILE` wrote")
    reports: list[BenchReport] = []
    evaluations: list[Evaluation] = []
    verifications: list[Verification] = []
    sources: dict[tuple[str, ...], tuple[Path, dict[str, str]]] = {}
    for path in paths:
        found = _read(path)
        for one in found:
            _check_same(one, path, sources)
            if isinstance(one, BenchReport):
                if one not in reports:
                    reports.append(one)
            elif isinstance(one, Verification):
                if one not in verifications:
                    verifications.append(one)
            elif one not in evaluations:
                _check_agrees(one, path, evaluations)
                evaluations.append(one)
    return Results(reports, evaluations, verifications)


def _read(path: Path) -> Sequence[BenchReport | Evaluation | Verification]:
    try:
        body = read_json(path, MAX_REPORT_BYTES)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}") from None
    if isinstance(body, dict) and "reports" in body:
        reports = from_body(body, path)
        if not reports:
            raise BadInput(f"{path} holds no results; measure with: vitkit bench ARTIFACT --json {path}")
        return reports
    if isinstance(body, dict) and "network" in body and body.keys() & {"metric", "top1", "all"}:
        return [_evaluation(body, path)]
    if isinstance(body, dict) and {"network", "checks", "between"} <= body.keys():
        return [_verification(body, path)]
    predictions = isinstance(body, dict) and "predictions" in body
    raise BadInput(
        f"{path} holds {'accuracy of predictions, not of an artifact' if predictions else 'something else'}; "
        "results are what `vitkit bench --json FILE`, `vitkit evaluate NETWORK --json > FILE` and "
        "`vitkit verify ARTIFACT --device NAME --json > FILE` write"
    )


def _evaluation(body: dict[str, Any], path: Path) -> Evaluation:
    if "files" not in body:
        raise BadInput(
            f"{path} was written by an earlier vitkit without the hashes of its artifact; write it "
            f"again with: vitkit evaluate {body['network']} --data DATA --json > {path}"
        )
    if body.get("format") != FORMAT:
        raise BadInput(f"{path} has format {body.get('format')!r}; this vitkit reads {FORMAT}")
    try:
        return _checked(body)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error!r}") from None


def _verification(body: dict[str, Any], path: Path) -> Verification:
    if body.get("format") != FORMAT:
        raise BadInput(f"{path} has format {body.get('format')!r}; this vitkit reads {FORMAT}")
    try:
        known = _identity(body)
        ok, failure = body["ok"], body["failure"]
        if not known["machine"] or type(ok) is not bool or not isinstance(failure, (str, type(None))):
            raise ValueError("'machine', 'ok' or 'failure' cannot be used")
        return Verification(**known, ok=ok, failure=failure, figures=side_by_side(body))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged: {error!r}") from None


def _identity(body: dict[str, Any]) -> dict[str, Any]:
    """What names an artifact and the machine it ran on; raises ValueError or KeyError."""
    texts = {key: body[key] for key in ("artifact", "name", "target", "precision")}
    texts["machine"] = body.get("machine") or ""
    files, size = body["files"], body["size_bytes"]
    known = isinstance(files, dict) and files and all(isinstance(each, str) for each in files.values())
    for what, good in {
        "the texts": all(isinstance(text, str) for text in texts.values()),
        "'files'": known,
        "'size_bytes'": size is None or (type(size) is int and size >= 0),
    }.items():
        if not good:
            raise ValueError(f"{what} cannot be used")
    return {**texts, "files": files, "size_bytes": size}


def _checked(body: dict[str, Any]) -> Evaluation:
    known, data = _identity(body), body["data"]
    images, fast = body["images"], body.get("fast", False)
    metric, value = _figure(body)
    for what, good in {
        "the texts": isinstance(data, str) and isinstance(metric, str),
        "'images'": type(images) is int and images > 0,
        "'fast'": type(fast) is bool,
        metric: type(value) in (int, float) and 0 <= value <= 100,
    }.items():
        if not good:
            raise ValueError(f"{what} cannot be used")
    low, high = _wilson(value / 100, images) if metric == "top-1" else (None, None)
    return Evaluation(
        **known,
        data=data,
        metric=metric,
        value=value,
        low=low,
        high=high,
        images=images,
        fast=fast,
    )


def _figure(body: dict[str, Any]) -> tuple[str, Any]:
    """The name and the value of the main figure, which earlier results did not name."""
    if "metric" in body:
        return body["metric"], body["value"]
    return ("top-1", body["top1"]) if "top1" in body else ("PQ", body["all"]["pq"])


def _wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval, in per cent, of a share seen in n independent trials (Wilson 1927)."""
    z2 = Z95**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def _check_same(
    one: BenchReport | Evaluation | Verification,
    path: Path,
    sources: dict[tuple[str, ...], tuple[Path, dict[str, str]]],
) -> None:
    key = (one.artifact, one.name, one.target, one.precision)
    first, files = sources.setdefault(key, (path, one.files))
    if files == one.files:
        return
    name = next(name for name in sorted({*files, *one.files}) if files.get(name) != one.files.get(name))
    hashes = [(each.get(name) or "none")[:12] for each in (files, one.files)]
    raise BadInput(
        f"{first} and {path} both hold results of {one.artifact} ({one.name}, {one.target} {one.precision}), "
        f"but {name} has SHA-256 {hashes[0]} in the first and {hashes[1]} in the second: it was exported "
        "anew in between. Measure both again, or, if these are two artifacts, name their folders differently"
    )


def _check_agrees(one: Evaluation, path: Path, evaluations: Sequence[Evaluation]) -> None:
    for other in evaluations:
        if other.files == one.files and other.subject == one.subject and other.value != one.value:
            raise BadInput(
                f"{path} gives {one.artifact} {one.metric} {one.value:.2f} % on {one.data}, another result "
                f"{other.value:.2f} %; leave out the one that is wrong"
            )

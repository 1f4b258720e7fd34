"""Parity of networks whose outputs mean something to the application alone: every output by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.parity import NamedImage, pairs_of_golden, pairs_of_images
from vitkit.exporters.source import Reference
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.errors import BadArtifact

GOLDEN_PAIRS = 4
# A channel is lost if its error is this share of all that varies in it. Looked at are channels that vary
# visibly beside the whole output, and have enough elements to judge by.
LOST, VISIBLE, ELEMENTS = 0.9, 1e-4, 64


class TensorLimits(NamedTuple):
    """What an output of an engine of one precision must reach not to be broken.

    `error` bounds the root mean square error over the standard deviation, `changed` the share (0..1) of
    integers that differ: between equals rounding decides, as in a map of best classes.
    """

    error: float
    changed: float


LIMITS = {
    "fp32": TensorLimits(1e-3, 1e-4),
    "fp16": TensorLimits(0.02, 0.01),
    "bf16": TensorLimits(0.15, 0.05),
    "int8": TensorLimits(0.35, 0.1),
}


class Difference(NamedTuple):
    """How far an output is from the float model's.

    `error` is the root mean square error over the standard deviation of the float model's values, or over
    their root mean square if they are all the same. `changed` is the share (0..1) of elements that differ.
    """

    error: float
    changed: float
    max_abs: float


class TensorSums:
    """What is gathered of one output, image by image, so that no two images' outputs are held at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.integers = False
        self._count = self._changed = 0
        self._max_abs = 0.0
        self._bad: dict[str, tuple[int, tuple[int, ...]]] = {}
        # For the axes of channels, before and behind those of places: of each channel the number of elements,
        # their sum, the sum of squares, the sum of squared errors.
        self._channels: dict[int, NDArray[np.float64]] = {}

    def add(self, want: NDArray[Any], got: NDArray[Any]) -> None:
        """The output of ONE image, without the batch dimension, of the float model and of the engine.

        Raises BadArtifact if the engine's has another shape or dtype.
        """
        if want.shape != got.shape or (want.dtype.kind == "f") != (got.dtype.kind == "f"):
            raise BadArtifact(
                f"the float model's output {self.name!r} is {want.dtype} {list(want.shape)}, the engine's is "
                f"{got.dtype} {list(got.shape)}"
            )
        self.integers = want.dtype.kind != "f"
        for side, values in (("the float model", want), ("the engine", got)):
            if side not in self._bad and not np.isfinite(values).all():
                bad = np.argwhere(~np.isfinite(values))
                self._bad[side] = (len(bad), tuple(bad[0].tolist()))
        if self._bad:
            return
        a, b = (np.atleast_1d(values).astype(np.float64) for values in (want, got))
        off = b - a
        self._count += a.size
        self._changed += int(np.count_nonzero(off))
        self._max_abs = max(self._max_abs, float(np.abs(off).max(initial=0)))
        for axis in {0, a.ndim - 1}:
            others = tuple(i for i in range(a.ndim) if i != axis)
            number = np.full(a.shape[axis], a.size // max(a.shape[axis], 1))
            sums = np.stack([number, a.sum(axis=others), (a**2).sum(axis=others), (off**2).sum(axis=others)])
            self._channels[axis] = self._channels.get(axis, 0) + sums

    def difference(self) -> Difference:
        """Over all images that were added; NaN if there are values that are not finite."""
        if self._bad or not self._count:
            return Difference(float("nan"), float("nan"), float("nan"))
        spread, error = _spread_and_error(self._channels[0].sum(axis=1))
        return Difference(error / spread, self._changed / self._count, self._max_abs)

    def problems(self, precision: str) -> Iterator[str]:
        """Every limit of a precision that is broken, in words."""
        limits, found, name = LIMITS[precision], self.difference(), repr(self.name)
        for side, (count, place) in self._bad.items():
            yield f"{name} of {side} holds {count} NaN or infinite values, the first at {list(place)}"
        if self._bad:
            return
        if self.integers:
            if found.changed > limits.changed:
                yield f"{found.changed:.2%} of the integers of {name} differ, over {limits.changed:.2%}"
        elif not found.error <= limits.error:
            yield f"{name} has an error of {found.error:.2g} of its spread, over {limits.error:g}"
        else:
            yield from self._lost_channels()

    def _lost_channels(self) -> Iterator[str]:
        whole, _ = _spread_and_error(self._channels[0].sum(axis=1))
        for axis, sums in sorted(self._channels.items()):
            for channel, column in enumerate(sums.T):
                spread, error = _spread_and_error(column)
                if column[0] >= ELEMENTS and spread > VISIBLE * whole and error >= LOST * spread:
                    yield (
                        f"channel {channel} on axis {axis + 1} of {self.name!r} is lost: its error of "
                        f"{error:.2g} is as large as all that varies in it ({spread:.2g})"
                    )
                    return


def _spread_and_error(sums: NDArray[np.float64]) -> tuple[float, float]:
    """(elements, sum, sum of squares, sum of squared errors) -> what errors are measured by, their size."""
    count, total, squares, errors = (float(value) for value in sums)
    power = squares / count
    variance = power - (total / count) ** 2
    # Less than rounding leaves of it.
    spread = variance if variance > 1e-12 * power else power
    return max(spread, 1e-24) ** 0.5, (errors / count) ** 0.5


@dataclass(frozen=True)
class TensorsParity:
    """How far each output of an engine is from that of its float model on some images."""

    name: str
    images: int
    outputs: dict[str, Difference]
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        outputs = ", ".join(describe_difference(name, found) for name, found in self.outputs.items())
        return f"{self.name}: {self.images} images, {outputs}: {'; '.join(self.problems) or 'ok'}"

    def details(self) -> list[str]:
        """Nothing: no image stands out by itself."""
        return []

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "set": self.name,
            "images": self.images,
            "ok": not self.problems,
            "outputs": differences_to_json(self.outputs),
            "problems": list(self.problems),
        }


def describe_difference(name: str, found: Difference) -> str:
    """An output's error in words."""
    return f"{name} error {found.error:.2g} (max abs {found.max_abs:.2g}, {found.changed:.2%} differ)"


def differences_to_json(outputs: Mapping[str, Difference]) -> dict[str, dict[str, float | None]]:
    """Errors of outputs by name, for `--json`, which has no NaN."""
    return {
        name: {key: value if np.isfinite(value) else None for key, value in found._asdict().items()}
        for name, found in outputs.items()
    }


class OutputSums:
    """What is gathered of several outputs, image by image."""

    def __init__(self) -> None:
        self.images = 0
        self._outputs: dict[str, TensorSums] = {}

    def add(self, reference: Outputs, engine: Outputs) -> None:
        """Outputs of ONE image, without the batch dimension; raises BadArtifact if their names differ."""
        if set(reference) != set(engine):
            raise BadArtifact(f"the reference returns {', '.join(reference)}, the engine {', '.join(engine)}")
        self.images += 1
        for name, want in reference.items():
            self._outputs.setdefault(name, TensorSums(name)).add(want, engine[name])

    def differences(self) -> dict[str, Difference]:
        """The error of each output."""
        return {name: sums.difference() for name, sums in self._outputs.items()}

    def problems(self, precision: str) -> tuple[str, ...]:
        """Every limit that is broken, in words."""
        return tuple(problem for sums in self._outputs.values() for problem in sums.problems(precision))


def check_golden(engine: Engine[Any]) -> TensorsParity:
    """The engine against the golden outputs in its artifact; raises BadArtifact."""
    return _compare("golden", pairs_of_golden(engine), engine.card.precision)


def check_images(
    engine: Engine[Any],
    reference: Reference,
    images: Iterable[NamedImage],
    decisions: dict[str, float] | None = None,
) -> TensorsParity:
    """The engine against the float network on named images; of decisions inside it nothing is known.

    Raises BadArtifact if the two have other outputs.
    """
    return _compare("images", pairs_of_images(engine, reference, images), engine.card.precision)


def _compare(name: str, pairs: Iterable[tuple[Outputs, Outputs]], precision: str) -> TensorsParity:
    sums = OutputSums()
    for want, got in pairs:
        sums.add(want, got)
    return TensorsParity(name, sums.images, sums.differences(), sums.problems(precision))

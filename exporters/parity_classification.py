"""Parity of classifiers: their logits, their top-1 class, and their other outputs such as sampling points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.golden import read_golden
from vitkit.exporters.parity import NamedImage
from vitkit.exporters.source import Reference
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.errors import BadArtifact
from vitkit.runtimes.image import prepare_batch
from vitkit.runtimes.softmax import softmax

GOLDEN_PAIRS = 4
# Two classes that the float model puts this close, in probability and in the share of its best class, are a
# tie: which of them comes first says little about the engine. On a network that is sure of nothing the
# second bound is the tighter one.
TIE_LEAD, TIE_SHARE = 0.01, 0.1
# Of fewer images than this, shares are not held; but of at least so many, more than half must agree.
SHARE_IMAGES, MOST_IMAGES = 16, 8


class ClassificationLimits(NamedTuple):
    """What an engine of one precision must reach not to be broken; `evaluate` measures how good it is.

    `error` bounds the root mean square error of the logits over their standard deviation, `cosine` the
    mean cosine of centred logits (that of the worst image is only reported: in a thousand images there
    is a hard one). `clear` bounds the share of images whose top-1 class changes although the float model
    clearly prefers it, `ties` the share of those that are excused as near ties. `other` bounds the mean error
    of any other output over its standard deviation, `points` that of the sampling points of the last
    iteration over the distance between neighbours of the regular grid; of the worst image, `WORST` times as
    much.
    """

    error: float
    cosine: float
    clear: float
    ties: float
    other: float
    points: float


LIMITS = {
    "fp32": ClassificationLimits(1e-3, 0.99999, 0.0, 0.02, 1e-3, 1e-3),
    "fp16": ClassificationLimits(0.02, 0.9995, 0.01, 0.03, 0.01, 0.01),
    "bf16": ClassificationLimits(0.15, 0.99, 0.03, 0.08, 0.05, 0.03),
    "int8": ClassificationLimits(0.25, 0.96, 0.1, 0.15, 0.1, 0.05),
}
WORST = 4


class Flip(NamedTuple):
    """An image whose top-1 class the engine changes.

    `lead` is the float model's probability (0..1) of its own class less that of the engine's; `near_tie`
    says that it is too small to count.
    """

    image: str
    reference: int
    engine: int
    lead: float
    near_tie: bool


class Deviation(NamedTuple):
    """The mean absolute error of an output, of all images and of the worst one, and the limit of the mean.

    In the output's own units. Of sampling points it is the error of the last iteration, in input pixels.
    """

    mean: float
    worst: float
    limit: float


@dataclass(frozen=True)
class ClassificationParity:
    """How far an engine is from its float model on some images."""

    name: str
    images: int
    error: float
    max_abs: float
    cosine_min: float
    cosine_mean: float
    flips: tuple[Flip, ...]
    others: dict[str, Deviation]
    problems: tuple[str, ...] = ()

    @property
    def near_ties(self) -> int:
        """How many flips are near ties."""
        return sum(flip.near_tie for flip in self.flips)

    @property
    def agreement(self) -> float:
        """Share (0..1) of images with the same top-1 class, near ties counted as they fell."""
        return 1 - len(self.flips) / self.images

    def __str__(self) -> str:
        share = f"{self.near_ties / self.images:.1%} of the images"
        ties = f" ({self.near_ties} of {len(self.flips)} flips are near ties, {share})" if self.flips else ""
        others = "".join(
            f", {name} off by {found.mean:.2g} on average and {found.worst:.2g} on the worst image"
            for name, found in self.others.items()
        )
        return (
            f"{self.name}: {self.images} images, top-1 agreement {self.agreement:.2%}{ties}, logits error "
            f"{self.error:.2g} (max abs {self.max_abs:.2g}, worst cosine {self.cosine_min:.6f}){others}: "
            f"{'; '.join(self.problems) or 'ok'}"
        )

    def details(self) -> list[str]:
        """Every image whose class changes."""
        return [
            f"{flip.image}: class {flip.reference} -> {flip.engine} (lead {flip.lead:.2%}"
            f"{', a near tie' if flip.near_tie else ''})"
            for flip in self.flips
        ]

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "set": self.name,
            "images": self.images,
            "ok": not self.problems,
            "logits_error": self.error,
            "logits_max_abs": self.max_abs,
            "cosine_min": self.cosine_min,
            "cosine_mean": self.cosine_mean,
            "top1_agreement": self.agreement,
            "flips": [flip._asdict() for flip in self.flips],
            "near_tie_flips": self.near_ties,
            "near_tie_share": self.near_ties / self.images,
            "other_outputs": {name: found._asdict() for name, found in self.others.items()},
            "problems": list(self.problems),
        }


def check_golden(engine: Engine[Any]) -> ClassificationParity:
    """The engine against the golden outputs in its artifact; raises BadArtifact."""
    inputs, reference = read_golden(engine.artifact)
    names = [f"golden pair {i}" for i in range(len(inputs))]
    return compare("golden", reference, engine.run_batched(inputs), engine.card, names)


def check_images(
    engine: Engine[Any],
    reference: Reference,
    images: Iterable[NamedImage],
    decisions: dict[str, float] | None = None,
) -> ClassificationParity:
    """The engine against the float network on named images, each prepared for either side.

    A classifier's decisions are in its outputs: `decisions` is empty. Raises BadArtifact if the two have
    other outputs.
    """
    names, want, got = [], [], []
    for name, image in images:
        names.append(name)
        want.append(reference.predict(prepare_batch([image], reference.card.image)))
        got.append(engine.run_batched(engine.prepare([image])))
    wanted, found = (
        {key: np.concatenate([outputs[key] for outputs in side]) for key in side[0]} for side in (want, got)
    )
    if set(wanted) != set(found):
        raise BadArtifact(f"the reference returns {', '.join(wanted)}, the engine {', '.join(found)}")
    return compare("images", wanted, found, engine.card, names)


def compare(
    name: str, reference: Outputs, engine: Outputs, card: ModelCard, images: Sequence[str]
) -> ClassificationParity:
    """Compare outputs (N, ...) by name, in the card's precision; every limit that is broken is a problem."""
    limits = LIMITS[card.precision]
    key, ready = _scores(card)
    want, got = (outputs[key].astype(np.float64) for outputs in (reference, engine))
    # What softmax ignores is no error.
    centred_want, centred_got = (x - x.mean(axis=1, keepdims=True) for x in (want, got))
    cosines = _cosines(centred_want, centred_got)
    parity = ClassificationParity(
        name=name,
        images=len(want),
        error=float(np.sqrt(np.mean((centred_want - centred_got) ** 2))) / max(centred_want.std(), 1e-12),
        max_abs=float(np.abs(want - got).max()),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        flips=tuple(_flips(want if ready else softmax(want), got, images)),
        others={
            other: _deviation(other, reference[other], engine[other], card)
            for other in reference
            if other != key
        },
    )
    finite = all(bool(np.isfinite(value).all()) for value in engine.values())
    return replace(parity, problems=tuple(_problems(parity, limits, finite)))


def _scores(card: ModelCard) -> tuple[str, bool]:
    """The output that classes are read from, and whether it holds probabilities."""
    if ready := card.decode.get("probabilities"):
        return str(ready), True
    return str(card.decode.get("logits", card.outputs[0].name)), False


def _problems(parity: ClassificationParity, limits: ClassificationLimits, finite: bool) -> Iterator[str]:
    if not finite:
        yield "outputs are not finite"
    if not parity.error <= limits.error:
        yield f"logits error {parity.error:.2g} is over {limits.error:g}"
    if not parity.cosine_mean >= limits.cosine:
        yield f"mean cosine {parity.cosine_mean:.5f} is under {limits.cosine:g}"
    yield from _too_many_flips(parity, limits)
    for key, found in parity.others.items():
        if not found.mean <= found.limit:
            yield f"{key} are off by {found.mean:.2g} on average, over {found.limit:.2g}"
        if not found.worst <= WORST * found.limit:
            yield f"{key} are off by {found.worst:.2g} on the worst image, over {WORST * found.limit:.2g}"


def _too_many_flips(parity: ClassificationParity, limits: ClassificationLimits) -> Iterator[str]:
    total, ties = len(parity.flips), parity.near_ties
    if MOST_IMAGES <= parity.images < SHARE_IMAGES and 2 * total > parity.images:
        yield f"{total} of {parity.images} images change class; more than half must agree"
    if parity.images < SHARE_IMAGES:
        return
    if total - ties > np.ceil(limits.clear * parity.images):
        yield f"{total - ties} of {parity.images} images change class; {1 - limits.clear:.0%} must agree"
    if ties > np.ceil(limits.ties * parity.images):
        yield (
            f"{ties} of {parity.images} images change to a class that the float model puts within "
            f"{TIE_LEAD * 100:g} point; {limits.ties:.0%} of the images may"
        )


def _cosines(want: NDArray[np.float64], got: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    # Two vectors of zeros (a single class, centred) agree.
    return np.where(norms > 0, (want * got).sum(axis=1) / np.where(norms > 0, norms, 1), 1.0)


def _flips(probabilities: NDArray[Any], got: NDArray[Any], images: Sequence[str]) -> Iterator[Flip]:
    best = probabilities.argmax(axis=1)
    for i in np.flatnonzero(best != got.argmax(axis=1)).tolist():
        a, b = int(best[i]), int(got[i].argmax())
        top = float(probabilities[i, a])
        lead = top - float(probabilities[i, b])
        yield Flip(images[i], a, b, lead, lead <= min(TIE_LEAD, TIE_SHARE * top))


def _deviation(name: str, want: NDArray[Any], got: NDArray[Any], card: ModelCard) -> Deviation:
    """The error of an output (N, ...) other than the scores."""
    limits = LIMITS[card.precision]
    if name == card.decode.get("points"):
        # (N, iterations, n*n, 2): the first samples a fixed grid, and errors add up from one to the next.
        want, got = want[:, -1], got[:, -1]
        limit = limits.points * float(np.sqrt(np.prod(card.image.size) / want.shape[1]))
    else:
        limit = limits.other * max(float(want.std()), 1e-12)
    errors = np.abs(want.astype(np.float64) - got).reshape(len(want), -1).mean(axis=1)
    return Deviation(float(errors.mean()), float(errors.max()), limit)

"""Parity: does the engine do what the float model does, in tensors and in what the task reports?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters import parity_panoptic
from vitkit.exporters.golden import read_golden
from vitkit.runtimes.card import ImageSpec, ModelCard
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.image import prepare_batch
from vitkit.runtimes.softmax import softmax

# Two classes whose probabilities the float model itself puts this close are a tie, and a flip between
# them says nothing about the engine.
NEAR_TIE = 0.01


class Limit(NamedTuple):
    """What an engine of one precision must reach not to be broken; `evaluate` tells how good it is.

    `error` bounds the root mean square error of the logits over their standard deviation, `cosine` the
    mean cosine of centred logits (of the worst image it is only reported: in a thousand photographs there
    is a hard one), `agreement` the share of images with the same top-1 class, `other` the mean error of any
    other output over its standard deviation.
    """

    error: float
    cosine: float
    agreement: float
    other: float


LIMITS = {
    "fp32": Limit(1e-3, 0.99999, 1.0, 1e-3),
    "fp16": Limit(0.02, 0.9995, 0.99, 0.01),
    "bf16": Limit(0.15, 0.99, 0.97, 0.05),
    "int8": Limit(0.25, 0.96, 0.9, 0.1),
}
# Fewer images than this say nothing about a share of them.
AGREEMENT_IMAGES = 16


class Flip(NamedTuple):
    """An image whose top-1 class the engine changes; `margin` is the float model's own lead (0..1)."""

    image: str
    reference: int
    engine: int
    margin: float


@dataclass(frozen=True)
class Parity:
    """How far an engine is from its float model on some images."""

    name: str
    images: int
    error: float
    max_abs: float
    cosine_min: float
    cosine_mean: float
    flips: tuple[Flip, ...]
    near_ties: int
    others: dict[str, float]
    problems: tuple[str, ...] = ()

    @property
    def agreement(self) -> float:
        """Share of images with the same top-1 class, near ties counted as they fell."""
        return 1 - len(self.flips) / self.images

    def __str__(self) -> str:
        ties = f" ({self.near_ties} of {len(self.flips)} flips are near ties)" if self.near_ties else ""
        others = "".join(f", {name} off by {value:.2g} on average" for name, value in self.others.items())
        return (
            f"{self.name}: {self.images} images, top-1 agreement {self.agreement:.2%}{ties}, logits error "
            f"{self.error:.2g} (max abs {self.max_abs:.2g}, worst cosine {self.cosine_min:.6f}){others}: "
            f"{'; '.join(self.problems) or 'ok'}"
        )

    def details(self) -> list[str]:
        """Every image whose class changes."""
        return [
            f"{flip.image}: class {flip.reference} -> {flip.engine} (float lead {flip.margin:.1%})"
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
            "mean_abs_of_other_outputs": self.others,
            "problems": list(self.problems),
        }


def compare(
    name: str,
    reference: Outputs,
    engine: Outputs,
    precision: str,
    *,
    logits: str = "logits",
    images: Sequence[str] | None = None,
) -> Parity:
    """Compare outputs (N, ...) by name; every limit that is broken becomes a problem."""
    want, got = (outputs[logits].astype(np.float64) for outputs in (reference, engine))
    # What softmax ignores is no error.
    centred_want, centred_got = (x - x.mean(axis=1, keepdims=True) for x in (want, got))
    cosines = _cosines(centred_want, centred_got)
    flips = _flips(want, got, images or [str(i) for i in range(len(want))])
    parity = Parity(
        name=name,
        images=len(want),
        error=float(np.sqrt(np.mean((centred_want - centred_got) ** 2))) / max(centred_want.std(), 1e-12),
        max_abs=float(np.abs(want - got).max()),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        flips=tuple(flips),
        near_ties=sum(flip.margin <= NEAR_TIE for flip in flips),
        others={k: float(np.abs(reference[k] - engine[k]).mean()) for k in reference if k != logits},
    )
    spreads = {key: max(float(reference[key].std()), 1e-12) for key in parity.others}
    finite = all(bool(np.isfinite(value).all()) for value in engine.values())
    return replace(parity, problems=tuple(_problems(parity, LIMITS[precision], spreads, finite)))


def _problems(parity: Parity, limit: Limit, spreads: dict[str, float], finite: bool) -> Iterator[str]:
    if not finite:
        yield "outputs are not finite"
    if not parity.error <= limit.error:
        yield f"logits error {parity.error:.2g} is over {limit.error:g}"
    if not parity.cosine_mean >= limit.cosine:
        yield f"mean cosine {parity.cosine_mean:.5f} is under {limit.cosine:g}"
    clear = len(parity.flips) - parity.near_ties
    if parity.images >= AGREEMENT_IMAGES and clear > np.ceil((1 - limit.agreement) * parity.images):
        yield f"{clear} of {parity.images} images change class; {limit.agreement:.0%} must agree"
    for key, value in parity.others.items():
        if not value <= limit.other * spreads[key]:
            yield f"{key} are off by {value:.2g} on average, over {limit.other:g} of their spread"


def _cosines(want: NDArray[np.float64], got: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    # Two vectors of zeros (a single class, centred) agree.
    return np.where(norms > 0, (want * got).sum(axis=1) / np.where(norms > 0, norms, 1), 1.0)


def _flips(want: NDArray[Any], got: NDArray[Any], images: Sequence[str]) -> list[Flip]:
    probabilities = softmax(want)
    flips = []
    for i in np.flatnonzero(want.argmax(axis=1) != got.argmax(axis=1)).tolist():
        a, b = int(want[i].argmax()), int(got[i].argmax())
        flips.append(Flip(images[i], a, b, float(probabilities[i, a] - probabilities[i, b])))
    return flips


class Check(Protocol):
    """What a parity check found: `problems` is empty where the engine holds."""

    @property
    def name(self) -> str:
        """Which images."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """What is broken."""
        ...

    def details(self) -> list[str]:
        """A line for each image that people may want to look at."""
        ...

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        ...


def check_golden(engine: Engine) -> Check:
    """The golden check: the artifact against the outputs it carries. Raises BadArtifact."""
    if engine.card.task == "panoptic":
        return parity_panoptic.check_golden(engine)
    inputs, reference = read_golden(engine.artifact)
    return compare(
        "golden", reference, engine.run_batched(inputs), engine.card.precision, logits=_logits(engine)
    )


def check_reference(card: ModelCard, reference: ModelCard) -> None:
    """Refuse to compare an engine with anything but a float form of the same network; raises BadRequest."""
    if reference.precision != "fp32":
        raise BadRequest(f"--against is a {reference.precision} engine; name the run, or an fp32 engine")
    ours, theirs = (
        (c.image.size, [(s.name, s.shape[1:]) for s in c.outputs], c.labels) for c in (card, reference)
    )
    if ours != theirs:
        raise BadRequest(
            f"--against is another network: {reference.name} for {reference.image.size} with outputs "
            f"{', '.join(map(str, reference.outputs))}, the engine is {card.name} for {card.image.size} with "
            f"{', '.join(map(str, card.outputs))}"
            + ("; their labels differ" if card.labels != reference.labels else "")
        )


def check_photos(
    engine: Engine,
    reference: Any,
    reference_image: ImageSpec,
    photos: Iterable[tuple[str, NDArray[np.uint8]]],
    decisions: dict[str, float] | None = None,
) -> Check:
    """The engine against `reference` (a `Predict`) on named photographs, each prepared for either side.

    `decisions` are shares of changed decisions inside the network, measured apart; see `check_decisions`.
    """
    if engine.card.task == "panoptic":
        return parity_panoptic.check_photos(engine, reference, reference_image, photos, decisions)
    names, want, got = [], [], []
    for name, photo in photos:
        names.append(name)
        want.append(reference(prepare_batch([photo], reference_image)))
        got.append(engine.run_batched(engine.prepare([photo])))
    wanted, found = (
        {key: np.concatenate([outputs[key] for outputs in side]) for key in side[0]} for side in (want, got)
    )
    if set(wanted) != set(found):
        raise BadArtifact(f"the reference returns {', '.join(wanted)}, the engine {', '.join(found)}")
    return compare("photos", wanted, found, engine.card.precision, logits=_logits(engine), images=names)


def _logits(engine: Engine) -> str:
    return str(engine.card.decode.get("logits", engine.card.outputs[0].name))

"""Parity: does the engine do what the float model does, in tensors and in what the task reports?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.golden import read_golden
from vitkit.runtimes.card import ImageSpec
from vitkit.runtimes.decode import softmax
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.errors import BadArtifact

# Two classes whose probabilities the float model itself puts this close are a tie, and a flip between
# them says nothing about the engine.
NEAR_TIE = 0.01


class Limit(NamedTuple):
    """What an engine of one precision must reach.

    `error` bounds the root mean square error of the logits over their standard deviation, `cosine` the
    worst image's cosine of centred logits, `agreement` the share of images with the same top-1 class.
    """

    error: float
    cosine: float
    agreement: float


LIMITS = {
    "fp32": Limit(1e-3, 0.99999, 1.0),
    "fp16": Limit(0.02, 0.9995, 0.99),
    "bf16": Limit(0.15, 0.99, 0.99),
    "int8": Limit(0.25, 0.96, 0.97),
}


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
    problems: tuple[str, ...]

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
    limit = LIMITS[precision]
    centred_want, centred_got = (x - x.mean(axis=1, keepdims=True) for x in (want, got))
    spread = max(float(centred_want.std()), 1e-12)
    error = float(np.sqrt(np.mean((centred_want - centred_got) ** 2))) / spread
    norms = np.linalg.norm(centred_want, axis=1) * np.linalg.norm(centred_got, axis=1)
    cosines = (centred_want * centred_got).sum(axis=1) / np.maximum(norms, 1e-12)
    flips = _flips(want, got, images or [str(i) for i in range(len(want))])
    clear = [flip for flip in flips if flip.margin > NEAR_TIE]
    problems = []
    if not all(np.isfinite(value).all() for value in engine.values()):
        problems.append("outputs are not finite")
    if not error <= limit.error:
        problems.append(f"logits error {error:.2g} is over {limit.error:g}")
    if not cosines.min() >= limit.cosine:
        problems.append(f"worst cosine {cosines.min():.5f} is under {limit.cosine:g}")
    if len(clear) > np.ceil((1 - limit.agreement) * len(want)):
        problems.append(f"{len(clear)} of {len(want)} images change class; {limit.agreement:.0%} must agree")
    others = {key: float(np.abs(reference[key] - engine[key]).mean()) for key in reference if key != logits}
    return Parity(
        name=name,
        images=len(want),
        error=error,
        max_abs=float(np.abs(want - got).max()),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        flips=tuple(flips),
        near_ties=len(flips) - len(clear),
        others=others,
        problems=tuple(problems),
    )


def _flips(want: NDArray[Any], got: NDArray[Any], images: Sequence[str]) -> list[Flip]:
    probabilities = softmax(want)
    flips = []
    for i in np.flatnonzero(want.argmax(axis=1) != got.argmax(axis=1)).tolist():
        a, b = int(want[i].argmax()), int(got[i].argmax())
        flips.append(Flip(images[i], a, b, float(probabilities[i, a] - probabilities[i, b])))
    return flips


def check_golden(engine: Engine) -> Parity:
    """The golden check: the artifact against the outputs it carries. Raises BadArtifact."""
    inputs, reference = read_golden(engine.artifact)
    return compare(
        "golden", reference, engine.run_batched(inputs), engine.card.precision, logits=_logits(engine)
    )


def check_photos(
    engine: Engine,
    reference: Any,
    reference_image: ImageSpec,
    photos: Iterable[tuple[str, NDArray[np.uint8]]],
) -> Parity:
    """The engine against `reference` (a `Predict`) on named photographs, each prepared for either side."""
    from vitkit.exporters.golden import golden_inputs

    names, want, got = [], [], []
    for name, photo in photos:
        names.append(name)
        want.append(reference(golden_inputs([photo], reference_image)))
        got.append(engine.run_batched(engine.prepare([photo])))
    wanted, found = (
        {key: np.concatenate([outputs[key] for outputs in side]) for key in side[0]} for side in (want, got)
    )
    if set(wanted) != set(found):
        raise BadArtifact(f"the reference returns {', '.join(wanted)}, the engine {', '.join(found)}")
    return compare("photos", wanted, found, engine.card.precision, logits=_logits(engine), images=names)


def _logits(engine: Engine) -> str:
    return str(engine.card.decode.get("logits", engine.card.outputs[0].name))

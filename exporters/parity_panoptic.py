"""Parity of panoptic engines: masks and classes, the assignments on the way, and the segments that come out.

End-to-end tensor error alone misleads: one pixel that the k-means assignment gives to another slot moves
everything after it. So the shares of pixels that change their slot are held, at every decision, and the
segments compared as a user would: PQ of the engine's result with the float model's as the truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.exporters.parity import NamedImage, of_image, pairs_of_golden
from vitkit.exporters.source import Reference
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.image import prepare_batch
from vitkit.runtimes.panoptic import Panoptic
from vitkit.runtimes.softmax import softmax

# Mask logits are megabytes.
GOLDEN_PAIRS = 1
# A pixel that the float model itself gives to its slot by less than this lead in probability may flip.
CLEAR_LEAD = 0.5


class PanopticLimits(NamedTuple):
    """What an engine of one precision must reach not to be broken; `evaluate` measures how good it is.

    `logits` bounds the root mean square error of the mask logits over their standard deviation; `flips` the
    share of pixels with a clear slot that the engine gives to another, `decision_flips` the share of all
    pixels that change their slot in a k-means assignment, `classes` the mean share (0..1) of a slot's class
    probability that goes to other classes; `quality` is the least PQ (per cent) against the float model's
    segments.
    """

    logits: float
    flips: float
    decision_flips: float
    classes: float
    quality: float


LIMITS = {
    "fp32": PanopticLimits(0.03, 0.002, 0.005, 0.01, 98.0),
    "fp16": PanopticLimits(0.2, 0.02, 0.05, 0.05, 93.0),
    "bf16": PanopticLimits(0.8, 0.05, 0.2, 0.15, 85.0),
    "int8": PanopticLimits(0.9, 0.08, 0.3, 0.25, 75.0),
}
# Of fewer segments than this, a share says nothing.
QUALITY_SEGMENTS = 32


@dataclass(frozen=True)
class PanopticParity:
    """How far an engine is from its float model on some images.

    `error` is the root mean square of the mask logits' error over their standard deviation, both less their
    mean over the slots of a pixel, which softmax ignores. `flips` and `clear_flips` are shares (0..1) of
    pixels whose best slot differs, of all and of those where the float model has a clear lead; `decisions`
    the shares for each k-means assignment; `mask_error` is the root mean square of the probabilities' error,
    `class_error` the mean share of a slot's class probability that other classes get (total variation);
    `quality` PQ in per cent with the float model's `segments` as the truth, None without any.
    """

    name: str
    images: int
    error: float
    flips: float
    clear_flips: float
    mask_error: float
    class_error: float
    segments: int
    quality: float | None
    decisions: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        quality = (
            "no segments" if self.quality is None else f"PQ {self.quality:.2f} of {self.segments} segments"
        )
        decisions = "".join(f", {name.split('/')[0]} {share:.2%}" for name, share in self.decisions.items())
        return (
            f"{self.name}: {self.images} images, {quality} against the float model, pixels that change slot "
            f"{self.flips:.2%} ({self.clear_flips:.3%} of the clear ones){decisions}, mask logits error "
            f"{self.error:.2g}, mask probabilities off by {self.mask_error:.2g}, class probability moved "
            f"{self.class_error:.2%}: {'; '.join(self.problems) or 'ok'}"
        )

    def details(self) -> list[str]:
        """Nothing: no image stands out by itself."""
        return []

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "set": self.name,
            "images": self.images,
            "ok": not self.problems,
            "pq_against_float": self.quality,
            "segments": self.segments,
            "mask_logits_error": self.error,
            "slot_flips": self.flips,
            "clear_slot_flips": self.clear_flips,
            "decision_flips": self.decisions,
            "mask_probability_error": self.mask_error,
            "class_probability_moved": self.class_error,
            "problems": list(self.problems),
        }


class _Sums:
    """What is gathered image by image, so that no two images' masks are held at once."""

    def __init__(self) -> None:
        self.images = self.pixels = self.flips = self.clear = self.clear_flips = 0
        self.errors: list[float] = []
        self.spreads: list[float] = []
        self.masks: list[float] = []
        self.classes: list[float] = []
        self.finite = True

    def add(self, reference: Outputs, engine: Outputs, card: ModelCard) -> None:
        """Outputs of ONE image, without the batch dimension."""
        want, got = (outputs[card.decode["masks"]] for outputs in (reference, engine))
        wanted, found = (_slot_probabilities(masks) for masks in (want, got))
        centred = want - want.mean(axis=0)
        self.errors.append(float(np.mean((got - got.mean(axis=0) - centred) ** 2)))
        self.spreads.append(float(np.mean(centred**2)))
        top = np.partition(wanted, -2, axis=0)[-2:]
        clear = top[1] - top[0] >= CLEAR_LEAD
        changed = want.argmax(axis=0) != got.argmax(axis=0)
        self.images += 1
        self.pixels += changed.size
        self.flips += int(changed.sum())
        self.clear += int(clear.sum())
        self.clear_flips += int((changed & clear).sum())
        self.masks.append(float(np.mean((wanted - found) ** 2)))
        classes = [softmax(outputs[card.decode["classes"]]) for outputs in (reference, engine)]
        self.classes.append(float(np.abs(classes[0] - classes[1]).sum(axis=-1).mean()) / 2)
        self.finite &= all(bool(np.isfinite(value).all()) for value in engine.values())

    def parity(self, name: str, segments: int, quality: float | None) -> PanopticParity:
        return PanopticParity(
            name=name,
            images=self.images,
            error=float(np.sqrt(np.mean(self.errors) / (np.mean(self.spreads) + 1e-12))),
            flips=self.flips / self.pixels,
            clear_flips=self.clear_flips / max(self.clear, 1),
            mask_error=float(np.sqrt(np.mean(self.masks))),
            class_error=float(np.mean(self.classes)),
            segments=segments,
            quality=quality,
            finite=self.finite,
        )


def _slot_probabilities(masks: NDArray[np.floating]) -> NDArray[np.floating]:
    shifted = np.exp(masks - masks.max(axis=0))
    probabilities: NDArray[np.floating] = shifted / shifted.sum(axis=0)
    return probabilities


def _judged(parity: PanopticParity, precision: str) -> PanopticParity:
    return replace(parity, problems=tuple(_problems(parity, LIMITS[precision])))


def _problems(parity: PanopticParity, limit: PanopticLimits) -> Iterator[str]:
    if not parity.finite:
        yield "outputs are not finite"
    if not parity.error <= limit.logits:
        yield f"mask logits error {parity.error:.2g} is over {limit.logits:g}"
    if not parity.clear_flips <= limit.flips:
        yield f"{parity.clear_flips:.2%} of the clear pixels change slot, over {limit.flips:.1%}"
    if not parity.class_error <= limit.classes:
        yield f"{parity.class_error:.2%} of the class probability moves, over {limit.classes:.0%}"
    for name, share in parity.decisions.items():
        if not share <= limit.decision_flips:
            yield f"{name}: {share:.2%} of the pixels change slot, over {limit.decision_flips:.1%}"
    enough = parity.quality is not None and parity.segments >= QUALITY_SEGMENTS
    if enough and not (parity.quality or 0) >= limit.quality:
        yield f"PQ against the float model is {parity.quality:.2f}, under {limit.quality:g}"


def check_golden(engine: Engine[Any]) -> PanopticParity:
    """The engine against the golden outputs in its artifact; raises BadArtifact."""
    sums = _Sums()
    for want, got in pairs_of_golden(engine):
        sums.add(want, got, engine.card)
    return _judged(sums.parity("golden", 0, None), engine.card.precision)


def check_images(
    engine: Engine[Any],
    reference: Reference,
    images: Iterable[NamedImage],
    decisions: dict[str, float] | None = None,
) -> PanopticParity:
    """The engine against the float network on named images, each prepared for either side.

    `decisions` are shares of flipped assignments that were measured apart.
    """
    sums, quality = _Sums(), _Quality()
    for _, image in images:
        want = of_image(reference.predict(prepare_batch([image], reference.card.image)))
        got = of_image(engine.run_batched(engine.prepare([image])))
        sums.add(want, got, engine.card)
        # Of outputs that are not finite nothing can be decoded; they are a problem of their own.
        if sums.finite:
            quality.add(*(engine.decode(_batched(outputs), [image])[0] for outputs in (want, got)))
    parity = sums.parity("images", quality.segments, quality.per_cent)
    return _judged(replace(parity, decisions=decisions or {}), engine.card.precision)


def _batched(outputs: Outputs) -> Outputs:
    return {name: value[None] for name, value in outputs.items()}


class _Quality:
    """PQ over all segments at once, whatever their class: without void or crowds, both being predictions."""

    def __init__(self) -> None:
        self.segments = self.found = self.matched = 0
        self.overlap = 0.0

    def add(self, truth: Panoptic, result: Panoptic) -> None:
        """Match segments of the same class that share more than half of their union."""
        self.segments += len(truth.segments)
        self.found += len(result.segments)
        count = len(result.segments) + 1
        joint = truth.ids.astype(np.int64) * count + result.ids
        shared = np.bincount(joint.ravel(), minlength=(len(truth.segments) + 1) * count)
        for a in truth.segments:
            for b in result.segments:
                both = int(shared[a.id * count + b.id])
                overlap = both / (a.area + b.area - both)
                if a.index == b.index and overlap > 0.5:
                    self.matched += 1
                    self.overlap += overlap

    @property
    def per_cent(self) -> float | None:
        """None without any segment on either side."""
        total = self.segments + self.found
        return 200 * self.overlap / total if total else None

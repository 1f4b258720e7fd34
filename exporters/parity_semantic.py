"""Parity of semantic engines: the class of every place of the logits, the logits, and any other outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import log
from typing import Any, NamedTuple

import numpy as np

from vitkit.exporters.parity import NamedImage, pairs_of_golden, pairs_of_images
from vitkit.exporters.parity_tensors import (
    Difference,
    OutputSums,
    describe_difference,
    differences_to_json,
)
from vitkit.exporters.source import Reference
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.engine import Engine, Outputs
from vitkit.runtimes.semantic import logits_name

# Logits are megabytes.
GOLDEN_PAIRS = 1
# The float model is clear about a pixel if its class is at least twice as probable as the next one.
CLEAR_LEAD = log(2)


class SemanticLimits(NamedTuple):
    """What an engine of one precision must reach not to be broken; `evaluate` measures how good it is.

    `clear_flips` bounds the share (0..1) of the pixels about which the float model is clear that change their
    class, `flips` that of all pixels: a network with random weights is clear about hardly any. The errors of
    the logits and of other outputs have the limits of `vitkit.exporters.parity_tensors`.
    """

    clear_flips: float
    flips: float


LIMITS = {
    "fp32": SemanticLimits(0.001, 0.01),
    "fp16": SemanticLimits(0.005, 0.05),
    "bf16": SemanticLimits(0.03, 0.25),
    "int8": SemanticLimits(0.08, 0.5),
}


@dataclass(frozen=True)
class SemanticParity:
    """How far an engine is from its float model on some images, at the logits' own size.

    `logits` are compared less their mean over the classes of a pixel, which softmax ignores. `flips` and
    `clear_flips` are shares (0..1) of pixels whose class differs, of all and of the `clear` ones, which are a
    share of all.
    """

    name: str
    images: int
    logits: Difference
    flips: float
    clear: float
    clear_flips: float
    others: dict[str, Difference]
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = "".join(f", {describe_difference(name, found)}" for name, found in self.others.items())
        logits = f"logits error {self.logits.error:.2g} (max abs {self.logits.max_abs:.2g})"
        return (
            f"{self.name}: {self.images} images, pixels that change class {self.flips:.2%} "
            f"({self.clear_flips:.3%} of the clear ones, which are {self.clear:.1%}), {logits}{others}: "
            f"{'; '.join(self.problems) or 'ok'}"
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
            "class_flips": self.flips,
            "clear_class_flips": self.clear_flips,
            "clear_pixels": self.clear,
            **differences_to_json({"logits": self.logits}),
            "other_outputs": differences_to_json(self.others),
            "problems": list(self.problems),
        }


class _Sums:
    """What is gathered image by image, so that no two images' logits are held at once."""

    def __init__(self, card: ModelCard) -> None:
        self.card, self.logits = card, logits_name(card)
        self.outputs = OutputSums()
        self.pixels = self.flips = self.clear = self.clear_flips = 0

    def add(self, reference: Outputs, engine: Outputs) -> None:
        """Outputs of ONE image, without the batch dimension; raises BadArtifact if they are not the same."""
        self.outputs.add(self._centred(reference), self._centred(engine))
        want, got = (outputs[self.logits] for outputs in (reference, engine))
        top = np.partition(want, -2, axis=0)[-2:]
        clear = top[1] - top[0] >= CLEAR_LEAD
        changed = want.argmax(axis=0) != got.argmax(axis=0)
        self.pixels += changed.size
        self.flips += int(changed.sum())
        self.clear += int(clear.sum())
        self.clear_flips += int((changed & clear).sum())

    def _centred(self, outputs: Outputs) -> Outputs:
        if self.logits not in outputs:
            return outputs
        logits = outputs[self.logits]
        return {**outputs, self.logits: logits - logits.mean(axis=0)}

    def parity(self, name: str) -> SemanticParity:
        found = self.outputs.differences()
        parity = SemanticParity(
            name=name,
            images=self.outputs.images,
            logits=found.pop(self.logits),
            flips=self.flips / self.pixels,
            clear=self.clear / self.pixels,
            clear_flips=self.clear_flips / max(self.clear, 1),
            others=found,
        )
        problems = (*self.outputs.problems(self.card.precision), *_flip_problems(parity, self.card.precision))
        return replace(parity, problems=problems)


def _flip_problems(parity: SemanticParity, precision: str) -> Iterator[str]:
    limits = LIMITS[precision]
    if parity.clear_flips > limits.clear_flips:
        yield f"{parity.clear_flips:.2%} of the clear pixels change class, over {limits.clear_flips:.1%}"
    if parity.flips > limits.flips:
        yield f"{parity.flips:.2%} of all pixels change class, over {limits.flips:.0%}"


def check_golden(engine: Engine[Any]) -> SemanticParity:
    """The engine against the golden outputs in its artifact; raises BadArtifact."""
    return _compare("golden", pairs_of_golden(engine), engine.card)


def check_images(
    engine: Engine[Any],
    reference: Reference,
    images: Iterable[NamedImage],
    decisions: dict[str, float] | None = None,
) -> SemanticParity:
    """The engine against the float network on named images; its decisions are the classes themselves.

    Raises BadArtifact if the two have other outputs.
    """
    return _compare("images", pairs_of_images(engine, reference, images), engine.card)


def _compare(name: str, pairs: Iterable[tuple[Outputs, Outputs]], card: ModelCard) -> SemanticParity:
    sums = _Sums(card)
    for want, got in pairs:
        sums.add(want, got)
    return sums.parity(name)

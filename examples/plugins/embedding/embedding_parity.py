"""How an engine for embeddings is compared with its float model: by the angle between their vectors."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vitkit.exporters import Reference
from vitkit.exporters.golden import read_golden
from vitkit.exporters.parity import NamedImage
from vitkit.runtimes import Engine
from vitkit.runtimes.image import prepare_batch

GOLDEN_PAIRS = 4
LEAST = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.99, "int8": 0.95}


class Angles(NamedTuple):
    """The least cosine of a set of images, and the limit that it broke."""

    name: str
    cosine: float
    problems: tuple[str, ...]

    def details(self) -> list[str]:
        """Nothing to look at."""
        return []

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return self._asdict()


def check_golden(engine: Engine[Any]) -> Angles:
    """The engine against the golden outputs in its artifact."""
    inputs, wanted = read_golden(engine.artifact)
    return compare("golden", engine, wanted, engine.run_batched(inputs))


def check_images(
    engine: Engine[Any],
    reference: Reference,
    images: Iterable[NamedImage],
    decisions: Mapping[str, float] | None = None,
) -> Angles:
    """The engine against the float network on named images."""
    arrays = [image for _, image in images]
    wanted = reference.predict(prepare_batch(arrays, reference.card.image))
    return compare("images", engine, wanted, engine.run_batched(engine.prepare(arrays)))


def compare(name: str, engine: Engine[Any], wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Angles:
    """Cosines of the first outputs, held against the limit of the engine's precision."""
    key, least = engine.card.outputs[0].name, LEAST[engine.card.precision]
    a, b = (outputs[key].astype(np.float64) for outputs in (wanted, found))
    cosine = float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
    problems = () if cosine >= least else (f"the least cosine {cosine:.6f} is under {least}",)
    return Angles(name, cosine, problems)

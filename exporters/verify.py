"""Verifying an artifact: its golden pairs, images, and the decisions inside its network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vitkit.exporters.golden import GOLDEN_FILE
from vitkit.exporters.parity import NamedImage, ParityCheck, check_golden, check_images, decision_flips
from vitkit.exporters.source import Reference
from vitkit.exporters.targets import TARGETS
from vitkit.runtimes.card import TensorSpec, read_card, write_card
from vitkit.runtimes.engine import Engine, open_engine
from vitkit.runtimes.errors import ExportFailed
from vitkit.runtimes.files import shown_as
from vitkit.runtimes.image import prepare_batch

# The shares of changed decisions hardly differ from image to image.
DECISION_IMAGES = 8
OpenTwin = Callable[[Path], AbstractContextManager[Engine[Any]]]


def verify(path: Path, reference: Reference, images: Sequence[NamedImage] = ()) -> list[ParityCheck]:
    """Open an artifact and compare it with its float network, on its golden pairs and on named images.

    Images are (H, W, 3) uint8 RGB. Raises ExportFailed, with every limit that is broken.
    """
    with _runnable(path) as folder, open_engine(folder) as engine:
        checks = run_checks(engine, reference, images)
    check_problems(checks)
    return checks


def run_checks(
    engine: Engine[Any],
    reference: Reference | None = None,
    images: Sequence[NamedImage] = (),
    open_twin: OpenTwin = open_engine,
) -> list[ParityCheck]:
    """What `verify` compares, for an open engine: golden pairs, and images with the float network.

    `open_twin` opens the twin of `check_decisions`, which on another machine is that machine's.
    """
    checks = [check_golden(engine)]
    if reference is not None and images:
        decisions = check_decisions(engine, reference, images, open_twin)
        checks.append(check_images(engine, reference, images, decisions))
    return checks


def check_problems(checks: Sequence[ParityCheck]) -> None:
    """Raises ExportFailed with all problems of some checks, if there are any."""
    problems = [f"{check.name}: {problem}" for check in checks for problem in check.problems]
    if problems:
        raise ExportFailed(f"the engine does not do what the float model does ({'; '.join(problems)})")


def check_decisions(
    engine: Engine[Any],
    reference: Reference,
    images: Sequence[NamedImage],
    open_twin: OpenTwin = open_engine,
) -> dict[str, float]:
    """Shares (0..1) of elements that change in each decision, from a twin that returns them as outputs too.

    Runs the first `DECISION_IMAGES` images alone; `open_twin` opens the twin's folder.
    """
    arrays = [image for _, image in images[:DECISION_IMAGES]]
    found = reference.decisions(prepare_batch(arrays[:1], reference.card.image))
    if not found:
        return {}
    shapes = {name: (engine.batch, *made.shape[1:]) for name, made in found.items()}
    with _twin(engine, shapes, open_twin) as twin:
        return decision_flips(twin, reference, arrays)


@contextmanager
def _twin(
    engine: Engine[Any], shapes: dict[str, tuple[int | None, ...]], open_twin: OpenTwin
) -> Iterator[Engine[Any]]:
    """The engine with the named nodes' results, int64 of these shapes, as outputs too."""
    card = engine.card
    with _temporary_artifact(engine.artifact.path) as folder:
        TARGETS.module(card.target, "module").write_twin(engine.artifact, folder, shapes)
        outputs = [TensorSpec(name, shape, "int64") for name, shape in shapes.items()]
        files: dict[str, str | None] = {path.name: None for path in folder.iterdir()}
        write_card(replace(card, outputs=(*card.outputs, *outputs), files=files), folder)
        with open_twin(folder) as twin:
            yield twin


@contextmanager
def _runnable(path: Path) -> Iterator[Path]:
    """The artifact; or a copy that runs its very graph, if its engine is built elsewhere."""
    card = read_card(path)
    row = TARGETS.get(card.target)
    stand_in = row.stand_in if row else None
    if stand_in is None:
        yield path
        return
    with _temporary_artifact(path) as folder:
        files: dict[str, str | None] = {file: None for file in (card.engine, GOLDEN_FILE)}
        for file in files:
            shutil.copy(path / file, folder)
        write_card(replace(card, target=stand_in, files=files, options={"exact_qdq": True}), folder)
        yield folder


@contextmanager
def _temporary_artifact(path: Path) -> Iterator[Path]:
    """A folder for a changed form of the artifact at `path`, which errors name instead."""
    with TemporaryDirectory(prefix=".vitkit.") as name, shown_as(name, path):
        yield Path(name)

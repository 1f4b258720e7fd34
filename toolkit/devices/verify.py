"""Verifying an engine on a device: against the float model, and against the same engine here."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.bench import Progress
from vitkit.bench.measure import silent
from vitkit.devices.link import Link, Running, check_runs_engines, connect
from vitkit.devices.outputs import fingerprint
from vitkit.devices.registry import Device
from vitkit.evaluate.network import Network
from vitkit.evaluate.results import identity
from vitkit.exporters import Reference, run_checks
from vitkit.exporters.golden import read_golden
from vitkit.exporters.parity import NamedImage, ParityCheck, check_images
from vitkit.exporters.verify import DECISION_IMAGES, OpenTwin
from vitkit.runtimes.card import Artifact, ModelCard, read_artifact
from vitkit.runtimes.engine import Engine, Feeds, Outputs, Session, open_engine
from vitkit.runtimes.errors import BadRequest, DeviceError, MissingBackend, RunFailed
from vitkit.runtimes.files import shown_as
from vitkit.runtimes.image import prepare_batch
from vitkit.runtimes.pillow import pillow
from vitkit.runtimes.tasks import decoder

# A row of outputs on disk is a file of its own, and so costs a little more than its bytes.
_MARGIN = 1 << 16


@dataclass(frozen=True)
class DeviceParity:
    """An engine on a device beside the same engine here.

    `there` compares the engine on the device with the float model, `here` the engine on this machine (empty
    if none runs here, because of `absent`), `between` the outputs there with those here, within the same
    limits. `unlike` are the images that the device prepared to other input values than this machine, by name:
    no problem by itself, but a cause. `failure` is how the engine failed or crashed there. `settings` are the
    vendor's there; `sent` is how many bytes went over.
    """

    there: list[ParityCheck] = field(default_factory=list)
    here: list[ParityCheck] = field(default_factory=list)
    between: list[ParityCheck] = field(default_factory=list)
    absent: str | None = None
    unlike: tuple[str, ...] = ()
    failure: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sent: int = 0

    @property
    def problems(self) -> tuple[str, ...]:
        """How the engine failed there, and every limit that is broken there, here, or between the two."""
        sets = {"there": self.there, "here": self.here, "there against here": self.between}
        broken = (
            f"{where}, {check.name}: {problem}"
            for where, checks in sets.items()
            for check in checks
            for problem in check.problems
        )
        return (*([self.failure] if self.failure else []), *broken)

    @property
    def broken(self) -> bool:
        """Whether there are problems."""
        return bool(self.problems)

    def to_json(self, path: Path, card: ModelCard, machine: str) -> dict[str, Any]:
        """For `--json`, with the artifact at `path` as `evaluate` names it."""
        return {
            "ok": not self.broken,
            **identity(path, card, machine),
            "settings": self.settings,
            "checks": [check.summary() for check in self.there],
            "here": [check.summary() for check in self.here],
            "between": [check.summary() for check in self.between],
            "not_here": self.absent,
            "prepared_unlike": list(self.unlike),
            "failure": self.failure,
            "sent_bytes": self.sent,
        }


def verify_on(
    device: Device,
    path: Path,
    reference: Reference | None,
    images: Sequence[NamedImage],
    *,
    folder: Path | None = None,
    engine_device: str | None = None,
    progress: Progress = silent,
) -> DeviceParity:
    """Run an artifact on a device and here, on its golden pairs and on images, and compare the outputs here.

    `reference` is the float model; without one, engines are held to the golden outputs and to each other.
    `images` are named images, (H, W, 3) uint8 RGB; `folder` is what their names are relative to, None if they
    are no files. The device prepares each by itself. `progress` gets each step and its share.

    Raises what `check_runs_engines`, `Link` and, on the device, `open_engine` raise; BadRequest if the
    temporary folder has no room for the outputs.
    """
    check_runs_engines(device, path, engine_device)
    artifact = read_artifact(path)
    golden, _ = read_golden(artifact)
    with TemporaryDirectory(prefix="vitkit.") as name:
        work = Path(name)
        _check_room(work, artifact.card, len(golden) + len(images), 2 + (reference is not None))
        files = _image_files(images, folder, work)

        def run(artifact: Artifact, golden: NDArray[Any], count: int, outputs: Path) -> _There:
            groups = [*_golden_files(golden, work), *([file] for file in files[:count])]
            with shown_as(f"{work}/", ""), connect(device, progress) as link:
                running = link.run(artifact.path, groups, device=engine_device, progress=progress)
                return _record(running, artifact, golden, images[:count], outputs, link, progress)

        @contextmanager
        def open_twin(twin: Path) -> Iterator[Engine[Any]]:
            outputs = work / "decisions"
            yield run(read_artifact(twin), golden[:0], DECISION_IMAGES, outputs).engine

        try:
            there = run(artifact, golden, len(images), work / "there")
        except RunFailed as error:
            return DeviceParity(failure=str(error))
        return _compare(there, reference, images, work, progress, open_twin)


class _There(NamedTuple):
    """What a device returned, as an engine that returns the same again; see `DeviceParity`."""

    engine: Engine[Any]
    unlike: tuple[str, ...]
    settings: dict[str, Any]
    sent: int


def _check_room(work: Path, card: ModelCard, inputs: int, copies: int) -> None:
    values = sum(math.prod(n or 1 for n in s.shape[1:]) * np.dtype(s.dtype).itemsize for s in card.outputs)
    needed, free = copies * inputs * (values + _MARGIN), shutil.disk_usage(work).free
    if needed > free:
        raise BadRequest(
            f"the outputs of {inputs} inputs need {needed / 1e9:.1f} GB below {work.parent}, which has "
            f"{free / 1e9:.1f} GB free; compare fewer with --count N, or name another folder by TMPDIR"
        )


def _image_files(images: Sequence[NamedImage], folder: Path | None, work: Path) -> list[Path]:
    if folder is not None:
        return [folder / name for name, _ in images]
    files = [work / f"{i}.png" for i in range(len(images))]
    for file, (_, image) in zip(files, images, strict=True):
        pillow().Image.fromarray(image).save(file, compress_level=1)
    return files


def _golden_files(golden: NDArray[Any], work: Path) -> list[list[Path]]:
    """Files of prepared inputs, in one group as `check_golden` runs them; no group without any."""
    files = [work / f"golden-{i}.npy" for i in range(len(golden))]
    for i, file in enumerate(files):
        np.save(file, golden[i : i + 1])
    return [files] if files else []


def _record(
    running: Running,
    artifact: Artifact,
    golden: NDArray[Any],
    images: Sequence[NamedImage],
    folder: Path,
    link: Link,
    progress: Progress,
) -> _There:
    """Keep outputs as they arrive, under the inputs that this machine prepares."""
    recorded, unlike = _Recorded(folder), []
    text, total = f"running on {link.device.name}", len(images) + (len(golden) > 0)
    inputs = chain(
        [("golden pairs", golden)] if len(golden) else [],
        ((name, prepare_batch([image], artifact.card.image)) for name, image in images),
    )
    for done, ((name, rows), ran) in enumerate(zip(inputs, running.results, strict=True), 1):
        recorded.add(rows, ran.outputs)
        if ran.inputs != list(map(fingerprint, rows)):
            unlike.append(name)
        progress(text, done / total)
    engine = _replayed(artifact, recorded, running.device)
    return _There(engine, tuple(unlike), running.settings, link.sent)


def _compare(
    there: _There,
    reference: Reference | None,
    images: Sequence[NamedImage],
    work: Path,
    progress: Progress,
    open_twin: OpenTwin,
) -> DeviceParity:
    artifact, absent, here = there.engine.artifact, None, None
    ran, total = count(1), len(images) * (1 + (reference is not None))

    def tick() -> None:
        progress("running here, and the float model", min(next(ran) / max(total, 1), 1.0))

    if reference is not None:
        kept = _Recorded(work / "float", reference.predict, tick)
        reference = Network(reference.card, kept, lambda: None, reference.decisions)
    with ExitStack() as stack:
        try:
            local = stack.enter_context(open_engine(artifact.path))
        except (MissingBackend, DeviceError) as error:
            absent = str(error)
        else:
            here = _replayed(artifact, _Recorded(work / "here", local.run_batched, tick), local.device)
        checks, between = [], []
        if here is not None:
            checks = run_checks(here, reference, images)
            as_reference = Network(here.card, here.run_batched, lambda: None)
            between = [check_images(there.engine, as_reference, images)] if images else []
        return DeviceParity(
            there=run_checks(there.engine, reference, images, open_twin),
            here=checks,
            between=between,
            absent=absent,
            unlike=there.unlike,
            settings=there.settings,
            sent=there.sent,
        )


class _Recorded:
    """Outputs by their inputs, row by row on disk, for the comparisons that each want all of them.

    Inputs that are new are run by `run`, if there is one, and `tick` is called.
    """

    def __init__(
        self,
        folder: Path,
        run: Callable[[NDArray[Any]], Outputs] | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        folder.mkdir()
        self._folder, self._run, self._tick = folder, run, tick
        self._names: list[str] = []

    def add(self, inputs: NDArray[Any], outputs: Outputs) -> None:
        """Keep outputs (N, ...) of N inputs."""
        self._names = list(outputs)
        for i, row in enumerate(inputs):
            # By position, since an output may have any name.
            np.savez(self._file(row), *(value[i] for value in outputs.values()))

    def __call__(self, inputs: NDArray[Any]) -> Outputs:
        files = [self._file(row) for row in inputs]
        if self._run is not None and not all(file.exists() for file in files):
            self.add(inputs, self._run(inputs))
            self._tick()
        rows = []
        for file in files:
            with np.load(file, allow_pickle=False) as kept:
                rows.append(list(kept.values()))
        return {name: np.stack([row[i] for row in rows]) for i, name in enumerate(self._names)}

    def _file(self, row: NDArray[Any]) -> Path:
        return self._folder / f"{fingerprint(row)}.npz"


class _Replay(Session):
    """A `Session` that returns recorded outputs."""

    plan = None

    def __init__(self, card: ModelCard, recorded: _Recorded) -> None:
        self.inputs, self.outputs = card.inputs, card.outputs
        self.settings: dict[str, Any] = {}
        self._recorded = recorded

    def run(self, feeds: Feeds) -> Outputs:
        (inputs,) = feeds.values()
        return self._recorded(inputs)

    def operators(self) -> Any:
        return ()

    def close(self) -> None:
        pass


def _replayed(artifact: Artifact, recorded: _Recorded, device: str) -> Engine[Any]:
    return Engine(artifact, _Replay(artifact.card, recorded), decoder(artifact.card), device)

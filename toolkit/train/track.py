"""Curves of a training run, for TensorBoard and Weights & Biases, which are imported nowhere else."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from vitkit.runtimes.errors import BadRequest, MissingBackend
from vitkit.runtimes.files import EVENTS_FOLDER, write_text
from vitkit.train.checkpoint import Row, advice
from vitkit.train.config import TrainConfig

# Steps between two points of a curve.
EVERY = 20
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def find_tracker(track: str) -> str:
    """What a training run with this `track` setting is tracked by: `tensorboard`, `wandb` or `none`.

    `auto` is TensorBoard where it can be imported. Raises MissingBackend where what is asked for cannot.
    """
    if track == "none":
        return track
    package = "tensorboard" if track == "auto" else track
    try:
        import_module(_MODULES[package])
    except ImportError as error:
        if track == "auto":
            return "none"
        raise MissingBackend(package, package, error) from None
    return package


class _Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path, config: TrainConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that were written but came into no checkpoint are taken again, and hidden until then.
        self.writer: Any = SummaryWriter(str(out / EVENTS_FOLDER), purge_step=done + 1)  # type: ignore[no-untyped-call]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        # A kill then loses only what comes after.
        self.writer.flush()

    def close(self, failed: bool) -> None:
        # Everything is flushed: a full disk, which was reported by `write`, loses nothing more here.
        with suppress(OSError):
            self.writer.close()


class _WandB:
    def __init__(self, out: Path, config: TrainConfig, done: int) -> None:
        import wandb

        file = out / EVENTS_FOLDER / "wandb.id"
        if not done or not file.is_file():
            write_text(file, secrets.token_hex(8))
        try:
            self.run: Any = wandb.init(
                project="vitkit",
                name=out.resolve().name,
                id=file.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(out / EVENTS_FOLDER),
                config=asdict(config),
            )
        except wandb.Error as error:
            raise BadRequest(
                f"Weights & Biases does not start ({error}). Log in with: wandb login; or keep the curves on "
                "this machine: WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


_WRITERS: dict[str, Callable[[Path, TrainConfig, int], _Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}


class Tracker:
    """Writes a training run's values below `out/events`, against the optimiser steps done since its start.

    `kind` is what `find_tracker` returned. Nothing is opened before the first value comes. Values are named
    `step/NAME`, a mean over the steps since the last point, and `epoch/NAME`, one of the log.
    """

    def __init__(self, kind: str, out: Path, config: TrainConfig) -> None:
        self.kind, self.out, self.config = kind, out, config
        self.done = 0
        self.sums: dict[str, float] = {}
        self.count = 0
        self.writer: _Writer | None = None

    def start(self, done: int) -> None:
        """So many steps are done already; what was written of later ones is void."""
        self.done = done

    def step(self, number: int, parts: Mapping[str, float], lr: float) -> None:
        """Step `number`, from 1, had these loss parts, of which `total` is the loss, and learning rate.

        Raises BadRequest where they cannot be written.
        """
        self.count += 1
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if number == 1 or number % EVERY == 0:
            means = {name: value / self.count for name, value in self.sums.items()}
            self._write(number, "step", {"loss": means.pop("total"), **means, "lr": lr})
            self.sums, self.count = {}, 0

    def epoch(self, number: int, row: Row) -> None:
        """An epoch ended with step `number` and is measured; raises BadRequest as `step`."""
        self._write(number, "epoch", row)

    def _write(self, number: int, group: str, values: Mapping[str, float]) -> None:
        if self.kind == "none":
            return
        try:
            if self.writer is None:
                self.writer = _WRITERS[self.kind](self.out, self.config, self.done)
            self.writer.write(number, {f"{group}/{name}": value for name, value in values.items()})
        except OSError as error:
            raise BadRequest(
                f"{self.out / EVENTS_FOLDER} cannot be written: {error}. Make room, or write nothing there: "
                f"--set track=none; {advice(self.out)}"
            ) from None

    def close(self, failed: bool = False) -> None:
        """The training is over, or has `failed`."""
        if self.writer is not None:
            self.writer.close(failed)

"""Checkpoints: safetensors files with a JSON header, each replaced in one step.

Everything random comes from the run's seed and the place in the training, so that the log, which tells the
epochs done, and the step within the epoch stand for the state of all random numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vitkit.runtimes.card import CARD_FILE
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.files import EVENTS_FOLDER, check_writable
from vitkit.runtimes.reading import MAX_ENGINE_BYTES, open_file

FOLDER = "checkpoint"
LAST, BEST = "last.safetensors", "best.safetensors"

# One epoch of the log: epoch (from 1), loss and its parts, lr, seconds, images_per_second, data_share (of the
# seconds, 0..1, waited for batches), and what the task measures.
Row = dict[str, float]


def best_row(log: Sequence[Row], metric: str) -> Row:
    """The row of the best epoch, the latest of equals: it was trained longest."""
    return max(reversed(log), key=lambda row: row[metric])


@dataclass
class State:
    """How far an epoch has come.

    Optimiser steps and images done, seconds they took, those of them that were waited for batches, sums of
    the loss parts over the steps, and the state of fp16's loss scale.
    """

    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of its run: the settings and data it belongs to, and a row for each epoch.

    `metric` names the value of a row by which epochs are compared; more is better. `state` is that of the
    epoch that has begun.
    """

    identity: Mapping[str, Any]
    log: list[Row]
    metric: str
    state: State

    @property
    def best(self) -> Row:
        """The row of the best epoch; see `best_row`."""
        return best_row(self.log, self.metric)


def has_checkpoint(out: Path) -> bool:
    """Does `out` hold an unfinished training that can go on?"""
    return (out / FOLDER / LAST).is_file()


def advice(out: Path) -> str:
    """What to tell of a training run that has to stop: is there a checkpoint, and how it goes on."""
    if has_checkpoint(out):
        return f"the last checkpoint in {out} is kept: go on with --resume"
    return f"there is no checkpoint in {out} yet: train again without --resume"


def start_from_best(out: Path) -> str:
    """The option that starts another training from the best epoch's weights; nothing where there is none."""
    best = out / FOLDER / BEST
    return f" --init {best}" if best.is_file() else ""


def check_out(out: Path, resume: bool) -> None:
    """Refuse a folder that a run cannot start in, or cannot be continued in; raises BadRequest."""
    if out.exists() and not out.is_dir():
        raise BadRequest(f"the output {out} is a file; name a folder")
    check_writable(out)
    check_writable(out / FOLDER)
    unfinished = has_checkpoint(out)
    if resume and not unfinished:
        state = "a finished run" if (out / CARD_FILE).is_file() else "no checkpoint"
        raise BadRequest(f"{out} holds {state}, nothing to resume; train into a new folder without --resume")
    if resume or not out.is_dir():
        return
    # A kill before or during the very first checkpoint leaves these and nothing to go on from.
    if not unfinished and {path.name for path in out.iterdir()} <= {FOLDER, EVENTS_FOLDER}:
        return
    if unfinished:
        raise BadRequest(f"{out} holds an unfinished run; continue it with --resume, or name another folder")
    raise BadRequest(f"the output folder {out} is not empty; name another folder")


def save(
    out: Path,
    module: nn.Module,
    kept: nn.Module,
    average: nn.Module | None,
    optimizer: Optimizer,
    record: Record,
) -> None:
    """Write `last` and, where an epoch has just ended as the best one, `best`; a kill leaves earlier files.

    `module` is all that is trained, `average` the moving average of its weights, `kept` what a run keeps.
    Raises BadRequest where a file cannot be written; the earlier one is then left.
    """
    folder = out / FOLDER
    # First the best: killed in between, the epoch is done again and the same file written over.
    if record.state.step == 0 and record.best is record.log[-1]:
        _write(folder / BEST, kept.state_dict(), record)
    tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    _write(folder / LAST, tensors, record)


def _write(path: Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    temporary = path.with_name(f".{path.name}")
    header = {"vitkit": json.dumps(asdict(record))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a kill during a write left, under safetensors' own name.
        for torn in path.parent.glob(".tmp*"):
            torn.unlink()
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)
        # Quotas and network disks may say only now that there is no room.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadRequest(
            f"the checkpoint {path} cannot be written: {error}. Make room, or make the folder writable; "
            f"{advice(path.parent.parent)}"
        ) from None


def read_best(out: Path) -> tuple[dict[str, Tensor], Record]:
    """The best weights, and the record as it was then; raises BadArtifact where the file is damaged."""
    return _read(out / FOLDER / BEST)


def read_log(out: Path) -> list[Row]:
    """The rows of all epochs; raises BadArtifact where the checkpoint is damaged."""
    return _read(out / FOLDER / LAST)[1].log


def remove(out: Path) -> None:
    """Delete the checkpoints of a finished run; raises OSError."""
    # First what makes it an unfinished one: without the best epoch nothing could be finished.
    (out / FOLDER / LAST).unlink(missing_ok=True)
    shutil.rmtree(out / FOLDER)


def _read(path: Path) -> tuple[dict[str, Tensor], Record]:
    try:
        with open_file(path, MAX_ENGINE_BYTES), safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["vitkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = State(**header["state"])
        return tensors, Record(header["identity"], header["log"], header["metric"], state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadArtifact(f"the checkpoint {path} is damaged: {error}; {_salvage(path)}") from None


def _salvage(path: Path) -> str:
    """What can be done about a damaged checkpoint."""
    best = path.with_name(BEST)
    if path != best and best.is_file():
        with suppress(BadArtifact):
            epoch = _read(best)[1].log[-1]["epoch"]
            return f"epoch {epoch:.0f} is whole: train on from it, in a new folder, with --init {best}"
    return "train again in a new folder"


def restore(
    out: Path,
    model: nn.Module,
    optimizer: Optimizer,
    average: nn.Module | None,
    identity: Mapping[str, Any],
) -> tuple[list[Row], State]:
    """Load `last` into the model, its average and the optimiser; returns the log and how far it has come.

    Raises BadRequest where the checkpoint was made with other settings or data, BadArtifact where it, or
    the best epoch's, is damaged.
    """
    path = out / FOLDER / LAST
    tensors, record = _read(path)
    if changes := _changes(record.identity, identity):
        raise BadRequest(
            f"{out} was trained with {', '.join(changes)}; resume it with the same, or train into a new "
            "folder"
        )
    if record.log:
        # Now, not when all epochs are done and it is needed.
        read_best(out)
    try:
        _fill(tensors, model, optimizer, average)
    except (RuntimeError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadArtifact(
            f"the checkpoint {path} does not fit the model that its settings name: {reason}; go on with the "
            "vitkit that wrote it, or train again in a new folder"
        ) from None
    return record.log, record.state


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[str]:
    """What differs between the settings of two training runs, as `lr=0.1 (now 0.2)`."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        was, now, name = old.get(key), new.get(key), above + key
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += _changes(was, now, f"{name}.")
        elif was != now:
            # The data's hash would tell nobody anything.
            found.append("other images or labels" if name == "data" else f"{name}={was!r} (now {now!r})")
    return found


def _fill(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer, average: nn.Module | None
) -> None:
    model.load_state_dict(_below("model.", tensors))
    if average is not None:
        average.load_state_dict(_below("average.", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in _below("optimizer.", tensors).items():
        index, name = key.split(".")
        like = parameters[int(index)]
        # In the parameter's own memory order, which fused optimisers take for granted.
        # A copy: what was read keeps the old checkpoint's room on the disk taken.
        value = torch.empty_like(like if tensor.shape == like.shape else tensor).copy_(tensor)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

"""Both models trained at once, each in a process and on one thread of its own.

On two cores this takes little more than half the time of one model after the other on two threads: in
networks this small, threads mostly wait for each other. Beside other busy processes they would wait many
times as long.
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitkit.runtimes.card import CARD_FILE
from vitkit.runtimes.errors import DeviceError

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    Events = Queue[tuple[Path, float | BaseException]]

_POLL_S = 0.5


class Training(NamedTuple):
    """A recipe with some settings changed; its data are `folder`/data, its run is `folder`/run."""

    folder: Path
    recipe: str
    settings: Mapping[str, Any]


def is_trained(folder: Path) -> bool:
    """Whether `folder`/run is a finished run."""
    return (folder / "run" / CARD_FILE).is_file()


def train_side_by_side(trainings: Iterable[Training], progress: Callable[[int, int], object]) -> None:
    """Run all trainings that are not finished at once; each continues from its checkpoint, if there is one.

    `progress` is called with how far the slowest is, in thousandths. If one training raises, the others are
    stopped and the error is raised here; DeviceError if a process ends without an error.
    """
    waiting = [training for training in trainings if not is_trained(training.folder)]
    context = get_context("spawn")
    events: Events = context.Queue()
    processes = {
        training.folder: context.Process(target=_train, args=(training, events)) for training in waiting
    }
    shares = dict.fromkeys(processes, 0.0)
    try:
        for process in processes.values():
            process.start()
        while any(share < 1 for share in shares.values()):
            # Asked before its last event is looked for.
            ended = [folder for folder, process in processes.items() if process.exitcode is not None]
            try:
                folder, event = events.get(timeout=_POLL_S)
            except queue.Empty:
                for folder in ended:
                    if shares[folder] < 1:
                        raise _gone(folder, processes[folder].exitcode) from None
                continue
            if isinstance(event, BaseException):
                raise event
            shares[folder] = event
            progress(round(1000 * min(shares.values())), 1000)
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
                process.join()


def _gone(folder: Path, code: int | None) -> DeviceError:
    return DeviceError(
        f"the training in {folder} ended with exit code {code}, maybe because memory ran out; "
        "run the command again to continue from its checkpoint"
    )


def _train(training: Training, events: Events) -> None:
    # Ctrl-C is the parent's, which stops this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import torch

        from vitkit.train import has_checkpoint, recipe_named, train

        torch.set_num_threads(1)
        folder, out = training.folder, training.folder / "run"
        train(
            replace(recipe_named(training.recipe), **training.settings),
            folder / "data",
            out,
            resume=has_checkpoint(out),
            progress=False,
            # 1 means that the run is written too.
            advanced=lambda done, total: events.put((folder, 0.999 * done / total)),
        )
        events.put((folder, 1.0))
    except Exception as error:
        events.put((training.folder, error))

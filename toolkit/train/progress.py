"""What a training run shows while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from vitkit.train.checkpoint import Row, State
from vitkit.train.config import TrainConfig
from vitkit.train.task import TrainingTask
from vitkit.train.track import Tracker


class Progress:
    """A line for each epoch, and a bar where the output is a terminal; nothing where `visible` is False.

    What is to be tracked goes on to the `tracker`, visible or not, and `advanced` is called after each step
    with (steps done, steps in all).
    """

    def __init__(
        self,
        config: TrainConfig,
        task: TrainingTask,
        steps_per_epoch: int,
        visible: bool,
        tracker: Tracker,
        advanced: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        self.advanced = advanced
        self.config, self.task, self.steps, self.tracker = config, task, steps_per_epoch, tracker
        console = Console(quiet=not visible)
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}/" + str(config.epochs)),
            BarColumn(bar_width=16),
            TimeRemainingColumn(),
            TextColumn("left"),
            # Broken into lines where the terminal is narrow, not cut.
            TextColumn("{task.fields[state]}", table_column=Column(ratio=1)),
            console=console,
            # Steps may take many seconds, and a measure stands between epochs.
            speed_estimate_period=600,
            expand=True,
            disable=not (visible and console.is_terminal),
        )
        self.told: set[str] = set()
        self.number = self.bar.add_task("", total=config.epochs * steps_per_epoch, epoch=1, state="")

    def __enter__(self) -> Progress:
        self.bar.start()
        if self.config.track == "auto" and self.tracker.kind == "none":
            self._say(
                "TensorBoard is not installed or does not load: no curves are kept while this runs. Install "
                "it with: pip install 'vitkit[tensorboard]'; or want none: --set track=none"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.tracker.close(failed=error is not None)

    def start(self, steps: int) -> None:
        """So many steps are done already."""
        self.bar.update(self.number, completed=steps)
        self.tracker.start(steps)

    def step(self, epoch: int, state: State, parts: dict[str, float], lr: float) -> None:
        """A step is done, with these loss parts; `state` counts it. Raises BadRequest as `Tracker.step`."""
        self.tracker.step(epoch * self.steps + state.step, parts, lr)
        self.advanced(epoch * self.steps + state.step, self.config.epochs * self.steps)
        if not self.bar.disable:
            self.bar.update(self.number, advance=1, epoch=epoch + 1, state=self._state(state, lr))

    def _state(self, state: State, lr: float) -> str:
        means = {name: value / state.step for name, value in state.sums.items()}
        seconds = max(state.seconds, 1e-9)
        texts = [
            f"loss {means.pop('total'):.3f}",
            *(f"{name} {value:.2f}" for name, value in means.items()),
            f"lr {lr:.1e}",
            f"{state.seen / seconds:.0f} images/s",
            self._memory(),
            self._data(state.waited / seconds),
        ]
        return "  ".join(texts)

    def _data(self, share: float) -> str:
        workers = self.config.workers
        return f"data {100 * share:.0f} % ({workers} worker{'s' * (workers != 1)})"

    def _memory(self) -> str:
        """The most that torch has had on the GPU; without one, what this process has in memory now."""
        if self.config.device != "cpu" and torch.cuda.is_available():
            return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"

    def measured(self, row: Row) -> None:
        """An epoch is measured, and not yet in a checkpoint. Raises BadRequest as `Tracker.epoch`."""
        self.tracker.epoch(round(row["epoch"]) * self.steps, row)

    def epoch(self, row: Row) -> None:
        """An epoch is done, measured and kept."""
        self._say(
            f"epoch {row['epoch']}/{self.config.epochs}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  "
            f"{self.task.unit} {row[self.task.metric]:.1f} %  {row['seconds']:.1f} s  "
            f"{row['images_per_second']:.0f} images/s  {self._data(row['data_share'])}"
        )

    def fresh(self, names: list[str]) -> None:
        """These tensors start anew, for another number of classes."""
        if names:
            self._say(f"left fresh, for another number of classes: {', '.join(names)}")

    def unreadable(self, reasons: Collection[str]) -> None:
        """So many training images were left out until now, for these reasons; those told before are not."""
        if new := sorted(set(reasons) - self.told):
            self._say(f"{len(reasons)} training images were left out:")
        for reason in new:
            self._say(f"  {reason}")
        self.told.update(new)

    def notes(self, notes: Sequence[str]) -> None:
        """What else is to be known of the data; what was told before is not repeated."""
        for note in notes:
            if note not in self.told:
                self._say(note)
        self.told.update(notes)

    def _say(self, line: str) -> None:
        self.bar.console.print(line, soft_wrap=True, highlight=False, markup=False)

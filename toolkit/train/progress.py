"""What a training shows while it runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vitkit.train.checkpoint import Row, State
from vitkit.train.config import TrainConfig
from vitkit.train.task import Task


class Progress:
    """A line for each epoch, and a bar where the output is a terminal; nothing where `visible` is False."""

    def __init__(self, config: TrainConfig, task: Task, steps_per_epoch: int, visible: bool) -> None:
        self.config, self.task = config, task
        console = Console(quiet=not visible)
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}/" + str(config.epochs)),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self.number = self.bar.add_task("", total=config.epochs * steps_per_epoch, epoch=1, state="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def start(self, steps: int) -> None:
        """So many steps are done already."""
        self.bar.update(self.number, completed=steps)

    def step(self, epoch: int, state: State, lr: float) -> None:
        """A step is done."""
        parts = {name: value / state.step for name, value in state.sums.items()}
        text = f"loss {parts.pop('total'):.3f}"
        text += "".join(f"  {name} {value:.2f}" for name, value in parts.items())
        text += f"  lr {lr:.1e}  {state.seen / max(state.seconds, 1e-9):.0f} images/s"
        self.bar.update(self.number, advance=1, epoch=epoch + 1, state=text)

    def epoch(self, row: Row) -> None:
        """An epoch is done and measured."""
        line = (
            f"epoch {row['epoch']}/{self.config.epochs}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  "
            f"{self.task.unit} {row[self.task.metric]:.1f} %  {row['seconds']:.1f} s  "
            f"{row['images_per_second']:.0f} images/s"
        )
        self.bar.console.print(line, soft_wrap=True, highlight=False)

    def fresh(self, names: list[str]) -> None:
        """These tensors start anew, for another number of classes."""
        if names:
            text = f"left fresh, for another number of classes: {', '.join(names)}"
            self.bar.console.print(text, soft_wrap=True, highlight=False)

    def unreadable(self, files: dict[str, str]) -> None:
        """These training images were left out; the values say why."""
        if files:
            self.bar.console.print(f"{len(files)} training images were left out:", highlight=False)
        for reason in files.values():
            self.bar.console.print(f"  {reason}", soft_wrap=True, highlight=False)

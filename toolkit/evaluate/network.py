"""A run or an engine as one network to be evaluated, by the metric of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkit.evaluate.results import Result
from vitkit.runtimes.card import ModelCard, read_card
from vitkit.runtimes.errors import BadRequest, RunFailed
from vitkit.runtimes.image import placement, prepare_batch, read_image
from vitkit.runtimes.tasks import TASKS, Decoder, task_module


class Network(NamedTuple):
    """A run or an artifact behind one call: prepared inputs (N, ...) -> outputs by name.

    `decisions` are those inside a run's network, as `Source.decisions`; an engine does not return them. A
    network on another machine has `run_files` instead of `predict`: it takes image files, as `outputs_of`.
    """

    card: ModelCard
    predict: Callable[[NDArray[Any]], dict[str, NDArray[Any]]]
    close: Callable[[], None]
    decisions: Callable[[NDArray[Any]], dict[str, NDArray[Any]]] = lambda inputs: {}
    run_files: Callable[[Sequence[Path], int], Iterator[dict[str, NDArray[Any]]]] | None = None

    def outputs_of(self, files: Sequence[Path], batch: int = 1) -> Iterator[dict[str, NDArray[Any]]]:
        """Outputs (N, ...) of image files in their order, `batch` at a time, at last those that are left.

        What a metric reads. Raises BadInput for a file that cannot be read, RunFailed if the engine fails.
        """
        if self.run_files is not None:
            yield from self.run_files(files, batch)
            return
        for start in range(0, len(files), batch):
            images = map(read_image, files[start : start + batch])
            yield self.predict(prepare_batch(images, self.card.image))


def check_finite(card: ModelCard, outputs: Mapping[str, NDArray[Any]], images: Sequence[Path]) -> None:
    """Raises RunFailed, naming the image, for outputs (N, ...) of N images with NaN or infinite values."""
    for name, value in outputs.items():
        finite = np.isfinite(value).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            raise RunFailed(
                f"{card.name} ({card.target} {card.precision}) returned NaN or infinite values in its output "
                f"{name!r} for {images[int(finite.argmin())]}"
            )


def results_of(network: Network, files: Sequence[Path], decode: Decoder) -> Iterator[Any]:
    """The decoded result of each image file at the image's own size, in order.

    Raises what `Network.outputs_of` raises, and RunFailed for outputs that are not finite.
    """
    for file, outputs in zip(files, network.outputs_of(files), strict=True):
        check_finite(network.card, outputs, [file])
        # Read again for its size alone; beside the network that costs little.
        height, width, _ = read_image(file).shape
        place = placement(height, width, network.card.image)
        yield decode({name: value[0] for name, value in outputs.items()}, network.card, place)


def open_network(path: Path, threads: int | None = None, device: str | None = None) -> Network:
    """Open a run folder (in torch) or an artifact (in its engine, on its `device`).

    Raises BadArtifact, what `open_engine` raises, and BadRequest for a run with a `device`.
    """
    from vitkit.runtimes.engine import check_threads, open_engine

    if read_card(path).target == "torch":
        if device is not None:
            raise BadRequest(
                f"{path} is a run, which torch evaluates here; --device is for engines: make one with: "
                f"vitkit export {path} --target onnx -o {path}-onnx"
            )
        from vitkit.exporters.source import Source
        from vitkit.runs import load_run

        check_threads(threads)
        run = load_run(path)
        if threads:
            import torch

            torch.set_num_threads(threads)
        source = Source(run.model, run.card)
        return Network(run.card, source.predict, lambda: None, source.decisions)
    engine = open_engine(path, threads=threads, device=device)
    return Network(engine.card, engine.run_batched, engine.close)


def evaluate(
    network: Network,
    data: Path,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **options: Any,
) -> Result:
    """Evaluate a network on labelled data by the metric of its task; `progress` gets (images done, in all).

    `options` are the metric's own, such as `split` of panoptic sets. Raises BadRequest for an option that
    the task does not have, and what the metric's `evaluate` raises.
    """
    metric = task_module(network.card.task, "metric")
    for option in options:
        if option not in metric.OPTIONS:
            tasks = [task for task in TASKS if option in task_module(task, "metric").OPTIONS]
            raise BadRequest(
                f"{option} is an option of {' and '.join(tasks) or 'no task'}; {network.card.name} does "
                f"{network.card.task}"
            )
    result: Result = metric.evaluate(network, data, progress=progress, **options)
    return result

"""A run or an engine as one network to be evaluated, and what is kept of its results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from vitkit.runtimes.card import ModelCard, read_card


class Network(NamedTuple):
    """A run or an artifact behind one call: prepared inputs (N, ...) -> outputs by name.

    `decisions` are a run's decisions inside the network, as `Source.decisions`; an engine does not tell them.
    """

    card: ModelCard
    predict: Callable[[NDArray[Any]], dict[str, NDArray[Any]]]
    close: Callable[[], None]
    decisions: Callable[[NDArray[Any]], dict[str, NDArray[Any]]] = lambda inputs: {}


def open_network(path: Path, threads: int | None = None) -> Network:
    """Open a run folder (in torch) or an artifact (in its engine). Raises BadArtifact."""
    from vitkit.runtimes.engine import check_threads, open_engine

    if read_card(path).target == "torch":
        from vitkit.exporters.source import Source
        from vitkit.runs import load_run

        check_threads(threads)
        run = load_run(path)
        if threads:
            import torch

            torch.set_num_threads(threads)
        source = Source(run.model, run.card)
        return Network(run.card, source.predict, lambda: None, source.decisions)
    engine = open_engine(path, threads=threads)
    return Network(engine.card, engine.run_batched, engine.close)

"""Raw tensors have no metric: the application alone knows what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vitkit.evaluate.network import Network
from vitkit.runtimes.errors import BadRequest

# Options of `evaluate` beside the network and the data: none.
OPTIONS: tuple[str, ...] = ()


def evaluate(
    network: Network, data: Path, progress: Callable[[int, int], object] = lambda done, total: None
) -> NoReturn:
    """Raises BadRequest, which names what compares an engine with its float model instead."""
    raise BadRequest(
        f"{network.card.name} returns raw tensors, which have no metric; compare an engine with its "
        "float model: vitkit verify ARTIFACT --against RUN"
    )

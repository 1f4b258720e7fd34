"""An engine on a device as a network to be evaluated: its outputs come here, where the metric scores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vitkit.bench import Progress
from vitkit.bench.measure import silent
from vitkit.devices.link import check_runs_engines, connect
from vitkit.devices.registry import Device
from vitkit.evaluate.network import Network
from vitkit.runtimes.engine import Outputs, check_threads
from vitkit.runtimes.errors import BadRequest


def open_network_on(
    device: Device,
    path: Path,
    *,
    engine_device: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Network:
    """An artifact as a network on a device, for `vitkit.evaluate`; closing it ends the link.

    The device is reached once the metric asks for outputs. `engine_device` and `threads` are those of
    `open_engine`; `progress` gets each step before the first output, and its share. Raises what
    `check_runs_engines` raises, and BadRequest for threads out of range.
    """
    check_threads(threads)
    card = check_runs_engines(device, path, engine_device)
    opened = ExitStack()

    def run_files(files: Sequence[Path], batch: int) -> Iterator[Outputs]:
        link = opened.enter_context(connect(device, progress))
        groups = [files[start : start + batch] for start in range(0, len(files), batch)]
        running = link.run(path, groups, device=engine_device, threads=threads, progress=progress)
        for ran in running.results:
            yield ran.outputs

    def refuse(inputs: NDArray[Any]) -> Outputs:
        raise BadRequest(
            f"the metric of {card.task} asks for outputs of prepared inputs, which {device.name} does not "
            "get; it must ask Network.outputs_of, which takes image files"
        )

    return Network(card, refuse, opened.close, run_files=run_files)

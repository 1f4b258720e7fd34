"""What is inside an artifact: its card, its files, and where its operators run on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vitkit.bench.placement import by_precision, fallbacks, placement
from vitkit.runtimes.card import Artifact, read_artifact
from vitkit.runtimes.engine import open_engine
from vitkit.runtimes.errors import MissingBackend
from vitkit.runtimes.tensorrt_options import read_built

_log = logging.getLogger(__name__)


def inspect(
    path: Path, *, device: str | None = None, threads: int | None = None, require_device: bool = False
) -> dict[str, Any]:
    """Card, file sizes in bytes, and where the operators run, read back from the engine as opened here.

    Of the latter it has what `vitkit.bench.placement.placement` finds, and a warning in the log for each kind
    of fallback. Only a TensorRT package, whose engine is yet to be built, is read from its file; `read_from`
    names the one or the other.

    Raises what `open_engine` raises.
    """
    artifact = read_artifact(path)
    card = artifact.card
    if card.target == "tensorrt" and read_built(artifact) is None:
        found = {"read_from": "the file: no engine is built yet", "operators": _in_file(artifact)}
    else:
        with open_engine(path, device=device, threads=threads, require_device=require_device) as engine:
            settings = {"device": engine.device, "settings": dict(engine.session.settings)}
            found = {"read_from": "the engine as opened here", **settings, **placement(engine)}
        for line in fallbacks(found):
            _log.warning("%s: %s", path, line)
    return {
        "name": card.name,
        "task": card.task,
        "target": card.target,
        "precision": card.precision,
        "inputs": [str(spec) for spec in card.inputs],
        "outputs": [str(spec) for spec in card.outputs],
        "image": card.image.__dict__,
        "classes": len(card.labels),
        "options": dict(card.options),
        "provenance": dict(card.provenance),
        "files": {name: (path / name).stat().st_size for name in card.files},
        **found,
    }


def _in_file(artifact: Artifact) -> dict[str, dict[str, int]]:
    try:
        from vitkit.exporters.graph import operators
    except ImportError as error:
        raise MissingBackend("onnx", "export", error) from None
    return by_precision(operators(artifact.engine_path))

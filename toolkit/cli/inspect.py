"""`vitkit inspect`: what is in an artifact, and where its operators run."""

from __future__ import annotations

from typing import Any

from vitkit.cli.arguments import ArtifactArgument, DeviceHere, JsonFlag, RequireDevice, Threads
from vitkit.cli.show import print_json, print_table

_SHOWN_APART = ("files", "operators", "provenance", "devices", "off_device", "in_float")


def inspect(
    artifact: ArtifactArgument,
    device: DeviceHere = None,
    threads: Threads = None,
    require_device: RequireDevice = False,
    json: JsonFlag = False,
) -> None:
    """Show an artifact: card, file sizes, and which operators run in which precision on which device.

    The engine is opened and its vendor asked what it runs, after its own fusions. What fell back, to another
    device or from INT8 to float, is a warning that names the operators.
    """
    from vitkit.inspection import inspect

    body = inspect(artifact, device=device, threads=threads, require_device=require_device)
    if json:
        print_json(body)
        return
    shown = {key: value for key, value in body.items() if key not in _SHOWN_APART}
    print_table(
        ("field", "value"), [(key, _text(value)) for key, value in shown.items()], title=str(artifact)
    )
    provenance = body["provenance"].items()
    print_table(("made from", ""), [(key, _text(value)) for key, value in provenance])
    print_table(("file", "bytes"), list(body["files"].items()))
    rows = [
        (precision, sum(counts.values()), ", ".join(f"{name} {n}" for name, n in counts.items()))
        for precision, counts in body["operators"].items()
    ]
    print_table(("precision", "operators", "which"), rows)
    if devices := body.get("devices"):
        print_table(("runs on", "operators"), list(devices.items()))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

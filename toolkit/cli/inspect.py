"""`vitkit inspect`: what is in an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitkit.cli.arguments import ArtifactArgument, JsonFlag
from vitkit.cli.show import print_json, print_table

if TYPE_CHECKING:
    pass


def inspect(artifact: ArtifactArgument, json: JsonFlag = False) -> None:
    """Show an artifact: card, file sizes, operators by precision."""
    from vitkit.inspection import inspect

    body = inspect(artifact)
    if json:
        print_json(body)
        return
    shown = {key: value for key, value in body.items() if key not in ("files", "operators", "provenance")}
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


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

"""`vitkit doctor`: what works on this machine."""

from __future__ import annotations

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json


def doctor(json: JsonFlag = False) -> None:
    """Check which targets work here, with which versions and CPU features, and print how to fix the rest."""
    from rich.console import Console

    from vitkit import doctor as diagnosis

    findings = diagnosis.diagnose()
    if json:
        print_json(diagnosis.to_json(findings))
    else:
        Console().print(diagnosis.table(findings))

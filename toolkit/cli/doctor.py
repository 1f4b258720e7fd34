"""`vitkit doctor`: what works on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json

if TYPE_CHECKING:
    pass


def doctor(json: JsonFlag = False) -> None:
    """Say which targets work here, with which versions and CPU features, and what mends the rest."""
    from rich.console import Console

    from vitkit import doctor as diagnosis

    checks = diagnosis.diagnose()
    if json:
        print_json(diagnosis.to_json(checks))
    else:
        Console().print(diagnosis.table(checks))

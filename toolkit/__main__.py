"""The `vitkit` command, also as `python -m vitkit`, which launchers of several processes need."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line; exit with 2 where the packages of its extra are missing."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        print(
            f"vitkit: the command line needs {' and '.join(missing)}; "
            "install with: pip install 'vitkit[cli]' (Python programs that import vitkit do not)",
            file=sys.stderr,
        )
        sys.exit(2)
    from vitkit.cli.main import main as run

    run()


if __name__ == "__main__":
    main()

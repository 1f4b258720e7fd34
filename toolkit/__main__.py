"""`python -m vitkit`, which launchers of several processes need."""

from vitkit.cli.main import main

main()

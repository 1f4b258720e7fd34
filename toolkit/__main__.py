"""`python -m vitkit`, which launchers of several processes need."""

from vitkit.cli import main

main()

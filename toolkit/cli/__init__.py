"""The `vitkit` command: one file for each command, heavy imports inside the commands."""

"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

ArtifactArgument = Annotated[Path, typer.Argument(help="Artifact folder, as vitkit export writes it.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", help="CPU threads of one run (the vendor's choice)."),
]
DeviceHere = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--device", help="A device of this machine: cpu, gpu, npu, cuda (the target's own)."),
]
RequireDevice = Annotated[
    bool,
    typer.Option(
        "--require-device",
        help="Refuse an engine of which the vendor runs operators elsewhere than on the device or delegate.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
OptionPairs = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--option", help="Change an architecture option, as key=value; may repeat."),
]
DevicesFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--devices", help="File of devices (devices.toml in your configuration folder)."),
]
EngineDevice = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--device",
        help="A device of this machine (cpu, gpu, npu, cuda), or NAME or NAME:DEVICE of "
        "vitkit device list (cuda for TensorRT, else cpu).",
    ),
]

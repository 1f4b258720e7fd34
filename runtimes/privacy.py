"""Keeps vendors' packages from reporting to their makers; docs/privacy.md has what each of them sends.

`vitkit.runtimes` calls it before any module of vitkit can import a vendor's package.
"""

from __future__ import annotations

import os
import sys

# What a package reads when it is first imported. A variable that the user has set stays as it is.
VARIABLES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# OpenVINO and NNCF report if this package is there, and only its absence stops both: there is no variable.
ABSENT = "openvino_telemetry"


def stop_reports() -> None:
    """Set the variables, and let the package that sends OpenVINO's reports appear not to be installed."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault(ABSENT, None)  # type: ignore[arg-type]

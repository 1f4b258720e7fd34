"""Every error vitkit raises on purpose. The CLI turns exactly these into one red line and exit code 2."""

from __future__ import annotations


class VitkitError(Exception):
    """Base of all user-facing errors: says what is wrong, with which value, and what mends it."""


class MissingBackend(VitkitError):
    """A vendor package is not installed, or does not load here."""

    def __init__(self, package: str, extra: str, cause: object = None) -> None:
        reason = f" ({cause})" if cause else ""
        super().__init__(
            f"the package {package!r} is needed and cannot be imported{reason}; "
            f"install it with: pip install 'vitkit[{extra}]'"
        )


class BadArtifact(VitkitError):
    """An artifact or run folder is missing, damaged, foreign, or made by a newer vitkit."""


class BadInput(VitkitError):
    """Data handed to an engine or a command does not have the form that is asked for."""


class BadRequest(VitkitError):
    """Options that contradict each other or ask for what does not exist."""


class ExportFailed(VitkitError):
    """An engine was made, but it does not do what the float model does, or could not be made."""


class DeviceError(VitkitError):
    """The device asked for is absent or cannot run this engine."""

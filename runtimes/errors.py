"""Every error vitkit raises on purpose. The CLI turns exactly these into one red line and exit code 2."""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 300) -> str:
    """An error of somebody else's code for a message of one line: its first line, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


class VitkitError(Exception):
    """Base of all user-facing errors: what is wrong, with which value, and what fixes it.

    Each survives pickling, so that it arrives from another process: `args` are what its class takes.
    """


class MissingBackend(VitkitError):
    """A vendor package is not installed, or does not load here.

    `remedy` is what fixes it, None if that is the installation of the extra.
    """

    def __init__(self, package: str, extra: str, cause: object = None, remedy: str | None = None) -> None:
        self.package, self.extra, self.remedy = package, extra, remedy
        # As text: a cause may hold anything, and this error must survive pickling.
        self.cause = str(cause) if cause else None
        super().__init__(package, extra, self.cause, remedy)

    def __str__(self) -> str:
        reason = f" ({self.cause})" if self.cause else ""
        remedy = self.remedy or f"install it with: pip install 'vitkit[{self.extra}]'"
        return f"the package {self.package!r} is needed and cannot be imported{reason}; {remedy}"


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


class RunFailed(VitkitError):
    """An engine failed while it ran, and `__cause__` is the vendor's error; or its results are not finite."""

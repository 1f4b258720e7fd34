"""The options of a bench: filled by the command line, sent to workers and devices, checked once, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vitkit.bench.isa import ISAS
from vitkit.runtimes.engine import check_threads
from vitkit.runtimes.errors import BadRequest

SCOPES = {"engine": "prepared feeds in, outputs out", "image": "images in, decoded results out"}
# Beyond these a number is a slip: eleven days, more images than a machine holds.
MAX_SECONDS = 10.0**6
MAX_IMAGES = 10**6
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class BenchOptions:
    """How artifacts are measured; every value is checked when the options are made.

    `device` is the engine's device and `require_device` whether every operator must run there, as
    `open_engine` takes them (None: the default of each target). `threads` are the CPU threads of one run
    (None: the vendor's choice). `batch` images go into each query of an engine with a free batch size. At
    least `duration` seconds are recorded for each artifact and scope. Inputs are drawn by `seed` from a pool
    of `pool_size` images: a sample of the folder `images`, or generated ones if
    it is None. `scopes` are keys of `SCOPES`. `decode` holds options of the task's decoding, as
    `open_engine` takes them. `max_isa` is a key of `ISAS`: OpenVINO as on a lesser CPU. `cool_down` is the
    rest in seconds before each try on a phone; nothing else reads it.

    Raises BadRequest for a value of the wrong type or out of range.
    """

    device: str | None = None
    require_device: bool = False
    threads: int | None = None
    batch: int = 1
    duration: float = 10.0
    images: Path | None = None
    pool_size: int = 32
    seed: int = 0
    scopes: tuple[str, ...] = tuple(SCOPES)
    decode: Mapping[str, Any] | None = None
    max_isa: str | None = None
    cool_down: float = 300.0

    def __post_init__(self) -> None:
        """Check every value, and give `images` and `scopes` their types."""
        _check_device(self.device)
        if type(self.require_device) is not bool:
            raise BadRequest(f"require_device is {self.require_device!r}; it must be true or false")
        check_threads(self.threads)
        _check_integer("batch", self.batch, 1, MAX_IMAGES)
        _check_integer("pool size", self.pool_size, 1, MAX_IMAGES)
        _check_integer("seed", self.seed, 0, MAX_SEED)
        _check_seconds("duration", self.duration)
        if self.duration == 0:
            raise BadRequest("the duration is 0; it must be a positive number of seconds")
        _check_seconds("cool-down", self.cool_down)
        _check_scopes(self.scopes)
        _check_decode(self.decode)
        if self.max_isa is not None and self.max_isa not in ISAS:
            raise BadRequest(f"--max-isa is {self.max_isa!r}; known are {', '.join(ISAS)}")
        if not (self.images is None or isinstance(self.images, (str, Path))):
            raise BadRequest(f"the images are {self.images!r}; name their folder as text or a Path")
        # The only way to set a field of a frozen dataclass.
        object.__setattr__(self, "scopes", tuple(self.scopes))
        object.__setattr__(self, "images", None if self.images is None else Path(self.images))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON takes them; `from_json` reads them back."""
        body = asdict(self)
        return {**body, "images": None if self.images is None else str(self.images)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> BenchOptions:
        """Options from what `to_json` wrote, all checked; raises BadRequest for an unknown name as well."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(body) - set(known)):
            raise BadRequest(f"a bench has no option {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**body)


def _check_device(device: object) -> None:
    if device is not None and not (isinstance(device, str) and device):
        raise BadRequest(f"the device is {device!r}; it must be a name such as 'cpu'")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(f"the {name} is {value!r}; it must be an integer from {least} to {most}")


def _check_seconds(name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:  # type: ignore[operator]
        raise BadRequest(f"the {name} is {value!r}; it must be seconds from 0 to {MAX_SECONDS:.0f}")


def _check_scopes(scopes: object) -> None:
    known = ", ".join(SCOPES)
    if not isinstance(scopes, (list, tuple)) or not all(isinstance(scope, str) for scope in scopes):
        raise BadRequest(f"the scopes are {scopes!r}; they must be a list of names from {known}")
    if not scopes or not set(scopes) <= set(SCOPES) or len(set(scopes)) < len(scopes):
        raise BadRequest(
            f"the scopes are {', '.join(scopes) or 'none'}; known are {known}, each once at most"
        )


def _check_decode(decode: object) -> None:
    if decode is not None and not (
        isinstance(decode, Mapping) and all(isinstance(name, str) for name in decode)
    ):
        raise BadRequest(f"the decode options are {decode!r}; they must be a dictionary by name")

"""The part of vitkit that runs and measures engines, as a wheel for devices, made from its files here."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

# What `vitkit.devices.agent` and `vitkit.devices.worker` import, late imports included: whole packages, and
# single modules of others. Models, training, exporters and the command line stay at home.
_PACKAGES = ("vitkit.runtimes", "vitkit.bench")
_MODULES = (
    "vitkit",
    "vitkit.doctor",
    "vitkit.devices",
    "vitkit.devices.agent",
    "vitkit.devices.outputs",
    "vitkit.devices.worker",
)
_EPOCH = (1980, 1, 1, 0, 0, 0)


def runtime_wheel() -> tuple[str, bytes]:
    """SHA-256 and bytes of a wheel that works from `PYTHONPATH`, the same bytes for the same files.

    If vitkit is installed here, the wheel carries its metadata, from which `doctor` on the device reads
    the versions of packages that are needed.
    """
    from vitkit import __version__

    info = f"vitkit-{__version__}.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, path in _sources():
            _add(wheel, name, path.read_bytes())
        _add(wheel, f"{info}/METADATA", _metadata().encode())
        _add(wheel, f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    data = buffer.getvalue()
    return hashlib.sha256(data).hexdigest(), data


def _sources() -> Iterator[tuple[str, Path]]:
    """Names inside the wheel and files of all modules that a device needs."""
    for module in _MODULES:
        path = Path(str(import_module(module).__file__))
        place = module.replace(".", "/")
        yield (f"{place}/__init__.py" if path.name == "__init__.py" else f"{place}.py"), path
    for package in _PACKAGES:
        folder = Path(str(import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            yield f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}", path


def _add(wheel: zipfile.ZipFile, name: str, data: bytes) -> None:
    # A fixed time, since the bytes are the wheel's name on the device.
    wheel.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)


def _metadata() -> str:
    from vitkit import __version__

    plain = f"Metadata-Version: 2.1\nName: vitkit\nVersion: {__version__}\n"
    try:
        found = metadata.distribution("vitkit")
    except metadata.PackageNotFoundError:
        return plain
    # The second is what installations from a source tree may have instead.
    return found.read_text("METADATA") or found.read_text("PKG-INFO") or plain

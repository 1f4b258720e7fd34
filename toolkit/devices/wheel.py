"""vitkit as a wheel, made from the files that are running: what a device needs to measure engines."""

from __future__ import annotations

import hashlib
import io
import zipfile
from importlib import import_module, metadata
from pathlib import Path

# Opening, running and measuring; models, training and exporters stay at home.
_PACKAGES = ("vitkit", "vitkit.runtimes", "vitkit.runtimes.panoptic", "vitkit.bench", "vitkit.devices")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def runtime_wheel() -> tuple[str, bytes]:
    """SHA-256 and bytes of a wheel that works from `PYTHONPATH`, the same bytes for the same files.

    It carries vitkit's metadata where vitkit is installed, so that `doctor` on the device knows which
    versions of packages are needed.
    """
    from vitkit import __version__

    info = f"vitkit-{__version__}.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        for package in _PACKAGES:
            folder = Path(str(import_module(package).__file__)).parent
            for path in sorted(folder.glob("*.py")):
                _add(wheel, f"{package.replace('.', '/')}/{path.name}", path.read_bytes())
        _add(wheel, f"{info}/METADATA", _metadata().encode())
        _add(wheel, f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    data = buffer.getvalue()
    return hashlib.sha256(data).hexdigest(), data


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

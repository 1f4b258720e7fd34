"""Diagnosis of this machine: which targets work, which do not, and the command that fixes each."""

from __future__ import annotations

import base64
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vitkit.bench.cpu import BF16_FEATURES, INT8_FEATURES, cpu_info
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, write_card
from vitkit.runtimes.engine import RUNTIMES, Runtime, open_engine
from vitkit.runtimes.files import shown_as

if TYPE_CHECKING:
    from rich.table import Table

# Enough to train and to export; the extras of a single vendor are checked by running it.
_MAKING = ("train", "export", "tflite-export")
# uint8 [1, 2, 2, 3] -> Cast to float32 -> Flatten -> logits [1, 12], in ONNX's format. OpenVINO reads that
# format too, so one graph serves both.
_TINY_ONNX = base64.b64decode(
    "CAg6aQoXCgF4EgFmIgRDYXN0KgkKAnRvGAGgAQIKFAoBZhIGbG9naXRzIgdGbGF0dGVuEgFnWhsKAXgSFgoUCAISEAoCCAEKAggC"
    "CgIIAgoCCANiGAoGbG9naXRzEg4KDAgBEggKAggBCgIIDEIECgAQDQ=="
)
# The same in TFLite's format: Cast, Reshape.
_TINY_TFLITE = base64.b64decode(
    "GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAA4AAAA1AEAAAMAAAACAAAAJAAAAAwAAAAAAAYACAAEAAYAAAAEAAAACAAAAAEA"
    "AAAMAAAAoP///wEAAAAQAAAADAAUABAADAAIAAQADAAAABAAAACgAAAApAAAAKgAAAACAAAAXAAAABQAAAAAAA4AGAAUABAADAALAAQA"
    "DgAAABgAAAAAAAARFAAAABgAAAABAAAABAAEAAQAAAABAAAAAwAAAAIAAAABAAAAAgAAAAAADgAWAAAAEAAMAAsABAAOAAAAGAAAAAAA"
    "ACUYAAAAHAAAAAAABgAIAAcABgAAAAAAAAMBAAAAAQAAAAEAAAAAAAAAAQAAAAMAAAABAAAAAAAAAAQAAACkAAAAbAAAADgAAAAEAAAA"
    "rP///wgAAAAQAAAABgAAAGxvZ2l0cwAAAgAAAAEAAAAMAAAADAAUABAADwAIAAQADAAAABAAAAABAAAAAAAAAgwAAAACAAAAdG8AAAEA"
    "AAACAAAADAAMAAgAAAAAAAQADAAAAAgAAAAMAAAAAQAAAGYAAAAEAAAAAQAAAAIAAAACAAAAAwAAAAwAEAAMAAsAAAAEAAwAAAAMAAAA"
    "AAAAAwwAAAABAAAAeAAAAAQAAAABAAAAAgAAAAIAAAADAAAAAgAAACAAAAAEAAAA9P///xYAAAAAAAAWDAAMAAsAAAAAAAQADAAAADUA"
    "AAAAAAA1"
)
_TINY = {
    "onnx": ("model.onnx", _TINY_ONNX),
    "openvino": ("model.onnx", _TINY_ONNX),
    "tflite": ("model.tflite", _TINY_TFLITE),
}


@dataclass(frozen=True)
class Finding:
    """The state of one thing. `remedy` is the command that fixes it; None if it works or nothing helps."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


class _Requirement(NamedTuple):
    package: str
    minimum: str
    extra: str | None


def diagnose() -> list[Finding]:
    """Check Python, the packages, the CPU, and every target by running a tiny engine; raises nothing.

    Vendor packages are imported, the packages for training and export are only looked up.
    """
    requirements = _requirements()
    return [
        *_basics(requirements),
        *(_target(target, runtime, requirements) for target, runtime in RUNTIMES.items()),
        *_openvino_devices(),
        *(_package(one) for one in requirements if one.extra in _MAKING),
        *_cpu(cpu_info()),
    ]


def _requirements() -> list[_Requirement]:
    """Requirements in vitkit's own metadata; empty if vitkit runs without being installed."""
    try:
        lines = metadata.requires("vitkit") or []
    except metadata.PackageNotFoundError:
        return []
    here = (line for line in lines if 'python_version < "3.11"' not in line or sys.version_info < (3, 11))
    found = (re.match(r"([\w.-]+)>=([\d.]+)(?:.*extra == ['\"]([\w-]+))?", line) for line in here)
    return [_Requirement(*match.groups()) for match in found if match]


def _basics(requirements: list[_Requirement]) -> list[Finding]:
    from vitkit import __version__

    vitkit = Finding("vitkit", True, __version__)
    if not requirements:
        remedy = "pip install vitkit"
        vitkit = Finding("vitkit", False, f"{__version__}, not installed: versions are unchecked", remedy)
    python = Finding("python", True, f"{platform.python_version()}, {platform.platform()}")
    return [python, vitkit, *(_package(one) for one in requirements if one.extra is None)]


def _package(wanted: _Requirement) -> Finding:
    name = f"{wanted.extra}: {wanted.package}" if wanted.extra else wanted.package
    upgrade = f"pip install --upgrade '{wanted.package}>={wanted.minimum}'"
    try:
        version = metadata.version(wanted.package)
    except metadata.PackageNotFoundError:
        remedy = f"pip install 'vitkit[{wanted.extra}]'" if wanted.extra else upgrade
        return Finding(name, False, "not installed", remedy)
    if too_old := _too_old(version, wanted.minimum):
        return Finding(name, False, too_old, upgrade)
    return Finding(name, True, version)


def _too_old(version: str, minimum: str) -> str | None:
    numbers = _numbers(version)
    if not numbers or numbers >= _numbers(minimum):
        return None
    return f"{version} is too old; vitkit needs {minimum} or newer"


def _numbers(version: str) -> list[int]:
    release = re.match(r"[\d.]*", version)
    return [int(part) for part in release.group().split(".") if part] if release else []


def _target(target: str, runtime: Runtime, requirements: list[_Requirement]) -> Finding:
    name, package = f"run {target}", runtime.package
    if not _is_here(package):
        if runtime.substitute is None or not _is_here(runtime.substitute):
            remedy = runtime.remedy or f"pip install 'vitkit[{runtime.extra}]'"
            return Finding(name, False, f"{package} is not installed", remedy)
        package = runtime.substitute
    reinstall = f"pip install --force-reinstall {package}"
    # A damaged or mismatched binary raises anything from OSError to AttributeError.
    try:
        version = str(getattr(import_module(package), "__version__", "of unknown version"))
    except Exception as error:
        return Finding(name, False, f"{package} is installed but does not import: {_cause(error)}", reinstall)
    # Packages are asked for with hyphens and imported with underscores.
    minimum = next((one.minimum for one in requirements if one.package.replace("-", "_") == package), "0")
    if too_old := _too_old(version, minimum):
        return Finding(name, False, f"{package} {too_old}", f"pip install --upgrade '{package}>={minimum}'")
    if target not in _TINY:
        return Finding(name, True, f"{package} {version} imports")
    try:
        _run_tiny_engine(target)
    except Exception as error:
        remedy = getattr(error, "remedy", None) or reinstall
        return Finding(name, False, f"{package} {version} imports but fails to run: {_cause(error)}", remedy)
    return Finding(name, True, f"{package} {version} runs a tiny engine")


def _is_here(package: str) -> bool:
    try:
        return find_spec(package) is not None
    # A module that was put in place by hand has no spec.
    except ValueError:
        return True


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _run_tiny_engine(target: str) -> None:
    card = ModelCard(
        name="tiny",
        task="classification",
        target=target,
        precision="fp32",
        inputs=(TensorSpec("x", (1, 2, 2, 3), "uint8"),),
        outputs=(TensorSpec("logits", (1, 12), "float32"),),
        image=ImageSpec(size=(2, 2), crop_pct=1.0),
        engine=_TINY[target][0],
        files={_TINY[target][0]: None},
    )
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, shown_as(folder, "a tiny engine"):
        (Path(folder) / card.engine).write_bytes(_TINY[target][1])
        write_card(card, Path(folder))
        with open_engine(folder, task="classification", threads=1) as engine:
            found = engine(image).label
    if found != "11":
        raise ArithmeticError(f"the tiny engine answers class {found}, not 11")


def _openvino_devices() -> list[Finding]:
    # Whatever fails here is in the finding on running openvino.
    try:
        from vitkit.runtimes.openvino import capabilities

        able = capabilities()
    except Exception:
        return []
    devices = Finding("openvino devices", True, "; ".join(f"{name}: {' '.join(able[name])}" for name in able))
    bf16 = [name.lower() for name in able if "BF16" in able[name]]
    if bf16:
        return [devices, Finding("openvino bf16", True, f"bf16 artifacts run on {', '.join(bf16)}")]
    return [
        devices,
        Finding("openvino bf16", False, "no device has bf16: openvino bf16 artifacts are refused here"),
    ]


def _cpu(info: dict[str, Any]) -> list[Finding]:
    cores = f"{info['usable_cores'] or info['cores'] or 'unknown'} cores"
    facts = (info["model"], info["architecture"], cores, f"governor {info['governor'] or 'unknown'}")
    cpu = Finding("cpu", True, ", ".join(fact for fact in facts if fact))
    if info["features"] is None:
        return [cpu, Finding("cpu features", False, "this system does not list them")]
    return [
        cpu,
        Finding("cpu features", True, " ".join(info["features"]) or "none of those that matter here"),
        _feature(
            "cpu int8", info["features"], INT8_FEATURES, "int8 engines are smaller but hardly faster here"
        ),
        _feature(
            "cpu bf16", info["features"], BF16_FEATURES, "bf16 would be emulated and slow: use fp32 or int8"
        ),
    ]


def _feature(name: str, features: list[str], wanted: frozenset[str], otherwise: str) -> Finding:
    found = [feature for feature in features if feature in wanted]
    if found:
        return Finding(name, True, f"native: {' '.join(found)}")
    return Finding(name, False, f"no instructions for it; {otherwise}")


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as plain dictionaries with `name`, `ok`, `detail` and `remedy`."""
    return [asdict(finding) for finding in findings]


def table(findings: Sequence[Finding]) -> Table:
    """Findings as a table for the terminal: ok, MISSING if a command fixes it, else a dash."""
    from rich.table import Table
    from rich.text import Text

    result = Table(box=None, header_style="bold")
    for column in ("", "what", "found", "fix"):
        result.add_column(column, overflow="fold")
    for finding in findings:
        state = "ok" if finding.ok else "MISSING" if finding.remedy else "-"
        # As Text: messages and commands hold brackets, which are markup otherwise.
        result.add_row(*map(Text, (state, finding.name, finding.detail, finding.remedy or "")))
    return result

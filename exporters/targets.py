"""The targets, a row for each; and what of a request is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, NamedTuple

from vitkit.runtimes.engine import runtime_module
from vitkit.runtimes.errors import BadRequest, DeviceError, MissingBackend
from vitkit.runtimes.plugins import Rows
from vitkit.runtimes.tensorrt_options import DEFAULT_VERSION, DIALECTS


class TargetOption(NamedTuple):
    """An option of some targets: `options={name: value}` in Python, `flag` on the command line."""

    name: str
    choices: tuple[int | str, ...]
    default: int | str

    @property
    def flag(self) -> str:
        """The option as it is spelt on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: object) -> None:
        """Raises BadRequest for a value that is none of the choices."""
        if not any(value == choice and type(value) is type(choice) for choice in self.choices):
            raise BadRequest(
                f"{self.flag} is {value!r}; it must be one of {', '.join(map(str, self.choices))}"
            )


# Torch's exporter writes 18 and later natively; asked for less it may silently write 18. From 20 on GELU is
# one operator, which ONNX Runtime runs 1.17 times faster. 26 fails the checker.
OPSET = TargetOption("opset", tuple(range(18, 26)), 20)
TRT_VERSION = TargetOption("trt_version", tuple(DIALECTS), DEFAULT_VERSION)


class Target(NamedTuple):
    """A row of `TARGETS`.

    `module` has `export(source, folder, *, precision, calibration, image, batch, ...)`, the target's own
    `options` being the last arguments, and `write_twin(artifact, folder, shapes)`; `quantiser` has `METHOD`,
    and is empty if the target has no int8. `packages` are needed; `extra` installs them, or `remedy` is the
    advice to a user who lacks one. `refusals` give the reason why a precision is not among
    `precisions`; `cpu_needs` names the capability that a precision needs of the CPU, as the target's runtime
    lists it. `stand_in` is the target whose runtime runs the graph for the parity check, because the engine
    itself is built elsewhere. `free_batch` means that the batch dimension may stay open. `from_torch` gives
    the reason why engines are made from torch modules alone, if they are.
    """

    module: str
    quantiser: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    refusals: Mapping[str, str] = {}
    options: tuple[TargetOption, ...] = ()
    cpu_needs: Mapping[str, str] = {}
    stand_in: str | None = None
    extra: str = "export"
    free_batch: bool = True
    from_torch: str = ""
    remedy: str | None = None


_TARGETS = {
    "onnx": Target(
        "vitkit.exporters.onnx",
        "vitkit.calibration.onnx",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        ("fp32", "fp16", "int8"),
        {"bf16": "ONNX Runtime has no bf16 kernels for CPUs; use --target openvino, or --precision fp16"},
        options=(OPSET,),
    ),
    "openvino": Target(
        "vitkit.exporters.openvino",
        "vitkit.calibration.openvino",
        ("torch", "onnx", "onnxscript", "openvino", "nncf"),
        ("fp32", "fp16", "bf16", "int8"),
        options=(OPSET,),
        cpu_needs={"bf16": "BF16"},
    ),
    "tensorrt": Target(
        "vitkit.exporters.tensorrt",
        "vitkit.calibration.tensorrt",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        ("fp32", "fp16", "int8"),
        {"bf16": "TensorRT 8 has no bf16; use fp16"},
        options=(TRT_VERSION,),
        stand_in="onnx",
        free_batch=False,
    ),
    "tflite": Target(
        "vitkit.exporters.tflite",
        "vitkit.calibration.tflite",
        ("torch", "litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        ("fp32", "fp16", "int8"),
        {"bf16": "TFLite has no bf16 kernels for CPUs; use --target openvino, or --precision fp16"},
        extra="tflite-export",
        free_batch=False,
        from_torch="its converter reads torch modules, and no maintained one reads ONNX",
    ),
}
TARGETS = Rows("vitkit.targets", Target, _TARGETS)
INPUTS = {"uint8": {"layout": "NHWC", "dtype": "uint8"}, "float32": {"layout": "NCHW", "dtype": "float32"}}


def check_request(
    target: str,
    precision: str,
    *,
    calibrated: bool,
    input: str = "uint8",
    batch: int | None = 1,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what cannot work before any heavy import.

    `calibrated` says that there are calibration images, `options` are the target's own. Raises BadRequest,
    MissingBackend, and DeviceError for a precision that this machine cannot verify.
    """
    if target not in TARGETS:
        raise BadRequest(f"there is no target {target!r}; the targets are {', '.join(TARGETS)}")
    row = TARGETS[target]
    if precision not in row.precisions:
        reason = row.refusals.get(precision, f"{target} has {', '.join(row.precisions)}")
        raise BadRequest(f"--precision {precision} is not possible for {target}: {reason}")
    if (precision == "int8") != calibrated:
        what = "takes no --calib" if calibrated else "needs calibration images: add --calib DIR"
        raise BadRequest(f"--precision {precision} {what}")
    if input not in INPUTS:
        raise BadRequest(f"--input is {input!r}; it must be {' or '.join(INPUTS)}")
    _check_batch(target, batch)
    _check_options(target, options or {})
    for package in row.packages:
        if find_spec(package) is None:
            raise MissingBackend(package, row.extra, remedy=row.remedy)
    _check_cpu(target, precision)


def _check_batch(target: str, batch: int | None) -> None:
    if batch is None and not TARGETS[target].free_batch:
        raise BadRequest(f"{target} engines have a fixed batch size: use --batch N, not --dynamic-batch")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise BadRequest(f"--batch is {batch!r}; it must be an integer, at least 1")


def _check_cpu(target: str, precision: str) -> None:
    """Refuse an engine that this machine could not run, and thus not verify; raises DeviceError."""
    need = TARGETS[target].cpu_needs.get(precision)
    if need is None:
        return
    able = runtime_module(target).capabilities()["CPU"]
    if need not in able:
        others = " or ".join(name for name in TARGETS[target].precisions if name != precision)
        raise DeviceError(
            f"--precision {precision} is not possible here: {target} computes in it on CPUs with {need} "
            f"instructions, this one has {', '.join(able)}, and the engine could not be verified; "
            f"use {others}"
        )


def _check_options(target: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the target lacks, naming the targets that have them, and values out of range."""
    known = {option.name: option for option in TARGETS[target].options}
    for name, value in options.items():
        if name in known:
            known[name].check(value)
        else:
            flags = " and ".join(option.flag for option in known.values()) or "no options of its own"
            raise BadRequest(f"{_foreign_option(name, target)}; {target} has {flags}")


def _foreign_option(name: str, target: str) -> str:
    """Why a target does not take an option: it belongs to other targets, or it is misspelt."""
    owners: dict[str, list[str]] = {}
    for other, row in TARGETS.items():
        for option in row.options:
            owners.setdefault(option.name, []).append(f"--target {other}")
    if name in owners:
        flag = f"--{name.replace('_', '-')}"
        return f"{flag} is an option of {' and '.join(owners[name])}, not of {target}"
    near = get_close_matches(str(name), owners, 1)
    meant = f"; did you mean {near[0]!r}, of {' and '.join(owners[near[0]])}?" if near else ""
    return f"no target has an option {name!r}{meant}"


def with_defaults(target: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The target's own options, the ones that are not in `options` at their defaults."""
    return {option.name: option.default for option in TARGETS[target].options} | dict(options or {})

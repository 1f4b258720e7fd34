"""How a graph becomes a TensorRT engine: options by version, commands, cache keys. Needs no TensorRT."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from vitkit.runtimes.card import Artifact
from vitkit.runtimes.errors import BadArtifact, DeviceError

GRAPH_FILE = "model.onnx"
PLAN_FILE = "engine.plan"


class Dialect(NamedTuple):
    """What the ONNX of a version must be: its opset, whether LayerNormalization parses, which precisions are
    strongly typed (the graph says every tensor's type; otherwise the builder chooses within its flags)."""

    opset: int
    layer_norm: bool
    strongly_typed: tuple[str, ...]


DIALECTS = {
    "8.5": Dialect(17, False, ()),
    "8.6": Dialect(17, True, ()),
    # Float16 scales of Q/DQ need opset 19, so int8 keeps the builder's flags here.
    "10": Dialect(17, True, ("fp16",)),
    "11": Dialect(19, True, ("fp32", "fp16", "int8")),
}
DEFAULT_VERSION = "10"
_FLAGS = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}


@dataclass(frozen=True)
class BuildOptions:
    """How the builder is set for an artifact; kept in its card.

    `version` is a key of `DIALECTS`. `flags` are names of TensorRT's builder flags. `float32_layers` are ONNX
    nodes that must compute in float32 and return it. TF32 is always off: it halves what float32 holds.
    """

    version: str
    strongly_typed: bool
    flags: tuple[str, ...] = ()
    float32_layers: tuple[str, ...] = ()


class Machine(NamedTuple):
    """What an engine is bound to: TensorRT's version, the GPU's compute capability, system and processor."""

    tensorrt: str
    compute_capability: str
    platform: str

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt}, compute capability {self.compute_capability}, {self.platform}"


def options_for(version: str, precision: str, float32_layers: tuple[str, ...]) -> BuildOptions:
    """The options of a version (a key of `DIALECTS`) for a precision; typed graphs need no flags."""
    typed = precision in DIALECTS[version].strongly_typed
    flags = () if typed else _FLAGS[precision]
    return BuildOptions(version, typed, flags, float32_layers if flags else ())


def dialect_of(version: str) -> str | None:
    """TensorRT's own version, such as `10.3.0`, as a key of `DIALECTS`; None where no dialect is for it."""
    numbers = re.findall(r"\d+", version)[:2]
    return next((key for key in DIALECTS if key.split(".") == numbers[: len(key.split("."))]), None)


def read_options(artifact: Artifact) -> BuildOptions:
    """The build options in an artifact's card; raises BadArtifact."""
    body = artifact.card.options.get("build")
    match body:
        case {
            "version": str(version),
            "strongly_typed": bool(typed),
            "flags": list(flags),
            "float32_layers": list(layers),
        } if version in DIALECTS and all(isinstance(item, str) for item in (*flags, *layers)):
            return BuildOptions(version, typed, tuple(flags), tuple(layers))
    raise BadArtifact(
        f"{artifact.path}: options.build is {body!r}; it must name a version ({', '.join(DIALECTS)}), "
        "strongly_typed, flags and float32_layers. Export it again with --target tensorrt"
    )


def read_built(artifact: Artifact) -> Machine | None:
    """What the artifact's engine was built on and by; None if it is not built. Raises BadArtifact."""
    body = artifact.card.options.get("built")
    if body is None:
        return None
    if not isinstance(body, Mapping) or set(body) != set(Machine._fields):
        raise BadArtifact(
            f"{artifact.path}: options.built is {body!r}; it must be null or name {Machine._fields}"
        )
    return Machine(**{name: str(body[name]) for name in Machine._fields})


def differences(built: Machine, here: Machine) -> list[str]:
    """What differs between two machines, in words; empty where an engine of one runs on the other."""
    words = {"tensorrt": "TensorRT", "compute_capability": "compute capability", "platform": "platform"}
    pairs = ((words[name], getattr(built, name), getattr(here, name)) for name in Machine._fields)
    return [f"{word} {theirs} there, {ours} here" for word, theirs, ours in pairs if theirs != ours]


def check_machine(artifact: Artifact, here: Machine) -> None:
    """Refuse an engine that was built on a machine of another kind; raises DeviceError naming both sides."""
    built = read_built(artifact)
    if built is not None and (differing := differences(built, here)):
        raise DeviceError(
            f"{artifact.engine_path} was built by {built}; here is {here} ({'; '.join(differing)}). "
            f"Build it here: vitkit build {artifact.path} -o {artifact.path}-here"
        )


def check_version(artifact: Artifact, here: Machine) -> None:
    """Refuse a graph that is for another version of TensorRT; raises DeviceError naming both sides."""
    wanted, dialect = read_options(artifact).version, dialect_of(here.tensorrt)
    if dialect != wanted:
        mend = (
            f"export it again with --trt-version {dialect}" if dialect else f"known are {', '.join(DIALECTS)}"
        )
        raise DeviceError(
            f"{artifact.path} is for TensorRT {wanted}, here is TensorRT {here.tensorrt}: {mend}"
        )


def engine_key(graph_hash: str, options: BuildOptions, machine: Machine) -> str:
    """The cache key of an engine: a SHA-256 over all that it depends on."""
    body = {"graph": graph_hash, "options": asdict(options), "machine": machine._asdict()}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def timing_key(machine: Machine) -> str:
    """The name under which a machine's kernel timings are kept; every engine built there shares them."""
    return "-".join(re.sub(r"[^\w.]", "_", part) for part in machine)


def trtexec(options: BuildOptions) -> list[str]:
    """The command that builds the engine with TensorRT's own tool, run inside the artifact's folder."""
    command = [
        "trtexec",
        f"--onnx={GRAPH_FILE}",
        f"--saveEngine={PLAN_FILE}",
        "--timingCacheFile=timing.cache",
    ]
    # 11 knows typed networks only, and has no option for them.
    if options.strongly_typed and options.version != "11":
        command.append("--stronglyTyped")
    command += [f"--{flag.lower()}" for flag in options.flags]
    if options.float32_layers:
        layers = ",".join(f"{name}:fp32" for name in options.float32_layers)
        command += [
            "--precisionConstraints=obey",
            f"--layerPrecisions={layers}",
            f"--layerOutputTypes={layers}",
        ]
    return [*command, "--noTF32", "--buildOnly" if options.version == "8.5" else "--skipInference"]


def build_script(options: BuildOptions) -> str:
    """`build.sh`: the same command as a shell script."""
    return (
        "#!/bin/sh\n"
        f"# Builds {PLAN_FILE} with TensorRT {options.version}, on the machine that is to run it.\n"
        'set -eu\ncd "$(dirname "$0")"\n' + " \\\n    ".join(map(shlex.quote, trtexec(options))) + "\n"
    )

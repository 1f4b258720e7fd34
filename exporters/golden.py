"""Golden pairs: a few inputs with the float reference's outputs, to check an artifact where it lands."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import Artifact, TensorSpec
from vitkit.runtimes.errors import BadArtifact
from vitkit.runtimes.reading import MAX_ENGINE_BYTES, open_file

GOLDEN_FILE = "golden.npz"
# Many more than an export writes.
MAX_PAIRS = 64
# Longer than a header of numpy's, and than all that an archive adds to its members.
_HEADER, _MARGIN = 1 << 14, 1 << 20
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# A message names this many members.
_SHOWN = 8


def write_golden(
    folder: Path, inputs: NDArray[Any], outputs: dict[str, NDArray[Any]], name: str = "image"
) -> None:
    """Save prepared inputs (N, ...) and the reference's outputs as `golden.npz`."""
    arrays: dict[str, Any] = {
        f"input.{name}": inputs,
        **{f"output.{key}": value for key, value in outputs.items()},
    }
    np.savez_compressed(folder / GOLDEN_FILE, **arrays)


def read_golden(artifact: Artifact) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Prepared inputs (N, ...) and the reference's outputs of an artifact, N at most 64.

    Nothing is unpacked that does not have the shapes and types of the card. Raises BadArtifact.
    """
    path, card = artifact.path / GOLDEN_FILE, artifact.card
    specs = {f"input.{card.inputs[0].name}": card.inputs[0]}
    specs |= {f"output.{spec.name}": spec for spec in card.outputs}
    limit = sum(map(_bytes_of_pair, specs.values())) * MAX_PAIRS
    try:
        # Noise, which deflate does not make smaller, grows by less than a thousandth.
        with open_file(path, min(limit + limit // 1000, MAX_ENGINE_BYTES) + _MARGIN) as file:
            loaded = _read_members(file, specs)
    # numpy and zipfile raise a dozen types on hostile bytes.
    except Exception as error:
        raise BadArtifact(f"{path} cannot be read: {error}") from None
    outputs = {spec.name: loaded[f"output.{spec.name}"] for spec in card.outputs}
    return loaded[f"input.{card.inputs[0].name}"], outputs


def _bytes_of_pair(spec: TensorSpec) -> int:
    return math.prod(dim or 1 for dim in spec.shape[1:]) * np.dtype(spec.dtype).itemsize


def _read_members(file: BinaryIO, specs: Mapping[str, TensorSpec]) -> dict[str, NDArray[Any]]:
    """The tensors of an archive, each of its spec and as many as the others; raises ValueError."""
    with zipfile.ZipFile(file) as archive:
        found = {info.filename: info for info in archive.infolist()}
        if lacking := [name for name in specs if f"{name}.npy" not in found]:
            shown = ", ".join(map(repr, list(found)[:_SHOWN]))
            raise ValueError(
                f"it lacks {', '.join(lacking)} of this engine's inputs and outputs, it has {shown}"
            )
        counts = {_checked_count(archive, found[f"{name}.npy"], spec) for name, spec in specs.items()}
        if len(counts) != 1:
            raise ValueError(f"its tensors are of {sorted(counts)} images")
        return {name: _read_member(archive, f"{name}.npy") for name in specs}


def _read_member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(name) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def _checked_count(archive: zipfile.ZipFile, info: zipfile.ZipInfo, spec: TensorSpec) -> int:
    """How many inputs or outputs a member holds; raises ValueError if it is not what its card says."""
    name = info.filename
    # The other methods unpack a block at once, however long it becomes.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by the method {info.compress_type}")
    with archive.open(info) as stream:
        # No more, since numpy reads a header of any length before it looks at it.
        header = io.BytesIO(stream.read(_HEADER))
    version = np.lib.format.read_magic(header)
    if version not in _READERS:
        raise ValueError(f"{name} has version {version} of numpy's format")
    shape, _, dtype = _READERS[version](header)
    fits = dtype == spec.dtype and len(shape) == len(spec.shape) and shape[1:] == spec.shape[1:]
    if not fits or not 1 <= shape[0] <= MAX_PAIRS:
        raise ValueError(f"{name} is {dtype} {list(shape)}, the card says {spec}, and at most {MAX_PAIRS}")
    if info.file_size != header.tell() + shape[0] * _bytes_of_pair(spec):
        raise ValueError(f"{name} has {info.file_size} bytes, which its header does not describe")
    return int(shape[0])

"""Outputs on their way home from a device: a list that describes them, as JSON, and then their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import MAX_ELEMENTS, TensorSpec


def fingerprint(array: NDArray[Any]) -> str:
    """Hex SHA-256 of an array's values, in C order."""
    return hashlib.sha256(_bytes_of(np.ascontiguousarray(array))).hexdigest()


def _bytes_of(array: NDArray[Any]) -> memoryview:
    """The memory of an array in C order, of any size, also none."""
    return array.reshape(-1).view(np.uint8).data


def pack(outputs: Mapping[str, NDArray[Any]]) -> tuple[list[dict[str, Any]], list[memoryview]]:
    """Outputs by name -> the list that describes them, and the bytes that follow it."""
    # Machines of either byte order send the same bytes.
    arrays = [np.ascontiguousarray(value, value.dtype.newbyteorder("<")) for value in outputs.values()]
    described = [
        {"name": name, "dtype": array.dtype.name, "shape": array.shape, "sha256": fingerprint(array)}
        for name, array in zip(outputs, arrays, strict=True)
    ]
    return described, list(map(_bytes_of, arrays))


def unpack(
    described: Sequence[Mapping[str, Any]], stream: BufferedIOBase, specs: Sequence[TensorSpec], count: int
) -> dict[str, NDArray[Any]]:
    """Read what `pack` made of the outputs of `count` inputs, bit for bit.

    Raises ValueError before a byte is read if they are not the outputs `specs`, and for bytes of another
    hash; EOFError if the stream ends before.
    """
    names = [one["name"] for one in described]
    if sorted(names) != sorted(spec.name for spec in specs):
        raise ValueError(f"outputs are {names}, the card has {', '.join(map(str, specs))}")
    of = {spec.name: spec for spec in specs}
    shapes = [_checked_shape(one, of[one["name"]], count) for one in described]
    outputs = {}
    for one, shape in zip(described, shapes, strict=True):
        array = np.empty(shape, np.dtype(of[one["name"]].dtype).newbyteorder("<"))
        if stream.readinto(_bytes_of(array)) != array.nbytes:
            raise EOFError
        if fingerprint(array) != one["sha256"]:
            raise ValueError(f"output {one['name']!r} arrived damaged")
        outputs[one["name"]] = array.astype(of[one["name"]].dtype, copy=False)
    return outputs


def _checked_shape(described: Mapping[str, Any], spec: TensorSpec, count: int) -> tuple[int, ...]:
    shape = tuple(described["shape"])
    wanted = (count, *spec.shape[1:])
    sized = len(shape) == len(wanted) and all(type(size) is int and size >= 0 for size in shape)
    if (
        described["dtype"] != spec.dtype
        or not sized
        or not all(want in (None, got) for want, got in zip(wanted, shape, strict=True))
        or int(np.prod(shape, dtype=object)) > MAX_ELEMENTS
    ):
        raise ValueError(
            f"output {spec.name!r} of {count} inputs is {described['dtype']} {list(shape)}, "
            f"the card has {spec}"
        )
    return shape

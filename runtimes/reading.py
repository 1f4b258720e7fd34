"""Reading files that others made: regular files alone, up to a stated size."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Python takes quadratic time for an integer's digits, and refuses more than 4300 since 3.11.
_DIGITS = 1000
# How ONNX names the file of a tensor's values: field 13 of a tensor, an entry with the key `location`.
_LOCATION = b"\x0a\x08location\x12"
_EXTERNAL = re.compile(b"\x6a..?" + re.escape(_LOCATION), re.DOTALL)
MAX_JSON_BYTES = 8 << 20
# Reports hold every time that was measured, indices every shard; data sets describe millions of segments.
MAX_REPORT_BYTES, MAX_DATA_JSON_BYTES = 256 << 20, 4 << 30
# The vendors' own formats end at 2 GiB (ONNX, TFLite); OpenVINO's weights and TensorRT's plans may be larger.
MAX_ENGINE_BYTES = 4 << 30


def _check(found: os.stat_result, path: str | Path, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    if limit is not None and found.st_size > limit:
        raise OSError(f"{path} has {found.st_size} bytes; at most {limit} are read")


def _open_at_once(path: str, flags: int) -> int:
    # Opening a FIFO waits for its writer; for regular files the flag means nothing.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def open_file(path: str | Path, limit: int | None) -> Iterator[BinaryIO]:
    """Open a regular file of at most `limit` bytes for reading; None for data of the user's own, of any size.

    Raises OSError for a file that is missing, larger, or a FIFO, device, socket or folder.
    """
    # Before opening too, which is an action of its own for some devices.
    _check(os.stat(path), path, limit)
    with open(path, "rb", opener=_open_at_once) as file:
        _check(os.fstat(file.fileno()), path, limit)
        yield file


def read_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises OSError, see `open_file`."""
    with open_file(path, limit) as file:
        content = file.read(limit + 1)
    # The files of /proc claim to be empty, and others may grow.
    if len(content) > limit:
        raise OSError(f"{path} has over {limit} bytes, which is the most that is read")
    return content


def read_text(path: str | Path, limit: int = MAX_JSON_BYTES) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises OSError, see `open_file`; UnicodeDecodeError for bytes that are not UTF-8.
    """
    return read_file(path, limit).decode("utf-8-sig")


def read_json(path: str | Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON of a file, in UTF-8 with or without a byte order mark, or in UTF-16 or UTF-32.

    Integers of over 1000 digits come as floats, those beyond their range as infinity. Raises OSError, see
    `open_file`; ValueError or RecursionError for bytes that are not JSON or an object that has a key twice.
    """
    return json.loads(read_file(path, limit), object_pairs_hook=_without_repeats, parse_int=_integer)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises OSError, see `open_file`; ValueError for bytes that are not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(read_text(path))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _integer(text: str) -> float:
    return int(text) if len(text) <= _DIGITS else float(text)


def has_external_weights(graph: bytes) -> bool:
    """Whether an ONNX file keeps weights in other files."""
    # Looking for text alone is several times as fast as the pattern.
    return _LOCATION in graph and _EXTERNAL.search(graph) is not None

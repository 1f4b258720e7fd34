"""`FILE.pt2`: a program that torch.export saved."""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.exporters.source import Source
from vitkit.runtimes.card import sha256
from vitkit.runtimes.errors import BadInput, BadRequest, first_line
from vitkit.runtimes.reading import MAX_ENGINE_BYTES, read_file
from vitkit.sources.card_values import CardValues
from vitkit.sources.network import wrap_network

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_AGAIN = "save it again with torch.export.save of torch 2.9 or later"
# What torch.export.save writes: the program, raw tensors and their lists, and what describes the archive.
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(serialization_id|version)|extra/.*"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
# Sizes that depend on others are text that torch hands to sympy, which evaluates it as code: names, numbers
# and calls of sympy's own, such as Mul(Integer(2), Symbol('s77', positive=True)).
_EXPRESSION = re.compile(r"(?!.*__)([\w\s+\-*/%(),<>=!&|~]|'[A-Za-z]\w*')*")


def load(path: Path, values: CardValues, keep_float: Sequence[str] = ()) -> Source:
    """The network of a program that takes one float32 tensor (N, 3, H, W).

    Its size comes from the program unless that leaves it open. A program of batch size 1 is run image by
    image, so that its engines have batch size 1 too. A program that could only be loaded by unpickling
    objects is refused. Raises BadInput, and BadRequest for a program or card that cannot be exported.
    """
    program = _read(path)
    batch, size = _input(program, path)
    values = values.over(CardValues(size=size))
    if size is not None and values.size != size:
        raise BadRequest(f"{path} takes images of {size[0]},{size[1]}; leave out --size")
    origin = {"program": path.name, "sha256": sha256(path)}
    return wrap_network(_module(program), path.stem, values, origin, keep_float, batch)


def _read(path: Path) -> ExportedProgram:
    try:
        content = read_file(path, MAX_ENGINE_BYTES)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_archive(archive, path)
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is no exported program: {error}") from None
    import torch

    noisy = logging.getLogger("torch.export")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        return torch.export.load(io.BytesIO(content))
    # A damaged program, or one of a later torch, raises many types.
    except Exception as error:
        raise BadInput(
            f"torch {torch.__version__} cannot read {path}: {first_line(error)}; {_AGAIN}"
        ) from error
    finally:
        noisy.setLevel(level)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise BadInput for an archive in which torch would unpickle objects or open a compiled library."""
    names = archive.namelist()
    root = names[0].partition("/")[0] + "/" if names else ""
    if f"{root}archive_format" not in names:
        raise BadInput(f"{path} is no exported program that this torch writes; {_AGAIN}")
    for name in names:
        inside = name.removeprefix(root)
        if inside.endswith(".json"):
            _check_json(json.loads(archive.read(name)), path)
        elif inside.endswith(".pt"):
            _check_tensors(archive.read(name), inside, path)
        elif not _PLAIN.fullmatch(inside):
            raise BadInput(
                f"{path} holds {inside!r}, which is code or an object that loading would run; {_AGAIN}, and "
                "without custom objects or compiled parts"
            )


def _check_json(body: Any, path: Path) -> None:
    for key, value in _entries(body):
        if key == "use_pickle" and value:
            raise BadInput(
                f"{path} holds pickled tensors of a class of its own, whose loading runs code; {_AGAIN}, "
                "with plain tensors"
            )
        if key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
            raise BadInput(f"{path} holds {value!r:.80} as a size, which is no arithmetic; {_AGAIN}")


def _entries(body: Any) -> Iterator[tuple[str, Any]]:
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_tensors(content: bytes, name: str, path: Path) -> None:
    """Raise BadInput unless torch reads a file of tensors without running code: it would else unpickle it."""
    import torch

    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise BadInput(
            f"{path}: {name} cannot be read without running its code ({first_line(error)}); {_AGAIN}"
        ) from None


def _input(program: ExportedProgram, path: Path) -> tuple[int | None, tuple[int, int] | None]:
    """The batch size (None for any) and the size (height, width; None if open) of a program's one input."""
    import torch

    wanted = "vitkit takes programs of one float32 input (N, 3, H, W)"
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    if len(names) != 1 or not isinstance(names[0], str):
        raise BadRequest(f"{path} takes {len(names)} inputs ({', '.join(map(str, names))}); {wanted}")
    found = nodes[names[0]].meta["val"]
    shape = list(found.shape)
    if found.dtype != torch.float32 or len(shape) != 4 or shape[1] != 3:
        cure = ": put x.permute(0, 3, 1, 2) first in its forward" if shape[-1:] == [3] else ""
        dtype = str(found.dtype).removeprefix("torch.")
        raise BadRequest(f"{path} takes {dtype} {shape}; {wanted}{cure}")
    batch, _, height, width = (side if isinstance(side, int) else None for side in shape)
    if batch not in (None, 1):
        raise BadRequest(
            f"{path} was exported for {batch} images at a time; export it for one, or with a free batch: "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    return batch, None if height is None or width is None else (height, width)


def _module(program: ExportedProgram) -> Any:
    """The program as modules under the paths that they had; all of it is as it was exported."""
    import torch

    module = torch.export.unflatten(program)
    for part in module.modules():
        part.training = False
    return module

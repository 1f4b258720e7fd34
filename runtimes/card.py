"""The card: what an app must know about an artifact, as `card.json` beside the engine file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.reading import MAX_ENGINE_BYTES, open_file, read_json

FORMAT = 1
CARD_FILE = "card.json"
DOCUMENT = "docs/card.md"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DTYPES = ("uint8", "int32", "int64", "float16", "float32")
# Bounds of what a card may ask for, far beyond any network of an edge device.
MAX_RANK, MAX_ELEMENTS, MAX_SIDE, MAX_FILES, MAX_DEPTH = 8, 2**30, 8192, 100, 16
MAX_TEXT, MAX_FILE_NAME_BYTES = 1000, 255
MIN_CROP = 0.1
MAX_MEAN, STD_RANGE, MAX_DECODE_NUMBER = 1e3, (1e-4, 1e4), 1e9


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine; a dimension of None may have any size."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        dims = ", ".join("any" if d is None else str(d) for d in self.shape)
        # An engine may have any name, also one that would change the terminal.
        return f"{self.name if self.name.isprintable() else repr(self.name)}: {self.dtype} [{dims}]"


@dataclass(frozen=True)
class ImageSpec:
    """How a photograph becomes one input of the engine.

    `fit` `cover`: the image is scaled so that it covers `size / crop_pct`, its centre is cropped to `size`
    (height, width). `contain`: it is scaled to fit into `size` and lies in the upper left corner, the rest
    filled with the value `pad` (0..255). `stretch`: it is scaled to `size`, whatever its shape. `float32`
    inputs are then divided by 255, less `mean`, over `std` (per channel, of 0..1 values); `uint8` inputs stay
    0..255, since the graph normalises them itself.
    """

    size: tuple[int, int]
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    colour: str = "RGB"
    layout: str = "NHWC"
    dtype: str = "uint8"
    fit: str = "cover"
    pad: int = 0


@dataclass(frozen=True)
class ModelCard:
    """Everything about a model that outlives its code: of a training run, or of an engine.

    `label_ids` are the names under which a labelled data set keeps each class (folders, or category ids),
    where they differ from `labels`. `decode` is what the task's decoder must know. `engine` names the
    file that the target's own tools open. `files` maps every file of the folder to its SHA-256, or to None
    where the card was written by hand. `options` are settings that the engine must be opened with.
    `provenance` is for people and reports.
    """

    name: str
    task: str
    target: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    image: ImageSpec
    labels: tuple[str, ...] = ()
    label_ids: tuple[str, ...] | None = None
    decode: Mapping[str, Any] = field(default_factory=dict)
    engine: str = ""
    files: Mapping[str, str | None] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def output(self, name: Any) -> TensorSpec | None:
        """The output of that name; None if there is none."""
        return next((spec for spec in self.outputs if spec.name == name), None)


@dataclass(frozen=True)
class Artifact:
    """A folder with an engine and its card."""

    path: Path
    card: ModelCard

    @property
    def engine_path(self) -> Path:
        """The file that the target's own tools open."""
        return self.path / self.card.engine

    @property
    def engine_files(self) -> list[str]:
        """Names of the files that hold the engine, weights included: all of the engine file's stem."""
        stem = f"{Path(self.card.engine).stem}."
        return [name for name in self.card.files if name == self.card.engine or name.startswith(stem)]

    @property
    def size_bytes(self) -> int:
        """Bytes of the engine itself, weights included, card and golden excluded."""
        return sum((self.path / name).stat().st_size for name in self.engine_files)

    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of every file that the card lists; computed where a card written by hand has none."""
        return {name: known or sha256(self.path / name) for name, known in self.card.files.items()}


def sha256(path: Path, limit: int | None = None) -> str:
    """Hex SHA-256 of a regular file of at most `limit` bytes, read in pieces; raises OSError."""
    with open_file(path, limit) as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_card(card: ModelCard, folder: Path) -> None:
    """Write `card.json` into a folder, with the same bytes for the same card.

    Raises BadRequest for a card that `read_card` would refuse.
    """
    body = {"format": FORMAT, **_plain(card)}
    try:
        text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        content = text.encode("utf-8")
        _card_from({key: value for key, value in json.loads(text).items() if key != "format"})
    except (_Lacking, TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"a card of {_shown(card.name)} cannot be written: {error}") from None
    (folder / CARD_FILE).write_bytes(content)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def read_card(folder: Path) -> ModelCard:
    """Read and check the `card.json` of a run or artifact folder.

    Raises BadArtifact where the folder or card is missing, unreadable, newer than this vitkit, or has a
    field that is missing, unknown, of the wrong type or out of range.
    """
    path = folder / CARD_FILE
    try:
        what = None if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be opened ({error})"
    if what:
        raise BadArtifact(f"{folder} {what}; an artifact is a folder that holds {CARD_FILE}")
    try:
        body = read_json(path)
    except FileNotFoundError:
        raise BadArtifact(f"{folder} holds no {CARD_FILE}: it is not a vitkit artifact or run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtifact(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadArtifact(f"{path} holds a {type(body).__name__}; a card is a JSON object")
    if "format" not in body:
        raise BadArtifact(f"{path} lacks 'format'; see {DOCUMENT}")
    version = body.pop("format")
    if type(version) is not int or version < 1:
        raise BadArtifact(f"{path}: 'format' is {_shown(version)}; this vitkit writes {FORMAT}")
    if version > FORMAT:
        raise BadArtifact(
            f"{path} has card format {version}, this vitkit reads up to {FORMAT}: "
            "upgrade it with: pip install --upgrade vitkit"
        )
    try:
        return _card_from(body)
    except _Lacking as error:
        raise BadArtifact(f"{path} lacks {error}; see {DOCUMENT}") from None
    except (ValueError, RecursionError) as error:
        raise BadArtifact(f"{path}: {error}") from None


class _Lacking(Exception):
    """Names fields that a card lacks."""


def _card_from(body: dict[str, Any]) -> ModelCard:
    given = _fields(ModelCard, body, "")
    card = ModelCard(
        **{
            **given,
            "inputs": _tensors(given["inputs"], "inputs"),
            "outputs": _tensors(given["outputs"], "outputs"),
            "image": _image(given["image"]),
            "labels": _texts(given.get("labels", []), "labels"),
            "label_ids": _texts(ids, "label_ids") if (ids := given.get("label_ids")) is not None else None,
        }
    )
    for name in ("name", "task", "target"):
        _text(getattr(card, name), f"{name!r}")
    for name in ("decode", "files", "options", "provenance"):
        _need(isinstance(getattr(card, name), dict), f"{name!r} is not an object")
    _choice(card.precision, PRECISIONS, "'precision'")
    for name, value in card.decode.items():
        _decode_value(value, f"'decode.{name}'")
    _check_listed_files(card)
    _need(
        card.label_ids is None or len(card.label_ids) == len(card.labels),
        f"{len(card.labels)} labels but {len(card.label_ids or ())} label_ids",
    )
    _check_values(body)
    return card


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shown(value: object) -> str:
    """A value for a message: without control characters, and never long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _check_values(value: Any, depth: int = 0) -> None:
    """Refuse what no field may hold: numbers that are not finite, broken text, endless nesting."""
    _need(depth <= MAX_DEPTH, f"it is nested over {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        _need(_is_utf8(value), f"{_shown(value)} is not text: it cannot be written in UTF-8")
    elif isinstance(value, float):
        _need(math.isfinite(value), "it holds a number beyond the range of float64")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key, depth)
            _check_values(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, depth + 1)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_problem(text: str) -> str | None:
    """Why a text cannot be a name in a card, such as a label; None where it can."""
    if not _is_utf8(text):
        return "is not UTF-8"
    if any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in text):
        return "holds control characters"
    return f"is longer than {MAX_TEXT} characters" if len(text) > MAX_TEXT else None


def _text(value: Any, where: str) -> None:
    _need(isinstance(value, str), f"{where} is {_shown(value)}, not a string")
    problem = text_problem(value)
    _need(problem is None, f"{where} is {_shown(value)}, which {problem}")


def _texts(value: Any, where: str) -> tuple[str, ...]:
    _need(isinstance(value, list), f"{where!r} is not a list of strings")
    for item in value:
        _text(item, f"an item of {where!r}")
    return tuple(value)


def _choice(value: Any, known: Collection[str], where: str) -> None:
    _need(
        isinstance(value, str) and value in known,
        f"{where} is {_shown(value)}; known are {', '.join(known)}",
    )


def _number(value: Any, low: float, high: float, where: str) -> None:
    good = type(value) in (int, float) and low <= value <= high
    _need(good, f"{where} is {_shown(value)}; it must be a number from {low:g} to {high:g}")


def _integer(value: Any, low: int, high: int, where: str) -> None:
    good = type(value) is int and low <= value <= high
    _need(good, f"{where} is {_shown(value)}; it must be an integer from {low} to {high}")


def _fields(kind: type, body: Any, where: str) -> dict[str, Any]:
    """An object with all fields that `kind` has no default for, and none that it lacks.

    `where` is the object's place in the card, empty for the card itself.
    """
    _need(isinstance(body, dict), f"{where!r} is a {type(body).__name__}, not an object")
    known = {item.name: item for item in fields(kind)}
    place = f"{where}." if where else ""
    if unknown := sorted(set(body) - set(known)):
        names = ", ".join(_shown(f"{place}{name}") for name in unknown[:5])
        raise ValueError(f"it has unknown fields {names}; see {DOCUMENT}")
    needed = [
        name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING
    ]
    if missing := [f"'{place}{name}'" for name in needed if name not in body]:
        raise _Lacking(", ".join(missing))
    return dict(body)


def _tensors(value: Any, where: str) -> tuple[TensorSpec, ...]:
    _need(isinstance(value, list) and len(value) > 0, f"{where!r} is not a list of tensors")
    specs = [_tensor(item, f"{where}[{i}]") for i, item in enumerate(value)]
    names = {spec.name for spec in specs}
    _need(len(names) == len(specs), f"two items of {where!r} have one name")
    return tuple(specs)


def _tensor(value: Any, where: str) -> TensorSpec:
    given = _fields(TensorSpec, value, where)
    name, shape = given["name"], given["shape"]
    _text(name, f"'{where}.name'")
    _need(name != "", f"'{where}.name' is empty")
    _choice(given["dtype"], DTYPES, f"the dtype of {_shown(name)}")
    dims = isinstance(shape, list) and all(d is None or (type(d) is int and d > 0) for d in shape)
    _need(dims, f"the shape of {_shown(name)} is {_shown(shape)}; dimensions are positive integers or null")
    _need(len(shape) <= MAX_RANK, f"{_shown(name)} has {len(shape)} dimensions; at most {MAX_RANK} are read")
    elements = math.prod(dim or 1 for dim in shape)
    _need(
        elements <= MAX_ELEMENTS,
        f"{_shown(name)} of shape {_shown(shape)} has over {MAX_ELEMENTS} elements",
    )
    return TensorSpec(name, tuple(shape), given["dtype"])


def _list_of(value: Any, count: int, where: str) -> tuple[Any, ...]:
    _need(isinstance(value, list) and len(value) == count, f"{where} is {_shown(value)}, not {count} numbers")
    return tuple(value)


def _image(value: Any) -> ImageSpec:
    given = _fields(ImageSpec, value, "image")
    size = _list_of(given["size"], 2, "image.size")
    mean = _list_of(given.get("mean", list(ImageSpec.mean)), 3, "image.mean")
    std = _list_of(given.get("std", list(ImageSpec.std)), 3, "image.std")
    for side in size:
        _integer(side, 1, MAX_SIDE, "a side of image.size")
    for item in mean:
        _number(item, -MAX_MEAN, MAX_MEAN, "an item of image.mean")
    for item in std:
        _number(item, *STD_RANGE, "an item of image.std")
    spec = ImageSpec(**{**given, "size": size, "mean": mean, "std": std})
    _number(spec.crop_pct, MIN_CROP, 1, "image.crop_pct")
    _integer(spec.pad, 0, 255, "image.pad")
    choices = {
        "interpolation": ("nearest", "bilinear", "bicubic"),
        "colour": ("RGB", "BGR"),
        "layout": ("NHWC", "NCHW"),
        "dtype": ("uint8", "float32"),
        "fit": ("cover", "contain", "stretch"),
    }
    for name, known in choices.items():
        _choice(getattr(spec, name), known, f"image.{name}")
    return spec


def check_image_spec(spec: ImageSpec) -> ImageSpec:
    """Return an image specification that a card may hold; raises BadRequest for any other."""
    try:
        return _image(_plain(spec))
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _decode_value(value: Any, where: str) -> None:
    if isinstance(value, str):
        _text(value, where)
        return
    numbers = value if isinstance(value, list) else [value]
    known = (int,) if isinstance(value, list) else (int, float)
    good = all(type(item) in known and abs(item) <= MAX_DECODE_NUMBER for item in numbers)
    _need(good, f"{where} is {_shown(value)}, not text, a number or a list of integers")


def _check_listed_files(card: ModelCard) -> None:
    _need(
        len(card.files) <= MAX_FILES, f"'files' names {len(card.files)} files; at most {MAX_FILES} are read"
    )
    for name, digest in card.files.items():
        _need(_is_file_name(name), f"'files' names {_shown(name)}, which is not a plain file name")
        known = digest is None or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest))
        _need(bool(known), f"the hash of {name!r} is {_shown(digest)}, not a SHA-256 in lower case or null")
    _need(isinstance(card.engine, str), f"'engine' is {_shown(card.engine)}, not a string")
    if card.engine and not card.files:
        raise _Lacking("'files'")
    _need(
        not card.engine or card.engine in card.files,
        f"'engine' is {_shown(card.engine)}, which 'files' does not list",
    )


def _is_file_name(name: str) -> bool:
    """Whether a name stands for one file in any folder, on any system, and is no pattern of names."""
    plain = text_problem(name) is None and not set(name) & set("/\\:*?[]") and name.strip(". ") != ""
    return plain and len(name.encode("utf-8")) <= MAX_FILE_NAME_BYTES


def check_decode(card: ModelCard, needed: Collection[str], known: Collection[str]) -> None:
    """Raises BadArtifact if the card's `decode` lacks a name that its task needs, or has an unknown one."""
    if missing := [f"'decode.{name}'" for name in needed if name not in card.decode]:
        raise BadArtifact(f"{CARD_FILE} lacks {', '.join(missing)}; see {DOCUMENT}")
    if unknown := [_shown(f"decode.{name}") for name in card.decode if name not in known]:
        raise BadArtifact(f"{CARD_FILE} has unknown fields {', '.join(unknown[:5])}; see {DOCUMENT}")


def check_files(folder: Path, card: ModelCard, keep: Collection[str] = ()) -> dict[str, bytes]:
    """Compare every file with its hash in the card; raises BadArtifact naming each mismatch.

    Returns the contents of the files named in `keep`: the very bytes that were compared, since a file may be
    replaced before it is read again.
    """
    kept, wrong = {}, []
    for name, expected in card.files.items():
        try:
            content = _verified(folder / name, expected, keep=name in keep)
        except ValueError as error:
            wrong.append(f"{name} {error}")
        else:
            if content is not None:
                kept[name] = content
    stem = f"{Path(card.engine).stem}."
    beside = {path.name for path in folder.iterdir()} if card.engine else set()
    unlisted = sorted(name for name in beside - set(card.files) if name.startswith(stem))
    wrong += [f"{name} is not in the card" for name in unlisted[:MAX_FILES]]
    if wrong:
        raise BadArtifact(f"{folder} is not what was exported: {'; '.join(wrong)}. Export or copy it again")
    return kept


def _verified(path: Path, expected: str | None, *, keep: bool) -> bytes | None:
    """A file's bytes, or None unless `keep`; raises ValueError saying how it differs."""
    try:
        with open_file(path, MAX_ENGINE_BYTES) as file:
            size, found = os.fstat(file.fileno()).st_size, None
            content = file.read(size + 1) if keep else None
            if expected is not None:
                found = _digest(file) if content is None else hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from None
    except MemoryError:
        raise ValueError("is larger than the free memory") from None
    if expected is not None and found != expected:
        raise ValueError(f"({size} bytes) has SHA-256 {str(found)[:8]}..., not {expected[:8]}...")
    if content is not None and len(content) != size:
        raise ValueError("changes while it is read")
    return content


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact folder's card and verify its files.

    Raises BadArtifact for a folder that is no artifact, is damaged, or is a training run.
    """
    artifact = _read_artifact(path)
    check_files(artifact.path, artifact.card)
    return artifact


def read_engine(path: str | Path) -> tuple[Artifact, dict[str, bytes]]:
    """`read_artifact`, and the verified contents of the engine's files by name, for the vendor to open."""
    artifact = _read_artifact(path)
    return artifact, check_files(artifact.path, artifact.card, keep=artifact.engine_files)


def _read_artifact(path: str | Path) -> Artifact:
    folder = Path(path)
    card = read_card(folder)
    if card.target == "torch":
        raise BadArtifact(
            f"{folder} is a training run, not an engine; make one with: "
            f"vitkit export {folder} --target onnx -o {folder}-onnx"
        )
    if not card.engine:
        raise BadArtifact(f"{folder / CARD_FILE} lacks 'engine'; see {DOCUMENT}")
    return Artifact(folder, card)

"""The card: what an app must know about an artifact, as `card.json` beside the engine file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitkit.runtimes.errors import BadArtifact

FORMAT = 1
CARD_FILE = "card.json"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DTYPES = ("uint8", "int32", "int64", "float16", "float32")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine; a dimension of None may have any size."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        dims = ", ".join("any" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype} [{dims}]"


@dataclass(frozen=True)
class ImageSpec:
    """How a photograph becomes one input of the engine.

    `fit` `cover`: the image is scaled so that it covers `size / crop_pct`, its centre is cropped to `size`
    (height, width). `contain`: it is scaled to fit into `size` and lies in the upper left corner, the rest
    filled with the value `pad` (0..255). `float32` inputs are then divided by 255, less `mean`, over `std`
    (per channel, of 0..1 values); `uint8` inputs stay 0..255, since the graph normalises them itself.
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
    def size_bytes(self) -> int:
        """Bytes of the engine itself, weights included, card and golden excluded."""
        stem = Path(self.card.engine).stem
        return sum((self.path / name).stat().st_size for name in self.card.files if Path(name).stem == stem)

    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of every file that the card lists; computed where a card written by hand has none."""
        return {name: known or sha256(self.path / name) for name, known in self.card.files.items()}


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_card(card: ModelCard, folder: Path) -> None:
    """Write `card.json` into a folder, with the same bytes for the same card."""
    body = {"format": FORMAT, **_plain(card)}
    (folder / CARD_FILE).write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    field that is missing, unknown or of the wrong type.
    """
    path = folder / CARD_FILE
    try:
        what = None if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be opened ({error})"
    if what:
        raise BadArtifact(f"{folder} {what}; an artifact is a folder that holds {CARD_FILE}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise BadArtifact(f"{folder} holds no {CARD_FILE}: it is not a vitkit artifact or run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtifact(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadArtifact(f"{path} holds a {type(body).__name__}; a card is a JSON object")
    version = body.pop("format", None)
    if type(version) is not int or version < 1:
        raise BadArtifact(f"{path}: 'format' is {version!r}; this vitkit writes {FORMAT}")
    if version > FORMAT:
        raise BadArtifact(
            f"{path} has card format {version}, this vitkit reads up to {FORMAT}: "
            "upgrade it with: pip install --upgrade vitkit"
        )
    try:
        return _card_from(body)
    except (TypeError, ValueError) as error:
        raise BadArtifact(f"{path}: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return dict(pairs)


def _card_from(body: dict[str, Any]) -> ModelCard:
    fields = _fields(ModelCard, body, "the card")
    card = ModelCard(
        **{
            **fields,
            "inputs": _tensors(fields["inputs"], "inputs"),
            "outputs": _tensors(fields["outputs"], "outputs"),
            "image": _image(fields["image"]),
            "labels": _strings(fields.get("labels", []), "labels"),
            "label_ids": _strings(ids, "label_ids") if (ids := fields.get("label_ids")) is not None else None,
        }
    )
    for name in ("name", "task", "target", "precision", "engine"):
        _need(isinstance(getattr(card, name), str), f"{name!r} is {getattr(card, name)!r}, not a string")
    for name in ("decode", "files", "options", "provenance"):
        _need(isinstance(getattr(card, name), dict), f"{name!r} is not an object")
    _need(
        card.precision in PRECISIONS, f"'precision' is {card.precision!r}; known are {', '.join(PRECISIONS)}"
    )
    for name, value in card.decode.items():
        plain = type(value) in (str, int) or (type(value) is float and math.isfinite(value))
        numbers = isinstance(value, list) and all(type(item) is int for item in value)
        _need(plain or numbers, f"'decode.{name}' is {value!r}, no text, number or list of whole numbers")
    for name, digest in card.files.items():
        inside = bool(name) and "/" not in name and "\\" not in name and name not in (".", "..")
        _need(inside, f"'files' names {name!r}, which is not a plain file name")
        _need(digest is None or isinstance(digest, str), f"the hash of {name!r} is {digest!r}, not a string")
    _need(
        not card.engine or card.engine in card.files,
        f"'engine' is {card.engine!r}, which 'files' does not list",
    )
    _need(
        card.label_ids is None or len(card.label_ids) == len(card.labels),
        f"{len(card.labels)} labels but {len(card.label_ids or ())} label_ids",
    )
    return card


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _fields(kind: type, body: Any, where: str) -> dict[str, Any]:
    _need(isinstance(body, dict), f"{where} is {type(body).__name__}, not an object")
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if unknown := sorted(set(body) - set(known)):
        raise ValueError(f"{where} has unknown fields {', '.join(unknown)}")
    try:
        kind(**body)
    except TypeError as error:
        raise ValueError(f"{where} lacks fields: {error}") from None
    return dict(body)


def _strings(value: Any, where: str) -> tuple[str, ...]:
    good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    _need(good, f"{where!r} is not a list of strings")
    return tuple(value)


def _tensors(value: Any, where: str) -> tuple[TensorSpec, ...]:
    _need(isinstance(value, list) and len(value) > 0, f"{where!r} is not a list of tensors")
    specs = []
    for item in value:
        fields = _fields(TensorSpec, item, f"an item of {where!r}")
        shape, dtype, name = fields["shape"], fields["dtype"], fields["name"]
        _need(isinstance(name, str), f"a name in {where!r} is {name!r}")
        dims = isinstance(shape, list) and all(d is None or (type(d) is int and d > 0) for d in shape)
        _need(dims, f"the shape of {name!r} is {shape!r}; dimensions are positive numbers or null")
        _need(dtype in DTYPES, f"the dtype of {name!r} is {dtype!r}; known are {', '.join(DTYPES)}")
        specs.append(TensorSpec(name, tuple(shape), dtype))
    return tuple(specs)


def _numbers(value: Any, count: int, where: str) -> tuple[Any, ...]:
    good = isinstance(value, list) and len(value) == count
    good = good and all(type(item) in (int, float) and math.isfinite(item) for item in value)
    _need(good, f"{where} is {value!r}, not {count} numbers")
    return tuple(value)


def _image(value: Any) -> ImageSpec:
    fields = _fields(ImageSpec, value, "'image'")
    spec = ImageSpec(
        **{
            **fields,
            "size": _numbers(fields["size"], 2, "image.size"),
            "mean": _numbers(fields.get("mean", list(ImageSpec.mean)), 3, "image.mean"),
            "std": _numbers(fields.get("std", list(ImageSpec.std)), 3, "image.std"),
        }
    )
    _need(
        all(type(s) is int and s > 0 for s in spec.size),
        f"image.size is {spec.size}, not two positive sizes",
    )
    _need(all(s > 0 for s in spec.std), f"image.std is {spec.std}; it must be positive")
    number = isinstance(spec.crop_pct, (int, float)) and not isinstance(spec.crop_pct, bool)
    _need(number and 0 < spec.crop_pct <= 1, f"image.crop_pct is {spec.crop_pct!r}; it must be in (0, 1]")
    choices = {
        "interpolation": ("nearest", "bilinear", "bicubic"),
        "colour": ("RGB", "BGR"),
        "layout": ("NHWC", "NCHW"),
        "dtype": ("uint8", "float32"),
        "fit": ("cover", "contain"),
    }
    _need(type(spec.pad) is int and 0 <= spec.pad <= 255, f"image.pad is {spec.pad!r}; it must be 0 to 255")
    for name, allowed in choices.items():
        _need(
            getattr(spec, name) in allowed,
            f"image.{name} is {getattr(spec, name)!r}; known are {', '.join(allowed)}",
        )
    return spec


def check_files(folder: Path, card: ModelCard) -> None:
    """Compare every file with its hash in the card; raises BadArtifact naming each mismatch."""
    wrong = []
    for name, expected in card.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif expected is not None and (found := sha256(path)) != expected:
            wrong.append(
                f"{name} ({path.stat().st_size} bytes) has SHA-256 {found[:8]}..., not {expected[:8]}..."
            )
    for path in folder.glob(f"{Path(card.engine).stem}.*") if card.engine else ():
        if path.name not in card.files:
            wrong.append(f"{path.name} is not in the card")
    if wrong:
        raise BadArtifact(f"{folder} is not what was exported: {'; '.join(wrong)}. Export or copy it again")


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact folder's card and verify its files.

    Raises BadArtifact for a folder that is no artifact, is damaged, or is a training run.
    """
    folder = Path(path)
    card = read_card(folder)
    if card.target == "torch":
        raise BadArtifact(
            f"{folder} is a training run, not an engine; make one with: "
            f"vitkit export {folder} --target onnx -o {folder}-onnx"
        )
    if not card.engine:
        raise BadArtifact(f"{folder}: the card names no engine file")
    check_files(folder, card)
    return Artifact(folder, card)

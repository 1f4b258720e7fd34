"""Files that people keep weights in: read by their content, whatever they are called, or explained.

Nothing is unpickled but what torch's `weights_only` reader allows. Objects of well-known packages beside the
weights (numpy's numbers, loggers, settings) are read as placeholders: none of their code is imported or run.
"""

from __future__ import annotations

import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitkit.runtimes.errors import BadInput
from vitkit.runtimes.reading import open_file

_HEAD = 4096
# What trainers store beside weights, by the modules that it comes from.
_BESIDE = re.compile(
    r"(numpy|argparse|pathlib|datetime|omegaconf|mmengine|mmcv|lightning|pytorch_lightning|lightning_fabric"
    r"|fvcore)\..*|types\.SimpleNamespace|collections\.(defaultdict|deque)"
    # What a defaultdict makes; mmengine's loggers are stored with their methods.
    r"|list|dict|int|float|tuple|str|getattr"
)
_MAX_KINDS = 100
_WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar")
_SAVE_ALONE = "save the weights alone, with: torch.save(model.state_dict(), FILE)"
_FETCH = "copy or download it again"
_FROM_TORCH = "name the PyTorch checkpoint that it was made from"
_KERAS = "vitkit reads weights of PyTorch; convert them to a state dict and torch.save it"
# How files begin that are no checkpoints, what they are, and what to do. Order matters for none of them.
_FOREIGN = (
    (rb"\s*version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"),
    (rb"/annex/objects/", "a git-annex pointer, not the file itself", "fetch it with: git annex get"),
    (
        rb"(?i)\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body|\?xml)",
        "a web page, not the file itself",
        "open the link in a browser for the reason (a login, a question, a limit), and take the direct link "
        "(on GitHub 'raw', on Hugging Face 'resolve')",
    ),
    (rb"\x1f\x8b", "compressed by gzip", "unpack it with: gunzip FILE, or a tar file: tar -xf FILE"),
    (rb"\xfd7zXZ\x00", "compressed by xz", "unpack it with: xz -d FILE, or a tar file: tar -xf FILE"),
    (rb"BZh[1-9]1AY", "compressed by bzip2", "unpack it with: bzip2 -d FILE, or a tar file: tar -xf FILE"),
    (rb"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unpack it with: zstd -d FILE"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it with: 7z x FILE"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unpack it with: unrar x FILE"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", _KERAS),
    (rb"(?s)....TFL3", "a TFLite model", _FROM_TORCH),
    (rb"\x93NUMPY", "a numpy array", _KERAS),
    (rb"GGUF", "a GGUF file", _FROM_TORCH),
)  # fmt: skip
# The same by name, for formats without a beginning of their own.
_FOREIGN_NAMES = (
    (r".*\.onnx", "an ONNX model", _FROM_TORCH),
    (r".*\.tflite", "a TFLite model", _FROM_TORCH),
    (r".*\.(pb|keras|h5|hdf5)|.*\.data-\d+-of-\d+|.*\.(ckpt.*)?\.(index|meta)|checkpoint",
     "a file of TensorFlow or Keras", _KERAS),
    (r".*\.(engine|plan)", "a TensorRT engine", _FROM_TORCH),
)  # fmt: skip


class Placeholder:
    """An object beside the weights that is not built: what it would be made of is dropped."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Dictionary(Placeholder):
    """As Placeholder, for kinds of dictionary: torch fills none but plain ones."""

    def __new__(cls, *args: object, **options: object) -> Any:
        return {}


class _List(Placeholder):
    """As Placeholder, for kinds of list."""

    def __new__(cls, *args: object, **options: object) -> Any:
        return []


def _stand_in(name: str) -> type[Placeholder]:
    return {"defaultdict": _Dictionary, "AttributeDict": _Dictionary, "deque": _List}.get(
        name.rpartition(".")[2], Placeholder
    )


def read_body(path: Path) -> Any:
    """The content of a checkpoint: `safetensors` or what `torch.save` wrote, by its bytes and not its name.

    Raises BadInput, with the cause and the cure, for a file that is missing, empty, cut off, damaged, of
    another format or inside an archive, and for one that would need code to be run.
    """
    if path.is_dir():
        raise BadInput(_folder_problem(path))
    try:
        with open_file(path, None) as file:
            head = file.read(_HEAD)
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"the checkpoint {path} does not exist or is not a file: {error}") from None
    if not head:
        raise BadInput(f"{path} is empty; {_FETCH}")
    if _is_safetensors(head):
        return _read_safetensors(path, head, size)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
    elif tarfile.is_tarfile(path) and head[257:262] == b"ustar":
        _check_tar(path)
    elif problem := _foreign(path, head):
        raise BadInput(f"{path} is {problem}")
    elif re.match(rb"\x80[^\x02]", head):
        raise BadInput(
            f"{path} is a pickle that torch.save did not write, and unpickling runs its code; if you trust "
            f"it, load it in Python and {_SAVE_ALONE}"
        )
    return _read_torch(path)


def _folder_problem(path: Path) -> str:
    found = sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_FILES and p.is_file())
    # First what transformers and accelerate call the weights; the optimiser's state has names of its own.
    weights = [p for p in found if p.name.startswith(("model", "pytorch_model"))] or found
    if not weights:
        return f"{path} is a folder without a checkpoint ({', '.join(_WEIGHT_FILES)})"
    return f"{path} is a folder; name the file of its weights, such as {weights[0]}"


def _foreign(path: Path, head: bytes) -> str:
    """What a file is if it is no checkpoint, and what to do; empty for one that may be."""
    for pattern, what, cure in _FOREIGN:
        if re.match(pattern, head):
            return f"{what}; {cure.replace('FILE', str(path))}"
    # A checkpoint of torch's older form begins as a pickle does, whatever it is called.
    if not head.startswith(b"\x80"):
        for name, what, cure in _FOREIGN_NAMES:
            if re.fullmatch(name, path.name):
                return f"{what}; {cure}"
        # An ONNX file begins with its version, and the name of the program that wrote it.
        if re.match(rb"\x08[\x01-\x20]\x12[\x01-\x7f][\x20-\x7e]|\x08[\x01-\x20]\x3a", head):
            return f"an ONNX model; {_FROM_TORCH}"
        if problem := _text_problem(path, head):
            return problem
    return ""


def _text_problem(path: Path, head: bytes) -> str:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # Cut within a letter.
        text = head[: error.start].decode("utf-8") if error.start > len(head) - 4 else ""
    if not text or any(not c.isprintable() and not c.isspace() for c in text):
        return ""
    if '"weight_map"' in text:
        return (
            "the index of weights that are split over several files; load these in Python and save them "
            "together, with: safetensors.torch.save_file"
        )
    return f"text, not weights; it begins with {' '.join(text.split())[:60]!r}; {_FETCH}"


def _is_safetensors(head: bytes) -> bool:
    # Eight bytes of the header's length, then JSON; a header of 100 MB is the most that the format allows.
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def _read_safetensors(path: Path, head: bytes, size: int) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        if (whole := _safetensors_size(path, int.from_bytes(head[:8], "little"))) > size:
            raise BadInput(f"{path} is cut off: it has {size} of {whole} bytes; {_FETCH}") from None
        raise BadInput(f"{path} cannot be read as safetensors: {error}; {_FETCH}") from None


def _safetensors_size(path: Path, header: int) -> int:
    """How many bytes a safetensors file should have, by its header."""
    with open_file(path, None) as file:
        text = file.read(8 + header)[8:]
    try:
        ends = [
            entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"
        ]
        return 8 + header + max(ends, default=0)
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return 8 + header


def _check_zip(path: Path) -> None:
    """Raise BadInput for a ZIP file that is not one of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        size = path.stat().st_size
        raise BadInput(
            f"{path} is cut off or damaged: its end is missing after {size} bytes; {_FETCH}"
        ) from None
    if any(re.fullmatch(r"([^/]+/)?constants\.pkl", name) for name in names):
        raise BadInput(
            f"{path} is a TorchScript program, which is code and not weights alone; in Python, "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), FILE) keeps its weights"
        )
    if any(name.rpartition("/")[2] == "archive_format" for name in names):
        raise BadInput(f"{path} is an exported program (.pt2), not weights alone; {_SAVE_ALONE}")
    if any(re.fullmatch(r"([^/]+/)?data\.pkl", name) for name in names):
        return
    if any(name.endswith((".weights.h5", "saved_model.pb")) for name in names):
        raise BadInput(f"{path} is a file of TensorFlow or Keras; {_KERAS}")
    if names and all(name.endswith(".npy") for name in names):
        raise BadInput(f"{path} is an archive of numpy arrays (.npz); {_KERAS}")
    raise BadInput(_archive_problem(path, "a ZIP archive", "zipfile", names))


def _check_tar(path: Path) -> None:
    def names() -> Iterator[str]:
        with tarfile.open(path) as archive:
            for member in archive:
                yield member.name

    try:
        found = [name for _, name in zip(range(1000), names(), strict=False)]
    except (tarfile.TarError, OSError, EOFError):
        found = []
    if {"pickle", "storages", "tensors"} <= {name.removeprefix("./") for name in found}:
        raise BadInput(
            f"{path} was written by a torch older than 0.2, in a form that only unpickling code reads; load "
            f"it with that torch, and {_SAVE_ALONE}"
        )
    raise BadInput(_archive_problem(path, "a tar archive", "tarfile", found))


def _archive_problem(path: Path, what: str, module: str, names: list[str]) -> str:
    inside = [name for name in names if name.endswith(_WEIGHT_FILES)]
    holds = f"with {', '.join(inside[:3])} inside" if inside else "without a checkpoint that its names show"
    return (
        f"{path} is {what} {holds}, not a checkpoint; unpack it with: python -m {module} -e {path} FOLDER, "
        "and name the file in it"
    )


def _read_torch(path: Path) -> Any:
    import torch

    stand_ins: list[Any] = []
    for _ in range(_MAX_KINDS):
        try:
            allowed = torch.serialization.safe_globals(stand_ins)
            # Opened here, because torch goes by the name of a file that it opens itself.
            with open_file(path, None) as file, allowed, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if wanted is None or not _BESIDE.fullmatch(wanted[1]):
                raise BadInput(_unpickling_problem(path, error, wanted[1] if wanted else "")) from None
            # By its name alone, so that the package need not be there and is not imported. torch leaves out
            # the `builtins.` of a name.
            name = wanted[1] if "." in wanted[1] else f"builtins.{wanted[1]}"
            stand_ins.append((_stand_in(name), name))
        # Damaged files surface as RuntimeError, EOFError, KeyError, ValueError, UnicodeDecodeError and more.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
            raise BadInput(f"{path} is no checkpoint, or damaged or cut off: {reason}; {_FETCH}") from None
    raise BadInput(f"{path} holds objects of over {_MAX_KINDS} kinds beside the weights; {_SAVE_ALONE}")


def _unpickling_problem(path: Path, error: Exception, wanted: str) -> str:
    if wanted:
        return (
            f"{path} cannot be read without running its code (it needs {wanted}); if you trust it, load it "
            f"in Python where {wanted.split('.')[0]} is installed, and {_SAVE_ALONE}"
        )
    reason = " ".join(
        str(error).partition("WeightsUnpickler error:")[2].partition("Check the doc")[0].split()
    )
    return f"{path} is no checkpoint, or damaged ({reason or 'torch cannot unpickle it'}); {_FETCH}"

"""State dicts: reading them without unpickling code, and explaining what is wrong with their tensors."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.runtimes.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

# Where checkpoints keep the weights beside optimiser states and epochs.
_NESTS = ("model", "state_dict")
_DEPTH = 4
# A message names this many of the tensors that are wrong.
_SHOWN = 20


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pth`-style or `.safetensors` file: plain, or nested under `model`/`state_dict`.

    A `module.` prefix on every name is dropped. Raises BadInput where the file is missing, damaged, holds
    no weights, or would need code to be run.
    """
    if not path.is_file():
        raise BadInput(f"the checkpoint {path} does not exist or is not a file")
    body = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for _ in range(_DEPTH):
        if not isinstance(body, Mapping) or _is_state_dict(body):
            break
        nested = next((body[key] for key in _NESTS if isinstance(body.get(key), Mapping)), None)
        if nested is None:
            found = ", ".join(map(str, list(body)[:8])) or "nothing"
            raise BadInput(f"{path} holds no weights: neither tensors nor {' or '.join(_NESTS)}, but {found}")
        body = nested
    if not isinstance(body, Mapping) or not _is_state_dict(body):
        raise BadInput(f"{path} holds a {type(body).__name__}; a checkpoint is a dictionary of tensors")
    prefix = "module." if all(name.startswith("module.") for name in body) else ""
    return {name[len(prefix) :]: tensor for name, tensor in body.items()}


def _is_state_dict(body: Mapping[Any, Any]) -> bool:
    import torch

    return bool(body) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in body.items())


def _read_torch(path: Path) -> Any:
    import torch

    try:
        # timm keeps the command line as a Namespace; it holds data only.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {wanted[1]}" if wanted else "it is damaged or holds more than tensors"
        raise BadInput(
            f"{path} cannot be read without running its code ({what}); save the weights alone, with: "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    # Damaged files surface as RuntimeError, EOFError, KeyError, ValueError, UnicodeDecodeError and more.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise BadInput(f"{path} cannot be read as a checkpoint, it is damaged or foreign: {reason}") from None


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read as safetensors: {error}") from None


def summarise(problems: Sequence[str]) -> str:
    """Problems in one line, the first twenty of them by name."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def weight_problem(name: str, tensor: Tensor) -> str | None:
    """Why a tensor is no weight, or None; `name` tells counters and variances."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return "is no plain tensor (sparse, quantised, nested or without data)"
    if name.endswith("num_batches_tracked"):
        return None
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not a float"
    if not torch.isfinite(tensor.float()).all():
        return "holds NaN or infinite values"
    if name.endswith("running_var") and (tensor < 0).any():
        return "is negative; a variance cannot be"
    return None

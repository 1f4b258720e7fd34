"""Reading other people's checkpoints into vitkit's models, without unpickling code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.models import configure
from vitkit.models.ps_vit import PSViT, PSViTConfig
from vitkit.runtimes.errors import BadInput, BadRequest

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

# Where checkpoints keep the weights beside optimiser states and epochs.
_NESTS = ("model", "state_dict")
_DEPTH = 4


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


def load_psvit(path: Path, name: str, options: Mapping[str, Any]) -> PSViT:
    """A PS-ViT with the weights of a checkpoint in its authors' layout, in eval mode.

    Raises BadRequest for a bad model or option; BadInput naming every tensor that is missing, extra,
    misshapen, or differs between the places in which the layout repeats it.
    """
    import torch

    config = configure(name, options)
    tensors = read_tensors(path)
    model = PSViT(config)
    state = model.state_dict()
    places = _psvit_places(config, list(state))
    problems = _problems(tensors, places, state, config)
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise BadInput(f"{path} does not hold a {name}: {shown}")
    with torch.no_grad():
        for key, sources in places.items():
            found = next((tensors[source] for source in sources if source in tensors), None)
            if found is not None:
                state[key].copy_(found)
    return model.eval()


def _psvit_places(config: PSViTConfig, keys: list[str]) -> dict[str, tuple[str, ...]]:
    """Our tensor names -> the names of the authors' layout that hold it; all of them the same tensor."""
    places: dict[str, tuple[str, ...]] = {}
    for key in keys:
        theirs = re.sub(r"\.mlp\.([03])\.", lambda m: f".mlp.fc{1 if m[1] == '0' else 2}.", key)
        if match := re.fullmatch(r"sampler\.pos_layer\.(.+)", theirs):
            aliases = (f"ps_layers.{t}.position_layer.{match[1]}" for t in range(config.iterations))
            places[key] = (f"pos_layer.{match[1]}", *aliases)
        elif match := re.fullmatch(r"sampler\.layers\.(\d+)\.(.+)", theirs):
            iterations = range(config.iterations) if config.share else [int(match[1])]
            places[key] = tuple(f"ps_layers.{t}.transformer_layer.{match[2]}" for t in iterations)
        elif match := re.fullmatch(r"sampler\.offset_layers\.(\d+)\.(.+)", theirs):
            places[key] = (f"ps_layers.{match[1]}.offset_layer.{match[2]}",)
        else:
            places[key] = (re.sub(r"^encoder\.", "trans_layers.", theirs),)
    return places


def _problems(
    tensors: Tensors, places: Mapping[str, tuple[str, ...]], state: Tensors, config: PSViTConfig
) -> list[str]:
    import torch

    problems = []
    expected: dict[str, tuple[int, ...]] = {"point_coord": (1, config.n**2, 2)}
    for key, sources in places.items():
        expected.update(dict.fromkeys(sources, tuple(state[key].shape)))
        present = [source for source in sources if source in tensors]
        # The batch counter is no weight, and formats that store a shared tensor once drop its other names.
        if not present and not key.endswith("num_batches_tracked"):
            problems.append(f"{sources[0]} is missing")
        for source in present[1:]:
            if not _trouble(source, tensors[source]) and not torch.equal(
                tensors[source], tensors[present[0]]
            ):
                problems.append(f"{source} differs from {present[0]}, with which the model shares it")
    for source, tensor in tensors.items():
        if source not in expected:
            problems.append(f"{source} is extra")
        elif tuple(tensor.shape) != expected[source]:
            problems.append(f"{source} is {list(tensor.shape)}, not {list(expected[source])}")
        elif trouble := _trouble(source, tensor):
            problems.append(f"{source} {trouble}")
    return problems


def _trouble(name: str, tensor: Tensor) -> str | None:
    """Why a tensor is no weight, or None."""
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


IMPORTERS = {"psvit": load_psvit}


def load_checkpoint(path: Path, layout: str, name: str, options: Mapping[str, Any]) -> PSViT:
    """A model with the weights of a checkpoint in the named layout. Raises BadRequest and BadInput."""
    if layout not in IMPORTERS:
        raise BadRequest(f"there is no checkpoint format {layout!r}; the formats are {', '.join(IMPORTERS)}")
    return IMPORTERS[layout](path, name, options)

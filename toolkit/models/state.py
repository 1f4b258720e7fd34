"""State dicts of checkpoints: which weights they hold, names without wrappers, what is wrong with tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitkit.models.checkpoint_file import Placeholder, read_body
from vitkit.runtimes.errors import BadInput, BadRequest

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["plain", "ema"]
KINDS: tuple[Kind, ...] = ("plain", "ema")

# Where checkpoints keep the weights beside optimiser states and epochs: timm and Lightning `state_dict`, DeiT
# and detectron2 `model`, DeepSpeed `module`.
_PLAIN = (
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "params", "weights",
)  # fmt: skip
# The same of moving averages: DeiT `model_ema`, timm `state_dict_ema`, mmengine `ema_state_dict`.
_EMA = (
    "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema", "ema_model", "ema_state",
    "ema_params", "params_ema", "averaged_model",
)  # fmt: skip
_INSIDE = {"plain": _PLAIN, "ema": (*_PLAIN, *_EMA, "shadow")}
_DEPTH = 8
# What torch.compile, FSDP and activation checkpointing put around a module, at any depth of it.
_ANYWHERE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What data parallelism, moving averages and trainers put around a whole network.
_AROUND = re.compile(r"(module|model)\.")
# A message names this many of the tensors that are wrong.
_SHOWN = 20


class Weights(NamedTuple):
    """The weights of a checkpoint; `kind` says which ones were taken of those in `kinds`."""

    tensors: dict[str, Tensor]
    kind: Kind
    kinds: tuple[Kind, ...]


def read_tensors(path: Path, expected: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of `read_weights`, of the plain kind if there are two."""
    return read_weights(path, expected=expected).tensors


def read_weights(path: Path, kind: Kind | None = None, expected: Collection[str] = ()) -> Weights:
    """The weights in a file of `torch.save` or safetensors, under the names of the network alone.

    Nests such as `model` and `state_dict` are opened. `kind` chooses between the weights that were trained
    (`plain`) and their moving average (`ema`); without it, plain ones are taken if there are any. Prefixes of
    wrappers (`module.`, `_orig_mod.`, `model.`, in any order and number) are dropped: as many as give most of
    the `expected` names, else those that all names have. So is `n_averaged`, the counter of torch's
    AveragedModel.

    Raises BadInput, with the cause and the cure, for a file without weights or that `read_body` does not
    read; BadRequest for a kind of weights that the file lacks.
    """
    found = _find_kinds(path, read_body(path))
    kinds = tuple(name for name in KINDS if name in found)
    if kind is not None and kind not in found:
        held = "a moving average (ema)" if kinds == ("ema",) else "plain weights"
        raise BadRequest(f"{path} holds {held} alone, no weights of the kind {kind!r}")
    taken = kind or kinds[0]
    return Weights(_unwrapped(path, found[taken], expected), taken, kinds)


def _find_kinds(path: Path, body: Any) -> dict[Kind, dict[str, Tensor]]:
    """The plain weights and the moving averages in a checkpoint, whichever it holds."""
    for _ in range(_DEPTH):
        if not isinstance(body, Mapping):
            break
        plain, ema = _nest(body, _PLAIN), _nest(body, _EMA)
        if ema is not None:
            parts: dict[Kind, Any] = {"ema": ema} if plain is None else {"plain": plain, "ema": ema}
            return {kind: _open(path, part, _INSIDE[kind]) for kind, part in parts.items()}
        if plain is None:
            return _split(_tensors(path, body))
        body = plain
    what = "object of another package" if isinstance(body, Placeholder) else type(body).__name__
    raise BadInput(f"{path} holds a {what}; a checkpoint is a dictionary of tensors")


def _nest(body: Mapping[Any, Any], keys: Sequence[str]) -> Mapping[Any, Any] | None:
    """The first of the dictionaries under these keys that holds tensors at some depth."""
    parts = [part for key in keys if isinstance(part := body.get(key), Mapping)]
    return next((part for part in parts if _holds_tensors(part)), None)


def _holds_tensors(body: Mapping[Any, Any]) -> bool:
    import torch

    waiting, seen = [body], {id(body)}
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, torch.Tensor):
                return True
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    return False


def _open(path: Path, body: Mapping[Any, Any], keys: Sequence[str]) -> dict[str, Tensor]:
    for _ in range(_DEPTH):
        if (inner := _nest(body, keys)) is None:
            break
        body = inner
    return _tensors(path, body)


def _split(tensors: dict[str, Tensor]) -> dict[Kind, dict[str, Tensor]]:
    """Tensors of a trainer that has the average as a module of its own, beside the network."""
    averages = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in _EMA}
    if not averages:
        return {"plain": tensors}
    rest = {name: tensor for name, tensor in tensors.items() if name not in averages}
    found: dict[Kind, dict[str, Tensor]] = {"plain": rest} if rest else {}
    return {**found, "ema": {name.partition(".")[2]: tensor for name, tensor in averages.items()}}


def _tensors(path: Path, body: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without what is beside them; raises BadInput if there are none."""
    import torch

    tensors = {
        key: value
        for key, value in body.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor) and key.split(".")[-1] != "n_averaged"
    }
    if tensors:
        return tensors
    names = ", ".join(str(name) for name in list(body)[:8]) or "nothing"
    inner = [value for part in body.values() if isinstance(part, Mapping) for value in part.values()]
    if any(isinstance(value, Placeholder) for value in [*body.values(), *inner]):
        cure = "arrays of numpy must be tensors: torch.save({k: torch.from_numpy(v) for k, v in ...}, FILE)"
    elif "param_groups" in body:
        cure = "these are an optimiser's; name the file of the weights"
    else:
        cure = f"a checkpoint is a dictionary of tensors, at the top or under {', '.join(_PLAIN[:3])}"
    raise BadInput(f"{path} holds no weights, but {names}; {cure}")


def _unwrapped(path: Path, tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Tensors under their names without the prefixes of wrappers; see `read_weights`."""
    chains = {name: _without_wrappers(_ANYWHERE.sub("", name)) for name in tensors}
    # Of wrappers around all tensors.
    common = min(map(len, chains.values())) - 1
    wanted = set(expected)

    def stripped(count: int) -> list[str]:
        return [chain[min(count, len(chain) - 1)] for chain in chains.values()]

    def fit(count: int) -> tuple[int, int]:
        return len(wanted.intersection(stripped(count))), -abs(count - common)

    short = stripped(max(range(max(map(len, chains.values()))), key=fit))
    if len(set(short)) < len(short):
        name = next(name for name in short if short.count(name) > 1)
        sources = [source for source, other in zip(tensors, short, strict=True) if other == name]
        raise BadInput(
            f"{path} holds two networks: both {' and '.join(sources)} are the tensor {name} of one"
        )
    return dict(zip(short, tensors.values(), strict=True))


def _without_wrappers(name: str) -> list[str]:
    """A name, then without its first wrapper, without its second, and so on."""
    chain = [name]
    while match := _AROUND.match(chain[-1]):
        chain.append(chain[-1][match.end() :])
    return chain


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

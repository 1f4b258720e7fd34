"""Networks that vitkit did not build: what an exporter needs of one, and what is wrong with it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from vitkit.runtimes.card import DTYPES, TensorSpec, text_problem
from vitkit.runtimes.errors import BadRequest, first_line

# The same call repeats its rounding, nearly always bit for bit. Another batch size takes other kernels, whose
# sums round otherwise; what depends on the batch differs by whole tenths of an output's range.
_SAME_CALL, _SAME_IMAGE = 1e-6, 1e-3
_SHOWN = 3
# OpenVINO and TensorRT compute integers in 32 bits, whatever their type.
_INT32 = 2**31 - 1
_ARITHMETIC = {"add", "sub", "rsub", "mul", "sum", "cumsum", "prod", "cumprod", "pow"}
# Tagged as random by torch, but only if asked to drop something out, which `bernoulli` then shows.
_NOT_RANDOM = ("scaled_dot_product", "fused_sdp_choice", "rrelu_with_noise")


class ForeignModule(nn.Module):
    """A network as an exporter takes it; see `vitkit.exporters.source.Deployable`.

    `network` maps normalised (B, 3, H, W) to a tensor, or to a nest of tuples, lists and dictionaries of
    them. `output_names` choose among its outputs by the names that `flatten` gives them, or rename all of
    them in order. A network that takes one image at a time has the `batch` 1.
    """

    def __init__(
        self,
        network: nn.Module,
        output_names: Sequence[str],
        float_modules: Sequence[str] = (),
        batch: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.output_names = tuple(output_names)
        self.float_modules = tuple(float_modules)
        self.batch = batch
        self.eval()

    def train(self, mode: bool = True) -> ForeignModule:
        """Change nothing of the network: exported programs refuse it, others were checked as they are."""
        self.training = False
        return self

    def forward(self, images: Tensor) -> Any:
        """What the network itself returns."""
        return self.network(images)

    def deploy(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised (B, 3, H, W) images -> the outputs in the order of `output_names`."""
        if self.batch is None or images.shape[0] == self.batch:
            return self._named(self.network(images))
        parts = [self._named(self.network(part)) for part in torch.split(images, self.batch)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        """Nothing: of a foreign network's decisions nothing is known."""
        return {}

    def _named(self, returned: Any) -> tuple[Tensor, ...]:
        found = flatten(returned)
        if set(self.output_names) <= set(found):
            return tuple(found[name] for name in self.output_names)
        return tuple(found.values())


def flatten(returned: Any) -> dict[str, Tensor]:
    """The tensors that a network returned, by name.

    A single tensor is `output`. Tensors of a dictionary, named tuple or output class of transformers go by
    their keys, those of tuples and lists by their place (`output_0`), those of nests by both, joined by a
    dot. None is left out. Raises BadRequest for anything else.
    """
    found = dict(_tensors_in(returned, ""))
    if not found:
        raise BadRequest("the network returns no tensor; return its outputs as a tensor, tuple or dictionary")
    return found


def _tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "output", value
    elif isinstance(value, Mapping) or hasattr(value, "_asdict"):
        items = value if isinstance(value, Mapping) else value._asdict()
        for key, item in items.items():
            yield from _tensors_in(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors_in(item, f"{path}.{i}" if path else f"output_{i}")
    elif value is not None:
        raise BadRequest(
            f"the network returns a {type(value).__name__} as {path or 'its output'}; only tensors can leave "
            "an engine: return it as a tensor (N, ...) or leave it out"
        )


def check_network(
    network: Any, inputs: Tensor, names: Sequence[str] | None = None, batch: int | None = None
) -> tuple[TensorSpec, ...]:
    """The outputs of a network, batch dimension None, once every network is refused that cannot be exported.

    `inputs` are two different images as the network takes them, (2, 3, H, W) float32 of the engine's size.
    `names` are those of its outputs, see `ForeignModule`; without them a single output (N, classes) is
    `logits`, or `probabilities` if they add up to 1. A network whose `batch` is 1 is run on one image at a
    time.

    Raises BadRequest, with the cure, for a network that is no module in eval mode on the CPU in float32;
    that does not run on such images; whose outputs depend on chance, on earlier calls, on other images of
    the batch, or in their shape on the content; whose integers overflow; or whose outputs are misnamed.
    """
    check_module(network)
    trace = _Trace(network)
    one, other = inputs[:1], inputs[1:2]
    with torch.no_grad(), _unchanged_generators():
        with trace:
            first = _run(network, one, trace)
        _check_values(first, trace)
        second = _run(network, other, trace)
        if _difference(_run(network, one, trace), first) > _SAME_CALL or trace.changed():
            raise BadRequest(_state_problem(trace))
        if trace.random or _difference(_run(network, one, trace, seed=1), first) > _SAME_CALL:
            raise BadRequest(_random_problem(trace))
        _check_shapes(first, second)
        if batch is None:
            _check_batch(_run(network, inputs, trace), first, second, trace)
    return _specs({name: torch.cat([first[name], second[name]]) for name in first}, names)


def check_module(network: Any) -> None:
    """Raises BadRequest for what is no torch module in eval mode with float32 weights on the CPU."""
    if not isinstance(network, nn.Module):
        raise BadRequest(f"a {type(network).__name__} was given; vitkit takes a torch.nn.Module")
    for kind, cure in (
        (torch.jit.ScriptModule, "give the module that it was made from"),
        (nn.parallel.DistributedDataParallel, "give its .module"),
        (nn.DataParallel, "give its .module"),
    ):
        if isinstance(network, kind):
            raise BadRequest(f"the network is a {kind.__name__}; {cure}")
    if hasattr(network, "_orig_mod"):
        raise BadRequest("the network is compiled by torch.compile; give its ._orig_mod")
    if training := [_called(path, module) for path, module in network.named_modules() if module.training]:
        raise BadRequest(
            f"{_some(training)} in training mode, in which dropout is random and norms depend on the batch; "
            "call network.eval() first, and see that no train() of a module prevents it"
        )
    _check_weights(dict(_tensors_of(network)))


def _check_weights(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            raise BadRequest(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; the float reference is float32: call "
                "network.float() first, and convert tensors that are plain attributes"
            )
        if tensor.device.type == "meta":
            raise BadRequest(f"{name} is on the device meta, so it has no values; load the weights first")
        if tensor.device.type != "cpu":
            raise BadRequest(
                f"{name} is on the device {tensor.device}; call network.cpu() first. That leaves plain "
                "attributes where they are: keep such tensors by register_buffer"
            )


def _tensors_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes of a module, by path."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def _called(path: str, module: nn.Module) -> str:
    return f"{path or 'the network'} ({type(module).__name__})"


def _some(items: Sequence[str]) -> str:
    """The first few of some items, as the subject of a sentence with its verb."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{', '.join(items[:_SHOWN])}{more} {'is' if len(items) == 1 else 'are'}"


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a network computes with while this is entered, as far as it explains a fault.

    `random` operators draw numbers, `normalised` ones take the batch's statistics, `overflowed` ones compute
    integers out of range, each with the module that it runs in; `stack` are the modules that run at present.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network = network
        self.paths = {module: _called(path, module) for path, module in network.named_modules()}
        self.before = {name: tensor.clone() for name, tensor in _tensors_of(network)}
        self.stack: list[str] = [_called("", network)]
        self.random: list[str] = []
        self.normalised: list[str] = []
        self.overflowed: list[str] = []

    def __enter__(self) -> _Trace:
        self.hooks = (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module),
        )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(self.paths.get(module, type(module).__name__))

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def changed(self) -> list[str]:
        """Names of the network's tensors that are not what they were."""
        now = dict(_tensors_of(self.network))
        return [
            name
            for name, old in self.before.items()
            if name in now
            and not (now[name].shape == old.shape and torch.allclose(now[name], old, 0, 0, equal_nan=True))
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, place = func.overloadpacket.__name__, f"{func.overloadpacket.__name__} in {self.stack[-1]}"
        exact = _exact_integers(name.rstrip("_"), args)
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not any(part in name for part in _NOT_RANDOM):
            self.random.append(place)
        # The sixth argument is whether the batch's own statistics are taken.
        if "batch_norm" in name and args[5:6] == (True,):
            self.normalised.append(place)
        if exact is not None and isinstance(result, Tensor) and (text := _overflow(exact, result.dtype)):
            self.overflowed.append(f"{place} ({text})")
        return result


def _exact_integers(name: str, args: tuple[Any, ...]) -> Tensor | None:
    """What arithmetic or a conversion computes, in float64; None for other operators."""
    if not args or not isinstance(args[0], Tensor) or args[0].dtype == torch.bool:
        return None
    if name == "_to_copy":
        return args[0].double()
    if name not in _ARITHMETIC or args[0].is_floating_point() or args[0].is_complex():
        return None
    result: Tensor = getattr(torch.ops.aten, name)(
        *(a.double() if isinstance(a, Tensor) else a for a in args)
    )
    return result


def _overflow(exact: Tensor, dtype: torch.dtype) -> str | None:
    """The value that does not fit into the integer type, or into 32 bits; None if all do."""
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or not exact.numel():
        return None
    low, high = max(torch.iinfo(dtype).min, -_INT32 - 1), min(torch.iinfo(dtype).max, _INT32)
    # Conversions cut the fraction off.
    least, most = (float(value.trunc()) for value in torch.aminmax(exact))
    if low <= least and most <= high:
        return None
    return f"{least if least < low else most:.6g} in {str(dtype).removeprefix('torch.')}"


@contextmanager
def _unchanged_generators() -> Iterator[None]:
    """Leave the random generators of torch, Python and numpy as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _run(network: nn.Module, images: Tensor, trace: _Trace, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    given = images.clone()
    try:
        returned = network(given)
    # Any error may come out of a network.
    except Exception as error:
        raise BadRequest(_run_problem(network, images, trace, error)) from error
    if not torch.equal(given, images):
        raise BadRequest(
            "the network changes its input in place, which is the caller's; copy it first: x = x - mean for "
            "x.sub_(mean)"
        )
    return flatten(returned)


def _run_problem(network: nn.Module, images: Tensor, trace: _Trace, error: Exception) -> str:
    reason = first_line(error)
    count, _, height, width = images.shape
    if count > 1:
        return (
            f"the network takes one image, but not {count} ({reason}); keep the batch dimension in its code: "
            "x.flatten(1) for x.reshape(1, -1), x.shape[0] for 1"
        )
    place = trace.stack[-1]
    try:
        network(images.permute(0, 2, 3, 1).contiguous())
    except Exception:
        return (
            f"the network does not run on images (N, 3, {height}, {width}), in {place}: {reason}. "
            "If it needs another size, add --size HEIGHT,WIDTH"
        )
    return (
        f"the network takes images (N, {height}, {width}, 3), channels last; vitkit gives (N, 3, {height}, "
        f"{width}): let its forward begin with x = x.permute(0, 2, 3, 1)"
    )


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest error of any output over the size of its values; of integers the share that differs."""
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in wanted.items()}:
        return float("inf")
    errors = [0.0]
    for name, want in wanted.items():
        got = found[name]
        if not want.numel():
            continue
        if want.is_floating_point():
            errors.append(float((got - want).abs().max()) / max(float(want.abs().max()), 1e-12))
        else:
            errors.append(float((got != want).float().mean()))
    return max(errors)


def _state_problem(trace: _Trace) -> str:
    changed = trace.changed()
    what = f"{_some(changed)} changed by a call" if changed else "called again on an image, it differs"
    return (
        f"the network keeps state between its calls ({what}), which an engine does not; compute it in "
        "__init__, or take it out of forward"
    )


def _random_problem(trace: _Trace) -> str:
    what = f"{_some(trace.random)} random" if trace.random else "random numbers of Python or numpy"
    return (
        f"the network's outputs depend on chance ({what}); take it out of forward, and dropout with "
        "training=self.training"
    )


def _check_values(outputs: Mapping[str, Tensor], trace: _Trace) -> None:
    """Raises BadRequest for outputs that no engine returns, and for integers that overflowed on the way."""
    for name, value in outputs.items():
        dtype = str(value.dtype).removeprefix("torch.")
        if value.device.type != "cpu":
            raise BadRequest(
                f"the output {name} is on the device {value.device}, the images are on the CPU; keep tensors "
                "by register_buffer, so that network.cpu() moves them"
            )
        if dtype not in DTYPES:
            cure = "float()" if value.is_floating_point() else "int()"
            raise BadRequest(f"the output {name} is {dtype}; engines return {', '.join(DTYPES)}: add .{cure}")
        if not value.isfinite().all():
            raise BadRequest(
                f"the output {name} holds NaN or infinite values on an ordinary image; check the weights, "
                "--mean and --std"
            )
    if trace.overflowed:
        raise BadRequest(
            f"integers overflow: {_some(trace.overflowed)} out of range, and engines compute integers in 32 "
            "bits; compute in float32, or in int32 within its range"
        )


def _check_shapes(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raises BadRequest for outputs of another shape for each image, or without a batch dimension."""
    if list(first) != list(second):
        raise BadRequest(
            f"the network returns {', '.join(first)} for one image, {', '.join(second)} for another"
        )
    for name, value in first.items():
        if value.shape != second[name].shape:
            raise BadRequest(
                f"the output {name} has the shape {list(value.shape)} for one image and "
                f"{list(second[name].shape)} for another; engines have fixed shapes: return a fixed number "
                "of entries, such as the best K, with a score for each"
            )
        if value.ndim == 0 or value.shape[0] != 1:
            raise BadRequest(
                f"the output {name} has the shape {list(value.shape)} for one image; its first dimension "
                "must be the batch: (N, ...)"
            )


def _check_batch(
    both: Mapping[str, Tensor], first: Mapping[str, Tensor], second: Mapping[str, Tensor], trace: _Trace
) -> None:
    """Raises BadRequest if two images together give anything else than each alone."""
    for name, value in both.items():
        if value.ndim == 0 or value.shape[0] != 2:
            raise BadRequest(
                f"the output {name} has the shape {list(value.shape)} for two images; its first dimension "
                "must be the batch: (N, ...)"
            )
    alone = {name: torch.cat([first[name], second[name]]) for name in first}
    found = _difference(both, alone)
    if found <= _SAME_IMAGE:
        return
    cure = "compute each image for itself"
    if trace.normalised:
        cure = (
            f"{_some(trace.normalised)} normalised by the batch: let norms track running statistics, and "
            "call them with training=self.training"
        )
    raise BadRequest(
        f"the outputs for an image depend on the other images of the batch (by {found:.2g} of their range); "
        f"{cure}"
    )


def _specs(found: Mapping[str, Tensor], names: Sequence[str] | None) -> tuple[TensorSpec, ...]:
    """The outputs under their names in the card; raises BadRequest for names that do not fit."""
    by_place = all(name.split(".")[0].split("_")[0] == "output" for name in found)
    if names is None:
        names = [*found]
        if names == ["output"] and found["output"].ndim == 2:
            names = ["probabilities" if _are_probabilities(found["output"]) else "logits"]
    elif not set(names) <= set(found) and not (by_place and len(names) == len(found)):
        shapes = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in found.items())
        raise BadRequest(
            f"--outputs names {', '.join(names)}, but the network returns {shapes}; "
            + ("name each of them, in this order" if by_place else "choose among them")
        )
    taken = [found[name] for name in names] if set(names) <= set(found) else [*found.values()]
    for name, value in zip(names, taken, strict=True):
        if problem := text_problem(name):
            raise BadRequest(f"the output {name!r} {problem}; name the outputs with --outputs")
        if name in ("logits", "probabilities") and value.ndim == 2:
            _check_meaning(name, _are_probabilities(value))
    return tuple(
        TensorSpec(name, (None, *value.shape[1:]), str(value.dtype).removeprefix("torch."))
        for name, value in zip(names, taken, strict=True)
    )


def _are_probabilities(scores: Tensor) -> bool:
    ones = torch.ones(len(scores))
    return (
        scores.shape[1] > 1 and bool((scores >= 0).all()) and torch.allclose(scores.sum(1), ones, atol=1e-3)
    )


def _check_meaning(name: str, are_probabilities: bool) -> None:
    if name == "logits" and are_probabilities:
        raise BadRequest(
            "the output logits holds probabilities, to which a second softmax would be applied; name it "
            "probabilities (--outputs), or return what goes into the network's softmax"
        )
    if name == "probabilities" and not are_probabilities:
        raise BadRequest(
            "the output probabilities does not add up to 1: its softmax is missing; add it, or name the "
            "output logits (--outputs)"
        )

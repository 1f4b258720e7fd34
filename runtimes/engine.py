"""The engine: the one front an app sees. Checks feeds, prepares images, decodes results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, NoReturn, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import Artifact, ModelCard, TensorSpec, read_engine
from vitkit.runtimes.errors import (
    BadArtifact,
    BadInput,
    BadRequest,
    DeviceError,
    MissingBackend,
    RunFailed,
    VitkitError,
)
from vitkit.runtimes.image import check_image, placement, prepare_batch, read_image
from vitkit.runtimes.lifetime import Lifetime
from vitkit.runtimes.operators import Operator, Profile, describe, off_device
from vitkit.runtimes.plugins import Rows
from vitkit.runtimes.tasks import TASKS, Decoder, decoder

if TYPE_CHECKING:
    # Known to type checkers alone: what an engine without a stated task returns.
    from typing_extensions import TypeVar

    from vitkit.runtimes.classification import Classification
    from vitkit.runtimes.panoptic import Panoptic
    from vitkit.runtimes.semantic import Semantic
    from vitkit.runtimes.tensors import Tensors

    Result_co = TypeVar("Result_co", covariant=True, default=Classification | Panoptic | Semantic | Tensors)
else:
    from typing import TypeVar

    Result_co = TypeVar("Result_co", covariant=True)

_log = logging.getLogger(__name__)

Feeds = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]
Image = NDArray[Any] | str | Path
ImageT = TypeVar("ImageT", bound=Image)
Answer = TypeVar("Answer")
MAX_THREADS = 1024
MAX_PROFILED_RUNS = 1000


class Session(Protocol):
    """The vendor's object behind one method.

    `settings` are the vendor's options in force, for reports. `plan` is the file of a TensorRT engine, for
    TensorRT's own tools. `main_device` is the vendor's name of the device, provider or delegate that every
    operator is meant to run on; empty if the vendor names none. A session must be safe to call from several
    threads, and the arrays it returns are the caller's.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    settings: dict[str, Any]
    plan: Path | None = None
    main_device: str = ""

    def run(self, feeds: Feeds) -> Outputs:
        """Run the network on checked feeds; raises whatever the vendor raises."""
        ...

    def operators(self) -> Sequence[Operator]:
        """All operators as the vendor executes them, read back from it; empty if it does not list them."""
        ...

    def profile(self, feeds: Feeds, runs: int) -> Profile:
        """Times of every operator in `runs` runs on checked feeds, by the vendor's profiler.

        Raises BadRequest if none is read here.
        """
        raise BadRequest(
            "no profiler of this engine is read; for TensorRT use its own tool: "
            "trtexec --loadEngine=PLAN --dumpProfile"
        )

    def close(self) -> None:
        """Free the vendor's memory."""
        ...

    def __reduce__(self) -> NoReturn:
        raise BadRequest(_NO_COPY)


_NO_COPY = "an open engine cannot be pickled or copied; pass on its folder and call vitkit.open_engine there"


class Runtime(NamedTuple):
    """Where the session of a target lives: module, vendor package, extra.

    `device` is the one it takes by default; with `sole` it has no other. `substitute` is a package that may
    stand in for the vendor's. `remedy` is the advice to a user without the package, if no extra of vitkit
    installs it.
    """

    module: str
    package: str
    extra: str
    device: str = "cpu"
    sole: bool = False
    substitute: str | None = None
    remedy: str | None = None


_RUNTIMES = {
    "onnx": Runtime("vitkit.runtimes.onnx", "onnxruntime", "onnx"),
    "openvino": Runtime("vitkit.runtimes.openvino", "openvino", "openvino"),
    "tensorrt": Runtime("vitkit.runtimes.tensorrt", "tensorrt", "tensorrt", "cuda", True),
    "tflite": Runtime(
        "vitkit.runtimes.tflite", "ai_edge_litert", "tflite", sole=True, substitute="tflite_runtime"
    ),
}
RUNTIMES = Rows("vitkit.runtimes", Runtime, _RUNTIMES)


def runtime_module(target: str) -> Any:
    """The module that runs a target (a key of `RUNTIMES`); raises MissingBackend."""
    runtime = RUNTIMES[target]
    try:
        return import_module(runtime.module)
    except VitkitError:
        raise
    # A damaged or mismatched binary raises anything from OSError to SystemError.
    except Exception as error:
        raise MissingBackend(runtime.package, runtime.extra, error, runtime.remedy) from error


def check_device(target: str, device: str | None) -> str:
    """The one spelling of a device of a target's engines: in lower case, the target's own if none is named.

    Raises DeviceError for a device that no engine of the target runs on, whatever the machine has.
    """
    runtime = RUNTIMES.get(target)
    own = runtime.device if runtime else "cpu"
    found = own if device is None else device.lower()
    if runtime and runtime.sole and found != own:
        raise DeviceError(
            f"{target} engines have no device {device!r}, they run on {own} alone; "
            "name none, which means that one"
        )
    return found


def _open_session(
    artifact: Artifact, files: Mapping[str, bytes], threads: int | None, device: str
) -> Session:
    module = runtime_module(artifact.card.target)
    try:
        session: Session = module.open_session(artifact, files, threads=threads, device=device)
    except VitkitError:
        raise
    except UnicodeDecodeError as error:
        raise BadArtifact(f"{artifact.path} has a tensor whose name is not UTF-8: {error}") from None
    # What a vendor raises beside its refusal of the file itself, such as MemoryError.
    except Exception as error:
        raise BadArtifact(
            f"{artifact.path} cannot be opened: {type(error).__name__}: {str(error).strip()}"
        ) from error
    return session


def _check_image(card: ModelCard, path: Path) -> None:
    spec, (height, width) = card.inputs[0], card.image.size
    shape = (height, width, 3) if card.image.layout == "NHWC" else (3, height, width)
    if spec.shape[1:] != shape or spec.dtype != card.image.dtype:
        raise BadArtifact(
            f"{path}: the card prepares images as {card.image.dtype} {list(shape)}, its input is {spec}"
        )


def _check_against_card(session: Session, card: ModelCard, path: Path) -> None:
    wrong = []
    for kind in ("inputs", "outputs"):
        declared, actual = getattr(card, kind), getattr(session, kind)
        if declared != actual:
            wrong.append(
                f"{kind}: card {'; '.join(map(str, declared))}, engine {'; '.join(map(str, actual))}"
            )
    if wrong:
        raise BadArtifact(f"{path}: the card does not describe this engine ({' and '.join(wrong)})")


class Engine(Generic[Result_co]):
    """A network ready to run; made by `open_engine`, closed by `with` or `close`.

    `device` is what it computes on, in lower case. Threads may share an engine. It can be neither pickled nor
    copied, and in a forked child it refuses to run: each process opens its own.
    """

    def __init__(self, artifact: Artifact, session: Session, decode: Decoder, device: str) -> None:
        self.artifact = artifact
        self.session = session
        self.device = device
        self._decode = decode
        self._lifetime = Lifetime(session, artifact.path)
        self._checks = tuple(
            (spec.name, np.dtype(spec.dtype), spec.shape, spec.dtype.startswith("float"))
            for spec in artifact.card.inputs
        )

    @property
    def card(self) -> ModelCard:
        """The artifact's card."""
        return self.artifact.card

    @property
    def batch(self) -> int | None:
        """Images a run takes; None where any number."""
        return self.card.inputs[0].shape[0]

    def run(self, feeds: Feeds) -> Outputs:
        """Run on raw input tensors by name, as the card's `inputs` describe them.

        Outputs come as the vendor returns them: they may hold NaN or infinite values, which `decode` refuses.

        Raises BadInput for a missing or unknown name, a wrong type, dtype or shape, and for floats that
        are not finite; BadRequest after `close` and in a forked child; RunFailed if the vendor fails.
        """
        self._lifetime.check()
        if not isinstance(feeds, Mapping):
            raise BadInput(f"feeds are a {type(feeds).__name__}; wanted a dictionary of arrays by name")
        for name, dtype, shape, floating in self._checks:
            array = feeds.get(name)
            if (
                type(array) is not np.ndarray
                or array.dtype != dtype
                or array.ndim != len(shape)
                or not all(want is None or want == got for want, got in zip(shape, array.shape, strict=True))
                or array.size == 0
                or (floating and not np.isfinite(array).all())
            ):
                raise BadInput(self._explain(feeds))
        if len(feeds) != len(self._checks):
            raise BadInput(self._explain(feeds))
        call = object()
        try:
            self._lifetime.enter(call)
            return self.session.run(feeds)
        except VitkitError:
            raise
        # Vendors raise types of their own, RuntimeError, ValueError and MemoryError.
        except Exception as error:
            raise self._failure(error) from error
        finally:
            self._lifetime.leave(call)

    def operators(self) -> Sequence[Operator]:
        """All operators as the vendor executes them, read back from it; empty if it does not list them.

        ONNX Runtime opens the engine's files a second time for this and runs it once on zeros.

        Raises BadRequest after `close` and in a forked child, BadArtifact if the files have changed
        meanwhile, RunFailed if the vendor fails.
        """
        return self._ask(self.session.operators)

    def profile(self, feeds: Feeds, runs: int = 20) -> Profile:
        """Times of every operator in `runs` runs (1..1000) on raw input tensors, as `run` takes them.

        The vendor's profiler measures an engine opened a second time with the same settings; some runs before
        are left out.

        Raises what `run` and `operators` raise; BadRequest too for a vendor without a profiler.
        """
        if type(runs) is not int or not 1 <= runs <= MAX_PROFILED_RUNS:
            raise BadRequest(f"runs is {runs!r}; it must be an integer from 1 to {MAX_PROFILED_RUNS}")
        # Checks the feeds.
        self.run(feeds)
        return self._ask(lambda: self.session.profile(feeds, runs))

    def require_device(self) -> None:
        """Raises DeviceError naming the operators that run elsewhere than on the engine's device or delegate.

        That is what a provider left to the CPU, and what XNNPACK left to TFLite's own kernels; arithmetic on
        shapes and indices is not counted.
        """
        outside = off_device(self.operators(), self.session.main_device)
        if outside:
            places = ", ".join(sorted({one.device for one in outside}))
            raise DeviceError(
                f"{len(outside)} operators of {self.artifact.path} run on {places}, not on "
                f"{self.session.main_device}: {describe(outside)}; leave out --require-device "
                "(require_device in Python), or export a network without these operators"
            )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        call = object()
        try:
            self._lifetime.enter(call)
            return question()
        except VitkitError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        finally:
            self._lifetime.leave(call)

    def _failure(self, error: Exception) -> RunFailed:
        return RunFailed(
            f"the engine of {self.artifact.path} failed while it ran: {type(error).__name__}: "
            f"{str(error).strip()}"
        )

    def _explain(self, feeds: Feeds) -> str:
        wanted = {spec.name: spec for spec in self.card.inputs}
        if unknown := sorted(set(feeds) - set(wanted), key=str):
            return f"unknown input {unknown[0]!r}; this engine takes {', '.join(map(str, wanted.values()))}"
        for name, spec in wanted.items():
            if name not in feeds:
                return f"input {name!r} is missing; this engine takes {', '.join(map(str, wanted.values()))}"
            array = feeds[name]
            if not isinstance(array, np.ndarray):
                return f"input {name!r} is a {type(array).__name__}, not a numpy array; wanted {spec}"
            shape_fits = array.ndim == len(spec.shape) and all(
                want in (None, got) for want, got in zip(spec.shape, array.shape, strict=True)
            )
            if array.dtype != spec.dtype or not shape_fits or array.size == 0:
                return f"input {name!r} is {array.dtype} {list(array.shape)}; wanted {spec}"
            if spec.dtype.startswith("float") and not np.isfinite(array).all():
                return f"input {name!r} holds {int((~np.isfinite(array)).sum())} NaN or infinite values"
        return "inputs must be plain numpy arrays, not of a subclass"

    def prepare(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """Photographs (H, W, 3) uint8 RGB -> the batch (len(images), ...) that `run` takes."""
        if not isinstance(images, (list, tuple)) or not images:
            raise BadInput("images must be a list of at least one array")
        return prepare_batch(images, self.card.image)

    @overload
    def __call__(self, image: Image) -> Result_co: ...

    @overload
    def __call__(self, image: list[ImageT] | tuple[ImageT, ...]) -> list[Result_co]: ...

    def __call__(self, image: Any) -> Any:
        """Run on one image, or a list of them, and decode.

        An image is a (H, W, 3) uint8 RGB array of any size, or the path of an image file. Returns the
        task's result (`Classification`, `Panoptic`, `Semantic`, `Tensors`), or a list of results for a list.
        Raises BadInput, and what `run` and `decode` raise.
        """
        self._lifetime.check()
        if isinstance(image, (list, tuple)):
            if not image:
                raise BadInput("the list of images is empty")
            photos = [self._photo(item, f"image {i}") for i, item in enumerate(image)]
            return self.decode(self.run_batched(self.prepare(photos)), photos)
        photo = self._photo(image, "the image")
        return self.decode(self.run_batched(self.prepare([photo])), [photo])[0]

    def _photo(self, image: Any, what: str) -> NDArray[np.uint8]:
        return read_image(image) if isinstance(image, (str, Path)) else check_image(image, what)

    def decode(self, outputs: Outputs, photos: Sequence[NDArray[np.uint8]]) -> list[Result_co]:
        """Outputs whose first dimension goes over `photos` -> one result of the card's task for each.

        Raises RunFailed for outputs with NaN or infinite values, used by the task or not.
        """
        for name, value in outputs.items():
            self._check_finite(name, value)
        places = (placement(photo.shape[0], photo.shape[1], self.card.image) for photo in photos)
        return [
            self._decode({name: value[i] for name, value in outputs.items()}, self.card, place)
            for i, place in enumerate(places)
        ]

    def _check_finite(self, name: str, value: NDArray[Any]) -> None:
        if value.dtype.kind != "f" or np.isfinite(value).all():
            return
        count = value.size - int(np.isfinite(value).sum())
        remedy = (
            "; float16 ends at 65504: export it again with --precision fp32"
            if self.card.precision == "fp16"
            else ""
        )
        raise RunFailed(
            f"the engine of {self.artifact.path} returned {count} NaN or infinite values of {value.size} in "
            f"its output {name!r}{remedy}"
        )

    def run_batched(self, inputs: NDArray[Any]) -> Outputs:
        """Run any number of prepared inputs through an engine of fixed or free batch size.

        (N, ...) -> outputs with first dimension N. The last batch of a fixed size is filled up with
        copies of its last input, and their outputs dropped.
        """
        name = self.card.inputs[0].name
        if not isinstance(inputs, np.ndarray) or inputs.ndim == 0 or len(inputs) == 0:
            raise BadInput("inputs must be an array of at least one prepared image")
        return run_in_batches(lambda part: self.run({name: part}), inputs, self.batch or len(inputs))

    def close(self) -> None:
        """Free the engine once the calls that run in other threads have ended; closing twice is harmless.

        Raises BadRequest in a forked child of the process that opened it, which must not free it.
        """
        self._lifetime.close()

    def __enter__(self) -> Engine[Result_co]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ended the block in a forked child is the better error, and its exit must stay its exit.
        if not (self._lifetime.inherited and error is not None):
            self.close()

    def __reduce__(self) -> NoReturn:
        raise BadRequest(_NO_COPY)


def run_in_batches(run: Callable[[NDArray[Any]], Outputs], inputs: NDArray[Any], size: int) -> Outputs:
    """Any number N >= 1 of inputs through a network that takes `size` of them -> its outputs (N, ...).

    The last batch is filled up with copies of its last input, and their outputs are dropped.
    """
    parts = []
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        missing = size - len(part)
        filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append({key: value[: len(part)] for key, value in run(filled).items()})
    if len(parts) == 1:
        return parts[0]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def check_threads(threads: int | None) -> None:
    """Raises BadRequest for a number of threads that no machine has."""
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise BadRequest(f"threads is {threads!r}; it must be an integer from 1 to {MAX_THREADS}")


@overload
def open_engine(
    path: str | Path,
    *,
    task: None = None,
    threads: int | None = None,
    device: str | None = None,
    require_device: bool = False,
    decode: Mapping[str, Any] | None = None,
) -> Engine: ...


@overload
def open_engine(
    path: str | Path,
    *,
    task: Literal["classification"],
    threads: int | None = None,
    device: str | None = None,
    require_device: bool = False,
    decode: Mapping[str, Any] | None = None,
) -> Engine[Classification]: ...


@overload
def open_engine(
    path: str | Path,
    *,
    task: Literal["panoptic"],
    threads: int | None = None,
    device: str | None = None,
    require_device: bool = False,
    decode: Mapping[str, Any] | None = None,
) -> Engine[Panoptic]: ...


@overload
def open_engine(
    path: str | Path,
    *,
    task: Literal["semantic"],
    threads: int | None = None,
    device: str | None = None,
    decode: Mapping[str, Any] | None = None,
) -> Engine[Semantic]: ...


@overload
def open_engine(
    path: str | Path,
    *,
    task: Literal["tensors"],
    threads: int | None = None,
    device: str | None = None,
    decode: Mapping[str, Any] | None = None,
) -> Engine[Tensors]: ...


def open_engine(
    path: str | Path,
    *,
    task: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    require_device: bool = False,
    decode: Mapping[str, Any] | None = None,
) -> Any:
    """Open an artifact folder for running.

    `task` is what the app expects the engine to do: `"classification"`, `"panoptic"`, `"semantic"` or
    `"tensors"`. An engine for another task is refused, and type checkers know which result a call returns.
    `threads` are CPU threads of one run (default: the vendor's choice: one for TFLite, else usually every
    core). `device` is a device that the vendor offers here (`gpu`, `npu` for OpenVINO; `cuda` for ONNX
    Runtime), in any case; by default `cpu`, and `cuda` for TensorRT. A TensorRT engine that is not built yet
    is built first, which takes minutes, unless this machine has kept it.
    With `require_device` an operator that the vendor runs elsewhere is an error, see
    `Engine.require_device`; asking takes about as long as opening does.
    `decode` are options of the task's decoding: `{"top": 3}` of classification, `{"fast": True}` of
    panoptic segmentation.

    The engine's files are read once: what was compared with the card's hashes is what runs, and the files
    may change or vanish afterwards.

    Raises BadArtifact if the folder is damaged, foreign or newer; MissingBackend if the vendor's package is
    not installed; DeviceError if the device is absent or cannot run this engine; BadRequest for options out
    of range and for an engine of another task.
    """
    start = time.perf_counter()
    check_threads(threads)
    if not isinstance(path, (str, Path)):
        raise BadRequest(f"the artifact is a {type(path).__name__}; name its folder as text or a Path")
    if device is not None and not isinstance(device, str):
        raise BadRequest(f"device is {device!r}; it must be a name such as 'cpu'")
    if task is not None and not (isinstance(task, str) and task in TASKS):
        raise BadRequest(f"task is {task!r}; known are {', '.join(TASKS)}")
    artifact, files = read_engine(path)
    card = artifact.card
    if task not in (None, card.task):
        raise BadRequest(f"{artifact.path} is an engine for {card.task}, not for {task}")
    decoding = decoder(card, decode)
    _check_image(card, artifact.path)
    if card.target not in RUNTIMES:
        raise BadArtifact(
            f"{artifact.path} is compiled for {card.target!r}; this vitkit runs {', '.join(RUNTIMES)}: "
            "upgrade it with: pip install --upgrade vitkit"
        )
    device = check_device(card.target, device)
    session = _open_session(artifact, files, threads, device)
    try:
        _check_against_card(session, card, artifact.path)
    except BadArtifact:
        session.close()
        raise
    took = 1e3 * (time.perf_counter() - start)
    _log.debug("opened %s on %s in %.0f ms: %s", artifact.path, device, took, session.settings)
    engine: Engine[Any] = Engine(artifact, session, decoding, device)
    if require_device:
        try:
            engine.require_device()
        except VitkitError:
            engine.close()
            raise
    return engine

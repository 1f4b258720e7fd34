"""Somebody's TFLite file as an artifact: it is the engine already, and what it says of itself is its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitkit.calibration.tflite import WEIGHTED
from vitkit.exporters.golden import write_golden
from vitkit.exporters.parity import NamedImage, ParityCheck, golden_pairs
from vitkit.exporters.tflite_graph import kind_of, read_model
from vitkit.exporters.verify import verify
from vitkit.runtimes.card import DTYPES, Artifact, ImageSpec, ModelCard, sha256, write_card
from vitkit.runtimes.engine import run_in_batches, runtime_module
from vitkit.runtimes.errors import BadInput, VitkitError
from vitkit.runtimes.files import atomic_folder
from vitkit.runtimes.image import check_image, generated_photos, prepare_batch
from vitkit.runtimes.reading import MAX_ENGINE_BYTES, read_file

if TYPE_CHECKING:
    from vitkit.runtimes.tflite import TFLiteSession

ENGINE_FILE = "model.tflite"


@dataclass(frozen=True)
class TFLiteFile:
    """A TFLite file, run by TFLite's own kernels without XNNPACK."""

    path: Path
    content: bytes

    @classmethod
    def open(cls, path: Path) -> TFLiteFile:
        """Read a file; raises BadInput for one that TFLite does not open, or that does not take one image."""
        try:
            file = cls(path, read_file(path, MAX_ENGINE_BYTES))
        except OSError as error:
            raise BadInput(f"cannot read {error}") from None
        inputs = file.session.inputs
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or 3 not in inputs[0].shape[1::2]:
            raise BadInput(
                f"{path} takes {'; '.join(map(str, inputs))}; an engine takes one image, (batch, height, "
                "width, 3) or (batch, 3, height, width)"
            )
        if inputs[0].dtype not in ("uint8", "float32") or None in inputs[0].shape[1:]:
            raise BadInput(f"{path} takes {inputs[0]}; images are uint8 or float32, of one size")
        if odd := [spec for spec in file.session.outputs if spec.dtype not in DTYPES]:
            raise BadInput(f"{path} returns {'; '.join(map(str, odd))}; engines return {', '.join(DTYPES)}")
        return file

    @cached_property
    def session(self) -> TFLiteSession:
        """TFLite's own kernels."""
        try:
            session: TFLiteSession = runtime_module("tflite").open_reference(self.content)
        except VitkitError as error:
            custom = " (an Edge TPU runs it alone: give the file from before its compiler)"
            raise BadInput(
                f"{self.path} cannot be opened: {error}{custom * (b'edgetpu-custom-op' in self.content)}"
            ) from None
        return session

    @property
    def image(self) -> ImageSpec:
        """The size, layout and type of the input."""
        spec = self.session.inputs[0]
        _, *dims = (dim or 1 for dim in spec.shape)
        layout = "NHWC" if dims[2] == 3 else "NCHW"
        size = (dims[0], dims[1]) if layout == "NHWC" else (dims[1], dims[2])
        return ImageSpec(size, layout=layout, dtype=spec.dtype)

    @property
    def normalisation(self) -> tuple[float, float] | None:
        """Mean and standard deviation of pixels of 0..1 by the scale and zero point of an int8 input.

        They are right if its 256 steps are the 256 values of a pixel, in order. None for other inputs.
        """
        if (steps := self.session.input_steps) is None:
            return None
        scale, zero = steps
        return (128 + zero) / 255, 1 / (255 * scale)

    @cached_property
    def precision(self) -> str:
        """`int8`, `fp16` or `fp32`, by the type in which the weights of products are kept."""
        from ai_edge_litert import schema_py_generated as schema

        model = read_model(self.content)
        graph = model.subgraphs[0]
        makers = {step.outputs[0]: step for step in graph.operators}
        kinds = set()
        for step in graph.operators:
            if kind_of(model, step) in WEIGHTED:
                weight = step.inputs[1]
                # Weights in half precision are made float32 by an operator of their own.
                kinds.add(graph.tensors[makers[weight].inputs[0] if weight in makers else weight].type)
        if kinds & {schema.TensorType.INT8, schema.TensorType.UINT8}:
            return "int8"
        return "fp16" if schema.TensorType.FLOAT16 in kinds else "fp32"

    @cached_property
    def softmaxes(self) -> frozenset[str]:
        """Names of the outputs that a softmax makes."""
        model = read_model(self.content)
        graph = model.subgraphs[0]
        makers = {i: step for step in graph.operators for i in step.outputs}
        found = []
        for place, spec in zip(graph.outputs, self.session.outputs, strict=True):
            step = makers.get(place)
            # A quantised result may be turned into another scale, or into float32, behind it.
            while step is not None and kind_of(model, step) in ("QUANTIZE", "DEQUANTIZE"):
                step = makers.get(step.inputs[0])
            if step is not None and kind_of(model, step) == "SOFTMAX":
                found.append(spec.name)
        return frozenset(found)

    def run(self, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Prepared inputs (N, ...) -> outputs by name."""
        spec = self.session.inputs[0]
        return run_in_batches(lambda batch: self.session.run({spec.name: batch}), inputs, spec.shape[0] or 1)


@dataclass(frozen=True)
class _Reference:
    """What the file's engine is compared with: the same file without XNNPACK."""

    file: TFLiteFile
    card: ModelCard

    def predict(self, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self.file.run(inputs)

    def decisions(self, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {}


def adopt(
    file: TFLiteFile,
    card: ModelCard,
    out: Path,
    *,
    golden: Sequence[NDArray[np.uint8]] | None = None,
    images: Sequence[NamedImage] = (),
) -> tuple[Artifact, list[ParityCheck]]:
    """Write an artifact of the file as it is, whole or not at all, and verify it.

    `card` is that of a run with the same outputs; what of it the file decides is taken from the file. The
    engine, which XNNPACK may run, is compared with TFLite's own kernels, on the images of `golden.npz`
    (`golden`, else generated ones) and on `images`: what the file computes is right by definition. Images
    are (H, W, 3) uint8 RGB. Raises BadInput, BadRequest, and ExportFailed if the two differ.
    """
    count = golden_pairs(card.task)
    given = generated_photos(count) if golden is None else golden[:count]
    examples = [check_image(image, f"golden image {i}") for i, image in enumerate(given)]
    card = _engine_card(file, card)
    with atomic_folder(out) as folder:
        (folder / ENGINE_FILE).write_bytes(file.content)
        inputs = prepare_batch(examples, card.image)
        write_golden(folder, inputs, file.run(inputs), card.inputs[0].name)
        files: dict[str, str | None] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        card = replace(card, files=files)
        write_card(card, folder)
        checks = verify(folder, _Reference(file, card), images)
    return Artifact(out, card), checks


def _engine_card(file: TFLiteFile, card: ModelCard) -> ModelCard:
    image = replace(card.image, size=file.image.size, layout=file.image.layout, dtype=file.image.dtype)
    return replace(
        card,
        target="tflite",
        precision=file.precision,
        inputs=tuple(file.session.inputs),
        outputs=tuple(file.session.outputs),
        image=image,
        engine=ENGINE_FILE,
    )

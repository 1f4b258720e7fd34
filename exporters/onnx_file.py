"""What an exporter starts from if there is no torch module: a float network in somebody's ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from vitkit.calibration.policy import check_float_modules
from vitkit.exporters.half import CAMERA_MODULE
from vitkit.exporters.onnx_reading import (
    ImageInput,
    all_nodes,
    image_input,
    named,
    opset_of,
    read_onnx,
    real_inputs,
)
from vitkit.exporters.simplify import SCOPES, forget_the_maker, last_scope, name_by_module, scopes, simplify
from vitkit.runtimes.card import DTYPES, ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.engine import run_in_batches, runtime_module
from vitkit.runtimes.errors import BadInput, BadRequest, ExportFailed, VitkitError
from vitkit.runtimes.image import generated_photos, prepare_batch

if TYPE_CHECKING:
    from vitkit.runtimes.onnx import OnnxSession

# Of float outputs the root mean square error over the standard deviation, of others the share that differs:
# more than float32 loses by adding in another order.
_SAME = 1e-4
# Since this opset Resize chooses its coordinates, and the converter leaves the new default.
_RESIZE_CHANGED = 11
_CONTROL_FLOW = ("If", "Loop", "Scan")
# The first IR version whose files need not list their weights as inputs, and that ONNX Runtime 1.20 reads.
_IR_VERSION = 10


@dataclass(frozen=True)
class OnnxFile:
    """A network as its file has it, run by ONNX Runtime with its optimiser off."""

    path: Path
    model: ModelProto
    input: ImageInput

    @classmethod
    def open(cls, path: Path) -> OnnxFile:
        """Read a file; raises BadInput for what no engine can be made of."""
        model = read_onnx(path)
        return cls(path, model, image_input(model, path))

    @cached_property
    def _session(self) -> OnnxSession:
        return _open(self.model, f"{self.path} cannot be opened")

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Images (N, 3, H, W) float32, or (N, H, W, 3) if the file takes uint8 -> outputs by name.

        Of a file with a free batch each image runs alone.
        """

        def run(batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
            return self._session.run({self.input.name: _in_layout(batch, self.input)})

        return run_in_batches(run, images, self.input.batch or 1)

    def outputs(self, image: ImageSpec) -> tuple[TensorSpec, ...]:
        """The outputs on images of a size, found by running it; the first dimension is the batch's.

        Raises BadInput for outputs without a batch, of a type that engines do not return, or of a size that
        depends on the image; and if the same images do not give the same outputs again.
        """
        count = self.input.batch or 2
        first, again, other = (self._trial(image, count, seed) for seed in (0, 0, 1))
        for name, value in first.items():
            if problem := _output_problem(value, again[name], other[name]):
                raise BadInput(f"{self.path}: the output {name!r} {problem}")
        return tuple(TensorSpec(name, (None, *v.shape[1:]), v.dtype.name) for name, v in first.items())

    def is_distribution(self, place: int, image: ImageSpec) -> bool:
        """Whether an output (N, K) holds probabilities: none negative, those of an image add up to 1."""
        outputs = [list(self._trial(image, self.input.batch or 2, seed).values())[place] for seed in (0, 1)]
        values = np.concatenate(outputs).astype(np.float64)
        return bool((values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3))

    def _trial(self, image: ImageSpec, count: int, seed: int) -> dict[str, NDArray[Any]]:
        """Outputs of generated images, each with the batch as its first dimension."""
        images = _in_layout(prepare_batch(generated_photos(count, seed=seed), image), self.input)
        try:
            outputs = dict(self._session.run({self.input.name: images}))
        # The vendor raises a dozen types.
        except Exception as error:
            raise BadInput(
                f"{self.path} does not run on {count} images of {image.size[0]}x{image.size[1]}: "
                f"{str(error).strip()}"
            ) from None
        for name, value in outputs.items():
            if not isinstance(value, np.ndarray) or value.ndim == 0 or len(value) != count:
                raise BadInput(
                    f"{self.path}: the output {name!r} is no tensor whose first dimension is that of the "
                    f"{count} images, it is {np.shape(value)}; export the network without it"
                )
        return outputs


@dataclass(frozen=True)
class OnnxSource:
    """A float network from an ONNX file, with the card of a run.

    The card prepares normalised NCHW float32 images, also if the file takes NHWC; or the uint8 NHWC pixels
    that the file takes. `graphs` are what `graph` has made of it, by request.
    """

    file: OnnxFile
    card: ModelCard
    float_modules: tuple[str, ...] = ()
    graphs: dict[Hashable, ModelProto] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the file's order; the file may have others for them."""
        return tuple(spec.name for spec in self.card.outputs)

    def predict(self, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The float reference: inputs (N, ...) as the card prepares them -> outputs by name."""
        return dict(zip(self.output_names, self.file.run(inputs).values(), strict=True))

    def decisions(self, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Empty: a file does not name decisions."""
        return {}

    def graph(self, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
        """The network as a float32 ONNX graph; see `Exportable.graph`.

        Its shapes are fixed, its opset is converted, and both are proved: ONNX Runtime computes the same as
        from the file, or ExportFailed is raised. Raises BadRequest for a batch that the file does not take,
        and for float32 inputs of a network of pixels.
        """
        if self.file.input.dtype == "uint8" and image.dtype != "uint8":
            raise BadRequest(f"{self.file.path} takes uint8 pixels: use --input uint8")
        key = (image, batch, opset)
        if key not in self.graphs:
            self.graphs[key] = self._engine_graph(image, batch, opset)
        model = deepcopy(self.graphs[key])
        check_float_modules([node.name for node in model.graph.node], self.float_modules)
        return model

    def _engine_graph(self, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
        model = self._fixed(batch)
        fault = self._fault(model, batch)
        if fault:
            raise BadRequest(
                f"{self.file.path} is made for a batch of {self.file.input.batch or 1}: {fault}; use --batch "
                f"{self.file.input.batch or 1}"
            )
        model = _without_dropout(model)
        if opset_of(model) != opset:
            model = self._converted(model, opset)
            if fault := self._fault(model, batch):
                raise ExportFailed(
                    f"{self.file.path}: converted from opset {opset_of(self.file.model)} to {opset} {fault}; "
                    f"export it from its framework with opset {opset}"
                )
        _keep_names(model)
        typed = self._simplified(model)
        _put_camera_in_front(typed, image, self.file.input, batch)
        for value, name in zip(typed.graph.outputs, self.output_names, strict=True):
            value.name = name
        name_by_module(typed)
        forget_the_maker(typed)
        typed.graph.name = self.card.name
        proto: ModelProto = ir.to_proto(typed)
        return proto

    def _fixed(self, batch: int | None) -> ModelProto:
        """The network with the sizes of its input and outputs written into it, `batch` None as a symbol."""
        model: ModelProto = deepcopy(self.file.model)
        graph, (height, width) = model.graph, self.card.image.size
        (value,) = real_inputs(graph)
        shape = (3, height, width) if self.file.input.layout == "NCHW" else (height, width, 3)
        _set_shape(value, (batch, *shape))
        for output, spec in zip(graph.output, self.card.outputs, strict=True):
            _set_shape(output, (batch, *spec.shape[1:]))
        kept = deepcopy(value)
        del graph.input[:], graph.value_info[:]
        graph.input.append(kept)
        model.ir_version = _IR_VERSION
        return model

    def _fault(self, model: ModelProto, batch: int | None) -> str:
        """How a changed form of the network differs from the file's own; empty if it does not."""
        # A number of images that is not the file's own shows whether the batch is free.
        count = batch or (self.file.input.batch or 1) + 1
        images = prepare_batch(generated_photos(count), self.card.image)
        want = self.file.run(images)
        try:
            session = _open(model, "it cannot be opened")
            got = session.run({self.file.input.name: _in_layout(images, self.file.input)})
        # The vendor raises a dozen types.
        except Exception as error:
            return f"does not run: {str(error).strip()}"
        wrong = [
            f"{name!r} by {found:.2g}"
            for name in want
            if not (found := _difference(want[name], got[name])) <= _SAME
        ]
        return f"returns something else: {', '.join(wrong)}" if wrong else ""

    def _converted(self, model: ModelProto, opset: int) -> ModelProto:
        """The network in another opset: a later one by onnx's converter, an earlier one as it is."""
        before = opset_of(model)
        try:
            if before > opset:
                return _relabelled(model, opset)
            converted: ModelProto = onnx.version_converter.convert_version(
                onnx.shape_inference.infer_shapes(model), opset
            )
        # The vendor raises RuntimeError, and types of its own.
        except Exception as error:
            cure = f"use --opset {before}" if before > opset else f"export it with opset {opset}"
            raise ExportFailed(
                f"{self.file.path} cannot be converted from opset {before} to {opset}: {error}; {cure}"
            ) from None
        converted.ir_version = _IR_VERSION
        return _with_old_resizing(converted) if before < _RESIZE_CHANGED else converted

    def _simplified(self, model: ModelProto) -> Any:
        """Constants and BatchNorms folded, until no size is computed any more."""
        for _ in range(2):
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
            model = ir.to_proto(simplify(ir.from_proto(inferred)))
        if flow := [node for node in all_nodes(model.graph) if node.op_type in _CONTROL_FLOW]:
            raise ExportFailed(
                f"{self.file.path} has control flow that depends on the image, {named(flow)}: export the "
                "network without it (torch.onnx.export(..., dynamo=True) writes graphs without branches)"
            )
        return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def _open(model: ModelProto, what: str) -> OnnxSession:
    try:
        session: OnnxSession = runtime_module("onnx").open_reference(model.SerializeToString())
    except VitkitError as error:
        raise BadInput(f"{what}: {error}") from None
    return session


def _in_layout(images: NDArray[Any], taken: ImageInput) -> NDArray[Any]:
    """Images as a card of a run prepares them, NCHW float32 or NHWC uint8, in the layout of an input."""
    if taken.layout == "NHWC" and taken.dtype == "float32":
        images = images.transpose(0, 2, 3, 1)
    elif taken.layout == "NCHW" and taken.dtype == "uint8":
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _output_problem(value: NDArray[Any], again: NDArray[Any], other: NDArray[Any]) -> str:
    """Why an output of some images is none that an engine can return; `other` is that of other images."""
    if value.dtype.name not in DTYPES:
        return f"is {value.dtype.name}; engines return {', '.join(DTYPES)}"
    if value.shape != other.shape:
        return (
            f"has a size that depends on the images, {list(value.shape)} and {list(other.shape)} are two of "
            "them: export the network without what chooses, such as NonMaxSuppression"
        )
    if not np.array_equal(value, again, equal_nan=value.dtype.kind == "f"):
        return (
            "differs between two runs on the same images: export the network in evaluation mode, without "
            "random numbers"
        )
    return ""


def _difference(want: NDArray[Any], got: NDArray[Any]) -> float:
    """Root mean square error over the standard deviation, of integers the share that differs."""
    if want.shape != got.shape:
        return float("inf")
    if want.dtype.kind != "f":
        return float(np.mean(want != got))
    wide = want.astype(np.float64)
    return float(np.sqrt(np.mean((wide - got) ** 2)) / max(wide.std(), 1e-12))


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[int | None, ...]) -> None:
    kind = value.type.tensor_type.elem_type
    symbols = [("batch" if dim is None else dim) for dim in shape]
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, symbols))


def _without_dropout(model: ModelProto) -> ModelProto:
    """Dropout that is off passes its input on; not all engines and converters know it."""
    for node in model.graph.node:
        if node.op_type == "Dropout" and len([name for name in node.output if name]) == 1:
            plain = onnx.helper.make_node("Identity", node.input[:1], node.output[:1], node.name)
            plain.metadata_props.extend(node.metadata_props)
            node.CopyFrom(plain)
    return model


def _with_old_resizing(model: ModelProto) -> ModelProto:
    """Resize as opset 10 (and Upsample 9) defines it: x = place / scale, of which nearest takes the floor."""
    rules = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for node in model.graph.node:
        if node.op_type == "Resize":
            kept = [item for item in node.attribute if item.name not in rules]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.extend(onnx.helper.make_attribute(*rule) for rule in rules.items())
    return model


def _relabelled(model: ModelProto, opset: int) -> ModelProto:
    """The same nodes declared as an earlier opset's; raises onnx's errors for what that does not have."""
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = opset
    onnx.checker.check_model(model, full_check=True)
    return model


def _keep_names(model: ModelProto) -> None:
    """Note where in the network each node is, by what its file has of it: torch's scopes, or the node's name.

    `/layer1/layer1.0/conv1/Conv` of torch is in the module layer1.0.conv1, `Conv_12` in a module of its own.
    """
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        counts[node.op_type] += 1
        known = [item.value for item in node.metadata_props if item.key == SCOPES]
        path = last_scope(known[0]) if known else _path_of(node.name)
        del node.metadata_props[:]
        entry = node.metadata_props.add()
        # A name without slashes, since what is before the first one is the path.
        path = path.replace("/", ".") or f"{node.op_type}_{counts[node.op_type]}"
        entry.key, entry.value = SCOPES, scopes(path.replace("'", ""))


def _path_of(name: str) -> str:
    """The module path in a node's name; torch repeats the path of a container in its children's names."""
    path: list[str] = []
    parts = [part for part in name.split("/") if part]
    for part in parts[:-1] or parts:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def _put_camera_in_front(model: Any, image: ImageSpec, taken: ImageInput, batch: int | None) -> None:
    """Let the network take `image`-shaped inputs, as `vitkit.exporters.trace.camera_module` does in torch."""
    height, width = image.size
    shape = (height, width, 3) if image.layout == "NHWC" else (3, height, width)
    dtype = ir.DataType.UINT8 if image.dtype == "uint8" else ir.DataType.FLOAT
    pixels = ir.Value(
        name="image", shape=ir.Shape(["batch" if batch is None else batch, *shape]), type=ir.TensorType(dtype)
    )
    nodes: list[Any] = []

    def add(operator: str, *inputs: Any, **attributes: Any) -> Any:
        node = ir.node(operator, inputs, attributes=attributes, metadata_props={SCOPES: scopes("")})
        nodes.append(node)
        return node.outputs[0]

    def constant(name: str, values: Any) -> Any:
        made = ir.Value(
            name=f"{CAMERA_MODULE}:{name}", const_value=ir.tensor(values, name=f"{CAMERA_MODULE}:{name}")
        )
        model.graph.register_initializer(made)
        return made

    value = pixels
    if dtype == ir.DataType.UINT8 and taken.dtype == "float32":
        # One value per pixel and channel of a row: engines vectorise that, but not a period of 3.
        mean, std = (np.tile(255 * np.asarray(part, np.float32), width) for part in (image.mean, image.std))
        rows = constant("rows", np.array([batch or -1, height, width * 3], np.int64))
        value = add("Cast", add("Reshape", value, rows), to=ir.DataType.FLOAT.value)
        value = add("Mul", add("Sub", value, constant("mean", mean)), constant("scale", 1 / std))
        value = add("Reshape", value, constant("shape", np.array([batch or -1, *shape], np.int64)))
    if image.layout != taken.layout:
        value = add("Transpose", value, perm=(0, 3, 1, 2) if taken.layout == "NCHW" else (0, 2, 3, 1))
    model.graph.insert_before(model.graph[0], nodes)
    ir.convenience.replace_all_uses_with(model.graph.inputs[0], value)
    model.graph.inputs[0] = pixels

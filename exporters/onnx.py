"""torch -> ONNX, and the `onnx` target."""

from __future__ import annotations

import ast
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vitkit.calibration.dataset import CalibrationSet
from vitkit.calibration.policy import check_float_modules
from vitkit.exporters.half import CAMERA_MODULE, to_half
from vitkit.exporters.source import Source
from vitkit.exporters.targets import OPSET
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.errors import ExportFailed

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

ENGINE_FILE = "model.onnx"
# Folds the fixed first sampling points and their position embeddings, whatever the model's size.
_FOLD_LIMIT = 1 << 26


def export(
    source: Source,
    folder: Path,
    *,
    precision: str,
    calibration: CalibrationSet | None = None,
    image: ImageSpec,
    batch: int | None,
    opset: int,
) -> ModelCard:
    """Write `model.onnx` into `folder` and return its card, without file hashes.

    `batch` None leaves the batch dimension free. Raises ExportFailed.
    """
    import onnx

    model = trace(source, image=image, batch=batch, opset=opset)
    if precision == "fp16":
        model = to_half(model, source.module.float_modules)
    path = folder / ENGINE_FILE
    if precision == "int8":
        from vitkit.calibration.onnx import quantize

        assert calibration is not None
        model = quantize(model, calibration, image, source.module.float_modules)
    check_graph(model, opset)
    onnx.save(model, path)
    return engine_card(source, image, batch, target="onnx", precision=precision, engine=ENGINE_FILE)


def write_twin(artifact: Artifact, folder: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Write the engine into `folder` with the integers that the named nodes compute as outputs too."""
    import onnx

    model = onnx.load(artifact.engine_path)
    values = {node.name: node.output[0] for node in model.graph.node}
    for name, shape in shapes.items():
        if values.get(name) != name:
            raise ExportFailed(f"{artifact.path} has no node {name!r}, whose result is to be verified")
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape))
    onnx.save(model, folder / ENGINE_FILE)


def engine_card(
    source: Source, image: ImageSpec, batch: int | None, *, target: str, precision: str, engine: str
) -> ModelCard:
    """The run's card turned into that of an engine with the given input."""
    height, width = image.size
    shape = (batch, height, width, 3) if image.layout == "NHWC" else (batch, 3, height, width)
    outputs = tuple(replace(spec, shape=(batch, *spec.shape[1:])) for spec in source.card.outputs)
    return replace(
        source.card,
        target=target,
        precision=precision,
        inputs=(TensorSpec("image", shape, image.dtype),),
        outputs=outputs,
        image=image,
        engine=engine,
    )


def trace(source: Source, *, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
    """The source as a float32 ONNX graph that takes `image`-shaped inputs.

    BatchNorms are folded into their convolutions and all constants folded. Every node is named
    `<module path>/<operator>`, which is what float policies match. Raises ExportFailed if the exporter
    did not write what it was asked for, or if a pattern of the model's `float_modules` matches no node.
    """
    import onnx

    # Several engines of one source share the trace, which takes most of the time of an export.
    key = (image, batch, opset, _weights_hash(source))
    if key not in source.traces:
        source.traces[key] = _trace(source, image, batch, opset).SerializeToString()
    model: ModelProto = onnx.load_from_string(source.traces[key])
    check_float_modules([node.name for node in model.graph.node], source.module.float_modules)
    return model


def _weights_hash(source: Source) -> str:
    digest = hashlib.sha256()
    for name, tensor in cast("nn.Module", source.module).state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _trace(source: Source, image: ImageSpec, batch: int | None, opset: int) -> ModelProto:
    import onnx_ir

    model = _simplify(_capture(source, image, batch, opset))
    _name_by_module(model)
    _forget_the_maker(model)
    if model.opset_imports.get("") != opset:
        raise ExportFailed(
            f"asked for opset {opset}, the exporter wrote {model.opset_imports.get('')}; "
            f"use --opset {OPSET.default}"
        )
    if isinstance(model.graph.inputs[0].shape[0], int) != (batch is not None):
        raise ExportFailed(
            f"{source.card.name} fixes its batch size in its code; export without --dynamic-batch"
        )
    model.graph.name = source.card.name
    proto: ModelProto = onnx_ir.to_proto(model)
    return proto


def _capture(source: Source, image: ImageSpec, batch: int | None, opset: int) -> Any:
    """The source as torch's exporter writes it, its own optimiser off."""
    import torch

    example, dynamic = _example(image, batch)
    with _quiet():
        program = torch.onnx.export(
            camera_module(source, image),
            (example,),
            dynamo=True,
            # The exporter's own optimiser miscompiles Reshape-MatMul-Reshape with equal leading sizes.
            optimize=False,
            opset_version=opset,
            input_names=["image"],
            output_names=list(source.module.output_names),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    return program.model


def _simplify(model: Any) -> Any:
    """Fold constants and BatchNorms, and drop what that leaves over."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    with _quiet():
        for _ in range(2):
            fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
        model = rewrite(model, pattern_rewrite_rules=[fuse_batchnorm_into_conv_rule])
        for tidy in (
            common.IdentityEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            # Folding transposed a weight shared by several iterations once for each of them.
            common.DeduplicateInitializersPass(size_limit=_FOLD_LIMIT),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            tidy(model)
    return model


def _forget_the_maker(model: Any) -> None:
    """Drop stack traces and versions: they tell of this machine, and an export must repeat."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "vitkit", None


def _example(image: ImageSpec, batch: int | None) -> tuple[Tensor, Any]:
    import torch

    height, width = image.size
    shape = (height, width, 3) if image.layout == "NHWC" else (3, height, width)
    # A free batch is traced at 2: torch takes a dimension of 1 for a constant.
    example = torch.zeros((batch or 2, *shape), dtype=getattr(torch, image.dtype))
    return example, None if batch else ({0: torch.export.Dim("batch")},)


def camera_module(source: Source, image: ImageSpec) -> nn.Module:
    """The source as a module from camera pixels, or from normalised NCHW, to named outputs."""
    import torch

    class Camera(torch.nn.Module):
        mean: Tensor
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            # Of a foreign network its own paths name the nodes, without the wrapper's.
            self.model: Any = getattr(source.module, "network", source.module)
            # One value per pixel and channel of a row: engines vectorise that, but not a period of 3.
            self.register_buffer("mean", 255 * torch.tensor(image.mean).repeat(image.size[1]))
            self.register_buffer("scale", 1 / (255 * torch.tensor(image.std)).repeat(image.size[1]))

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            if image.dtype == "uint8":
                rows = pixels.reshape(-1, image.size[0], image.size[1] * 3).float()
                pixels = ((rows - self.mean) * self.scale).reshape(pixels.shape).permute(0, 3, 1, 2)
            return source.module.deploy(pixels)

    return Camera().eval()


def _name_by_module(model: Any) -> None:
    """Name nodes and their values `<module path>/<operator>`, numbered where that repeats."""
    keep = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    seen: Counter[str] = Counter()
    for node in model.graph:
        stem = f"{_module_path(node)}/{node.op_type}"
        seen[stem] += 1
        node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        for i, value in enumerate(node.outputs):
            if id(value) not in keep:
                value.name = node.name if i == 0 else f"{node.name}:{i}"
    for value in list(model.graph.initializers.values()):
        if not value.uses():
            continue
        user, position = value.uses()[0]
        from_torch = value.name.startswith("model.")
        value.name = value.name.removeprefix("model.") if from_torch else f"{user.name}:in{position}"


def _module_path(node: Any) -> str:
    """The module path that a node came from, without the camera module's own prefix.

    A node that the vendors' rewriting left without one belongs where its first input comes from.
    """
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if text is None:
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        return _module_path(producer) if producer is not None else CAMERA_MODULE
    # Written by the exporter as a Python list of paths from the outermost module inwards, with the
    # operator last.
    path = str(ast.literal_eval(text)[-2])
    return path.removeprefix("model").removeprefix(".") or CAMERA_MODULE


def check_graph(model: ModelProto, opset: int) -> None:
    """Refuse a graph of another opset, or one that ONNX's checker does not pass; raises ExportFailed."""
    import onnx

    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get("") != opset:
        raise ExportFailed(f"asked for opset {opset}, the graph declares {versions.get('')}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportFailed(f"the graph of {model.graph.name} does not pass ONNX's checker: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the vendors print on a graph that is checked here anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

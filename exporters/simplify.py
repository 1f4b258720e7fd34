"""An ONNX graph made simple and named by module, whoever wrote it."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitkit.exporters.half import CAMERA_MODULE

# Where torch's exporter writes, as a Python list, the paths of a node's modules from the outermost one
# inwards, with the operator last.
SCOPES = "pkg.torch.onnx.name_scopes"
# Folds the fixed first sampling points and their position embeddings, whatever the model's size.
_FOLD_LIMIT = 1 << 26


def simplify(model: Any) -> Any:
    """Fold constants and BatchNorms, and drop what that leaves over."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    with quiet():
        for _ in range(2):
            fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
        model = rewrite(
            model,
            pattern_rewrite_rules=[
                rules.fuse_batchnorm_into_conv_rule,
                rules.fuse_batchnorm_into_conv_transpose_rule,
                rules.fuse_batchnorm_into_gemm_rule,
            ],
        )
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


def forget_the_maker(model: Any) -> None:
    """Drop stack traces and versions: they tell of this machine, and an export must repeat."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "vitkit", None


def name_by_module(model: Any) -> None:
    """Name nodes and their values `<module path>/<operator>`, numbered where that repeats."""
    ends = (*model.graph.inputs, *model.graph.outputs)
    keep = {id(value) for value in ends}
    seen = Counter({value.name: 1 for value in ends})
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


def scopes(path: str) -> str:
    """What `SCOPES` of a node holds that is in the network's module `path`; empty for the camera's own."""
    return repr([f"model.{path}" if path else "", ""])


def last_scope(text: str) -> str:
    """The innermost module path of the text that `SCOPES` of a node holds."""
    found = re.findall(r"'([^']*)'", text)
    return str(found[-2]) if len(found) > 1 else ""


def _module_path(node: Any) -> str:
    """The module path that a node came from, without the camera module's own prefix.

    A node that the vendors' rewriting left without one belongs where its first input comes from.
    """
    text = node.metadata_props.get(SCOPES)
    if text is None:
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        return _module_path(producer) if producer is not None else CAMERA_MODULE
    return last_scope(text).removeprefix("model").removeprefix(".") or CAMERA_MODULE


@contextmanager
def quiet() -> Iterator[None]:
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

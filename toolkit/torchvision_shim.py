"""timm and torchvision, importable beside any build of torch.

The registry's torchvision is compiled against CUDA torch. Beside a CPU-only torch its compiled operators
do not load, and `import torchvision` dies on `operator torchvision::nms does not exist`. vitkit uses none
of those operators; declaring the two that torchvision's own modules look up lets it import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)

# isort: split
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as _error:
    if "torchvision::nms" not in str(_error):
        raise
    # Kept: the declarations last as long as this object.
    _library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
import timm.data
import timm.layers
import timm.scheduler
import timm.utils

from vitkit.runtimes.errors import BadRequest, VitkitError, first_line

__all__ = ["from_timm", "timm"]


@contextmanager
def from_timm(what: str, remedy: str) -> Iterator[None]:
    """Inside, what timm and its hub raise becomes a BadRequest: what cannot be had, why, the remedy."""
    try:
        yield
    except VitkitError:
        raise
    # They raise a dozen types for a missing name, network, file or package.
    except Exception as error:
        raise BadRequest(f"{what}: {first_line(error)}. {remedy}") from None

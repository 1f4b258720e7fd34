"""Pillow, imported late: an app whose frames already have the engine's size needs none."""

from __future__ import annotations

from typing import Any

from vitkit.runtimes.errors import MissingBackend


def pillow() -> Any:
    """The package PIL with its modules Image and features; raises MissingBackend."""
    try:
        import PIL.features
        import PIL.Image
    except ImportError as error:
        raise MissingBackend("pillow", "onnx", error) from None
    return PIL

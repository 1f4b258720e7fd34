"""vitkit: efficient vision models on edge devices, measured and verified."""

from vitkit.runtimes import *  # noqa: F403
from vitkit.runtimes import __all__ as __all__

__version__ = "0.1.0"

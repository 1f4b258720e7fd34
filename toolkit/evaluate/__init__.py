"""Evaluation of a run or an engine on labelled data by the metric of its task.

`open_network` opens what `evaluate` measures. Each metric is a module with its own
`evaluate(network, data, ...)`: `accuracy` of classifiers, `panoptic` of panoptic networks; the rows of
`vitkit.runtimes.tasks` name them.
"""

import sys

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit import CallablePackage
from vitkit.evaluate.classes import class_indices
from vitkit.evaluate.network import Network, evaluate, open_network

__all__ = ["Network", "class_indices", "evaluate", "open_network"]

sys.modules[__name__].__class__ = CallablePackage

"""Evaluation of a run or an engine on labelled data by the metric of its task.

One module for each metric, all with the verb `evaluate(network, data, ...)`: `accuracy` of classifiers,
`panoptic` of panoptic networks. `open_network` opens what they evaluate.
"""

from vitkit.evaluate.classes import class_indices
from vitkit.evaluate.network import Network, open_network

__all__ = ["Network", "class_indices", "open_network"]

"""Panoptic segmentation: the outputs of kMaX-DeepLab and ReMaX -> one panoptic segmentation of the image."""

from vitkit.runtimes.panoptic.merge import merge_masks
from vitkit.runtimes.panoptic.results import MergeParameters, Panoptic, Segment

__all__ = ["MergeParameters", "Panoptic", "Segment", "merge_masks"]

"""Training: a recipe becomes a `TrainConfig`, `train` makes a run folder of it."""

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.train.checkpoint import has_checkpoint
from vitkit.train.config import TrainConfig, override
from vitkit.train.loop import train
from vitkit.train.recipes import RECIPES, recipe_named

__all__ = ["RECIPES", "TrainConfig", "has_checkpoint", "override", "recipe_named", "train"]

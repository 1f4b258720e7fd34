"""Training: a recipe becomes a `TrainConfig`, `train` makes a run folder of it."""

from vitkit.train.config import TrainConfig, override
from vitkit.train.loop import train
from vitkit.train.recipes import RECIPES, recipe_named

__all__ = ["RECIPES", "TrainConfig", "override", "recipe_named", "train"]

"""How a model was trained: its hyperparameters, and the files that they are read from."""

from __future__ import annotations

from compressor.recipe.card import read_model_card
from compressor.recipe.deepspeed import read_deepspeed_config
from compressor.recipe.find import find_recipe, read_recipe, read_recipe_file, stated_recipe
from compressor.recipe.recipe import TrainingRecipe, merge_recipes
from compressor.recipe.timm import read_timm_args
from compressor.recipe.trainer import read_trainer_state, read_training_args
from compressor.recipe.training_checkpoint import recipes_inside

__all__ = [
    "TrainingRecipe",
    "find_recipe",
    "merge_recipes",
    "read_deepspeed_config",
    "read_model_card",
    "read_recipe",
    "read_recipe_file",
    "read_timm_args",
    "read_trainer_state",
    "read_training_args",
    "recipes_inside",
    "stated_recipe",
]

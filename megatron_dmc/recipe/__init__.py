"""A run's recipe: typed sections, reading, and every check that needs no model. Nothing of Megatron is built here."""

from megatron_dmc.recipe.checks import check_head_dim, check_recipe
from megatron_dmc.recipe.layout import check_batch, divisors
from megatron_dmc.recipe.reading import load_recipe, recipe_from_dict
from megatron_dmc.recipe.sections import (
    CheckpointConfig,
    DataConfig,
    DistillationConfig,
    MonitorConfig,
    ParallelConfig,
    PhaseConfig,
    PhaseKind,
    Recipe,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistillationConfig",
    "MonitorConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PhaseKind",
    "Recipe",
    "TrainingConfig",
    "check_batch",
    "check_head_dim",
    "check_recipe",
    "divisors",
    "load_recipe",
    "recipe_from_dict",
]

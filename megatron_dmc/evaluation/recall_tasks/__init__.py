"""Texts that ask for something that stands in them: what a compressed cache loses first."""

from megatron_dmc.evaluation.recall_tasks.draw import TASKS, draw
from megatron_dmc.evaluation.recall_tasks.sample import Sample

__all__ = ["TASKS", "Sample", "draw"]

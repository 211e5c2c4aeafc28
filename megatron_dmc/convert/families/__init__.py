"""Families of models, one file each: what of ``config.json`` and of the weights is a family's own."""

from megatron_dmc.convert.families.family import HuggingFaceFamily
from megatron_dmc.convert.families.llama import LLAMA
from megatron_dmc.convert.families.mistral import MISTRAL
from megatron_dmc.convert.families.qwen2 import QWEN2
from megatron_dmc.convert.families.qwen3 import QWEN3
from megatron_dmc.convert.families.refused import why_refused
from megatron_dmc.model.model_config import Family

FAMILIES: dict[Family, HuggingFaceFamily] = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}

__all__ = ["FAMILIES", "HuggingFaceFamily", "why_refused"]

"""Families of Hugging Face models, one file each: transformers' own classes with DMC's attention."""

import importlib
from typing import Any


def dmc_classes(family: str) -> tuple[Any, Any]:
    """Configuration and causal language model of a family (the name of a module here)."""
    module = importlib.import_module(f"{__name__}.{family}")
    named = {name: value for name, value in vars(module).items() if name.startswith("DMC")}
    (model,) = (x for name, x in named.items() if name.endswith("ForCausalLM") and x.__module__ == module.__name__)
    return model.config_class, model

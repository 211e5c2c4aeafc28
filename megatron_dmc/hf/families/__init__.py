"""Families of Hugging Face models, one file each: transformers' own classes with DMC's attention."""

import importlib
import pkgutil
from typing import Any

# The modules of this folder.
FAMILIES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def dmc_classes(family: str) -> tuple[Any, Any]:
    """Configuration and causal language model of a family (the name of a module here)."""
    module = importlib.import_module(f"{__name__}.{family}")
    # Its bases, which are imported there, have such names too.
    classes = (
        x for name, x in vars(module).items() if name.endswith("ForCausalLM") and x.__module__ == module.__name__
    )
    (model,) = classes
    return model.config_class, model


def register() -> None:
    """Has transformers' Auto classes take exports by the classes here, whatever code lies in their folders."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for family in FAMILIES:
        config_class, model_class = dmc_classes(family)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class.model_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)

"""Retrofit pretrained LLMs with Dynamic Memory Compression on NVIDIA megatron-core."""

from megatron_dmc.config import ConfigError, DMCConfig

__version__ = "0.1.0"
__all__ = ["ConfigError", "DMCConfig", "__version__"]

"""Retrofit pretrained LLMs with Dynamic Memory Compression on NVIDIA megatron-core."""

from megatron_dmc import megatron_import
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.errors import DMCError

megatron_import.install()

__version__ = "0.1.0"
__all__ = ["ConfigError", "DMCConfig", "DMCError", "__version__"]

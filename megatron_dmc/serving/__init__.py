"""A plugin for vLLM that serves exports: ``pip install .[vllm]`` in a checkout, then ``vllm serve EXPORT``."""

from megatron_dmc.serving.plugin import register

__all__ = ["register"]

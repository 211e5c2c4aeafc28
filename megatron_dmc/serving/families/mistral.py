"""Mistral with Dynamic Memory Compression."""

from megatron_dmc.serving.model import DMCForCausalLM


class DMCMistralForCausalLM(DMCForCausalLM):
    pass

"""Llama with Dynamic Memory Compression."""

from megatron_dmc.serving.model import DMCForCausalLM


class DMCLlamaForCausalLM(DMCForCausalLM):
    pass

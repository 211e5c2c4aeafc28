"""Qwen3, dense, with Dynamic Memory Compression: queries and keys have norms over their heads."""

from megatron_dmc.serving.model import DMCAttention, DMCDecoderLayer, DMCForCausalLM


class DMCQwen3Attention(DMCAttention):
    has_head_norms = True


class DMCQwen3DecoderLayer(DMCDecoderLayer):
    attention_class = DMCQwen3Attention


class DMCQwen3ForCausalLM(DMCForCausalLM):
    layer_class = DMCQwen3DecoderLayer

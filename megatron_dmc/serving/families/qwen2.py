"""Qwen2 and Qwen2.5 with Dynamic Memory Compression: query, key and value have a bias."""

from megatron_dmc.serving.model import DMCAttention, DMCDecoderLayer, DMCForCausalLM


class DMCQwen2Attention(DMCAttention):
    has_qkv_bias = True


class DMCQwen2DecoderLayer(DMCDecoderLayer):
    attention_class = DMCQwen2Attention


class DMCQwen2ForCausalLM(DMCForCausalLM):
    layer_class = DMCQwen2DecoderLayer

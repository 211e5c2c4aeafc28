"""Qwen3, dense, with Dynamic Memory Compression."""

from transformers import GenerationMixin, Qwen3Config, Qwen3Model, Qwen3PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from megatron_dmc.hf.attention import DMCAttention
from megatron_dmc.hf.configuration_dmc import DMCConfiguration
from megatron_dmc.hf.modeling_dmc import DMCForCausalLM, DMCModel


class DMCQwen3Config(DMCConfiguration, Qwen3Config):
    model_type = "dmc_qwen3"
    __init__ = DMCConfiguration.__init__


class DMCQwen3Attention(DMCAttention, Qwen3Attention):
    pass


class DMCQwen3Model(DMCModel, Qwen3Model):
    config_class = DMCQwen3Config
    attention_class = DMCQwen3Attention


class DMCQwen3ForCausalLM(DMCForCausalLM, Qwen3PreTrainedModel, GenerationMixin):
    config_class = DMCQwen3Config
    model_class = DMCQwen3Model

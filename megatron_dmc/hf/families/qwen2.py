"""Qwen2 and Qwen2.5 with Dynamic Memory Compression."""

from transformers import GenerationMixin, Qwen2Config, Qwen2Model, Qwen2PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from megatron_dmc.hf.attention import DMCAttention
from megatron_dmc.hf.configuration_dmc import DMCConfiguration
from megatron_dmc.hf.modeling_dmc import DMCForCausalLM, DMCModel


class DMCQwen2Config(DMCConfiguration, Qwen2Config):
    model_type = "dmc_qwen2"
    # Of attention_bias transformers' Qwen2 takes no notice.
    must_be = {"sliding_window": None, "attention_dropout": 0}  # noqa: RUF012 (transformers' form)
    __init__ = DMCConfiguration.__init__


class DMCQwen2Attention(DMCAttention, Qwen2Attention):
    pass


class DMCQwen2Model(DMCModel, Qwen2Model):
    config_class = DMCQwen2Config
    attention_class = DMCQwen2Attention


class DMCQwen2ForCausalLM(DMCForCausalLM, Qwen2PreTrainedModel, GenerationMixin):
    config_class = DMCQwen2Config
    model_class = DMCQwen2Model

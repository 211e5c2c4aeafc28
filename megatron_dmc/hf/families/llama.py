"""Llama with Dynamic Memory Compression."""

from transformers import GenerationMixin, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from megatron_dmc.hf.attention import DMCAttention
from megatron_dmc.hf.configuration_dmc import DMCConfiguration
from megatron_dmc.hf.modeling_dmc import DMCForCausalLM, DMCModel


class DMCLlamaConfig(DMCConfiguration, LlamaConfig):
    model_type = "dmc_llama"
    __init__ = DMCConfiguration.__init__


class DMCLlamaAttention(DMCAttention, LlamaAttention):
    pass


class DMCLlamaModel(DMCModel, LlamaModel):
    config_class = DMCLlamaConfig
    attention_class = DMCLlamaAttention


class DMCLlamaForCausalLM(DMCForCausalLM, LlamaPreTrainedModel, GenerationMixin):
    config_class = DMCLlamaConfig
    model_class = DMCLlamaModel

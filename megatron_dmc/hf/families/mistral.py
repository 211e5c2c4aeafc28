"""Mistral with Dynamic Memory Compression."""

from transformers import GenerationMixin, MistralConfig, MistralModel, MistralPreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralAttention

from megatron_dmc.hf.attention import DMCAttention
from megatron_dmc.hf.configuration_dmc import DMCConfiguration
from megatron_dmc.hf.modeling_dmc import DMCForCausalLM, DMCModel


class DMCMistralConfig(DMCConfiguration, MistralConfig):
    model_type = "dmc_mistral"
    replaced_defaults = {"sliding_window": None}  # noqa: RUF012 (transformers' form)
    __init__ = DMCConfiguration.__init__


class DMCMistralAttention(DMCAttention, MistralAttention):
    pass


class DMCMistralModel(DMCModel, MistralModel):
    config_class = DMCMistralConfig
    attention_class = DMCMistralAttention


class DMCMistralForCausalLM(DMCForCausalLM, MistralPreTrainedModel, GenerationMixin):
    config_class = DMCMistralConfig
    model_class = DMCMistralModel

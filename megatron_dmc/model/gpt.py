"""megatron-core's GPTModel with DMC attention, from a ModelConfig."""

import logging
import os
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.attention import DMCSelfAttention
from megatron_dmc.model.layer_spec import get_dmc_block_spec
from megatron_dmc.model.model_config import ModelConfig


def transformer_config(model: ModelConfig, *, bf16: bool = False, **overrides: Any) -> TransformerConfig:
    """megatron-core's configuration of a decoder; ``overrides`` name its fields (layout, recomputation)."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "init_method_std": model.init_method_std,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Must be set before DDP wraps the model, because it decides how gradients are scaled.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not on_gpu,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(settings | overrides))


# They choose among Transformer Engine's own attentions, which no model here has; containers set them, and megatron-core stops
# at a value that is not its own.
_ATTENTION_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def build_model(
    model: ModelConfig,
    dmc: DMCConfig | None,
    config: TransformerConfig | None = None,
    *,
    vp_stage: int | None = None,
    use_transformer_engine: bool | None = None,
) -> GPTModel:
    """This rank's part (pipeline stage, tensor-parallel shard) of the model.

    megatron-core's parallel_state must be initialized. ``dmc`` None builds the base model.
    """
    logging.getLogger(GPTModel.__module__).addFilter(_is_news)
    for name in _ATTENTION_SWITCHES:
        os.environ.pop(name, None)
    config = config or transformer_config(model)
    spec = get_dmc_block_spec(config, dmc, vp_stage=vp_stage, use_transformer_engine=use_transformer_engine)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rope_scaling=model.rotary_scaling_factor is not None,
        rope_scaling_factor=model.rotary_scaling_factor or 8.0,
        vp_stage=vp_stage,
    )


def _is_news(record: logging.LogRecord) -> bool:
    """megatron-core 0.19 announces with every model that GPTModel gets no new features; what is there is all we need."""
    return not record.getMessage().startswith("GPTModel IS DEPRECATED")


def dmc_layers(model: torch.nn.Module) -> list[DMCSelfAttention]:
    """The model's DMC attention modules in layer order, through any wrappers."""
    return [module for module in model.modules() if isinstance(module, DMCSelfAttention)]

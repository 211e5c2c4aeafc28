"""megatron-core layer specs with DMC attention."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.attention import DMCCoreAttention, DMCSelfAttention
from megatron_dmc.model.norm import HeadNorm, RMSNorm


def has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def get_dmc_layer_spec(
    dmc: DMCConfig | None, *, use_transformer_engine: bool | None = None, qk_layernorm: bool = False
) -> ModuleSpec:
    """A TransformerLayer with DMC attention: megatron-core's local spec, or Transformer Engine's where it is installed.

    Checkpoints have the same keys in both. Transformer Engine's spec usually fuses the input norm into linear_qkv. Here the
    norm is a module of its own, because the ``projection`` decisions read the normed attention input.

    Args:
        dmc: None for the base model.
        use_transformer_engine: None: use it if it is installed.
        qk_layernorm: queries and keys have norms; TransformerConfig must say the same.
    """
    if use_transformer_engine is None:
        use_transformer_engine = has_transformer_engine()
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        spec = get_gpt_layer_with_transformer_engine_spec()
        layer = spec.submodules
        layer.input_layernorm = TENorm
        layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        layer.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer = spec.submodules
        layer.input_layernorm = RMSNorm
        layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.module = DMCSelfAttention
    layer.self_attention.params = {**layer.self_attention.params, "dmc": dmc}
    norm = HeadNorm if qk_layernorm else None
    layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = norm
    layer.self_attention.submodules.core_attention = _core_attention_builder(dmc)
    return spec


def _core_attention_builder(dmc: DMCConfig | None) -> Any:
    def build(**kwargs: Any) -> DMCCoreAttention:
        return DMCCoreAttention(**kwargs, dmc=dmc)

    return build


def get_dmc_block_spec(
    config: TransformerConfig,
    dmc: DMCConfig | None,
    *,
    vp_stage: int | None = None,
    use_transformer_engine: bool | None = None,
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers and the final norm, for GPTModel's ``transformer_layer_spec``."""
    if use_transformer_engine is None:
        use_transformer_engine = has_transformer_engine()
    layer_spec = get_dmc_layer_spec(
        dmc, use_transformer_engine=use_transformer_engine, qk_layernorm=config.qk_layernorm
    )
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        norm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * layers, layer_norm=norm)

"""A recipe's model as every rank builds it: megatron-core's configuration, this rank's chunks, the frozen base."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.training.arguments import Recipe
from megatron_dmc.training.weights import is_decision


def megatron_config(recipe: Recipe, **overrides: Any) -> TransformerConfig:
    """megatron-core's configuration of a recipe's model, layout and recomputation; ``overrides`` name its fields."""
    training, parallel = recipe.training, recipe.parallel
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    stages = parallel.virtual_pipeline_model_parallel_size
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": stages,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type,
        "sequence_parallel": parallel.sequence_parallel,
        # The default peer-to-peer flags give wrong losses on gloo with interleaved stages.
        "overlap_p2p_comm": stages is not None,
        "batch_p2p_comm": stages is None,
        **kinds[training.recompute],
    }
    return transformer_config(recipe.model, bf16=training.bf16, **(settings | overrides))


def build_chunks(recipe: Recipe, config: TransformerConfig, dmc: DMCConfig | None) -> list[torch.nn.Module]:
    """This rank's parts of the model (virtual pipeline stages); ``dmc`` None: the base's."""
    stages = recipe.parallel.virtual_pipeline_model_parallel_size
    use_engine = {"auto": None, "local": False, "transformer_engine": True}[recipe.training.transformer_impl]
    chunks: list[torch.nn.Module] = []
    for stage in [None] if stages is None else range(stages):
        chunk: Any = build_model(recipe.model, dmc, config, vp_stage=stage, use_transformer_engine=use_engine)
        if torch.cuda.is_available():
            chunk.cuda()
        if recipe.training.bf16:
            chunk = Float16Module(config, chunk)
        chunk.model_type = ModelType.encoder_or_decoder
        chunks.append(chunk)
    return chunks


def freeze_base(chunks: Sequence[torch.nn.Module]) -> None:
    """Leaves an adapter's decisions alone to learn."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_decision(name))
        # Full recomputation gives gradients to a layer whose input has one only, and the first layer's has none.
        for module in chunk.modules():
            if isinstance(module, LanguageModelEmbedding):
                module.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output

"""A recipe's model as every rank builds it: megatron-core's configuration, this rank's chunks, the frozen base."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version
from torch import Tensor

from megatron_dmc.checkpoint.weights import is_decision
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.model.layer_spec import has_transformer_engine
from megatron_dmc.recipe import Recipe

# Ada and Hopper.
_FIRST_WITH_FP8 = (8, 9)
# 2.2 brought scaling by the current tensor. An adapter's teacher is the student itself, and runs first, without gradients: it
# leaves FP8 weights in the cache without their transpose. Only from 2.6 on the student's pass looks whether that is there.
_FIRST_ENGINE = "2.6"


def why_no_fp8() -> str | None:
    """What FP8 lacks on this machine; None: nothing."""
    if not has_transformer_engine():
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _FIRST_WITH_FP8:
        return "this device has no FP8"
    if not is_te_min_version(_FIRST_ENGINE):
        return f"Transformer Engine is older than {_FIRST_ENGINE} (pip install -U 'megatron-dmc[gpu]')"
    return None


def check_machine(recipe: Recipe) -> None:
    """Raises ConfigError where a recipe's layers or precision are not available here."""
    training = recipe.training
    if torch.cuda.is_available() and recipe.merges and not training.bf16:
        raise ConfigError("training.bf16 is false, but attention on a GPU needs bfloat16; set training.bf16=true")
    if training.transformer_impl == "transformer_engine" and not has_transformer_engine():
        raise ConfigError(
            "training.transformer_impl is transformer_engine, which is not installed; pip install 'megatron-dmc[gpu]', or "
            "set it to auto"
        )
    if training.fp8 is not None and (why := why_no_fp8()) is not None:
        raise ConfigError(f"training.fp8 is {training.fp8}, but {why}; set training.fp8 to null")


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
        "fp8": training.fp8,
        # Scales by the tensor at hand: no history that a recomputation, a teacher's pass or a resumed run would have to share.
        "fp8_recipe": "tensorwise",
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
    """Freezes everything except the adapter's decision projection."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_decision(name))
        # Full recomputation computes gradients only for a layer whose input needs one, and the first layer's needs none.
        for module in chunk.modules():
            if isinstance(module, LanguageModelEmbedding):
                module.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def wrap_chunks(recipe: Recipe, config: TransformerConfig, chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The chunks with megatron-core's gradient buffers and reduction over data-parallel ranks."""
    parallel = recipe.parallel
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if parallel.overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return list(wrapped)


def count_parameters(chunks: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """Parameters of one replica of the whole model, and how many of them train; all ranks call this together."""
    # One copy of what tensor-parallel ranks or the first and last pipeline stage both hold.
    own = [
        parameter
        for chunk in chunks
        for parameter in chunk.parameters()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    counts = torch.tensor([sum(x.numel() for x in own), sum(x.numel() for x in own if x.requires_grad)], device=device)
    dist.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    every, training = counts.tolist()
    return every, training

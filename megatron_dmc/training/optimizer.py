"""megatron-core's optimizer and learning-rate schedule, one phase of a retrofit after the other."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dmc.distributed import cpu
from megatron_dmc.recipe import PhaseConfig, Recipe


def build_optimizer(recipe: Recipe, model_chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """Adam over fp32 main parameters; the phases set its learning rates."""
    cpu.install_adam()
    training, parallel = recipe.training, recipe.parallel
    highest = max(phase.lr for phase in recipe.phases)
    config = OptimizerConfig(
        optimizer="adam",
        lr=highest,
        min_lr=0.0,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap and parallel.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, list(model_chunks))
    _count_padding_as_data(model_chunks)
    return optimizer


def _count_padding_as_data(model_chunks: Sequence[Any]) -> None:
    """Lets the distributed optimizer save the right numbers where a gradient buffer has several buckets.

    For its reshardable format megatron-core (0.16 to 0.19) takes the padding after every bucket out of a copy of the
    buffer, and then cuts each parameter's state out of that copy at the offsets it had with the padding: all parameters
    after the first padded bucket are saved wrong, silently. These sizes are read nowhere else.
    """
    for chunk in model_chunks:
        for buffer in chunk.buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def phase_scheduler(
    optimizer: MegatronOptimizer, phase: PhaseConfig, weight_decay: float, step_in_phase: int
) -> OptimizerParamScheduler:
    """The phase's schedule as it stands after ``step_in_phase`` steps; it has no other state."""
    min_lr = phase.lr if phase.min_lr is None else phase.min_lr
    # Groups carry the rates that the optimizer was built with; they would win over the scheduler's.
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = phase.lr, min_lr
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if phase.lr_warmup_steps else phase.lr,
        max_lr=phase.lr,
        min_lr=min_lr,
        lr_warmup_steps=phase.lr_warmup_steps,
        lr_decay_steps=phase.steps,
        lr_decay_style=phase.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=phase.steps,
        wd_incr_style="constant",
    )
    scheduler.step(increment=step_in_phase)
    return scheduler


def gather_parameters(model_chunks: Sequence[Any]) -> None:
    """Brings the weights up to date on every rank; call it before they are used outside a training step.

    With ``overlap_param_gather`` a rank has the last step's result for its own shard only, until the next training step's
    forward pass has gathered the others'.
    """
    for chunk in model_chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def restart_optimizer(optimizer: MegatronOptimizer) -> None:
    """Adam afresh, as the authors start every phase: main parameters from the model's, no moments, step 0.

    Weights that were edited between two phases would otherwise be undone by the main parameters and the moments.
    """
    optimizer.reload_model_params()
    for inner in _inner_optimizers(optimizer):
        inner.state.clear()
        for group in inner.param_groups:
            group["step"] = 0


def _inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer

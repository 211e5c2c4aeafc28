"""One rank of a simulated world: megatron-core's groups over a fake process group, tensors on the meta device."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dmc.distributed import cpu
from megatron_dmc.distributed.world import seed_weights
from megatron_dmc.plan.stock import use_stock_kernels
from megatron_dmc.recipe import ParallelConfig, Recipe
from megatron_dmc.training.build import build_chunks, freeze_base, megatron_config

META = torch.device("meta")


@contextlib.contextmanager
def fake_rank(parallel: ParallelConfig, world_size: int, rank: int, device: torch.device = META) -> Iterator[None]:
    """This process as ``rank`` of ``world_size``, with tensors on ``device``; collectives return at once and move nothing.

    Raises:
        RuntimeError: this process belongs to a real world, or could use a GPU.
    """
    if dist.is_initialized() or torch.cuda.is_available():
        raise RuntimeError("a plan needs a process of its own, without torch.distributed and without GPUs")
    cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        with cpu.tensors_on(device), torch.compiler.set_stance("force_eager"):
            seed_weights(1)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def stage_chunks(
    recipe: Recipe, device: torch.device = META
) -> tuple[list[torch.nn.Module], list[torch.nn.Module] | None]:
    """What the trainer builds on this rank, and the teacher's copy if it needs one; on the meta device, or a real one."""
    # Transformer Engine's layers have the same parameters; they would want a GPU.
    recipe = replace(recipe, training=replace(recipe.training, transformer_impl="local", fp8=None))
    config = megatron_config(
        recipe,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=True,  # as on a GPU
    )
    with torch.device(device):
        chunks = build_chunks(recipe, config, recipe.dmc if recipe.merges else None)
        teachers = None if recipe.teacher is None else build_chunks(recipe, config, None)
    if recipe.trains_adapter:
        freeze_base(chunks)
    for chunk in chunks:
        chunk.train()
    for chunk in (*chunks, *(teachers or ())):
        use_stock_kernels(chunk)
    for teacher in teachers or ():
        teacher.eval().requires_grad_(False)
    return chunks, teachers

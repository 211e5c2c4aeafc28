"""The optimizer of machines without Transformer Engine, and what megatron-core's distributed one saves of it."""

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.distributed.adam import GroupAdamW
from megatron_dmc.distributed.world import seed_weights
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.recipe import Recipe, recipe_from_dict
from megatron_dmc.training.optimizer import build_optimizer, restart_optimizer
from megatron_dmc.training.optimizer_state import OptimizerState
from tests.support.toy import recipe_values


def groups() -> list[dict[str, object]]:
    torch.manual_seed(0)
    shapes = [[(7, 5), (3,)], [(11,)], []]
    return [
        {"params": [torch.nn.Parameter(torch.randn(shape)) for shape in part], "weight_decay": 0.1 * i}
        for i, part in enumerate(shapes)
    ]


def test_adam_equals_torch_to_the_last_bit() -> None:
    mine, theirs = (
        GroupAdamW(groups(), lr=1e-2, betas=(0.9, 0.95)),
        torch.optim.AdamW(groups(), lr=1e-2, betas=(0.9, 0.95)),
    )
    for step in range(20):
        for one, other in zip(mine.param_groups, theirs.param_groups, strict=True):
            one["lr"] = other["lr"] = 1e-2 / (1 + step)
            for parameter, twin in zip(one["params"], other["params"], strict=True):
                # One parameter gets no gradient in some steps: neither it nor its moments change.
                parameter.grad = None if step == 0 and parameter.numel() == 3 else torch.randn_like(parameter)
                twin.grad = parameter.grad
        mine.step()
        theirs.step()
        if step == 9:
            resumed = GroupAdamW(groups(), lr=1.0)
            for one, other in zip(mine.param_groups, resumed.param_groups, strict=True):
                other["params"] = one["params"]
            resumed.load_state_dict(mine.state_dict())
            mine = resumed
    for one, other in zip(mine.param_groups, theirs.param_groups, strict=True):
        for parameter, twin in zip(one["params"], other["params"], strict=True):
            if parameter.numel() != 3:
                assert torch.equal(parameter, twin)
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(mine.state[parameter][moment], theirs.state[twin][moment])
    assert [group.get("step") for group in mine.param_groups] == [20, 20, None]


def test_adam_refuses_coupled_weight_decay() -> None:
    with pytest.raises(ValueError, match="adam_w_mode must be True"):
        GroupAdamW(groups(), adam_w_mode=False)


@pytest.fixture
def recipe(tmp_path: object) -> Recipe:
    return recipe_from_dict(recipe_values(tmp_path, tmp_path, [{"kind": "compress", "steps": 1}]))  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_process")
def test_state_after_padded_buckets_is_saved_right(recipe: Recipe) -> None:
    """megatron-core alone saves the state of 15 of these 19 parameters from the wrong place."""
    seed_weights(1)
    config = transformer_config(recipe.model)
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=2000
    )
    model = DistributedDataParallel(config, settings, build_model(recipe.model, recipe.dmc, config))
    padded = [bucket.numel_unpadded < bucket.grad_data.numel() for bucket in model.buffers[0].buckets]
    assert any(padded[:-1])
    optimizer = build_optimizer(recipe, [model])
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.main_grad.copy_(torch.randn_like(parameter))
    optimizer.step()
    (inner,) = [part.optimizer for part in optimizer.chained_optimizers]
    saved = OptimizerState(optimizer, model_state([model])).state_dict()
    assert saved["adam_step"] == 1
    moments = {key: [] for key in ("exp_avg", "exp_avg_sq")}
    for entry in nested_values(saved["optimizer"]):
        assert isinstance(entry, ShardedBase)
        moments[entry.key.split(".")[2]].append(entry.data)
    for name, tensors in moments.items():
        assert len(tensors) == len(parameters)
        for tensor, state in zip(
            sorted_flat(tensors), sorted_flat(each[name] for each in inner.state.values()), strict=True
        ):
            assert torch.equal(tensor, state)
    restart_optimizer(optimizer)
    assert OptimizerState(optimizer, model_state([model]), is_loading=True).state_dict()["adam_step"] == 0


def sorted_flat(tensors: object) -> list[torch.Tensor]:
    return sorted((tensor.flatten() for tensor in tensors), key=lambda tensor: tensor.tolist())  # type: ignore[attr-defined]

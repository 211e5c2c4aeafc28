"""Checkpoints hold weights alone: what other libraries' layers keep with them is neither saved nor asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dmc.cli import main
from megatron_dmc.distributed.world import world
from megatron_dmc.model.norm import RMSNorm
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.trainer import Trainer
from tests.support.tensors import assert_same_tensors, checkpoint_tensors
from tests.support.toy import recipe_values, write_recipe, write_text

pytestmark = pytest.mark.usefixtures("one_process")


class RememberingNorm(RMSNorm):
    """As Transformer Engine's modules: they have an extra state, and unpickle what they are given for it."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("must be given none")


def test_a_checkpoint_fits_layers_that_remember_more(tmp_path: Path) -> None:
    write_text(tmp_path)
    values = recipe_values(tmp_path, tmp_path, [{"kind": "pretrain", "steps": 1, "lr": 1e-3}])
    recipe = str(write_recipe(tmp_path, values))
    assert main(["retrofit", recipe]) == 0
    base = tmp_path / "checkpoints" / "final"

    again = [f"checkpoint.directory={tmp_path / 'again'}", f"checkpoint.load_base={base}"]
    with world():
        trainer = Trainer(load_recipe(recipe, again))
        norms = [module for module in trainer.model[0].modules() if isinstance(module, RMSNorm)]
        for norm in norms:
            norm.__class__ = RememberingNorm
        trainer.store.load()
        trainer.store.save_weights("again", 0, 0, None)
    found = tmp_path / "again" / "again"
    assert norms and b"norm._extra_state" not in (found / ".metadata").read_bytes()
    assert_same_tensors(checkpoint_tensors(found), checkpoint_tensors(base))

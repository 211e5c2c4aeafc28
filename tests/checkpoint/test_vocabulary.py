"""A base whose vocabulary is padded when it is loaded: as at conversion, and the same under tensor parallelism."""

from pathlib import Path

import pytest
import torch

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.recipe import load_recipe
from tests.support.llamas import load_megatron, save_random_base
from tests.support.processes import PRODUCT, run, run_ranks
from tests.support.toy import recipe_values, scalars, write_recipe, write_text

VOCABULARY, PADDED = 301, 304


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """Text, and a base whose vocabulary two ranks cannot share."""
    folder = tmp_path_factory.mktemp("padded")
    write_text(folder)
    save_random_base(folder / "hf", vocab_size=VOCABULARY)
    import_hf(folder / "hf", folder / "base")
    return folder


@pytest.mark.usefixtures("one_process")
def test_as_at_conversion(folder: Path, tmp_path: Path) -> None:
    import_hf(folder / "hf", tmp_path / "converted", pad_vocab_to_multiple_of=8)
    expected = dict(load_megatron(tmp_path / "converted").named_parameters())
    base = SavedModel.open(folder / "base")
    model = SavedModel.open(tmp_path / "converted").recipe.model
    network = empty_model(model, None, torch.float32)
    base.load_into([network], placeholder_recipe(model, None))
    for name, weight in network.named_parameters():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.distributed
def test_two_ranks_train_as_one(folder: Path, tmp_path: Path) -> None:
    phases = [{"kind": "compress", "steps": 3, "lr": 5e-3}]
    losses = []
    for ranks in (1, 2):
        run_folder = tmp_path / str(ranks)
        values = recipe_values(folder, run_folder, phases)
        values["model"] |= {"vocab_size": PADDED, "max_position_embeddings": 128}
        values["checkpoint"]["load_base"] = str(folder / "base")
        values["parallel"] = {"tensor_model_parallel_size": ranks}
        recipe = write_recipe(run_folder, values)
        command = (*PRODUCT, "retrofit", recipe)
        for done in [run(*command)] if ranks == 1 else run_ranks(2, *command):
            assert done.returncode == 0, done.stderr
        losses.append(list(scalars(run_folder, "loss/lm").values()))
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_many_more_tokens_are_another_models(folder: Path, tmp_path: Path) -> None:
    values = recipe_values(folder, tmp_path, [{"kind": "compress", "steps": 1, "lr": 1e-3}])
    values["model"] |= {"vocab_size": 3040, "max_position_embeddings": 128}
    values["checkpoint"]["load_base"] = str(folder / "base")
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 301 there, 3040 here"):
        load_recipe(write_recipe(tmp_path, values))

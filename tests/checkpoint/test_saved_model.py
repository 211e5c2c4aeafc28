"""A checkpoint folder that was opened: checked once, the same on all ranks, still the one that was checked."""

import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from megatron_dmc.checkpoint import CheckpointError, CheckpointInfo, SavedModel, load, save_checkpoint
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.distributed import cpu
from megatron_dmc.model.model_config import ModelConfig
from tests.support.toy import recipe_values, write_recipe, write_text

pytestmark = pytest.mark.usefixtures("one_process")

SIZES = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=300,
    max_position_embeddings=64,
)


class Attack:
    """Makes a file when it is unpickled freely."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def save_base(root: Path, dtype: torch.dtype = torch.float32) -> Path:
    network = empty_model(SIZES, None, dtype)
    info = CheckpointInfo("weights", placeholder_recipe(SIZES, None).to_dict(), 0, 0, 0)
    return save_checkpoint(root, "base", model_state([network]), info)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose files were checked, one entry per check."""
    found: list[Path] = []
    check_files = load.check_files

    def note(folder: Path) -> load.Stored:
        found.append(folder)
        return check_files(folder)

    monkeypatch.setattr("megatron_dmc.checkpoint.saved_model.check_files", note)
    return found


def test_opened_once_checked_once(tmp_path: Path, checks: list[Path]) -> None:
    saved = SavedModel.open(save_base(tmp_path, torch.bfloat16))
    assert (saved.merges, saved.dmc, saved.is_adapter, saved.base, saved.dtype) == (
        *(False, None, False, None),
        torch.bfloat16,
    )
    network = empty_model(SIZES, None, torch.bfloat16)
    saved.load_into([network])
    saved.load_into([network])
    assert checks == [saved.folder]


def test_a_run_checks_what_it_starts_from_once(tmp_path: Path, checks: list[Path]) -> None:
    """The base is the teacher as well."""
    write_text(tmp_path)
    pretrain = recipe_values(tmp_path, tmp_path / "first", [{"kind": "pretrain", "steps": 1, "lr": 1e-3}])
    assert main(["retrofit", str(write_recipe(tmp_path / "first", pretrain))]) == 0
    base = tmp_path / "first" / "checkpoints" / "final"
    values = recipe_values(tmp_path, tmp_path / "second", [{"kind": "compress", "steps": 1, "lr": 1e-3}])
    values["checkpoint"]["load_base"], values["distillation"] = str(base), {"weight": 0.5}
    assert main(["retrofit", str(write_recipe(tmp_path / "second", values))]) == 0
    assert checks == [base]


def test_a_base_that_is_given_needs_an_adapter(tmp_path: Path) -> None:
    folder = save_base(tmp_path)
    with pytest.raises(ConfigError, match="base is no adapter, it holds all its weights; leave the base elsewhere out"):
        SavedModel.open(folder, "elsewhere")


def test_what_changed_after_it_was_checked_is_not_read(tmp_path: Path) -> None:
    """torch unpickles .metadata itself: it must be the one that was found harmless."""
    saved, witness = SavedModel.open(save_base(tmp_path)), tmp_path / "witness"
    (saved.folder / ".metadata").write_bytes(pickle.dumps(Attack(witness)))
    with pytest.raises(CheckpointError, match=r"\.metadata has changed since it was checked; start again") as raised:
        saved.load_into([empty_model(SIZES, None, torch.float32)])
    assert "\n" not in str(raised.value)
    assert not witness.exists()


@pytest.mark.parametrize(("kind", "step", "phase"), [("full", 999, 0), ("full", 0, 7), ("weights", 0, 7)])
def test_a_step_beyond_the_recipe(tmp_path: Path, kind: Literal["full", "weights"], step: int, phase: int) -> None:
    info = CheckpointInfo(kind, placeholder_recipe(SIZES, None).to_dict(), step, 0, phase)
    folder = save_checkpoint(tmp_path, "base", model_state([empty_model(SIZES, None, torch.float32)]), info)
    with pytest.raises(CheckpointError, match=rf"base/dmc\.json is damaged: step {step} of 1, in phase {phase} of 1"):
        SavedModel.open(folder)


def test_weights_may_have_been_trained_for_longer(tmp_path: Path) -> None:
    """Of a run whose recipe is not known; conversions write such."""
    info = CheckpointInfo("weights", placeholder_recipe(SIZES, None).to_dict(), 7, 0, 0)
    folder = save_checkpoint(tmp_path, "base", model_state([empty_model(SIZES, None, torch.float32)]), info)
    assert SavedModel.open(folder).info.step == 7


def test_a_recipe_that_is_not_understood(tmp_path: Path) -> None:
    info = CheckpointInfo("weights", placeholder_recipe(SIZES, None).to_dict() | {"color": "red"}, 0, 0, 0)
    folder = save_checkpoint(tmp_path, "base", model_state([empty_model(SIZES, None, torch.float32)]), info)
    with pytest.raises(CheckpointError, match=r"base/dmc\.json holds a recipe that this version .* not understand"):
        SavedModel.open(folder)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("damaged", r"checkpoint \S+ is not whole: common\.pt is missing"),
        ("unseen", rf"rank 1 on {socket.gethostname()} does not see \S+, which rank 0 reads; .*that all nodes share"),
    ],
)
def test_two_ranks_refuse_it_together(tmp_path: Path, scenario: str, message: str) -> None:
    folder = save_base(tmp_path)
    if scenario == "damaged":
        (folder / "common.pt").unlink()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, scenario, str(folder), str(rank)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    lines: list[Any] = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert lines[0] == lines[1] and lines[0].count("\n") == 1
    assert re.match(message, lines[0])


if __name__ == "__main__":
    cpu.install()
    scenario, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder) + "-store", 2), rank=rank, world_size=2)
    if scenario == "unseen" and rank == 1:
        folder = folder.with_name("elsewhere")
    try:
        SavedModel.open(folder)
    except CheckpointError as error:
        print(error)
    dist.destroy_process_group()

"""A signal stops a run after its step, on all ranks; resumed, the run equals one that was never stopped."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_dmc.checkpoint import read_latest
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.signals import stop_request
from megatron_dmc.training.trainer import Trainer
from tests.support.processes import PRODUCT, meeting_place, started
from tests.support.toy import recipe_values, scalars, write_recipe

# The signal comes before the run has taken so many steps.
PHASES = [{"kind": "compress", "steps": 5000, "lr": 5e-3, "start_compression_ratio": 2.0}]


def recipe(data: Path, folder: Path) -> Path:
    return write_recipe(folder, recipe_values(data, folder, PHASES))


def command(recipe: Path, *overrides: str) -> tuple[object, ...]:
    return (*PRODUCT, "retrofit", recipe, "monitor.progress_bar=true", *overrides)


def wait_for_first_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 1/" in line:
            return
    pytest.fail("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_noted_and_its_handler_is_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_request() as request:
        assert request.received is None
        os.kill(os.getpid(), number)
        assert request.received == number
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("one_process")
def test_stopped_by_a_signal_and_resumed_equals_not_stopped(data: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with started(*command(recipe(data, stopped))) as process:
        wait_for_first_step(process)
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    steps = len(scalars(stopped, "loss/lm"))
    assert f"asked to stop: saved after step {steps}; the same command goes on" in said
    assert read_latest(stopped / "checkpoints") == f"step_{steps:08d}"

    for folder, more in ((stopped, 3), (whole, steps + 3)):
        trainer = Trainer(load_recipe(recipe(data, folder), [f"training.exit_after_steps={more}"]))
        trainer.run()
        assert (trainer.step, trainer.stopped) == (steps + 3, False)
    for tag in ("loss/lm", "compression_ratio/noisy", "train/gradient_norm"):
        assert scalars(stopped, tag) == scalars(whole, tag)


@pytest.mark.usefixtures("one_process")
def test_a_run_that_is_done_was_not_stopped(data: Path, tmp_path: Path) -> None:
    with stop_request() as request:
        request.receive(signal.SIGUSR1)
        trainer = Trainer(load_recipe(recipe(data, tmp_path), ["phases.0.steps=1"]), request)
        trainer.run()
    assert not trainer.stopped
    assert (tmp_path / "checkpoints" / "final" / "dmc.json").is_file()


@pytest.mark.distributed
def test_a_signal_to_one_slurm_task_stops_all_of_them_after_the_same_step(data: Path, tmp_path: Path) -> None:
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", **meeting_place()}
    task = command(recipe(data, tmp_path), "parallel.pipeline_model_parallel_size=2")
    with (
        started(*task, **step, SLURM_PROCID="0", SLURM_LOCALID="0") as first,
        started(*task, **step, SLURM_PROCID="1", SLURM_LOCALID="1") as second,
    ):
        wait_for_first_step(first)
        second.send_signal(signal.SIGUSR1)
        said = [process.communicate(timeout=300)[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [75, 75], said
    assert "asked to stop" in said[0]
    assert read_latest(tmp_path / "checkpoints") is not None

"""A signal stops a run after its step, on all ranks, and the run goes on as if it had not been stopped."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_dmc.checkpoint import read_latest
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.schedule import StepPlan
from megatron_dmc.training.signals import stop_request
from megatron_dmc.training.step import StepResult
from megatron_dmc.training.trainer import Trainer
from tests.support.processes import PRODUCT, meeting_place, started
from tests.support.toy import recipe_values, scalars, write_recipe

# The signal comes before the run has taken so many steps.
PHASES = [{"kind": "compress", "steps": 5000, "lr": 5e-3, "start_compression_ratio": 2.0}]


def recipe(data: Path, folder: Path) -> Path:
    return write_recipe(folder, recipe_values(data, folder, PHASES))


def command(recipe: Path, *overrides: str, ranks: int = 1) -> tuple[object, ...]:
    """A run in one process, or in a torchrun of so many."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    return (*launcher, *PRODUCT, "retrofit", recipe, "monitor.progress_bar=true", *overrides)


def wait_for_first_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 1/" in line:
            return
    pytest.fail("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_its_handler_is_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        pytest.skip("the tests were started with nohup")
    with stop_request() as request:
        assert request.received is None
        os.kill(os.getpid(), number)
        assert request.received == number
    assert signal.getsignal(number) == before


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# torchrun hands the second Ctrl-C on as SIGTERM.
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_only_after_ctrl_c_the_next_signal_stops_at_once(second: signal.Signals) -> None:
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
        assert request.received == signal.SIGINT
    with stop_request() as request:
        for number in (signal.SIGUSR1, signal.SIGTERM, second):
            signal.raise_signal(number)
        assert request.received == signal.SIGUSR1


def test_rank_0_alone_answers_ctrl_c(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with stop_request():
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after this step (Ctrl-C again: at once") == 1


class Interrupted(Trainer):
    """Gets both signals within its second step."""

    def _train_step(self, plan: StepPlan) -> StepResult:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return super()._train_step(plan)


@pytest.mark.usefixtures("one_process")
def test_a_second_ctrl_c_ends_a_run_without_saving(data: Path, tmp_path: Path) -> None:
    with stop_request() as request, pytest.raises(KeyboardInterrupt):
        Interrupted(load_recipe(recipe(data, tmp_path)), request).run()
    assert read_latest(tmp_path / "checkpoints") is None


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_stopped_by_a_signal_and_resumed_equals_not_stopped(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with started(*command(recipe(data, stopped))) as process:
        wait_for_first_step(process)
        process.send_signal(number)
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


class Evaluating(Trainer):
    """Is asked to stop in its second step, or in the evaluation after it."""

    asked_in = "step"

    def _train_step(self, plan: StepPlan) -> StepResult:
        self._ask("step", self.step == 1)
        return super()._train_step(plan)

    def evaluate(self, plan: StepPlan) -> StepResult | None:
        self._ask("evaluation", self.step == 2)
        return super().evaluate(plan)

    def _ask(self, place: str, now: bool) -> None:
        if now and place == self.asked_in:
            self.stop_request.receive(signal.SIGTERM)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("place", "evaluations"), [("step", [0, 1]), ("evaluation", [0, 1, 2])])
def test_a_stop_waits_for_no_further_evaluation(data: Path, tmp_path: Path, place: str, evaluations: list[int]) -> None:
    trainer = Evaluating(load_recipe(recipe(data, tmp_path), ["monitor.eval_interval=1"]))
    trainer.asked_in = place
    trainer.run()
    assert (trainer.step, trainer.stopped) == (2, True)
    assert read_latest(tmp_path / "checkpoints") == "step_00000002"
    assert list(scalars(tmp_path, "evaluation/lm_loss")) == evaluations


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


@pytest.mark.distributed
def test_ctrl_c_under_torchrun_saves_too(data: Path, tmp_path: Path) -> None:
    """Workers are in sessions of their own: Ctrl-C reaches torchrun alone, which hands it on."""
    with started(*command(recipe(data, tmp_path), ranks=2)) as launcher:
        wait_for_first_step(launcher)
        launcher.send_signal(signal.SIGINT)
        said, _ = launcher.communicate(timeout=300)
    name = read_latest(tmp_path / "checkpoints")
    assert name is not None, said
    assert said.count("stopping after this step (Ctrl-C again: at once") == 1
    assert f"asked to stop: saved after step {int(name.removeprefix('step_'))};" in said

"""The launcher of the 70B recipe, unchanged, on a real SLURM: a tiny model on two nodes, stopped, requeued, resumed."""

from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.checkpoint import SavedModel, read_latest
from tests.support.slurm_jobs import Cluster
from tests.support.toy import recipe_values, scalars, write_text

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("one_process")]

LAUNCHER = "slurm/llama2_70b_dmc8.sh"
# The signal comes before the run has taken so many.
STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def whole(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    job = cluster.submit(LAUNCHER, *overrides(data, folder))
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), cluster.log(job)
    return folder


def overrides(data: Path, folder: Path) -> list[str]:
    """Turns the recipe into a tiny full training: replaces all that it sets of sizes, layout and teacher."""
    phase = {"kind": "compress", "steps": STEPS, "lr": 5e-3, "start_compression_ratio": 2.0}
    values = recipe_values(data, folder, [phase], local_window=4, target_compression_ratio=4, ratio_control="loss")
    values["data"]["sequence_length"] = 32
    values["training"] |= {"train": "full", "recompute": "none"}
    values["distillation"] = {"weight": 0}
    values["parallel"] = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": "null",
        "context_parallel_size": 1,
    }
    values["checkpoint"] |= {"load_base": "null", "save_every_integer_ratio": False}
    values["monitor"] |= {"eval_interval": 0, "progress_bar": True}
    phases = values.pop("phases")
    return [
        f"phases={phases}",
        *(f"{name}.{key}={_text(value)}" for name in values for key, value in values[name].items()),
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_launcher_trains_on_two_nodes(whole: Path) -> None:
    assert SavedModel.open(whole / "checkpoints" / "final").info.step == STEPS
    assert len(scalars(whole, "loss/lm")) == STEPS


def test_stopped_requeued_and_resumed_equals_not_stopped(
    cluster: Cluster, whole: Path, data: Path, tmp_path: Path
) -> None:
    job = cluster.submit(LAUNCHER, *overrides(data, tmp_path))
    cluster.wait(job, lambda: "step 1/" in cluster.log(job))
    # SLURM sends it to the tasks, too, shortly before the time limit.
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait(job, lambda: cluster.job(job)["Restarts"] == "1")
    latest = read_latest(tmp_path / "checkpoints")
    assert latest is not None and 1 <= int(latest.removeprefix("step_")) < STEPS
    assert not (tmp_path / "checkpoints" / "final").exists()

    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    log = cluster.log(job)
    assert log.count("asked to stop: saved after step") == log.count("stopped and saved; queued again") == 1
    assert SavedModel.open(tmp_path / "checkpoints" / "final").info.step == STEPS
    for tag in ("loss/lm", "compression_ratio/noisy", "train/gradient_norm"):
        assert scalars(tmp_path, tag) == scalars(whole, tag), tag


def test_a_run_that_fails_is_not_queued_again(cluster: Cluster) -> None:
    job = cluster.submit("--export=ALL,PYTHON=false", LAUNCHER)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), cluster.log(job)


def test_a_job_from_another_folder_says_so(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(f"--chdir={tmp_path}", LAUNCHER)
    assert cluster.finish(job)["JobState"] == "FAILED"
    assert f"{tmp_path} is not the repository: submit from its root, or export DMC_HOME" in cluster.log(job)


def test_the_launcher_fits_16_nodes_of_8_gpus(cluster: Cluster) -> None:
    assert "nodes fake[1-16]" in cluster.call("sbatch", "--test-only", "--partition=fake", LAUNCHER)
    with pytest.raises(AssertionError, match="allocation failure"):
        cluster.call("sbatch", "--test-only", "--partition=fake", "--nodes=17", LAUNCHER)

"""What a run saves and where it goes on: weights, optimizer, position and gate, by way of megatron-core's checkpoints."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_dmc.calibration import Calibrator
from megatron_dmc.checkpoint import CheckpointError, CheckpointInfo, SavedModel, full_checkpoints, publish, read_latest
from megatron_dmc.checkpoint.agreement import from_first_rank, on_all_ranks
from megatron_dmc.checkpoint.background import BackgroundWriter
from megatron_dmc.checkpoint.folder import is_checkpoint_name, is_reserved_name
from megatron_dmc.checkpoint.save import stage_checkpoint, write_checkpoint
from megatron_dmc.checkpoint.saved_model import must_be_seen
from megatron_dmc.checkpoint.vocabulary import known_tokens
from megatron_dmc.checkpoint.weights import adapter_may_lack, model_state, only_decisions, set_model_state
from megatron_dmc.config import ConfigError
from megatron_dmc.data.indexed_dataset import content_digest
from megatron_dmc.files import CHECKPOINT_MARK, Claim, why_in_a_checkpoint, why_nothing_new
from megatron_dmc.model.decision_projection import is_buffer
from megatron_dmc.recipe import Recipe
from megatron_dmc.recipe.base import model_differences
from megatron_dmc.recipe.values import shown
from megatron_dmc.training.optimizer import gather_parameters
from megatron_dmc.training.optimizer_state import OptimizerState
from megatron_dmc.training.schedule import plan_step

logger = logging.getLogger(__name__)


def check_outputs(recipe: Recipe) -> None:
    """Raises ConfigError where a run could not write, or would replace what is not its own; before anything is built."""
    root = Path(recipe.checkpoint.directory)
    mine = Path(os.path.realpath(root))
    for setting, folder in (
        ("checkpoint.load_base", recipe.checkpoint.load_base),
        ("distillation.teacher", recipe.distillation.teacher),
    ):
        # os.path.realpath, as Path.resolve raises for links that lead back to themselves.
        place = None if folder is None else Path(os.path.realpath(folder))
        if place is not None and (place == mine or (place.parent == mine and is_checkpoint_name(place.name))):
            raise ConfigError(
                f"{setting} {folder} lies in checkpoint.directory {root}, where this run's checkpoints would replace it; name "
                "another checkpoint.directory"
            )
    for setting, folder in (("monitor.tensorboard", recipe.monitor.tensorboard), ("data.cache", recipe.data.cache)):
        place = None if folder is None else Path(os.path.realpath(folder))
        if place is not None and mine in place.parents and is_reserved_name(place.relative_to(mine).parts[0]):
            raise ConfigError(
                f"{setting} {folder} has a name that this run gives its own files in checkpoint.directory {root}; name "
                "another folder"
            )
    # Only the first rank writes curves: on another node the folder need not be.
    curves = recipe.monitor.tensorboard if not dist.is_initialized() or dist.get_rank() == 0 else None
    for setting, written in (
        ("checkpoint.directory", recipe.checkpoint.directory),
        ("monitor.tensorboard", curves),
    ):
        if written is not None and (problem := why_nothing_new(Path(written) / "any")) is not None:
            raise ConfigError(f"{setting} {written} cannot be written: {problem}; name another folder")
    # One that holds all that is needed may be read-only.
    cache = recipe.data.cache
    if cache is not None and (problem := why_in_a_checkpoint(Path(cache) / "any")) is not None:
        raise ConfigError(f"data.cache {cache}: {problem}; name another folder")
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        is_empty = path.is_dir() and not any(path.iterdir())
        if is_checkpoint_name(path.name) and not is_empty and not (path / CHECKPOINT_MARK).exists():
            raise ConfigError(
                f"{path} is no checkpoint, and this run would replace it with one; move it away, or name another "
                "checkpoint.directory"
            )


def _must_be(name: str, here: Any, there: Any, folder: Path) -> None:
    """Raises ConfigError for a setting that has changed since the run saved ``folder``."""
    if here != there:
        raise ConfigError(
            f"{name} is {shown(here)}, but {folder} was trained with {shown(there)}; set {name}={shown(there)} again, or "
            "start in a new checkpoint.directory with checkpoint.load_base"
        )


def _optimizer(state: OptimizerState | None) -> dict[str, Any]:
    """Its entries of a checkpoint's sharded state dict."""
    return {} if state is None else state.state_dict()


def _calibration(calibrator: Calibrator | None) -> dict[str, Any]:
    """Its entries of a checkpoint's sharded state dict."""
    return {} if calibrator is None else {"calibration": calibrator.state()}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is whole on the disk, what it took in seconds, and its files' size."""

    name: str
    info: CheckpointInfo
    size: int
    seconds: float


class RunStore:
    """A run's checkpoints below ``recipe.checkpoint.directory``.

    Attributes:
        start: ``recipe.checkpoint.load_base``, opened; None for a run from initial weights.
        base: what an adapter's checkpoints say of their base; None where all weights are trained.
        vocabulary: what the checkpoints say of theirs, see ``CheckpointInfo``.
        base_recall_loss: what copying costs the base, see ``StepResult``; None: not known. A full checkpoint of a run that
            trains all weights keeps it, as its base is gone after the first step. An adapter's base can be measured again.
        started_from: the checkpoint that ``load`` found; None for initial weights.
        saved: what has been saved and not reported yet; the reporter takes it out.
    """

    def __init__(
        self, recipe: Recipe, model: list[torch.nn.Module], optimizer: MegatronOptimizer, start: SavedModel | None
    ) -> None:
        self.recipe, self.model, self.optimizer, self.start = recipe, model, optimizer, start
        self.root = Path(recipe.checkpoint.directory)
        self.base = start.as_base_for(self.root) if recipe.trains_adapter and start is not None else None
        rows = recipe.model.vocab_size
        known = rows if start is None else known_tokens(rows, start.vocabulary, recipe.data.tokenizer)
        self.vocabulary = known if known < rows else None
        self.datasets = {prefix: content_digest(prefix) for prefix in recipe.data.train}
        self.base_recall_loss: float | None = None
        self.started_from: Path | None = None
        self.saved: deque[SavedCheckpoint] = deque()
        self.background = BackgroundWriter() if recipe.checkpoint.async_save else None

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The last checkpoint is whole, or has failed, before a run ends."""
        if kind is None:
            self.wait()
        elif self.background is not None:
            self.background.close()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within it no other run writes into the folder. Raises CheckpointError on all ranks if one does already."""
        claim: Claim | None = None
        with on_all_ranks(f"cannot write into {self.root}"):
            if dist.get_rank() == 0:
                claim = Claim(self.root)
                if claim.problem is not None:
                    raise CheckpointError(claim.problem)
        try:
            yield
        finally:
            if claim is not None:
                claim.close()

    def wait(self) -> None:
        """Until every checkpoint is whole; raises CheckpointError on all ranks if a save in the background has failed."""
        if self.background is not None:
            self.background.wait()

    def poll(self) -> None:
        """Raises CheckpointError on all ranks if a save in the background has failed; between two steps."""
        if self.background is not None:
            self.background.poll()

    def load(
        self, calibrator_at: Callable[[int], Calibrator | None] = lambda step: None
    ) -> tuple[int, float, float | None]:
        """Resumes from ``latest``, else starts from ``load_base``, else from the initial weights.

        Args:
            calibrator_at: what is to go on calibrating after so many steps of the run, if anything is.

        Returns:
            Steps done, and the share of merged tokens and the multiplier that the ratio's control starts from.

        Raises:
            CheckpointError, ConfigError: the checkpoint is damaged, or the recipe differs where it must not.
        """
        with on_all_ranks(f"cannot read {self.root / 'latest'}"):
            latest = self._latest() if dist.get_rank() == 0 else None
        # What rank 0 reads: another node may still see the file as it was before.
        latest = from_first_rank(latest)
        if latest is not None:
            self.started_from = self.root / latest
            return self._resume(self.started_from, calibrator_at)
        if self.start is not None:
            self.started_from = self.start.folder
            self.start.load_into(self.model, self.recipe)
        return 0, 0.0, None

    def _latest(self) -> str | None:
        """The name of the checkpoint to go on from, None at a run's start.

        Raises:
            CheckpointError: ``latest`` names one that is gone.
        """
        latest = read_latest(self.root)
        if latest is None and (full := full_checkpoints(self.root)):
            # A run that was killed before it could write the name, or a copy that lacks the file: no work is begun anew.
            logger.warning(
                "warning: %s is missing; resuming from %s, the newest full checkpoint", self.root / "latest", full[-1]
            )
            return full[-1]
        if latest is not None and not os.path.lexists(self.root / latest):
            raise CheckpointError(
                f"{self.root / 'latest'} names {latest}, which is not there; {self._other_start(latest)}"
            )
        return latest

    def _other_start(self, unfit: str) -> str:
        """What to do where a checkpoint cannot be resumed from."""
        if others := [name for name in full_checkpoints(self.root) if name != unfit]:
            return f"write {others[-1]} into {self.root / 'latest'} to resume from there"
        return "name a new checkpoint.directory to begin anew"

    def _has_trained(self, step: int) -> bool:
        """Whether the optimizer has a state after so many steps; ``calibrate`` takes none, and each phase begins with none."""
        return plan_step(self.recipe.phases, self.recipe.dmc, step - 1).phase.kind != "calibrate"

    def _learned(self, state: dict[str, Any]) -> dict[str, Any]:
        return only_decisions(state) if self.recipe.trains_adapter else state

    def _resume(
        self, folder: Path, calibrator_at: Callable[[int], Calibrator | None]
    ) -> tuple[int, float, float | None]:
        with on_all_ranks(f"cannot resume from {folder}"):
            if dist.get_rank() > 0:
                must_be_seen(folder, "resumes from")
        try:
            saved = SavedModel.open(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._other_start(folder.name)}") from error
        info = saved.info
        if info.kind != "full":
            raise CheckpointError(
                f"{self.root / 'latest'} names {folder.name}, which holds weights only; write the name of a step_* folder "
                "into it, or start in a new checkpoint.directory with checkpoint.load_base"
            )
        self._check_same_run(saved)
        if saved.is_adapter and self.start is not None:
            base = saved.with_base(self.start.base or self.start).base
            assert base is not None
            base.load_into(self.model, self.recipe)
        state = model_state(self.model)
        optimizer = OptimizerState(self.optimizer, state, is_loading=True) if self._has_trained(info.step) else None
        calibrator = calibrator_at(info.step)
        state = saved.load(
            {**self._learned(state), **_optimizer(optimizer), "merge_fraction": 0.0, **_calibration(calibrator)},
            expected_model=self.recipe.to_dict()["model"],
            may_be_missing=is_buffer,
        )
        set_model_state(self.model, state, adapter_may_lack if self.recipe.trains_adapter else is_buffer)
        if optimizer is not None:
            optimizer.load(state)
        if calibrator is not None:
            calibrator.load(state["calibration"])
        # Checkpoints of older versions have none, and no multiplier.
        known = state.get("base_recall_loss")
        self.base_recall_loss = known if self._holds_out_the_same(saved) else None
        return info.step, state["merge_fraction"], state.get("multiplier")

    def _holds_out_the_same(self, checkpoint: SavedModel) -> bool:
        """Whether an evaluation reads the samples that it read when this checkpoint was saved."""
        mine, saved = self.recipe, checkpoint.recipe
        return (mine.data.valid, mine.monitor.eval_samples) == (saved.data.valid, saved.monitor.eval_samples)

    def _check_same_run(self, checkpoint: SavedModel) -> None:
        """The data's position is steps x batch: what it depends on must not change under a run."""
        folder, info = checkpoint.folder, checkpoint.info
        mine, saved = self.recipe.to_dict(), checkpoint.recipe.to_dict()
        changed = [name.removeprefix("model.") for name in model_differences(saved["model"], mine["model"])]
        for section, names in (
            ("model", tuple(changed)),
            ("training", ("train", "global_batch_size", "bf16")),
            ("distillation", ("weight", "direction", "temperature", "top_k") if self.recipe.distills else ("weight",)),
            ("data", ("sequence_length", "seed", "train", "reset_at_documents")),
            ("dmc", tuple(mine["dmc"])),
        ):
            for name in names:
                _must_be(f"{section}.{name}", mine[section][name], saved[section][name], folder)
        # It may have been moved; what it holds is not written down.
        teacher, before = self.recipe.teacher, checkpoint.recipe.teacher
        if teacher and before and os.path.realpath(teacher) != os.path.realpath(before) and dist.get_rank() == 0:
            logger.warning(
                "warning: the teacher is %s, of %s it was %s; if that is another model, name the one before",
                *(teacher, folder, before),
            )
        # Versions that know no repeats had none.
        was_known = "repeat_fraction" in info.recipe["data"]
        repeated = checkpoint.recipe.repeat_fraction if was_known else 0.0
        _must_be("data.repeat_fraction", self.recipe.repeat_fraction, repeated, folder)
        for prefix, digest in self.datasets.items():
            if info.datasets is not None and info.datasets.get(prefix) != digest:
                raise ConfigError(
                    f"dataset {prefix} has other contents than the one that {folder} was trained on; put that one back, or "
                    "start in a new checkpoint.directory with checkpoint.load_base"
                )
        # Learning rates may change on the way; what decides which phase a step belongs to may not.
        for i, (here, there) in enumerate(zip(mine["phases"], saved["phases"], strict=False)):
            for name in ("kind", "steps", "start_compression_ratio"):
                _must_be(f"phases.{i}.{name}", here[name], there[name], folder)
        if len(mine["phases"]) != len(saved["phases"]):
            raise ConfigError(
                f"phases are {len(mine['phases'])}, but {folder} was trained with {len(saved['phases'])}; set them back, or "
                "start in a new checkpoint.directory with checkpoint.load_base"
            )

    def save_weights(self, name: str, step: int, phase: int, ratio: float | None) -> None:
        self.wait()
        gather_parameters(self.model)
        self._save(name, self._learned(model_state(self.model)), self._info("weights", step, phase, ratio))

    def save_full(
        self,
        step: int,
        phase: int,
        ratio: float | None,
        merge_fraction: float,
        multiplier: float | None,
        calibrator: Calibrator | None = None,
    ) -> None:
        """Saves everything a resume needs, in any layout; ``latest`` is moved to it when it is whole.

        Args:
            calibrator: one that is not finished.
        """
        # Before the state is gathered: the host's memory holds one checkpoint at a time.
        self.wait()
        gather_parameters(self.model)
        state = model_state(self.model)
        optimizer = OptimizerState(self.optimizer, state) if self._has_trained(step) else None
        state = {
            **self._learned(state),
            **_optimizer(optimizer),
            "merge_fraction": merge_fraction,
            **_calibration(calibrator),
        }
        if multiplier is not None:
            state["multiplier"] = multiplier
        if self.base_recall_loss is not None and not self.recipe.trains_adapter:
            state["base_recall_loss"] = self.base_recall_loss
        self._save(f"step_{step:08d}", state, self._info("full", step, phase, ratio))

    def _save(self, name: str, state: dict[str, Any], info: CheckpointInfo) -> None:
        """Writes a checkpoint now, or in the background: then training may go on as soon as this returns."""
        began = time.perf_counter()
        staged = stage_checkpoint(state, copies=self.background is not None)

        def write(group: dist.ProcessGroup | None = None) -> None:
            folder = write_checkpoint(self.root, name, staged, info, self.recipe.data.tokenizer, group)
            size = sum(path.stat().st_size for path in folder.rglob("*")) if dist.get_rank() == 0 else 0
            self.saved.append(SavedCheckpoint(name, info, size, time.perf_counter() - began))
            if info.kind == "full":
                publish(self.root, name, self.recipe.checkpoint.keep_last, group)

        if self.background is None:
            write()
        else:
            self.background.start(write)

    def _info(self, kind: Literal["full", "weights"], step: int, phase: int, ratio: float | None) -> CheckpointInfo:
        return CheckpointInfo(
            kind=kind,
            recipe=self.recipe.to_dict(),
            step=step,
            consumed_samples=step * self.recipe.training.global_batch_size,
            phase=phase,
            compression_ratio=ratio,
            datasets=self.datasets,
            base=self.base,
            vocabulary=self.vocabulary,
        )

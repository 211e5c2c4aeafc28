"""One object for a checkpoint's folder that was opened and checked."""

import hashlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.checkpoint.agreement import from_first_rank, on_all_ranks
from megatron_dmc.checkpoint.folder import CheckpointError, CheckpointInfo
from megatron_dmc.checkpoint.load import Stored, check_files, load_tensors, must_fit
from megatron_dmc.checkpoint.vocabulary import fill_added_rows
from megatron_dmc.checkpoint.weights import adapter_may_lack, is_decision, model_state, only_decisions, set_model_state
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.files import CHECKPOINT_MARK
from megatron_dmc.model.decision_projection import is_buffer
from megatron_dmc.recipe import Recipe, recipe_from_dict
from megatron_dmc.recipe.base import added_tokens

# What a merging model's weights mean depends on these.
MEANING = (
    "decision_source",
    "decision_bias",
    "decision_scale",
    "omega_floor",
    "local_window",
    "operation",
    "window_size",
    "per_layer",
)
_BLOCK_BYTES = 1 << 16
_BLOCKS_PER_FILE = 4


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint that is whole and safe to read: a base's, a retrofit's, or an adapter's. :meth:`open` makes it.

    Every rank of the process group makes and asks it together; what fails on one rank fails on all, in one line.

    Attributes:
        folder: the checkpoint's.
        recipe: the settings of the run that wrote it.
    """

    folder: Path
    recipe: Recipe
    _stored: Stored
    _given_base: "str | Path | SavedModel | None" = None

    @classmethod
    def open(cls, folder: "str | Path", base: "str | Path | SavedModel | None" = None) -> "SavedModel":
        """Makes sure that a checkpoint is whole and safe to read; loads no tensors.

        Args:
            folder: one checkpoint's.
            base: where an adapter's base is now, or the base itself; None: where it was. It is opened when it is needed.

        Raises:
            CheckpointError: the folder or one of its files is absent, cut short, from a newer version, or would run code.
            ConfigError: ``base`` is given for a checkpoint that is no adapter.
        """
        folder = Path(folder)
        found: tuple[Stored, Recipe] | None = None
        with on_all_ranks(f"cannot open {folder}"):
            if dist.get_rank() == 0:
                stored = check_files(folder)
                found = stored, _recipe(folder, stored.info)
            else:
                must_be_seen(folder, "reads")
        stored, recipe = from_first_rank(found)
        opened = cls(folder, recipe, stored)
        return opened if base is None else opened.with_base(base)

    def with_base(self, base: "str | Path | SavedModel") -> "SavedModel":
        """The same adapter, its base elsewhere; raises ConfigError for a checkpoint that is no adapter."""
        if not self.is_adapter:
            where = base.folder if isinstance(base, SavedModel) else base
            raise ConfigError(f"{self.folder} is no adapter, it holds all its weights; leave the base {where} out")
        return replace(self, _given_base=base)

    @property
    def info(self) -> CheckpointInfo:
        """What the checkpoint says of itself."""
        return self._stored.info

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer; absent where the model came without."""
        return self.folder / "tokenizer"

    @property
    def merges(self) -> bool:
        """Whether the model has decisions: it merges, or is to."""
        return self.recipe.merges

    @property
    def dmc(self) -> DMCConfig | None:
        """The decisions' settings; None for a base model."""
        return self.recipe.dmc if self.merges else None

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows. The embedding's rows after theirs pad it, for tensor parallelism."""
        return self.info.vocabulary or self.recipe.model.vocab_size

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint holds decisions only, and needs its base for all other weights."""
        return self.info.base is not None

    @cached_property
    def base(self) -> "SavedModel | None":
        """The base that an adapter was trained on, opened when it is first asked for; None for any other checkpoint.

        Raises:
            CheckpointError: it is not there, it is damaged, or it is another.
        """
        if self.info.base is None:
            return None
        base = self._given_base
        if not isinstance(base, SavedModel):
            base = self._open_base(Path(self.folder, self.info.base["folder"]) if base is None else Path(base))
        if base.digest != self.info.base["digest"]:
            raise CheckpointError(
                f"{self.folder} is an adapter of another base than {os.path.normpath(base.folder)}; put its own back, or "
                "name where it is now (checkpoint.load_base of a recipe, --base of a command)"
            )
        return base

    def _open_base(self, folder: Path) -> "SavedModel":
        with on_all_ranks(f"cannot open {folder}"):
            if dist.get_rank() == 0 and not folder.exists():
                raise CheckpointError(
                    f"{self.folder} is an adapter, and its base {os.path.normpath(folder)} is not there; put it back, or "
                    "name where it is now with --base (inspect, generate and convert-to-hf have it)"
                )
        return SavedModel.open(folder)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the stored weights: the embedding's, or of an adapter, which has none, the decisions'.

        Raises:
            CheckpointError: the checkpoint holds no language model.
        """
        for name, (_, dtype) in self._stored.entries.items():
            # Not the optimizer's, whose names begin with its own.
            is_weight = name.startswith("embedding.word_embeddings.") or (
                name.startswith("decoder.") and is_decision(name) and not is_buffer(name)
            )
            if is_weight and dtype is not None and dtype.is_floating_point:
                return dtype
        raise CheckpointError(f"checkpoint {self.folder} holds no weights of a language model")

    @cached_property
    def digest(self) -> str:
        """Tells the checkpoint from another: SHA-256 over its small files and some blocks of each large one."""
        digest = hashlib.sha256()
        with on_all_ranks(f"cannot read {self.folder}"):
            if dist.get_rank() == 0:
                files = self.folder / CHECKPOINT_MARK, self.folder / ".metadata", *self.folder.glob("*.distcp")
                for path in sorted(files):
                    size = path.stat().st_size
                    digest.update(f"{path.name} {size}\n".encode())
                    with open(path, "rb") as file:
                        for i in range(_BLOCKS_PER_FILE):
                            file.seek(max(size - _BLOCK_BYTES, 0) * i // (_BLOCKS_PER_FILE - 1))
                            digest.update(file.read(_BLOCK_BYTES))
        return str(from_first_rank(digest.hexdigest()))

    def as_base_for(self, root: Path) -> dict[str, str]:
        """What an adapter's checkpoints in ``root`` say of their base: its folder, seen from them, and its digest.

        The base of one that goes on from an adapter is that adapter's own.
        """
        base = self.base or self
        return {"folder": os.path.relpath(base.folder, root / "any"), "digest": base.digest}

    @property
    def is_calibrating(self) -> bool:
        """Whether it was saved in the middle of a calibration: there are no decisions yet."""
        phases, phase = self.recipe.phases, self.info.phase
        return phases[phase].kind == "calibrate" and self.info.step < sum(x.steps for x in phases[: phase + 1])

    def check_has_merged(self) -> None:
        """Raises ConfigError for a retrofit from before its first merging phase: its decisions mean nothing yet."""
        begun = self.info.phase + (not self.is_calibrating)
        if not any(x.decides for x in self.recipe.phases[:begun]):
            raise ConfigError(f"{self.folder} was saved before its run began to merge; name a later checkpoint")

    def check_fits(self, recipe: Recipe) -> None:
        """Whether the weights mean in ``recipe``'s model what they meant in their own; an adapter's base must be there.

        Raises:
            CheckpointError, ConfigError: a retrofit with other decisions than the recipe's, or an adapter without its base.
        """
        if self.merges:
            if not recipe.merges:
                raise ConfigError(
                    f"{self.folder} is a retrofitted model, but no phase merges: its decisions would be dropped"
                )
            for name in MEANING:
                if name == "omega_floor" and not recipe.dmc.merges:
                    continue
                mine, theirs = getattr(recipe.dmc, name), getattr(self.recipe.dmc, name)
                if mine != theirs:
                    raise ConfigError(
                        f"dmc.{name} is {mine!r}, but {self.folder} was trained with {theirs!r}; set it to that"
                    )
            if recipe.trains_adapter and not self.is_adapter:
                raise ConfigError(
                    f"{self.folder} is a retrofit with all its weights trained: an adapter needs a base, or an adapter of "
                    "one; name that in checkpoint.load_base, or set training.train full"
                )
        if self.is_adapter:
            # Opened for its errors.
            _ = self.base

    def check_teaches(self, recipe: Recipe) -> None:
        """Raises ConfigError unless the model is a base whose logits can be compared with those of ``recipe``'s model."""
        if self.merges:
            raise ConfigError(f"{self.folder} is a retrofitted model; name its base in distillation.teacher")
        saved, mine = self.recipe.model.vocab_size, recipe.model.vocab_size
        if saved != mine and not added_tokens(saved, mine):
            remedy = "name a base with the same tokenizer"
            if added_tokens(mine, saved):
                remedy = (
                    f"if {saved - mine} of its rows pad it, set model.vocab_size={saved}, or name the base without them"
                )
            raise ConfigError(
                f"the teacher {self.folder} has a vocabulary of {saved}, model.vocab_size is {mine}: their logits cannot be "
                f"compared; {remedy}"
            )

    def load_into(self, model_chunks: Sequence[torch.nn.Module], recipe: Recipe | None = None) -> None:
        """Loads the weights, of any layout. Decision weights that a base lacks keep their zeros; tokens that pad its
        vocabulary get the mean of the others (:func:`fill_added_rows`).

        Args:
            model_chunks: this rank's part of ``recipe``'s model.
            recipe: None: the checkpoint's own.

        Raises:
            CheckpointError, ConfigError: as :meth:`check_fits`; or the weights are damaged, or another model's.
        """
        recipe = recipe or self.recipe
        self.check_fits(recipe)
        state, lacks = model_state(model_chunks), is_buffer
        if self.base is not None:
            self.base.load_into(model_chunks, recipe)
            state, lacks = only_decisions(state), adapter_may_lack
        elif not self.merges:
            lacks = is_decision
        vocabulary, expected = self.recipe.model.vocab_size, recipe.to_dict()["model"]
        added = added_tokens(vocabulary, recipe.model.vocab_size)
        expected["vocab_size"] -= added
        state = self.load(state, expected_model=expected, may_be_missing=lacks)
        set_model_state(model_chunks, state, lacks)
        if added:
            fill_added_rows(model_chunks, vocabulary)

    def load(
        self,
        sharded_state_dict: dict[str, Any],
        *,
        expected_model: Mapping[str, Any] | None = None,
        may_be_missing: Callable[[str], bool] | None = None,
        in_parts: bool = False,
    ) -> dict[str, Any]:
        """Loads what ``sharded_state_dict`` asks for; nothing but tensors and plain values is ever unpickled.

        Args:
            sharded_state_dict: as for ``dist_checkpointing.load``; it may ask for less than the checkpoint holds.
            expected_model: ``Recipe.to_dict()["model"]``: every setting that changes what the weights mean must be the
                checkpoint's own.
            may_be_missing: tells by its checkpoint key whether a tensor may be absent there; the result lacks it too.
            in_parts: other calls load what this one leaves out, such as the other layers of a stack.

        Returns:
            The loaded state dict, with the checkpoint's plain values.

        Raises:
            CheckpointError: the checkpoint is another model's, its data is damaged, or its metadata is no longer what was
                checked.
        """
        return load_tensors(
            self.folder,
            self._stored,
            sharded_state_dict,
            expected_model=expected_model,
            may_be_missing=may_be_missing,
            in_parts=in_parts,
        )

    def check_holds(
        self,
        sharded_state_dict: dict[str, Any],
        *,
        expected_model: Mapping[str, Any] | None = None,
        may_be_missing: Callable[[str], bool] | None = None,
    ) -> None:
        """Raises the CheckpointError that :meth:`load` would raise for what is absent or has another shape; loads nothing."""
        with on_all_ranks(f"cannot load {self.folder}"):
            must_fit(self.folder, self._stored, sharded_state_dict, expected_model, may_be_missing)


def must_be_seen(folder: Path, reads: str) -> None:
    """Raises CheckpointError if this rank does not see a folder that rank 0 ``reads``."""
    if not folder.is_dir():
        raise CheckpointError(
            f"rank {dist.get_rank()} on {socket.gethostname()} does not see {folder}, which rank 0 {reads}; the folder must "
            "be on storage that all nodes share"
        )


def _recipe(folder: Path, info: CheckpointInfo) -> Recipe:
    try:
        recipe = recipe_from_dict(info.recipe)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}/{CHECKPOINT_MARK} holds a recipe that this version of megatron_dmc does not understand: {error}"
        ) from None
    # Where only weights are saved, the step tells how long they were trained, and nothing goes on from there.
    goes_on_beyond = info.kind == "full" and info.step > recipe.total_steps
    if goes_on_beyond or info.phase >= len(recipe.phases):
        raise CheckpointError(
            f"{folder}/{CHECKPOINT_MARK} is damaged: step {info.step} of {recipe.total_steps}, in phase {info.phase} of "
            f"{len(recipe.phases)} (counted from 0)"
        )
    return recipe

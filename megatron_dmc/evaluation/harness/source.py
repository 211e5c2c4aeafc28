"""What is evaluated: a Hugging Face folder, or a checkpoint, which is exported when it is needed."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_config, read_json
from megatron_dmc.evaluation.exported.model import check_cache_dtype
from megatron_dmc.files import CHECKPOINT_MARK, why_no_checkpoint, why_no_folder
from megatron_dmc.hf.adapter import ADAPTER_FILE

# Names of a model's length in config.json, in lm-eval's order.
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")


@dataclass(frozen=True)
class Source:
    """A model that was looked at and not loaded. :func:`open_source` makes it.

    Attributes:
        folder: as the user named it.
        tokenizer: the folder of its tokenizer.
        positions: tokens that it reads at most; None: it does not say.
        vocabulary: rows of its embedding; None: it does not say.
        merges: it was retrofitted.
        is_checkpoint: it is a checkpoint of megatron_dmc, not a Hugging Face folder.
    """

    folder: Path
    tokenizer: Path
    positions: int | None
    vocabulary: int | None
    merges: bool = False
    is_checkpoint: bool = False

    def check_cache_dtype(self, cache_dtype: str | None) -> None:
        """Raises ConfigError unless the model's cache can be kept in it, see DMCConfiguration."""
        check_cache_dtype(self.folder, self.merges, cache_dtype)

    @contextlib.contextmanager
    def as_hugging_face(self) -> Iterator["Source"]:
        """A Hugging Face folder of the model: itself, or a temporary export (TMPDIR says where), which goes with the block."""
        if not self.is_checkpoint:
            yield self
            return
        from megatron_dmc.convert.to_hf import export_hf

        with tempfile.TemporaryDirectory(prefix="megatron-dmc-") as temporary:
            folder = Path(temporary) / "export"
            export_hf(self.folder, folder)
            yield _hugging_face(folder)


def open_source(folder: Path) -> Source:
    """Looks at a folder; loads nothing.

    Raises:
        ConfigError: it is neither, or a Hugging Face folder that cannot be evaluated as it is.
        CheckpointError: the checkpoint is damaged.
    """
    if (problem := why_no_folder(folder)) is not None:
        raise ConfigError(f"{folder} {problem}; name the folder of a Hugging Face model or of a checkpoint")
    if (folder / "config.json").exists() and not (folder / CHECKPOINT_MARK).exists():
        return _hugging_face(folder)
    if (problem := why_no_checkpoint(folder)) is not None:
        raise ConfigError(problem)
    return _checkpoint(folder)


def _hugging_face(folder: Path) -> Source:
    config: dict[str, Any] = read_json(folder / "config.json")
    if (folder / ADAPTER_FILE).exists():
        raise ConfigError(
            f"{folder} is an adapter without its base; evaluate the checkpoint that it was exported from, or export that "
            "without --adapter"
        )
    is_export = "dmc" in config
    if is_export:
        read_config(folder)
    elif "auto_map" in config:
        raise ConfigError(
            f"{folder} brings code of its own, which is not run here; evaluate it with lm_eval --model hf --model_args "
            f"pretrained={folder},trust_remote_code=True"
        )
    if not any(folder.glob("tokenizer*")):
        raise ConfigError(f"{folder} holds no tokenizer; save one there with save_pretrained")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    positions = next((text[name] for name in _POSITIONS if isinstance(text.get(name), int)), None)
    return Source(folder, folder, positions, text.get("vocab_size"), is_export)


def _checkpoint(folder: Path) -> Source:
    from megatron_dmc.checkpoint import SavedModel
    from megatron_dmc.convert.single_process import single_process

    with single_process():
        saved = SavedModel.open(folder)
        if saved.merges:
            saved.check_has_merged()
        if not any(saved.tokenizer.glob("tokenizer*")):
            raise ConfigError(
                f"{folder} holds no tokenizer, so no task can be read; convert its base with its tokenizer"
            )
        if saved.is_adapter:
            # A base that has been moved is missed now, not when the export begins.
            _ = saved.base
        positions = saved.recipe.model.max_position_embeddings
        return Source(folder, saved.tokenizer, positions, saved.vocabulary, saved.merges, is_checkpoint=True)

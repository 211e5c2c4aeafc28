"""Output folders that appear whole or not at all, and the special tokens that travel with a model."""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from megatron_dmc.checkpoint.folder import flush_to_disk
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_json
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.errors import DMCError
from megatron_dmc.files import ABSENT, is_full_disk, why_no_file, why_nothing_new

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
# Each holds one JSON object, and transformers reads it with a model or its tokenizer.
_OBJECTS = (
    *("config.json", GENERATION_CONFIG, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.json",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, under a temporary name beside ``target``; it gets its name once the block has ended well.

    Raises:
        ConfigError: ``target`` exists and is not an empty folder.
        KeyboardInterrupt: with what has become of ``target``.
    """
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    left = re.compile(rf"\.{re.escape(target.name)}\.converting-[0-9a-f]{{8}}")
    for path in sorted(path for path in target.parent.iterdir() if left.fullmatch(path.name)):
        logger.warning("warning: %s was left by a killed conversion; remove it unless one writes it now", path)
    temporary = target.with_name(f".{target.name}.converting-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush_to_disk(path)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        # Replaces an empty folder, and nothing else.
        temporary.rename(target)
        flush_to_disk(target.parent)
    except KeyboardInterrupt:
        is_whole = not temporary.exists() and target.is_dir() and any(target.iterdir())
        shutil.rmtree(temporary, ignore_errors=True)
        raise KeyboardInterrupt(f"{target} is whole" if is_whole else "nothing was written") from None
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, DMCError):
            raise type(error)(str(error).replace(str(temporary), str(target))) from None
        if isinstance(error, OSError) and is_full_disk(error):
            # It may name the file that was read.
            raise ConfigError(
                f"cannot write {target}: {error.strerror}; nothing was written, free some space or name another disk"
            ) from None
        raise


def check_output(target: Path, *sources: Path) -> None:
    """Raises ConfigError unless ``target`` does not exist or is an empty folder, and a new one can take its place.

    Args:
        sources: folders that are read. What would be written inside one is refused, as it is inside any checkpoint.
    """
    for source in sources:
        if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
            raise ConfigError(
                f"{target} cannot be made: it would lie inside {source}, which is read; name another folder"
            )
    if (problem := why_nothing_new(target)) is not None:
        raise ConfigError(f"{target} cannot be made: {problem}; name another folder")
    if target.name in ("", "..") or os.path.ismount(target):
        raise ConfigError(f"{target} cannot be replaced by a new folder; name one inside it")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or next(target.iterdir(), None) is not None)):
        raise ConfigError(f"{target} exists; name a folder that does not, or remove it first")


def check_companions(folder: Path) -> None:
    """Raises ConfigError, with the file's name, for one that is copied with a model and that transformers could not read."""
    for name in _OBJECTS:
        if os.path.lexists(folder / name):
            read_json(folder / name)
    problem = why_no_file(folder / "tokenizer.json")
    if problem not in (None, ABSENT):
        raise ConfigError(f"{folder / 'tokenizer.json'} {problem}")


def special_tokens(folder: Path, vocab_size: int) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as a model's or a tokenizer's folder tells.

    As in transformers, generation_config.json goes before config.json; the tokenizer is asked where they name no end.

    Args:
        vocab_size: the model's.

    Raises:
        ConfigError: one of them, or another special token of generation_config.json, is not a token of the model.
    """
    tokens: dict[str, Any] = {}
    for name in ("config.json", GENERATION_CONFIG):
        if (folder / name).is_file():
            content = read_json(folder / name)
            for token, value in content.items():
                if token in SPECIAL_TOKENS or (name == GENERATION_CONFIG and token.endswith("_token_id")):
                    _check_special_token(folder / name, token, value, vocab_size)
            tokens |= {token: content[token] for token in SPECIAL_TOKENS if content.get(token) is not None}
    if "eos_token_id" not in tokens and (folder / "tokenizer.json").is_file():
        tokens = _tokens_of_tokenizer(folder) | tokens
    return tokens


def _check_special_token(path: Path, name: str, value: Any, vocab_size: int) -> None:
    """transformers takes one id for a beginning and for padding, and may have several ends."""
    ids = value if isinstance(value, list) and value and name not in ("bos_token_id", "pad_token_id") else [value]
    if value is not None and not all(type(index) is int and 0 <= index < vocab_size for index in ids):
        several = "" if ids is not value else " (each of a list)"
        raise ConfigError(
            f"{path}: {name} must be null or a token of the model, 0 to {vocab_size - 1}{several}, got {value!r}; set it "
            "to null, or to a token that the model has"
        )


def _tokens_of_tokenizer(folder: Path) -> dict[str, Any]:
    # checked first, so that what follows can be read
    tokens: dict[str, Any] = {"eos_token_id": load_tokenizer(folder).eod}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for name in ("bos_token", "pad_token"):
            token = settings.get(name)
            # transformers writes either the string or a whole added token
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and (index := backend.token_to_id(content)) is not None:
                tokens[f"{name}_id"] = index
    return tokens


def keep_special_tokens(tokenizer: Path, tokens: dict[str, Any], vocab_size: int) -> None:
    """Adds to a tokenizer's folder those of ``tokens`` that it lacks: only a model's config.json named them."""
    if special_tokens(tokenizer, vocab_size) != tokens:
        path = tokenizer / GENERATION_CONFIG
        content = read_json(path) if path.is_file() else {}
        tokenizer.mkdir(exist_ok=True)
        write_json(path, content | tokens)


def take_tokenizer_as_it_is(folder: Path) -> None:
    """Has AutoTokenizer read tokenizer.json for a model type that transformers does not know, as it does for its base's."""
    path = folder / "tokenizer_config.json"
    if path.is_file() and (folder / "tokenizer.json").is_file():
        write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

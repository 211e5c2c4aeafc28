"""Output folders that appear whole or not at all, and the tokenizer files that travel with a model."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_json
from megatron_dmc.training.checkpoint_folder import flush_to_disk
from megatron_dmc.training.tokenizer import load_tokenizer

GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# generation_config.json belongs to them: its end-of-text tokens can be more than the tokenizer's one.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    GENERATION_CONFIG,
)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, under a temporary name beside ``target``; it gets its name once the block has ended well.

    Raises:
        ConfigError: ``target`` exists and is not an empty folder.
    """
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.converting-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush_to_disk(path)
        # Replaces an empty folder, and nothing else.
        temporary.rename(target)
        flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output(target: Path) -> None:
    """Raises ConfigError unless ``target`` does not exist or is an empty folder, and a new one can take its place."""
    if target.name in ("", "..") or os.path.ismount(target):
        raise ConfigError(f"{target} cannot be replaced by a new folder; name one inside it")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or next(target.iterdir(), None) is not None)):
        raise ConfigError(f"{target} exists; name a folder that does not, or remove it first")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies what belongs to the tokenizer, as far as it is there; returns the names of the files."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def special_tokens(folder: Path) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as ``folder`` (tokenizer files) tells."""
    if (folder / GENERATION_CONFIG).is_file():
        generation = read_json(folder / GENERATION_CONFIG)
        if generation.get("eos_token_id") is not None:
            return {name: generation.get(name) for name in SPECIAL_TOKENS}
    if not (folder / "tokenizer.json").is_file():
        return {}
    # checked first, so that what follows can be read
    tokens: dict[str, Any] = {"eos_token_id": load_tokenizer(folder).eod}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for name in ("bos_token", "pad_token"):
            token = settings.get(name)
            # transformers writes either the string or a whole added token
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                tokens[f"{name}_id"] = backend.token_to_id(content)
    return tokens

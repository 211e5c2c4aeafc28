"""From files of text or conversations to datasets on disk: what ``megatron-dmc preprocess`` does."""

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.data.build import stage_chat_dataset, stage_indexed_dataset
from megatron_dmc.data.chat import iter_conversations, usable_conversations
from megatron_dmc.data.chat_template import load_chat_template
from megatron_dmc.data.documents import iter_documents
from megatron_dmc.data.split import split_documents
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.files import left_by_killed_processes, why_nothing_new

logger = logging.getLogger(__name__)

_DATASET_SUFFIXES = (".bin", ".idx", ".json", ".mask.bin", ".mask.idx")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class PreprocessOptions:
    """What is read and written. The flags of ``megatron-dmc preprocess`` have the same names.

    Attributes:
        input: folders and files, read in this order.
        output: path of the dataset without its suffixes.
        tokenizer: a folder that holds tokenizer.json; None: one is trained.
        train_tokenizer: vocabulary size of a tokenizer to train on the training documents, into ``{output}_tokenizer``.
        chat: the input is conversations; the tokenizer's chat template writes them.
        chat_template: a Jinja file to use instead of the tokenizer's own template.
        valid_fraction: the part of the text to hold out in ``{output}_valid``; the rest goes to ``{output}_train``. 0: all
            goes to ``output``.
        seed: of the split.
        overwrite: replace files that exist.

    Raises:
        ConfigError: options that contradict one another.
    """

    input: Sequence[str | Path]
    output: str
    tokenizer: str | Path | None = None
    train_tokenizer: int | None = None
    chat: bool = False
    chat_template: str | Path | None = None
    valid_fraction: float = 0.0
    seed: int = 1234
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.chat and self.train_tokenizer is not None:
            raise ConfigError("--chat needs --tokenizer: a newly trained tokenizer has no chat template")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ConfigError("give one of --tokenizer and --train-tokenizer")
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ConfigError(f"--valid-fraction must be in [0, 1), got {self.valid_fraction}")
        if self.chat_template is not None and not self.chat:
            raise ConfigError("--chat-template is for --chat; add that, or leave it out")

    @property
    def tokenizer_folder(self) -> Path:
        return Path(self.tokenizer or f"{self.output}_tokenizer")

    @property
    def prefixes(self) -> list[str]:
        """Paths of the datasets without their suffixes: one, or the training part's and the held-out part's."""
        return [self.output] if self.valid_fraction == 0.0 else [f"{self.output}_train", f"{self.output}_valid"]


def preprocess(options: PreprocessOptions) -> None:
    """Writes the datasets that the options ask for, and prints one line for each.

    Raises:
        ConfigError: bad input, or a file that exists already.
    """
    _check_free(options)
    _name_leftovers(options)
    # before the text is read: a bad tokenizer should not take an hour to show
    tokenizer = load_tokenizer(options.tokenizer_folder, "--tokenizer") if options.train_tokenizer is None else None
    documents: Iterable[Any]
    if options.chat:
        assert tokenizer is not None
        template = load_chat_template(tokenizer, options.chat_template)
        conversations = chain.from_iterable(iter_conversations(path, "--input") for path in options.input)
        documents = map(template.render, usable_conversations(conversations, tokenizer.special_tokens))
    else:
        documents = chain.from_iterable(iter_documents(path, "--input") for path in options.input)
    parts: Sequence[Iterable[Any]]
    if tokenizer is not None and options.valid_fraction == 0.0:
        parts = [documents]
    else:
        text_of = attrgetter("text") if options.chat else str
        train, valid = split_documents(documents, options.valid_fraction, options.seed, text_of)
        parts = [train, valid][: len(options.prefixes)]
    # Nothing gets its name before all is whole: an earlier tokenizer and both parts of a split belong together.
    with ExitStack() as stack:
        temporary = Path(f"{options.tokenizer_folder}.tmp-{os.getpid()}")
        if tokenizer is None:
            assert options.train_tokenizer is not None
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            tokenizer = train_tokenizer(parts[0], options.train_tokenizer, temporary)
        stage = stage_chat_dataset if options.chat else stage_indexed_dataset
        datasets = [
            stack.enter_context(stage(part, tokenizer, prefix))
            for prefix, part in zip(options.prefixes, parts, strict=True)
        ]
        if options.train_tokenizer is not None:
            _place_tokenizer(temporary, options.tokenizer_folder)
            print(f"{options.tokenizer_folder}: {tokenizer.vocab_size} tokens")
        for dataset in datasets:
            dataset.place()
    for dataset in datasets:
        prefix, counts = dataset.prefix, dataset.counts
        learned = f" ({counts.trained_tokens} of the assistant)" if options.chat else ""
        print(
            f"{prefix}: {counts.documents} documents, {counts.tokens} tokens{learned}, {counts.bytes} bytes "
            f"({counts.bytes_per_token:.3f} bytes per token)"
        )


def _place_tokenizer(temporary: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in reversed(_TOKENIZER_FILES):
            os.replace(temporary / name, folder / name)
    except OSError as error:
        raise ConfigError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from None


def _name_leftovers(options: PreprocessOptions) -> None:
    outputs = [Path(prefix) for prefix in options.prefixes]
    if options.train_tokenizer is not None:
        outputs.append(options.tokenizer_folder)
    if found := [path for output in outputs for path in left_by_killed_processes(output)]:
        logger.warning(
            "warning: %d file(s) or folder(s) were left by a run that was killed, the first is %s; remove them unless another "
            "machine writes them now",
            *(len(found), found[0]),
        )


def _check_free(options: PreprocessOptions) -> None:
    outputs = [Path(prefix + suffix) for prefix in options.prefixes for suffix in _DATASET_SUFFIXES]
    if options.train_tokenizer is not None:
        outputs += [options.tokenizer_folder / name for name in _TOKENIZER_FILES]
    for path in outputs:
        if (problem := why_nothing_new(path)) is not None:
            raise ConfigError(f"--output {options.output} cannot be written: {problem}; choose another --output")
    existing = next((path for path in outputs if os.path.lexists(path)), None)
    if existing is not None and not options.overwrite:
        raise ConfigError(f"{existing} exists; choose another --output or add --overwrite")

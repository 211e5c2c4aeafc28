"""Byte-pair tokenizers: training one, and reading a folder's ``tokenizer.json`` for megatron-core's datasets."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_dmc.config import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, ConfigError
from megatron_dmc.errors import is_too_long_number
from megatron_dmc.files import ABSENT, why_no_file, why_no_folder

END_OF_TEXT = "<|endoftext|>"

# Looked for, in this order, where a folder's configuration does not name its end-of-text token.
_KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|eot_id|>", "<|im_end|>")


class Tokenizer:
    """A ``tokenizer.json`` with the protocol that megatron-core's datasets ask for.

    Attributes:
        folder: where it was read from.
        vocab_size: one more than the largest token id.
        eod: the id that closes a document.
        vocabulary_digest: SHA-256 of the vocabulary; equal for folders that hold the same tokens under the same ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eod: int, folder: Path) -> None:
        # A file's truncation and padding are for batches of prompts; documents are stored as they are.
        backend.no_truncation()
        backend.no_padding()
        # Text that merely spells a special token is text: a document can not end itself.
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        self.folder = folder
        self.eod = eod
        self.vocab_size = max(vocabulary.values()) + 1
        self.vocabulary_digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What makes cached dataset indices belong to this tokenizer; independent of where the folder lies."""
        return {"class": type(self).__name__, "vocabulary": self.vocabulary_digest, "eod": self.eod}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text that may not speak to the model: what spells a special token in it is text.

        Otherwise as transformers' tokenizers do it: with what the file's post-processor adds, often a beginning-of-text token.
        """
        return self._backend.encode(text).ids

    def tokenize_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`tokenize` of every text, in parallel threads, each closed by one end-of-document token."""
        _, after = self.added_tokens
        end = [] if after[-1:] == (self.eod,) else [self.eod]
        return [encoding.ids + end for encoding in self._backend.encode_batch(list(texts))]

    def tokenize_prompt(self, text: str) -> list[int]:
        """:meth:`tokenize` of a text that may speak to the model: what spells a special token in it is that token."""
        return self._copy().encode(text).ids

    @cached_property
    def added_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before a text (most often one, beginning of text, or none), and after it."""
        encoding = self._backend.encode("a")
        ids, is_added = encoding.ids, encoding.special_tokens_mask
        before = sum(1 for _ in takewhile(bool, is_added))
        after = sum(1 for _ in takewhile(bool, reversed(is_added[before:])))
        return tuple(ids[:before]), tuple(ids[len(ids) - after :])

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """How the special tokens are spelled."""
        added = self._backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def tokenize_rendered(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For texts in which the spelling of a special token means that token, as a chat template writes them.

        Returns:
            For every text its token ids, and the characters [begin, end) that each token stands for.
        """
        encodings = self._rendered_backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    @cached_property
    def _rendered_backend(self) -> tokenizers.Tokenizer:
        backend = self._copy()
        # it may take white space out of a token's characters
        backend.post_processor = None
        return backend

    def _copy(self) -> tokenizers.Tokenizer:
        """A backend for texts in which the spelling of a special token means that token."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens appear as they are spelled."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def train_tokenizer(documents: Iterable[str], vocab_size: int, output_folder: str | Path) -> Tokenizer:
    """Trains a byte-level BPE and writes ``tokenizer.json`` and ``tokenizer_config.json``.

    Every string can be encoded and comes back unchanged; there is no unknown token. ``<|endoftext|>`` is token 0 and
    serves as beginning and end. ``transformers.AutoTokenizer.from_pretrained`` loads the folder.

    Args:
        documents: the texts to learn merges from.
        vocab_size: tokens in all, 257 to 2^24. Too little text gives fewer.
        output_folder: made if missing. Each file is replaced whole, ``tokenizer.json`` last.

    Raises:
        ConfigError: for a vocabulary outside that, no text, or a folder that cannot be written.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise ConfigError(
            f"--train-tokenizer: the vocabulary must be >= {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT}) and "
            f"<= {LARGEST_VOCABULARY}, got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_at_least_one(documents), trainer)
    settings = {
        # The name that both transformers 4 and 5 resolve to "read tokenizer.json as it is".
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(output_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        _replace(folder / "tokenizer.json", backend.to_str(pretty=True) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from None
    return load_tokenizer(folder)


def load_tokenizer(folder: str | Path, name: str = "tokenizer") -> Tokenizer:
    """Reads ``tokenizer.json`` of a folder: one of :func:`train_tokenizer`, or a Hugging Face model's.

    The token that ends a document is ``eos_token`` of ``tokenizer_config.json`` or ``special_tokens_map.json``, else a
    well-known end token among the added tokens.

    Args:
        name: what errors call the folder, such as the flag or the setting that named it.

    Raises:
        ConfigError: for a missing folder or file, one that is no tokenizer, or no end-of-text token.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if (problem := why_no_folder(folder)) is not None:
        raise ConfigError(f"{name} {folder} {problem}; name a folder that holds tokenizer.json")
    problem = why_no_file(path)
    if problem not in (None, ABSENT):
        raise ConfigError(f"{path} {problem}")
    if problem is not None:
        raise ConfigError(
            f"{name} {folder} holds no tokenizer.json; train one, or save a Hugging Face tokenizer there with "
            "save_pretrained"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises plain Exception for anything it cannot read.
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a tokenizer: {_one_line(error)}") from None
    if not backend.get_vocab(with_added_tokens=True):
        raise ConfigError(f"{path} has an empty vocabulary; save the tokenizer again")
    return Tokenizer(backend, _end_token(backend, folder), folder)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, remedy: str) -> None:
    """Raises ConfigError where the tokenizer can produce an id that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, its model {model_vocab_size}; {remedy}"
        )


def check_own_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """:func:`check_vocabulary` of a folder that holds both."""
    check_vocabulary(
        tokenizer,
        model_vocab_size,
        "put the model's own tokenizer there, or resize the model's embeddings and save it anew",
    )


def _end_token(backend: tokenizers.Tokenizer, folder: Path) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _eos_token(folder / name)
        if token is not None:
            found = backend.token_to_id(token)
            if found is None:
                raise ConfigError(f"{folder / name}: eos_token {token!r} is not in the vocabulary of tokenizer.json")
            return found
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    for token in _KNOWN_END_TOKENS:
        if token in added:
            return added[token]
    raise ConfigError(
        f"tokenizer {folder} names no end-of-text token; set eos_token in {folder / 'tokenizer_config.json'}"
    )


def _eos_token(path: Path) -> str | None:
    problem = why_no_file(path)
    if problem == ABSENT:
        return None
    if problem is not None:
        raise ConfigError(f"{path} {problem}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if is_too_long_number(error):
            raise ConfigError(
                f"{path} holds a number of thousands of digits; fetch or save the tokenizer again"
            ) from None
        raise ConfigError(f"{path} is not JSON: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no JSON object; fetch or save the tokenizer again")
    token = settings.get("eos_token")
    # transformers writes either the string or a whole added token
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _at_least_one(documents: Iterable[str]) -> Iterator[str]:
    iterator = iter(documents)
    for first in iterator:
        return chain([first], iterator)
    raise ConfigError("there is no text to train a tokenizer on; name a folder, a text file or a .jsonl file")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]

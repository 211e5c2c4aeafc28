"""Reading and checking an indexed dataset: ``prefix.bin``, ``prefix.idx`` and ``prefix.json``. Unpickles nothing.

Chat data has a loss mask beside its tokens: an indexed dataset ``prefix.mask`` of uint8, 1 where a token is learned.
"""

import hashlib
import json
import logging
import struct
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.utils import log_single_rank

from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The .idx file: magic, version, type code, number of sequences, number of document boundaries; then int32 lengths,
# int64 byte offsets and int64 document boundaries (megatron-core's indexed_dataset.py).
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_DIGESTED_BLOCKS, _BLOCK_BYTES = 256, 4096
_LONGEST_DOCUMENT = 2**31 - 1
MASK_SUFFIX = ".mask"


@dataclass(frozen=True)
class DatasetCounts:
    """What ``prefix.json`` remembers about an indexed dataset.

    Attributes:
        documents: their number.
        tokens: all of them, with those that open and close every document.
        bytes: UTF-8 bytes of the text.
        vocabulary: digest of the tokenizer's vocabulary.
        trained_tokens: how many of the tokens count in the loss, of a dataset with a loss mask; None: all.
    """

    documents: int
    tokens: int
    bytes: int
    vocabulary: str
    trained_tokens: int | None = None

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into nats per byte."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class DatasetIndex:
    """A checked ``prefix.idx``.

    Attributes:
        tokens: all of them.
        dtype: the tokens' type.
        document_lengths: int64 [documents], tokens of each. The sequences that a document may be stored in are of no account.
        digest: of the whole index.
    """

    tokens: int
    dtype: type[numpy.integer]
    document_lengths: numpy.ndarray
    digest: str

    @property
    def documents(self) -> int:
        return len(self.document_lengths)


def read_index(prefix: str) -> DatasetIndex:
    """Reads and checks ``prefix.idx`` against itself and against the size of ``prefix.bin``.

    Raises:
        ConfigError: one line: which file is missing, truncated, damaged, or not the other's.
    """
    index_path, data_path = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (index_path, data_path):
        if not path.is_file():
            raise ConfigError(
                f"dataset {prefix} has no {path.name}; give the path without .bin and .idx, or build the dataset with "
                "megatron-dmc preprocess"
            )
    try:
        content = index_path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{index_path} cannot be read: {error.strerror or error}") from None

    def damaged(why: str) -> ConfigError:
        return ConfigError(f"{index_path} {why}; build the dataset again")

    if len(content) < _INDEX_HEADER.size:
        raise damaged(f"is truncated: {len(content)} bytes, the header alone has {_INDEX_HEADER.size}")
    magic, version, code, sequences, boundaries = _INDEX_HEADER.unpack_from(content)
    if magic != _INDEX_MAGIC or version != 1:
        raise damaged("is not an index of megatron-core")
    if code not in [dtype.value for dtype in DType] or not numpy.issubdtype(DType.dtype_from_code(code), numpy.integer):
        raise damaged(f"names type code {code}, which is no integer type")
    expected = _INDEX_HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) != expected:
        raise damaged(f"has {len(content)} bytes where its header promises {expected}")
    dtype = DType.dtype_from_code(code)
    lengths = numpy.frombuffer(content, numpy.int32, sequences, _INDEX_HEADER.size)
    pointers = numpy.frombuffer(content, numpy.int64, sequences, _INDEX_HEADER.size + 4 * sequences)
    documents = numpy.frombuffer(content, numpy.int64, boundaries, _INDEX_HEADER.size + 12 * sequences)
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    item_size = DType.size(dtype)
    if (
        boundaries < 2
        or not sequences
        or lengths.min() < 0
        or not numpy.array_equal(pointers, (ends - lengths) * item_size)
        or documents[0] != 0
        or documents[-1] != sequences
        or (numpy.diff(documents) < 0).any()
    ):
        raise damaged("is damaged: its lengths, offsets and document boundaries contradict one another")
    tokens = int(ends[-1])
    if data_path.stat().st_size != tokens * item_size:
        raise ConfigError(
            f"{data_path} has {data_path.stat().st_size} bytes where {index_path.name} promises {tokens * item_size}; "
            "build the dataset again"
        )
    document_lengths = lengths_of_documents(lengths, documents)
    # megatron-core counts the tokens of one in int32
    if document_lengths.max() > _LONGEST_DOCUMENT:
        raise ConfigError(
            f"{index_path}: a document has {document_lengths.max()} tokens, more than {_LONGEST_DOCUMENT}; cut it into several"
        )
    digest = hashlib.sha256(content)
    if has_several_sequences(documents):
        # Indices and checkpoints made when every sequence was taken for a document belong to other samples.
        digest.update(b"documents")
    return DatasetIndex(tokens, dtype, document_lengths, digest.hexdigest())


def lengths_of_documents(sequence_lengths: numpy.ndarray, boundaries: numpy.ndarray) -> numpy.ndarray:
    """int64 [documents], tokens of each.

    Args:
        sequence_lengths: int [sequences], tokens of each.
        boundaries: int64 [documents + 1], each document's first sequence, and the number of sequences.
    """
    ends = numpy.concatenate([[0], numpy.cumsum(sequence_lengths, dtype=numpy.int64)])
    return numpy.diff(ends[boundaries])


def has_several_sequences(boundaries: numpy.ndarray) -> bool:
    """Whether any document is stored in another number of sequences than one."""
    return not numpy.array_equal(boundaries, numpy.arange(len(boundaries)))


def read_counts(prefix: str, index: DatasetIndex) -> DatasetCounts | None:
    """``prefix.json``, or None where another tool built the dataset and wrote none.

    Raises:
        ConfigError: for a file that is damaged or counts another dataset.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        counts = DatasetCounts(
            **{field.name: values[field.name] for field in fields(DatasetCounts) if field.default is MISSING},
            trained_tokens=values.get("trained_tokens"),
        )
        matches = counts.bytes > 0 and (counts.documents, counts.tokens) == (index.documents, index.tokens)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        matches = False
    if not matches:
        raise ConfigError(f"{path} does not describe {prefix}.idx; build the dataset again, or remove {path.name}")
    return counts


def token_stream(prefix: str, index: DatasetIndex) -> numpy.ndarray:
    """All tokens of a dataset in order, [tokens], mapped from ``prefix.bin`` (read-only, of the index's type)."""
    return numpy.memmap(prefix + ".bin", dtype=index.dtype, mode="r")


def has_loss_mask(prefix: str) -> bool:
    """Whether a loss mask stands beside the tokens: ``prefix.mask.bin`` and ``prefix.mask.idx``."""
    return Path(f"{prefix}{MASK_SUFFIX}.idx").is_file()


def content_digest(prefix: str) -> str:
    """Tells a dataset from another that was built under the same name.

    SHA-256 over the index and 256 evenly spread blocks of ``prefix.bin`` (all of a file up to 1 MiB), and those of a loss
    mask: terabytes take no longer than their index.

    Raises:
        ConfigError: as :func:`read_index`.
    """
    digest = hashlib.sha256()
    for part in (prefix, prefix + MASK_SUFFIX) if has_loss_mask(prefix) else (prefix,):
        index = read_index(part)
        content = token_stream(part, index).view(numpy.uint8)
        digest.update(index.digest.encode())
        for start in numpy.linspace(0, max(len(content) - _BLOCK_BYTES, 0), _DIGESTED_BLOCKS, dtype=numpy.int64):
            digest.update(content[start : start + _BLOCK_BYTES].tobytes())
    return digest.hexdigest()


def check_dataset(prefix: str, tokenizer: Tokenizer, sequence_length: int) -> DatasetIndex:
    """Checks a dataset's files, its loss mask's, that it has one full sample, and that this tokenizer wrote it.

    Where ``prefix.json`` is missing all tokens are scanned for ids that the tokenizer does not have.

    Raises:
        ConfigError: one line: which file, what is wrong, what to do.
    """
    index = read_index(prefix)
    # a sample's labels are its tokens moved by one
    if index.tokens < sequence_length + 1:
        raise ConfigError(
            f"dataset {prefix} has {index.tokens} tokens, too few for one sample of data.sequence_length "
            f"{sequence_length} (+ 1); lower that, or add text (of a held-out part: a larger --valid-fraction of preprocess)"
        )
    counts = read_counts(prefix, index)
    if counts is None:
        _check_tokens(prefix, token_stream(prefix, index), tokenizer)
    elif counts.vocabulary != tokenizer.vocabulary_digest:
        raise ConfigError(
            f"dataset {prefix} was built with another tokenizer than {tokenizer.folder}; build it again with this one"
        )
    _check_loss_mask(prefix, index, counts)
    _check_opening(prefix, index, tokenizer)
    return index


def _check_loss_mask(prefix: str, index: DatasetIndex, counts: DatasetCounts | None) -> None:
    masked = has_loss_mask(prefix)
    if counts is not None and (counts.trained_tokens is not None) != masked:
        state = "stands beside it, which says nothing of one" if masked else "is missing, which it counts on"
        raise ConfigError(f"{prefix}.json: the loss mask {prefix}{MASK_SUFFIX}.idx {state}; build the dataset again")
    if not masked:
        return
    mask = read_index(prefix + MASK_SUFFIX)
    if mask.dtype is not numpy.uint8 or not numpy.array_equal(mask.document_lengths, index.document_lengths):
        raise ConfigError(
            f"{prefix}{MASK_SUFFIX}.idx is not the loss mask of {prefix}.idx ({mask.documents} documents and {mask.tokens} "
            f"values for {index.documents} documents and {index.tokens} tokens); build the dataset again"
        )


def _check_opening(prefix: str, index: DatasetIndex, tokenizer: Tokenizer) -> None:
    """Warns where text begins otherwise than the tokenizer has every text begin; a chat template has its own say."""
    before, _ = tokenizer.added_tokens
    first = token_stream(prefix, index)[: len(before)].tolist()
    if tuple(first) != before and not has_loss_mask(prefix):
        log_single_rank(
            logger,
            logging.WARNING,
            f"dataset {prefix} begins without {tokenizer.detokenize(before)}, which the tokenizer {tokenizer.folder} puts "
            "before every text; build the dataset again to train on what it will read in use",
        )


def _check_tokens(prefix: str, stream: numpy.ndarray, tokenizer: Tokenizer) -> None:
    for token in (int(stream.min()), int(stream.max())):
        if not 0 <= token < tokenizer.vocab_size:
            raise ConfigError(
                f"dataset {prefix} holds token {token}, but the tokenizer {tokenizer.folder} has ids 0 to "
                f"{tokenizer.vocab_size - 1}; build the dataset with this tokenizer"
            )

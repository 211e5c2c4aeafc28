"""Text to megatron-core datasets: reading documents, the indexed dataset on disk, samples, and held-out windows.

Sample ``i`` of a run is always ``dataset[i]``: a function of the files, the seed, the sequence length and the run's
total number of samples. A run resumes from its number of consumed samples and nothing else.
"""

import codecs
import hashlib
import json
import logging
import os
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dmc.config import ConfigError
from megatron_dmc.training.arguments import DataConfig
from megatron_dmc.training.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# What a folder scan takes for text. JSON, CSV and the like are data: name them as .jsonl with a "text" field.
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
JSON_LINES_SUFFIX = ".jsonl"
_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})
_TEST_FOLDERS = frozenset({"idle_test", "test", "tests"})

_DOCUMENTS_PER_BATCH = 64
_TOKENS_PER_SCAN = 1 << 24

# The .idx file: magic, version, type code, number of sequences, number of document boundaries; then int32 lengths,
# int64 byte offsets and int64 document boundaries (megatron-core's indexed_dataset.py).
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


class NotTextError(ConfigError):
    """A file that is not UTF-8 text. The message names the file and the line."""


def iter_documents(path: str | Path) -> Iterator[str]:
    """The documents of a folder, a text file (one document) or a ``.jsonl`` file (one object with "text" per line).

    A folder is read recursively in sorted order: files ending in .md, .py, .rst, .txt and .jsonl. Hidden files and
    folders, ``__pycache__``, ``site-packages`` and ``dist-packages`` are left out. Files there that are not UTF-8 text
    are skipped with one warning that counts them; empty documents are skipped silently.

    Raises:
        ConfigError: (while iterating) a path that is missing, unreadable, of an unknown kind or without any text; a
            file named directly that is not UTF-8; a ``.jsonl`` line that is not an object with "text". The message
            names the file, and the line where there is one.
    """
    path = Path(path)
    if path.is_dir():
        documents = _read_files(_text_files(path), skip_undecodable=True)
    elif not path.exists():
        raise ConfigError(f"data {path} does not exist; name a folder, a text file or a .jsonl file")
    elif not path.is_file() or path.suffix.lower() not in (*TEXT_SUFFIXES, JSON_LINES_SUFFIX):
        raise ConfigError(
            f"data {path} is neither a folder nor a text file ({', '.join(TEXT_SUFFIXES)}) nor a .jsonl file; "
            "rename or convert it"
        )
    else:
        documents = _read_files([path], skip_undecodable=False)
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise ConfigError(f"data {path} holds no text; name a folder, a text file or a .jsonl file that does")


def standard_library_documents() -> Iterator[str]:
    """The sources of this Python's own standard library, without tests, in a fixed order: text on every machine.

    Raises:
        ConfigError: where the interpreter comes without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in (_text_files(folder, _SKIPPED_FOLDERS | _TEST_FOLDERS) if folder.is_dir() else [])
        # what the build wrote down about its machine is no source
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise ConfigError(f"no standard library sources below {folder}; name a folder, a text file or a .jsonl file")
    yield from _read_files(files, skip_undecodable=True)


def split_documents(documents: Iterable[str], valid_fraction: float, seed: int = 1234) -> tuple[list[str], list[str]]:
    """Parts documents into training and held-out ones, by document, the same way every time.

    Documents are visited in the order of a seeded hash of their text, and each that still fits into ``valid_fraction``
    of all bytes is held out; equal documents stay on one side. If none fits, the shortest is held out. A single
    document is cut: its last lines are held out.

    Returns:
        (training, held out), each in the given order; all of it is held in memory.

    Raises:
        ConfigError: for a fraction outside [0, 1), or a text too short to be cut.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise ConfigError(f"the held-out fraction must be in [0, 1), got {valid_fraction}")
    documents = list(documents)
    if valid_fraction == 0.0:
        return documents, []
    copies: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        copies.setdefault(document, []).append(index)
    if len(copies) == 1:
        return _cut(documents[0], valid_fraction)
    sizes = {document: len(document.encode()) * len(indices) for document, indices in copies.items()}
    budget = valid_fraction * sum(sizes.values())
    held_out: set[int] = set()
    for document in sorted(copies, key=lambda text: hashlib.blake2b(f"{seed} {text}".encode()).digest()):
        if sizes[document] <= budget:
            budget -= sizes[document]
            held_out.update(copies[document])
    if not held_out:
        held_out.update(copies[min(sizes, key=lambda text: (sizes[text], text))])
    return (
        [document for index, document in enumerate(documents) if index not in held_out],
        [document for index, document in enumerate(documents) if index in held_out],
    )


def _cut(document: str, valid_fraction: float) -> tuple[list[str], list[str]]:
    middle = int(len(document) * (1.0 - valid_fraction))
    line_end = document.find("\n", middle, len(document) - 1) + 1
    # a text without line ends is cut between characters
    middle = line_end or middle
    if not document[:middle].strip() or not document[middle:].strip():
        raise ConfigError(
            f"the only document has {len(document)} characters, too few to hold out a fraction of {valid_fraction}; "
            "name more text"
        )
    return [document[:middle]], [document[middle:]]


def _text_files(folder: Path, skipped: frozenset[str] = _SKIPPED_FOLDERS) -> list[Path]:
    def fail(error: OSError) -> None:
        raise ConfigError(f"data folder {error.filename} cannot be read: {error.strerror}")

    files = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        files += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith((*TEXT_SUFFIXES, JSON_LINES_SUFFIX))
        ]
    # a named pipe would never end
    return [file for file in files if file.is_file()]


def _read_files(files: Iterable[Path], *, skip_undecodable: bool) -> Iterator[str]:
    skipped: list[Path] = []
    for file in files:
        try:
            if file.suffix.lower() != JSON_LINES_SUFFIX:
                documents: Iterable[str] = [_read_text(file)]
            else:
                # A file is taken whole or not at all, so it is decoded once before its first document is used.
                for _ in _decoded_lines(file) if skip_undecodable else ():
                    pass
                documents = _read_json_lines(file)
        except NotTextError:
            if not skip_undecodable:
                raise
            skipped.append(file)
            continue
        yield from (document for document in documents if document.strip())
    if skipped:
        logger.warning("skipped %d file(s) that are not UTF-8 text, the first is %s", len(skipped), skipped[0])


def _read_text(path: Path) -> str:
    with _reading(path):
        content = path.read_bytes()
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\x00" in content:
        raise NotTextError(f"{path}:{_line(content, content.index(0))} holds a NUL byte; it is no text file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise NotTextError(
            f"{path}:{_line(content, error.start)} is not UTF-8 ({error.reason}); convert the file"
        ) from None


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise NotTextError(f"{path}:{number} is not UTF-8 ({error.reason}); convert the file") from None


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, line in _decoded_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number} is not JSON: {error}") from None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f'{path}:{number} is not an object with a string "text"; every line must be')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{path}:{number} holds half a surrogate pair, which is no character") from None
        yield text


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class DatasetCounts:
    """What ``prefix.json`` remembers about an indexed dataset.

    Attributes:
        documents: their number.
        tokens: all of them, one end-of-document token per document included.
        bytes: UTF-8 bytes of the text.
        largest_token: the largest token id in use.
        vocabulary: digest of the tokenizer's vocabulary.
    """

    documents: int
    tokens: int
    bytes: int
    largest_token: int
    vocabulary: str

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into nats per byte."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class DatasetIndex:
    """A checked ``prefix.idx``: number of documents and tokens, the tokens' type, and a digest of the whole index."""

    documents: int
    tokens: int
    dtype: type[numpy.integer]
    sequence_lengths: numpy.ndarray
    digest: str


def build_indexed_dataset(
    documents: Iterable[str], tokenizer: Tokenizer, prefix: str | Path, *, progress: bool = True
) -> DatasetCounts:
    """Tokenizes documents into ``prefix.bin`` and ``prefix.idx`` (megatron-core's format) and ``prefix.json`` (counts).

    Every document is followed by the end-of-document token. Tokens are uint16 where the vocabulary allows, else int32.
    Files appear under their names when they are whole, the index last; what stood there before is replaced.

    Args:
        progress: show a progress bar when standard error is a terminal.

    Raises:
        ConfigError: for no documents, or files that cannot be written (no folder, no space).
    """
    prefix = str(prefix)
    temporary = f"{prefix}.tmp-{os.getpid()}"
    size = largest_token = 0
    builder = None
    try:
        with _writing(prefix):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            builder = IndexedDatasetBuilder(temporary + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for text, tokens in _tokenized(documents, tokenizer, progress):
            with _writing(prefix):
                builder.add_item(torch.tensor(tokens, dtype=torch.int32))
            builder.end_document()
            size += len(text.encode())
            largest_token = max(largest_token, max(tokens))
        documents_written, tokens_written = len(builder.sequence_lengths), sum(builder.sequence_lengths)
        if not documents_written:
            raise ConfigError(f"there is no document to write to {prefix}; name a folder, a text file or a .jsonl file")
        counts = DatasetCounts(documents_written, tokens_written, size, largest_token, tokenizer.vocabulary_digest)
        with _writing(prefix):
            builder.finalize(temporary + ".idx")
            Path(temporary + ".json").write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
            for suffix in (".bin", ".json", ".idx"):
                with open(temporary + suffix, "rb") as file:
                    os.fsync(file.fileno())
            for suffix in (".bin", ".json", ".idx"):
                os.replace(temporary + suffix, prefix + suffix)
    finally:
        # what failed before fails again here (a full disk), and is known already
        if builder is not None:
            with suppress(OSError):
                builder.data_file.close()
        for suffix in (".bin", ".json", ".idx"):
            with suppress(OSError):
                Path(temporary + suffix).unlink(missing_ok=True)
    return counts


def _tokenized(documents: Iterable[str], tokenizer: Tokenizer, progress: bool) -> Iterator[tuple[str, list[int]]]:
    bar = Progress(
        TextColumn("tokenizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (progress and sys.stderr.isatty()),
    )
    with bar:
        task = bar.add_task("", total=len(documents) if isinstance(documents, Sequence) else None)
        for batch in _batches(documents, _DOCUMENTS_PER_BATCH):
            for text, tokens in zip(batch, tokenizer.tokenize_batch(batch), strict=True):
                yield text, [*tokens, tokenizer.eod]
                bar.advance(task)


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _writing(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write the dataset {prefix}: {error.strerror or error}") from None


def read_index(prefix: str) -> DatasetIndex:
    """Reads and checks ``prefix.idx`` against itself and against the size of ``prefix.bin``. Unpickles nothing.

    Raises:
        ConfigError: one line: which file is missing, truncated, damaged, or not the other's.
    """
    index_path, data_path = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (index_path, data_path):
        if not path.is_file():
            raise ConfigError(
                f"dataset {prefix} has no {path.name}; give the path without .bin and .idx, or build the dataset with "
                "tools/preprocess_data.py"
            )
    with _reading(index_path):
        content = index_path.read_bytes()

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
    return DatasetIndex(boundaries - 1, tokens, dtype, lengths, hashlib.sha256(content).hexdigest())


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
        counts = DatasetCounts(**{field.name: values[field.name] for field in fields(DatasetCounts)})
        whole = all(
            isinstance(getattr(counts, name), int) for name in ("documents", "tokens", "bytes", "largest_token")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole or (counts.documents, counts.tokens) != (index.documents, index.tokens):
        raise ConfigError(f"{path} does not describe {prefix}.idx; build the dataset again, or remove {path.name}")
    return counts


def token_stream(prefix: str, index: DatasetIndex) -> numpy.ndarray:
    """All tokens of a dataset in order, [tokens], mapped from ``prefix.bin`` (read-only, of the index's type)."""
    if not index.tokens:
        return numpy.empty(0, index.dtype)
    return numpy.memmap(prefix + ".bin", dtype=index.dtype, mode="r", shape=(index.tokens,))


def check_dataset(prefix: str, tokenizer: Tokenizer, sequence_length: int) -> DatasetIndex:
    """Checks a dataset's files, that it was written by this tokenizer, and that it has one full sample.

    Where ``prefix.json`` is missing all tokens are scanned for ids that the tokenizer does not have.

    Raises:
        ConfigError: one line: which file, what is wrong, what to do.
    """
    index = read_index(prefix)
    counts = read_counts(prefix, index)
    if counts is not None:
        smallest, largest = 0, counts.largest_token
    else:
        smallest, largest = _token_range(token_stream(prefix, index))
    if smallest < 0 or largest >= tokenizer.vocab_size:
        raise ConfigError(
            f"dataset {prefix} holds token {smallest if smallest < 0 else largest}, but the tokenizer "
            f"{tokenizer.folder} has ids 0 to {tokenizer.vocab_size - 1}; build the dataset with this tokenizer"
        )
    if counts is not None and counts.vocabulary != tokenizer.vocabulary_digest:
        raise ConfigError(
            f"dataset {prefix} was built with another tokenizer than {tokenizer.folder}; build it again with this one"
        )
    # a sample's labels are its tokens moved by one
    if index.tokens < sequence_length + 1:
        raise ConfigError(
            f"dataset {prefix} has {index.tokens} tokens, too few for one sample of data.sequence_length "
            f"{sequence_length} (+ 1); shorten it or add text"
        )
    return index


def _token_range(stream: numpy.ndarray) -> tuple[int, int]:
    smallest = largest = 0
    for start in range(0, len(stream), _TOKENS_PER_SCAN):
        part = stream[start : start + _TOKENS_PER_SCAN]
        smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
    return smallest, largest


class SampleDataset(Protocol):
    """What :func:`global_batch` reads: GPTDataset, BlendedDataset and HeldoutWindows."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> dict[str, Any]: ...


def build_datasets(
    data: DataConfig, tokenizer: Tokenizer, train_samples: int, valid_samples: int
) -> tuple[SampleDataset, SampleDataset | None]:
    """The run's samples: a GPTDataset, or a BlendedDataset of several in proportion to their tokens.

    Works with and without torch.distributed; with it, every rank must call (rank 0 writes the indices to
    ``data.cache``, which all ranks must see, and the others read them). Documents are packed one after another;
    positions and attention run on across their ends.

    Args:
        train_samples: of the whole run; text is repeated (and shuffled anew) as often as needed. The order of samples
            depends on this number: resume with the same.
        valid_samples: at least this many, if ``data.valid`` names a dataset; 0 for none.

    Returns:
        (training samples, validation samples or None), each with at least the asked number.

    Raises:
        ConfigError: for anything :func:`check_dataset` finds, before anything is built, and a cache folder that cannot
            be written.
    """
    if not data.train:
        raise ConfigError("data.train is empty; name at least one dataset (the path without .bin and .idx)")
    if train_samples < 1 or valid_samples < 0:
        raise ConfigError(f"a run needs >= 1 training samples and >= 0 others, got {train_samples} and {valid_samples}")
    if not 0 <= data.seed < 2**32:
        raise ConfigError(f"data.seed must be in [0, 2^32), got {data.seed}")
    train = [(prefix, check_dataset(prefix, tokenizer, data.sequence_length)) for prefix in data.train]
    valid = [(prefix, check_dataset(prefix, tokenizer, data.sequence_length)) for prefix in data.valid]
    return (
        _build_split(Split.train, train, train_samples, data, tokenizer),
        _build_split(Split.valid, valid, valid_samples, data, tokenizer) if valid and valid_samples else None,
    )


def _build_split(
    split: Split, parts: list[tuple[str, DatasetIndex]], samples: int, data: DataConfig, tokenizer: Tokenizer
) -> SampleDataset:
    indices = [index for _, index in parts]
    total = sum(index.tokens for index in indices)
    weights = [index.tokens / total for index in indices]
    # Blending rounds: every part gets a margin, as megatron-core's own blends do.
    sizes = [samples] if len(parts) == 1 else [int(samples * weight * 1.005) + 2 for weight in weights]
    datasets = []
    for (prefix, index), size in zip(parts, sizes, strict=True):
        config = _dataset_config(data, tokenizer, _cache(data, [index]), split, prefix)
        per_split = [size if one is split else 0 for one in Split]
        with _caching(data):
            builder = BlendedMegatronDatasetBuilder(GPTDataset, per_split, _on_every_rank, config)
            datasets.append(builder.build()[split.value])
    if len(datasets) == 1:
        return datasets[0]
    # Without torch.distributed megatron-core can blend in memory only: it asks for the rank before it writes a cache.
    config = replace(config, path_to_cache=_cache(data, indices) if torch.distributed.is_initialized() else None)
    with _caching(data):
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            BlendedDataset, _on_every_rank, True, datasets, weights, samples, config
        )


def _on_every_rank() -> bool:
    return True


def _dataset_config(data: DataConfig, tokenizer: Tokenizer, cache: str, split: Split, prefix: str) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=data.sequence_length,
        blend_per_split=[([prefix], None) if one is split else None for one in Split],
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _cache(data: DataConfig, indices: Sequence[DatasetIndex]) -> str:
    """A folder below ``data.cache`` of its own for this content.

    megatron-core's names of cached files know a dataset's path and not what it holds, so a dataset built again under
    its old name would be read by stale indices.
    """
    digest = hashlib.sha256("".join(index.digest for index in indices).encode()).hexdigest()[:16]
    folder = Path(data.cache, digest)
    distributed = torch.distributed.is_initialized()
    with _caching(data):
        folder.mkdir(parents=True, exist_ok=True)
        if not distributed or torch.distributed.get_rank() == 0:
            _remove_damaged(folder)
    if distributed:
        torch.distributed.barrier()
    return str(folder)


@contextmanager
def _caching(data: DataConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # on several ranks megatron-core raises a plain Exception from the OSError
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ConfigError(f"data.cache {data.cache} cannot be used: {cause.strerror or cause}") from None


def _remove_damaged(folder: Path) -> None:
    """Removes cached arrays that a killed run left unfinished, and any that megatron-core would have to unpickle."""
    for path in folder.glob("*_index.npy"):
        try:
            whole = isinstance(numpy.load(path, mmap_mode="r", allow_pickle=False), numpy.memmap)
        except (ValueError, EOFError):
            whole = False
        if not whole:
            path.unlink()


def global_batch(dataset: SampleDataset, samples: Sequence[int]) -> dict[str, torch.Tensor]:
    """The samples with these GLOBAL indices, stacked; b of them, each s tokens long.

    Returns:
        int64 ``tokens``, ``labels``, ``position_ids`` [b, s], float32 ``loss_mask`` [b, s], int64 ``sample_index`` [b].

    Raises:
        IndexError: for an index outside the dataset.
    """
    for sample in samples:
        if not 0 <= sample < len(dataset):
            raise IndexError(f"sample {sample} is outside the dataset's {len(dataset)} samples")
    rows = [dataset[sample] for sample in samples]
    batch = {
        name: torch.stack([row[name] for row in rows]) for name in ("tokens", "labels", "loss_mask", "position_ids")
    }
    return {**batch, "sample_index": torch.tensor(samples, dtype=torch.int64)}


class HeldoutWindows:
    """A dataset's whole token stream in its own order, cut into windows that follow one another without overlap.

    Window i predicts tokens i * s + 1 to (i + 1) * s of the stream (s = sequence_length), so every token after the
    first is predicted once; the remainder that fills no window is dropped. Reads like a GPTDataset.

    Attributes:
        bytes_per_token: UTF-8 bytes of text per token of the whole dataset, end-of-document tokens counted as tokens.
    """

    def __init__(self, stream: numpy.ndarray, sequence_length: int, bytes_per_token: float) -> None:
        self.sequence_length = sequence_length
        self.bytes_per_token = bytes_per_token
        self._stream = stream

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self.sequence_length

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """int64 ``tokens``, ``labels``, ``position_ids`` and float32 ``loss_mask`` (ones), each [sequence_length]."""
        if not 0 <= idx < len(self):
            raise IndexError(f"window {idx} is outside {len(self)} windows")
        start = idx * self.sequence_length
        text = torch.from_numpy(self._stream[start : start + self.sequence_length + 1].astype(numpy.int64))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.sequence_length),
            "position_ids": torch.arange(self.sequence_length),
        }


def heldout_windows(prefix: str, sequence_length: int, tokenizer: Tokenizer) -> HeldoutWindows:
    """The windows of one held-out dataset.

    Raises:
        ConfigError: for anything :func:`check_dataset` finds.
    """
    index = check_dataset(prefix, tokenizer, sequence_length)
    counts = read_counts(prefix, index)
    stream = token_stream(prefix, index)
    bytes_per_token = counts.bytes_per_token if counts else _bytes_per_token(stream, index, tokenizer)
    return HeldoutWindows(stream, sequence_length, bytes_per_token)


def _bytes_per_token(stream: numpy.ndarray, index: DatasetIndex, tokenizer: Tokenizer) -> float:
    size = 0
    for document in numpy.split(stream, numpy.cumsum(index.sequence_lengths)[:-1]):
        size += len(tokenizer.detokenize(document[document != tokenizer.eod]).encode())
    return size / index.tokens

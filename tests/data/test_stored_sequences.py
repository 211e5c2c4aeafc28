"""Documents that are stored in several sequences, as Megatron-LM's tools do with --split-sentences: documents all the same."""

import hashlib
import itertools
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dmc.config import ConfigError
from megatron_dmc.data import build_datasets, global_batch, heldout_windows
from megatron_dmc.data.indexed_dataset import check_dataset, read_index
from megatron_dmc.data.reach import check_reach
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.recipe import DataConfig, recipe_from_dict
from tests.support.tokenizer_folders import tokenizer_folder

pytestmark = pytest.mark.usefixtures("one_process")


def document(number: int) -> list[list[int]]:
    """Of one to four sequences; no two tokens of all documents are equal."""
    begin = number * 40
    cuts = [begin, *(begin + 3 + number % 5 + 8 * i for i in range(number % 4 + 1))]
    return [list(range(first, last)) for first, last in itertools.pairwise(cuts)]


# Two that have no token at all: one of no sequence, one of an empty one.
DOCUMENTS = [*(document(i) for i in range(30)), [], [[]], *(document(i) for i in range(30, 40))]
JOINED = [[list(itertools.chain.from_iterable(sequences))] for sequences in DOCUMENTS]
LENGTHS = [len(sequence) for [sequence] in JOINED]


def write(prefix: Path, documents: list[list[list[int]]], dtype: type = numpy.int32) -> str:
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(prefix) + ".idx")
    return str(prefix)


def is_learned(documents: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[[token % 3 // 2 for token in sequence] for sequence in sequences] for sequences in documents]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = [f"<|{i}|>" for i in range(1700)]
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), *words)


def config(folder: Path, tokenizer: Tokenizer, prefix: str, reset: bool) -> DataConfig:
    return DataConfig(
        train=[prefix],
        tokenizer=str(tokenizer.folder),
        sequence_length=23,
        cache=str(folder / "cache"),
        reset_at_documents=reset,
    )


def test_the_index_counts_documents(tmp_path: Path) -> None:
    several, one = read_index(write(tmp_path / "several", DOCUMENTS)), read_index(write(tmp_path / "one", JOINED))
    assert several.document_lengths.tolist() == one.document_lengths.tolist() == LENGTHS
    assert several.documents == len(DOCUMENTS) and several.tokens == sum(LENGTHS)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("reset", [False, True], ids=["running-on", "reset"])
def test_samples_are_those_of_whole_documents(tmp_path: Path, tokenizer: Tokenizer, reset: bool, masked: bool) -> None:
    batches = []
    for name, documents, mask in (
        ("one", JOINED, JOINED),
        ("several", DOCUMENTS, DOCUMENTS),
        ("mask-in-one", DOCUMENTS, JOINED),
    ):
        prefix = write(tmp_path / name, documents)
        if masked:
            write(tmp_path / f"{name}.mask", is_learned(mask), numpy.uint8)
        train, _ = build_datasets(config(tmp_path, tokenizer, prefix, reset), tokenizer, 100, 0)
        batches.append(global_batch(train, range(100)))
        windows = heldout_windows(prefix, 23, tokenizer, reset_at_documents=reset)
        batches[-1] |= {f"held-out {key}": value for key, value in global_batch(windows, range(len(windows))).items()}
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        assert all(torch.equal(batch[key], batches[0][key]) for key in batch)


def test_documents_begin_where_they_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write(tmp_path / "several", DOCUMENTS)
    train, _ = build_datasets(config(tmp_path, tokenizer, prefix, True), tokenizer, 100, 0)
    firsts = torch.tensor([sequence[0] for [sequence] in JOINED if sequence])
    for batch in (
        global_batch(train, range(100)),
        global_batch(heldout_windows(prefix, 23, tokenizer, reset_at_documents=True), range(20)),
    ):
        begins = torch.isin(batch["tokens"], firsts) | (torch.arange(23) == 0)
        assert torch.equal(batch["document_starts"], begins)
        assert torch.equal(batch["loss_mask"] == 0, torch.isin(batch["labels"], firsts))
        # documents lie whole, one after another
        follows = batch["tokens"][:, 1:] == batch["tokens"][:, :-1] + 1
        assert (follows | begins[:, 1:]).all()


def test_the_reach_is_that_of_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A sequence of 4 tokens and a window of 3 cannot be compressed; documents of 40 such sequences can."""
    prefix = write(tmp_path / "several", [[[7] * 4] * 40] * 5)
    data = {"train": [prefix], "tokenizer": str(tokenizer.folder), "sequence_length": 160, "cache": "cache"}
    model = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1}
    values = {
        "model": {**model, "vocab_size": 2000, "max_position_embeddings": 160},
        "data": {**data, "reset_at_documents": True},
        "dmc": {"target_compression_ratio": 8.0, "local_window": 3},
        "phases": [{"kind": "compress", "steps": 1}],
        "training": {"global_batch_size": 1},
        "checkpoint": {"directory": "checkpoints"},
    }
    check_reach(recipe_from_dict(values))


def test_indices_of_sequences_are_not_taken_for_those_of_documents(tmp_path: Path) -> None:
    """Cached indices and checkpoints know a dataset by this digest."""
    for name, documents, is_kept in (("several", DOCUMENTS, False), ("one", JOINED, True)):
        prefix = write(tmp_path / name, documents)
        digest = hashlib.sha256(Path(prefix + ".idx").read_bytes()).hexdigest()
        assert (read_index(prefix).digest == digest) == is_kept


def test_a_mask_of_other_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write(tmp_path / "several", DOCUMENTS)
    moved = [DOCUMENTS[0] + DOCUMENTS[1], [], *DOCUMENTS[2:]]
    write(tmp_path / "several.mask", is_learned(moved), numpy.uint8)
    with pytest.raises(ConfigError, match=r"several\.mask\.idx is not the loss mask of"):
        check_dataset(prefix, tokenizer, 8)


def test_a_document_too_long_for_megatron_core(tmp_path: Path) -> None:
    """Two sequences of 2^30 tokens each. The file has a hole in place of them."""
    prefix = write(tmp_path / "long", [[[1], [2]]])
    index = bytearray(Path(prefix + ".idx").read_bytes())
    index[34:58] = numpy.array([2**30] * 2, "<i4").tobytes() + numpy.array([0, 2**32], "<i8").tobytes()
    Path(prefix + ".idx").write_bytes(index)
    with open(prefix + ".bin", "r+b") as file:
        file.truncate(2**33)
    with pytest.raises(ConfigError, match=r"long\.idx: a document has 2147483648 tokens, more than 2147483647; cut it"):
        read_index(prefix)

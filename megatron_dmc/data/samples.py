"""A run's samples.

Sample ``i`` of a run is always ``dataset[i]``: a function of the files, the seed, the sequence length and the run's
total number of samples. A run resumes from its number of consumed samples and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_dmc.config import ConfigError
from megatron_dmc.data.index_cache import index_cache
from megatron_dmc.data.indexed_dataset import DatasetIndex, check_dataset, read_index
from megatron_dmc.data.packing import PackedDataset
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.recipe import DataConfig

# Of the index that megatron-core builds on rank 0, for every sample and for every document in every pass over the text.
_BYTES_PER_SAMPLE, _BYTES_PER_DOCUMENT = 16, 20
# 17 GB.
_MOST_INDEX_BYTES = 2**34


class SampleDataset(Protocol):
    """What :func:`global_batch` reads: PackedDataset, BlendedDataset and HeldoutWindows."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int) -> dict[str, Any]: ...


def build_datasets(
    data: DataConfig, tokenizer: Tokenizer, train_samples: int, valid_samples: int
) -> tuple[SampleDataset, SampleDataset | None]:
    """The run's samples: a PackedDataset, or a BlendedDataset of several in proportion to their tokens.

    torch.distributed must be initialized, and every rank must call: rank 0 writes the indices to ``data.cache``, which
    all ranks must see, and the others read them. Documents are packed one after another; positions and attention run
    on across their ends, unless ``data.reset_at_documents``.

    Args:
        train_samples: of the whole run; text is repeated (and shuffled anew) as often as needed. The order of samples
            depends on this number: resume with the same.
        valid_samples: at least this many, if ``data.valid`` names a dataset; 0 for none.

    Returns:
        (training samples, validation samples or None), each with at least the asked number.

    Raises:
        ConfigError: for anything :func:`check_dataset` finds and an index too large to build, before anything is built,
            and a cache folder that cannot be written.
    """
    train = [(prefix, check_dataset(prefix, tokenizer, data.sequence_length)) for prefix in data.train]
    valid = [(prefix, check_dataset(prefix, tokenizer, data.sequence_length)) for prefix in data.valid]
    return (
        _build_split(Split.train, train, train_samples, data, tokenizer),
        _build_split(Split.valid, valid, valid_samples, data, tokenizer) if valid and valid_samples else None,
    )


def distinct_samples(prefixes: Sequence[str], sequence_length: int) -> int:
    """How many samples :func:`build_datasets` gives of these datasets before one comes again; 0 without any.

    Raises:
        ConfigError: as :func:`read_index`.
    """
    return sum(_whole_samples(read_index(prefix).tokens, sequence_length) for prefix in prefixes)


def _whole_samples(tokens: int, sequence_length: int) -> int:
    # a sample's labels are its tokens moved by one
    return max(0, (tokens - 1) // sequence_length)


def global_batch(dataset: SampleDataset, samples: Sequence[int]) -> dict[str, torch.Tensor]:
    """The samples with these GLOBAL indices, stacked; b of them, each s tokens long.

    Returns:
        int64 ``tokens``, ``labels``, ``position_ids`` [b, s], float32 ``loss_mask`` [b, s], int64 ``sample_index`` [b];
        with ``data.reset_at_documents`` also bool ``document_starts`` [b, s], true at every row's first token.

    Raises:
        IndexError: for an index outside the dataset.
    """
    for sample in samples:
        if not 0 <= sample < len(dataset):
            raise IndexError(f"sample {sample} is outside the dataset's {len(dataset)} samples")
    rows = [dataset[sample] for sample in samples]
    # a blend's rows also name the part that they came from
    names = [name for name in rows[0] if name != "dataset_id"]
    batch = {name: torch.stack([row[name] for row in rows]) for name in names}
    return {**batch, "sample_index": torch.tensor(samples, dtype=torch.int64)}


def _build_split(
    split: Split, parts: list[tuple[str, DatasetIndex]], samples: int, data: DataConfig, tokenizer: Tokenizer
) -> SampleDataset:
    indices = [index for _, index in parts]
    tokens = [index.tokens for index in indices]
    own = [_whole_samples(part, data.sequence_length) for part in tokens]
    # Held-out parts are mixed by their samples: a blend then takes each once before it takes any again.
    shares = tokens if split is Split.train else own
    weights = [share / sum(shares) for share in shares]
    # A blend may take a sample more of a part than its share: megatron-core's margin, a share alone, is too small.
    sizes = [samples] if len(parts) == 1 else [int(samples * weight * 1.005) + 2 for weight in weights]
    if split is Split.valid and samples <= sum(own):
        # With that margin, a part may be repeated and shuffled with its repetition.
        sizes = [min(pair) for pair in zip(sizes, own, strict=True)]
    for (prefix, index), size in zip(parts, sizes, strict=True):
        _check_index(prefix, index, size, data.sequence_length)
    datasets = []
    for (prefix, index), size in zip(parts, sizes, strict=True):
        per_split = [size if one is split else 0 for one in Split]
        with index_cache(data.cache, [index]) as cache:
            config = _dataset_config(data, tokenizer, cache, split, prefix)
            builder = BlendedMegatronDatasetBuilder(PackedDataset, per_split, _on_every_rank, config)
            datasets.append(builder.build()[split.value])
    if len(datasets) == 1:
        return datasets[0]
    with index_cache(data.cache, indices) as cache:
        config = replace(config, path_to_cache=cache)
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            BlendedDataset, _on_every_rank, True, datasets, weights, samples, config
        )


def _check_index(prefix: str, index: DatasetIndex, samples: int, sequence_length: int) -> None:
    """Raises ConfigError where text is repeated so often that the index would fill the host's memory."""
    passes = math.ceil((samples * sequence_length + 1) / index.tokens)
    needed = _BYTES_PER_SAMPLE * samples + _BYTES_PER_DOCUMENT * passes * index.documents
    # A single pass is as large as the text is.
    if passes > 1 and needed > _MOST_INDEX_BYTES:
        raise ConfigError(
            f"dataset {prefix} would be repeated {passes} times for {samples} samples, and its index would need "
            f"{needed / 1e9:.0f} GB of the host's memory; train on more text, or ask for fewer steps or samples"
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
        reset_position_ids=data.reset_at_documents,
        reset_attention_mask=data.reset_at_documents,
        eod_mask_loss=data.reset_at_documents,
        create_attention_mask=False,
    )

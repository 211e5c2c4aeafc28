"""Text and chat data to megatron-core datasets: documents, their split, datasets on disk, samples, held-out windows."""

from megatron_dmc.data.build import build_chat_dataset, build_indexed_dataset
from megatron_dmc.data.chat import iter_conversations, usable_conversations
from megatron_dmc.data.chat_template import load_chat_template
from megatron_dmc.data.documents import iter_documents, standard_library_documentation, standard_library_documents
from megatron_dmc.data.heldout import HeldoutWindows, heldout_windows
from megatron_dmc.data.reach import check_reach
from megatron_dmc.data.repeats import Repeats, SecondCopies
from megatron_dmc.data.samples import SampleDataset, build_datasets, distinct_samples, global_batch
from megatron_dmc.data.split import split_documents

__all__ = [
    "HeldoutWindows",
    "Repeats",
    "SampleDataset",
    "SecondCopies",
    "build_chat_dataset",
    "build_datasets",
    "build_indexed_dataset",
    "check_reach",
    "distinct_samples",
    "global_batch",
    "heldout_windows",
    "iter_conversations",
    "iter_documents",
    "load_chat_template",
    "split_documents",
    "standard_library_documentation",
    "standard_library_documents",
    "usable_conversations",
]

"""Text to megatron-core datasets: documents, their split, indexed datasets on disk, samples, and held-out windows."""

from megatron_dmc.training.data.build import build_indexed_dataset
from megatron_dmc.training.data.documents import iter_documents, standard_library_documents
from megatron_dmc.training.data.heldout import HeldoutWindows, heldout_windows
from megatron_dmc.training.data.samples import SampleDataset, build_datasets, global_batch
from megatron_dmc.training.data.split import split_documents

__all__ = [
    "HeldoutWindows",
    "SampleDataset",
    "build_datasets",
    "build_indexed_dataset",
    "global_batch",
    "heldout_windows",
    "iter_documents",
    "split_documents",
    "standard_library_documents",
]

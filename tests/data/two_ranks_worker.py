"""Two ranks build the same datasets at once, and each leaves its batch in ``rankN.pt``: DATASET TOKENIZER FOLDER.

Both are forks of one process: its imports take longer than all else.
"""

import sys
from pathlib import Path

import torch
import torch.multiprocessing

from megatron_dmc.data import build_datasets, global_batch
from megatron_dmc.data.tokenizer import load_tokenizer
from tests.support.texts import data_config


def build(rank: int, dataset: str, tokenizer_folder: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    tokenizer = load_tokenizer(tokenizer_folder)
    train, _ = build_datasets(data_config(folder / "together", tokenizer, dataset, dataset), tokenizer, 50, 0)
    torch.save(global_batch(train, range(50))["tokens"], folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    dataset, tokenizer_folder, folder = sys.argv[1:]
    torch.multiprocessing.start_processes(
        build, (dataset, tokenizer_folder, Path(folder)), nprocs=2, start_method="fork"
    )

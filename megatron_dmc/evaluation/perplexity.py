"""Loss of a checkpoint on held-out text, what its decisions did there, and what copying costs it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.data import HeldoutWindows, SampleDataset, SecondCopies
from megatron_dmc.inference.loading import LoadedModel
from megatron_dmc.model.compression_loss import compression_ratio
from megatron_dmc.model.documents import pack_documents
from megatron_dmc.model.gpt import dmc_layers


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token that counts in it, ``tokens`` of them; loss_per_byte: nats per byte, at the
    whole held-out text's bytes per token; layer_head_ratio: noise-free [layers, kv_heads]."""

    loss: float
    loss_per_byte: float
    tokens: int
    layer_head_ratio: Tensor | None = None
    compression_ratio: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def evaluate(
    loaded: LoadedModel, windows: HeldoutWindows, *, batch_size: int = 8, limit: int | None = None
) -> Evaluation:
    """Runs the model in eval mode (binary decisions, no noise) over the windows, or the first ``limit`` of them.

    Raises:
        ConfigError: where no token there counts in the loss.
    """
    layers = dmc_layers(loaded.model)
    for layer in layers:
        layer.statistics.reset()
    count = len(windows) if limit is None else min(limit, len(windows))
    total, tokens = _read(loaded, windows, batch_size, count)
    if not tokens:
        raise ConfigError(f"no token of the first {count} held-out windows counts in the loss; read more of them")
    loss = total / tokens
    per_byte = loss / windows.bytes_per_token
    if not loaded.merges:
        return Evaluation(loss, per_byte, tokens)
    _, merged, seen, _ = torch.stack([layer.statistics.total() for layer in layers]).unbind(1)
    return Evaluation(
        loss,
        per_byte,
        tokens,
        compression_ratio(merged.double(), seen.double()).cpu(),
        float(compression_ratio(merged.double().sum(), seen.double().sum())),
    )


def measure_recall(
    loaded: LoadedModel, windows: HeldoutWindows, *, batch_size: int = 8, limit: int | None = None
) -> float | None:
    """Nats per token on what a model can copy: the second copies in the windows, each as a text twice (``text_twice``).

    Binary decisions, no noise; the first ``limit`` windows, or all. None where no token there counts in the loss.
    """
    count = len(windows) if limit is None else min(limit, len(windows))
    total, tokens = _read(loaded, SecondCopies(windows), batch_size, count)
    return total / tokens if tokens else None


@torch.no_grad()
def _read(loaded: LoadedModel, samples: SampleDataset, batch_size: int, count: int) -> tuple[float, int]:
    """The loss' sum over the first ``count`` samples, and how many tokens count in it."""
    total, tokens = 0.0, 0
    for begin in range(0, count, batch_size):
        rows = [samples[i] for i in range(begin, min(begin + batch_size, count))]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        starts = batch.pop("document_starts", None)
        packed = None if starts is None else pack_documents(starts, loaded.device)
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
        losses = loaded.model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed
        )
        total += float((losses.double() * batch["loss_mask"]).sum())
        tokens += int(batch["loss_mask"].sum())
    return total, tokens

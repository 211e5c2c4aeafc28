"""The noise of the merge decisions: one function, whose implementation the caller may choose."""

from collections.abc import Sequence

from torch import Tensor

from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.noise import naive
from megatron_dmc.ops.noise.torch import logistic_noise as torch_logistic_noise


def logistic_noise(
    seed: int,
    sample_index: Tensor,
    layer: int,
    kv_heads: Sequence[int] | Tensor,
    positions: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Logistic(0, 1) noise that depends on nothing but global indices (Philox4x32-10, Salmon et al., SC 2011).

    The difference of two Gumbel samples is logistic: sigmoid((decision_logits + noise) / temperature) is the Gumbel-sigmoid of
    the paper, section 3.2. The same indices give the same noise in every parallel layout, in recomputation and after a resume.

    Args:
        seed: in [0, 2^63).
        sample_index: int64 [batch], the samples' numbers in the whole training run.
        layer: global layer number, in [0, 2^16).
        kv_heads: global KV head numbers, in [0, 2^16).
        positions: int64 [seq], global positions in the sample, in [0, 2^33).
        backend: "auto", "torch", or "naive", the oracle in Python integers.

    Returns:
        float32 [batch, seq, kv_heads] on sample_index's device, within ±16.7.

    Raises:
        ValueError: the backend is unknown.
    """
    noise = choose(backend, {"torch": torch_logistic_noise, "naive": naive.logistic_noise})
    return noise(seed, sample_index, layer, kv_heads, positions)

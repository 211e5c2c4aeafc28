"""Names of baselines: the presses of kvpress, and one more. Nothing here needs torch: the command's help lists them."""

from collections.abc import Callable
from typing import Any

# The one that is not of kvpress.
QUANTIZED = "quantized"
# Of kvpress, by the names that papers give them; each is made with the share of tokens that is dropped.
PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "streaming_llm": lambda kvpress, dropped: kvpress.StreamingLLMPress(dropped),
    "knorm": lambda kvpress, dropped: kvpress.KnormPress(dropped),
    "h2o": lambda kvpress, dropped: kvpress.ObservedAttentionPress(dropped),
    "tova": lambda kvpress, dropped: kvpress.TOVAPress(dropped),
    "snapkv": lambda kvpress, dropped: kvpress.SnapKVPress(dropped),
    "expected_attention": lambda kvpress, dropped: kvpress.ExpectedAttentionPress(dropped, epsilon=1e-2),
    "adakv_expected_attention": lambda kvpress, dropped: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(dropped, epsilon=1e-2)
    ),
    "kvzip": lambda kvpress, dropped: kvpress.KVzipPress(dropped),
}
# It sums the attention weights themselves, which only transformers' slowest attention returns.
NEED_WEIGHTS = {"h2o"}

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
# Of kvpress, too, but applied again and again while a text is read. They are told how many slots there are to be.
PIECEWISE: dict[str, Callable[[Any], Any]] = {
    "piecewise_streaming_llm": lambda kvpress: kvpress.StreamingLLMPress(),
    "piecewise_tova": lambda kvpress: kvpress.TOVAPress(),
    "piecewise_snapkv": lambda kvpress: kvpress.SnapKVPress(window_size=32),
}
OF_KVPRESS = (*PRESSES, *PIECEWISE)
# It sums the attention weights themselves, which only transformers' slowest attention returns.
NEED_WEIGHTS = {"h2o"}

"""A decoding step of a whole model with the compressed cache against the plain model's, and the bytes both caches hold; or
the time and the peak memory of a prompt.

    python benchmarks/decode.py
    python benchmarks/decode.py --prefill

Hugging Face models of SmolLM2-135M's shape with random weights; the plain one keeps transformers' own cache and attends by
torch's SDPA. The decisions are drawn, not learned: a head appends one token in ``--ratio``, or the heads differ as in a
trained model (``skewed``: half of them near 1.5, a few above 20, the mean as asked).
"""

import argparse
import sys
from typing import Any

import common
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from megatron_dmc.hf.cache import DMCCache
from megatron_dmc.hf.families.llama import DMCLlamaConfig, DMCLlamaForCausalLM

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 16384,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
HEAD_DIM = 64
PEAKS = ("plain", "compressed")


def appending_rates(ratio: float, heads: int, skewed: bool) -> Tensor:
    """How often each head appends, [heads]; on average one token in ``ratio``."""
    if not skewed:
        return torch.full((heads,), 1 / ratio)
    # From 1/25 to 2/3 with a steepness that gives the mean.
    place = torch.linspace(0, 1, heads, dtype=torch.float64)
    low, high = 0.02, 50.0
    for _ in range(60):
        steepness = (low + high) / 2
        rates = 1 / 25 + (2 / 3 - 1 / 25) * place**steepness
        low, high = (steepness, high) if rates.mean() > 1 / ratio else (low, steepness)
    return rates.float()


class DrawnDecisions(nn.Module):
    """In place of the projection: logits far from zero, drawn anew for every token."""

    def __init__(self, rates: Tensor):
        super().__init__()
        self.rates = rates
        self.generator = torch.Generator().manual_seed(len(rates))

    def forward(self, hidden_states: Tensor) -> Tensor:
        uniform = torch.rand(*hidden_states.shape[:-1], len(self.rates), generator=self.generator)
        decision = torch.where(uniform < self.rates, -100.0, 100.0)
        return torch.stack([decision, torch.zeros_like(decision)], dim=-1).flatten(-2).to(hidden_states.dtype)


def models(options: argparse.Namespace) -> tuple[Any, Any]:
    """The plain one and the compressed one, with the same weights."""
    torch.manual_seed(1)
    dmc = {"local_window": options.local_window, "operation": options.operation}
    compressed = DMCLlamaForCausalLM(DMCLlamaConfig(**SIZES, dmc=dmc)).eval()
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    plain.load_state_dict(compressed.state_dict(), strict=False)
    kv_heads = SIZES["num_key_value_heads"]
    rates = appending_rates(options.ratio, SIZES["num_hidden_layers"] * kv_heads, options.skewed)
    rates = rates[torch.randperm(len(rates))].view(-1, kv_heads)
    for layer, of_layer in zip(compressed.model.layers, rates, strict=True):
        layer.self_attn.decision = DrawnDecisions(of_layer)
    return plain.to(options.dtype), compressed.to(options.dtype)


def filled(plain: Any, compressed: Any, batch: int, seq: int) -> tuple[DynamicCache, DMCCache]:
    """Caches of ``seq`` random keys and values for ``batch`` sequences: a prompt of 8192 tokens would take minutes."""
    kv_heads, dtype = SIZES["num_key_value_heads"], plain.dtype
    held, cache = DynamicCache(config=plain.config), DMCCache(compressed.config)
    positions = torch.arange(seq)[None]
    cos, sin = (x[:, :, None] for x in compressed.model.rotary_emb(torch.zeros(1, dtype=dtype), positions))
    for index, layer in enumerate(compressed.model.layers):
        key, value = (torch.randn(1, seq, kv_heads, HEAD_DIM, dtype=dtype) for _ in range(2))
        held.update(*(x.transpose(1, 2).repeat(batch, 1, 1, 1) for x in (key, value)), index)
        decision = layer.self_attn.decision(torch.zeros(1, seq, 1))[..., ::2]
        # One query head does for what attention costs meanwhile.
        query = key
        cache.layers[index].attend(query, key, value, decision > 0, torch.ones(1, seq, kv_heads), cos, sin)
    cache.take_columns(None, 1, seq)
    cache.batch_repeat_interleave(batch)
    return held, cache


def measure(batch: int, seq: int, options: argparse.Namespace) -> dict[str, Any]:
    plain, compressed = models(options)
    held, cache = filled(plain, compressed, batch, seq)
    token = torch.zeros(batch, 1, dtype=torch.long)
    seconds = common.interleaved_seconds(
        {
            "plain": lambda: plain(token, past_key_values=held),
            "compressed": lambda: compressed(token, past_key_values=cache),
        },
        options.rounds,
        options.clock,
    )
    plain_bytes = sum(x.keys.nbytes + x.values.nbytes for x in held.layers)
    return {
        "tokens": seq,
        "batch": batch,
        "plain ms": common.median_ms(seconds["plain"]),
        "time over plain": common.ratio_to("plain", seconds)["compressed"],
        "compression ratio": cache.compression_ratio,
        "cache bytes": cache.nbytes,
        "plain bytes": plain_bytes,
        "bytes x ratio": cache.nbytes / plain_bytes * cache.compression_ratio,
    }


def prefill(seq: int, options: argparse.Namespace) -> dict[str, Any]:
    """A prompt through both models, the plain one with its cache and without any."""
    plain, compressed = models(options)
    prompt = random_prompt(seq)
    seconds = common.interleaved_seconds(
        {
            "plain": lambda: plain(prompt, use_cache=True, logits_to_keep=1),
            "without a cache": lambda: plain(prompt, use_cache=False, logits_to_keep=1),
            "compressed": lambda: compressed(prompt, use_cache=True, logits_to_keep=1),
        },
        options.rounds,
        options.clock,
    )
    peaks = {form: int(common.in_own_process(__file__, [*sys.argv[1:], "--peak", form])) for form in PEAKS}
    return {
        "prompt": seq,
        "plain ms": common.median_ms(seconds["plain"]),
        "time over plain": common.ratio_to("plain", seconds)["compressed"],
        "time over plain without a cache": common.ratio_to("without a cache", seconds)["compressed"],
        "plain peak MiB": peaks["plain"] / 2**20,
        "peak over plain": peaks["compressed"] / peaks["plain"],
    }


def random_prompt(seq: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (1, seq), generator=torch.Generator().manual_seed(1))


def peak_bytes(form: str, seq: int, options: argparse.Namespace) -> int:
    """By which one prompt lets this process grow at most, the cache that is left included."""
    model = dict(zip(PEAKS, models(options), strict=True))[form]
    model(random_prompt(seq)[:, :64], use_cache=True, logits_to_keep=1)  # what is allocated or compiled once
    return common.peak_growth(lambda: model(random_prompt(seq), use_cache=True, logits_to_keep=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1x2048", "4x8192"], help="batch x tokens in the cache")
    parser.add_argument("--prefill", action="store_true", help="a prompt of 2048 tokens instead")
    parser.add_argument("--ratio", type=float, default=4.0, help="compression ratio")
    parser.add_argument("--skewed", action="store_true", help="heads differ in their ratios")
    parser.add_argument("--operation", default="merge")
    parser.add_argument("--local-window", type=int, default=16)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    common.add_timing_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if options.peak:
            print(peak_bytes(options.peak, 2048, options))
            return
        if options.prefill:
            rows = [prefill(2048, options)]
        else:
            rows = [measure(*map(int, size.split("x")), options) for size in options.sizes]
    del options.peak
    settings = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(options).items()}
    name = "decode_prefill" if options.prefill else "decode"
    common.report(
        name, f"{'prefill' if options.prefill else 'a decoding step'} of SmolLM2-135M's shape", rows, **settings
    )


if __name__ == "__main__":
    main()

"""The attention backend: which rows of a batch are whose, and how their tokens are taken in."""

from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from megatron_dmc.serving.decoding import Decoding, DecodingBuffers
from megatron_dmc.serving.worker_cache import Chunks, Group, NewTokens, Request, WorkerCache


@dataclass
class DMCMetadata(AttentionMetadata):
    """Of one step.

    Attributes:
        decoding: the first requests of the batch, which kernels take in; None: there are none.
        requests: the others that have new tokens.
    """

    decoding: Decoding | None
    requests: list[Request]
    _thresholds: Tensor | None = None
    _groups: list[Group] | None = None
    _chunks: Chunks | None = None

    def granted(self, cache: WorkerCache) -> list[Request]:
        """Requests that were granted nothing are left out: so vLLM warms up."""
        return [each for each in self.requests if each.blocks[0] in cache.granted.places]

    def merges(self, decision_logits: Tensor, cache: WorkerCache) -> Tensor:
        """Whether each token merges, bool as decision_logits [tokens, kv_heads]: by its request's threshold."""
        if self.requests and self._thresholds is None:
            firsts = torch.zeros(len(decision_logits), dtype=torch.int32)
            for each in self.requests:
                firsts[each.rows.start : each.rows.stop] = each.blocks[0]
            self._thresholds = cache.thresholds.index_select(0, firsts.to(cache.thresholds.device))[:, None]
        alpha = decision_logits > (0.0 if self._thresholds is None else self._thresholds)
        if self.decoding is not None:
            # For each layer anew: what were kept from vLLM's warm-up would be no part of the graph that it captures then.
            thresholds = cache.thresholds.index_select(0, self.decoding.place)[:, None]
            alpha[: len(thresholds)] = decision_logits[: len(thresholds)] > thresholds
        return alpha

    def groups(self, cache: WorkerCache) -> list[Group]:
        """The same for all layers."""
        if self._groups is None:
            places = cache.granted.places
            known = [(each, places[each.blocks[0]]) for each in self.granted(cache)]
            single = [(each, place) for each, place in known if len(each.rows) == 1]
            self._groups = [
                Group(slice(each.rows.start, each.rows.stop), [each], [place], len(each.rows))
                for each, place in known
                if len(each.rows) > 1
            ]
            if single:
                rows = _chosen([each.rows.start for each, _ in single])
                self._groups.append(Group(rows, [each for each, _ in single], [place for _, place in single]))
        return self._groups

    def chunks(self, cache: WorkerCache, angles: Tensor, dtype: torch.dtype) -> Chunks | None:
        """The same for all layers; None: there is nothing to take in."""
        if self._chunks is None and (requests := self.granted(cache)):
            self._chunks = Chunks(requests, cache.header.layout.local_window, angles, dtype)
        return self._chunks


def _chosen(rows: list[int]) -> Tensor | slice:
    """An index of these rows, ascending; a slice makes views of tensors, not copies."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device="cpu")


class DMCMetadataBuilder(AttentionMetadataBuilder[DMCMetadata]):
    buffers: DecodingBuffers | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if kv_cache_spec.by_kernels:
            # Requests with one token come first in a batch.
            self._init_reorder_batch_threshold(1)
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            requests, window = vllm_config.scheduler_config.max_num_seqs, kv_cache_spec.local_window
            self.buffers = DecodingBuffers(requests, window, layer.rotary.cos_sin_cache, layer.header.dtype)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if kv_cache_spec.by_kernels:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DMCMetadata:
        common, decoding = common_attn_metadata, None
        count = self._first_with_one_token(common) if self.buffers is not None else 0
        if self.buffers is not None and count:
            decoding = self.buffers.filled(common.block_table_tensor[:count, 0], common.seq_lens[:count])
        return DMCMetadata(decoding, self._requests(common, count) if count < common.num_reqs else [])

    def _first_with_one_token(self, common: Any) -> int:
        """How many requests at a batch's beginning have one; no length is asked for."""
        if common.max_query_len == 1:
            return int(common.num_reqs)  # and what a graph is filled up with
        starts = common.query_start_loc_cpu.tolist()
        return len(list(takewhile(lambda n: n == 1, (b - a for a, b in pairwise(starts)))))

    def _requests(self, common: Any, start: int) -> list[Request]:
        """From ``start`` on. Waits for the device."""
        starts = common.query_start_loc_cpu[start:].tolist()
        # Exact, since nothing is speculated.
        known = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if known is None else known)[start:].tolist()
        headers = common.block_table_tensor[start:, : self.kv_cache_spec.header_blocks].tolist()
        spans = zip(starts, starts[1:], lengths, headers, strict=False)  # padded to the sizes of captured graphs
        return [Request(range(a, b), header, length - (b - a)) for a, b, length, header in spans if b > a]


class DMCBackend(AttentionBackend):
    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012 (vLLM's form)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # of vLLM's list of names the one for others' backends

    @staticmethod
    def get_impl_cls() -> "type[DMCImpl]":
        return DMCImpl

    @staticmethod
    def get_builder_cls() -> type[DMCMetadataBuilder]:
        return DMCMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)  # a block's cells of all layers side by side: one pool for all of them


def _is_a_step() -> bool:
    """Whether there are requests, and not what vLLM runs for itself."""
    return has_kv_transfer_group() and get_kv_transfer_group().has_connector_metadata()


class DMCImpl(AttentionImpl):
    def __init__(self) -> None:  # abstract in the base class
        pass

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: DMCMetadata | None,
        *,
        output: Tensor,
        **_: Any,
    ) -> Tensor:
        """Called by vLLM's operator with what CompressedAttention gave it; fills ``output`` [tokens, heads, head_dim]."""
        if layer.cache is None and _is_a_step():
            raise RuntimeError(
                f"megatron-dmc: {layer.layer_name} was given no cache; report this as an error of the plugin"
            )
        if layer.cache is None or attn_metadata is None:
            return output.zero_()  # vLLM measures memory, of captured graphs too
        width = query.shape[-1]
        decision_logits, omega = key[..., width:].contiguous().view(torch.float32).unbind(-1)
        alpha = attn_metadata.merges(decision_logits, layer.cache)
        new = NewTokens(query, key[..., :width], value, alpha, omega)
        taken = 0
        if (decoding := attn_metadata.decoding) is not None:
            taken = len(decoding.tokens)
            layer.cache.decode(layer.layer_name, decoding, NewTokens(*(x[:taken] for x in new)), output[:taken])
        output[taken:].zero_()
        if not attn_metadata.requests:
            return output
        cache = layer.cache
        if cache.kernels is not None and cache.kernels.take_in is not None:
            chunks = attn_metadata.chunks(cache, layer.rotary.cos_sin_cache, query.dtype)
            if chunks is not None:
                stop = len(chunks.many.cos)
                out = cache.take_in(layer.layer_name, chunks, NewTokens(*(x[:stop] for x in new)))
                output[taken:stop] = out[taken:]
            return output
        for group in attn_metadata.groups(layer.cache):
            part = NewTokens(*(x[group.rows] for x in new))
            out = layer.cache.attend(layer.layer_name, group, part, layer.rotary.cos_sin_cache)
            output[group.rows] = out.to(output.dtype)
        return output

"""The attention backend: which rows of a batch are whose, and attention request by request."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheLayout

from megatron_dmc.serving.worker_cache import NewTokens, Request


@dataclass
class DMCMetadata(AttentionMetadata):
    """Of one step: each request that has new tokens, and their rows."""

    requests: list[tuple[slice, Request]]


class DMCMetadataBuilder(AttentionMetadataBuilder[DMCMetadata]):
    def __init__(self, *args: Any, **kwargs: Any):  # abstract in the base class
        super().__init__(*args, **kwargs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DMCMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        headers = common.block_table_tensor[:, : self.kv_cache_spec.header_blocks].tolist()
        spans = zip(starts, starts[1:], lengths, headers, strict=False)  # padded to the sizes of captured graphs
        return DMCMetadata(
            [(slice(a, b), Request(header, length - (b - a))) for a, b, length, header in spans if b > a]
        )


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
        output.zero_()
        if attn_metadata is None:
            return output  # vLLM measures memory
        if layer.cache is None:
            raise RuntimeError(
                f"megatron-dmc: {layer.layer_name} was given no cache; report this as an error of the plugin"
            )
        width = query.shape[-1]
        decision = key[..., width:].contiguous().view(torch.float32)[..., 0]
        new = NewTokens(query, key[..., :width], value, decision < 0, decision.abs())
        for rows, request in attn_metadata.requests:
            output[rows] = layer.cache.attend(layer.layer_name, layer.rows, request, NewTokens(*(x[rows] for x in new)))
        return output

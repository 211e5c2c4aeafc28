"""The attention backend: which rows of a batch are whose, and attention group by group."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheLayout

from megatron_dmc.serving.worker_cache import Group, NewTokens, WorkerCache


@dataclass
class DMCMetadata(AttentionMetadata):
    """Of one step: each request that has new tokens, as its rows, the blocks of its state, and the tokens seen before."""

    requests: list[tuple[range, list[int], int]]
    _groups: list[Group] | None = None

    def groups(self, cache: WorkerCache) -> list[Group]:
        """The same for all layers. Requests that were granted nothing are left out: so vLLM warms up."""
        if self._groups is None:
            known = [each for each in self.requests if each[1][0] in cache.granted]
            single = [each for each in known if len(each[0]) == 1]
            self._groups = [
                Group(slice(rows.start, rows.stop), [blocks], [seen], len(rows))
                for rows, blocks, seen in known
                if len(rows) > 1
            ]
            if single:
                rows = _chosen([each[0].start for each in single])
                self._groups.append(Group(rows, [each[1] for each in single], [each[2] for each in single]))
        return self._groups


def _chosen(rows: list[int]) -> Tensor | slice:
    """An index of these rows, ascending; a slice makes views of tensors, not copies."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device="cpu")


class DMCMetadataBuilder(AttentionMetadataBuilder[DMCMetadata]):
    def __init__(self, *args: Any, **kwargs: Any):  # abstract in the base class
        super().__init__(*args, **kwargs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DMCMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        headers = common.block_table_tensor[:, : self.kv_cache_spec.header_blocks].tolist()
        spans = zip(starts, starts[1:], lengths, headers, strict=False)  # padded to the sizes of captured graphs
        return DMCMetadata([(range(a, b), header, length - (b - a)) for a, b, length, header in spans if b > a])


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
        new = NewTokens(query, key[..., :width], value, decision.signbit(), decision.abs())
        for group in attn_metadata.groups(layer.cache):
            part = NewTokens(*(x[group.rows] for x in new))
            out = layer.cache.attend(layer.layer_name, group, part, layer.rotary.cos_sin_cache)
            output[group.rows] = out.to(output.dtype)
        return output
